from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from timm.models.vision_transformer import VisionTransformer

from calibration import METHODS, generate, load_calibration_set, methods
from calibration.calibration_set import CalibrationSet, SetFolder, normalise
from calibration.errors import DfqError
from calibration.inversion import Progress
from calibration.methods import Method, Plan, batch_generator, make_batch
from calibration.schedules import Dense, ProgressiveStop
from calibration.tokens import PatchGrid, token_gather

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
VERSIONS = {"torch": "0"}


@pytest.fixture
def vit(make_vit: Any, monkeypatch: pytest.MonkeyPatch) -> VisionTransformer:
    """Beside it a method that stops patches within a few iterations: 16 -> 8 -> 4."""
    monkeypatch.setitem(METHODS, "sparse", Method("for tests", ProgressiveStop((1, 3), 0.5)))
    vit: VisionTransformer = make_vit()
    return vit


def plan_of(**changes: Any) -> Plan:
    arguments = {"method": "sparse", "num_images": 5, "iterations": 5, "batch_size": 2, "seed": 3, "precision": "fp32"}
    return Plan(**arguments | changes)


def run_of(vit: VisionTransformer, plan: Plan) -> dict[str, Any]:
    return plan.describe(MEAN, STD, PatchGrid.of(vit))


def make(vit: VisionTransformer, plan: Plan, out: Path | None = None, on_step: Any = None) -> CalibrationSet:
    run = run_of(vit, plan)
    folder = None if out is None else SetFolder(out, run, VERSIONS)
    return generate(vit, plan, mean=MEAN, std=STD, run=run, folder=folder, on_step=on_step)


