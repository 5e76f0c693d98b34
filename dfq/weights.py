"""Weights from files: read without executing anything, checked, and told apart.

safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dfq.errors import CheckpointError

# Where training code puts the weights inside a checkpoint; averaged weights first, as timm does.
_STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
_MAX_SHARED = 16
"""Weights may share their bytes; so many times the file they may be together."""


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """A state dict from a safetensors file or a PyTorch checkpoint, in float32.

    Raises CheckpointError where the file is missing, damaged, holds no weights, or wants to run code.
    """
    file = Path(path)
    if not file.is_file():
        wrong = "is a folder, and weights are a file in it" if file.is_dir() else "is not there"
        raise CheckpointError(f"the checkpoint file {file} {wrong}")
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            _check_unpacked(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error})") from error
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise CheckpointError(
                f"{file} holds more than weights, and loading it could run code; it was not loaded. Save "
                "`model.state_dict()` to safetensors and give that"
            ) from error
        raise CheckpointError(f"{file} is neither safetensors nor a PyTorch checkpoint") from error
    # A broken archive has torch.load call almost anything with almost anything.
    except Exception as error:
        said = str(error).partition("\n")[0]
        # Of a file that never was one it is a number, or less.
        reason = f" ({said})" if " " in said else ""
        raise CheckpointError(f"{file} is damaged, or no checkpoint at all{reason}") from error
    content = _as_dict(content)
    for key in _STATE_DICT_KEYS:
        if isinstance(content.get(key), dict):
            content = _as_dict(content[key])
            break
    if not content or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        raise CheckpointError(f"{file} holds no state dict (a mapping from parameter names to tensors)")
    odd = [key for key, value in content.items() if not _is_plain(value)]
    if odd:
        raise CheckpointError(f"{file} holds a tensor that is not plain numbers ({odd[0]}); save the weights densely")
    # Views of a few bytes can have any shape.
    if sum(value.nbytes for value in content.values()) > _MAX_SHARED * file.stat().st_size:
        raise CheckpointError(f"{file} would unpack to far more than its size; save the weights as they are")
    state = {key.removeprefix("module."): value for key, value in content.items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _check_unpacked(file: Path) -> None:
    """Raise CheckpointError for a zip archive that is larger unpacked; torch.save compresses nothing."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
        sum(entry.file_size for entry in entries) > file.stat().st_size
    ):
        raise CheckpointError(
            f"{file} is a compressed archive, which torch.save does not write; unpack and save it again"
        )


def _as_dict(content: Any) -> dict[Any, Any]:
    """The entries of a dict of any class, whatever methods its file has given it; none of anything else."""
    return dict(dict.items(content)) if isinstance(content, dict) else {}


def _is_plain(value: Tensor) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_complex()
        and not value.is_quantized
    )


def load_into(module: nn.Module, state: dict[str, Tensor], name: str, file: Path | str) -> None:
    """`load_state_dict`; raises CheckpointError with what does not fit, in a sentence."""
    expected = module.state_dict()
    missing = [key for key in expected if key not in state]
    surplus = [key for key in state if key not in expected]
    reshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if missing or surplus or reshaped:
        found = [
            f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for kind, keys in (("missing", missing), ("unexpected", surplus), ("of another shape", reshaped))
            if keys
        ]
        raise CheckpointError(
            f"{file} is not a checkpoint of {name}: {'; '.join(found)}; give one of this architecture, or the "
            "architecture that it is of"
        )
    module.load_state_dict(state)


def check_finite(module: nn.Module, name: str) -> None:
    """Raise CheckpointError where a weight is not a finite number."""
    broken = [key for key, value in module.state_dict().items() if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(f"the weights of {name} hold NaN or infinite values in {', '.join(broken[:3])}")


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names and values of all weights: the same for the same model, whatever file it came from."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
