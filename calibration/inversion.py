"""The optimisation loop: model + objective + schedule -> images.

Follows SMI (arXiv 2510.27186) and its dense ancestor DeepInversion (Yin et al., CVPR 2020): Adam on the pixels, one
jitter and flip for the batch per step, pixels clamped to what an image can hold. Where it departs from the published
code is written in docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from calibration.augment import STILL, RollAndFlip
from calibration.errors import DfqError
from calibration.objectives import Objective, Step
from calibration.saliency import ClassAttentionProbe, class_attention_probe
from calibration.schedules import PatchSchedule
from calibration.tokens import PatchGrid, token_gather

COMPARE_EVERY = 20
"""Iterations between two comparisons of iterates; one costs a forward pass, about a third of a step."""


Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Settings:
    """How pixels are optimised; the defaults are the published ones."""

    iterations: int = 4000
    learning_rate: float = 0.25
    betas: tuple[float, float] = (0.5, 0.99)
    augment: RollAndFlip = field(default_factory=RollAndFlip)

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"inversion takes at least 1 iteration, not {self.iterations}")


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
    """images: [B, 3, H, W], normalised; keep: [B, K]; confidence: [B], of the wanted class, without jitter."""

    images: Tensor
    keep: Tensor
    confidence: Tensor


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of the forward and backward pass; pixels and Adam's state are float32 always.

    `auto` is bfloat16 where the hardware multiplies it (recent GPUs, CPUs with AVX-512 BF16 or AMX), else float32.
    """
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes):
        return torch.bfloat16
    return torch.float32


@contextmanager
def _as_fixed_function(vit: VisionTransformer) -> Iterator[None]:
    """The model as a fixed function of its input: evaluation mode, no weight gradients, all put back afterwards.

    On a CPU the attention runs unfused: the backward pass of the fused kernel is the slower one there.
    """
    modes = [(m, m.training) for m in vit.modules()]
    trainable = [p for p in vit.parameters() if p.requires_grad]
    on_cpu = next(vit.parameters()).device.type == "cpu"
    fused = [m for m in vit.modules() if on_cpu and getattr(m, "fused_attn", False)]
    vit.eval()
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in fused:
            module.fused_attn = True


def pixel_bounds(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The normalised values of black and white, per channel: two tensors [1, 3, 1, 1]."""
    mean_, std_ = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    return (0.0 - mean_) / std_, (1.0 - mean_) / std_


def invert(
    vit: VisionTransformer,
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
    on_step: Callable[[Progress], None] | None = None,
) -> Inverted:
    """Optimise one batch of images until `vit` sees `labels` in them.

    initial: [B, 3, H, W], normalised, on the model's device; labels: [B]; generator: CPU, for the jitter.
    Of each image the best iterate is kept, by the objective's per-image terms (the last among equals), among every
    `COMPARE_EVERY`-th of those made with its final patches, and the last. They are compared unmoved: under jitter the
    luckiest move would win, not the best image.

    Patches that are stopped get no gradient through the model, but for the half patch by which jitter may be off; terms
    on pixels (total variation) and Adam's momentum still move them, as published.

    Raises DfqError where the schedule needs a class token the model lacks, or the loss leaves the real numbers.
    """
    grid = PatchGrid.of(vit)
    device = initial.device
    dtype = resolve_precision(precision, device)
    low, high = pixel_bounds(mean, std, device)
    decisions = {iteration for iteration in schedule.decisions if iteration < settings.iterations}
    settled = max(decisions, default=0)
    moves = settings.augment.draw(settings.iterations, grid.image_size, generator)

    pixels = initial.clone().requires_grad_(True)
    adam = torch.optim.Adam([pixels], lr=settings.learning_rate, betas=settings.betas, fused=True)
    keep = torch.arange(grid.num_patches, device=device).expand(len(initial), -1)
    best = initial.clone()
    best_score = torch.full((len(initial),), torch.inf, device=device)
    confidence = torch.zeros(len(initial), device=device)

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())  # callers may be under no_grad
        stack.enter_context(_as_fixed_function(vit))
        gather = stack.enter_context(token_gather(vit))
        probe: ClassAttentionProbe | None = stack.enter_context(class_attention_probe(vit)) if decisions else None

        def logits_of(images: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits: Tensor = vit(images)
            return logits.float()

        for iteration in range(settings.iterations):
            # The map that chooses patches, and the step before it, see the image unmoved: the scores are then on
            # the grid the patches are counted in.
            unmoved = iteration in decisions or iteration + 1 in decisions
            move = STILL if unmoved else moves[iteration]
            if probe is not None and iteration in decisions:
                gather.keep = keep
                probe.active = True
                with torch.no_grad():
                    logits_of(pixels)
                probe.active = False
                keep = schedule.choose(keep, probe.scores)

            gather.keep = move.patches(grid).to(device)[keep] if keep.shape[1] < grid.num_patches else None
            logits = logits_of(move.images(pixels))
            loss, _ = objective(Step(images=pixels, logits=logits, labels=labels))
            (pixels.grad,) = torch.autograd.grad(loss, pixels)

            with torch.no_grad():
                adam.step()
                pixels.clamp_(low, high)
                done = iteration + 1 == settings.iterations
                if done or (iteration >= settled and (iteration + 1 - settled) % COMPARE_EVERY == 0):
                    gather.keep = keep if keep.shape[1] < grid.num_patches else None
                    still = logits_of(pixels)
                    _, score = objective(Step(images=pixels, logits=still, labels=labels))
                    better = score <= best_score
                    best_score = torch.where(better, score, best_score)
                    best = torch.where(better.view(-1, 1, 1, 1), pixels, best)
                    confidence = torch.where(better, _probability(still, labels), confidence)
            if on_step is not None and (iteration % 10 == 0 or iteration == settings.iterations - 1):
                seen = _probability(logits.detach(), labels).mean()
                on_step(Progress(iteration + 1, settings.iterations, loss.item(), seen.item(), keep.shape[1]))

        # Once a step has left them, its pixels never come back.
        if not bool(best_score.isfinite().all() and pixels.isfinite().all()):
            raise DfqError(
                "the inversion loss left the real numbers; try --precision fp32, and check the model's weights"
            )
    return Inverted(images=best, keep=keep.clone(), confidence=confidence)


def _probability(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: [B, C], labels: [B] -> [B], what the model gives the wanted class."""
    return logits.softmax(-1).gather(1, labels.view(-1, 1))[:, 0]


def describe(objective: Objective, schedule: PatchSchedule, settings: Settings) -> dict[str, Any]:
    """What an inversion is made of, for the manifest."""
    return {
        "objective": objective.describe(),
        "schedule": schedule.describe(),
        "optimiser": {"name": "adam", "learning_rate": settings.learning_rate, "betas": list(settings.betas)},
        "augment": {"roll_fraction": settings.augment.fraction, "flip": 0.5},
        "iterations": settings.iterations,
    }
