"""Runs that were stopped: what they had done is taken up, and what comes out is what would have come out at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save_file

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.errors import DfqError
from dfq.models import Model
from dfq.ptq import engine
from dfq.ptq.engine import QuantizedModel
from dfq.recipe import Recipe, Reconstruction, load_recipe, recipe_from_dict

TUNED = Reconstruction(iterations=2, batch_size=4, weight_rate=1e-3)
ACCURATE = replace(load_recipe("accurate"), reconstruction=TUNED)
# With all that a stage goes through, and as little work as can be.
RECIPE = recipe_from_dict(
    {
        "reparametrize": "searched",
        "weights": {"granularity": "channel"},
        "sites": {"*.mlp.fc1.input": {"granularity": "channel", "dynamic_up_to": 7, "position_rank": 4}},
        "compensation": {},
        "reconstruction": asdict(TUNED),
    },
    name="mine",
    where="test",
)


class Stopped(BaseException):
    """As a signal would stop it."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Has runs stop in the stage after so many, None: not at all; gives a list that counts the stages quantized."""
    place = engine.place_sites

    def install(stages: int | None) -> list[int]:
        begun: list[int] = []

        def placed(*arguments: Any) -> None:
            if len(begun) == stages:
                raise Stopped
            begun.append(len(begun))
            place(*arguments)

        monkeypatch.setattr(engine, "place_sites", placed)
        return begun

    return install


def check_same(one: QuantizedModel, other: QuantizedModel) -> None:
    tensors, others = one.tensors(), other.tensors()
    assert list(one.sites) == list(other.sites)
    assert {name: q.describe() for name, q in one.sites.items()} == {n: q.describe() for n, q in other.sites.items()}
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one(x), other(x))
    assert not any(parameter.requires_grad for parameter in one.module.parameters())


@pytest.fixture(scope="module")
def at_once(reference: Model, noise: CalibrationSet) -> QuantizedModel:
    return dfq.quantize(reference, "w4a4", calibration=noise, recipe=RECIPE, progress=False)


