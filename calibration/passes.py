"""Passes of a fixed model over a batch of images: in low precision, in as many parts as memory asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from calibration.attention import Attention, capture
from calibration.augment import Move
from calibration.errors import DfqError
from calibration.objectives import Loss, Step
from calibration.saliency import SaliencyProbe, saliency_probe
from calibration.tokens import PatchGrid, TokenGather, patch_projection, token_gather

Precision = Literal["auto", "fp32", "bf16"]

T = TypeVar("T")

log = logging.getLogger("dfq")


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


def low_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which the model computes in `dtype`: autocast for bfloat16, nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def as_fixed_function(vit: nn.Module) -> Iterator[None]:
    """The model as a fixed function of its input: evaluation mode, no weight gradients, all put back afterwards.

    On a CPU the attention runs unfused: the backward pass of the fused kernel is the slower one there.
    """
    modes = [(m, m.training) for m in vit.modules()]
    trainable = [p for p in vit.parameters() if p.requires_grad]
    on_cpu = next(vit.parameters()).device.type == "cpu"
    fused: list[Any] = [m for m in vit.modules() if on_cpu and getattr(m, "fused_attn", False)]
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


@dataclass
class Passes:
    """What the inversion loop asks of the model. All tensors of a batch of B images; `keep` [B, K] are patch indices.

    part: images in one pass; halved, for the rest of the batch, each time memory runs out. What is minimised is a mean
    over images, so a step is the same up to rounding (which many steps amplify).
    """

    vit: nn.Module
    grid: PatchGrid
    loss: Loss
    targets: Tensor
    dtype: torch.dtype
    part: int
    gather: TokenGather | None
    attention: Attention
    probe: SaliencyProbe | None

    def gradient(self, images: Tensor, keep: Tensor, move: Move, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the moved images: (its gradient [B, 3, H, W] on the unmoved ones, values [B], logits [B, C]).

        places: [N], where `move` puts each patch.
        """
        count = len(images)

        def run(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            unmoved = images[rows].detach().requires_grad_()
            moved = move.images(unmoved)
            logits = self._logits(moved, self._moved(keep[rows], places))
            patches = keep[rows] if self._is_sparse(keep) else places.argsort().expand(len(moved), -1)
            values = self.loss.of_pass(Step(logits, self.targets[rows], rows, patches, self.attention))
            # An objective may look at pixels alone.
            gradient = (
                torch.autograd.grad(values.sum() / count, unmoved)[0]
                if values.requires_grad
                else torch.zeros_like(unmoved)
            )
            return gradient, values.detach(), logits.detach()

        self.attention.active = True
        with torch.enable_grad():  # callers may be under no_grad
            gradients, values, logits = zip(*self._in_parts(count, run), strict=True)
        self.attention.active = False
        return _joined(gradients), _joined(values), _joined(logits)

    @torch.no_grad()
    def logits(self, images: Tensor, keep: Tensor) -> Tensor:
        """Of the images as they are: [B, C]."""
        return torch.cat(self._in_parts(len(images), lambda rows: self._logits(images[rows], self._moved(keep[rows]))))

    @torch.no_grad()
    def saliency(self, images: Tensor, keep: Tensor) -> Tensor:
        """How much each patch in play matters in the images as they are: [B, K]."""
        if self.probe is None:
            raise RuntimeError("these passes were opened without saliency")
        probe = self.probe

        def run(rows: slice) -> Tensor:
            self._logits(images[rows], self._moved(keep[rows]))
            return probe.scores

        probe.active = True
        scores = torch.cat(self._in_parts(len(images), run))
        probe.active = False
        return scores

    def _is_sparse(self, keep: Tensor) -> bool:
        return keep.shape[1] < self.grid.num_patches

    def _moved(self, keep: Tensor, places: Tensor | None = None) -> Tensor | None:
        if not self._is_sparse(keep):
            return None
        return keep if places is None else places[keep]

    def _logits(self, images: Tensor, keep: Tensor | None) -> Tensor:
        if self.gather is not None:
            self.gather.keep = keep
        with low_precision(images.device, self.dtype):
            logits: Tensor = self.vit(images)
        return logits.float()

    def _in_parts(self, count: int, run: Callable[[slice], T]) -> list[T]:
        while True:
            try:
                return [run(slice(first, first + self.part)) for first in range(0, count, self.part)]
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if self.part == 1:
                    raise DfqError("not even one image at a time fits into memory; try a smaller model") from error
            # Outside the handler, so that the failed pass is let go first, and with it what was captured of it.
            self.attention.clear()
            self.part = -(-min(self.part, count) // 2)
            log.warning("out of memory: going on with %d images at a time", self.part)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """As `torch.cat`, which would copy even a part that is all there is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _is_out_of_memory(error: RuntimeError) -> bool:
    # Only CUDA's allocator has a type of its own for it; drivers and CPUs word a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or any(
        said in str(error) for said in ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    )


@contextmanager
def open_passes(
    vit: nn.Module, loss: Loss, targets: Tensor, *, dtype: torch.dtype, sparse: bool, count: int
) -> Iterator[Passes]:
    """Passes over `count` images; the model is put back as it was afterwards.

    sparse: whether patches will be chosen and left out. Raises DfqError for a model that cannot do that.
    """
    with ExitStack() as stack:
        stack.enter_context(as_fixed_function(vit))
        gather, probe = None, None
        if sparse:
            # The probe first: its refusals know more models.
            probe = stack.enter_context(saliency_probe(vit))
            gather = stack.enter_context(token_gather(vit))
        stack.enter_context(patch_projection(vit, gather, dtype))
        attention = stack.enter_context(capture(vit, loss.needs))
        attention.active = False
        yield Passes(vit, PatchGrid.of(vit), loss, targets, dtype, count, gather, attention, probe)
