from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from scipy import stats
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import dfq
from calibration import inversion
from calibration.augment import STILL, Move, RollAndFlip
from calibration.calibration_set import to_pixels
from calibration.errors import DfqError
from calibration.inversion import DivergedError, Inverted, Progress, Settings, describe, invert, pixel_bounds
from calibration.objectives import Loss, Objective, Scene, Step, soft_targets, total_variation
from calibration.passes import Precision
from calibration.schedules import Choice, Dense, PatchSchedule, ProgressiveStop, Rebirth
from calibration.tokens import PatchGrid, token_gather
from calibration.trace import Trace

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
LOW, HIGH = (-2.0, -2.0, -1.0), (2.0, 3.0, 7 / 3)
GRID = PatchGrid(4, 4, 8, 8)

OBJECTIVES = {
    "published": Objective(),
    "psaq": Objective({"cross_entropy": 1.0, "patch_similarity_entropy": 1.0, "bounded_variation": 0.05}),
    "apa": Objective({"cross_entropy": 1.0, "attention_prior": 1.0, "bounded_variation": 0.05}),
}
SCHEDULES: dict[str, PatchSchedule] = {
    "dense": Dense(),
    "smi": ProgressiveStop((1, 3), 0.5),  # 16 -> 8 -> 4 patches
    "pri": Rebirth(3),  # 5, 5 and 6 patches
}
EVERY_OBJECTIVE = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=generator(seed))


@dataclass(frozen=True)
class Scripted(RollAndFlip):
    """Moves that are given instead of drawn, over and over."""

    moves: tuple[Move, ...] = (STILL,)

    def draw(self, count: int, image_size: tuple[int, int], generator: torch.Generator) -> list[Move]:
        return [self.moves[i % len(self.moves)] for i in range(count)]


@dataclass(frozen=True)
class Recorded(Objective):
    """The published objective, remembering the images [B, 3, H, W] that each step began with, and its passes."""

    steps: list[Tensor] = field(default_factory=list)
    passes: list[Step] = field(default_factory=list)

    def start(self, scene: Scene) -> Loss:
        loss = super().start(scene)

        def on_pass(step: Step) -> Tensor:
            self.passes.append(step)
            return torch.zeros(len(step.logits))

        def on_pixels(images: Tensor) -> Tensor:
            self.steps.append(images.detach().clone())
            return images.new_zeros(())

        return Loss(loss.needs, [*loss.pass_terms, (1.0, on_pass)], [*loss.pixel_terms, (1.0, on_pixels)])


def looks_of(vit: nn.Module, scores: Sequence[Sequence[float]] = ()) -> list[Tensor]:
    """The images [B, 3, H, W] of every pass without gradient, as they come: looks, and maps that choose patches.

    `scores` [passes, B], in nats, are the cross-entropies that the first of them are to find, instead of their own.
    """
    looked: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor | None:
        if torch.is_grad_enabled():
            return None
        looked.append(args[0].clone())
        if len(looked) > len(scores):
            return None
        # Class b of image b has probability exp(-score), the class after it all the rest.
        wanted = torch.arange(len(logits))
        answer = torch.full_like(logits, -math.inf)
        answer[wanted, wanted] = 0.0
        answer[wanted, wanted + 1] = torch.tensor(scores[len(looked) - 1]).expm1().log()
        return answer

    vit.register_forward_hook(look)
    return looked


def run(
    vit: VisionTransformer,
    *,
    iterations: int = 4,
    learning_rate: float = 0.25,
    enough: float | None = None,
    objective: Objective | None = None,
    schedule: PatchSchedule | None = None,
    augment: RollAndFlip | None = None,
    initial: Tensor | None = None,
    targets: Tensor | None = None,
    seed: int = 0,
    precision: Precision = "fp32",
    part: int | None = None,
    on_step: Callable[[Progress], None] | None = None,
    trace: Trace | None = None,
) -> Inverted:
    initial = noise() if initial is None else initial
    return invert(
        vit,
        initial,
        torch.arange(len(initial)) % vit.num_classes if targets is None else targets,
        mean=MEAN,
        std=STD,
        objective=objective or Objective(),
        schedule=schedule or Dense(),
        settings=Settings(
            iterations=iterations, learning_rate=learning_rate, enough=enough, augment=augment or RollAndFlip()
        ),
        generator=generator(seed),
        precision=precision,
        part=part,
        on_step=on_step,
        trace=trace,
    )


def of_their_patches(vit: VisionTransformer, made: Inverted) -> Tensor:
    """What the model itself makes of the images, of each with its own patches: logits [M, C]."""
    logits = []
    for image, keep in zip(made.images, made.keep, strict=True):
        with token_gather(vit) as gather, torch.no_grad():
            gather.keep = keep[None]
            logits.append(vit(image[None]))
    return torch.cat(logits)


def same_images(first: Inverted, second: Inverted, tolerance: float = 1e-4) -> None:
    """Up to rounding. Adam divides a gradient by its own size: where it is nearly nothing, signs may differ."""
    assert [keep.tolist() for keep in first.keep] == [keep.tolist() for keep in second.keep]
    assert (first.images - second.images).abs().mean() < tolerance
    torch.testing.assert_close(first.confidence, second.confidence, atol=10 * tolerance, rtol=0)


