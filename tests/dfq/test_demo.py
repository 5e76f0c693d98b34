"""The demonstration, with fewer images and iterations than a user gets."""

from __future__ import annotations

from pathlib import Path

import pytest

import dfq
from calibration.calibration_set import CalibrationSet
from dfq import demo as demonstration
from dfq.errors import DfqError
from dfq.models import Model


def test_the_demonstration_measures_three_models_and_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demonstration, "ITERATIONS", 3)
    monkeypatch.setattr(demonstration, "NUM_IMAGES", 8)
    out = tmp_path / "demo"
    lines = demonstration.demo(out, progress=False).splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("fp32", "W"))}
    assert list(rows) == ["fp32", "W8A8", "W4A8", "W4A4"]
    assert "445 digits it was not trained on" in lines[0]
    assert float(rows["fp32"][1]) > 97
    assert float(rows["W8A8"][1]) > 95
    # float32 has 4 bytes a weight; 8 and 4 bits get near to a quarter and an eighth of them.
    size = {name: float(row[-1]) for name, row in rows.items()}
    assert size["fp32"] == pytest.approx(dfq.load_model("reference").weight_bytes / 1000, abs=1)
    assert size["fp32"] / 4 < size["W8A8"] < size["fp32"] / 3
    assert size["fp32"] / 8 < size["W4A8"] < size["fp32"] / 5
    assert lines[-1].endswith("the quantizer saw no real image.")
    assert (out / "calibration" / "preview.png").is_file()
    for bits in ("w8a8", "w4a8", "w4a4"):
        assert dfq.load(out / bits).bits == bits
        assert f"{out / bits}/" in "\n".join(lines)
    assert capsys.readouterr().out == ""


def test_a_folder_in_use_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: CalibrationSet, reference: Model
) -> None:
    def generate(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("images were made")

    monkeypatch.setattr(demonstration, "generate", generate)
    other = dfq.load_model("reference", random_weights=True, device="cpu")
    dfq.save(dfq.quantize(other, "w4a4", calibration=noise, recipe="paper", progress=False), tmp_path / "w4a4")
    before = (tmp_path / "w4a4" / "model.safetensors").read_bytes()
    with pytest.raises(DfqError, match="holds a quantized model of another run"):
        demonstration.demo(tmp_path, progress=False)
    assert (tmp_path / "w4a4" / "model.safetensors").read_bytes() == before
