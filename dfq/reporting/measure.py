"""Where a quantized network loses precision: at each site by rounding, and in all from the images to the logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from calibration import CalibrationSet
from dfq.errors import DfqError
from dfq.models import Model
from dfq.progress import progress_bar
from dfq.ptq.engine import QuantizedModel, as_shown, check_calibration, prepare
from dfq.ptq.modules import QuantizedLayer, takes_all_positions
from dfq.ptq.stages import Stage, stages
from dfq.recipe import parse_bits
from dfq.statistics import sqnr_db
from quantizers import Quantizer


@dataclass(frozen=True)
class SiteRounding:
    """What rounding alone does to one activation, as it passes in the quantized network.

    bits, quantizer (the kind): of its integers; low, high: extremes of the values that came, kept_low, kept_high: of
    those that went on, nearer to zero where the range clips them; sqnr_db: power of the values over that of what
    rounding changed, in dB, infinite where nothing changed.
    """

    name: str
    bits: int
    quantizer: str
    low: float
    high: float
    kept_low: float
    kept_high: float
    sqnr_db: float


@dataclass(frozen=True)
class Distance:
    """How far the quantized network is from full precision at some point.

    sqnr_db: power of the full-precision values over that of the difference, in dB, infinite where there is none.
    """

    name: str
    sqnr_db: float


@dataclass(frozen=True)
class Measured:
    """What `measure` found on `num_images` images.

    sites: in the order in which they are passed; the rest only where full precision was measured beside: layers: what
    each linear and convolution gives (of q, k and v only q and k); stages: what stem, blocks and head give; agreement:
    percent of the images with the same likeliest class.
    """

    num_images: int
    sites: tuple[SiteRounding, ...]
    layers: tuple[Distance, ...] = ()
    stages: tuple[Distance, ...] = ()
    agreement: float | None = None


@torch.no_grad()
def measure(
    quantized: QuantizedModel,
    images: CalibrationSet,
    original: Model | None = None,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Measured:
    """Run both networks in step over a set, and compare them where they are meant to give the same.

    images: sparse ones are seen as in calibration, on the kind of background that the recipe gives them.
    original: what `quantized` was made from, on its device. Its channels are rotated as the recipe rotated the
    others', so that what blocks give can be compared; channels of v may have been rescaled since, and are left out.

    Raises DfqError where the set was made for other images, or is sparse and the model takes all patches.
    """
    network = quantized.module
    images = as_shown(images, quantized.recipe)
    if images.is_sparse and takes_all_positions(network):
        raise DfqError(
            "the calibration set keeps some patches of its images only, and this model has means of all positions: "
            "give a set of whole images"
        )
    slots = {name: module for name, module in network.named_modules() if name in quantized.sites}
    turns = count()
    roundings = {name: _Rounding(turns) for name in slots}
    pairs: list[tuple[Stage, Stage | None]] = [(stage, None) for stage in stages(network)]
    outputs: dict[str, _Output] = {}
    ends: dict[str, _Powers] = {}
    listened: list[tuple[nn.Module, Callable[..., None]]] = [(slots[name], roundings[name].see) for name in slots]
    if original is not None:
        check_calibration(original, images)
        exact, _ = prepare(original, parse_bits(quantized.bits), quantized.recipe)
        pairs = list(zip(stages(network), stages(exact), strict=True))
        for name, layer in network.named_modules():
            if isinstance(layer, QuantizedLayer):
                outputs[name] = output = _Output(comparable=2 / 3 if name.endswith(".qkv") else 1.0)
                listened += [(exact.get_submodule(name), output.expect), (layer, output.compare)]
        ends = {stage.name: _Powers() for stage, _ in pairs}
    same = 0
    with progress_bar(len(images), "measure", "image", shown=progress) as bar, _listening(listened):
        for batch in images.batches(batch_size, quantized.device):
            found: Any = batch
            expected: Any = batch
            for stage, other in pairs:
                if other is not None:
                    expected = other.run(expected)
                found = stage.run(found)
                if other is not None:
                    ends[stage.name].add(expected, expected - found)
            same += int((found.argmax(-1) == expected.argmax(-1)).sum()) if original is not None else 0
            bar.update(len(batch[0]))
    return Measured(
        num_images=len(images),
        sites=tuple(
            roundings[name].result(name, quantized.sites[name])
            for name in sorted(roundings, key=lambda name: roundings[name].turn)
        ),
        layers=tuple(Distance(name, output.powers.sqnr_db) for name, output in outputs.items()),
        stages=tuple(Distance(name, powers.sqnr_db) for name, powers in ends.items()),
        agreement=None if original is None else 100 * same / len(images),
    )


@contextmanager
def _listening(listeners: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Each is called with (module, inputs, output) whenever its module has run, while this is open."""
    handles = [module.register_forward_hook(listener) for module, listener in listeners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Powers:
    """Sums of squares of values and of what is wrong with them, in 64 bits."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, values: Tensor, error: Tensor) -> None:
        self._signal += float(values.double().square().sum())
        self._noise += float(error.double().square().sum())

    @property
    def sqnr_db(self) -> float:
        return sqnr_db(self._signal, self._noise)


class _Rounding:
    """What passes a quantizer."""

    def __init__(self, turns: Iterator[int]) -> None:
        self.turn = -1
        """Of `turns`, when something passed first."""
        self._turns = turns
        self._powers = _Powers()
        self._low = self._kept_low = math.inf
        self._high = self._kept_high = -math.inf

    def see(self, _module: nn.Module, inputs: tuple[Tensor, ...], kept: Tensor) -> None:
        (values,) = inputs
        if self.turn < 0:
            self.turn = next(self._turns)
        self._powers.add(values, values - kept)
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        self._kept_low, self._kept_high = (
            min(self._kept_low, float(kept.min())),
            max(self._kept_high, float(kept.max())),
        )

    def result(self, name: str, quantizer: Quantizer) -> SiteRounding:
        extremes = (self._low, self._high, self._kept_low, self._kept_high)
        return SiteRounding(
            name, quantizer.bits, str(quantizer.describe()["type"]).replace("_", " "), *extremes, self._powers.sqnr_db
        )


class _Output:
    """What a layer gives in full precision, then in the quantized network.

    comparable: the share of its channels, the first ones, that mean the same in both.
    """

    def __init__(self, comparable: float) -> None:
        self.powers = _Powers()
        self._comparable = comparable
        self._expected: Tensor | None = None

    def expect(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._expected = output

    def compare(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert self._expected is not None  # Full precision goes first in every stage.
        channels = round(self._comparable * output.shape[-1])
        expected = self._expected[..., :channels]
        self.powers.add(expected, expected - output[..., :channels])
        self._expected = None
