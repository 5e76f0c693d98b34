"""A sheet of pictures: equal tiles in rows on white paper, with lines of text over the columns and under the rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from calibration.files import replace_file

# Light, and with a tint: light patches of a gray image would be lost on gray.
GROUND = (220, 229, 241)
GAP = 4
SIDE = 112
"""Pixels that a tile is about high at least."""

PAPER, INK = (255, 255, 255), (48, 48, 48)
ELLIPSIS = "…"


def on_ground(images: Tensor, inside: Tensor, shine_through: float = 0.0) -> Tensor:
    """images: uint8 [M, 3 or 1, H, W], inside: bool [M, 1, H, W] -> [M, 3, H, W], on blank ground but where inside.

    shine_through: the share, in [0, 1], of the image that is still to be seen there.
    """
    ground = torch.tensor(GROUND, dtype=torch.float32).view(3, 1, 1)
    outside = torch.lerp(ground, images.float(), shine_through).round().to(torch.uint8)
    return torch.where(inside, images, outside)


def enlarge(images: Tensor) -> Tensor:
    """uint8 [M, C, H, W] -> [M, C, zoom H, zoom W], by whole pixels: small images become about `SIDE` high."""
    zoom = max(1, round(SIDE / images.shape[-2]))
    return images.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)


def class_name(label: int, class_names: Sequence[str] | None) -> str:
    """What class `label` is called. By `class 207` goes one that has no name, or only a number for one."""
    names = class_names or ()
    name = names[label].strip() if 0 <= label < len(names) else ""
    return name if name and not name.isdecimal() else f"class {name or label}"


class Sheet:
    """Tiles of `tile` (height, width) pixels; `heads` and `captions` say for which lines of text to leave room."""

    def __init__(
        self, rows: int, columns: int, tile: tuple[int, int], *, heads: bool = False, captions: bool = False
    ) -> None:
        self._tile = height, width = tile
        self._font = _font(max(12, width // 12))
        self._line = sum(self._font.getmetrics()) + GAP if self._font is not None else 0
        self._top = GAP + heads * self._line
        self._step = (height + captions * self._line + GAP, width + GAP)
        self._image = Image.new("RGB", (columns * self._step[1] + GAP, self._top + rows * self._step[0]), PAPER)

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a tile, as Pillow counts."""
        return GAP + column * self._step[1], self._top + row * self._step[0]

    def paste(self, row: int, column: int, tile: Tensor) -> None:
        """tile: uint8 [3, H, W]."""
        self._image.paste(Image.fromarray(tile.permute(1, 2, 0).numpy()), self._corner(row, column))

    def head(self, column: int, text: str) -> None:
        """Text over a column."""
        left, top = self._corner(0, column)
        self._write(left, top - self._line, self._tile[1], text)

    def caption(self, row: int, column: int, text: str, tail: str = "", *, span: int = 1) -> None:
        """Text under a tile and the `span` - 1 right of it, shortened to their width; `tail` is not shortened."""
        left, top = self._corner(row, column)
        self._write(left, top + self._tile[0], span * self._step[1] - GAP, text, tail)

    def _write(self, left: int, top: int, width: int, text: str, tail: str = "") -> None:
        if self._font is None:
            return
        # Half a letter's height is left free: neighbours that both fill their width must not read as one text.
        room = width - self._font.size / 2 - self._font.getlength(tail)
        text = shorten(" ".join(text.split()), self._font, room) + tail
        # Drawn on a strip of its own: accents piled up on a letter would reach into the picture above.
        strip = Image.new("RGB", (width, self._line), PAPER)
        ImageDraw.Draw(strip).text((0, 0), text, fill=INK, font=self._font)
        self._image.paste(strip, (left, top))

    def save(self, path: Path) -> None:
        """As PNG. Raises DfqError where it cannot be written."""
        replace_file(path, lambda partial: self._image.save(partial, format="PNG"))


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """As much of one line of text as is at most `width` pixels wide, with an ellipsis where some is missing."""
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda count: font.getlength(text[:count] + ELLIPSIS))
    return text[: fitting - 1].rstrip(" ,") + ELLIPSIS if fitting else ""


def _font(size: int) -> ImageFont.FreeTypeFont | None:
    """Pillow's own font, or None where Pillow was built without FreeType: pictures then go without words."""
    try:
        font = ImageFont.load_default(size)
    except ImportError:
        return None
    return font if isinstance(font, ImageFont.FreeTypeFont) else None