def one(vit: VisionTransformer, plan: Plan, batch: int) -> CalibrationSet:
    return make_batch(vit, plan, batch, mean=MEAN, std=STD, run=run_of(vit, plan))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Counted:
    """`make_batch`, remembering which batches it was asked for; it fails at the batch `fails_at`."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.batches: list[int] = []
        self.fails_at = fails_at

    def __call__(self, vit: VisionTransformer, plan: Plan, batch: int, **arguments: Any) -> CalibrationSet:
        if batch == self.fails_at:
            raise KeyboardInterrupt
        self.batches.append(batch)
        return make_batch(vit, plan, batch, **arguments)


class TestThePlan:
    @pytest.mark.parametrize(
        ("num_images", "batch_size", "batches"), [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (3, 32, [3]), (1, 1, [1])]
    )
    def test_batches(self, num_images: int, batch_size: int, batches: list[int]) -> None:
        assert plan_of(method="smi", num_images=num_images, batch_size=batch_size).batches == batches

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"method": "magic"}, "^unknown method 'magic': choose from smi, dense, gaussian"),
            ({"num_images": 0}, "^num_images must be at least 1, not 0$"),
            ({"iterations": -1}, "^iterations must be at least 1, not -1$"),
            ({"batch_size": 0}, "^batch_size must be at least 1, not 0$"),
            ({"seed": -1}, "^the seed must not be negative, and -1 is$"),
            ({"precision": "fp16"}, "^unknown precision 'fp16': choose from auto, fp32, bf16$"),
        ],
    )
    def test_what_cannot_be_done(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(DfqError, match=message):
            plan_of(**{"method": "smi"} | change)

    def test_the_named_methods(self) -> None:
        assert METHODS["smi"].schedule == ProgressiveStop((50, 100, 200, 300), 0.3)
        assert METHODS["dense"].schedule == Dense()
        assert METHODS["gaussian"].schedule is None
        for name in ("smi", "dense"):
            assert METHODS[name].objective.weights == {"cross_entropy": 1.0, "total_variation": 1e-4}

    def test_the_description_tells_everything_the_images_depend_on(self, vit: VisionTransformer) -> None:
        run = run_of(vit, plan_of())
        assert json.loads(json.dumps(run)) == run
        assert run["patch_grid"] == [4, 4]
        assert run["inversion"]["iterations"] == 5
        assert run["inversion"]["schedule"] == {"name": "progressive_stop", "iterations": [1, 3], "ratio": 0.5}
        changes: list[dict[str, Any]] = [
            {"method": "dense"},
            {"num_images": 6},
            {"iterations": 6},
            {"batch_size": 3},
            {"seed": 4},
            {"precision": "bf16"},
        ]
        assert all(run_of(vit, plan_of(**change)) != run for change in changes)
        assert plan_of().describe((0.5,) * 3, STD, PatchGrid.of(vit)) != run
        assert plan_of().describe(MEAN, (0.5,) * 3, PatchGrid.of(vit)) != run

    def test_noise_does_not_depend_on_how_it_would_be_inverted(self, vit: VisionTransformer) -> None:
        first, second = (plan_of(method="gaussian", iterations=n, precision=p) for n, p in ((1, "fp32"), (9, "bf16")))
        assert run_of(vit, first) == run_of(vit, second)


class TestRandomness:
    def test_every_batch_of_every_seed_has_its_own(self) -> None:
        drawn = {tuple(torch.rand(2, generator=batch_generator(s, b)).tolist()) for s in range(20) for b in range(20)}
        assert len(drawn) == 400

    def test_it_is_the_same_every_time(self) -> None:
        assert torch.equal(*(torch.rand(9, generator=batch_generator(2**40, 7)) for _ in range(2)))

    @pytest.mark.parametrize("method", ["sparse", "dense", "gaussian"])
    def test_a_batch_made_alone_is_the_one_of_the_whole(self, vit: VisionTransformer, method: str) -> None:
        plan = plan_of(method=method)
        whole = make(vit, plan)
        assert len(whole) == 5
        for batch, members in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
            alone = one(vit, plan, batch)
            assert torch.equal(alone.images, whole.images[members])
            assert torch.equal(alone.mask, whole.mask[members])
            if method != "gaussian":
                assert torch.equal(alone.labels, whole.labels[members])

    def test_another_seed_makes_another_set(self, vit: VisionTransformer) -> None:
        plans = [plan_of(num_images=8, batch_size=8, seed=seed) for seed in (3, 3, 4)]
        first, again, other = (one(vit, plan, 0) for plan in plans)
        assert torch.equal(first.images, again.images)
        assert not torch.equal(first.images, other.images)
        assert not torch.equal(first.labels, other.labels)

    def test_batches_differ(self, vit: VisionTransformer) -> None:
        whole = make(vit, plan_of(method="gaussian", num_images=4))
        assert not torch.equal(whole.images[:2], whole.images[2:])


class TestWhatIsMade:
    def test_a_sparse_set(self, vit: VisionTransformer) -> None:
        made = make(vit, plan_of())
        assert (made.images.shape, made.images.dtype) == ((5, 3, 32, 32), torch.uint8)
        assert made.mask.flatten(1).sum(1).tolist() == [4] * 5
        assert (made.mean, made.std) == (MEAN, STD)
        assert made.run == run_of(vit, plan_of())

    def test_labels_are_drawn_from_all_classes_alike(self, vit: VisionTransformer) -> None:
        plan = plan_of(method="dense", num_images=400, batch_size=400, iterations=1)
        labels = one(vit, plan, 0).labels
        assert labels is not None
        assert stats.chisquare(labels.bincount(minlength=5).numpy()).pvalue > 1e-3

    def test_confidence_is_of_the_label_in_the_kept_patches(self, vit: VisionTransformer) -> None:
        """Up to the rounding of pixels to 8 bits."""
        made = make(vit, plan_of(iterations=8, num_images=4, batch_size=4))
        ((images, keep),) = made.batches(4, torch.device("cpu"))
        with token_gather(vit) as gather, torch.no_grad():
            gather.keep = keep
            probability = vit(images).softmax(-1).gather(1, made.labels[:, None])[:, 0]
        torch.testing.assert_close(made.confidence, probability, atol=0.02, rtol=0)

    def test_noise_is_gaussian_as_far_as_pixels_can_hold_it(self, vit: VisionTransformer) -> None:
        made = make(vit, plan_of(method="gaussian", num_images=8, batch_size=4))
        assert made.labels is None
        assert made.confidence is None
        assert not made.is_sparse
        values = normalise(made.images, MEAN, STD).double()
        # Red: mean 0.5 and deviation 0.25, hence N(0, 1) clipped to [-2, 2].
        clipped = stats.norm.rvs(size=10**6, random_state=0).clip(-2, 2)
        assert values[:, 0].mean().item() == pytest.approx(0, abs=0.04)
        assert values[:, 0].std().item() == pytest.approx(clipped.std(), abs=0.03)
        assert values[:, 0].abs().max().item() == pytest.approx(2, abs=1e-5)
        white = (made.images[:, 0] == 255).double().mean().item()
        assert white == pytest.approx(stats.norm.sf((254.5 / 255 - 0.5) / 0.25), abs=0.01)

    def test_a_model_without_a_class_token(self, vit: VisionTransformer, make_vit: Any) -> None:
        pooled = make_vit(class_token=False, global_pool="avg")
        assert len(make(pooled, plan_of(method="dense"))) == 5
        with pytest.raises(DfqError, match="no class token"):
            make(pooled, plan_of())

    def test_progress_tells_the_batch(self, vit: VisionTransformer) -> None:
        told: list[tuple[int, int, int]] = []

        def on_step(batch: int, step: Progress) -> None:
            told.append((batch, step.iteration, step.kept_patches))

        make(vit, plan_of(), on_step=on_step)
        assert told == [(batch, *step) for batch in range(3) for step in ((1, 16), (5, 4))]


class TestOnDisk:
    def test_what_is_made_is_what_is_loaded(self, vit: VisionTransformer, tmp_path: Path) -> None:
        made = make(vit, plan_of(), tmp_path)
        loaded = load_calibration_set(tmp_path)
        for name in ("images", "mask", "labels", "confidence"):
            assert torch.equal(getattr(made, name), getattr(loaded, name))
        assert loaded.run == made.run
        shards = [f"shard-{index:05d}.safetensors" for index in range(3)]
        assert sorted(files(tmp_path)) == ["manifest.json", "preview.png", *shards]

    def test_a_run_that_was_stopped_makes_the_same_files(
        self, vit: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make(vit, plan_of(), tmp_path / "whole")
        stopped, again, finished = Counted(fails_at=1), Counted(), Counted()

        monkeypatch.setattr(methods, "make_batch", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(vit, plan_of(), tmp_path / "set")
        assert sorted(files(tmp_path / "set")) == ["manifest.json", "shard-00000.safetensors"]
        with pytest.raises(DfqError, match="is unfinished"):
            load_calibration_set(tmp_path / "set")

        monkeypatch.setattr(methods, "make_batch", again)
        make(vit, plan_of(), tmp_path / "set")
        assert files(tmp_path / "set") == files(tmp_path / "whole")

        monkeypatch.setattr(methods, "make_batch", finished)
        make(vit, plan_of(), tmp_path / "set")
        assert files(tmp_path / "set") == files(tmp_path / "whole")
        assert (stopped.batches, again.batches, finished.batches) == ([0], [1, 2], [])

    def test_the_published_method_goes_on_too(
        self, vit: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its schedule once came back from the manifest as another: a list is no tuple."""
        plan = plan_of(method="smi", num_images=2, iterations=2)
        make(vit, plan, tmp_path)
        again = Counted()
        monkeypatch.setattr(methods, "make_batch", again)
        make(vit, plan, tmp_path)
        assert again.batches == []

    def test_a_shard_in_the_middle_is_made_again(self, vit: VisionTransformer, tmp_path: Path) -> None:
        make(vit, plan_of(), tmp_path)
        before = files(tmp_path)
        (tmp_path / "shard-00001.safetensors").unlink()
        make(vit, plan_of(), tmp_path)
        assert files(tmp_path) == before

    def test_another_run_is_refused(self, vit: VisionTransformer, tmp_path: Path) -> None:
        make(vit, plan_of(method="gaussian"), tmp_path)
        before = files(tmp_path)
        with pytest.raises(DfqError, match="another run"):
            make(vit, plan_of(method="gaussian", seed=4), tmp_path)
        assert files(tmp_path) == before
