from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import dfq
from calibration import inversion
from calibration.augment import STILL, Move, RollAndFlip
from calibration.errors import DfqError
from calibration.inversion import (
    Inverted,
    Precision,
    Progress,
    Settings,
    describe,
    invert,
    pixel_bounds,
    resolve_precision,
)
from calibration.objectives import Objective, Step
from calibration.schedules import Dense, PatchSchedule, ProgressiveStop
from calibration.tokens import PatchGrid, token_gather

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
LOW, HIGH = (-2.0, -2.0, -1.0), (2.0, 3.0, 7 / 3)
GRID = PatchGrid(4, 4, 8, 8)


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
    """The published objective, remembering its steps and the iterates that were compared.

    `scores` [comparisons, B], where given, replace its own.
    """

    scores: tuple[tuple[float, ...], ...] = ()
    steps: list[Step] = field(default_factory=list)
    compared: list[Step] = field(default_factory=list)

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        loss, score = super().__call__(step)
        seen = Step(step.images.detach().clone(), step.logits.detach(), step.labels)
        if step.logits.requires_grad:
            self.steps.append(seen)
            return loss, score
        if self.scores:
            score = torch.tensor(self.scores[len(self.compared)])
        self.compared.append(seen)
        return loss, score


def run(
    vit: VisionTransformer,
    *,
    iterations: int = 4,
    objective: Objective | None = None,
    schedule: PatchSchedule | None = None,
    augment: RollAndFlip | None = None,
    initial: Tensor | None = None,
    seed: int = 0,
    precision: Precision = "fp32",
    on_step: Callable[[Progress], None] | None = None,
) -> Inverted:
    initial = noise() if initial is None else initial
    return invert(
        vit,
        initial,
        torch.arange(len(initial)) % vit.num_classes,
        mean=MEAN,
        std=STD,
        objective=objective or Objective(),
        schedule=schedule or Dense(),
        settings=Settings(iterations=iterations, augment=augment or RollAndFlip()),
        generator=generator(seed),
        precision=precision,
        on_step=on_step,
    )


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
        with token_gather(vit) as gather, torch.no_grad():
            gather.keep = made.keep
            probabilities = vit(made.images).softmax(-1)
        torch.testing.assert_close(made.confidence, probabilities.diagonal())

    def test_shapes_and_kinds(self, make_vit: Any) -> None:
        made = run(make_vit(), schedule=ProgressiveStop((1, 2), 0.5), initial=noise(3))
        assert (made.images.shape, made.images.dtype) == ((3, 3, 32, 32), torch.float32)
        assert (made.keep.shape, made.keep.dtype) == ((3, 4), torch.int64)  # 16 -> 8 -> 4
        assert made.confidence.shape == (3,)
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
        assert torch.equal(first.keep, again.keep)
        assert not torch.equal(first.images, other.images)

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
        assert made.images.dtype == objective.steps[-1].logits.dtype == torch.float32
        assert not torch.equal(made.images, made.images.bfloat16().float())


def _unfused(vit: VisionTransformer) -> VisionTransformer:
    for block in vit.blocks:
        block.attn.fused_attn = False
    return vit


