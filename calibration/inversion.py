"""The optimisation loop: model + objective + schedule -> images.

Follows SMI (arXiv 2510.27186) and its dense ancestor DeepInversion (Yin et al., CVPR 2020): Adam on the pixels, one
jitter and flip for the batch per step, pixels clamped to what an image can hold. Where it departs from the published
code is written in docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calibration.augment import STILL, RollAndFlip, patch_places
from calibration.canvas import Canvas, Pixels, Waves
from calibration.errors import DfqError
from calibration.objectives import Objective, Scene, cross_entropy
from calibration.passes import Precision, open_passes, resolve_precision
from calibration.schedules import PatchSchedule
from calibration.tokens import PatchGrid
from calibration.trace import Trace

COMPARE_EVERY = 10
"""Iterations between two looks at the unmoved images; one costs a forward pass, about a third of a step."""

PATIENCE = 5
"""Looks without progress after which a batch is as good as it gets."""


@dataclass(frozen=True)
class Settings:
    """How images are optimised; the defaults are the published ones.

    iterations: at most; enough: a batch is done before that when the cross-entropy of its unmoved images (beyond that
    of the labels themselves, where they are soft) is down to so many nats on average, or falls no more; None: never.
    waves: what is moved is not pixels but the waves they are made of, in steps that fall with this power of the
    frequency (`calibration.canvas.Waves`); None: pixels. noise: standard deviation of what is added to each pixel, anew
    in each step, in units of the normalised space.
    """

    iterations: int = 4000
    enough: float | None = None
    learning_rate: float = 0.25
    betas: tuple[float, float] = (0.5, 0.99)
    augment: RollAndFlip = field(default_factory=RollAndFlip)
    waves: float | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"inversion takes at least 1 iteration, not {self.iterations}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"the learning rate must be positive, not {self.learning_rate}")
        if self.waves is not None and not 0 <= self.waves < math.inf:
            raise ValueError(f"the power that steps of waves fall with must be at least 0, not {self.waves}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"the noise must be at least 0, not {self.noise}")

    def canvas(self, initial: Tensor, low: Tensor, high: Tensor) -> Canvas:
        """Where the images are drawn; see `calibration.canvas`."""
        return Pixels(initial, low, high) if self.waves is None else Waves(initial, low, high, self.waves)


class DivergedError(DfqError):
    """The loss or the pixels are no longer finite numbers."""


@dataclass(frozen=True)
class Progress:
    """Where a batch stands; `confidence` is the mean probability of the wanted class, in [0, 1]."""

    iteration: int
    iterations: int
    loss: float
    confidence: float
    kept_patches: int


@dataclass(frozen=True)
class Inverted:
    """What became of B canvases: M = B * images_per_canvas images, those of one canvas in a row.

    images: [M, 3, H, W], normalised; keep: M tensors [K], the patches that are part of each; confidence: [M], of the
    wanted class, without jitter; finished: [M], after how many iterations each was; iterations: how many were run.
    """

    images: Tensor
    keep: list[Tensor]
    confidence: Tensor
    finished: Tensor
    iterations: int


def check_windows(objective: Objective, schedule: PatchSchedule, settings: Settings) -> None:
    """Raise DfqError where patches have to be known that are not where they were under a window."""
    if settings.augment.smallest == 1:
        return
    if schedule.decisions(settings.iterations):
        raise DfqError("seen through windows, patches are not where they were: such a method has no sparse schedule")
    if "attention_prior" in objective.weights:
        raise DfqError("seen through windows, patches are not where they were: such a method has no attention prior")


def pixel_bounds(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The normalised values of black and white, per channel: two tensors [1, 3, 1, 1]."""
    mean_, std_ = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    return (0.0 - mean_) / std_, (1.0 - mean_) / std_


class _Finished(NamedTuple):
    """One image of each canvas: [B, 3, H, W], [B, K], [B], and after how many iterations."""

    images: Tensor
    keep: Tensor
    confidence: Tensor
    iterations: int


