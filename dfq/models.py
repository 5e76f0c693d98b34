"""From a name to a model that can be inverted, and what can be done with it."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from calibration.files import read_json
from calibration.saliency import saliency_kind
from calibration.tokens import PatchGrid
from dfq import datasets, reference
from dfq.errors import CheckpointError, DfqError, UnsupportedModelError, UsageError
from dfq.preprocessing import Preprocessing
from dfq.ptq.modules import understood_parts
from dfq.weights import check_finite, fingerprint, load_into, read_weights

REFERENCE = "reference"
PYTORCH = "pytorch"
_LOCAL_DIR = "local-dir:"
_HUBS = ("hf-hub:", "hf_hub:", _LOCAL_DIR)
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

log = logging.getLogger("dfq")


@dataclass(frozen=True)
class Origin:
    """Where a model came from: enough to build its architecture again, and to find its weights again."""

    name: str
    architecture: str
    arguments: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    random_weights: bool = False
    seed: int | None = None
    fingerprint: str = ""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        name: str,
        architecture: str,
        arguments: dict[str, Any],
        *,
        checkpoint: Path | str | None,
        seed: int | None,
    ) -> Origin:
        """That of `module`, which was just built; seed: of random weights, None where they are not."""
        return cls(
            name=name,
            architecture=architecture,
            arguments=arguments,
            checkpoint=None if checkpoint is None else str(Path(checkpoint).resolve()),
            random_weights=seed is not None,
            seed=seed,
            fingerprint=fingerprint(module),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Network:
    """What full-precision and quantized models share. `network(images)` gives logits [B, C]."""

    module: nn.Module
    preprocessing: Preprocessing
    origin: Origin

    def __call__(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W], normalised -> logits [B, C]."""
        logits: Tensor = self.module(images)
        return logits

    @property
    def name(self) -> str:
        return self.origin.name

    @property
    def num_classes(self) -> int:
        return _num_classes(self.module)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Folder names of the classes, in the order of the logits, where they are known."""
        return class_names(self.origin, self.num_classes)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.module.parameters()).device
        return device

    def to(self, device: torch.device) -> None:
        """Move the network there."""
        self.module.to(device)

    @property
    def runtime(self) -> str:
        """What computes it."""
        return PYTORCH


@dataclass
class Model(Network):
    """A full-precision network with all that is needed to use it."""

    bits: str = "fp32"

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.module.parameters())


def class_names(origin: Origin, num_classes: int) -> tuple[str, ...] | None:
    """Folder names of the classes of a model, in the order of its logits, where they are known."""
    if origin.architecture == REFERENCE:
        return reference.CLASS_NAMES
    return datasets.imagenet_wordnet_ids() if num_classes == 1000 else None


def resolve_device(name: str | torch.device | None) -> torch.device:
    """`None` and "auto" mean CUDA where there is one. Raises UsageError for a device this machine lacks."""
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device: torch.device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}: use cpu, cuda or cuda:N") from error
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= present.get(device.type, 0):
        raise UsageError(
            f"device {str(name)!r} is not there: this machine has the CPU and {present['cuda']} CUDA devices"
        )
    return device


def build_architecture(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """An untrained network: `reference`, or a timm architecture with keyword arguments for its constructor.

    Both may come from a file that somebody else wrote. Raises DfqError for a name that is not timm's own, such as one
    on a hub, and for arguments that would have timm read further files.
    """
    if architecture == REFERENCE:
        module: nn.Module = reference.build()
        return module
    _check_known(architecture)
    reading = sorted(set(inspect.signature(timm.create_model).parameters) & set(arguments))
    if reading:
        raise DfqError(f"{', '.join(reading)} is not an argument of the architecture {architecture}")
    return _create(architecture, False, arguments)


def check_invertible(name: str, module: nn.Module) -> None:
    """Raise UnsupportedModelError unless images of a class can be made from `module`, at least by dense inversion."""
    patches: Any = getattr(module, "patch_embed", None)
    if not all(getattr(patches, attribute, None) for attribute in ("img_size", "grid_size", "patch_size")):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, not a timm VisionTransformer or another network that cuts images of "
            "one size into a grid of patches; `dfq list models` shows what can be used"
        )
    grid, size = PatchGrid.of(module), "x".join(map(str, patches.img_size))
    if any(pixels % side for pixels, side in zip(patches.img_size, patches.patch_size, strict=True)):
        raise UnsupportedModelError(
            f"{name}: images of {size} are not a whole number of patches of {'x'.join(map(str, patches.patch_size))}; "
            "give a multiple as --image-size"
        )
    if grid.image_size != tuple(patches.img_size):
        raise UnsupportedModelError(
            f"{name}: its {grid.rows}x{grid.columns} patches of {grid.height}x{grid.width} pixels do not tile images "
            f"of {size}, so no pixel is known to belong to one (patch_embed is a {type(patches).__name__})"
        )
    # Found where it is used: not every patch embedding says how many channels it takes.
    stem = next((layer for layer in patches.modules() if isinstance(layer, nn.Conv2d)), None)
    if stem is not None and stem.in_channels != 3:
        raise UnsupportedModelError(f"{name} takes {stem.in_channels} colour channels, dfq 3")
    if _num_classes(module) < 2 or getattr(module, "global_pool", None) == "":
        raise UnsupportedModelError(
            f"{name} has no classifier, and it is classes that are inverted; give a --checkpoint of it that has one"
        )


def check_quantizable(name: str, module: nn.Module) -> None:
    """Raise UnsupportedModelError unless `module` is a ViT or a Swin of parts that dfq knows how to quantize."""
    if not isinstance(module, VisionTransformer | SwinTransformer):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, neither a timm VisionTransformer nor a SwinTransformer, and no "
            "other can be quantized; docs/models.md says which can"
        )
    for path, understood in understood_parts(module).items():
        part = module.get_submodule(path)
        if type(part) is not understood:
            raise UnsupportedModelError(
                f"{name}: {path} is a {type(part).__name__}, and dfq quantizes only timm's {understood.__name__} there"
            )


@dataclass(frozen=True)
class Support:
    """What dfq can do with an architecture; each refusal is the reason for one, None where there is none.

    saliency: what says which patches matter in a sparse schedule (`calibration.saliency`), None where there is none.
    """

    name: str
    saliency: str | None
    dense_refusal: str | None
    sparse_refusal: str | None
    quantization_refusal: str | None

    def describe(self) -> str:
        """One line for people: what can be done, then the reasons for the rest."""
        refusals = {
            "dense inversion": self.dense_refusal,
            "sparse": self.sparse_refusal,
            "quantization": self.quantization_refusal,
        }
        can = ", ".join(what for what, refusal in refusals.items() if refusal is None)
        reasons = dict.fromkeys(refusal for refusal in refusals.values() if refusal is not None)
        return "; ".join([can or "nothing", *reasons])


def describe_support(name: str) -> Support:
    """What can be done with a timm name, or `reference`. It is built without weights (about 0.2 s); nothing is read.

    Raises DfqError for a name that is not known.
    """
    module = _without_weights(name)
    dense = _refusal(lambda: check_invertible(name, module))
    # What cannot be inverted at all is not loaded, and so neither inverted sparsely nor quantized.
    sparse = dense or _refusal(lambda: saliency_kind(module))
    quantization = dense or _refusal(lambda: check_quantizable(name, module))
    return Support(name, None if sparse else saliency_kind(module), dense, sparse, quantization)


def _refusal(check: Callable[[], object]) -> str | None:
    try:
        check()
    except DfqError as error:
        return str(error)
    return None


def _num_classes(module: nn.Module) -> int:
    classes: Any = getattr(module, "num_classes", 0)
    return int(classes)


def _check_known(name: str) -> None:
    base = name.split(".")[0]
    if timm.is_model(base):
        tags = [entry for entry in timm.list_pretrained(f"{base}.*") if entry.startswith(f"{base}.")]
        if name != base and name not in tags:
            raise DfqError(f"timm knows {base}, but not with the weights {name!r}; it has {', '.join(tags) or 'none'}")
        return
    # Vision Transformers first: of two names as near, that is the one meant here.
    near = difflib.get_close_matches(base, [REFERENCE, *timm.list_models(["vit_*", "deit*"])], n=3)
    near = near or difflib.get_close_matches(base, timm.list_models(), n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "`dfq list models` shows the names"
    raise DfqError(f"timm knows no model {name!r}; {hint}")


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


def _without_weights(name: str, arguments: dict[str, Any] | None = None) -> nn.Module:
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


def load_model(
    name: str,
    *,
    checkpoint: Path | str | None = None,
    random_weights: bool = False,
    image_size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Model:
    """Build a Vision Transformer, or another timm network with a grid of patches, and its preprocessing.

    name: a timm name, with or without a tag (`vit_tiny_patch16_224.augreg_in21k_ft_in1k`), `hf-hub:USER/REPO`,
    `local-dir:FOLDER`, or `reference`, the small model that comes with dfq. checkpoint: a safetensors file or a
    PyTorch checkpoint of weights; a head with another number of classes than the architecture's default is taken from
    it. random_weights: untrained, drawn from `seed`. Neither: timm's pretrained weights. The preprocessing is timm's
    for this name; mean, std, interpolation and crop_pct (of a checkpoint trained otherwise) replace it.

    Raises DfqError: an unknown name, no weights to be had, a checkpoint that does not fit, NaN in weights, a model
    that cannot be inverted (docs/models.md has those that can; not all of them can be quantized).
    """
    if checkpoint is not None and random_weights:
        raise UsageError("--checkpoint and --random-weights exclude each other")
    target = resolve_device(device)
    arguments: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    state = None if checkpoint is None else read_weights(checkpoint)

    if name == REFERENCE:
        if arguments:
            raise UsageError("the image size of the reference model is fixed")
        if state is None and not random_weights:
            state = read_weights(reference.weights_path())
        module: nn.Module = reference.build() if not random_weights else seeded(reference.build, seed)
        architecture = REFERENCE
        preprocessing = Preprocessing(reference.IMAGE_SIZE, reference.MEAN, reference.STD, crop_pct=1.0)
    else:
        module, architecture, arguments = build_network(
            name, state, arguments, random_weights=random_weights, seed=seed, check=check_invertible
        )
        config = resolve_model_data_config(module)
        preprocessing = Preprocessing(
            image_size=PatchGrid.of(module).image_size,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )

    if state is not None:
        load_into(module, state, name, checkpoint if checkpoint is not None else reference.weights_path())
    check_finite(module, name)
    overrides: dict[str, Any] = {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}
    preprocessing = replace(preprocessing, **{key: value for key, value in overrides.items() if value is not None})
    module.eval().requires_grad_(False)
    origin = Origin.of(
        module, name, architecture, arguments, checkpoint=checkpoint, seed=seed if random_weights else None
    )
    log.info("%s: %s", name, preprocessing.describe())
    return Model(module.to(target), preprocessing, origin)


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
    if name.startswith(_HUBS):
        architecture, saved = _on_hub(name)
        arguments = saved | arguments
    else:
        _check_known(name)
        if pretrained:
            # Told before anything is downloaded.
            check(name, _without_weights(name, arguments))
    head = None if state is None else state.get(_head_weight(architecture))
    if head is not None and head.dim() == 2:
        arguments = arguments | {"num_classes": head.shape[0]}
    module = seeded(lambda: _create(name, pretrained, arguments), seed)
    check(name, module)
    return module, architecture, arguments | {"num_classes": _num_classes(module)}


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """`build()` with torch's global generator set for its time only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def load_original(
    origin: Origin,
    preprocessing: Preprocessing,
    *,
    checkpoint: Path | str | None = None,
    device: str | torch.device | None = None,
) -> Model:
    """The full-precision model that `origin` tells of, its weights checked against the fingerprint.

    checkpoint: where the weights lie now, if not where they were. Raises DfqError where they are not to be had, or
    are others.
    """
    file = checkpoint or origin.checkpoint
    if file is not None and not Path(file).is_file():
        raise CheckpointError(f"the original weights are not at {file} any more: give --checkpoint FILE")
    size = origin.arguments.get("img_size")
    model = load_model(
        origin.name,
        checkpoint=file,
        random_weights=origin.random_weights,
        image_size=size,
        device=device,
        seed=origin.seed or 0,
    )
    if model.origin.fingerprint != origin.fingerprint:
        raise CheckpointError(
            f"the weights of {file or origin.name} are not those the quantized model was made from: its baseline "
            "would be another model; give --checkpoint FILE"
        )
    return replace(model, preprocessing=preprocessing)


def supported_names(filter: str = "") -> list[str]:
    """timm names of the families that can be inverted, those that match `filter` (`vit_*`) where it is given.

    Single models of a family may still be refused: `describe_support` has the reason.
    """
    return sorted(name for family in _FAMILIES for name in timm.list_models(filter, module=family))
