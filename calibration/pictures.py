"""Picture files: finding them below a folder, and reading one or saying why not."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from calibration.errors import DfqError

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File name endings taken for images, in lower case; upper case is understood too."""

_DEEP_MODES = ("I", "F")
# Of the formats behind these endings, and GIF, that files are called by mistake. Pillow knows others whatever a file is
# called, and one of them (EPS) is run as a program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MAX_ASPECT = 100


class ImageFileError(DfqError):
    """A picture that cannot be used. The message is one sentence, also when it comes from a worker of a DataLoader."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's exception anew, as type(error)(text of the whole traceback); its last line
        # is "calibration.pictures.ImageFileError: " and the message given first.
        _, mark, last_line = message.partition(f"\n{type(self).__module__}.{type(self).__qualname__}: ")
        super().__init__(last_line.rstrip() if mark else message)


def read_image(path: Path) -> Image.Image:
    """The picture in RGB.

    Raises ImageFileError, naming the file; also for more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, of which Pillow only
    warns, and for a strip that would become a huge picture when its short side is enlarged to the model's.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path, formats=_FORMATS)
        with picture:
            width, height = picture.size
            if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"it has {width}x{height} pixels, and {Image.MAX_IMAGE_PIXELS} are the most")
            if max(width, height) > _MAX_ASPECT * min(width, height):
                raise ValueError(
                    f"it has {width}x{height} pixels, and one side may be at most {_MAX_ASPECT} times the other"
                )
            # Pillow clips these to 255 instead of scaling them: the picture would come out white.
            if picture.mode.startswith(_DEEP_MODES):
                raise ValueError(f"its pixels have more than 8 bits (mode {picture.mode})")
            return picture.convert("RGB")
    # What a decoder raises on a damaged file depends on the format: OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise ImageFileError(
            f"cannot read the image {path}: {reason(error)}; replace it by an 8-bit picture that opens, or remove it"
        ) from None


def reason(error: Exception) -> str:
    """What an exception says, on one line and without a full stop, to stand inside a sentence."""
    if isinstance(error, UnidentifiedImageError):
        return "it is in no known image format"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()).rstrip(".") or type(error).__name__


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image; one that begins with a dot is not."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def _raise(error: OSError) -> None:
    raise error


def images_below(folder: Path) -> list[Path]:
    """All images in `folder` and the folders in it, sorted; a folder that links lead to again counts once.

    Raises DfqError for one that may not be listed.
    """
    found = []
    seen: set[Path] = set()
    try:
        # os.walk passes over what it may not list unless told otherwise: images would be missing without a word.
        for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            place = Path(parent).resolve()
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            found += [Path(parent, name) for name in files if is_image(name)]
    except OSError as error:
        raise DfqError(
            f"cannot list the folder {error.filename or folder}: {reason(error)}; check its access rights"
        ) from None
    return sorted(found)
