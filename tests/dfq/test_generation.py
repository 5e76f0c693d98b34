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
from torch import nn

import dfq
from calibration import Plan
from calibration.calibration_set import CalibrationSet
from dfq.errors import DfqError, UnsupportedModelError
from dfq.generation import describe_run
from dfq.models import Model
from dfq.options import build_parser


def made(model: Model, method: str = "smi", num_images: int = 3, **changes: Any) -> CalibrationSet:
    return dfq.generate(model, method, num_images, iterations=3, batch_size=2, progress=False, **changes)


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
        describe_run(reference, replace(plan, batch_size=3)),
        describe_run(reference, replace(plan, precision="bf16")),
        describe_run(replace(reference, origin=replace(reference.origin, fingerprint="x")), plan),
        describe_run(replace(reference, preprocessing=replace(reference.preprocessing, mean=(0.0,) * 3)), plan),
    ]
    assert all(other != run for other in others)


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
    with pytest.raises(DfqError, match="unknown method 'smy'"):
        made(reference, "smy", out=tmp_path / "set")
    cnn: Any = replace(reference, module=nn.Conv2d(3, 3, 3))
    with pytest.raises(UnsupportedModelError, match="is a Conv2d"):
        made(cnn, out=tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_nothing_is_printed_without_progress(reference: Model, capsys: pytest.CaptureFixture[str]) -> None:
    made(reference)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("iterations", "told"), [(300, True), (301, False)])
def test_a_budget_that_ends_before_the_last_stop_is_told(
    iterations: int, told: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dfq.load_model("reference")
    monkeypatch.setattr("calibration.generate", lambda *_, **__: [None])  # the images are not the matter here
    with caplog.at_level("WARNING", "dfq"):
        dfq.generate(model, "smi", 1, iterations=iterations)
    assert ("more patches stay than published" in caplog.text) is told


def test_the_command_has_the_defaults_of_the_function() -> None:
    """They stand twice, because the options must not wait for torch."""
    commands = dict.fromkeys(("generate", "quantize", "evaluate", "list", "demo"), lambda _: None)
    given = build_parser(commands).parse_args(["generate", "reference", "--out", "somewhere"])
    defaults = {name: parameter.default for name, parameter in inspect.signature(dfq.generate).parameters.items()}
    for name in ("method", "num_images", "iterations", "batch_size", "seed", "precision"):
        assert getattr(given, name) == defaults[name]
