"""A real DeiT-Tiny on real photographs."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import dfq
from dfq.datasets import ImageFolder, image_folder
from dfq.evaluation import evaluate
from dfq.models import Model

SHARED = Path(__file__).parents[3] / "shared"
WEIGHTS = SHARED / "models" / "deit_tiny_patch16_224.safetensors"
PHOTOGRAPHS = SHARED / "data" / "imagenet_samples"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(
        not (WEIGHTS.is_file() and PHOTOGRAPHS.is_dir()), reason=f"no real weights and photographs in {SHARED}"
    ),
]


@pytest.fixture(scope="module")
def deit() -> Model:
    return dfq.load_model("deit_tiny_patch16_224", checkpoint=WEIGHTS, device="cpu")


@pytest.fixture(scope="module")
def photographs(deit: Model) -> list[tuple[Tensor, int]]:
    """Every 25th of the thousand, read once."""
    folder = image_folder(PHOTOGRAPHS, deit)
    assert isinstance(folder, ImageFolder)
    return [folder[index] for index in range(0, 1000, 25)]


def test_full_precision_knows_photographs(deit: Model, photographs: list[tuple[Tensor, int]]) -> None:
    assert deit.preprocessing.mean == (0.485, 0.456, 0.406)
    assert [label for _, label in photographs] == list(range(0, 1000, 25))
    result = evaluate(deit, photographs, batch_size=20, progress=False)
    # 77.4 % and 93.6 % of all thousand: 31 and 37 of 40, give or take three standard deviations (8 and 5).
    assert result.top1 >= 100 * 23 / 40
    assert result.top5 >= 100 * 32 / 40


def test_images_made_by_default_stand_in_for_photographs(deit: Model, photographs: list[tuple[Tensor, int]]) -> None:
    calibration = dfq.generate(deit, num_images=2, progress=False)
    assert calibration.confidence is not None
    assert calibration.confidence.mean() > 0.2  # of one class in a thousand
    quantized = dfq.quantize(deit, "w8a8", calibration=calibration, progress=False)
    result = evaluate(quantized, photographs, baseline=deit, batch_size=20, progress=False)
    assert result.comparison is not None
    assert result.comparison.agreement >= 85
    assert result.comparison.logit_sqnr_db > 13
    assert quantized.weight_bytes < 0.3 * deit.weight_bytes
