"""`dfq export`: both formats, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import dfq


def test_onnx(status: Callable[..., int], w8a8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.onnx"
    assert status("export", w8a8, "--out", out, "--quiet") == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{out}: 0.")
    assert "opset 21" in said.out
    assert "checked on 8 made images" in said.out
    assert f"dfq bench {out}" in said.out
    assert said.err == ""
    assert dfq.open_model(out).bits == "w8a8"


def test_a_state_dict_for_timm(
    status: Callable[..., int], w8a8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    assert status("export", w8a8, "--format", "torch", "--out", out) == 0
    assert str(out) in capsys.readouterr().out
    model = dfq.load(w8a8)
    assert load_file(out).keys() == dfq.load_model("reference").module.state_dict().keys()
    assert load_file(out)["head.weight"].equal(model.module.get_submodule("head").weight)


def test_what_is_refused(refused: Callable[..., None], w8a8: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.onnx"
    there.write_text("mine")
    refused(("export", w8a8, "--out", there), 2, "is there already", tmp_path)
    refused(("export", w8a8, "--out", tmp_path / "m.pt"), 2, "must end in .onnx", tmp_path)
    refused(("export", w8a8, "--format", "torch", "--out", there), 2, "must end in .safetensors", tmp_path)
    refused(("export", w8a8, "--out", tmp_path / "no" / "m.onnx"), 2, "there is no folder", tmp_path)
    refused(("export", w8a8, "--opset", 13, "--out", tmp_path / "m.onnx"), 2, "choose from 21, 22, 23", tmp_path)
    refused(("export", tmp_path, "--out", tmp_path / "m.onnx"), 1, "is not a quantized model", tmp_path)
