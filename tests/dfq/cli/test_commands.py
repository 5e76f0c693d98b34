"""The `dfq` command, end to end on the reference model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dfq
from calibration import Plan
from calibration.calibration_set import CalibrationSet
from calibration.files import sha256_of
from dfq.ptq import engine
from dfq.recipe import load_recipe, preset_names
from dfq.tried import TRIED

NOISE = ("--method", "gaussian", "-n", "8", "--device", "cpu")
Files = dict[str, bytes]


def test_generate(
    status: Callable[..., int], files_below: Callable[[Path], Files], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_quantize_evaluate_and_the_json(
    status: Callable[..., int], w8a8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    assert status("evaluate", w8a8, "--device", "cpu", "--baseline", "--json", file) == 0
    said = capsys.readouterr()
    result = json.loads(file.read_text())
    assert set(result) == {
        *("top1", "top5", "num_images", "top1_ci95"),
        *("baseline_top1", "drop", "drop_ci95", "agreement", "mcnemar_p", "logit_sqnr_db"),
        *("images_per_second", "weight_bytes", "bits", "model", "device", "runtime", "seed", "versions"),
        *("classes", "changed", "weights_sha256"),
    }
    assert sum(counts["num_images"] for counts in result["classes"]) == 445
    assert result["weights_sha256"] == sha256_of(w8a8 / "model.safetensors")
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
    status: Callable[..., int], w8a8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, bits in ((w8a8, "w8a8"), ("reference", "fp32")):
        file = tmp_path / f"{bits}.json"
        assert status("evaluate", target, "--device", "cpu", "--limit", 40, "--json", file, "--quiet") == 0
        result = json.loads(file.read_text())
        assert (result["bits"], result["num_images"]) == (bits, 40)
        assert "drop" not in result
    assert capsys.readouterr().err == ""


def test_evaluate_images_without_labels(
    status: Callable[..., int], w8a8: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loose, file = tmp_path / "loose", tmp_path / "result.json"
    loose.mkdir()
    for index, path in enumerate(sorted(digits.rglob("*.png"))):
        (loose / f"{index}.png").write_bytes(path.read_bytes())
    command = ("evaluate", w8a8, "--device", "cpu", "--unlabelled")
    assert status(*command, "--data-dir", loose, "--json", file) == 0
    said, result = capsys.readouterr().out, json.loads(file.read_text())
    assert f"{result['num_images']} images without labels" in said
    assert "top-1" not in said
    # The same images with their labels.
    assert status("evaluate", w8a8, "--device", "cpu", "--data-dir", digits, "--baseline", "--json", file) == 0
    assert json.loads(file.read_text())["agreement"] == result["agreement"]
    capsys.readouterr()
    for wrong, reason in (
        ((), "give --data-dir"),
        (("--data-dir", loose, "--max-drop", 1), "without labels nobody knows the drop"),
        (("--data-dir", loose, "--dataset", "torch/cifar10"), "and no --dataset"),
    ):
        assert status(*command, *wrong) == 2
        assert reason in capsys.readouterr().err
    assert status("evaluate", "reference", "--data-dir", loose, "--unlabelled") == 2
    assert "compare a quantized model with its original" in capsys.readouterr().err


def test_evaluate_a_folder_of_images(
    status: Callable[..., int], w8a8: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("evaluate", w8a8, "--data-dir", digits, "--device", "cpu", "-b", 7) == 0
    assert "20 images" in capsys.readouterr().out


def test_the_gate(status: Callable[..., int], w8a8: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    status: Callable[..., int],
    files_below: Callable[[Path], Files],
    w8a8: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("quantize", "reference", *NOISE, "--out", w8a8)
    before = files_below(w8a8)
    with monkeypatch.context() as patched:
        patched.setattr("dfq.ptq.engine.stages", None)
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


def test_overwrite(status: Callable[..., int], tmp_path: Path) -> None:
    command = ("quantize", "reference", *NOISE, "--recipe", "paper", "--out", tmp_path / "out", "--quiet")
    assert status(*command, "--bits", "w8a8") == 0
    assert status(*command, "--bits", "w4a4", "--overwrite") == 0
    assert dfq.load(tmp_path / "out").bits == "w4a4"
    assert status(*command, "--bits", "w4a4", "--seed", 3, "--overwrite") == 0
    assert dfq.load(tmp_path / "out").calibration["run"]["seed"] == 3


def test_quantize_on_a_set_and_on_real_images(
    status: Callable[..., int], w8a8: Path, digits: Path, tmp_path: Path
) -> None:
    command = ("quantize", "reference", "--device", "cpu", "--quiet")
    given = w8a8 / "calibration"
    assert status(*command, "--calibration", given, "--out", tmp_path / "on-set") == 0
    assert (tmp_path / "on-set" / "model.safetensors").read_bytes() == (w8a8 / "model.safetensors").read_bytes()
    assert not (tmp_path / "on-set" / "calibration").exists()
    assert status(*command, "--calibration", given, "-n", 5, "--out", tmp_path / "on-five") == 0
    assert dfq.load(tmp_path / "on-five").calibration["num_images"] == 5
    assert status(*command, "--calibration", given, "-n", 500, "--out", tmp_path / "on-too-many") == 2
    assert not (tmp_path / "on-too-many").exists()
    options = ("--recipe", "paper", "--calibration-images", digits, "-n", 5)
    assert status(*command, *options, "--out", tmp_path / "on-real") == 0
    run = dfq.load(tmp_path / "on-real").calibration["run"]
    assert (run["method"], len(run["files"])) == ("real", 5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), 32), (("--recipe", "five.toml"), 5), (("--recipe", "five.toml", "-n", 3), 3), (("-n", 40), 40)],
)
def test_as_many_images_as_the_recipe_says(
    options: tuple[object, ...],
    expected: int,
    status: Callable[..., int],
    noise: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("five.toml").write_text('num_images = 5\n[sites."*"]\nquantize = false\n')
    asked: list[int] = []

    def generate(_module: object, plan: Plan, **_: object) -> list[CalibrationSet]:
        asked.append(plan.num_images)
        return [noise]

    monkeypatch.setattr("calibration.generate", generate)
    command = ("quantize", "reference", "--recipe", "paper", "--device", "cpu", "--out", "out", "--quiet")
    assert status(*command, *options) == 0
    assert asked == [expected]


def test_the_number_of_images_tells_runs_apart(
    status: Callable[..., int], refused: Callable[..., None], files_below: Callable[[Path], Files], tmp_path: Path
) -> None:
    recipe, out = tmp_path / "five.toml", tmp_path / "out"
    recipe.write_text('num_images = 5\n[sites."*"]\nquantize = false\n')
    command = ("quantize", "reference", "--recipe", recipe, "--method", "gaussian", "--device", "cpu", "--out", out)
    assert status(*command, "--quiet") == 0
    before = files_below(out)
    assert dfq.load(out).calibration["num_images"] == len(dfq.load_calibration_set(out / "calibration")) == 5
    # Said aloud, it is the same run; so is one that was stopped before the model was there.
    assert status(*command, "-n", 5, "--quiet") == 0
    (out / "config.json").unlink()
    assert status(*command, "--quiet") == 0
    assert files_below(out) == before
    refused((*command, "-n", 6), 1, "holds a quantized model of another run", out)
    (out / "config.json").unlink()
    refused((*command, "-n", 6), 1, "holds a calibration set of another run", out)


def test_a_recipe_says_how_many_real_images_too(status: Callable[..., int], digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "five.toml"
    recipe.write_text('num_images = 5\n[sites."*"]\nquantize = false\n')
    command = ("quantize", "reference", "--recipe", recipe, "--calibration-images", digits, "--device", "cpu")
    assert status(*command, "--out", tmp_path / "out", "--quiet") == 0
    assert len(dfq.load(tmp_path / "out").calibration["run"]["files"]) == 5


def test_a_stopped_reconstruction_goes_on(
    status: Callable[..., int],
    files_below: Callable[[Path], Files],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tmp_path / "tuned.toml"
    recipe.write_text("[reconstruction]\niterations = 2\nbatch_size = 4\n")
    command = ("quantize", "reference", *NOISE, "--bits", "w4a8", "--recipe", recipe, "--out")
    assert status(*command, tmp_path / "at-once", "--quiet") == 0

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        place, begun = engine.place_sites, []

        def stopped_in_the_fourth(*arguments: Any) -> None:
            begun.append(arguments)
            if len(begun) == 4:
                raise KeyboardInterrupt
            place(*arguments)

        patched.setattr(engine, "place_sites", stopped_in_the_fourth)
        assert status(*command, out) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"calibration", "stages.partial"}
    assert status(*command, out) == 0
    assert f"going on after 3 of 6 stages, from {out / 'stages.partial'}" in capsys.readouterr().err
    assert files_below(out) == files_below(tmp_path / "at-once")


def test_without_reconstruction_stages_are_not_kept(
    status: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path | None] = []
    quantize = engine.quantize

    def seen(*arguments: Any, resume: Path | None, **options: Any) -> Any:
        asked.append(resume)
        return quantize(*arguments, **options)

    monkeypatch.setattr(dfq, "quantize", seen, raising=False)
    assert status("quantize", "reference", *NOISE, "--recipe", "paper", "--out", tmp_path / "out", "--quiet") == 0
    assert asked == [None]


def test_list(status: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    listed = {}
    for what in ("models", "methods", "recipes"):
        assert status("list", what) == 0
        said = capsys.readouterr()
        assert said.err == ""
        listed[what] = {line.split()[0]: line for line in said.out.splitlines() if line}
    assert list(listed["models"])[1 : 1 + len(TRIED)] == list(TRIED)
    assert "  attention pool        yes, head needed  yes " in listed["models"]["vit_base_patch16_siglip_224"]
    assert "  no                    yes               no " in listed["models"]["cait_xxs24_224"]
    assert {"smi", "dense", "pri", "psaq", "apa", "leaves", "gaussian"} <= set(listed["methods"])
    assert "sparse model inversion" in listed["methods"]["smi"]
    assert "fast-g64" in listed["recipes"].pop("Each")
    assert listed["recipes"] == {
        name: f"{name:<{max(map(len, preset_names()))}}  {load_recipe(name).summary}" for name in preset_names()
    }
    assert status("list", "cats") == 2


def test_list_what_can_be_done_with_some_models(
    status: Callable[..., int], refused: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("list", "models", "vit_tiny_patch16_2*") == 0
    assert capsys.readouterr().out.splitlines() == [
        "model                 sparse inversion, by  dense inversion   quantization  tried",
        "vit_tiny_patch16_224  class token           yes               yes           yes",
    ]
    assert status("list", "models", "swin_base_patch4_window7") == 0
    _, row, nothing, why, *reasons = capsys.readouterr().out.splitlines()
    assert row == "swin_base_patch4_window7_224  no                    yes               yes"
    assert (nothing, why, len(reasons)) == ("", "Why not:", 1)
    assert "use a dense method" in reasons[0]
    refused(("list", "models", "cat*"), 1, "'cat*'")


def test_list_some_methods_and_recipes(
    status: Callable[..., int], refused: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for what, wanted, names in (
        ("methods", "smi", ["smi", "apa-smi"]),
        ("methods", "p*", ["pri", "psaq", "pink"]),
        ("recipes", "fast", ["fast"]),
    ):
        assert status("list", what, wanted) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names
    refused(("list", "recipes", "slow"), 1, "none of the recipes is called 'slow'; there are accurate, deploy, fast,")


def test_demo(
    status: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfq.demo.demo", lambda out, progress: f"a table about {out}, {progress}")
    assert status("demo", "--out", tmp_path, "--quiet") == 0
    assert capsys.readouterr() == (f"a table about {tmp_path}, False\n", "")
