"""How many images a model can be inverted on at once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from calibration.passes import as_fixed_function, low_precision
from calibration.tokens import PatchGrid

SHARE = 0.5
"""Of all memory that one pass may plan with; the rest is for the model, the optimiser, kernels' scratch, neighbours.

Of all there is, not of what is free: rounding differs with the number of images in a pass, and the same machine is to
make the same images on another day.
"""


def images_that_fit(vit: nn.Module, dtype: torch.dtype) -> int | None:
    """Images whose passes fit into memory together, at least 1; None where nobody knows how much there is."""
    memory = memory_bytes(next(vit.parameters()).device)
    return None if memory is None else max(1, int(SHARE * memory / activation_bytes(vit, dtype)))


def memory_bytes(device: torch.device) -> int | None:
    """All memory of `device`; under Linux that of the machine or of the container, whichever is less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    return _least(_of_machine(Path("/proc/meminfo")), _of_container(Path("/sys/fs/cgroup")))


def _least(*amounts: int | None) -> int | None:
    return min((amount for amount in amounts if amount is not None), default=None)


def _of_machine(meminfo: Path) -> int | None:
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(lines["MemTotal"].split()[0]) * 1024 if "MemTotal" in lines else None


def _of_container(cgroup: Path) -> int | None:
    """By control group version 2."""
    limit = cgroup / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return None
    return int(limit.read_text())


def activation_bytes(vit: nn.Module, dtype: torch.dtype) -> int:
    """What the forward pass of one image keeps for the backward pass, counted on blank images."""
    # What two images keep beyond one: weights cast to a lower precision are there once, for all.
    return _kept_bytes(vit, dtype, 2) - _kept_bytes(vit, dtype, 1)


def _kept_bytes(vit: nn.Module, dtype: torch.dtype, count: int) -> int:
    grid, device = PatchGrid.of(vit), next(vit.parameters()).device
    images = torch.zeros(count, 3, *grid.image_size, device=device, requires_grad=True)
    kept: dict[int, int] = {}

    def count_in(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        # Detached: a layer that keeps its own output would otherwise keep itself alive.
        return tensor.detach()

    with (
        torch.enable_grad(),
        as_fixed_function(vit),
        torch.autograd.graph.saved_tensors_hooks(count_in, lambda tensor: tensor),
        low_precision(device, dtype),
    ):
        # The graph is held until all is counted: a storage that is freed gives its address to another.
        logits = vit(images)
        total = sum(kept.values())
        del logits
    return total
