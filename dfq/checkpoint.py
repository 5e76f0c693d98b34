"""A quantized model on disk: `model.safetensors` (packed integers, quantizers, other parameters) and `config.json`.

Laid out as a model hub wants it: at the top level of `config.json` what timm writes there, and below
`quantization_config` all that dfq says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import quantizers
from calibration.files import make_directory, read_json, remove_file, replace_file, sha256_of, write_json
from dfq.architectures import build_architecture, without_weights
from dfq.errors import CheckpointError, DfqError
from dfq.models import Origin, resolve_device
from dfq.preprocessing import Preprocessing
from dfq.ptq.engine import QuantizedModel, kept_state
from dfq.ptq.fitting import place
from dfq.ptq.modules import PositionMean, QuantizedLayer, QuantizedLinear, Slotted, adapt
from dfq.recipe import parse_bits, recipe_from_dict
from dfq.versions import versions
from quantizers import Quantizer

FORMAT = "dfq.quantized_model"
VERSION = 2
QUANTIZATION = "quantization_config"
"""The key of `config.json` below which everything lies that timm does not know."""

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_SMALL = 2**26
"""Numbers that any network may have: tables of positions are in it, but not among its weights."""


def is_quantized_model(path: Path | str) -> bool:
    """Whether `path` is a folder that `save` wrote."""
    return (Path(path) / CONFIG).is_file() and (Path(path) / WEIGHTS).is_file()


def describe_sites(qmodel: QuantizedModel) -> dict[str, dict[str, Any]]:
    """The quantizer of every site that has one, and the shape of weights; `restore` takes it back."""
    shapes = {
        f"{path}.weight": list(layer.weight.shape)
        for path, layer in qmodel.module.named_modules()
        if isinstance(layer, QuantizedLayer)
    }
    return {
        name: quantizer.describe() | ({"shape": shapes[name]} if name in shapes else {})
        for name, quantizer in qmodel.sites.items()
    }


def description_of(qmodel: QuantizedModel) -> dict[str, Any]:
    """What `config.json` says of the quantized model, apart from the checksum of the weights."""
    return {
        "quant_method": "dfq",
        "format": FORMAT,
        "version": VERSION,
        "bits": qmodel.bits,
        "model": qmodel.origin.to_dict(),
        "preprocessing": qmodel.preprocessing.to_dict(),
        "recipe": qmodel.recipe.to_dict(),
        "sites": describe_sites(qmodel),
        "calibration": qmodel.calibration,
        "versions": versions(),
    }


def timm_config(qmodel: QuantizedModel) -> dict[str, Any]:
    """What timm keeps of a model in `config.json`: enough to build its architecture, without weights, and its inputs.

    An architecture that timm does not have, such as `reference`, is named as dfq names it.
    """
    module: Any = qmodel.module
    origin, preprocessing = qmodel.origin, qmodel.preprocessing.to_dict()
    layers = getattr(module, "pretrained_cfg", {})
    return {
        "architecture": origin.architecture.partition(".")[0],
        "num_classes": qmodel.num_classes,
        "num_features": module.num_features,
        "global_pool": module.global_pool,
        "model_args": origin.arguments,
        "pretrained_cfg": {
            "num_classes": qmodel.num_classes,
            "input_size": [3, *preprocessing.pop("image_size")],
            **preprocessing,
            **{key: layers[key] for key in ("fixed_input_size", "first_conv", "classifier") if key in layers},
        },
    }


def claim_directory(directory: Path | str, identity: dict[str, Any], *, overwrite: bool) -> bool:
    """See that a quantized model may be written to `directory`; True where that very model already lies there.

    identity: the entries of `description_of` that tell one run from another. A folder with nothing but a `calibration`
    set is a run that was stopped, and is continued. Nothing is removed here: what lies there is replaced by `save`.
    Raises DfqError for a folder that holds anything else, unless `overwrite`; and always where `save` would replace
    weights that are not its own, such as the original ones.
    """
    folder = Path(directory)
    make_directory(folder)
    if not _is_ours(folder / WEIGHTS):
        raise DfqError(f"{folder / WEIGHTS} is not a file that dfq made, and would be replaced; choose another --out")
    if is_quantized_model(folder):
        config = read_description(folder)
        wanted = json.loads(json.dumps(identity))
        if {key: config.get(key) for key in wanted} == wanted:
            return True
        if not overwrite:
            differing = ", ".join(key for key in wanted if config.get(key) != wanted[key])
            raise DfqError(
                f"{folder} holds a quantized model of another run (it differs in {differing}); choose another --out or "
                "give --overwrite"
            )
        return False
    surplus = {path.name for path in folder.iterdir() if not path.name.endswith(".partial")} - {"calibration", WEIGHTS}
    if surplus and not overwrite:
        raise DfqError(f"{folder} is not empty and holds no quantized model ({min(surplus)}); choose another --out")
    return False


def _is_ours(weights: Path) -> bool:
    """Whether `save` wrote this file; also where there is none."""
    if not weights.exists():
        return True
    try:
        with safe_open(weights, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def save(qmodel: QuantizedModel, directory: Path | str) -> None:
    """Write the model into `directory`, made if need be; files of an earlier model there are replaced.

    `config.json` comes last: a folder that has it has a whole model. Raises DfqError where it cannot be written.
    """
    folder = Path(directory)
    make_directory(folder)
    remove_file(folder / CONFIG)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in qmodel.tensors().items()}
    # One entry only: safetensors writes several in any order, and the same model would not give the same file.
    content = to_bytes(tensors, {"format": FORMAT})
    replace_file(folder / WEIGHTS, lambda partial: partial.write_bytes(content))
    description = description_of(qmodel) | {"sha256": sha256_of(folder / WEIGHTS)}
    write_json(folder / CONFIG, timm_config(qmodel) | {QUANTIZATION: description})


def read_description(folder: Path) -> dict[str, Any]:
    """What `description_of` said of the model that lies there. Raises DfqError where `config.json` cannot be read."""
    config = read_json(folder / CONFIG)
    # In version 1 it was the whole file.
    description = config.get(QUANTIZATION, config)
    return description if isinstance(description, dict) else {}


def load(directory: Path | str, *, device: str | torch.device | None = None) -> QuantizedModel:
    """Read a model that `save` wrote; its outputs are bit for bit those of the model that was saved.

    Raises CheckpointError where a file is missing, damaged, or does not fit the other.
    """
    folder = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            wrong = f"it has no {name}" if folder.is_dir() else "there is no such folder"
            raise CheckpointError(f"{folder} is not a quantized model: {wrong}; `dfq quantize` makes one")
    target = resolve_device(device)
    try:
        config = read_description(folder)
    except DfqError as error:
        raise CheckpointError(str(error)) from error
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{folder / CONFIG} does not describe a quantized model ({config.get('format')!r})")
    if config.get("version") not in range(1, VERSION + 1):
        raise CheckpointError(f"{folder / CONFIG} has version {config.get('version')!r}; this dfq reads 1 to {VERSION}")
    if config.get("sha256") != sha256_of(folder / WEIGHTS):
        raise CheckpointError(f"{folder / WEIGHTS} is damaged: its checksum is not the one in {CONFIG}")
    try:
        tensors = load_file(folder / WEIGHTS)
        return _assemble(config, tensors, target)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is not a whole safetensors file ({error})") from error
    # The description may hold anything, and what timm and PyTorch raise for it shares no base class but Exception.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder / CONFIG} and {WEIGHTS} do not make a model: {reason}") from error


def _assemble(config: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> QuantizedModel:
    origin = Origin.from_dict(config["model"])
    recipe = recipe_from_dict(config["recipe"], name=config["recipe"]["name"], where=CONFIG)
    if not isinstance(config["calibration"], dict):
        raise ValueError("what it says of the calibration is not a table")
    _check_size(origin, tensors)
    module = adapt(build_architecture(origin.architecture, origin.arguments), deferred=recipe.softmax == "deferred")
    sites = restore(module, config["sites"], tensors)
    return QuantizedModel(
        module=module.requires_grad_(False).to(device),
        preprocessing=Preprocessing.from_dict(config["preprocessing"]),
        origin=origin,
        bits=str(parse_bits(config["bits"])),
        recipe=recipe,
        sites=sites,
        calibration=config["calibration"],
    )


def _check_size(origin: Origin, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a network would be built that is far larger than its weights."""
    blocks = [value for key, value in origin.arguments.items() if key.startswith("depth")]
    if any(count > len(tensors) for value in blocks for count in (value if isinstance(value, list) else [value])):
        raise ValueError(f"it asks for more blocks than there are weights ({blocks[0]})")
    network = without_weights(origin.architecture, origin.arguments)
    wanted = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    # Of weights of 2 bits, 4 lie in a byte.
    if wanted > max(_SMALL, 8 * sum(tensor.nbytes for tensor in tensors.values())):
        raise ValueError(f"it asks for a network of {wanted} numbers, far more than there are weights")


