"""How images and their masks come about: snapshots of one batch, and one picture of them, iterations left to right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from calibration.calibration_set import to_pixels
from calibration.sheet import Sheet, class_name, enlarge, on_ground
from calibration.tokens import PatchGrid

MOST = 6
MOMENTS = 9
# Geometric steps from 0 have to begin somewhere: the first few iterations all look like the noise they began with.
NOISE = 10
# Enough to see what was left behind, too little to be taken for a part of the image.
SHINE_THROUGH = 0.2


@dataclass
class Trace:
    """Snapshots of the first images of one batch; mean, std: per channel, of the model's normalisation."""

    grid: PatchGrid
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # uint8 [M, 3, H, W] and bool [M, rows, columns] by iteration, off the device that is busy inverting.
    _seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def moments(iterations: int, decisions: Sequence[int] = ()) -> tuple[int, ...]:
        """About nine iterations worth seeing, fewer of a short run: geometric steps from 0 to `iterations`, ascending.

        Each of the schedule's `decisions` is among them, in place of the step nearest to it.
        """
        ratio = 1 + iterations / NOISE
        steps = {round(NOISE * (ratio ** (index / (MOMENTS - 1)) - 1)) for index in range(MOMENTS)}
        taken = {decision for decision in decisions if 0 < decision < iterations}
        nearest = {min(steps, key=lambda step: abs(math.log((NOISE + step) / (NOISE + at)))) for at in taken}
        return tuple(sorted({0, iterations} | steps - nearest | taken))

    def see(self, iteration: int, images: Tensor, keep: Tensor) -> None:
        """Take a snapshot after `iteration` steps, in place of any taken there before.

        images: [B, 3, H, W], normalised; keep: [B, K], the patches in play from there on.
        """
        pixels = to_pixels(images[:MOST].detach(), self.mean, self.std)
        self._seen[iteration] = pixels.cpu(), self.grid.mask_of(keep[:MOST]).cpu()

    def clear(self) -> None:
        """Forget what was seen: the batch starts again."""
        self._seen.clear()

    @property
    def snapshots(self) -> list[tuple[int, Tensor, Tensor]]:
        """(iteration, images: uint8 [M, 3, H, W], mask: bool [M, rows, columns]) in order, M at most 6."""
        return [(iteration, *self._seen[iteration]) for iteration in sorted(self._seen)]


def write_trace(
    trace: Trace, path: Path, *, labels: Tensor | None = None, class_names: Sequence[str] | None = None
) -> None:
    """A row for each image, a column for each snapshot; patches out of play are dimmed.

    labels: [B], the classes of the batch, to stand under the rows. Raises ValueError where nothing was seen, DfqError
    where the picture cannot be written.
    """
    snapshots = trace.snapshots
    if not snapshots or not len(snapshots[0][1]):
        raise ValueError("the trace holds no images: nothing was seen")
    rows = len(snapshots[0][1])
    height, width = enlarge(snapshots[0][1]).shape[-2:]
    sheet = Sheet(rows, len(snapshots), (height, width), heads=True, captions=labels is not None)
    for column, (iteration, images, mask) in enumerate(snapshots):
        sheet.head(column, f"iteration {iteration}" if column == 0 else str(iteration))
        for row, tile in enumerate(enlarge(on_ground(images, trace.grid.to_pixels(mask), SHINE_THROUGH))):
            sheet.paste(row, column, tile)
    if labels is not None:
        for row, label in enumerate(labels[:rows].tolist()):
            sheet.caption(row, 0, class_name(label, class_names), span=len(snapshots))
    sheet.save(path)
