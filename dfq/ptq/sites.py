"""Sites: the tensors of a ViT that can be quantized, and their names."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from dfq.errors import RecipeError
from dfq.ptq.modules import AttentionSlots, QuantizedBlock, QuantizedLayer, QuantizedSwinBlock, Slotted
from dfq.recipe import Bits, Recipe, SiteSettings

POSITION_EMBEDDING = "pos_embed"
PATCH_TOKENS = "patch_embed.norm.output"
"""The patch embedding's output and the tokens joined to it: one range for both."""


@dataclass(frozen=True)
class Site:
    """One tensor: `slot` of the module at the dotted path `owner`."""

    owner: str
    slot: str

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.slot}" if self.owner else self.slot

    @property
    def is_weight(self) -> bool:
        return self.slot == "weight"


@dataclass(frozen=True)
class PlannedSite:
    """A site, the bits it gets and how."""

    site: Site
    bits: int
    settings: SiteSettings

    def per_tensor(self) -> PlannedSite:
        """With one range for the tensor where it has one per channel."""
        if self.settings.granularity != "channel":
            return self
        return replace(self, settings=replace(self.settings, granularity="tensor"))


def list_sites(vit: nn.Module, scope: str) -> list[Site]:
    """All sites of an adapted ViT, in the order of its modules.

    `gemm`: inputs and weights of linears and convolutions, and q, k, softmax output and v. `full`: also the outputs
    of linears, the attention scores, both residual sums, the tokens before, of and after the position embedding.
    """
    full = scope == "full"
    sites: list[Site] = []
    for path, module in vit.named_modules():
        slots: tuple[str, ...] = ()
        if isinstance(module, QuantizedLayer):
            slots = ("input", "weight", "output") if full else ("input", "weight")
        elif isinstance(module, AttentionSlots):
            slots = ("q", "k", "v", "scores", "softmax") if full else ("q", "k", "v", "softmax")
        elif isinstance(module, QuantizedBlock | QuantizedSwinBlock) and full:
            slots = ("residual_attn", "residual_mlp")
        elif isinstance(module, Slotted) and full:
            slots = ("output",)
        sites += [Site(path, slot) for slot in slots]
    if full and getattr(vit, POSITION_EMBEDDING, None) is not None:
        sites.append(Site("", POSITION_EMBEDDING))
    return sites


def plan_sites(vit: nn.Module, recipe: Recipe, bits: Bits) -> list[PlannedSite]:
    """Which sites the recipe quantizes, and how. Raises RecipeError for a pattern that matches no site."""
    sites = list_sites(vit, recipe.scope)
    names = [site.name for site in sites]
    for pattern in recipe.sites:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.replace("*", "0"), names, n=1)
            hint = f"; the nearest site is {near[0]}" if near else ""
            raise RecipeError(f"recipe {recipe.name}: the pattern {pattern!r} matches no site of this model{hint}")
    planned = []
    for site in sites:
        settings = recipe.settings(site.name, is_weight=site.is_weight)
        width = bits.weights if site.is_weight else bits.activations
        if width is not None and _is_first_or_last(site) and recipe.first_last_bits is not None:
            width = recipe.first_last_bits
        width = settings.bits if settings.bits is not None else width
        if not settings.quantize or width is None:
            continue
        try:
            _check_fit(site, settings)
            settings.build(width, is_weight=site.is_weight)
        except ValueError as error:
            raise RecipeError(f"recipe {recipe.name}, site {site.name}: {error}") from error
        planned.append(PlannedSite(site, width, settings))
    return planned


def _check_fit(site: Site, settings: SiteSettings) -> None:
    """Raise ValueError where the tensor has no such axis, or is not what the range is for."""
    if settings.range == "probability_mse" and site.slot != "softmax":
        raise ValueError("range 'probability_mse' is only for softmax")
    if site.is_weight:
        return
    if settings.dynamic_up_to is not None and (
        site.slot not in ("input", "q", "k") or site.owner == "patch_embed.proj"
    ):
        raise ValueError("dynamic_up_to is only for inputs of linears, q and k: products sum over the tokens of others")
    if settings.position_rank and site.slot != "input":
        raise ValueError("position_rank is only for inputs of linears")
    if settings.granularity == "head" and site.slot not in ("q", "k", "v", "scores", "softmax"):
        raise ValueError("granularity 'head' is only for q, k, v, scores and softmax")
    if settings.granularity == "channel" and (site.slot in ("scores", "softmax") or site.owner == "patch_embed.proj"):
        raise ValueError("granularity 'channel' is not for attention maps and images")


def _is_first_or_last(site: Site) -> bool:
    """Whether a site belongs to the patch embedding or a classifier (DeiT's distilled models have two)."""
    return site.owner in ("patch_embed.proj", "head", "head_dist", "head.fc")
