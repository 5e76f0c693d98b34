"""The command that teaches a student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dfq import reference as embedded

QUICK = ("-n", 10, "--rounds", 2, "--steps", 3, "--device", "cpu")


def test_a_student_is_taught_and_kept(
    status: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student"
    command = ("distill", "reference", "reference", "--method", "leaves", *QUICK, "--out", out)
    assert status(*command) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("reference taught by reference on 20 images in 2 rounds: they agree on ")
    assert f"kept in {out}; curve.svg there shows how it went" in printed.out
    assert "round 2/2, 20 images, divergence " in printed.err
    assert status("evaluate", "reference", "--checkpoint", out / "student.safetensors", "--device", "cpu") == 0
    # The same command again does nothing.
    assert status(*command, "--quiet") == 0


def test_what_the_options_say(status: Callable[..., int], tmp_path: Path) -> None:
    options = (
        "--train",
        "last-2",
        "--train-batch-size",
        4,
        "--temperature",
        4,
        "--opt",
        "adamw",
        "--lr",
        0.01,
        "--windows",
        2,
    )
    options += ("--momentum", 0.5, "--weight-decay", 0.1, "--sched", "constant", "--student-random-weights")
    command = ("distill", "reference", "reference", "--method", "gaussian", *QUICK, *options, "--seed", 3)
    assert status(*command, "--out", tmp_path, "--quiet") == 0
    run = json.loads((tmp_path / "distillation.json").read_text())["run"]
    assert run["training"] == {
        "part": "last-2",
        "steps": 3,
        "windows": 2,
        "batch_size": 4,
        "temperature": 4.0,
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "momentum": 0.5,
        "weight_decay": 0.1,
        "decay": "constant",
        "shrinkage": 0.3,
        "level": "origin",
    }
    assert (run["rounds"], run["seed"], run["student"]["random_weights"]) == (2, 3, True)
    (images,) = run["images"]
    assert (images["method"], images["num_images"], images["seed"]) == ("gaussian", 20, 3)


def test_several_methods_and_a_classifier_in_closed_form(status: Callable[..., int], tmp_path: Path) -> None:
    options = ("--opt", "ridge", "--shrinkage", 0.1, "--level", "pool", "--windows", 1)
    command = ("distill", "reference", "reference", "--method", "gaussian", "leaves", *QUICK, *options)
    assert status(*command, "--out", tmp_path / "one", "--quiet") == 0
    run = json.loads((tmp_path / "one" / "distillation.json").read_text())["run"]
    chosen = [run["training"][key] for key in ("optimizer", "shrinkage", "level", "windows")]
    assert chosen == ["ridge", 0.1, "pool", 1]
    assert [images["method"] for images in run["images"]] == ["gaussian", "leaves"]
    # The pools teach another student.
    pools = [tmp_path / "one" / "pool" / name for name in ("gaussian", "leaves")]
    command = ("distill", "reference", "reference", "--calibration", *pools, *QUICK, *options)
    assert status(*command, "--out", tmp_path / "other", "--quiet") == 0
    one, other = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("one", "other"))
    assert one["images"] == other["images"] == 40


def test_the_student_is_inverted_too(
    status: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--method", "natural", "--iterations", 2, "--invert-student", *QUICK, "--quiet")
    assert status("distill", "reference", "reference", *options, "--out", tmp_path / "one") == 0
    assert sorted(path.name for path in (tmp_path / "one" / "pool").iterdir()) == ["natural", "student-natural"]
    row = json.loads((tmp_path / "one" / "log.jsonl").read_text().splitlines()[-1])
    assert row["images"] == 40
    options = (*options, "--student-random-weights")
    assert status("distill", "reference", "reference", *options, "--out", tmp_path / "two") == 2
    assert "--invert-student is for a student that was pretrained" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_a_quantized_model_is_tuned_on_a_set(status: Callable[..., int], tmp_path: Path) -> None:
    images, quantized, out = tmp_path / "images", tmp_path / "quantized", tmp_path / "tuned"
    assert status("generate", "reference", "--method", "leaves", "-n", 8, "--out", images, "--quiet") == 0
    recipe = ("--recipe", "paper", "--bits", "w4a8", "--calibration", images, "--device", "cpu", "--quiet")
    assert status("quantize", "reference", *recipe, "--out", quantized) == 0
    command = ("distill", "reference", quantized, "--train", "full", "--calibration", images, *QUICK)
    assert status(*command, "--out", out, "--quiet") == 0
    assert status("evaluate", out / "student", "--device", "cpu", "--quiet") == 0


def test_bad_input(refused: Callable[..., None], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("distill", "reference", "reference", "--device", "cpu", "--out", out)
    refused((*command, "--train", "head"), 2, "cannot train 'head' of a student: choose linear, full or last-K")
    refused((*command, "--train", "last-9"), 2, "reference has 4 layers between stem and classifier")
    refused((*command, "--momentum", 1), 2, "the momentum must be at least 0 and below 1")
    refused((*command, "--opt", "ridge", "--train", "full"), 2, "ridge is for a classifier that is trained alone")
    refused((*command, "--method", "leaves", "leaves"), 2, "one method or more, each once, not leaves, leaves")
    refused((*command, "--method", "leaves", "magic"), 2, "unknown method 'magic'")
    refused((*command, "--student-checkpoint", tmp_path / "none"), 1, "none is not there")
    refused((*command, "--data-dir", tmp_path / "none"), 1, "none")
    refused((*command, "--calibration", tmp_path), 1, "is not a calibration set")
    assert not out.exists()
    refused(("distill", "reference", "resnet5000", "--device", "cpu", "--out", out), 1, "knows no model 'resnet5000'")
    assert embedded.weights_path().is_file()