def restore(
    module: nn.Module, described: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor], *, strict: bool = True
) -> dict[str, Quantizer]:
    """Give an adapted network, nothing of which is quantized yet, what was kept of one; gives its quantizers by site.

    described: what `describe_sites` said; tensors: of `QuantizedModel.tensors`, on the network's device. Not `strict`:
    only some of them, and what they leave out stays as it is.

    Raises KeyError, ValueError and the like where the two do not fit each other or the network.
    """
    remaining = dict(tensors)
    sites: dict[str, Quantizer] = {}
    for name, entry in described.items():
        description = {key: value for key, value in entry.items() if key != "shape"}
        own = [key for key in remaining if key.rpartition(".")[0] == name and not key.endswith(".integers")]
        sites[name] = quantizers.build(description, {key.rpartition(".")[2]: remaining.pop(key) for key in own})

    layers = {f"{path}.weight": m for path, m in module.named_modules() if isinstance(m, QuantizedLayer)}
    packed = {name: remaining.pop(f"{name}.integers") for name in layers if name in sites}
    plain = {name: remaining.pop(name) for name in layers if name not in sites and (strict or name in remaining)}
    for path, layer in module.named_modules():
        # Reparametrisation gives an offset to layers that the architecture has without one.
        if isinstance(layer, QuantizedLayer) and layer.bias is None and f"{path}.bias" in remaining:
            layer.bias = nn.Parameter(layer.weight.new_empty(len(layer.weight)), requires_grad=False)
        if isinstance(layer, QuantizedLinear) and f"{path}.position_mean.positions" in remaining:
            layer.position_mean = _position_mean(path, layer, remaining)
    # Before the quantizers take their places: the state dict knows only of the parameters.
    module.load_state_dict(remaining, strict=strict)
    for name, layer in layers.items():
        if name in packed:
            integers = quantizers.unpack(packed[name], sites[name].bits, layer.weight.shape, sites[name].signed)
            layer.set_integers(sites[name], integers)
        elif name in plain:
            layer.weight.copy_(plain[name])
    for name, quantizer in sites.items():
        if name not in layers and "." in name:
            if not isinstance(module.get_submodule(name), nn.Identity):
                raise ValueError(f"{name} is no place for a quantizer")
            place(module, name, quantizer)
    return sites