class TestAdam:
    def test_the_first_two_steps_are_adams(self, make_vit: Any) -> None:
        """Against Adam as its paper writes it, betas (0.5, 0.99), learning rate 0.25, clamped after each step."""
        vit, objective = make_vit(), Recorded()
        run(vit, iterations=3, objective=objective, augment=Scripted())
        x, m, v = noise().double(), 0.0, 0.0
        for t in (1, 2):
            images = x.float().requires_grad_(True)
            loss, _ = Objective()(Step(images, vit(images), torch.arange(2)))
            (g,) = torch.autograd.grad(loss, images)
            m, v = 0.5 * m + 0.5 * g.double(), 0.99 * v + 0.01 * g.double() ** 2
            x = bounded(x - 0.25 * (m / (1 - 0.5**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8))
            difference = (objective.steps[t].images - x).abs()
            # A gradient of nearly nothing divided by its own size is the only thing that may differ.
            assert difference.mean() < 1e-4
            assert (difference > 1e-2).float().mean() < 1e-3


class TestTheBest:
    SCORES = ((3.0, 1.0), (1.0, 4.0), (2.0, 0.5), (5.0, 9.0))

    @pytest.fixture(autouse=True)
    def _compare_every_iterate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inversion, "COMPARE_EVERY", 1)

    def test_the_best_iterate_of_each_image_is_kept(self, make_vit: Any) -> None:
        objective = Recorded(scores=self.SCORES)
        made = run(make_vit(), objective=objective)
        assert torch.equal(made.images[0], objective.compared[1].images[0])
        assert torch.equal(made.images[1], objective.compared[2].images[1])
        assert len({step.images.sum().item() for step in objective.compared}) == 4

    def test_iterates_are_compared_unmoved_after_their_step(self, make_vit: Any) -> None:
        vit, objective = make_vit(), Recorded()
        run(vit, objective=objective, augment=Scripted(moves=(Move(8, 8, True),)))
        for compared, following in zip(objective.compared, objective.steps[1:], strict=False):
            assert torch.equal(compared.images, following.images)
        with torch.no_grad():
            assert torch.equal(objective.compared[0].logits, _unfused(vit)(objective.compared[0].images))

    def test_what_was_made_with_more_patches_is_not_the_best(self, make_vit: Any) -> None:
        objective = Recorded(scores=((1.0, 1.0), (2.0, 2.0)))
        made = run(make_vit(), objective=objective, schedule=ProgressiveStop((1, 2)))
        assert len(objective.compared) == 2
        assert torch.equal(made.images, objective.compared[0].images)
        assert torch.equal(made.images, objective.steps[3].images)

    def test_the_last_among_equals(self, make_vit: Any) -> None:
        objective = Recorded({"total_variation": 1.0})  # of the batch, so no image is better than another
        made = run(make_vit(), objective=objective)
        assert torch.equal(made.images, objective.compared[-1].images)
        assert not torch.equal(made.images, bounded(noise()))


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
        inside = GRID.to_pixels(GRID.mask_of(made.keep)).expand_as(made.images)
        assert inside.float().mean() == 0.5
        assert torch.equal(made.images[~inside], bounded(noise())[~inside])
        assert (made.images[inside] != bounded(noise())[inside]).float().mean() > 0.9

    def test_they_still_feel_total_variation(self, make_vit: Any) -> None:
        made = run(make_vit(), iterations=5, schedule=ProgressiveStop((0,), 0.5), augment=Scripted())
        outside = ~GRID.to_pixels(GRID.mask_of(made.keep)).expand_as(made.images)
        assert (made.images[outside] != bounded(noise())[outside]).float().mean() > 0.9

    def test_the_most_attended_patches_of_the_unmoved_image_stay(self, make_vit: Any) -> None:
        vit, objective, maps = make_vit(), Recorded(), []
        made = run(vit, iterations=4, schedule=ProgressiveStop((2,), 0.5), objective=objective)
        attention = vit.blocks[-1].attn
        attention.fused_attn = False
        attention.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
        with torch.no_grad():
            vit(objective.steps[2].images)
        scores = maps[0].mean(1)[:, 0, 1:]
        assert made.keep.tolist() == [sorted(row.argsort(descending=True)[:8].tolist()) for row in scores]

    def test_only_the_remaining_patches_are_ranked_again(self, make_vit: Any) -> None:
        kept: list[Tensor] = []

        @dataclass(frozen=True)
        class Watched(ProgressiveStop):
            def choose(self, keep: Tensor, scores: Tensor) -> Tensor:
                assert scores.shape == keep.shape
                kept.append(super().choose(keep, scores))
                return kept[-1]

        made = run(make_vit(), schedule=Watched((0, 2), 0.5))
        assert [keep.shape[1] for keep in kept] == [8, 4]
        assert torch.equal(made.keep, kept[1])
        assert all(set(b.tolist()) < set(a.tolist()) for a, b in zip(*kept, strict=True))

    def test_decisions_beyond_the_budget_do_not_count(self, make_vit: Any) -> None:
        kept: list[int] = []
        made = run(
            make_vit(),
            schedule=ProgressiveStop((1, 4, 1000), 0.5),
            on_step=lambda progress: kept.append(progress.kept_patches),
        )
        assert made.keep.shape == (2, 8)
        assert kept == [16, 8]

    def test_dense_keeps_every_patch_in_order(self, make_vit: Any) -> None:
        assert run(make_vit()).keep.tolist() == [list(range(16))] * 2

    def test_the_model_is_fed_the_moved_images_and_unmoved_ones_where_patches_are_chosen(self, make_vit: Any) -> None:
        vit, objective, fed = make_vit(), Recorded(), []
        vit.patch_embed.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].detach().clone()))
        moves = (Move(3, -2), Move(0, 5, True), Move(-7, 1), Move(2, 2, True), Move(1, 0), Move(0, 1))
        run(vit, iterations=6, objective=objective, schedule=ProgressiveStop((3,)), augment=Scripted(moves=moves))
        # One map at the decision, and the comparison at the end.
        assert len(fed) == 6 + 2
        del fed[3]
        used = [*moves[:2], STILL, STILL, *moves[4:]]
        for images, step, move in zip(fed, objective.steps, used, strict=False):
            assert torch.equal(images, move.images(step.images))

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

        # First the map that chooses, last the comparison.
        for (images, keep), step, move in zip(fed[1:-1], objective.steps, moves, strict=True):
            expected = tiles(step.images, made.keep)
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
            "slot": id(vit.patch_drop),
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

    def test_after_success(self, vit: VisionTransformer) -> None:
        before = self.state_of(vit)
        run(vit, schedule=ProgressiveStop((1,)))
        assert self.state_of(vit) == before

    def test_after_an_interrupt(self, vit: VisionTransformer) -> None:
        before = self.state_of(vit)

        def interrupt(progress: Progress) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(vit, schedule=ProgressiveStop((0,)), on_step=interrupt)
        assert self.state_of(vit) == before

    def test_meanwhile_it_is_a_fixed_function(self, vit: VisionTransformer) -> None:
        seen = []

        def look(progress: Progress) -> None:
            seen.append(
                any(module.training for module in vit.modules() if module is not vit.patch_drop)
                or any(parameter.requires_grad for parameter in vit.parameters())
                or any(getattr(module, "fused_attn", False) for module in vit.modules())
            )

        run(vit, on_step=look)
        assert seen == [False, False]


