"""Students: any classifier of timm, given the teacher's classes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from dfq import reference
from dfq.architectures import REFERENCE, build_network, seeded, without_weights
from dfq.errors import UnsupportedModelError, UsageError
from dfq.models import Model, Origin
from dfq.weights import check_finite, load_into, read_weights

log = logging.getLogger("dfq")


def load_student(
    name: str,
    teacher: Model,
    *,
    checkpoint: Path | str | None = None,
    random_weights: bool = False,
    fresh_classifier: bool = False,
    seed: int = 0,
) -> Model:
    """A classifier that gives the teacher's classes and takes the teacher's pictures, on the teacher's device.

    name: of any timm classifier, convolutional ones too, `hf-hub:USER/REPO`, `local-dir:FOLDER`, or `reference`.
    checkpoint, random_weights: its weights, as of `load_model`; neither: timm's pretrained ones. Its classifier is
    drawn anew from `seed` where it has another number of classes than the teacher. fresh_classifier: it is made anew
    in any case, of zeros: what a classifier that is trained alone starts from is noise on what it learns.

    Pictures are resized and cropped as for the teacher and normalised as the student was trained with.

    Raises DfqError: an unknown name, no weights to be had, a checkpoint that does not fit, a network that is no
    classifier of colour images or cannot take images of the teacher's size.
    """
    if checkpoint is not None and random_weights:
        raise UsageError("--student-checkpoint and --student-random-weights exclude each other")
    size = teacher.preprocessing.image_size
    state = None if checkpoint is None else read_weights(checkpoint)
    module: Any
    if name == REFERENCE:
        if state is None and not random_weights:
            state = read_weights(reference.weights_path())
        module, architecture = seeded(reference.build, seed), REFERENCE
        arguments: dict[str, Any] = {}
        mean, std = reference.MEAN, reference.STD
    else:
        arguments = {} if name.partition(":")[2] else _size_arguments(name, size)
        module, architecture, arguments = build_network(
            name, state, arguments, random_weights=random_weights, seed=seed, check=_check_classifier
        )
        config = resolve_model_data_config(module)
        mean, std = tuple(config["mean"]), tuple(config["std"])
    if state is not None:
        load_into(module, state, name, checkpoint if checkpoint is not None else reference.weights_path())
    check_finite(module, name)
    _check_takes(name, module, size)
    if fresh_classifier or module.num_classes != teacher.num_classes:
        seeded(lambda: module.reset_classifier(teacher.num_classes), seed)
        log.info("%s: a new classifier for %d classes", name, teacher.num_classes)
        if fresh_classifier:
            _silence(module)
        arguments |= {} if architecture == REFERENCE else {"num_classes": teacher.num_classes}
    module.eval().requires_grad_(False)
    origin = Origin.of(
        module, name, architecture, arguments, checkpoint=checkpoint, seed=seed if random_weights else None
    )
    return Model(module.to(teacher.device), replace(teacher.preprocessing, mean=mean, std=std), origin)


def _size_arguments(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """What tells a network of a fixed image size to take another one; nothing for one that takes any."""
    patches: Any = getattr(without_weights(name), "patch_embed", None)
    own = getattr(patches, "img_size", None)
    return {} if own is None or tuple(own) == size else {"img_size": size}


def classifiers_of(module: Any) -> tuple[nn.Module, ...]:
    """What gives the logits: one layer, or the two of a distilled model."""
    heads = module.get_classifier()
    return heads if isinstance(heads, tuple) else (heads,)


def _silence(module: Any) -> None:
    """A classifier that says the same of every image."""
    with torch.no_grad():
        for head in classifiers_of(module):
            for parameter in head.parameters():
                parameter.zero_()


def _check_classifier(name: str, module: nn.Module) -> None:
    classes: Any = getattr(module, "num_classes", 0)
    if not classes or not hasattr(module, "reset_classifier"):
        raise UnsupportedModelError(f"{name} has no classifier that could be trained")


def _check_takes(name: str, module: nn.Module, size: tuple[int, int]) -> None:
    """Raise UnsupportedModelError unless images of the teacher's size give one row of logits each."""
    example = next(module.parameters())
    try:
        with torch.no_grad():
            logits = module.eval()(torch.zeros(1, 3, *size, dtype=example.dtype, device=example.device))
    # What a network raises for images that it cannot take shares no base class but Exception.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(f"{name} cannot take images of {size[0]}x{size[1]}: {reason}") from error
    if logits.shape != (1, module.num_classes):
        raise UnsupportedModelError(f"{name} gives an output of shape {tuple(logits.shape)}, not one row of logits")
