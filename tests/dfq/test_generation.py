"""`dfq.generate`: sets that hang on the run alone, folders that are continued, and what is refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import dfq
from calibration import Dense, Method, Objective, Plan, ProgressiveStop, Rebirth, Settings
from calibration.calibration_set import CalibrationSet
from calibration.passes import resolve_precision
from dfq.cli import build_parser
from dfq.errors import DfqError, UnsupportedModelError, UsageError
from dfq.generation import describe_run
from dfq.models import Model


def made(model: Model, method: str = "smi", num_images: int = 3, **changes: Any) -> CalibrationSet:
    return dfq.generate(model, method, num_images, **{"iterations": 3, "batch_size": 2, "progress": False} | changes)


def test_a_set_fits_its_model(reference: Model) -> None:
    images = made(reference, "dense")
    assert images.images.shape == (3, 3, 32, 32)
    assert (images.mean, images.std) == (reference.preprocessing.mean, reference.preprocessing.std)
    assert images.grid.num_patches == 64
    assert images.labels is not None
    assert images.labels.max() < 10
    assert images.confidence is not None
    with torch.inference_mode():
        logits = torch.cat([reference(pixels) for pixels, _ in images.batches(8, torch.device("cpu"))])
    assert logits.shape == (3, 10)


def test_the_same_run_gives_the_same_set_and_another_seed_another(reference: Model) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, second, other = made(reference), made(reference), made(reference, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.mask, second.mask)
    assert not torch.equal(first.images, other.images)


def test_gaussian_noise_is_noise_in_the_normalised_space(tiny: Callable[..., Model]) -> None:
    images = made(tiny(), "gaussian", 8)
    assert not images.is_sparse
    assert images.labels is None
    # N(0, 1) with mean 0.5 and std 0.25, cut off at two sigma: variance 1 - 4 phi(2) (1 + ...) by integration 0.9205.
    pixels, _ = next(images.batches(8, torch.device("cpu")))
    assert pixels.abs().max() <= 2.0
    assert pixels.mean().abs() < 0.03
    assert pixels.var().item() == pytest.approx(0.9205, abs=0.02)


def test_the_run_tells_all_it_depends_on(reference: Model, tiny: Callable[..., Model]) -> None:
    plan = Plan("smi", 4, 3, 2, 0, "fp32")
    run = describe_run(reference, plan)
    assert json.loads(json.dumps(run)) == json.loads(json.dumps(describe_run(reference, plan)))
    assert run["model"]["fingerprint"] == reference.origin.fingerprint
    others = [
        describe_run(reference, replace(plan, method="dense")),
        describe_run(reference, replace(plan, seed=1)),
        describe_run(reference, replace(plan, num_images=5)),
        describe_run(reference, replace(plan, iterations=4)),
        describe_run(reference, replace(plan, iterations=None)),
        describe_run(reference, replace(plan, initial="leaves")),
        describe_run(reference, replace(plan, schedule=Dense())),
        describe_run(reference, replace(plan, learning_rate=0.1)),
        describe_run(reference, replace(plan, batch_size=3)),
        describe_run(reference, replace(plan, precision="bf16")),
        describe_run(replace(reference, origin=replace(reference.origin, fingerprint="x")), plan),
        describe_run(replace(reference, preprocessing=replace(reference.preprocessing, mean=(0.0,) * 3)), plan),
    ]
    assert all(other != run for other in others)


def test_auto_runs_each_batch_until_its_images_are_good_enough(reference: Model) -> None:
    images = made(reference, "dense", 8, iterations="auto", batch_size=8)
    assert images.run["inversion"]["enough"] is not None
    assert images.iterations is not None
    (iterations,) = set(images.iterations.tolist())
    assert 10 <= iterations < images.run["inversion"]["iterations"]
    assert iterations % 10 == 0
    assert made(reference, "dense", 8, iterations=12).iterations.tolist() == [12] * 8


@pytest.mark.parametrize(
    ("given", "meant"),
    [("dense", Dense()), ("smi", ProgressiveStop()), ("pri", Rebirth()), (Rebirth(2), Rebirth(2))],
)
def test_the_methods_own_schedule_start_and_steps_can_be_replaced(reference: Model, given: Any, meant: Any) -> None:
    images = made(reference, "psaq", 4, iterations=8, schedule=given, initial="pink", learning_rate=0.05)
    assert images.run["method"] == "psaq"
    assert images.run["initial"] == "pink"
    assert images.run["inversion"]["schedule"] == meant.describe()
    assert images.run["inversion"]["optimiser"]["learning_rate"] == 0.05
    assert images.is_sparse is (meant != Dense())
    plan = Plan("psaq", 4, 8, 2, 0, "auto", "pink", meant, 0.05)
    assert images.run == describe_run(reference, plan)


def test_a_folder_is_continued(reference: Model, tmp_path: Path) -> None:
    first = made(reference, out=tmp_path / "set")
    shards = sorted((tmp_path / "set").glob("shard-*.safetensors"))
    assert len(shards) == 2
    assert (tmp_path / "set" / "preview.png").is_file()
    untouched = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    again = made(reference, out=tmp_path / "set")
    assert torch.equal(again.images, first.images)
    assert shards[0].stat().st_mtime_ns == untouched
    assert torch.equal(dfq.load_calibration_set(tmp_path / "set").images, first.images)


def test_a_folder_of_another_run_is_refused_unless_overwritten(reference: Model, tmp_path: Path) -> None:
    made(reference, "gaussian", out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DfqError, match="holds a calibration set of another run"):
        made(reference, "gaussian", out=tmp_path, seed=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    images = made(reference, "gaussian", out=tmp_path, seed=1, overwrite=True)
    assert torch.equal(dfq.load_calibration_set(tmp_path).images, images.images)


def test_mistakes_leave_no_folder(reference: Model, tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"method": "smy"}, "unknown method 'smy'"),
        ({"schedule": "best"}, "^unknown schedule 'best': choose from dense, smi, pri$"),
        ({"initial": "flowers"}, "^unknown start 'flowers': choose from noise, pink, leaves$"),
        ({"learning_rate": -1.0}, "the learning rate must be"),
        ({"iterations": 0}, "^iterations must be at least 1, not 0$"),
        ({"method": "gaussian", "initial": "pink"}, "^gaussian inverts nothing: "),
        ({"schedule": Rebirth(9)}, "^3 iterations cannot be divided into 9 parts$"),
        # The reference has 64 patches.
        ({"schedule": Rebirth(65), "iterations": 99}, "^64 patches cannot be divided into 65 images"),
    ]
    for change, message in mistakes:
        with pytest.raises(DfqError, match=message):
            made(reference, out=tmp_path / "set", **change)
    cnn: Any = replace(reference, module=nn.Conv2d(3, 3, 3))
    with pytest.raises(UnsupportedModelError, match="is a Conv2d"):
        made(cnn, out=tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_schedule_that_the_model_cannot_follow_leaves_no_folder(tmp_path: Path) -> None:
    """Swin has no tokens that could be left out; densely it can be inverted."""
    swin = dfq.load_model("swin_tiny_patch4_window7_224", random_weights=True, device="cpu")
    with pytest.raises(DfqError, match="use a dense method"):
        made(swin, "smi", 1, out=tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_trace_is_left_in_the_folder(reference: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^a trace is a picture in the folder of the set: give out$"):
        made(reference, trace=True)
    made(reference, trace=True, out=tmp_path / "set")
    with Image.open(tmp_path / "set" / "trace.png") as picture:
        assert picture.format == "PNG"
    made(reference, out=tmp_path / "other")
    assert not (tmp_path / "other" / "trace.png").exists()


def test_a_picture_of_a_run_that_was_replaced_is_removed(reference: Model, tmp_path: Path) -> None:
    made(reference, trace=True, out=tmp_path)
    made(reference, seed=1, out=tmp_path, overwrite=True)
    assert not (tmp_path / "trace.png").exists()


def test_captions_are_names_for_people(
    reference: Model, tiny: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions: list[Any] = []
    monkeypatch.setattr("calibration.making.write_preview", lambda images, path, names: captions.append(names))
    for index, model in enumerate((reference, tiny(num_classes=1000), tiny())):
        made(model, "dense", out=tmp_path / str(index))
    digits, imagenet, unknown = captions
    assert digits == reference.class_names
    # As the list of ImageNet's classes begins, instead of n01440764 and n01443537.
    assert imagenet[:2] == ("tench", "goldfish")
    assert len(imagenet) == 1000
    assert unknown is None


def test_nothing_is_printed_without_progress(reference: Model, capsys: pytest.CaptureFixture[str]) -> None:
    made(reference)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("iterations", "told"), [(300, True), (301, False)])
def test_a_budget_that_ends_before_the_last_stop_is_told(
    iterations: int,
    told: bool,
    noise: CalibrationSet,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = dfq.load_model("reference")
    monkeypatch.setattr("calibration.generate", lambda *_, **__: [noise])  # the images are not the matter here
    with caplog.at_level("WARNING", "dfq"):
        dfq.generate(model, "smi", 1, iterations=iterations, schedule=ProgressiveStop((50, 100, 200, 300)))
    assert any(record.levelname == "WARNING" for record in caplog.records) is told
    caplog.clear()
    # In proportion they fit, but for the shortest runs.
    dfq.generate(model, "smi", 1, iterations=iterations)
    assert not caplog.records
    dfq.generate(model, "smi", 1, iterations=3)
    assert "patches stop 2 times instead of 4 in 3 iterations" in caplog.text


def test_the_run_says_in_which_precision_it_was_made(reference: Model) -> None:
    """A set begun in one precision is another run in another, also where both times `auto` was asked for."""
    run = made(reference, "dense", 1, precision="auto").run
    assert run["precision"] == str(resolve_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    assert run["device"] == "cpu"
    assert made(reference, "dense", 1, precision="fp32").run["precision"] == "float32"


def test_the_command_has_the_defaults_of_the_function() -> None:
    """They stand twice, because the options must not wait for torch."""
    given = build_parser().parse_args(["generate", "reference", "--out", "somewhere"])
    defaults = {name: parameter.default for name, parameter in inspect.signature(dfq.generate).parameters.items()}
    options = {name: name for name in defaults} | {"initial": "init"}
    # Those that differ by nature: the command names its model and folder, and has --quiet for progress.
    for name in set(defaults) - {"model", "out", "progress"}:
        assert getattr(given, options[name]) == defaults[name]


def test_a_method_of_ones_own(reference: Model, tmp_path: Path) -> None:
    """Everything about it stands in the run, so another composition is another run."""
    soft = Method("mine", Dense(), Objective({"cross_entropy": 1.0}), Settings(9, learning_rate=0.1), soft_labels=True)
    images = dfq.generate(reference, soft, 2, out=tmp_path, progress=False)
    assert images.run["method"] == "custom"
    assert images.run["inversion"]["objective"] == {"cross_entropy": 1.0}
    assert (images.run["inversion"]["iterations"], images.run["inversion"]["soft_labels"]) == (9, True)
    with pytest.raises(DfqError, match="another run"):
        dfq.generate(reference, replace(soft, soft_labels=False), 2, out=tmp_path, progress=False)
