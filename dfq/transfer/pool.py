"""The pool: images that came from the teacher, what it makes of them, and how each network is shown them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resize, resized_crop

from calibration import CalibrationSet
from calibration.background import leaves
from calibration.calibration_set import normalise, of_one_size
from calibration.passes import low_precision
from calibration.team import team
from calibration.tokens import PatchGrid, keep_of_mask, token_gather
from dfq.models import Network
from dfq.ptq.modules import takes_all_positions

BATCH = 32
"""Images that pass a network at once where no gradient is taken."""

AREA = (0.25, 1.0)
"""Of a window, of its image."""

ASPECT = (3 / 4, 4 / 3)
"""Of a window, width to height."""

COARSEST = 1 / 7
"""Share of its rows and columns that a picture is left where it is seen at a lower resolution."""

GROUNDS = 64
"""Pictures of dead leaves, one of which a window of a sparse image has behind its patches."""


@dataclass(frozen=True)
class View:
    """A network, and how it is shown pictures: in its own normalisation, patches that are not kept in the mean colour.

    A VisionTransformer whose patches are those of the pictures is given the kept ones alone, unless it is quantized
    with means of positions apart. To no network do the two come to the same: a token that is there is attended to,
    whatever its colour. dtype: of the passes.
    """

    network: Network
    dtype: torch.dtype

    def __call__(self, images: Tensor, mask: Tensor) -> Tensor:
        """images: uint8 [B, 3, H, W], mask: bool [B, rows, columns], as many patches kept in each -> logits [B, C]."""
        network = self.network
        module: Any = network.module
        images, mask = images.to(network.device), mask.to(network.device)
        pixels = normalise(images, network.preprocessing.mean, network.preprocessing.std)
        with ExitStack() as stack:
            stack.enter_context(low_precision(network.device, self.dtype))
            if not bool(mask.all()):
                grid = PatchGrid.tiling(images, mask)
                pixels = pixels * grid.to_pixels(mask)
                some = isinstance(module, VisionTransformer) and not takes_all_positions(module)
                if some and PatchGrid.of(module) == grid:
                    stack.enter_context(token_gather(module)).keep = keep_of_mask(mask)
            return network(pixels).float()


class Pool:
    """Images as they come, windows of them, and the teacher's logits for each picture, taken once.

    windows: of each image, besides itself. They are mirrored or not, and every other one is seen at a lower resolution.
    Those of a sparse image are windows of its patches, moved by whole ones, in front of dead leaves, each time others.
    A picture has a number: that of its image times `windows + 1`, and the image itself comes first. hold_out: of so
    many images the last one is never drawn, 0 for none, nor are its windows.
    """

    def __init__(self, teacher: View, hold_out: int, windows: int = 0) -> None:
        self._teacher, self._hold_out, self._per_image = teacher, hold_out, windows + 1
        self._team = team()
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        # uint8 [GROUNDS, 3, H, W], from the first sparse image on.
        self._grounds: Tensor | None = None

    def add(self, part: CalibrationSet) -> None:
        """Take in images, and ask the teacher what it makes of them."""
        first = self.num_images
        pairs = zip(part.images, part.mask, strict=True)
        boxes = torch.stack([self._boxes(first + index, *pair) for index, pair in enumerate(pairs)])
        if part.is_sparse and self._grounds is None and self._per_image > 1:
            self._grounds = leaves(GROUNDS, part.grid.image_size, torch.Generator().manual_seed(0))
        logits = torch.zeros(len(part) * self._per_image, self._teacher.network.num_classes)
        parts = [*self._parts, (part.images, part.mask, boxes, logits)]
        self._parts = [tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))]  # type: ignore[list-item]
        new = torch.arange(first * self._per_image, len(self))
        with torch.inference_mode():
            self.fill(self.logits, new, self._teacher)

    def fill(self, values: Tensor, chosen: Tensor, look: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Set values[number] to what `look` makes of each chosen picture and its mask, the work shared by the team."""
        chunks = self._chunks(chosen, BATCH)
        own = [(chunks[index], look(*self._look(chunks[index])).cpu()) for index in self._team.part_of(len(chunks))]
        for found in self._team.gather(own):
            for some, seen in found:
                values[some] = seen

    def batches(self, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """chosen: numbers of pictures -> (some of them, uint8 [B, 3, H, W], mask [B, rows, columns]), one per size."""
        for some in self._chunks(chosen, max(1, len(chosen))):
            yield some, *self._look(some)

    def _chunks(self, chosen: Tensor, size: int) -> list[Tensor]:
        """At most `size` numbers in each, of pictures of one size."""
        # A window has all patches.
        alike = of_one_size(self._mask[chosen // self._per_image] | (chosen % self._per_image > 0).view(-1, 1, 1))
        return [some for group in alike for some in torch.split(chosen[group], size)]

    def _look(self, some: Tensor) -> tuple[Tensor, Tensor]:
        looks = [self._picture(int(number)) for number in some]
        return torch.stack([picture for picture, _ in looks]), torch.stack([mask for _, mask in looks])

    def _picture(self, number: int) -> tuple[Tensor, Tensor]:
        """uint8 [3, H, W], bool [rows, columns]"""
        image, window = divmod(number, self._per_image)
        pictures, masks, boxes, _ = self._parts[0]
        picture, mask = pictures[image], masks[image]
        if window == 0:
            return picture, mask
        top, left, height, width, mirrored, rows, columns, ground, down, right = boxes[image, window - 1].tolist()
        if not bool(mask.all()):
            assert self._grounds is not None
            grid = PatchGrid.tiling(pictures, masks)
            kept = grid.to_pixels(mask[None].roll((down, right), (-2, -1)))[0]
            moved = picture.roll((down * grid.height, right * grid.width), (-2, -1))
            picture = torch.where(kept, moved, self._grounds[ground])
        size = list(picture.shape[-2:])
        lower = resized_crop(picture, top, left, height, width, [rows, columns], antialias=True)
        picture = resize(lower, size, antialias=True)
        return picture.flip(-1) if mirrored else picture, torch.ones_like(mask)

    def _boxes(self, number: int, image: Tensor, mask: Tensor) -> Tensor:
        """int [windows, 10], by the number of the image: top, left, height, width in pixels, whether mirrored, the rows
        and columns that it is seen at, and of a sparse one its ground and how many patches down and right it is moved.
        """
        height, width = image.shape[-2:]
        boxes = []
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(number)
            for window in range(self._per_image - 1):
                box = RandomResizedCrop.get_params(image, list(AREA), list(ASPECT))
                mirrored, lower = torch.rand(2).tolist()
                share = COARSEST**lower if window % 2 else 1.0
                sides = [max(1, round(side * share)) for side in (height, width)]
                boxes.append([*box, int(mirrored < 0.5), *sides])
            limits = (GROUNDS, *mask.shape)
            behind = torch.stack([torch.randint(limit, (self._per_image - 1,)) for limit in limits], 1)
        return torch.cat([torch.tensor(boxes, dtype=torch.int64).view(-1, 7), behind], 1)

    @property
    def _mask(self) -> Tensor:
        """bool [M, rows, columns], of the images"""
        return self._parts[0][1]

    @property
    def logits(self) -> Tensor:
        """[pictures, C], the teacher's."""
        return self._parts[0][3]

    @property
    def num_images(self) -> int:
        """That came in."""
        return len(self._parts[0][0]) if self._parts else 0

    def __len__(self) -> int:
        """Pictures that have a number."""
        return self.num_images * self._per_image

    @property
    def trained_on(self) -> Tensor:
        """Numbers of the pictures that may be drawn."""
        pictures = torch.arange(len(self))
        return pictures[~self._held_out(pictures)]

    @property
    def held_out(self) -> Tensor:
        """Numbers of the images that may not."""
        pictures = torch.arange(len(self))
        return pictures[(pictures % self._per_image == 0) & self._held_out(pictures)]

    def _held_out(self, pictures: Tensor) -> Tensor:
        if not self._hold_out:
            return torch.zeros(len(pictures), dtype=torch.bool)
        return pictures // self._per_image % self._hold_out == self._hold_out - 1