def of_reference(model: dfq.Model, iterations: int, schedule: PatchSchedule, augment: RollAndFlip) -> Inverted:
    return invert(
        model.module,
        noise(10),
        torch.arange(10),
        mean=model.preprocessing.mean,
        std=model.preprocessing.std,
        objective=Objective(),
        schedule=schedule,
        settings=Settings(iterations, augment=augment),
        generator=generator(),
        precision="fp32",
    )


def bounded(images: Tensor) -> Tensor:
    low, high = (torch.tensor(values).view(1, 3, 1, 1) for values in (LOW, HIGH))
    return torch.minimum(torch.maximum(images, low), high)


class TestWhatIsMade:
    @pytest.mark.parametrize("schedule", [Dense(), ProgressiveStop((5, 10, 15, 20))], ids=["dense", "sparse"])
    def test_the_model_sees_the_classes_it_was_asked_for(self, reference: dfq.Model, schedule: PatchSchedule) -> None:
        """Without jitter what is optimised is what is looked at afterwards: every class is seen, surely."""
        with torch.no_grad():
            before = reference.module(noise(10)).softmax(-1).diagonal()
        made = of_reference(reference, 60, schedule, Scripted())
        assert before.mean() < 0.2
        # The path of sixty steps differs with the number of threads; single images come out a few percent apart.
        assert made.confidence.mean() > 0.9
        assert made.confidence.min() > 0.8

    def test_with_the_published_jitter_too(self, reference: dfq.Model) -> None:
        """Digits are not themselves when flipped, so the wanted class is seen less surely."""
        made = of_reference(reference, 80, Dense(), RollAndFlip())
        assert made.confidence.mean() > 0.3

    def test_confidence_is_that_of_the_images_given(self, make_vit: Any) -> None:
        vit = make_vit()
        made = run(vit, schedule=ProgressiveStop((1,), 0.5), iterations=6)
        torch.testing.assert_close(made.confidence, of_their_patches(vit, made).softmax(-1).diagonal())

    def test_shapes_and_kinds(self, make_vit: Any) -> None:
        made = run(make_vit(), schedule=ProgressiveStop((1, 2), 0.5), initial=noise(3))
        assert (made.images.shape, made.images.dtype) == ((3, 3, 32, 32), torch.float32)
        assert [(keep.shape, keep.dtype) for keep in made.keep] == [((4,), torch.int64)] * 3  # 16 -> 8 -> 4
        assert made.confidence.shape == (3,)
        assert made.iterations == 4
        assert not made.images.requires_grad

    @pytest.mark.parametrize("iterations", [1, 2, 8])
    def test_pixels_are_between_black_and_white(self, make_vit: Any, iterations: int) -> None:
        initial = noise() * 5
        assert not torch.equal(initial, bounded(initial))
        images = run(make_vit(), iterations=iterations, initial=initial).images
        torch.testing.assert_close(images, bounded(images), rtol=0, atol=1e-6)

    def test_the_start_is_left_as_it_was(self, make_vit: Any) -> None:
        initial = noise()
        run(make_vit(), initial=initial)
        assert torch.equal(initial, noise())

    def test_the_seed_decides_the_moves_and_nothing_else_does(self, make_vit: Any) -> None:
        vit = make_vit()
        first = run(vit, iterations=8, schedule=ProgressiveStop((2,)))
        torch.manual_seed(99)
        again = run(vit, iterations=8, schedule=ProgressiveStop((2,)))
        other = run(vit, iterations=8, schedule=ProgressiveStop((2,)), seed=1)
        assert torch.equal(first.images, again.images)
        assert [keep.tolist() for keep in first.keep] == [keep.tolist() for keep in again.keep]
        assert not torch.equal(first.images, other.images)

    def test_callers_who_forbid_gradients_for_good(self, make_vit: Any) -> None:
        vit = make_vit()
        with torch.inference_mode(), pytest.raises(DfqError, match=r"torch\.inference_mode\(\) forbids them"):
            run(vit)

    def test_how_the_start_lies_in_memory_does_not_matter(self, make_vit: Any) -> None:
        vit, initial = make_vit(), noise()
        scattered = initial.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
        assert not scattered.is_contiguous()
        assert torch.equal(run(vit, initial=scattered).images, run(vit, initial=initial).images)

    def test_callers_under_no_grad(self, make_vit: Any) -> None:
        vit = make_vit()
        expected = run(vit)
        with torch.no_grad():
            assert torch.equal(run(vit).images, expected.images)
            assert not torch.is_grad_enabled()

    def test_torchs_own_generator_is_not_touched(self, make_vit: Any) -> None:
        vit, state = make_vit(), torch.random.get_rng_state()
        run(vit)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_bfloat16_runs_the_model_and_not_the_pixels(self, make_vit: Any) -> None:
        vit, kinds = make_vit(), []
        vit.blocks[0].attn.qkv.register_forward_hook(lambda _, inputs, output: kinds.append(output.dtype))
        objective = Recorded()
        made = run(vit, precision="bf16", objective=objective)
        assert set(kinds) == {torch.bfloat16}
        assert made.images.dtype == objective.passes[-1].logits.dtype == torch.float32
        assert not torch.equal(made.images, made.images.bfloat16().float())