# Of the reference's six: stem, four blocks, head.
@pytest.mark.parametrize("stages", [0, 1, 3])
def test_a_run_goes_on_after_the_stages_that_are_done(
    stages: int,
    reference: Model,
    noise: CalibrationSet,
    at_once: QuantizedModel,
    stop_after: Callable[[int | None], list[int]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "new" / "run.partial"
    arguments: dict[str, Any] = {"calibration": noise, "recipe": RECIPE, "resume": file, "progress": False}
    stop_after(stages)
    with pytest.raises(Stopped):
        dfq.quantize(reference, "w4a4", **arguments)
    assert file.exists() == (stages > 0)
    begun = stop_after(None)
    with caplog.at_level(logging.INFO, "dfq"):
        resumed = dfq.quantize(reference, "w4a4", **arguments)
    assert len(begun) == 6 - stages
    said = f"going on after {stages} of 6 stages, from {file}"
    assert [record.message for record in caplog.records] == ([said] if stages else [])
    check_same(resumed, at_once)
    assert list(file.parent.iterdir()) == [file]


def test_it_may_be_stopped_again_and_again_even_before_the_model_is_saved(
    reference: Model,
    noise: CalibrationSet,
    at_once: QuantizedModel,
    stop_after: Callable[[int | None], list[int]],
    tmp_path: Path,
) -> None:
    arguments: dict[str, Any] = {"calibration": noise, "recipe": RECIPE, "resume": tmp_path / "run", "progress": False}
    for stages in (2, 0, 3):  # The last in the head.
        stop_after(stages)
        with pytest.raises(Stopped):
            dfq.quantize(reference, "w4a4", **arguments)
    stop_after(None)
    check_same(dfq.quantize(reference, "w4a4", **arguments), at_once)
    begun = stop_after(None)
    check_same(dfq.quantize(reference, "w4a4", **arguments), at_once)
    assert begun == []


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"recipe": replace(RECIPE, reconstruction=replace(TUNED, drop=0.25))}, "recipe"),
        ({"recipe": "fast", "bits": "w4a8"}, "bits, recipe"),
        ({"batch_size": 4}, "batch size"),
        ({"calibration": slice(1, None)}, "calibration images"),
        ({"model": 1}, "model"),
    ],
)
def test_another_run_starts_afresh_and_says_so(
    changes: dict[str, Any],
    differing: str,
    tiny: Callable[..., Model],
    images_for: Callable[..., CalibrationSet],
    stop_after: Callable[[int | None], list[int]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    images, file = images_for(8), tmp_path / "run.partial"
    arguments: dict[str, Any] = {"bits": "w4a4", "calibration": images, "recipe": RECIPE, "progress": False}
    stop_after(2)
    with pytest.raises(Stopped):
        dfq.quantize(tiny(), **arguments, resume=file)
    arguments |= {key: value for key, value in changes.items() if key != "model"}
    if "calibration" in changes:
        arguments["calibration"] = replace(images, images=images.images.flip(0))
    model = tiny(seed=changes.get("model", 0))
    begun = stop_after(None)
    with caplog.at_level(logging.INFO, "dfq"):
        result = dfq.quantize(model, **arguments, resume=file)
    assert len(begun) == 4
    assert [record.message for record in caplog.records] == [
        f"{file} is of another run (it differs in {differing}): starting afresh"
    ]
    check_same(result, dfq.quantize(model, **arguments))


def offsets() -> Recipe:
    """Ranges moved out of norms leave an offset where the architecture has none; the classifier stays as it is."""
    sites = {"*.attn.qkv.input": {"granularity": "channel"}, "head.*": {"quantize": False}}
    content = {"scope": "full", "reparametrize": "full", "sites": sites, "reconstruction": {"iterations": 2}}
    return recipe_from_dict(content, name="mine", where="test")


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_all_that_stages_change_is_taken_up(
    stages: int,
    tiny: Callable[..., Model],
    images_for: Callable[..., CalibrationSet],
    stop_after: Callable[[int | None], list[int]],
    tmp_path: Path,
) -> None:
    model, mask = tiny(qkv_bias=False), torch.ones(6, 4, 4, dtype=torch.bool)
    mask[:3, :2] = False
    # Two lengths of tokens, and so two batches.
    arguments: dict[str, Any] = {"calibration": images_for(6, mask), "recipe": offsets(), "progress": False}
    stop_after(stages)
    with pytest.raises(Stopped):
        dfq.quantize(model, "w4a6", **arguments, resume=tmp_path / "run")
    stop_after(None)
    resumed = dfq.quantize(model, "w4a6", **arguments, resume=tmp_path / "run")
    check_same(resumed, dfq.quantize(model, "w4a6", **arguments))
    assert resumed.tensors()["blocks.0.attn.qkv.bias"].abs().max() > 0


@pytest.mark.parametrize("recipe", [ACCURATE, "fast"])
def test_swin_and_recipes_that_tune_nothing(
    recipe: Recipe | str,
    tiny_swin: Callable[..., Model],
    images_for: Callable[..., CalibrationSet],
    stop_after: Callable[[int | None], list[int]],
    tmp_path: Path,
) -> None:
    images = images_for(4, torch.ones(4, 8, 8, dtype=torch.bool))
    arguments: dict[str, Any] = {"calibration": images, "recipe": recipe, "progress": False}
    stop_after(4)
    with pytest.raises(Stopped):
        dfq.quantize(tiny_swin(), "w4a4", **arguments, resume=tmp_path / "run")
    begun = stop_after(None)
    resumed = dfq.quantize(tiny_swin(), "w4a4", **arguments, resume=tmp_path / "run")
    assert len(begun) == 3
    check_same(resumed, dfq.quantize(tiny_swin(), "w4a4", **arguments))


def test_the_features_at_the_end_are_those_of_full_precision(
    tiny: Callable[..., Model],
    images_for: Callable[..., CalibrationSet],
    stop_after: Callable[[int | None], list[int]],
    tmp_path: Path,
) -> None:
    tuned = replace(TUNED, feature=1.0, gradient=0.5, rounding="adaround", rounding_rate=0.05)
    recipe = replace(ACCURATE, reconstruction=tuned)  # Rotated, and normalized late.
    arguments: dict[str, Any] = {"calibration": images_for(6), "recipe": recipe, "progress": False}
    stop_after(2)
    with pytest.raises(Stopped):
        dfq.quantize(tiny(), "w3a8", **arguments, resume=tmp_path / "run")
    stop_after(None)
    resumed = dfq.quantize(tiny(), "w3a8", **arguments, resume=tmp_path / "run")
    check_same(resumed, dfq.quantize(tiny(), "w3a8", **arguments))


@pytest.fixture
def stopped(
    tiny: Callable[..., Model],
    images_for: Callable[..., CalibrationSet],
    stop_after: Callable[[int | None], list[int]],
    tmp_path: Path,
) -> tuple[Callable[[], QuantizedModel], Path]:
    """A call that was stopped after two of four stages and can be made again, and its file."""
    file, images = tmp_path / "run.partial", images_for(4)

    def call() -> QuantizedModel:
        return dfq.quantize(tiny(), "w4a8", calibration=images, recipe="paper", resume=file, progress=False)

    stop_after(2)
    with pytest.raises(Stopped):
        call()
    stop_after(None)
    return call, file


def test_only_what_is_done_is_kept(stopped: tuple[Callable[[], QuantizedModel], Path]) -> None:
    with safe_open(stopped[1], framework="pt") as content:
        names = set(content.keys())
    assert "model.blocks.0.attn.qkv.weight.integers" in names
    assert not any(name.startswith(("model.blocks.1", "model.head", "model.norm")) for name in names)


def test_what_a_killed_run_was_writing_goes_too(stopped: tuple[Callable[[], QuantizedModel], Path]) -> None:
    call, file = stopped
    file.with_name(f".{file.name}.4711.partial").write_bytes(b"half")
    file.with_name("notes.txt").write_text("mine")
    call()
    assert {path.name for path in file.parent.iterdir()} == {file.name, "notes.txt"}


def test_a_damaged_file_is_to_be_deleted(stopped: tuple[Callable[[], QuantizedModel], Path]) -> None:
    call, file = stopped
    whole = file.read_bytes()
    with safe_open(file, framework="pt") as content:
        header = content.metadata()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(DfqError, match=r"run\.partial is damaged.*: delete it"):
            call()
        assert file.read_bytes() == damaged
    for name in ("model.blocks.0.attn.qkv.weight.integers", "model.blocks.0.attn.qkv.input.scale"):
        save_file({key: value for key, value in from_bytes(whole).items() if key != name}, file, header)
        with pytest.raises(DfqError, match=r"run\.partial is damaged.*: delete it"):
            call()
    file.unlink()
    call()


def test_a_file_of_something_else_is_refused_before_images_are_made(
    reference: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("images were made")

    monkeypatch.setattr("dfq.generation.generate", generate)
    (tmp_path / "notes.txt").write_text("mine, and long enough to be something")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "folder").mkdir()
    for name, said in (
        ("notes.txt", "is damaged, or of something else"),
        ("model.safetensors", "is not of an unfinished run, and would be replaced: name another file"),
        ("folder", "is damaged, or of something else"),
        ("notes.txt/run", "cannot create the folder"),
    ):
        with pytest.raises(DfqError, match=said) as caught:
            dfq.quantize(reference, "w4a8", resume=tmp_path / name, progress=False)
        assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "notes.txt").read_text().startswith("mine")
