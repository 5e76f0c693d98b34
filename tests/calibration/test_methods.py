from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy import stats
from timm.models.vision_transformer import VisionTransformer

from calibration import METHODS, check_method, generate, inversion, load_calibration_set, making, memory
from calibration.augment import RollAndFlip
from calibration.calibration_set import CalibrationSet, SetFolder, concatenate, normalise
from calibration.errors import DfqError
from calibration.initial import INITIAL
from calibration.inversion import Progress, Settings
from calibration.making import RESTART_SLOWDOWN, batch_generator, make_batch
from calibration.methods import DEFAULT_METHOD, SCHEDULES, Method, Plan
from calibration.objectives import Loss, Objective, Scene, Step
from calibration.schedules import Dense, PatchSchedule, ProgressiveStop, Rebirth
from calibration.tokens import PatchGrid, token_gather
from calibration.trace import Trace

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
VERSIONS = {"torch": "0"}
GRID = PatchGrid(4, 4, 8, 8)


@pytest.fixture
def vit(make_vit: Any, monkeypatch: pytest.MonkeyPatch) -> VisionTransformer:
    """Beside it methods that choose patches within a few iterations: 16 -> 8 -> 4, and 5, 5 and 6."""
    monkeypatch.setitem(METHODS, "sparse", Method("for tests", ProgressiveStop((1, 3), 0.5)))
    monkeypatch.setitem(METHODS, "rebirth", Method("for tests", Rebirth(3)))
    vit: VisionTransformer = make_vit()
    return vit


def plan_of(**changes: Any) -> Plan:
    arguments = {"method": "sparse", "num_images": 5, "iterations": 5, "batch_size": 2, "seed": 3, "precision": "fp32"}
    return Plan(**arguments | changes)


def run_of(vit: VisionTransformer, plan: Plan) -> dict[str, Any]:
    return plan.describe(MEAN, STD, PatchGrid.of(vit))