class TestAnyObjectiveUnderAnySchedule:
    @EVERY_OBJECTIVE
    @EVERY_SCHEDULE
    def test_images_of_the_patches_that_the_schedule_leaves(
        self, make_vit: Any, objective: Objective, schedule: PatchSchedule
    ) -> None:
        vit = make_vit()
        made = run(vit, iterations=7, objective=objective, schedule=schedule, initial=noise(3))
        counts = {"dense": [16], "progressive_stop": [4], "rebirth": [5, 5, 6]}[schedule.describe()["name"]]
        assert [len(keep) for keep in made.keep] == counts * 3
        assert made.images.shape == (3 * len(counts), 3, 32, 32)
        assert made.images.isfinite().all()
        labels = torch.arange(3).repeat_interleave(len(counts))
        seen = of_their_patches(vit, made).softmax(-1).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(made.confidence, seen)

    @EVERY_OBJECTIVE
    @EVERY_SCHEDULE
    @pytest.mark.parametrize("part", [1, 2, 3])
    def test_a_batch_in_parts_is_the_one_made_at_once(
        self, make_vit: Any, objective: Objective, schedule: PatchSchedule, part: int
    ) -> None:
        """In double precision and small steps: densities by kernels 0.01 wide multiply a difference by 1e4 a step."""
        vit, sizes = make_vit().double(), []
        arguments = {"objective": objective, "schedule": schedule, "learning_rate": 1e-4}
        whole = run(vit, initial=noise(4).double(), **arguments)
        vit.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        same_images(run(vit, initial=noise(4).double(), **arguments, part=part), whole, 1e-7)
        assert set(sizes) == {1: {1}, 2: {2}, 3: {3, 1}}[part]

    def test_each_lowers_what_it_minimises(self, make_vit: Any) -> None:
        """The mean value of the passes, where nothing is moved: later than sooner, for all three."""
        for objective in OBJECTIVES.values():
            told: list[Progress] = []
            run(make_vit(), iterations=40, objective=objective, augment=Scripted(), on_step=told.append)
            assert told[-1].loss < told[0].loss


class TestAdam:
    def test_the_first_two_steps_are_adams(self, make_vit: Any) -> None:
        """Against Adam as its paper writes it, betas (0.5, 0.99), learning rate 0.25, clamped after each step."""
        vit, objective = make_vit(), Recorded()
        run(vit, iterations=3, objective=objective, augment=Scripted())
        x, m, v = noise().double(), 0.0, 0.0
        for t in (1, 2):
            images = x.float().requires_grad_(True)
            loss = F.cross_entropy(vit(images), torch.arange(2)) + 1e-4 * total_variation(images)
            (g,) = torch.autograd.grad(loss, images)
            m, v = 0.5 * m + 0.5 * g.double(), 0.99 * v + 0.01 * g.double() ** 2
            x = bounded(x - 0.25 * (m / (1 - 0.5**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8))
            difference = (objective.steps[t] - x).abs()
            # A gradient of nearly nothing divided by its own size is the only thing that may differ.
            assert difference.mean() < 1e-4
            assert (difference > 1e-2).float().mean() < 1e-3

    def test_the_settings_are_used(self, make_vit: Any) -> None:
        """After one step of Adam every pixel with a gradient has moved by the learning rate."""
        settings = Settings(iterations=1, learning_rate=0.125, augment=Scripted())
        initial = bounded(noise()) / 2
        made = invert(
            make_vit(),
            initial,
            torch.arange(2),
            mean=MEAN,
            std=STD,
            objective=Objective(),
            schedule=Dense(),
            settings=settings,
            generator=generator(),
            precision="fp32",
        )
        assert (made.images - initial).abs().median().item() == pytest.approx(0.125, rel=1e-3)

    def test_patches_that_are_moved_are_moved_back(self, make_vit: Any) -> None:
        """The gradient on the unmoved pixels, against autograd through the move."""
        vit, move, objective = make_vit(), Move(5, -3, True), Recorded({"cross_entropy": 1.0})
        run(vit, iterations=2, objective=objective, augment=Scripted(moves=(move,)), initial=bounded(noise()) / 2)
        images = objective.steps[0].requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(vit(move.images(images)), torch.arange(2)), images)
        clear = g.abs() > 1e-5
        assert clear.float().mean() > 0.9
        stepped = images.detach() - objective.steps[1]
        assert ((stepped > 0) == (g > 0))[clear].float().mean() > 0.999


