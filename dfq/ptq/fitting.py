"""One stage quantized: what passes it is recorded, then its activations get quantizers and its weights integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dfq.errors import DfqError
from dfq.ptq import capture
from dfq.ptq.capture import Extremes, InputImportance, Sample
from dfq.ptq.compensate import SecondMoment, round_compensated
from dfq.ptq.gradients import tempered
from dfq.ptq.modules import QuantizedConv2d, QuantizedLayer, QuantizedLinear, quantize_parameter
from dfq.ptq.reparametrize import equalizing, exchanges
from dfq.ptq.search import convolution_rows
from dfq.ptq.sites import PATCH_TOKENS, POSITION_EMBEDDING, PlannedSite
from dfq.ptq.stages import Stage
from dfq.recipe import Compensation, Recipe
from dfq.recipe_values import Reparametrization
from quantizers import OutlierQuantizer, Quantizer, UniformQuantizer, outlier_channels

# Of each batch these are looked at whatever is drawn: a range that they do not fit into costs more than its share.
_LARGEST_TOKENS = 16


@dataclass
class Observed:
    """What was seen of one stage in full precision.

    outputs: of the stage, batch by batch; values: of activation sites, by name, as their range search needs them;
    importance: by name, of what is in `values` where that is a sample, and of the inputs of weight sites; moments: of
    those inputs.
    """

    outputs: list[Tensor]
    values: dict[str, Tensor]
    importance: dict[str, Tensor]
    moments: dict[str, SecondMoment]


def observe(
    network: nn.Module,
    sites: Iterable[PlannedSite],
    compensation: Compensation | None,
    inputs: Sequence[Any],
    run: Callable[[Any], Tensor],
    gradients: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
    *,
    sampled: bool = False,
) -> Observed:
    """Run a stage over all batches, recording what `sites`, those of the stage, need.

    gradients: by the path of a layer, what `token_gradients` found, where tokens are to count by them. sampled: tokens
    are recorded of activations whose ranges need extremes alone, too.

    Raises DfqError for activations that are not finite, naming the first site they are seen at.
    """
    sizes = [len(batch if isinstance(batch, Tensor) else batch[0]) for batch in inputs]
    parts = sum(sizes) / sizes[0]
    slots: dict[nn.Module, str] = {}
    ranges: dict[str, Extremes | Sample] = {}
    squares: dict[str, InputImportance] = {}
    moments: dict[str, SecondMoment] = {}
    listeners: list[dict[nn.Module, Any]] = [{}, {}, {}]
    for p in sites:
        name = p.site.name
        if p.site.is_weight:
            layer = layer_of(network, p.site.owner)
            if p.settings.needs_importance:
                squares[name] = listeners[1][layer.input] = InputImportance()
            if compensation is not None and is_one_product(layer):
                found = gradients.get(p.site.owner)
                tokens = None if found is None else tempered(found, compensation.gradient)
                moments[name] = SecondMoment(compensation.evenness, tokens)
                listeners[2][layer.input] = _rows_into(moments[name], layer)
        elif name != POSITION_EMBEDDING:
            slot = network.get_submodule(name)
            recorder: Extremes | Sample = Extremes()
            if sampled or p.settings.needs_values:
                tokens = _token_weights(p, network, gradients)
                recorder = Sample(parts, seed=0, largest=_LARGEST_TOKENS, tokens=tokens)
            ranges[name] = listeners[0][slot] = recorder
            slots[slot] = name
    with (
        capture.recording(listeners[0]) as passed,
        capture.recording(listeners[1]),
        capture.recording(listeners[2]),
    ):
        outputs = [run(batch) for batch in inputs]
    values: dict[str, Tensor] = {}
    # In the order of the forward pass: of values that are not finite, the error names the source.
    for slot in passed | dict.fromkeys(slots):
        name = slots[slot]
        values[name] = ranges[name].values()
        if not bool(values[name].isfinite().all()):
            raise DfqError(f"cannot find a range for {name}: its activations hold NaN or infinity")
    importance = {name: recorder.values() for name, recorder in squares.items()}
    importance |= {name: recorder.importance() for name, recorder in ranges.items() if isinstance(recorder, Sample)}
    return Observed(outputs, values, importance, moments)


def observe_apart(
    network: nn.Module,
    sites: Sequence[PlannedSite],
    compensation: Compensation | None,
    inputs: Sequence[Any],
    looked_at: Sequence[Any],
    run: Callable[[Any], Tensor],
    gradients: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
) -> Observed:
    """As `observe`, with what activations need for their ranges seen on `looked_at` instead of `inputs`."""
    activations, weights = ([p for p in sites if p.site.is_weight == kind] for kind in (False, True))
    if looked_at is inputs or not activations:
        return observe(network, sites, compensation, inputs, run, gradients)
    ranges = observe(network, activations, None, looked_at, run, gradients)
    rest = observe(network, weights, compensation, inputs, run, gradients)
    return Observed(rest.outputs, ranges.values, ranges.importance | rest.importance, rest.moments)


def _token_weights(
    planned: PlannedSite, network: nn.Module, gradients: Mapping[str, Sequence[Tensor]]
) -> list[Tensor] | None:
    """How much each token counts where a linear's input gets its range; None: all alike."""
    site, power = planned.site, planned.settings.gradient
    found = gradients.get(site.owner)
    if power == 0 or site.slot != "input" or found is None:
        return None
    return tempered(found, power) if isinstance(network.get_submodule(site.owner), QuantizedLinear) else None