def make(vit: VisionTransformer, plan: Plan, out: Path | None = None, **arguments: Any) -> CalibrationSet:
    run = run_of(vit, plan)
    folder = None if out is None else SetFolder(out, run, VERSIONS)
    return concatenate(list(generate(vit, plan, mean=MEAN, std=STD, run=run, folder=folder, **arguments)))


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
        ("num_images", "division", "batch_size", "canvases", "batches"),
        [
            (10, 4, 2, [2, 1], [8, 2]),
            (8, 4, 2, [2], [8]),
            (9, 4, 1, [1, 1, 1], [4, 4, 1]),
            (1, 4, 32, [1], [1]),
            (128, 7, 32, [19], [128]),
            (10, 1, 4, [4, 4, 2], [4, 4, 2]),
        ],
    )
    def test_canvases(
        self, num_images: int, division: int, batch_size: int, canvases: list[int], batches: list[int]
    ) -> None:
        """Batches are of canvases; of the last one only as many images are kept as are wanted."""
        plan = plan_of(
            method="pri", schedule=Rebirth(division), num_images=num_images, batch_size=batch_size, iterations=20
        )
        assert (plan.canvases, plan.batches) == (canvases, batches)
        assert sum(batches) == num_images

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"method": "magic"}, "unknown method 'magic': choose from " + ", ".join(METHODS)),
            ({"num_images": 0}, "num_images must be at least 1, not 0"),
            ({"iterations": -1}, "iterations must be at least 1, not -1"),
            ({"iterations": 0}, "iterations must be at least 1, not 0"),
            ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
            ({"iterations": None, "batch_size": 0}, "batch_size must be at least 1, not 0"),
            ({"seed": -1}, "the seed must not be negative, and -1 is"),
            ({"precision": "fp16"}, "unknown precision 'fp16': choose from auto, fp32, bf16"),
            ({"initial": "flowers"}, "unknown start 'flowers': choose from noise, pink, leaves"),
            ({"method": "gaussian", "initial": "pink"}, "gaussian inverts nothing: initial is not for it"),
            ({"method": "pink", "schedule": Dense()}, "pink inverts nothing: schedule is not for it"),
            ({"method": "leaves", "learning_rate": 0.1}, "leaves inverts nothing: learning_rate is not for it"),
            ({"learning_rate": 0.0}, "the learning rate must be positive, not 0.0"),
            ({"schedule": Rebirth(6)}, "5 iterations cannot be divided into 6 parts"),
            ({"method": "pri", "iterations": 3}, "3 iterations cannot be divided into 4 parts"),
        ],
    )
    def test_what_cannot_be_done(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(DfqError) as raised:
            plan_of(**{"method": "smi"} | change)
        assert str(raised.value) == message

    def test_more_images_of_a_canvas_than_it_has_patches(self, vit: VisionTransformer) -> None:
        """Told as soon as the grid is known, before anything is made."""
        plan = plan_of(method="pri", schedule=Rebirth(17), iterations=40)
        with pytest.raises(DfqError, match="16 patches cannot be divided into 17 images"):
            check_method(vit, plan)
        check_method(vit, plan_of(method="pri", schedule=Rebirth(16), iterations=40))

    def test_the_named_methods(self) -> None:
        published = {"cross_entropy": 1.0, "total_variation": 1e-4}
        assert METHODS["smi"].schedule == ProgressiveStop(ratio=0.3)
        assert METHODS["smi"].schedule.decisions(4000) == (50, 100, 200, 300)
        assert METHODS["dense"].schedule == Dense()
        assert METHODS["pri"].schedule == Rebirth(4)
        for name in ("smi", "dense", "pri"):
            assert METHODS[name].objective.weights == published
            assert (METHODS[name].initial, METHODS[name].soft_labels) == ("noise", False)
            assert replace(METHODS[name].settings, iterations=4000, enough=None) == Settings()
        assert [name for name, method in METHODS.items() if method.schedule is None] == ["leaves", "pink", "gaussian"]
        assert [METHODS[name].initial for name in ("leaves", "pink", "gaussian")] == ["leaves", "pink", "noise"]
        # PSAQ-ViT: rate 0.2, betas 0.5 and 0.9, rolls of up to 30 of 224 pixels.
        psaq = METHODS["psaq"]
        assert (psaq.settings.learning_rate, psaq.settings.betas) == (0.2, (0.5, 0.9))
        assert psaq.settings.augment == RollAndFlip(30 / 224)
        assert {"patch_similarity_entropy", "bounded_variation"} < set(psaq.objective.weights)
        # SARDFQ asks for classes in company; sparsely the same.
        for name, schedule in (("apa", Dense()), ("apa-smi", ProgressiveStop())):
            assert (METHODS[name].soft_labels, METHODS[name].schedule) == (True, schedule)
            assert "attention_prior" in METHODS[name].objective.weights
        assert METHODS["natural"].initial == "leaves"
        assert DEFAULT_METHOD in METHODS
        assert all(method.initial in INITIAL for method in METHODS.values())

    def test_schedules_have_the_names_of_their_methods(self) -> None:
        assert {name: METHODS[name].schedule for name in SCHEDULES} == SCHEDULES
        assert set(SCHEDULES) == {"dense", "smi", "pri"}

    def test_what_a_plan_changes_in_its_method(self) -> None:
        method = METHODS["natural"]
        assert plan_of(method="natural", iterations=None).composed == method
        fixed = plan_of(method="natural", iterations=70).composed
        assert fixed == replace(method, settings=replace(method.settings, iterations=70, enough=None))
        changed = plan_of(
            method="natural", iterations=None, initial="pink", schedule=Rebirth(2), learning_rate=0.5
        ).composed
        settings = replace(method.settings, learning_rate=0.5)
        assert changed == replace(method, initial="pink", schedule=Rebirth(2), settings=settings)
        assert settings.enough is not None

    def test_the_description_tells_everything_the_images_depend_on(self, vit: VisionTransformer) -> None:
        run = run_of(vit, plan_of())
        assert json.loads(json.dumps(run)) == run
        assert run["patch_grid"] == [4, 4]
        assert run["inversion"]["iterations"] == 5
        assert run["inversion"]["enough"] is None
        assert run["inversion"]["schedule"] == {"name": "progressive_stop", "stops": [1, 3], "ratio": 0.5}
        changes: list[dict[str, Any]] = [
            {},
            {"method": "dense"},
            {"num_images": 6},
            {"iterations": 6},
            {"iterations": None},
            {"iterations": METHODS["sparse"].settings.iterations},
            {"batch_size": 3},
            {"seed": 4},
            {"precision": "bf16"},
            {"initial": "pink"},
            {"initial": "leaves"},
            {"learning_rate": 0.1},
            {"schedule": Dense()},
            {"schedule": Rebirth(2)},
            {"schedule": Rebirth(3)},
            {"schedule": ProgressiveStop()},
            {"schedule": ProgressiveStop((1, 4), 0.5)},
            {"schedule": ProgressiveStop((1, 3), 0.4)},
        ]
        described = [run_of(vit, plan_of(**change)) for change in changes]
        assert all(json.loads(json.dumps(one)) == one for one in described)
        assert len({json.dumps(one) for one in described}) == len(changes)
        assert plan_of().describe((0.5,) * 3, STD, PatchGrid.of(vit)) != run
        assert plan_of().describe(MEAN, (0.5,) * 3, PatchGrid.of(vit)) != run
        assert plan_of().describe(MEAN, STD, PatchGrid(2, 2, 16, 16)) != run

    def test_methods_are_told_apart_by_more_than_their_name(
        self, vit: VisionTransformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(METHODS, "soft", replace(METHODS["smi"], soft_labels=True))
        runs = [run_of(vit, plan_of(method=name, iterations=None)) | {"method": ""} for name in METHODS]
        assert len({json.dumps(run) for run in runs}) == len(METHODS)

    def test_saying_what_is_so_anyway_changes_nothing(self, vit: VisionTransformer) -> None:
        same = plan_of(initial="noise", schedule=ProgressiveStop((1, 3), 0.5), learning_rate=0.25)
        assert run_of(vit, same) == run_of(vit, plan_of())

    def test_noise_does_not_depend_on_how_it_would_be_inverted(self, vit: VisionTransformer) -> None:
        first, second = (plan_of(method="gaussian", iterations=n, precision=p) for n, p in ((1, "fp32"), (9, "bf16")))
        assert run_of(vit, first) == run_of(vit, second)


class TestRandomness:
    def test_every_batch_of_every_seed_has_its_own(self) -> None:
        drawn = {tuple(torch.rand(2, generator=batch_generator(s, b)).tolist()) for s in range(20) for b in range(20)}
        assert len(drawn) == 400

    def test_it_is_the_same_every_time(self) -> None:
        assert torch.equal(*(torch.rand(9, generator=batch_generator(2**40, 7)) for _ in range(2)))

    @pytest.mark.parametrize("method", ["sparse", "dense", "natural", "psaq", "apa", "apa-smi", "gaussian", "pink"])
    def test_a_batch_made_alone_is_the_one_of_the_whole(self, vit: VisionTransformer, method: str) -> None:
        plan = plan_of(method=method)
        whole = make(vit, plan)
        assert len(whole) == 5
        for batch, members in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
            alone = one(vit, plan, batch)
            assert torch.equal(alone.images, whole.images[members])
            assert torch.equal(alone.mask, whole.mask[members])
            if METHODS[method].schedule is not None:
                assert torch.equal(alone.labels, whole.labels[members])

    def test_so_is_a_batch_of_canvases(self, vit: VisionTransformer) -> None:
        plan = plan_of(method="rebirth", num_images=7)
        whole = make(vit, plan)
        for batch, members in enumerate((slice(0, 6), slice(6, 7))):
            alone = one(vit, plan, batch)
            assert torch.equal(alone.images, whole.images[members])
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
        assert made.iterations is not None
        assert made.iterations.tolist() == [5] * 5

    def test_several_sparse_images_of_one_canvas(self, vit: VisionTransformer) -> None:
        """Eight of nine images of three canvases: they share a label, and divide the patches."""
        made = make(vit, plan_of(method="rebirth", num_images=8, iterations=6, seed=0))
        assert made.images.shape == (8, 3, 32, 32)
        assert made.mask.flatten(1).sum(1).tolist() == [5, 5, 6, 5, 5, 6, 5, 5]
        assert made.labels is not None
        assert made.confidence is not None
        assert made.iterations is not None
        assert made.labels[0] != made.labels[3]
        for first in (0, 3):
            assert (made.mask[first : first + 3].sum(0) == 1).all()
            assert len(made.labels[first : first + 3].unique()) == 1
        assert not (made.mask[6] & made.mask[7]).any()
        assert made.iterations.tolist() == [2, 4, 6, 2, 4, 6, 2, 4]
        assert made.confidence.shape == (8,)
        # The batch sizes are of canvases: labels are drawn for two, then for one more.
        drawn = [
            one(vit, plan_of(method="rebirth", num_images=8, iterations=6, seed=0), batch).labels for batch in (0, 1)
        ]
        assert torch.cat(drawn).tolist() == made.labels.tolist()

    @pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.schedule is not None])
    def test_every_method_makes_images(self, vit: VisionTransformer, method: str) -> None:
        made = make(vit, plan_of(method=method, num_images=3, iterations=8))
        assert len(made) == 3
        assert made.is_sparse is (not isinstance(METHODS[method].schedule, Dense))
        assert made.labels is not None
        assert made.confidence is not None
        assert ((made.confidence >= 0) & (made.confidence <= 1)).all()

    @pytest.mark.parametrize("method", ["leaves", "pink", "gaussian"])
    def test_without_inversion_there_are_pixels_alone(self, vit: VisionTransformer, method: str) -> None:
        made = make(vit, plan_of(method=method))
        assert len({image.tobytes() for image in made.images.numpy()}) == 5
        assert not made.is_sparse
        assert (made.labels, made.confidence, made.iterations) == (None, None, None)

    def test_where_inversion_starts(self, vit: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
        """A step that is next to nothing leaves what the method of that name makes, unlike any other."""
        monkeypatch.setitem(METHODS, "still", Method("for tests", Dense()))
        sources = {"noise": "gaussian", "pink": "pink", "leaves": "leaves"}
        made = {
            initial: one(vit, plan_of(method="still", initial=initial, iterations=1, learning_rate=1e-6), 0).images
            for initial in INITIAL
        }
        for initial, images in made.items():
            source = one(vit, plan_of(method=sources[initial]), 0).images
            difference = (images.float() - source.float()).abs()
            assert difference.max() <= 1, initial
            assert (difference > 0).float().mean() < 0.01
        assert len({images.numpy().tobytes() for images in made.values()}) == 3

    def test_a_plan_of_ones_own_schedule_and_learning_rate(self, vit: VisionTransformer) -> None:
        plain = one(vit, plan_of(method="dense"), 0)
        same = one(vit, plan_of(method="sparse", schedule=Dense()), 0)
        slower = one(vit, plan_of(method="dense", learning_rate=0.01), 0)
        assert torch.equal(plain.images, same.images)
        start = one(vit, plan_of(method="gaussian"), 0).images.float()
        assert (slower.images - start).abs().mean() < (plain.images - start).abs().mean() / 3

    def test_soft_labels_ask_for_less(self, vit: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the loop is given: probabilities, of which the label's is the largest; else class indices."""
        targets: list[torch.Tensor] = []
        invert = inversion.invert

        def watched(vit: Any, initial: Any, labels: torch.Tensor, **arguments: Any) -> Any:
            targets.append(labels)
            return invert(vit, initial, labels, **arguments)

        monkeypatch.setattr(inversion, "invert", watched)
        hard, soft = (one(vit, plan_of(method=method, num_images=6, batch_size=6), 0) for method in ("dense", "apa"))
        assert targets[0].tolist() == hard.labels.tolist()
        assert targets[1].shape == (6, 5)
        assert targets[1].sum(1).tolist() == pytest.approx([1] * 6)
        assert targets[1].argmax(1).tolist() == soft.labels.tolist()

    def test_auto_stops_a_batch_that_is_good_enough(
        self, vit: VisionTransformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        easy = Settings(iterations=40, enough=1e9)
        monkeypatch.setitem(METHODS, "sparse", Method("for tests", ProgressiveStop((1, 3), 0.5), settings=easy))
        made = make(vit, plan_of(iterations=None))
        # Ten steps after patches were last chosen.
        assert made.iterations.tolist() == [3 + inversion.COMPARE_EVERY] * 5
        assert make(vit, plan_of(iterations=20)).iterations.tolist() == [20] * 5

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
        assert make(pooled, plan_of()).is_sparse
        with pytest.raises(DfqError, match="shapes the attention of a class token"):
            make(pooled, plan_of(method="apa"))

    def test_progress_tells_the_batch(self, vit: VisionTransformer) -> None:
        told: list[tuple[int, int, int]] = []

        def on_step(batch: int, step: Progress) -> None:
            told.append((batch, step.iteration, step.kept_patches))

        make(vit, plan_of(iterations=12), on_step=on_step)
        assert told == [(batch, *step) for batch in range(3) for step in ((10, 4), (12, 4))]


@dataclass(frozen=True)
class Failing(Objective):
    """The published objective, but no number at iteration `at` of its first `fails` batches."""

    fails: int = 1
    at: int = 3
    started: list[list[Step]] = field(default_factory=list)

    def start(self, scene: Scene) -> Loss:
        loss, steps = super().start(scene), []
        self.started.append(steps)
        failing = len(self.started) <= self.fails

        def term(step: Step) -> torch.Tensor:
            steps.append(step)
            return step.logits.sum(1) * (math.nan if failing and len(steps) == self.at else 0.0)

        return Loss(loss.needs, [*loss.pass_terms, (1.0, term)], loss.pixel_terms)


class TestNumbersThatLeave:
    def failing(self, monkeypatch: pytest.MonkeyPatch, fails: int) -> Failing:
        objective = Failing(fails=fails)
        monkeypatch.setitem(METHODS, "failing", Method("for tests", Dense(), objective))
        return objective

    def test_the_batch_starts_again_once_with_smaller_steps(
        self, vit: VisionTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        objective = self.failing(monkeypatch, 1)
        with caplog.at_level("WARNING", "dfq"):
            made = one(vit, plan_of(method="failing", learning_rate=0.2), 1)
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.getMessage() == (
            "batch 1: the inversion left the finite numbers within 5 iterations; once more with learning rate 0.05"
        )
        assert RESTART_SLOWDOWN == 4
        assert [len(steps) for steps in objective.started] == [5, 5]
        # From the same start, with the same labels and moves.
        expected = one(vit, plan_of(method="dense", learning_rate=0.05), 1)
        assert torch.equal(made.images, expected.images)
        assert torch.equal(made.labels, expected.labels)

    def test_other_batches_are_as_fast_as_ever(self, vit: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing(monkeypatch, 1)
        made, plain = make(vit, plan_of(method="failing")), make(vit, plan_of(method="dense"))
        assert torch.equal(made.images[2:], plain.images[2:])
        assert not torch.equal(made.images[:2], plain.images[:2])

    def test_a_batch_that_fails_again_is_named(
        self, vit: VisionTransformer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        objective = self.failing(monkeypatch, 9)
        before = [(module.training, len(module._forward_hooks)) for module in vit.modules()]
        with pytest.raises(DfqError) as raised:
            make(vit, plan_of(method="failing", seed=7), tmp_path)
        assert str(raised.value) == (
            "batch 0 of seed 7: the inversion left the finite numbers within 5 iterations, also with learning rate "
            "0.0625; try --precision fp32, and check the model's weights"
        )
        assert len(objective.started) == 2
        assert [(module.training, len(module._forward_hooks)) for module in vit.modules()] == before
        assert sorted(files(tmp_path)) == ["manifest.json"]

    def test_a_trace_shows_only_the_run_that_counted(
        self, vit: VisionTransformer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """The first try fails late, the second is good enough early: what was seen of the first is not shown."""
        traces: list[Trace] = []
        monkeypatch.setattr(making, "write_trace", lambda trace, path, **_: traces.append(trace))
        labels = one(vit, plan_of(method="dense"), 0).labels
        objective = Failing(at=25)
        settings = Settings(iterations=40, enough=1.0)
        monkeypatch.setitem(METHODS, "failing", Method("for tests", Dense(), objective, settings))

        def answer(_module: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor | None:
            """To a look: undecided in the first try, certain in the second."""
            if torch.is_grad_enabled():
                return None
            return 50.0 * (len(objective.started) - 1) * torch.nn.functional.one_hot(labels, 5)

        vit.register_forward_hook(answer)
        made = make(vit, plan_of(method="failing", iterations=None, num_images=2), tmp_path, trace=True)
        assert len(objective.started) == 2
        assert made.iterations.tolist() == [10, 10]
        assert max(at for at, _, _ in traces[0].snapshots) == 10


class TestMemory:
    def test_a_batch_runs_in_parts_that_fit(self, vit: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = one(vit, plan_of(method="dense", num_images=5, batch_size=5, iterations=3), 0)
        sizes: set[int] = set()
        vit.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
        for fitting, expected in ((2, {2, 1}), (99, {5}), (None, {5})):
            sizes.clear()
            monkeypatch.setattr(making, "images_that_fit", lambda vit, dtype, fitting=fitting: fitting)
            made = one(vit, plan_of(method="dense", num_images=5, batch_size=5, iterations=3), 0)
            assert sizes == expected
            # 8-bit pixels: one may be rounded the other way.
            assert (made.images.int() - whole.images.int()).abs().float().mean() < 0.01

    def test_that_is_asked_in_the_precision_of_the_passes(
        self, vit: VisionTransformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[torch.dtype] = []
        monkeypatch.setattr(memory, "memory_bytes", lambda device: None)
        monkeypatch.setattr(making, "images_that_fit", lambda vit, dtype: asked.append(dtype))
        for precision in ("fp32", "bf16"):
            one(vit, plan_of(precision=precision), 0)
        assert asked == [torch.float32, torch.bfloat16]

    def test_a_model_that_runs_out_of_memory(
        self, vit: VisionTransformer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = plan_of(num_images=3, batch_size=3, iterations=4)
        expected = one(vit, plan, 0)
        # As many as the batch seem to fit; the pass of one image that says so is left alone.
        monkeypatch.setattr(making, "images_that_fit", lambda vit, dtype: 3)
        most = 1

        def allocate(_module: object, inputs: tuple[torch.Tensor]) -> None:
            if len(inputs[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        vit.blocks[1].register_forward_pre_hook(allocate)
        with caplog.at_level("WARNING", "dfq"):
            made = one(vit, plan, 0)
        assert caplog.text.count("out of memory: going on with") == 2  # 3 -> 2 -> 1
        assert torch.equal(made.mask, expected.mask)
        assert (made.images.int() - expected.images.int()).abs().float().mean() < 0.01
        most = 0
        with pytest.raises(DfqError, match="not even one image at a time fits into memory"):
            one(vit, plan, 0)


class TestPictures:
    """What `generate` has drawn, and where."""

    @pytest.fixture
    def drawn(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(making, "write_preview", lambda *given: calls.append(("preview", *given)))
        monkeypatch.setattr(
            making,
            "write_trace",
            lambda trace, path, *, labels, class_names: calls.append(("trace", trace, path, labels, class_names)),
        )
        return calls

    def test_captions_have_the_names_of_the_classes(
        self, vit: VisionTransformer, drawn: list[Any], tmp_path: Path
    ) -> None:
        names = ("ant", "bee", "cat", "dog", "eel")
        made = make(vit, plan_of(), tmp_path, class_names=names, trace=True)
        (_, trace, trace_path, labels, trace_names), (_, shown, preview_path, preview_names) = drawn
        assert (trace_path, preview_path) == (tmp_path / "trace.png", tmp_path / "preview.png")
        assert (trace_names, preview_names) == (names, names)
        assert torch.equal(shown.images, made.images)
        # Of the first batch.
        assert labels.tolist() == made.labels[:2].tolist()
        assert {len(images) for _, images, _ in trace.snapshots} == {2}

    @pytest.mark.parametrize("method", ["dense", "sparse", "rebirth"])
    def test_the_trace_ends_with_the_images_of_the_set(
        self, vit: VisionTransformer, drawn: list[Any], tmp_path: Path, method: str
    ) -> None:
        made = make(vit, plan_of(method=method, num_images=6, iterations=7), tmp_path, trace=True)
        _, trace, _, labels, _ = drawn[0]
        schedule: PatchSchedule | None = METHODS[method].schedule
        assert schedule is not None
        images_per_canvas = schedule.images_per_canvas
        (first, started, everything), *_, (last, ended, mask) = trace.snapshots
        assert (first, last) == (0, 7)
        assert everything.all()
        assert {0, *schedule.decisions(7), 7} <= {at for at, _, _ in trace.snapshots}
        assert torch.equal(started, one(vit, plan_of(method="gaussian", num_images=2), 0).images)
        # Of a canvas the last of its images.
        kept = slice(images_per_canvas - 1, 2 * images_per_canvas, images_per_canvas)
        assert torch.equal(ended, made.images[kept])
        assert torch.equal(mask, made.mask[kept])
        assert labels.tolist() == made.labels[kept].tolist()

    def test_no_trace_unless_asked_for(self, vit: VisionTransformer, drawn: list[Any], tmp_path: Path) -> None:
        make(vit, plan_of(), tmp_path / "a")
        make(vit, plan_of(), trace=True)  # nowhere to leave it
        make(vit, plan_of(method="gaussian"), tmp_path / "b", trace=True)  # nothing came about
        assert [call[0] for call in drawn] == ["preview", "preview"]

    def test_they_are_pictures(self, vit: VisionTransformer, tmp_path: Path) -> None:
        make(vit, plan_of(), tmp_path, trace=True)
        for name in ("preview.png", "trace.png"):
            with Image.open(tmp_path / name) as picture:
                assert picture.format == "PNG"
                assert min(picture.size) > 100

    def test_tracing_changes_no_image(self, vit: VisionTransformer, tmp_path: Path) -> None:
        traced, plain = make(vit, plan_of(), tmp_path / "a", trace=True), make(vit, plan_of())
        assert torch.equal(traced.images, plain.images)

    def test_a_run_that_goes_on_after_its_first_batch_says_that_there_is_no_trace(
        self, vit: VisionTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        make(vit, plan_of(), tmp_path)
        with caplog.at_level("INFO", "dfq"):
            make(vit, plan_of(), tmp_path, trace=True)
        assert not (tmp_path / "trace.png").exists()
        assert "trace" in caplog.text


class TestOnDisk:
    def test_what_is_made_is_what_is_loaded(self, vit: VisionTransformer, tmp_path: Path) -> None:
        made = make(vit, plan_of(), tmp_path)
        loaded = load_calibration_set(tmp_path)
        for name in ("images", "mask", "labels", "confidence", "iterations"):
            assert torch.equal(getattr(made, name), getattr(loaded, name))
        assert loaded.run == made.run
        shards = [f"shard-{index:05d}.safetensors" for index in range(3)]
        assert sorted(files(tmp_path)) == ["manifest.json", "preview.png", *shards]

    def test_a_run_that_was_stopped_makes_the_same_files(
        self, vit: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make(vit, plan_of(), tmp_path / "whole")
        stopped, again, finished = Counted(fails_at=1), Counted(), Counted()

        monkeypatch.setattr(making, "make_batch", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(vit, plan_of(), tmp_path / "set")
        assert sorted(files(tmp_path / "set")) == ["manifest.json", "shard-00000.safetensors"]
        with pytest.raises(DfqError, match="is unfinished"):
            load_calibration_set(tmp_path / "set")

        monkeypatch.setattr(making, "make_batch", again)
        make(vit, plan_of(), tmp_path / "set")
        assert files(tmp_path / "set") == files(tmp_path / "whole")

        monkeypatch.setattr(making, "make_batch", finished)
        make(vit, plan_of(), tmp_path / "set")
        assert files(tmp_path / "set") == files(tmp_path / "whole")
        assert (stopped.batches, again.batches, finished.batches) == ([0], [1, 2], [])

    def test_every_method_goes_on_too(
        self, vit: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A schedule once came back from the manifest as another: a list is no tuple."""
        plans = [plan_of(method=name, num_images=2, iterations=4) for name in METHODS]
        plans += [plan_of(method="smi", num_images=2, schedule=ProgressiveStop((1, 2)), initial="pink")]
        for index, plan in enumerate(plans):
            make(vit, plan, tmp_path / str(index))
        again = Counted()
        monkeypatch.setattr(making, "make_batch", again)
        for index, plan in enumerate(plans):
            make(vit, plan, tmp_path / str(index))
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