class TestTheBest:
    SCORES = ((3.0, 1.0), (1.0, 4.0), (2.0, 0.5), (5.0, 9.0))

    @pytest.fixture(autouse=True)
    def _compare_every_iterate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inversion, "COMPARE_EVERY", 1)

    def test_the_best_iterate_of_each_image_is_kept(self, make_vit: Any) -> None:
        vit = make_vit()
        looked = looks_of(vit, self.SCORES)
        made = run(vit)
        assert torch.equal(made.images[0], looked[1][0])
        assert torch.equal(made.images[1], looked[2][1])
        assert len({images.sum().item() for images in looked[:4]}) == 4

    def test_iterates_are_compared_unmoved_after_their_step(self, make_vit: Any) -> None:
        vit, objective = make_vit(), Recorded()
        looked = looks_of(vit)
        run(vit, objective=objective, augment=Scripted(moves=(Move(8, 8, True),)))
        # The last pass looks at the best once more.
        assert len(looked) == 4 + 1
        for compared, following in zip(looked, objective.steps[1:], strict=False):
            assert torch.equal(compared, following)

    def test_by_cross_entropy(self, make_vit: Any) -> None:
        vit = make_vit()
        looked = looks_of(vit)
        made = run(vit, iterations=6)
        with torch.no_grad():
            entropies = torch.stack([F.cross_entropy(vit(x), torch.arange(2), reduction="none") for x in looked[:6]])
        for image, best in enumerate(entropies.argmin(0).tolist()):
            assert torch.equal(made.images[image], looked[best][image])

    def test_what_was_made_with_more_patches_is_not_the_best(self, make_vit: Any) -> None:
        vit = make_vit()
        # Two maps choose patches and find nothing wrong, then come the two iterates of the final ones.
        looked = looks_of(vit, ((0.0, 0.0), (0.0, 0.0), (1.0, 1.0), (2.0, 2.0)))
        made = run(vit, schedule=ProgressiveStop((1, 2)))
        assert len(looked) == 2 + 2 + 1
        assert torch.equal(made.images, looked[2])

    def test_the_last_among_equals(self, make_vit: Any) -> None:
        vit = make_vit()
        looked = looks_of(vit, [(1.0, 1.0)] * 4)
        made = run(vit)
        assert torch.equal(made.images, looked[3])
        assert not torch.equal(made.images, bounded(noise()))

    def test_only_now_and_then(self, make_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inversion, "COMPARE_EVERY", 4)
        vit = make_vit()
        looked, objective = looks_of(vit), Recorded()
        run(vit, iterations=11, schedule=ProgressiveStop((2,)), objective=objective)
        # A map at 2; looks 4 and 8 steps after it, at the end, and at the best.
        assert len(looked) == 1 + 3 + 1
        assert torch.equal(looked[1], objective.steps[6])
        assert torch.equal(looked[2], objective.steps[10])


class TestEnough:
    """Looks find the cross-entropies given; a batch of two images, and a look at every step."""

    @pytest.fixture(autouse=True)
    def _look_at_every_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inversion, "COMPARE_EVERY", 1)

    @staticmethod
    def iterations_of(vit: VisionTransformer, means: Sequence[float], **changes: Any) -> int:
        """How many are run, at most 30, where the looks find these means of two images."""
        looks_of(vit, [(mean - 0.05, mean + 0.05) for mean in means])
        return run(vit, **{"iterations": 30, "enough": 0.1} | changes).iterations

    def test_it_is_reached(self, make_vit: Any) -> None:
        assert self.iterations_of(make_vit(), [3, 2, 1, 0.2, 0.09, 3, 3]) == 5

    def test_to_the_nat(self, make_vit: Any) -> None:
        assert self.iterations_of(make_vit(), [3, 2.1, 2.01, 1.99], enough=2.0) == 4

    def test_of_the_batch_by_the_best_of_each_image(self, make_vit: Any) -> None:
        vit = make_vit()
        looks_of(vit, ((0.1, 4.0), (4.0, 2.0), (4.0, 0.1), (9.0, 9.0)))
        # Bests by then: 2.05, 1.05, 0.1.
        assert run(vit, iterations=30, enough=0.11).iterations == 3

    def test_nothing_gets_better(self, make_vit: Any) -> None:
        """One look to compare with, and five without progress."""
        assert self.iterations_of(make_vit(), [2.0] * 30) == 1 + inversion.PATIENCE == 6

    def test_it_gets_worse(self, make_vit: Any) -> None:
        assert self.iterations_of(make_vit(), [2.0 + look for look in range(30)]) == 6

    @pytest.mark.parametrize(("each", "iterations"), [(0.97, 30), (0.99, 6)])
    def test_progress_is_more_than_two_percent_a_look(self, make_vit: Any, each: float, iterations: int) -> None:
        assert self.iterations_of(make_vit(), [20 * each**look for look in range(30)]) == iterations

    def test_patience_begins_anew_with_progress(self, make_vit: Any) -> None:
        # Flat for four looks, lower at the sixth, flat for five.
        assert self.iterations_of(make_vit(), [9.0] * 5 + [8.0] * 30) == 5 + 1 + 5

    def test_never_before_the_schedule_has_settled(self, make_vit: Any) -> None:
        assert self.iterations_of(make_vit(), [0.06] * 9, schedule=ProgressiveStop((4,))) == 5
        assert self.iterations_of(make_vit(), [0.06] * 9, schedule=Rebirth(3)) == 21

    def test_never_beyond_the_budget(self, make_vit: Any) -> None:
        assert self.iterations_of(make_vit(), [20 - look for look in range(12)], iterations=9) == 9

    def test_not_asked_for(self, make_vit: Any) -> None:
        assert self.iterations_of(make_vit(), [0.06] * 20, iterations=9, enough=None) == 9

    def test_progress_and_result_are_of_the_iterations_that_were_run(self, make_vit: Any) -> None:
        told: list[Progress] = []
        self.iterations_of(make_vit(), [3, 2, 0.06], on_step=told.append)
        assert [(step.iteration, step.iterations) for step in told] == [(1, 30), (2, 30), (3, 30)]

    def test_a_longer_run_begins_with_the_shorter_one(self, reference: dfq.Model) -> None:
        arguments = {"mean": reference.preprocessing.mean, "std": reference.preprocessing.std, "precision": "fp32"}

        def go(settings: Settings) -> Inverted:
            return invert(
                reference.module,
                noise(4),
                torch.arange(4),
                objective=Objective(),
                schedule=Dense(),
                settings=settings,
                generator=generator(),
                **arguments,
            )

        soon = go(Settings(60, enough=0.5, augment=Scripted()))
        assert 1 < soon.iterations < 60
        until = go(Settings(soon.iterations, augment=Scripted()))
        assert torch.equal(soon.images, until.images)
        # The rule is about cross-entropy, of the images that are given back: no more than 0.5 nats on average.
        assert -soon.confidence.log().mean() <= 0.5
        sooner = go(Settings(soon.iterations - 1, augment=Scripted()))
        assert -sooner.confidence.log().mean() > 0.5