def _position_mean(path: str, layer: QuantizedLinear, tensors: Mapping[str, Tensor]) -> PositionMean:
    """The one kept at `path`. Raises KeyError or ValueError where it does not fit the layer."""
    positions, taken, given = (tensors[f"{path}.position_mean.{name}"] for name in ("positions", "taken", "given"))
    rank, wide = (positions.shape[-1] if positions.dim() else 0), layer.weight.shape
    wanted = [(*positions.shape[:1], rank), (rank, wide[1]), (rank, wide[0])]
    if [tuple(t.shape) for t in (positions, taken, given)] != wanted or not positions.is_floating_point():
        raise ValueError(f"the means of positions of {path} do not fit it")
    return PositionMean(positions, taken, given)


def plain_state_dict(qmodel: QuantizedModel) -> dict[str, Tensor]:
    """The quantized model as timm knows it: weights in float32, dequantized, by the names of its own state dict.

    `timm.create_model(qmodel.origin.architecture, **qmodel.origin.arguments)` takes it. Activations are not quantized
    there: the outputs are those of the quantized model if it is one of `a16`, and near them if not.

    Raises DfqError where the recipe put what the architecture has no place for into a layer: an offset, or the means of
    positions.
    """
    plain = kept_state(qmodel.module)
    for path, module in qmodel.module.named_modules():
        if isinstance(module, QuantizedLayer):
            plain[f"{path}.weight"] = module.weight
        elif isinstance(module, Slotted):
            for name in [name for name in plain if name.startswith(f"{path}.module.")]:
                plain[path + name.removeprefix(f"{path}.module")] = plain.pop(name)
    with torch.device("meta"):
        wanted = build_architecture(qmodel.origin.architecture, qmodel.origin.arguments).state_dict()
    surplus = sorted(plain.keys() - wanted.keys())
    if surplus:
        raise DfqError(
            f"{qmodel.origin.architecture} has no place for {surplus[0]}, which recipe {qmodel.recipe.name} put there; "
            "quantize with a recipe that neither rotates nor reparametrizes, and without position_rank"
        )
    return {name: plain[name].detach().to(wanted[name].dtype) for name in wanted}


def save_plain(qmodel: QuantizedModel, path: Path | str) -> None:
    """Write `plain_state_dict` as the safetensors file `path`, which is replaced if it is there.

    Raises DfqError as `plain_state_dict` does, and where the file cannot be written.
    """
    file = Path(path)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in plain_state_dict(qmodel).items()}
    make_directory(file.parent)
    # As PyTorch's own tools mark their files; some refuse those without.
    content = to_bytes(tensors, {"format": "pt"})
    replace_file(file, lambda partial: partial.write_bytes(content))
