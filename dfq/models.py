"""Models: a network with its weights, its preprocessing, and where they came from."""

from __future__ import annotations

import logging
import reprlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from calibration.tokens import PatchGrid
from dfq import datasets, reference
from dfq.architectures import REFERENCE, build_network, num_classes_of, seeded
from dfq.errors import CheckpointError, UsageError
from dfq.preprocessing import Preprocessing
from dfq.support import check_invertible
from dfq.weights import check_finite, fingerprint, load_into, read_weights

PYTORCH = "pytorch"

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
        """For JSON, and `Origin.from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Origin:
        """What `to_dict` gave. Raises UsageError for a value of another kind, TypeError for another key."""
        kinds: dict[str, Any] = {
            "arguments": dict,
            "checkpoint": str | None,
            "random_weights": bool,
            "seed": int | None,
        }
        origin = cls(**content)
        for key, value in origin.to_dict().items():
            if not isinstance(value, kinds.get(key, str)):
                raise UsageError(f"{key} of the model's origin cannot be {reprlib.repr(value)}")
        return origin


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
        """As it was given to `load_model`."""
        return self.origin.name

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return num_classes_of(self.module)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Folder names of the classes, in the order of the logits, where they are known."""
        return class_names(self.origin, self.num_classes)

    @property
    def device(self) -> torch.device:
        """Where its weights are, and images have to be."""
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
        """Bytes of all parameters as they are in memory."""
        return sum(p.nbytes for p in self.module.parameters())


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


def load_model(
    name: str,
    *,
    checkpoint: Path | str | None = None,
    random_weights: bool = False,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
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
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        device=device,
        seed=origin.seed or 0,
    )
    if model.origin.fingerprint != origin.fingerprint:
        raise CheckpointError(
            f"the weights of {file or origin.name} are not those the quantized model was made from: its baseline "
            "would be another model; give --checkpoint FILE"
        )
    return replace(model, preprocessing=preprocessing)
