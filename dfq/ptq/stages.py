"""A network as a chain of stages: the stem, each block, the head. Each takes what the one before it gives.

Walking the chain, only one stage's activations are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from calibration.tokens import PatchGrid, token_gather
from dfq.errors import DfqError


@dataclass(frozen=True)
class Stage:
    """One link of the chain.

    name: `stem`, the dotted path of a block or a patch merging, `head`; module: whose parameters a reconstruction of
    this stage may tune, None for stem and head; run: the stem takes (images [B, 3, H, W], keep [B, K] or None), each
    other stage the tokens that the one before it gave, [B, N, D] or, of a hierarchical network, [B, H, W, D]; the head
    gives logits [B, C].
    """

    name: str
    module: nn.Module | None
    run: Callable[[Any], Tensor] = field(repr=False, compare=False)
    _prefixes: tuple[str, ...] = field(repr=False)

    def owns(self, site: str) -> bool:
        """Whether the site of this dotted name belongs to this stage; every site belongs to exactly one."""
        return site.startswith(self._prefixes)


def stages(network: nn.Module) -> list[Stage]:
    """The stages of a timm `VisionTransformer` or `SwinTransformer`, adapted or not, in the order they run."""
    if isinstance(network, SwinTransformer):
        stem, middle = partial(_swin_stem, network), _swin_modules(network)
    elif isinstance(network, VisionTransformer):
        stem = partial(_vit_stem, network)
        middle = {f"blocks.{index}": block for index, block in enumerate(network.blocks)}
    else:
        raise TypeError(f"{type(network).__name__} has no stages")
    before = ("patch_embed.", "pos_drop.", "pos_embed")
    after = ("norm.", "attn_pool.", "fc_norm.", "head.", "head_dist.")
    return [
        Stage("stem", None, lambda batch: stem(*batch), before),
        *(Stage(name, module, module, (f"{name}.",)) for name, module in middle.items()),
        Stage("head", None, partial(_head, network), after),
    ]


class Ending(NamedTuple):
    """What comes out at the end. feature: [B, F], what the classifier reads, of two classifiers the mean of what each
    reads; logits: [B, C]."""

    feature: Tensor
    logits: Tensor


def suffix(network: nn.Module, after: Stage, tokens: Tensor) -> Ending:
    """Run all stages that follow `after` on `tokens`, what that stage gave."""
    chain = stages(network)
    following = [stage.name for stage in chain].index(after.name) + 1
    if following == len(chain):
        raise ValueError(f"no stage follows {after.name}")
    for stage in chain[following:-1]:
        tokens = stage.run(tokens)
    classifier: Any = network
    return Ending(classifier.forward_head(classifier.norm(tokens), pre_logits=True), _head(network, tokens))


class _ReachedBlocks(Exception):  # noqa: N818 - it carries a result, not an error
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


def _vit_stem(vit: VisionTransformer, images: Tensor, keep: Tensor | None) -> Tensor:
    """images: [B, 3, H, W] -> the tokens that enter the first block: [B, P + K, D], by the model's own forward pass."""

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _ReachedBlocks(args[0])

    handle = vit.blocks.register_forward_pre_hook(stop)
    try:
        with token_gather(vit) as gather:
            gather.keep = keep
            vit.forward_features(images)
    except _ReachedBlocks as reached:
        return reached.tokens
    finally:
        handle.remove()
    raise RuntimeError("the forward pass never came to the blocks")


def _swin_stem(swin: SwinTransformer, images: Tensor, keep: Tensor | None) -> Tensor:
    """images: [B, 3, H, W] -> [B, rows, columns, D]. Raises DfqError where `keep` leaves patches out."""
    if keep is not None and keep.shape[1] < PatchGrid.of(swin).num_patches:
        raise DfqError(
            f"a {type(swin).__name__} cannot run on {keep.shape[1]} of its {PatchGrid.of(swin).num_patches} patches: "
            "calibrate it on a set made by a dense method, or by a recipe with background = 'leaves'"
        )
    tokens: Tensor = swin.patch_embed(images)
    return tokens


def _head(network: nn.Module, tokens: Tensor) -> Tensor:
    """tokens: of the last block -> logits [B, C]."""
    classifier: Any = network
    logits: Tensor = classifier.forward_head(classifier.norm(tokens))
    return logits


def _swin_modules(swin: SwinTransformer) -> dict[str, nn.Module]:
    """Blocks, and the patch merging before those of every layer but the first."""
    modules: dict[str, nn.Module] = {}
    for path, layer in swin.layers.named_children():
        if not isinstance(layer.downsample, nn.Identity):
            modules[f"layers.{path}.downsample"] = layer.downsample
        modules |= {f"layers.{path}.blocks.{index}": block for index, block in enumerate(layer.blocks)}
    return modules