def move_ranges(
    network: nn.Module,
    stage: Stage,
    sites: list[PlannedSite],
    recipe: Recipe,
    inputs: Sequence[Any],
    run: Callable[[Any], Tensor],
    gradients: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
) -> list[PlannedSite]:
    """Reparametrise a stage where the recipe says so; gives its sites as they are to be quantized then."""
    by_channel = [p for p in sites if p.settings.granularity == "channel" and not p.site.is_weight]
    if recipe.reparametrize is None or not by_channel:
        return sites
    # The search multiplies what was seen by the weights, which takes tokens, also where extremes would do for a range.
    seen = observe(network, by_channel, None, inputs, run, gradients, sampled=recipe.reparametrize != "full")
    return reparametrize(stage, sites, seen, recipe.reparametrize)


def reparametrize(
    stage: Stage,
    sites: Sequence[PlannedSite],
    seen: Observed,
    how: Reparametrization = "searched",
) -> list[PlannedSite]:
    """Move the ranges per channel of a stage into the layers around them where that is exact.

    In full (RepQ-ViT) every channel of the activation gets all levels, but columns of the weights that share a scale
    drift apart, which costs more than it brings where weights have fewer bits than activations: otherwise the error
    of the product they enter chooses how far. seen: samples [..., C] of the sites. Returns the sites as they are to be
    quantized then: what was per channel and could be moved is per tensor.
    """
    if stage.module is None:
        return list(sites)
    planned = {p.site.name: p for p in sites}
    for exchange in exchanges(stage.name, stage.module):
        site = planned.get(exchange.site)
        if site is None or site.settings.granularity != "channel":
            continue
        values, importance = seen.values[exchange.site], seen.importance.get(exchange.site)
        grid = fit_quantizer(site, values, importance)
        assert isinstance(grid, UniformQuantizer)
        assert grid.scale is not None
        assert grid.zero_point is not None
        centre = grid.scale * ((grid.qmin + grid.qmax) / 2 - grid.zero_point)
        strengths = (1.0,) if how == "full" else _STRENGTHS
        moves = [equalizing(grid.scale, centre, strength, offset=exchange.takes_offset) for strength in strengths]
        site = planned[exchange.site] = site.per_tensor()
        if how != "full":
            moves.append((torch.ones_like(centre), torch.zeros_like(centre)))
            weights = [(linear, planned.get(f"{name}.weight")) for name, linear in exchange.takers.items()]
            counts = _by_row(values.new_ones(()) if importance is None else importance, values)
            rows = values.flatten(0, -2)
            every = -(-len(rows) // _TRIAL_ROWS)
            trial = rows[::every], counts[::every]
            errors = [_product_error(*trial, ratio, offset, site, weights) for ratio, offset in moves]
            moves = [moves[errors.index(min(errors))]]
        exchange.rescale(*moves[0])
    return list(planned.values())


def _by_row(importance: Tensor, values: Tensor) -> Tensor:
    """importance that broadcasts to values [..., C] -> [R, 1], of each of their rows."""
    return importance.expand(*values.shape[:-1], 1).flatten(0, -2)


# Of the ratio between channels, as powers of it.
_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_TRIAL_ROWS = 512


def _product_error(
    rows: Tensor,
    importance: Tensor,
    ratio: Tensor,
    offset: Tensor,
    site: PlannedSite,
    weights: Sequence[tuple[QuantizedLinear, PlannedSite | None]],
) -> float:
    """Squared error of what the takers give if `rows` were rescaled, relative to what each row gives.

    rows: [R, C]; importance: [R, 1].
    """
    scaled = rows / ratio + offset
    rounded = fit_quantizer(site, scaled, importance)(scaled)
    error = torch.zeros(())
    for linear, planned in weights:
        weight = linear.weight * ratio
        exact = scaled @ weight.T
        size = (rows @ linear.weight.T).square().sum(-1).clamp(min=torch.finfo(rows.dtype).tiny)
        found = rounded @ (weight if planned is None else fit_quantizer(planned, weight)(weight)).T
        error = error + ((found - exact).square().sum(-1) / size * importance[:, 0]).mean()
    return float(error)


def fit_quantizer(planned: PlannedSite, values: Tensor, importance: Tensor | None = None) -> Quantizer:
    """The quantizer that a site's settings and values ask for. Raises DfqError where there is none.

    importance: how much a squared error in `values` counts, broadcast to them, beside what the settings say of it.
    """
    settings = planned.settings
    weights = 1.0 if importance is None else importance
    if settings.range == "token_mse":
        importance = weights * capture.token_importance(values)
    elif settings.range == "probability_mse":
        importance = weights * values.sum(-1, keepdim=True).clamp(min=1).pow(-2)
    candidates = settings.build(planned.bits, is_weight=planned.site.is_weight)
    if settings.outliers is not None:
        channels = outlier_channels(values, settings.outliers)
        if len(channels):
            candidates = [OutlierQuantizer(quantizer, channels) for quantizer in candidates]
    try:
        fitted = [quantizer.fit(values, importance) for quantizer in candidates]
    except ValueError as error:
        raise DfqError(f"cannot find a range for {planned.site.name}: {error}") from error
    if len(fitted) == 1:
        return fitted[0]
    weights = 1.0 if importance is None else importance
    return min(fitted, key=lambda quantizer: float(((quantizer(values) - values).square() * weights).sum()))


def fit_sites(network: nn.Module, sites: Iterable[PlannedSite], seen: Observed) -> dict[str, Quantizer]:
    """A fitted quantizer for every site, by name; none takes its place yet."""
    fitted: dict[str, Quantizer] = {}
    for p in sites:
        name = p.site.name
        importance = None
        if p.site.is_weight:
            values = layer_of(network, p.site.owner).weight
            if name in seen.importance:
                # [C] against weights [out, C] of a linear or [out, C, kh, kw] of the patch embedding.
                importance = seen.importance[name].view(-1, *[1] * (values.dim() - 2))
        elif name == POSITION_EMBEDDING:
            values = network.get_parameter(name)
        else:
            values, importance = seen.values[name], seen.importance.get(name)
        if name == PATCH_TOKENS:
            joined = [tokens.flatten(0, -2) for tokens in joined_tokens(network)]
            if importance is not None:
                counts = [_by_row(importance, values), *[importance.new_ones(len(tokens), 1) for tokens in joined]]
                importance = torch.cat(counts)
            values = torch.cat([values.flatten(0, -2), *joined])
        fitted[name] = fit_quantizer(p, values, importance)
    return fitted


def place_sites(
    network: nn.Module,
    sites: Iterable[PlannedSite],
    fitted: Mapping[str, Quantizer],
    moments: Mapping[str, SecondMoment],
    dampings: Sequence[float],
) -> None:
    """Put quantizers where activations pass, and give weights their integers, compensated where there is a moment."""
    for p in sites:
        name, quantizer = p.site.name, fitted[p.site.name]
        if not p.site.is_weight:
            place(network, name, quantizer)
            continue
        layer = layer_of(network, p.site.owner)
        if name in moments:
            integers, _ = round_compensated(layer.weight.flatten(1), quantizer, moments[name], dampings)
            layer.set_integers(quantizer, integers.view_as(layer.weight))
        else:
            layer.set_integers(quantizer, quantizer.quantize(layer.weight))


def place(network: nn.Module, name: str, quantizer: Quantizer) -> None:
    """Put a fitted quantizer where the site's activation passes; a learned tensor is put on its grid."""
    owner, _, slot = name.rpartition(".")
    if not owner:
        quantize_parameter(getattr(network, slot), quantizer)
        return
    setattr(network.get_submodule(owner), slot, quantizer)
    if name == PATCH_TOKENS:
        for token in joined_tokens(network):
            quantize_parameter(token, quantizer)


def joined_tokens(network: nn.Module) -> list[nn.Parameter]:
    """The learned tokens that timm joins to the patches: class, distillation, registers."""
    tokens = (getattr(network, name, None) for name in ("cls_token", "dist_token", "reg_token"))
    return [token for token in tokens if token is not None]


def layer_of(network: nn.Module, path: str) -> QuantizedLayer:
    """The layer at this path, for the type checker."""
    layer = network.get_submodule(path)
    assert isinstance(layer, QuantizedLayer)
    return layer


def is_one_product(layer: QuantizedLayer) -> bool:
    """Whether `convolution_rows` takes it, if it is no linear."""
    return not isinstance(layer, QuantizedConv2d) or (layer.groups == 1 and not isinstance(layer.padding, str))


def _rows_into(moment: SecondMoment, layer: QuantizedLayer) -> Any:
    return _Unfolded(moment, layer) if isinstance(layer, QuantizedConv2d) else moment


@dataclass(frozen=True)
class _Unfolded:
    """Hands images on as the rows that a convolution multiplies its weights by."""

    moment: SecondMoment
    layer: QuantizedConv2d

    def add(self, x: Tensor) -> None:
        rows = convolution_rows(x, self.layer)
        self.moment.add(rows.view(len(x), -1, rows.shape[-1]))
