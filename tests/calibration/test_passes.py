from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from calibration.augment import STILL, Move
from calibration.errors import DfqError
from calibration.objectives import Loss, Objective, Scene, Step
from calibration.passes import Passes, open_passes, resolve_precision
from calibration.saliency import saliency_probe
from calibration.tokens import PatchGrid, token_gather

GRID = PatchGrid(4, 4, 8, 8)
CPU = torch.device("cpu")
ALL = torch.arange(16).expand(5, -1)
SOME = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(b))[:6].sort().values for b in range(5)])
LABELS = torch.tensor([3, 1, 4, 1, 0])
MOVE = Move(8, -16, True)  # whole patches, so that no look-up is off

OBJECTIVES = {
    "published": Objective(),
    "psaq": Objective({"cross_entropy": 1.0, "patch_similarity_entropy": 1.0}),
    "apa": Objective({"cross_entropy": 1.0, "attention_prior": 1.0}),
}
EVERY_OBJECTIVE = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def images_of(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def started(vit: VisionTransformer, objective: Objective, count: int = 5) -> Loss:
    return objective.start(Scene(vit, GRID, count, CPU, torch.Generator().manual_seed(0)))


@contextmanager
def passes_of(
    vit: VisionTransformer,
    objective: Objective | None = None,
    *,
    part: int = 5,
    sparse: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Passes]:
    loss = started(vit, objective or Objective())
    with open_passes(vit, loss, LABELS, dtype=dtype, sparse=sparse, count=part) as passes:
        yield passes


def gradient_of(passes: Passes, keep: Tensor, move: Move = STILL) -> tuple[Tensor, Tensor, Tensor]:
    return passes.gradient(images_of(), keep, move, move.patches(GRID))


@contextmanager
def memory_for(vit: VisionTransformer, most: int, fail: Callable[[], object]) -> Iterator[list[int]]:
    """Passes of more than `most` images `fail` halfway; yields how many images each pass had."""
    sizes: list[int] = []

    def allocate(_module: object, args: tuple[Tensor]) -> None:
        sizes.append(len(args[0]))
        if len(args[0]) > most:
            fail()

    hook = vit.blocks[1].mlp.register_forward_pre_hook(allocate)
    yield sizes
    hook.remove()


def as_on_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def as_on_windows() -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried")


def really() -> None:
    torch.empty(2**55, dtype=torch.uint8)


class TestGradient:
    @pytest.mark.parametrize("keep", [ALL, SOME], ids=["dense", "sparse"])
    @pytest.mark.parametrize("move", [STILL, MOVE, Move(3, 5)], ids=["still", "moved", "by less than a patch"])
    def test_is_that_of_the_mean_over_images(self, make_vit: Any, keep: Tensor, move: Move) -> None:
        vit = make_vit()
        images = images_of().requires_grad_()
        with token_gather(vit) as gather:
            gather.keep = move.patches(GRID)[keep]
            expected_logits = vit(move.images(images))
        expected_values = F.cross_entropy(expected_logits, LABELS, reduction="none")
        (expected,) = torch.autograd.grad(expected_values.mean(), images)
        with passes_of(vit) as passes:
            gradient, values, logits = gradient_of(passes, keep, move)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(values, expected_values)
        torch.testing.assert_close(logits, expected_logits)
        assert not any(tensor.requires_grad for tensor in (gradient, values, logits))

    @EVERY_OBJECTIVE
    @pytest.mark.parametrize("keep", [ALL, SOME], ids=["dense", "sparse"])
    @pytest.mark.parametrize("part", [1, 2, 4])
    def test_in_parts_is_the_one_at_once(self, make_vit: Any, objective: Objective, keep: Tensor, part: int) -> None:
        vit = make_vit()
        with passes_of(vit, objective) as passes:
            gradient, values, logits = gradient_of(passes, keep, MOVE)
        with passes_of(vit, objective, part=part) as passes, memory_for(vit, part, as_on_cuda) as sizes:
            in_parts = gradient_of(passes, keep, MOVE)
        assert sizes == {1: [1] * 5, 2: [2, 2, 1], 4: [4, 1]}[part]
        # Densities by kernels 0.01 wide magnify rounding.
        assert (in_parts[0] - gradient).norm() < 1e-3 * gradient.norm()
        torch.testing.assert_close(in_parts[1], values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(in_parts[2], logits)

    @pytest.mark.parametrize("keep", [ALL, SOME], ids=["dense", "sparse"])
    def test_an_objective_is_told_which_patches_it_sees(self, make_vit: Any, keep: Tensor) -> None:
        """The patch at each token, of the unmoved grid: by the pixels that were fed."""
        steps: list[Step] = []
        fed: list[Tensor] = []
        vit = make_vit()
        loss = started(vit, Objective())

        def remember(step: Step) -> Tensor:
            steps.append(step)
            return step.logits.sum(1) * 0

        watched = Loss(loss.needs, [(1.0, remember)], [])
        vit.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].detach().clone()))
        with open_passes(vit, watched, LABELS, dtype=torch.float32, sparse=True, count=2) as passes:
            gradient_of(passes, keep, MOVE)
        assert [step.rows for step in steps] == [slice(0, 2), slice(2, 4), slice(4, 6)]
        assert [len(step.targets) for step in steps] == [2, 2, 1]
        unmoved = GRID.patches_of(images_of()).flatten(1, 2)
        for step, moved in zip(steps, fed, strict=True):
            tokens = GRID.patches_of(moved).flatten(1, 2)
            rows = torch.arange(5)[step.rows]
            shown = tokens if keep is ALL else tokens[torch.arange(len(rows))[:, None], MOVE.patches(GRID)[keep[rows]]]
            for image, row in enumerate(rows.tolist()):
                assert torch.equal(shown[image].flip(-1), unmoved[row, step.patches[image]])

    def test_an_objective_of_pixels_alone_has_none(self, make_vit: Any) -> None:
        with passes_of(make_vit(), Objective({"total_variation": 1.0})) as passes:
            gradient, values, logits = gradient_of(passes, ALL)
        assert not gradient.any()
        assert not values.any()
        assert logits.any()

    def test_callers_under_no_grad(self, make_vit: Any) -> None:
        vit = make_vit()
        with passes_of(vit) as passes:
            expected = gradient_of(passes, SOME)
            with torch.no_grad():
                found = gradient_of(passes, SOME)
                assert not torch.is_grad_enabled()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))

    def test_images_are_not_touched(self, make_vit: Any) -> None:
        images = images_of()
        with passes_of(make_vit()) as passes:
            passes.gradient(images, ALL, STILL, STILL.patches(GRID))
        assert torch.equal(images, images_of())
        assert not images.requires_grad