class TestSoftLabels:
    def test_enough_is_counted_from_what_the_labels_themselves_cost(
        self, make_vit: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A model that gives exactly the wanted distribution is done, though its cross-entropy is the labels' own."""
        monkeypatch.setattr(inversion, "COMPARE_EVERY", 1)
        targets = torch.tensor([[0.5, 0.2, 0.2, 0.05, 0.05], [0.1, 0.1, 0.6, 0.1, 0.1]])
        vit = make_vit()
        slope = torch.tensor(0.0)
        vit.head.register_forward_hook(lambda _m, _a, out: out * 0 + targets.log() + slope * torch.arange(5))
        assert run(vit, iterations=9, enough=1e-5, targets=targets).iterations == 1
        slope.fill_(0.3)
        given = (targets.log() + slope * torch.arange(5)).softmax(1)
        divergence = stats.entropy(targets.numpy(), given.numpy(), axis=1).mean()
        assert divergence > 0.01
        for enough, iterations in ((1.01 * divergence, 1), (0.99 * divergence, 1 + inversion.PATIENCE)):
            assert run(vit, iterations=9, enough=enough, targets=targets).iterations == iterations

    def test_confidence_is_of_the_wanted_class(self, make_vit: Any) -> None:
        vit = make_vit()
        labels = torch.tensor([3, 1])
        made = run(vit, targets=soft_targets(labels, 5, generator()))
        seen = of_their_patches(vit, made).softmax(-1)
        torch.testing.assert_close(made.confidence, seen[[0, 1], labels])

    def test_the_company_is_asked_for_too(self, reference: dfq.Model) -> None:
        """Half of each of two digits is what the model comes to see."""
        targets = torch.zeros(4, 10)
        targets[torch.arange(4), torch.arange(4)] = targets[torch.arange(4), torch.arange(4) + 5] = 0.5
        made = invert(
            reference.module,
            noise(4),
            targets,
            mean=reference.preprocessing.mean,
            std=reference.preprocessing.std,
            objective=Objective(),
            schedule=Dense(),
            settings=Settings(80, augment=Scripted()),
            generator=generator(),
            precision="fp32",
        )
        with torch.no_grad():
            seen = reference(made.images).softmax(-1)
        assert (seen - targets).abs().max() < 0.25


class TestRebirth:
    """Three images of one canvas: 5, 5 and 6 of 16 patches, at steps 2, 4 and 7 of 7."""

    def test_a_canvas_gives_its_images_in_a_row_and_in_order(self, make_vit: Any) -> None:
        """Those at the time of each decision, unmoved, with the most attended of the patches still in play."""
        vit, objective = make_vit(), Recorded()
        chosen: list[Choice] = []

        @dataclass(frozen=True)
        class Watched(Rebirth):
            def choose(self, keep: Tensor, scores: Tensor, decision: int) -> Choice:
                assert decision == len(chosen)
                chosen.append(super().choose(keep, scores, decision))
                return chosen[-1]

        made = run(vit, iterations=7, schedule=Watched(3), objective=objective)
        assert made.images.shape == (6, 3, 32, 32)
        for canvas in (0, 1):
            first, second, last = made.images[3 * canvas : 3 * canvas + 3]
            assert torch.equal(first, objective.steps[2][canvas])
            assert torch.equal(second, objective.steps[4][canvas])
            assert not torch.equal(last, second)
            assert [keep.tolist() for keep in made.keep[3 * canvas : 3 * canvas + 3]] == [
                chosen[0].finished[canvas].tolist(),
                chosen[1].finished[canvas].tolist(),
                chosen[1].stay[canvas].tolist(),
            ]

    @pytest.mark.parametrize("division", [1, 2, 3, 16])
    def test_masks_are_disjoint_and_cover_the_grid(self, make_vit: Any, division: int) -> None:
        made = run(make_vit(), iterations=16, schedule=Rebirth(division))
        assert len(made.keep) == 2 * division
        for canvas in (0, 1):
            patches = torch.cat(made.keep[canvas * division : (canvas + 1) * division])
            assert sorted(patches.tolist()) == list(range(16))

    def test_the_most_attended_leave_first(self, make_vit: Any) -> None:
        vit, objective, maps = make_vit(), Recorded(), []
        made = run(vit, iterations=6, schedule=Rebirth(2), objective=objective)
        attention = vit.blocks[-1].attn
        attention.fused_attn = False
        attention.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
        with torch.no_grad():
            vit(objective.steps[3])
        scores = maps[0].mean(1)[:, 0, 1:]
        expected = [sorted(row.argsort(descending=True)[:8].tolist()) for row in scores]
        assert [made.keep[0].tolist(), made.keep[2].tolist()] == expected

    def test_confidence_is_of_each_sparse_image_alone(self, make_vit: Any) -> None:
        vit = make_vit()
        made = run(vit, iterations=7, schedule=Rebirth(3))
        logits = of_their_patches(vit, made).softmax(-1)
        torch.testing.assert_close(made.confidence, logits[range(6), [0, 0, 0, 1, 1, 1]])
        with torch.no_grad():
            whole = vit(made.images).softmax(-1)[range(6), [0, 0, 0, 1, 1, 1]]
        assert (whole - made.confidence).abs().min() > 1e-4

    def test_every_image_is_seen_as_its_class(self, reference: dfq.Model) -> None:
        made = of_reference(reference, 120, Rebirth(2), Scripted())
        assert made.confidence.shape == (20,)
        assert made.confidence.mean() > 0.8

    def test_only_the_last_share_has_a_best_iterate(self, make_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inversion, "COMPARE_EVERY", 1)
        vit = make_vit()
        # A map, the confidence of the first images, then looks at the iterates after steps 4 to 6.
        looked = looks_of(vit, ((0.0, 0.0), (0.5, 0.5), (2.0, 1.0), (1.0, 2.0), (3.0, 3.0)))
        made = run(vit, iterations=6, schedule=Rebirth(2))
        assert torch.equal(made.images[1], looked[3][0])
        assert torch.equal(made.images[3], looked[2][1])


class TestPatches:
    def test_stopped_patches_stay_as_they_were(self, make_vit: Any) -> None:
        """Without total variation and without jitter they have no gradient at all."""
        schedule = ProgressiveStop((0,), 0.5)
        made = run(
            make_vit(),
            iterations=5,
            schedule=schedule,
            objective=Objective({"cross_entropy": 1.0}),
            augment=Scripted(moves=(Move(8, -16), Move(flip=True), Move(-8, 8, True))),
        )
        inside = GRID.to_pixels(GRID.mask_of(torch.stack(made.keep))).expand_as(made.images)
        assert inside.float().mean() == 0.5
        assert torch.equal(made.images[~inside], bounded(noise())[~inside])
        assert (made.images[inside] != bounded(noise())[inside]).float().mean() > 0.9

    def test_they_still_feel_total_variation(self, make_vit: Any) -> None:
        made = run(make_vit(), iterations=5, schedule=ProgressiveStop((0,), 0.5), augment=Scripted())
        outside = ~GRID.to_pixels(GRID.mask_of(torch.stack(made.keep))).expand_as(made.images)
        assert (made.images[outside] != bounded(noise())[outside]).float().mean() > 0.9

    def test_the_most_attended_patches_of_the_unmoved_image_stay(self, make_vit: Any) -> None:
        vit, objective, maps = make_vit(), Recorded(), []
        made = run(vit, iterations=4, schedule=ProgressiveStop((2,), 0.5), objective=objective)
        attention = vit.blocks[-1].attn
        attention.fused_attn = False
        attention.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
        with torch.no_grad():
            vit(objective.steps[2])
        scores = maps[0].mean(1)[:, 0, 1:]
        assert [keep.tolist() for keep in made.keep] == [
            sorted(row.argsort(descending=True)[:8].tolist()) for row in scores
        ]

    def test_only_the_remaining_patches_are_ranked_again(self, make_vit: Any) -> None:
        kept: list[Tensor] = []

        @dataclass(frozen=True)
        class Watched(ProgressiveStop):
            def choose(self, keep: Tensor, scores: Tensor, decision: int) -> Choice:
                assert scores.shape == keep.shape
                assert decision == len(kept)
                choice = super().choose(keep, scores, decision)
                kept.append(choice.stay)
                return choice

        made = run(make_vit(), schedule=Watched((0, 2), 0.5))
        assert [keep.shape[1] for keep in kept] == [8, 4]
        assert torch.equal(torch.stack(made.keep), kept[1])
        assert all(set(b.tolist()) < set(a.tolist()) for a, b in zip(*kept, strict=True))

    def test_decisions_beyond_the_budget_do_not_count(self, make_vit: Any) -> None:
        kept: list[int] = []
        made = run(
            make_vit(),
            iterations=12,
            schedule=ProgressiveStop((11, 12, 1000), 0.5),
            on_step=lambda progress: kept.append(progress.kept_patches),
        )
        assert [len(keep) for keep in made.keep] == [8, 8]
        assert kept == [16, 8]

    def test_dense_keeps_every_patch_in_order(self, make_vit: Any) -> None:
        assert [keep.tolist() for keep in run(make_vit()).keep] == [list(range(16))] * 2

    def test_the_model_is_fed_the_moved_images_and_unmoved_ones_where_patches_are_chosen(self, make_vit: Any) -> None:
        vit, objective, fed = make_vit(), Recorded(), []
        vit.patch_embed.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].detach().clone()))
        moves = (Move(3, -2), Move(0, 5, True), Move(-7, 1), Move(2, 2, True), Move(1, 0), Move(0, 1))
        run(vit, iterations=6, objective=objective, schedule=ProgressiveStop((3,)), augment=Scripted(moves=moves))
        # One map at the decision, the comparison at the end, and the confidence.
        assert len(fed) == 6 + 3
        del fed[3]
        used = [*moves[:2], STILL, STILL, *moves[4:]]
        for images, step, move in zip(fed, objective.steps, used, strict=False):
            assert torch.equal(images, move.images(step))

    def test_kept_patches_are_looked_up_where_the_move_put_them(self, make_vit: Any) -> None:
        """After whole-patch moves the tokens fed show the very same pixels as the kept patches of the still image."""
        vit, objective, fed = make_vit(), Recorded(), []
        vit.patch_embed.register_forward_pre_hook(
            lambda _, inputs: fed.append((inputs[0].detach().clone(), vit.patch_drop.keep))
        )
        moves = (STILL, Move(8, -16), Move(-24, 8, True), Move(0, 0, True))
        made = run(
            vit, iterations=4, objective=objective, schedule=ProgressiveStop((0,), 0.5), augment=Scripted(moves=moves)
        )

        def tiles(images: Tensor, keep: Tensor) -> Tensor:
            patches = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3).transpose(1, 2)
            return torch.stack([patches[b, keep[b]] for b in range(len(keep))])

        # First the map that chooses, last the comparison and the confidence.
        for (images, keep), step, move in zip(fed[1:-2], objective.steps, moves, strict=True):
            expected = tiles(step, torch.stack(made.keep))
            assert torch.equal(tiles(images, keep), expected.flip(-1) if move.flip else expected)


