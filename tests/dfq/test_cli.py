"""The `dfq` command, end to end on the reference model."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import dfq
from calibration import METHODS
from calibration.calibration_set import CalibrationSet
from calibration.methods import DEFAULT_METHOD
from dfq import reference as embedded
from dfq.cli import main
from dfq.weights import read_weights

NOISE = ("--method", "gaussian", "-n", "8", "--device", "cpu")
DEFAULT = METHODS[DEFAULT_METHOD]
AUTO = {"iterations": DEFAULT.settings.iterations, "enough": DEFAULT.settings.enough}
Files = dict[str, bytes]


def files_below(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def status(*arguments: object) -> int:
    """The exit status, also where argparse gives it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


class Mischief:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def w8a8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "w8a8"
    assert main(["quantize", "reference", *NOISE, "--bits", "w8a8", "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Twenty held-out digits as pictures, one folder per class."""
    images, labels = embedded.digits("test")
    for index in range(20):
        folder = tmp_path / "digits" / str(labels[index].item())
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index].permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return tmp_path / "digits"


# --- the commands


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    command = ("generate", "reference", "-n", 3, "-b", 2, "--iterations", 3, "--device", "cpu", "--out", out)
    assert status(*command) == 0
    said = capsys.readouterr()
    assert said.out.startswith("3 images, mean confidence ")
    assert str(out) in said.out
    assert "reference: 32x32" in said.err
    assert len(dfq.load_calibration_set(out)) == 3
    before = files_below(out)
    assert status(*command) == 0
    assert files_below(out) == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), AUTO),
        (("--method", "smi"), {"schedule": {"name": "progressive_stop", "stops": "in proportion"}}),
        (("--iterations", "auto"), AUTO),
        (("--iterations", 70), {"iterations": 70, "enough": None}),
        (("--schedule", "dense"), {"schedule": {"name": "dense"}}),
        (("--schedule", "pri"), {"schedule": {"name": "rebirth", "division": 4}}),
        (("--schedule", "pri", "--division", 7), {"schedule": {"division": 7}}),
        (("--method", "pri", "--division", 2), {"schedule": {"name": "rebirth", "division": 2}}),
        (("--method", "smi", "--stop-at", 5, 10, "--stop-ratio", 0.5), {"schedule": {"stops": [5, 10], "ratio": 0.5}}),
        (("--schedule", "smi", "--stop-ratio", 0.5), {"schedule": {"stops": "in proportion", "ratio": 0.5}}),
        (("--method", "dense", "--schedule", "smi", "--stop-at", 0), {"schedule": {"stops": [0], "ratio": 0.3}}),
        (("--method", "apa-smi", "--stop-at", 9), {"soft_labels": True, "schedule": {"stops": [9]}}),
        (("--method", "smi", "--learning-rate", 0.05), {"optimiser": {"learning_rate": 0.05, "betas": [0.5, 0.99]}}),
    ],
)
@pytest.mark.parametrize("command", ["generate", "quantize"])
def test_how_images_are_made(
    command: str,
    options: tuple[object, ...],
    expected: dict[str, Any],
    noise: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the options say, as the run describes itself; what they do not say is left as the method has it."""
    runs: list[dict[str, Any]] = []

    def generate(*_: object, run: dict[str, Any], **__: object) -> CalibrationSet:
        runs.append(run)
        return noise

    monkeypatch.setattr("calibration.generate", generate)
    assert status(command, "reference", *options, "--device", "cpu", "--out", tmp_path / "out", "--quiet") == 0
    (run,) = runs
    for name, value in expected.items():
        found = run["inversion"][name]
        assert (found | value if isinstance(value, dict) else value) == found, name


@pytest.mark.parametrize("initial", ["noise", "pink", "leaves"])
def test_where_inversion_starts(initial: str, tmp_path: Path) -> None:
    command = ("generate", "reference", "-n", 2, "--iterations", 1, "--device", "cpu", "--quiet", "--out", tmp_path)
    assert status(*command, "--init", initial) == 0
    assert dfq.load_calibration_set(tmp_path).run["initial"] == initial


def test_sparse_images_of_a_canvas_and_their_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    command = ("generate", "reference", "-n", 6, "-b", 1, "--iterations", 8, "--device", "cpu", "--out", out)
    command += ("--schedule", "pri", "--trace")
    assert status(*command) == 0
    said = capsys.readouterr()
    assert said.out.startswith("6 images, mean confidence ")
    assert ", 16 of 64 patches each\n" in said.out
    assert "trace.png how they came about" in said.out
    assert (out / "trace.png").is_file()
    made = dfq.load_calibration_set(out)
    assert made.iterations is not None
    assert made.iterations.tolist() == [2, 4, 6, 8, 2, 4]
    # Killed after its first batch, and run again.
    before = files_below(out)
    manifest = json.loads(before["manifest.json"])
    (out / "shard-00001.safetensors").unlink()
    (out / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "shards": []}))
    assert status(*command) == 0
    assert files_below(out) == before


def test_another_way_to_make_images_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("generate", "reference", "--method", "smi", "-n", 1, "--iterations", 4, "--device", "cpu", "--quiet")
    command = (*command, "--out", tmp_path)
    assert status(*command, "--trace") == 0
    for changes in (
        ("--init", "pink"),
        ("--schedule", "dense"),
        ("--stop-at", 2),
        ("--stop-ratio", 0.4),
        ("--learning-rate", 0.2),
        ("--iterations", "auto"),
    ):
        check_refused((*command, *changes), 1, "holds a calibration set of another run", capsys, tmp_path)
    assert status(*command, "--init", "pink", "--overwrite") == 0
    assert "trace.png" not in capsys.readouterr().out
    assert dfq.load_calibration_set(tmp_path).run["initial"] == "pink"


def test_quantize_evaluate_and_the_json(w8a8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    assert status("evaluate", w8a8, "--device", "cpu", "--baseline", "--json", file) == 0
    said = capsys.readouterr()
    result = json.loads(file.read_text())
    assert set(result) == {
        *("top1", "top5", "num_images", "top1_ci95"),
        *("baseline_top1", "drop", "drop_ci95", "agreement", "mcnemar_p", "logit_sqnr_db"),
        *("images_per_second", "weight_bytes", "bits", "model", "device", "seed", "versions"),
    }
    assert (result["num_images"], result["bits"], result["model"]) == (445, "w8a8", "reference")
    assert (result["device"], result["seed"]) == ("cpu", 0)
    assert result["baseline_top1"] > 97
    assert result["agreement"] > 97
    assert result["drop"] == pytest.approx(result["baseline_top1"] - result["top1"])
    assert result["top1_ci95"][0] < result["top1"] < result["top1_ci95"][1] <= 100
    assert result["weight_bytes"] == dfq.load(w8a8).weight_bytes
    assert f"{result['top1']:.2f} %" in said.out
    assert "full-precision top-1" in said.out
    assert "full-precision top-1" not in said.err


def test_evaluate_without_baseline_and_of_full_precision(
    w8a8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, bits in ((w8a8, "w8a8"), ("reference", "fp32")):
        file = tmp_path / f"{bits}.json"
        assert status("evaluate", target, "--device", "cpu", "--limit", 40, "--json", file, "--quiet") == 0
        result = json.loads(file.read_text())
        assert (result["bits"], result["num_images"]) == (bits, 40)
        assert "drop" not in result
    assert capsys.readouterr().err == ""


def test_evaluate_a_folder_of_images(w8a8: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("evaluate", w8a8, "--data-dir", digits, "--device", "cpu", "-b", 7) == 0
    assert "20 images" in capsys.readouterr().out


def test_the_gate(w8a8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("evaluate", w8a8, "--device", "cpu", "--limit", 50, "--quiet", "--max-drop")
    assert status(*command, "100") == 0
    assert capsys.readouterr().err == ""
    # Full precision cannot be a hundred points worse.
    assert status(*command, "-101") == 3
    said = capsys.readouterr()
    assert said.err.startswith("dfq: the drop of ")
    assert said.err.endswith("exceeds --max-drop -101\n")
    assert "top-1" in said.out


def test_a_finished_run_does_nothing_and_another_is_refused(
    w8a8: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("quantize", "reference", *NOISE, "--out", w8a8)
    before = files_below(w8a8)
    with monkeypatch.context() as patched:
        patched.setattr("dfq.ptq.engine.capture.stem", None)
        assert status(*command, "--bits", "w8a8") == 0
        assert "already holds this model; nothing to do" in capsys.readouterr().out
        for changes in (
            ("--bits", "w4a8"),
            ("--recipe", "paper"),
            ("--seed", "1"),
            ("--crop-pct", "0.5"),
            ("--interpolation", "bilinear"),
        ):
            assert status(*command, *changes, "--quiet") == 1
            said = capsys.readouterr()
            assert said.err.startswith(f"dfq: error: {w8a8} holds a quantized model of another run (it differs in ")
            assert said.out == ""
    assert files_below(w8a8) == before


def test_overwrite(tmp_path: Path) -> None:
    command = ("quantize", "reference", *NOISE, "--out", tmp_path / "out", "--quiet")
    assert status(*command, "--bits", "w8a8") == 0
    assert status(*command, "--bits", "w4a4", "--overwrite") == 0
    assert dfq.load(tmp_path / "out").bits == "w4a4"
    assert status(*command, "--bits", "w4a4", "--seed", 3, "--overwrite") == 0
    assert dfq.load(tmp_path / "out").calibration["run"]["seed"] == 3


def test_quantize_on_a_set_and_on_real_images(w8a8: Path, digits: Path, tmp_path: Path) -> None:
    command = ("quantize", "reference", "--device", "cpu", "--quiet")
    given = w8a8 / "calibration"
    assert status(*command, "--calibration", given, "--out", tmp_path / "on-set") == 0
    assert (tmp_path / "on-set" / "model.safetensors").read_bytes() == (w8a8 / "model.safetensors").read_bytes()
    assert not (tmp_path / "on-set" / "calibration").exists()
    assert status(*command, "--calibration-images", digits, "-n", 5, "--out", tmp_path / "on-real") == 0
    run = dfq.load(tmp_path / "on-real").calibration["run"]
    assert (run["method"], len(run["files"])) == ("real", 5)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    listed = {}
    for what in ("models", "methods", "recipes"):
        assert status("list", what) == 0
        said = capsys.readouterr()
        assert said.err == ""
        listed[what] = {line.split()[0]: line for line in said.out.splitlines()}
    assert {"vit_tiny_patch16_224", "deit_tiny_patch16_224"} <= set(listed["models"])
    assert {"smi", "dense", "pri", "psaq", "apa", "leaves", "gaussian"} <= set(listed["methods"])
    assert "sparse model inversion" in listed["methods"]["smi"]
    assert {"default", "paper"} <= set(listed["recipes"])
    assert status("list", "cats") == 2


def test_list_what_can_be_done_with_some_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("list", "models", "vit_tiny_patch16_2*") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines == {"vit_tiny_patch16_224": "dense inversion, sparse, quantization"}
    assert status("list", "models", "swin_tiny_*") == 0
    listed = capsys.readouterr().out
    assert "swin_tiny_patch4_window7_224  dense inversion; " in listed
    assert "use a dense method" in listed
    check_refused(("list", "models", "cat*"), 1, "'cat*'", capsys)


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfq.demo.demo", lambda out, progress: f"a table about {out}, {progress}")
    assert status("demo", "--out", tmp_path, "--quiet") == 0
    assert capsys.readouterr() == (f"a table about {tmp_path}, False\n", "")


# --- bad input: one line, and nothing written


def check_refused(
    arguments: tuple[object, ...], code: int, said: str, capsys: pytest.CaptureFixture[str], out: Path | None = None
) -> None:
    before = files_below(out) if out is not None and out.is_dir() else None
    capsys.readouterr()
    assert status(*arguments, "--quiet") == code
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("dfq: error: ")
    assert said in lines[0]
    assert printed.out == ""
    if out is not None:
        assert (files_below(out) if out.is_dir() else None) == before


@pytest.mark.parametrize("command", ["generate", "quantize"])
def test_models_that_cannot_be_used(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    state = read_weights(embedded.weights_path())
    save_file(state, tmp_path / "reference.safetensors")
    whole = (tmp_path / "reference.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"head.weight": Mischief(tmp_path / "executed")}, tmp_path / "evil.pth")
    state["norm.bias"][3] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")

    def refused(code: int, said: str, *arguments: object) -> None:
        check_refused((command, *arguments, "--out", out), code, said, capsys, out)

    refused(1, "did you mean vit_tiny_patch16_224", "vit_tiny_patch16_225")
    refused(1, "resnet18 is a ResNet, not a timm VisionTransformer", "resnet18", "--random-weights")
    refused(1, "resnet18 is a ResNet, not a timm VisionTransformer", "resnet18")
    other = ("--checkpoint", tmp_path / "reference.safetensors")
    refused(1, "is not a checkpoint of vit_tiny_patch16_224: ", "vit_tiny_patch16_224", *other)
    refused(1, "is not a whole safetensors file", "reference", "--checkpoint", tmp_path / "truncated.safetensors")
    refused(1, "there is no checkpoint file", "reference", "--checkpoint", tmp_path / "missing.safetensors")
    refused(1, "could run code; it was not loaded", "reference", "--checkpoint", tmp_path / "evil.pth")
    refused(1, "NaN or infinite values in norm.bias", "reference", "--checkpoint", tmp_path / "nan.safetensors")
    refused(2, "std must be three positive numbers", "reference", "--std", "0", "1", "1")
    refused(2, "unknown interpolation 'best'", "reference", "--interpolation", "best")
    assert not out.exists()
    assert not (tmp_path / "executed").exists()


def test_bits_recipes_and_methods_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    recipe = tmp_path / "mine.toml"
    recipe.write_text("[weights]\nsymetric = true\n")
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("dfq.models.load_model", load_model)
        patched.setattr(dfq, "load_model", load_model, raising=False)
        for bits in ("w1a0", "w4", "foo"):
            check_refused(("quantize", "reference", "--bits", bits, "--out", out), 2, f"bits {bits!r} are not", capsys)
        command = ("quantize", "reference", "--out", out, "--recipe")
        check_refused((*command, recipe), 2, "unknown key 'symetric' (did you mean 'symmetric'?)", capsys)
        check_refused((*command, "defalt"), 2, "unknown recipe 'defalt' (did you mean 'default'?)", capsys)
        check_refused((*command, tmp_path / "none.toml"), 2, "cannot read the recipe", capsys)
        for command in ("generate", "quantize"):
            check_refused((command, "reference", "--out", out, "--method", "smy"), 2, "unknown method 'smy'", capsys)
    # The sites are the model's: known once it is loaded, but before images are made.
    monkeypatch.setattr("dfq.generation.generate", load_model)
    monkeypatch.setattr(dfq, "generate", load_model, raising=False)
    recipe.write_text('[sites."blocks.*.atn.q"]\nbits = 8\n')
    check_refused(("quantize", "reference", "--recipe", recipe, "--out", out), 2, "matches no site", capsys)
    assert not out.exists()


def test_sets_and_folders_that_cannot_be_calibrated_on(
    w8a8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    larger = dfq.load_model("vit_tiny_patch16_224", random_weights=True, image_size=64, device="cpu")
    dfq.generate(larger, "gaussian", 2, out=tmp_path / "larger", progress=False)
    (tmp_path / "empty").mkdir()

    command = ("quantize", "reference", "--device", "cpu", "--out", out)
    for option, given, said in (
        ("--calibration", tmp_path / "larger", "holds images of 64x64, and reference takes 32x32"),
        ("--calibration", tmp_path / "empty", "is not a calibration set"),
        ("--calibration-images", tmp_path / "empty", "holds 0 images"),
        ("--calibration-images", tmp_path / "missing", "there is no folder"),
    ):
        check_refused((*command, option, given), 1, said, capsys, out)
    assert not out.exists()
    # Not even when asked to overwrite is a model lost to a set that does not fit.
    command = ("quantize", "reference", "--device", "cpu", "--overwrite", "--out", w8a8)
    check_refused((*command, "--calibration", tmp_path / "larger"), 1, "holds images of 64x64", capsys, w8a8)
    assert dfq.load(w8a8).bits == "w8a8"


def test_images_that_cannot_be_evaluated_on(
    w8a8: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    cats = tmp_path / "cats" / "tabby"
    cats.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(cats / "1.png")
    file = tmp_path / "result.json"
    command = ("evaluate", w8a8, "--device", "cpu", "--json", file, "--data-dir")
    check_refused((*command, tmp_path / "empty"), 1, "there are no class folders in", capsys)
    check_refused((*command, tmp_path / "missing"), 1, "there is no folder", capsys)
    check_refused((*command, tmp_path / "cats"), 1, "unknown to the model ('tabby')", capsys)
    broken = digits / "3" / "broken.png"
    broken.write_bytes(b"no picture")
    check_refused((*command, digits), 1, f"cannot read the image {broken}: it is in no known image format", capsys)
    assert not file.exists()


def test_evaluate_refuses_what_it_cannot_compare(
    w8a8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    vit = ("vit_tiny_patch16_224", "--random-weights", "--image-size", 32)
    check_refused(("evaluate", tmp_path / "folder"), 1, "is a folder, but not of a quantized model", capsys)
    check_refused(("evaluate", "reference", "--baseline"), 2, "compare a quantized model with its original", capsys)
    check_refused(("evaluate", *vit), 2, "give --data-dir FOLDER", capsys)
    check_refused(("evaluate", w8a8, "--crop-pct", "0.9"), 2, "keeps its own preprocessing; leave out --crop-p", capsys)
    check_refused(("evaluate", w8a8, "--random-weights"), 2, "leave out --random-weights", capsys)
    check_refused(("evaluate", w8a8, "--json", tmp_path / "no" / "x.json"), 2, "there is no folder", capsys)


def test_output_folders_that_cannot_be_used(w8a8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for command in ("generate", "quantize"):
        arguments = (command, "reference", *NOISE, "--out")
        check_refused((*arguments, tmp_path / "file" / "out"), 1, "cannot create the folder", capsys)
        check_refused((*arguments, tmp_path / "file"), 1, "cannot create the folder", capsys)
        check_refused((*arguments, tmp_path / "full"), 1, "is not empty and holds no", capsys, tmp_path / "full")
        check_refused((*arguments, w8a8, "--seed", 9), 1, "choose another --out", capsys, w8a8)
    assert files_below(tmp_path) == {"file": b"mine", "full/thesis.tex": b"mine"}


def test_a_device_that_is_not_there(
    w8a8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = "device 'cuda' is not there"
    out = tmp_path / "out"
    for command in ("generate", "quantize"):
        check_refused((command, "reference", "--device", "cuda", "--out", out), 2, said, capsys)
    check_refused(("evaluate", w8a8, "--device", "cuda"), 2, said, capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("quantise", "reference"),
        ("quantize", "reference"),
        ("quantize", "reference", "--out", "x", "--bit", "w4a8"),
        ("quantize", "reference", "--out", "x", "--calibration", "a", "--calibration-images", "b"),
        ("quantize", "reference", "--out", "x", "--checkpoint", "a", "--random-weights"),
        ("generate", "reference", "--out", "x", "-n", "0"),
        ("generate", "reference", "--out", "x", "-n", "many"),
        ("generate", "reference", "--out", "x", "--seed", "-1"),
        ("generate", "reference", "--out", "x", "--seed", str(2**63)),
        ("generate", "reference", "--out", "x", "--precision", "fp8"),
        *(
            ("generate", "reference", "--out", "x", *wrong)
            for wrong in (
                ("--iterations", "0"),
                ("--iterations", "-3"),
                ("--iterations", "many"),
                ("--init", "flowers"),
                ("--schedule", "best"),
                ("--stop-at",),
                ("--stop-at", "-1"),
                ("--stop-at", "soon"),
                ("--stop-ratio", "nan"),
                ("--stop-ratio", "half"),
                ("--division", "0"),
                ("--learning-rate", "inf"),
                ("--learning-rate", "fast"),
                ("--trace", "here"),
            )
        ),
        ("evaluate", "x", "--max-drop", "nan"),
        ("evaluate", "x", "--max-drop", "much"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("usage: dfq")
    assert "error: " in said.err.splitlines()[-1]
    assert said.out == ""


@pytest.mark.parametrize("command", ["generate", "quantize"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--method", "smi", "--stop-at", 5, 3),
            "the iterations at which patches stop must ascend from 0 or later, not (5, 3)",
        ),
        (("--method", "smi", "--stop-at", 5, 5), "must ascend from 0 or later, not (5, 5)"),
        (("--schedule", "smi", "--stop-ratio", 1), "the ratio of patches that stop must lie in [0, 1), not 1.0"),
        (("--schedule", "smi", "--stop-ratio", -0.1), "the ratio of patches that stop must lie in [0, 1), not -0.1"),
        (("--learning-rate", 0), "the learning rate must be positive, not 0.0"),
        (("--learning-rate", -1), "the learning rate must be positive, not -1.0"),
        (("--schedule", "dense", "--stop-at", 5), "--stop-at and --stop-ratio belong to --schedule smi"),
        (("--method", "pri", "--stop-ratio", 0.5), "--stop-at and --stop-ratio belong to --schedule smi"),
        (("--division", 3), "--division belongs to --schedule pri"),
        (("--method", "pri", "--schedule", "smi", "--division", 3), "--division belongs to --schedule pri"),
        (("--schedule", "pri", "--division", 8, "--iterations", 7), "7 iterations cannot be divided into 8 parts"),
        (("--method", "gaussian", "--init", "pink"), "gaussian inverts nothing: "),
        (("--method", "pink", "--schedule", "smi"), "pink inverts nothing: "),
        (("--method", "leaves", "--learning-rate", 1), "leaves inverts nothing: "),
    ],
)
def test_ways_to_make_images_that_exclude_each_other(
    command: str,
    options: tuple[object, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_model(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(dfq, "load_model", load_model, raising=False)
    check_refused((command, "reference", *options, "--out", tmp_path / "out"), 2, said, capsys)
    assert not (tmp_path / "out").exists()


def test_more_images_of_a_canvas_than_the_model_has_patches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ("generate", "reference", "--schedule", "pri", "--division", 65, "--device", "cpu", "--out", out)
    check_refused(command, 1, "64 patches cannot be divided into 65 images", capsys, out)
    assert not out.exists()


# --- one process


def test_errors_of_the_program_are_one_line_unless_debugged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(dfq, "load_model", broken, raising=False)
    command = ("generate", "reference", "--out", tmp_path / "out")
    check_refused(command, 1, "unexpected ZeroDivisionError: first line; --debug shows where", capsys)
    with pytest.raises(ZeroDivisionError):
        status(*command, "--debug")


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dfq, "load_model", interrupt, raising=False)
    assert status("generate", "reference", "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err == "dfq: interrupted; the same command goes on where it stopped\n"


def test_repeated_calls_say_everything_once_and_leave_logging_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, root = logging.getLogger("dfq"), logging.getLogger()
    before = (own.level, list(own.handlers), list(root.handlers), list(warnings.filters))
    for index in range(3):
        assert status("generate", "reference", *NOISE, "--out", tmp_path / str(index)) == 0
        said = capsys.readouterr()
        assert said.err.count("reference: 32x32") == 1
        assert status("generate", "reference", *NOISE, "--quiet", "--out", tmp_path / f"quiet {index}") == 0
        assert capsys.readouterr().err == ""
    assert (own.level, list(own.handlers), list(root.handlers), list(warnings.filters)) == before


def test_what_other_libraries_say_to_developers_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def talkative(*args: object, **kwargs: object) -> torch.nn.Module:
        warnings.warn("this will change in the next version", FutureWarning, stacklevel=2)
        logging.getLogger("timm.models").warning("no pretrained configuration specified")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", talkative)
    # As in a process of its own, where nothing else listens.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    arguments = ("vit_tiny_patch16_224", "--random-weights", "--image-size", 32, *NOISE, "--out", tmp_path / "out")
    assert status("generate", *arguments) == 0
    said = capsys.readouterr()
    assert "next version" not in said.err
    assert "no pretrained configuration" not in said.err
    assert "vit_tiny_patch16_224: 32x32" in said.err


# --- processes of their own


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Buffered, as at a user's: then a reader that goes away shows only when the program ends.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def test_version() -> None:
    done = python("-m", "dfq", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dfq {dfq.__version__}\n", "")


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys\nfrom dfq.cli import main\ntry:\n    main(['quantize', '--help'])\n"
        "finally:\n    print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = python("-c", program)
    assert done.stdout.startswith("usage: dfq quantize ")
    assert "example: dfq quantize" in done.stdout
    assert done.stdout.endswith("False False\n")
    assert done.stderr == ""


def test_a_reader_that_goes_away_is_no_failure() -> None:
    program = (
        "import os, sys\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\nfrom dfq.cli import run\n"
        "sys.argv = ['dfq', 'list', 'recipes']\nrun()"
    )
    done = python("-c", program)
    assert (done.returncode, done.stderr) == (0, "")