class TestErrors:
    def test_a_schedule_needs_a_class_token(self, make_vit: Any) -> None:
        vit = make_vit(class_token=False, global_pool="avg")
        with pytest.raises(DfqError, match="no class token"):
            run(vit, schedule=ProgressiveStop((1,)))
        assert not run(vit, schedule=Dense()).images.isnan().any()

    def test_weights_that_are_no_numbers(self, make_vit: Any) -> None:
        vit = make_vit()
        nn.init.constant_(vit.head.bias, math.nan)
        for schedule in (Dense(), ProgressiveStop((1,))):
            with pytest.raises(
                DfqError, match=r"the inversion loss left the real numbers; .*check the model's weights"
            ):
                run(vit, schedule=schedule)

    def test_a_loss_that_leaves_the_numbers_midway(self, make_vit: Any) -> None:
        class Failing(Recorded):
            def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
                loss, score = super().__call__(step)
                return (loss * math.nan if len(self.steps) == 3 else loss), score

        with pytest.raises(DfqError, match="left the real numbers"):
            run(make_vit(), objective=Failing())

    def test_no_iterations(self) -> None:
        with pytest.raises(ValueError, match="inversion takes at least 1 iteration, not 0"):
            Settings(iterations=0)


def test_progress_is_told_every_ten_iterations_and_at_the_end(make_vit: Any) -> None:
    objective, told = Recorded(), []
    run(make_vit(), iterations=14, objective=objective, on_step=told.append)
    assert [(step.iteration, step.iterations) for step in told] == [(1, 14), (11, 14), (14, 14)]
    for step in told:
        then = objective.steps[step.iteration - 1]
        assert step.confidence == pytest.approx(then.logits.softmax(-1).diagonal().mean().item(), rel=1e-5)
        assert step.loss == pytest.approx(Objective()(then)[0].item(), rel=1e-5)


def test_bounds_by_hand() -> None:
    low, high = pixel_bounds(MEAN, STD, torch.device("cpu"))
    assert low.shape == high.shape == (1, 3, 1, 1)
    assert low.flatten().tolist() == pytest.approx(LOW)
    assert high.flatten().tolist() == pytest.approx(HIGH)


@pytest.mark.parametrize("hardware", [True, False])
def test_auto_is_bfloat16_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch, hardware: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: hardware, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: hardware)
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        assert resolve_precision("auto", device) == (torch.bfloat16 if hardware else torch.float32)
        assert resolve_precision("fp32", device) == torch.float32
        assert resolve_precision("bf16", device) == torch.bfloat16
    assert resolve_precision("auto", torch.device("mps")) == torch.float32


def test_auto_where_torch_has_no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert resolve_precision("auto", torch.device("cpu")) == torch.float32


def test_the_description_survives_the_manifest_and_tells_the_published_numbers() -> None:
    described = describe(Objective(), ProgressiveStop(), Settings())
    assert json.loads(json.dumps(described)) == described
    assert described == {
        "objective": {"cross_entropy": 1.0, "total_variation": 1e-4},
        "schedule": {"name": "progressive_stop", "iterations": [50, 100, 200, 300], "ratio": 0.3},
        "optimiser": {"name": "adam", "learning_rate": 0.25, "betas": [0.5, 0.99]},
        "augment": {"roll_fraction": 0.125, "flip": 0.5},
        "iterations": 4000,
    }
