"""A model beside full precision on images without labels, against counts of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.errors import DfqError
from dfq.models import Model
from dfq.ptq.engine import QuantizedModel


@pytest.fixture
def model(tiny: Callable[..., Model]) -> Model:
    return tiny()


@pytest.fixture
def quantized(model: Model, images_for: Callable[..., CalibrationSet]) -> QuantizedModel:
    return dfq.quantize(model, "w2a3", calibration=images_for(8), recipe="repq", progress=False)


def test_what_is_counted_of_a_set(reference: Model, noise: CalibrationSet) -> None:
    model, images = reference, dfq.generate(reference, "leaves", 40, progress=False)
    quantized = dfq.quantize(model, "w2a4", calibration=noise, recipe="repq", progress=False)
    found = dfq.compare(quantized, model, images, batch_size=16, progress=False)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (images.mean, images.std))
    pixels = (images.images.double() / 255 - mean) / std
    expected, given = (network(pixels.float()).double().numpy() for network in (model, quantized))
    same = int((expected.argmax(1) == given.argmax(1)).sum())
    # An agreement of all or of none would show nothing.
    assert 0 < same < 40
    assert found.agreement == pytest.approx(100 * same / 40)
    low, high = found.agreement_ci95
    assert low < found.agreement < high
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (expected, given))
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-4)
    sqnr = 10 * np.log10((expected**2).sum() / ((expected - given) ** 2).sum())
    assert found.logit_sqnr_db == pytest.approx(float(sqnr), abs=1e-3)
    assert found.num_images == 40
    assert f"{found.agreement:.2f} %" in found.table()
    assert f"{found.kl:.4f} nats" in found.table()


def test_a_model_beside_itself(model: Model, images_for: Callable[..., CalibrationSet]) -> None:
    found = dfq.compare(model, model, images_for(5), progress=False)
    assert (found.agreement, found.kl) == (100, 0)
    assert "identical" in found.table()
    assert json.loads(json.dumps(found.to_dict()))["logit_sqnr_db"] is None


def test_a_folder_however_its_images_lie(
    model: Model, quantized: QuantizedModel, images_for: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    images = images_for(12)
    places = [tmp_path, tmp_path / "b", tmp_path / "b" / "deep"]
    places[-1].mkdir(parents=True)
    for index, picture in enumerate(images.images):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(places[index % 3] / f"{index}.png")
    found = dfq.compare(quantized, model, tmp_path, progress=False)
    # Pictures of the size that the model takes; its transform cuts the border off, which moves them.
    assert found.num_images == 12
    assert dfq.compare(quantized, model, tmp_path, limit=5, progress=False).num_images == 5


def test_the_folder_of_a_set(model: Model, quantized: QuantizedModel, tmp_path: Path) -> None:
    images = dfq.generate(model, "leaves", 6, out=tmp_path / "set", progress=False)
    one, other = (dfq.compare(quantized, model, data, progress=False) for data in (images, tmp_path / "set"))
    assert one == other


def test_bad_input(
    model: Model, quantized: QuantizedModel, images_for: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    with pytest.raises(DfqError, match="there is no folder"):
        dfq.compare(quantized, model, tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DfqError, match="there are no images in or below"):
        dfq.compare(quantized, model, tmp_path)
    with pytest.raises(DfqError, match=r"holds images of 32x32 with mean .* tiny takes others"):
        dfq.compare(quantized, model, images_for(2, std=(0.5, 0.5, 0.5)))
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[:, 0] = False
    with pytest.raises(DfqError, match="blank patches that no photograph has"):
        dfq.compare(quantized, model, images_for(3, mask))
