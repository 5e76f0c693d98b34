"""Networks by name: timm's, those on a hub, and the demo's."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import Tensor, nn

from calibration.files import read_json
from dfq import reference
from dfq.errors import DfqError

log = logging.getLogger("dfq")

REFERENCE = "reference"
_LOCAL_DIR = "local-dir:"
HUBS = ("hf-hub:", "hf_hub:", _LOCAL_DIR)
# Modules of timm with models that can be inverted.
_FAMILIES = (
    "beit",
    "cait",
    "convit",
    "deit",
    "eva",
    "nest",
    "swin_transformer",
    "swin_transformer_v2",
    "swin_transformer_v2_cr",
    "vision_transformer",
    "vision_transformer_relpos",
    "vision_transformer_sam",
)


def build_architecture(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """An untrained network: `reference`, or a timm architecture with keyword arguments for its constructor.

    Both may come from a file that somebody else wrote. Raises DfqError for a name that is not timm's own, such as one
    on a hub, and for arguments that would have timm read further files.
    """
    if architecture == REFERENCE:
        module: nn.Module = reference.build()
        return module
    check_known(architecture)
    reading = sorted(set(inspect.signature(timm.create_model).parameters) & set(arguments))
    if reading:
        raise DfqError(f"{', '.join(reading)} is not an argument of the architecture {architecture}")
    return _create(architecture, False, arguments)


def build_network(
    name: str,
    state: dict[str, Tensor] | None,
    arguments: dict[str, Any],
    *,
    random_weights: bool,
    seed: int,
    check: Callable[[str, nn.Module], None],
) -> tuple[nn.Module, str, dict[str, Any]]:
    """(network, architecture, all arguments of its constructor) of a timm name or one on a hub.

    state: of a checkpoint that is to be loaded into it, for the number of its classes; without one, and not
    `random_weights`, timm's pretrained weights are there. check: raises for what cannot be used, before anything is
    downloaded where that can be told.
    """
    pretrained = state is None and not random_weights
    architecture = name
    if name.startswith(HUBS):
        architecture, saved = _on_hub(name)
        arguments = saved | arguments
    else:
        check_known(name)
        if pretrained:
            # Told before anything is downloaded.
            check(name, without_weights(name, arguments))
    head = None if state is None else state.get(_head_weight(architecture))
    if head is not None and head.dim() == 2:
        arguments = arguments | {"num_classes": head.shape[0]}
    if pretrained and not name.startswith(_LOCAL_DIR):
        log.info("%s: pretrained weights from the hub, or from its cache", name)
    module = seeded(lambda: _create(name, pretrained, arguments), seed)
    check(name, module)
    return module, architecture, arguments | {"num_classes": num_classes_of(module)}


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """`build()` with torch's global generator set for its time only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def supported_names(filter: str = "") -> list[str]:
    """timm names of the families that can be inverted, those that match `filter` (`vit_*`) where it is given.

    A filter without wildcards is looked for anywhere in the name. Single models of a family may still be refused:
    `describe_support` has the reason.
    """
    pattern = filter if any(letter in filter for letter in "*?[") else f"*{filter}*"
    return sorted(name for family in _FAMILIES for name in timm.list_models(pattern, module=family))


def check_known(name: str) -> None:
    base = name.split(".")[0]
    if timm.is_model(base):
        tags = [entry for entry in timm.list_pretrained(f"{base}.*") if entry.startswith(f"{base}.")]
        if name != base and name not in tags:
            raise DfqError(f"timm knows {base}, but not with the weights {name!r}; it has {', '.join(tags) or 'none'}")
        return
    if Path(name).is_dir():
        raise DfqError(
            f"{name} is a folder; one that holds a model in full precision, as on a hub, is given as {_LOCAL_DIR}{name}"
        )
    if Path(name).is_file():
        raise DfqError(f"{name} is a file; name the architecture that it holds weights of, and give it as --checkpoint")
    near = _near_names(base)
    hint = f"; did you mean {', '.join(near)}?" if near else ", and nothing here has it; `dfq list models` shows some"
    raise DfqError(f"timm knows no model {name!r}{hint}")


def _near_names(base: str) -> list[str]:
    # As timm writes them; some say vit-tiny, or ViT_Tiny, or put whose it is in front.
    wanted = base.rpartition("/")[2].lower().replace("-", "_")
    # Vision Transformers first: of two names as near, that is the one meant here.
    first = [REFERENCE, *timm.list_models(["vit_*", "deit*"])]
    begun = [name for name in first if len(wanted) > 3 and name.startswith(wanted)][:3]
    return (
        begun or difflib.get_close_matches(wanted, first, n=3) or difflib.get_close_matches(wanted, timm.list_models())
    )


def _create(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    try:
        module: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    # What timm and the hub raise for a missing network, file or tag shares no base class but Exception.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if pretrained and not name.startswith(_LOCAL_DIR):
            raise DfqError(
                f"timm could not get the pretrained weights of {name} ({reason}); without a network give "
                "--checkpoint FILE, or --random-weights to try things out"
            ) from error
        raise DfqError(f"timm could not build {name}: {reason}") from error
    return module


def without_weights(name: str, arguments: dict[str, Any] | None = None) -> nn.Module:
    """The structure of a model alone."""
    with torch.device("meta"):
        return build_architecture(name, arguments or {})


def _head_weight(architecture: str) -> str:
    """The name of the weight [C, D] that gives the logits; a distilled model has two of them, of one shape."""
    config = get_pretrained_cfg(architecture)
    classifier = getattr(config, "classifier", None) or "head"
    return f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"


def _on_hub(name: str) -> tuple[str, dict[str, Any]]:
    """Architecture and constructor arguments of a model on a hub, or in a folder laid out like one there."""
    place = name.partition(":")[2]
    read = load_model_config_from_path if name.startswith(_LOCAL_DIR) else load_model_config_from_hf
    try:
        _, architecture, arguments = read(place)
    # As in `_create`, and a config.json may hold anything.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DfqError(f"cannot find out what {name} is: {reason}") from error
    if name.startswith(_LOCAL_DIR) and "quantization_config" in read_json(Path(place) / "config.json"):
        raise DfqError(f"{name} holds a quantized model, not one to start from; `dfq.load` reads those of dfq")
    return str(architecture), dict(arguments or {})


def num_classes_of(module: nn.Module) -> int:
    classes: Any = getattr(module, "num_classes", 0)
    return int(classes)