class TestTheModelIsLeftAsItWas:
    @staticmethod
    def state_of(vit: VisionTransformer) -> dict[str, Any]:
        return {
            "training": [module.training for module in vit.modules()],
            "fused": [getattr(module, "fused_attn", None) for module in vit.modules()],
            "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in vit.modules()],
            "trainable": [parameter.requires_grad for parameter in vit.parameters()],
            "gradients": [parameter.grad for parameter in vit.parameters()],
            "slots": [id(vit.patch_drop), id(vit.patch_embed.proj)],
            "weights": [tensor.sum().item() for tensor in vit.state_dict().values()],
        }

    @pytest.fixture
    def vit(self, make_vit: Any) -> VisionTransformer:
        """Partly frozen, partly in evaluation mode, partly unfused: no state that could be put back by guessing."""
        vit: VisionTransformer = make_vit(proj_drop_rate=0.5).train()
        vit.blocks[0].eval()
        vit.patch_embed.requires_grad_(False)
        vit.blocks[0].attn.fused_attn = False
        vit.blocks[1].attn.fused_attn = True
        return vit

    @EVERY_OBJECTIVE
    @EVERY_SCHEDULE
    def test_after_success(self, vit: VisionTransformer, objective: Objective, schedule: PatchSchedule) -> None:
        before = self.state_of(vit)
        run(vit, objective=objective, schedule=schedule)
        assert self.state_of(vit) == before

    @EVERY_OBJECTIVE
    def test_after_an_interrupt(self, vit: VisionTransformer, objective: Objective) -> None:
        before = self.state_of(vit)

        def interrupt(progress: Progress) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(vit, objective=objective, schedule=ProgressiveStop((0,)), on_step=interrupt)
        assert self.state_of(vit) == before

    def test_after_numbers_that_were_none(self, vit: VisionTransformer) -> None:
        nn.init.constant_(vit.head.bias, math.nan)
        before = self.state_of(vit)
        with pytest.raises(DivergedError):
            run(vit, schedule=Rebirth(2))
        after = self.state_of(vit)
        assert {name for name in before if before[name] != after[name]} <= {"weights"}  # NaN is not NaN

    def test_meanwhile_it_is_a_fixed_function(self, vit: VisionTransformer) -> None:
        seen, modules = [], list(vit.modules())

        def look(progress: Progress) -> None:
            seen.append(
                any(module.training for module in modules)
                or any(parameter.requires_grad for parameter in vit.parameters())
                or any(getattr(module, "fused_attn", False) for module in modules)
            )

        run(vit, iterations=12, on_step=look)
        assert seen == [False, False]