class TestLogitsAndSaliency:
    @pytest.mark.parametrize("part", [1, 2, 5, 9])
    def test_logits_are_the_models(self, make_vit: Any, part: int) -> None:
        vit = make_vit()
        with token_gather(vit) as gather, torch.no_grad():
            gather.keep = SOME
            expected = vit(images_of())
        with passes_of(vit, part=part) as passes:
            torch.testing.assert_close(passes.logits(images_of(), SOME), expected)
            with torch.no_grad():
                torch.testing.assert_close(passes.logits(images_of(), ALL), vit(images_of()))

    @pytest.mark.parametrize("part", [1, 2, 5])
    def test_saliency_is_the_probes(self, make_vit: Any, part: int) -> None:
        vit = make_vit()
        with token_gather(vit) as gather, saliency_probe(vit) as probe, torch.no_grad():
            gather.keep, probe.active = SOME, True
            vit(images_of())
            expected = probe.scores
        with passes_of(vit, part=part) as passes:
            scores = passes.saliency(images_of(), SOME)
        assert scores.shape == (5, 6)
        torch.testing.assert_close(scores, expected)

    def test_opened_without_saliency(self, make_vit: Any) -> None:
        with passes_of(make_vit(), sparse=False) as passes:
            assert passes.logits(images_of(), ALL).shape == (5, 5)
            with pytest.raises(RuntimeError, match="opened without saliency"):
                passes.saliency(images_of(), ALL)

    def test_bfloat16_is_of_the_pass_alone(self, make_vit: Any) -> None:
        vit, kinds = make_vit(), []
        vit.blocks[1].mlp.fc1.register_forward_hook(lambda _, inputs, output: kinds.append(output.dtype))
        with passes_of(vit, dtype=torch.bfloat16) as passes:
            results = [*gradient_of(passes, SOME), passes.logits(images_of(), SOME), passes.saliency(images_of(), SOME)]
        assert set(kinds) == {torch.bfloat16}
        assert {tensor.dtype for tensor in results} == {torch.float32}


OUT_OF_MEMORY = pytest.mark.parametrize("fail", [as_on_cuda, as_on_windows, really])


