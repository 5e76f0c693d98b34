"""Bad input to the `dfq` command: one line that says what to do, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dfq
from dfq import reference as embedded
from dfq.weights import read_weights

NOISE = ("--method", "gaussian", "-n", "8", "--device", "cpu")
Files = dict[str, bytes]


class Mischief:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("command", ["generate", "quantize"])
def test_models_that_cannot_be_used(refused: Callable[..., None], command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    state = read_weights(embedded.weights_path())
    save_file(state, tmp_path / "reference.safetensors")
    whole = (tmp_path / "reference.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"head.weight": Mischief(tmp_path / "executed")}, tmp_path / "evil.pth")
    state["norm.bias"][3] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")

    def check(code: int, said: str, *arguments: object) -> None:
        refused((command, *arguments, "--out", out), code, said, out)

    check(1, "did you mean vit_tiny_patch16_224", "vit_tiny_patch16_225")
    check(1, "resnet18 is a ResNet, not a timm VisionTransformer", "resnet18", "--random-weights")
    check(1, "resnet18 is a ResNet, not a timm VisionTransformer", "resnet18")
    other = ("--checkpoint", tmp_path / "reference.safetensors")
    check(1, "is not a checkpoint of vit_tiny_patch16_224: ", "vit_tiny_patch16_224", *other)
    check(1, "is not a whole safetensors file", "reference", "--checkpoint", tmp_path / "truncated.safetensors")
    check(1, "missing.safetensors is not there", "reference", "--checkpoint", tmp_path / "missing.safetensors")
    check(1, "is a folder, and weights are a file in it", "reference", "--checkpoint", tmp_path)
    check(1, "could run code; it was not loaded", "reference", "--checkpoint", tmp_path / "evil.pth")
    check(1, "NaN or infinite values in norm.bias", "reference", "--checkpoint", tmp_path / "nan.safetensors")
    check(2, "std must be three positive numbers", "reference", "--std", "0", "1", "1")
    check(2, "unknown interpolation 'best'", "reference", "--interpolation", "best")
    assert not out.exists()
    assert not (tmp_path / "executed").exists()


def test_bits_recipes_and_methods_that_cannot_be_used(
    refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    recipe = tmp_path / "mine.toml"
    recipe.write_text("[weights]\nsymetric = true\n")
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        # The public name first: it is looked up, and kept, when it is first asked for.
        patched.setattr(dfq, "load_model", load_model)
        patched.setattr("dfq.models.load_model", load_model)
        for bits in ("w1a0", "w4", "foo"):
            refused(("quantize", "reference", "--bits", bits, "--out", out), 2, f"bits {bits!r} are not")
        command = ("quantize", "reference", "--out", out, "--recipe")
        refused((*command, recipe), 2, "unknown key 'symetric' (did you mean 'symmetric'?)")
        refused((*command, "papre"), 2, "unknown recipe 'papre' (did you mean 'paper'?)")
        refused((*command, tmp_path / "none.toml"), 2, "cannot read the recipe")
        for command in ("generate", "quantize"):
            refused((command, "reference", "--out", out, "--method", "smy"), 2, "unknown method 'smy'")
    # The sites are the model's: known once it is loaded, but before images are made.
    monkeypatch.setattr(dfq, "generate", load_model)
    monkeypatch.setattr("dfq.generation.generate", load_model)
    recipe.write_text('[sites."blocks.*.atn.q"]\nbits = 8\n')
    refused(("quantize", "reference", "--recipe", recipe, "--out", out), 2, "matches no site")
    assert not out.exists()


def test_sets_and_folders_that_cannot_be_calibrated_on(
    refused: Callable[..., None], w8a8: Path, tmp_path: Path
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
        refused((*command, option, given), 1, said, out)
    assert not out.exists()
    # Not even when asked to overwrite is a model lost to a set that does not fit.
    command = ("quantize", "reference", "--device", "cpu", "--overwrite", "--out", w8a8)
    refused((*command, "--calibration", tmp_path / "larger"), 1, "holds images of 64x64", w8a8)
    assert dfq.load(w8a8).bits == "w8a8"


def test_images_that_cannot_be_evaluated_on(
    refused: Callable[..., None], w8a8: Path, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    cats = tmp_path / "cats" / "tabby"
    cats.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(cats / "1.png")
    file = tmp_path / "result.json"
    command = ("evaluate", w8a8, "--device", "cpu", "--json", file, "--data-dir")
    refused((*command, tmp_path / "empty"), 1, "there are no class folders in")
    refused((*command, tmp_path / "missing"), 1, "there is no folder")
    refused((*command, tmp_path / "cats"), 1, "unknown to the model ('tabby')")
    broken = digits / "3" / "broken.png"
    broken.write_bytes(b"no picture")
    refused((*command, digits), 1, f"cannot read the image {broken}: it is in no known image format")
    assert not file.exists()


def test_evaluate_refuses_what_it_cannot_compare(refused: Callable[..., None], w8a8: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    vit = ("vit_tiny_patch16_224", "--random-weights", "--image-size", 32)
    refused(("evaluate", tmp_path / "folder"), 1, "is a folder, but not of a quantized model")
    refused(("evaluate", "reference", "--baseline"), 2, "compare a quantized model with its original")
    refused(("evaluate", *vit), 2, "give --data-dir FOLDER")
    refused(("evaluate", w8a8, "--crop-pct", "0.9"), 2, "keeps its own preprocessing; leave out --crop-p")
    refused(("evaluate", w8a8, "--random-weights"), 2, "leave out --random-weights")
    refused(("evaluate", w8a8, "--json", tmp_path / "no" / "x.json"), 2, "there is no folder")


def test_output_folders_that_cannot_be_used(
    refused: Callable[..., None], files_below: Callable[[Path], Files], w8a8: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for command in ("generate", "quantize"):
        arguments = (command, "reference", *NOISE, "--out")
        refused((*arguments, tmp_path / "file" / "out"), 1, "cannot create the folder")
        refused((*arguments, tmp_path / "file"), 1, "cannot create the folder")
        refused((*arguments, tmp_path / "full"), 1, "is not empty and holds no", tmp_path / "full")
        refused((*arguments, w8a8, "--seed", 9), 1, "choose another --out", w8a8)
    assert files_below(tmp_path) == {"file": b"mine", "full/thesis.tex": b"mine"}


def test_a_device_that_is_not_there(
    refused: Callable[..., None], w8a8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = "device 'cuda' is not there"
    out = tmp_path / "out"
    for command in ("generate", "quantize"):
        refused((command, "reference", "--device", "cuda", "--out", out), 2, said)
    refused(("evaluate", w8a8, "--device", "cuda"), 2, said)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
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
def test_wrong_usage(
    status: Callable[..., int], arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("dfq: error: ")
    assert "--help`" in line
    assert said.out == ""