class _Best:
    """Of each image the best iterate so far, by its score; the last among equals."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.detach().clone()
        self.score = torch.full((len(images),), torch.inf, device=images.device)

    def update(self, images: Tensor, score: Tensor) -> None:
        better = score <= self.score
        self.score = torch.where(better, score, self.score)
        self.images = torch.where(better.view(-1, 1, 1, 1), images, self.images)


class _Enough:
    """The rule that ends a batch early, asked at every look (docs/methods.md, "How long")."""

    def __init__(self, enough: float | None) -> None:
        self._enough = enough
        self._lowest = math.inf
        self._idle = 0

    def reached(self, score: Tensor) -> bool:
        """score: [B], of the best iterate of each image, in nats."""
        if self._enough is None:
            return False
        mean = score.mean().item()
        self._idle = 0 if mean < 0.98 * self._lowest else self._idle + 1
        self._lowest = min(mean, self._lowest)
        return mean <= self._enough or self._idle >= PATIENCE


def invert(
    vit: nn.Module,
    initial: Tensor,
    labels: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    objective: Objective,
    schedule: PatchSchedule,
    settings: Settings,
    generator: torch.Generator,
    precision: Precision = "auto",
    part: int | None = None,
    on_step: Callable[[Progress], None] | None = None,
    trace: Trace | None = None,
) -> Inverted:
    """Optimise one batch of canvases until `vit` sees `labels` in them.

    initial: [B, 3, H, W], normalised, on the model's device; labels: [B], or probabilities [B, C]; generator: CPU, for
    all that is random; part: images in one pass of the model, B where it is not given: for memory's sake, the steps are
    the same up to rounding.
    Of each image the best iterate is kept, by cross-entropy (the last among equals), among every `COMPARE_EVERY`-th of
    those made with its final patches, and the last. They are compared unmoved: under jitter the luckiest move would
    win, not the best image. Images that a schedule finishes on the way are taken as they are then.

    Patches that are stopped get no gradient through the model, but for the half patch by which jitter may be off; terms
    on pixels (total variation) and Adam's momentum still move them, as published.

    Raises DfqError where the schedule needs what the model lacks, `DivergedError` where numbers stop being finite.
    """
    if torch.is_inference_mode_enabled():
        raise DfqError("inversion takes gradients, and torch.inference_mode() forbids them: use torch.no_grad() there")
    grid, device = PatchGrid.of(vit), initial.device
    decisions = schedule.decisions(settings.iterations)
    settled = decisions[-1] if decisions else 0
    # The map that chooses patches, and the step before it, see the image unmoved: the scores are then on the grid the
    # patches are counted in.
    still = {iteration - lead for iteration in decisions for lead in (0, 1)}
    check_windows(objective, schedule, settings)
    moves = settings.augment.draw(settings.iterations, grid.image_size, generator)
    moves = [STILL if iteration in still else move for iteration, move in enumerate(moves)]
    places = patch_places(moves, grid).to(device)
    loss = objective.start(Scene(vit, grid, len(initial), device, generator))
    watched = frozenset() if trace is None else frozenset(trace.moments(settings.iterations, decisions))

    canvas = settings.canvas(initial, *pixel_bounds(mean, std, device))
    pixels = canvas.images
    adam = torch.optim.Adam([canvas.parameter], lr=settings.learning_rate, betas=settings.betas, fused=True)
    keep = torch.arange(grid.num_patches, device=device).expand(len(pixels), -1)
    best, enough = _Best(pixels), _Enough(settings.enough)
    finished: list[_Finished] = []
    dtype = resolve_precision(precision, device)
    with open_passes(vit, loss, labels, dtype=dtype, sparse=bool(decisions), count=part or len(pixels)) as passes:
        for iteration in range(settings.iterations):
            if iteration in decisions:
                choice = schedule.choose(keep, passes.saliency(pixels, keep), decisions.index(iteration))
                if choice.finished is not None:
                    confidence = _probability(passes.logits(pixels, choice.finished), labels)
                    finished.append(_Finished(pixels.clone(), choice.finished, confidence, iteration))
                keep = choice.stay
            if trace is not None and iteration in watched:
                trace.see(iteration, pixels, keep)

            seen = pixels
            if settings.noise > 0:
                seen = pixels + settings.noise * torch.randn(pixels.shape, generator=generator).to(device)
            gradient, values, logits = passes.gradient(seen, keep, moves[iteration], places[iteration])
            with torch.enable_grad():  # callers may be under no_grad
                leaf = pixels.detach().requires_grad_()
                on_pixels = loss.of_pixels(leaf)
            if on_pixels.requires_grad:
                gradient.add_(torch.autograd.grad(on_pixels, leaf)[0])
            canvas.pull(gradient)
            adam.step()
            canvas.moved()
            pixels = canvas.images

            done = iteration + 1
            last = done == settings.iterations
            if last or done % COMPARE_EVERY == 0:
                if not bool(logits.isfinite().all() and values.isfinite().all() and pixels.isfinite().all()):
                    raise DivergedError(f"the inversion left the finite numbers within {done} iterations")
                if on_step is not None:
                    certainty = _probability(logits, labels).mean().item()
                    total = (values.mean() + on_pixels).item()
                    on_step(Progress(done, settings.iterations, total, certainty, keep.shape[1]))
            if last or (iteration >= settled and (done - settled) % COMPARE_EVERY == 0):
                best.update(pixels, _divergence(passes.logits(pixels, keep), labels))
                if enough.reached(best.score):
                    break
        if not bool(best.score.isfinite().all()):
            raise DivergedError(f"the inversion left the finite numbers within {done} iterations")
        confidence = _probability(passes.logits(best.images, keep), labels)
    if trace is not None:
        trace.see(done, best.images, keep)
    return _gathered([*finished, _Finished(best.images, keep, confidence, done)])


def _divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """From the wanted classes to what the model sees, in nats: [B]. Cross-entropy where one class alone is wanted."""
    own = 0.0 if targets.dim() == 1 else cross_entropy(targets.clamp_min(1e-12).log(), targets)
    return cross_entropy(logits, targets) - own


def _probability(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: [B, C], labels: [B] or [B, C] -> [B], what the model gives the wanted class."""
    wanted = labels if labels.dim() == 1 else labels.argmax(1)
    return logits.softmax(-1).gather(1, wanted.view(-1, 1))[:, 0]