class TestOutOfMemory:
    @OUT_OF_MEMORY
    @EVERY_OBJECTIVE
    def test_the_part_is_halved_and_the_result_the_same(
        self, make_vit: Any, objective: Objective, fail: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        vit = make_vit()
        with passes_of(vit, objective) as passes:
            expected = gradient_of(passes, SOME, MOVE)
        with passes_of(vit, objective) as passes, memory_for(vit, 2, fail) as sizes, caplog.at_level("WARNING", "dfq"):
            found = gradient_of(passes, SOME, MOVE)
            # 5 -> 3 -> 2, and it stays there.
            assert sizes == [5, 3, 2, 2, 1]
            gradient_of(passes, SOME, MOVE)
            assert sizes == [5, 3, 2, 2, 1, 2, 2, 1]
            assert passes.part == 2
        assert (found[0] - expected[0]).norm() < 1e-3 * expected[0].norm()
        torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)
        said = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert [message[: message.index(" images")] for message in said] == [
            "out of memory: going on with 3",
            "out of memory: going on with 2",
        ]

    def test_in_looks_and_maps_too(self, make_vit: Any) -> None:
        vit = make_vit()
        with passes_of(vit) as passes:
            logits, scores = passes.logits(images_of(), SOME), passes.saliency(images_of(), SOME)
        for most in (1, 3):
            with passes_of(vit) as passes, memory_for(vit, most, as_on_cuda):
                torch.testing.assert_close(passes.logits(images_of(), SOME), logits)
            with passes_of(vit) as passes, memory_for(vit, most, as_on_cuda):
                torch.testing.assert_close(passes.saliency(images_of(), SOME), scores)

    @OUT_OF_MEMORY
    def test_not_even_one_image(self, make_vit: Any, fail: Any) -> None:
        vit = make_vit()
        with (
            passes_of(vit) as passes,
            memory_for(vit, 0, fail) as sizes,
            pytest.raises(DfqError, match=r"^not even one image at a time fits into memory; "),
        ):
            gradient_of(passes, ALL)
        assert sizes == [5, 3, 2, 1]

    def test_other_errors_are_not_its_business(self, make_vit: Any) -> None:
        vit, error = make_vit(), RuntimeError("shapes cannot be multiplied (5x6 and 7x8)")

        def fail() -> None:
            raise error

        with (
            passes_of(vit) as passes,
            memory_for(vit, 0, fail) as sizes,
            pytest.raises(RuntimeError) as raised,
        ):
            gradient_of(passes, ALL)
        assert raised.value is error
        assert sizes == [5]

    @EVERY_OBJECTIVE
    def test_the_failed_pass_is_let_go_before_the_next(
        self, make_vit: Any, objective: Objective, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When the allocator is asked to give memory back, nothing of the pass is held: hooks captured some of it."""
        vit, held = make_vit(), []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with passes_of(vit, objective) as passes, memory_for(vit, 3, as_on_cuda):
            captured = passes.attention
            monkeypatch.setattr(
                torch.cuda, "empty_cache", lambda: held.append(len(captured.outputs) + len(captured.class_attention))
            )
            gradient_of(passes, SOME)
        assert held == [0]


class TestTheModelIsLeftAsItWas:
    @staticmethod
    def state_of(vit: VisionTransformer) -> list[Any]:
        return [
            [(name, id(m), m.training, getattr(m, "fused_attn", None)) for name, m in vit.named_modules()],
            [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in vit.modules()],
            [(parameter.requires_grad, parameter.grad) for parameter in vit.parameters()],
        ]

    @pytest.mark.parametrize("sparse", [True, False])
    @pytest.mark.parametrize("fail", [None, as_on_cuda, KeyboardInterrupt])
    @EVERY_OBJECTIVE
    def test_whatever_happens(self, make_vit: Any, objective: Objective, fail: Any, sparse: bool) -> None:
        vit = make_vit().train()
        vit.blocks[0].eval()
        vit.norm.requires_grad_(False)
        vit.blocks[0].attn.fused_attn = False
        before = self.state_of(vit)

        def stop() -> None:
            if fail is not None:
                fail()
                raise fail

        with memory_for(vit, 0, stop):
            try:
                with passes_of(vit, objective, sparse=sparse) as passes:
                    gradient_of(passes, SOME if sparse else ALL)
            except (DfqError, KeyboardInterrupt):
                assert fail is not None
            else:
                assert fail is None
        assert self.state_of(vit) == before

    def test_a_model_that_cannot_be_sparse(self, make_vit: Any) -> None:
        vit = make_vit(class_token=False, global_pool="avg")
        vit.global_pool = "something"
        before = self.state_of(vit)
        with pytest.raises(DfqError, match="use a dense method"), passes_of(vit):
            raise AssertionError("opened")
        assert self.state_of(vit) == before


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