class TestTheTrace:
    """Of 12 iterations, in which patches are chosen at 3 and at 8."""

    STOPS = ProgressiveStop((3, 8), 0.5)

    @staticmethod
    def of(vit: VisionTransformer, schedule: PatchSchedule, **changes: Any) -> tuple[Trace, Inverted, Recorded]:
        trace, objective = Trace(GRID, MEAN, STD), Recorded()
        made = run(vit, iterations=12, schedule=schedule, trace=trace, objective=objective, **changes)
        return trace, made, objective

    @pytest.mark.parametrize("schedule", [Dense(), STOPS, Rebirth(3)], ids=SCHEDULES)
    def test_images_as_they_were(self, make_vit: Any, schedule: PatchSchedule) -> None:
        trace, made, objective = self.of(make_vit(), schedule)
        seen = {iteration: images for iteration, images, _ in trace.snapshots}
        assert {0, 12, *schedule.decisions(12)} <= set(seen)
        assert set(seen) <= {*Trace.moments(12), *Trace.moments(12, schedule.decisions(12)), *schedule.decisions(12)}
        for iteration, images in seen.items():
            if iteration < 12:
                assert torch.equal(images, to_pixels(objective.steps[iteration], MEAN, STD))
        last = made.images[schedule.images_per_canvas - 1 :: schedule.images_per_canvas]
        assert torch.equal(seen[12], to_pixels(last, MEAN, STD))

    def test_patches_in_play(self, make_vit: Any) -> None:
        def counts(schedule: PatchSchedule) -> dict[int, list[int]]:
            trace, _, _ = self.of(make_vit(), schedule)
            return {at: mask.flatten(1).sum(1).tolist() for at, _, mask in trace.snapshots}

        assert set(map(tuple, counts(Dense()).values())) == {(16, 16)}
        sparse = counts(self.STOPS)
        assert all(count == [16 if at < 3 else 8 if at < 8 else 4] * 2 for at, count in sparse.items())
        # Five patches have left at 4, five more at 8.
        reborn = counts(Rebirth(3))
        assert all(count == [16 if at < 4 else 11 if at < 8 else 6] * 2 for at, count in reborn.items())

    def test_of_a_run_that_was_enough_it_ends_there(self, make_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inversion, "COMPARE_EVERY", 1)
        vit = make_vit()
        looks_of(vit, ((1.0, 1.0), (0.01, 0.01)))
        trace, made, _ = self.of(vit, Dense(), enough=0.1)
        assert made.iterations == 2
        iterations = [at for at, _, _ in trace.snapshots]
        assert (iterations[0], iterations[-1]) == (0, 2)

    def test_it_changes_nothing(self, make_vit: Any) -> None:
        vit = make_vit()
        traced, plain = (run(vit, schedule=self.STOPS, trace=t) for t in (Trace(GRID, MEAN, STD), None))
        assert torch.equal(traced.images, plain.images)