def _gathered(finished: list[_Finished]) -> Inverted:
    """The images of each canvas in the order they were finished, canvas after canvas."""
    canvases = len(finished[0].images)
    return Inverted(
        images=torch.stack([one.images for one in finished], dim=1).flatten(0, 1),
        keep=[one.keep[canvas] for canvas in range(canvases) for one in finished],
        confidence=torch.stack([one.confidence for one in finished], dim=1).flatten(),
        finished=torch.tensor([one.iterations for one in finished]).repeat(canvases),
        iterations=finished[-1].iterations,
    )


def describe(objective: Objective, schedule: PatchSchedule, settings: Settings) -> dict[str, Any]:
    """What an inversion is made of, for the manifest."""
    # Only where they are not the published ones: sets made before knew no others.
    further = {"waves": settings.waves} if settings.waves is not None else {}
    further |= {"noise": settings.noise} if settings.noise > 0 else {}
    return {
        "objective": objective.describe(),
        "schedule": schedule.describe(),
        "optimiser": {"name": "adam", "learning_rate": settings.learning_rate, "betas": list(settings.betas)} | further,
        "augment": {"roll_fraction": settings.augment.fraction, "flip": 0.5}
        | ({"smallest_window": settings.augment.smallest} if settings.augment.smallest < 1 else {}),
        "iterations": settings.iterations,
        "enough": settings.enough,
    }
