"""What is recorded of the activations at a site: only what its range search needs, the extremes or a sample of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Values of one site that a range search gets to see; beyond that the search only gets slower.
SAMPLE_ELEMENTS = 2**17


class Extremes:
    """Smallest and largest value of each head and channel: all that a min-max range needs, exactly."""

    def __init__(self) -> None:
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def add(self, x: Tensor) -> None:
        # [B, N, C] keeps C; [B, heads, N, D] and images [B, C, H, W] keep axis 1 and the last one.
        kept = {x.dim() - 1} | ({1} if x.dim() == 4 else set())
        reduced = [axis for axis in range(x.dim()) if axis not in kept]
        low, high = x.amin(reduced, keepdim=True), x.amax(reduced, keepdim=True)
        if self._low is None or self._high is None:
            self._low, self._high = low, high
            return
        if low.shape != self._low.shape:
            # Attention maps of batches with different numbers of tokens have only the heads in common.
            low, self._low = low.amin(-1, keepdim=True), self._low.amin(-1, keepdim=True)
            high, self._high = high.amax(-1, keepdim=True), self._high.amax(-1, keepdim=True)
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)

    def values(self) -> Tensor:
        if self._low is None or self._high is None:
            raise RuntimeError("no activation passed this site")
        return torch.cat([self._low, self._high])


class Sample:
    """A random share of the rows (tokens), every head and channel of them.

    parts: how many times the elements of the first tensor will come in all, the first included; largest: so many rows
    of each tensor, those with the largest values, are taken whatever is drawn. Massive activations are in few tokens.
    tokens: [B, N] of each tensor to come, how much its tokens count; those that count most are taken as well, a
    quarter as many as are drawn. None: all alike.
    """

    def __init__(self, parts: float, seed: int, largest: int = 0, tokens: Sequence[Tensor] | None = None) -> None:
        self._parts = parts
        self._largest = largest
        self._tokens = None if tokens is None else iter(tokens)
        self._share: float | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: list[Tensor] = []
        self._importance: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        # Rows first: [B, N, C] -> [B * N, C]; [B, heads, N, D] -> [B * N, heads, 1, D], so that axis 1 is still heads.
        rows = x.transpose(1, 2).flatten(0, 1).unsqueeze(2) if x.dim() == 4 else x.flatten(0, -2)
        if self._share is None:
            self._share = SAMPLE_ELEMENTS / (x.numel() * self._parts)
        counts = torch.ones(len(rows), device=x.device) if self._tokens is None else next(self._tokens).flatten()
        if self._share < 1.0:
            total, drawn = len(rows), max(1, round(len(rows) * self._share))
            chosen = torch.randperm(total, generator=self._generator)[:drawn].to(x.device)
            if self._tokens is not None:
                chosen = _with_largest(chosen, counts, drawn // 4)
            if self._largest:
                chosen = _with_largest(chosen, rows.flatten(1).abs().amax(1), self._largest)
            rows, counts = rows[chosen], counts[chosen]
            # What is there whatever is drawn stands for itself.
            counts[:drawn] *= ((total - (len(rows) - drawn)) / drawn) ** 0.5
        self._rows.append(rows.clone())
        self._importance.append(counts)

    def values(self) -> Tensor:
        if not self._rows:
            raise RuntimeError("no activation passed this site")
        # Rows of attention maps are as long as there are tokens; short ones end in zeros, as of tokens nobody looks at.
        longest = max(rows.shape[-1] for rows in self._rows)
        return torch.cat([F.pad(rows, (0, longest - rows.shape[-1])) for rows in self._rows])

    def importance(self) -> Tensor:
        """How much a squared error in each row of `values` counts: what its token does, times the root of the number
        of rows it stands for.

        A row that was drawn stands for many, one taken for its size for itself. Were all to count alike, the few large
        ones would stretch a range of few levels; in proportion, they would be clipped where levels are plenty, and
        models lean on them. Under the root both come out nearly as well as they can. Shape [R, 1, ...].
        """
        return torch.cat(self._importance).view(-1, *[1] * (self._rows[0].dim() - 1))


def _with_largest(chosen: Tensor, sizes: Tensor, count: int) -> Tensor:
    """Rows `chosen`, and of the others those `count` whose size [R] is largest."""
    others = sizes.index_fill(0, chosen, -1.0)
    return torch.cat([chosen, others.topk(min(count, len(sizes) - len(chosen))).indices])


class InputImportance:
    """How much an error in the weights of each input channel counts: the mean square of that channel.

    Tokens are first brought nearer to one size (`token_importance`).
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, x: Tensor) -> None:
        # A linear takes [..., C]; the patch embedding's convolution [B, C, H, W], which has no tokens yet.
        squares = x.square().movedim(1, -1) if x.dim() == 4 else x.square() * token_importance(x)
        squares = squares.flatten(0, -2)
        total = squares.sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(squares)

    def values(self) -> Tensor:
        """[C]"""
        if self._sum is None:
            raise RuntimeError("no activation passed this site")
        return self._sum / self._count


class MeanOverImages:
    """The mean over the images of all batches, which have the same shape, in fp64, and the energy of one image."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._squares = 0.0
        self.num_images = 0

    def add(self, x: Tensor) -> None:
        exact = x.double()
        total = exact.sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self._squares += float(exact.square().sum())
        self.num_images += len(x)

    def values(self) -> Tensor:
        """Of x [B, ...]: [...]."""
        if self._sum is None:
            raise RuntimeError("no activation passed this site")
        return self._sum / self.num_images

    def energy(self) -> float:
        """The sum of all squares of an image, in the mean."""
        return self._squares / self.num_images


def token_importance(x: Tensor) -> Tensor:
    """x: [..., C] -> [..., 1]: how much a squared error in each token counts, its root mean square to the power -3/2.

    Power 0, the absolute error, is ruled by the few tokens with massive activations: all others are left a handful of
    levels. Under power -2, the relative error, those few are clipped away, and the model leans on them. Where the
    best lies in between was seen on ViT-Tiny.
    """
    squares = x.square().mean(-1, keepdim=True)
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).pow(-0.75)


Recorder = Extremes | Sample | InputImportance | MeanOverImages


@contextmanager
def recording(slots: Mapping[nn.Module, Recorder]) -> Iterator[dict[nn.Module, None]]:
    """Record what passes each slot while it is open. Yields the slots in the order of the forward pass."""
    passed: dict[nn.Module, None] = {}

    def record(slot: nn.Module, _args: Any, x: Tensor) -> None:
        passed.setdefault(slot)
        slots[slot].add(x.detach())

    handles = [slot.register_forward_hook(record) for slot in slots]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()