class Failing(Objective):
    """The published objective, no number from its fourth iteration on."""

    def start(self, scene: Scene) -> Loss:
        loss, iteration = super().start(scene), itertools.count(1)

        def fail(step: Step) -> Tensor:
            return step.logits.sum(1) * (math.nan if next(iteration) == 4 else 0.0)

        return Loss(loss.needs, [*loss.pass_terms, (1.0, fail)], loss.pixel_terms)


class TestErrors:
    def test_a_schedule_needs_to_know_which_patches_matter(self, make_vit: Any) -> None:
        vit = make_vit(class_token=False, global_pool="avg")
        vit.global_pool = "something"
        with pytest.raises(DfqError, match="use a dense method"):
            run(vit, schedule=ProgressiveStop((1,)))

    @EVERY_SCHEDULE
    def test_a_model_without_a_class_token_has_pooled_tokens(self, make_vit: Any, schedule: PatchSchedule) -> None:
        vit = make_vit(class_token=False, global_pool="avg")
        assert run(vit, schedule=schedule).images.isfinite().all()

    def test_an_objective_needs_a_class_token(self, make_vit: Any) -> None:
        vit = make_vit(class_token=False, global_pool="avg")
        with pytest.raises(DfqError, match="attention_prior shapes the attention of a class token"):
            run(vit, objective=OBJECTIVES["apa"])

    def test_weights_that_are_no_numbers(self, make_vit: Any) -> None:
        vit = make_vit()
        nn.init.constant_(vit.head.bias, math.nan)
        for schedule in (Dense(), ProgressiveStop((1,))):
            with pytest.raises(DivergedError, match=r"^the inversion left the finite numbers within 4 iterations$"):
                run(vit, schedule=schedule)

    def test_a_loss_that_leaves_the_numbers_midway(self, make_vit: Any) -> None:
        with pytest.raises(DivergedError, match="within 10 iterations"):
            run(make_vit(), objective=Failing(), iterations=30)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"iterations": 0}, "inversion takes at least 1 iteration, not 0"),
            ({"learning_rate": 0.0}, r"the learning rate must be positive, not 0\.0"),
            ({"learning_rate": -1.0}, r"the learning rate must be positive, not -1\.0"),
            ({"learning_rate": math.nan}, "the learning rate must be .*, not nan"),
        ],
    )
    def test_settings_that_are_none(self, wrong: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)


def test_progress_is_told_every_ten_iterations_and_at_the_end(make_vit: Any) -> None:
    objective, told = Recorded(), []
    run(make_vit(), iterations=24, objective=objective, on_step=told.append)
    assert [(step.iteration, step.iterations) for step in told] == [(10, 24), (20, 24), (24, 24)]
    for step in told:
        images, logits = objective.steps[step.iteration - 1], objective.passes[step.iteration - 1].logits
        assert step.confidence == pytest.approx(logits.softmax(-1).diagonal().mean().item(), rel=1e-5)
        loss = F.cross_entropy(logits, torch.arange(2)) + 1e-4 * total_variation(images)
        assert step.loss == pytest.approx(loss.item(), rel=1e-5)
        assert step.kept_patches == 16


def test_bounds_by_hand() -> None:
    low, high = pixel_bounds(MEAN, STD, torch.device("cpu"))
    assert low.shape == high.shape == (1, 3, 1, 1)
    assert low.flatten().tolist() == pytest.approx(LOW)
    assert high.flatten().tolist() == pytest.approx(HIGH)


def test_the_description_survives_the_manifest_and_tells_the_published_numbers() -> None:
    described = describe(Objective(), ProgressiveStop(), Settings())
    assert describe(Objective(), ProgressiveStop(), Settings(enough=0.1)) == described | {"enough": 0.1}
    assert json.loads(json.dumps(described)) == described
    assert described == {
        "objective": {"cross_entropy": 1.0, "total_variation": 1e-4},
        "schedule": {"name": "progressive_stop", "stops": "in proportion", "ratio": 0.3},
        "optimiser": {"name": "adam", "learning_rate": 0.25, "betas": [0.5, 0.99]},
        "augment": {"roll_fraction": 0.125, "flip": 0.5},
        "iterations": 4000,
        "enough": None,
    }
