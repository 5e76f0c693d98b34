"""What can be done with a network, and why not the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from calibration.saliency import saliency_kind
from calibration.tokens import PatchGrid
from dfq.architectures import num_classes_of, without_weights
from dfq.errors import DfqError, UnsupportedModelError
from dfq.ptq.modules import understood_parts


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
    if num_classes_of(module) < 2 or getattr(module, "global_pool", None) == "":
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
    head_needed: timm's default for this name has no classifier; the rest is about the same network with one, as a
    checkpoint brings it.
    """

    name: str
    saliency: str | None
    dense_refusal: str | None
    sparse_refusal: str | None
    quantization_refusal: str | None
    head_needed: bool = False

    @property
    def refusals(self) -> tuple[str, ...]:
        """The reasons, each once."""
        reasons = (self.dense_refusal, self.sparse_refusal, self.quantization_refusal)
        return tuple(dict.fromkeys(reason for reason in reasons if reason is not None))


def describe_support(name: str) -> Support:
    """What can be done with a timm name, or `reference`. It is built without weights (about 0.2 s); nothing is read.

    Raises DfqError for a name that is not known.
    """
    module = without_weights(name)
    head_needed = num_classes_of(module) < 2
    if head_needed:
        with torch.device("meta"):
            reset: Any = module.reset_classifier
            reset(2)
    dense = _refusal(lambda: check_invertible(name, module))
    # What cannot be inverted at all is not loaded, and so neither inverted sparsely nor quantized.
    sparse = dense or _refusal(lambda: saliency_kind(module))
    quantization = dense or _refusal(lambda: check_quantizable(name, module))
    return Support(name, None if sparse else saliency_kind(module), dense, sparse, quantization, head_needed)


def _refusal(check: Callable[[], object]) -> str | None:
    try:
        check()
    except DfqError as error:
        return str(error)
    return None
