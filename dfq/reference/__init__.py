"""The embedded default: a small real Vision Transformer that reads handwritten digits, with its weights.

It lets every command of dfq run offline, in seconds, on a model that was truly trained: 10 classes, 32x32 pixels,
a CLS token and an 8x8 grid of patches. `tools/train_reference.py` makes the weights; the images are scikit-learn's
copy of the UCI handwritten digits (E. Alpaydin, C. Kaynak, 1998), needed only to train and to evaluate it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dfq.errors import DfqError

IMAGE_SIZE = (32, 32)
"""Height and width of the images, in pixels."""

MEAN = (0.305, 0.305, 0.305)
"""Mean of the training images in [0, 1], per channel, to three digits (the channels are equal: the digits are gray)."""

STD = (0.323, 0.323, 0.323)
"""Standard deviation of the training images in [0, 1], per channel, to three digits."""

CLASS_NAMES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
"""Name of each class, in class order: the digit itself."""

_HELD_OUT_EVERY = 4


def architecture() -> dict[str, Any]:
    """The arguments of timm's `VisionTransformer` that make the reference model (about 205 000 parameters)."""
    return {
        "img_size": IMAGE_SIZE,
        "patch_size": 4,
        "in_chans": 3,
        "num_classes": len(CLASS_NAMES),
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
    }


def build() -> VisionTransformer:
    """The reference architecture with random weights, in training mode as timm leaves it."""
    return VisionTransformer(**architecture())


def weights_path() -> Path:
    """Where the trained weights lie: safetensors, float16, named as in `build().state_dict()`."""
    return Path(__file__).with_name("weights.safetensors")


def digits(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """The handwritten digits the reference model is trained (`train`) and measured (`test`) on.

    Of each class every fourth image, in scikit-learn's order, is held out as `test`: 1352 images remain to train on and
    445 to measure on, and no class is short in either. The 8x8 originals are enlarged bilinearly to 32x32 and the gray
    value is repeated in the three channels.

    Returns: images `[N, 3, 32, 32]`, uint8; labels `[N]`, int64.

    Raises: DfqError when scikit-learn is not installed or the split is neither `train` nor `test`.
    """
    if split not in ("train", "test"):
        raise DfqError(f"there is no split {split!r} of the reference digits; ask for 'train' or 'test'")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DfqError(
            'the reference digits come with scikit-learn; install it with `pip install "dfq[demo]"`'
        ) from None
    source = load_digits()
    originals = torch.from_numpy(source.images).float()
    labels = torch.from_numpy(source.target).long()

    one_hot = nn.functional.one_hot(labels, len(CLASS_NAMES))
    rank_in_class = one_hot.cumsum(0).gather(1, labels[:, None]).squeeze(1) - 1
    held_out = rank_in_class % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    chosen = held_out if split == "test" else ~held_out

    # Originals count 0..16 and a fourfold bilinear step has weights in eighths, so all sums below are exact in float32:
    # the pixels are the same on every machine.
    enlarged = nn.functional.interpolate(originals[chosen, None], size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    pixels = (enlarged * 255 / 16).round().to(torch.uint8)
    return pixels.repeat(1, 3, 1, 1), labels[chosen]
