from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.special import log_softmax
from scipy.stats import norm
from torch import Tensor
from torch.nn import functional as F

from calibration import objectives
from calibration.attention import Attention, capture
from calibration.errors import DfqError
from calibration.objectives import (
    Loss,
    Objective,
    Scene,
    Step,
    bounded_variation,
    cross_entropy,
    gaussian_mixtures,
    patch_similarity_entropy,
    soft_targets,
    total_variation,
)
from calibration.tokens import PatchGrid

LOGITS = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)) * 5
LABELS = torch.tensor([4, 0])
GRID = PatchGrid(4, 4, 8, 8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scene_of(vit: Any = None, *, count: int = 2, seed: int = 0, grid: PatchGrid = GRID) -> Scene:
    return Scene(vit, grid, count, torch.device("cpu"), torch.Generator().manual_seed(seed))


def step_of(attention: Attention | None = None, *, rows: slice = slice(0, 2), patches: Tensor | None = None) -> Step:
    patches = torch.arange(16).expand(2, -1) if patches is None else patches
    return Step(LOGITS[rows], LABELS[rows], rows, patches, Attention() if attention is None else attention)


class TestCrossEntropy:
    def test_of_class_indices(self) -> None:
        expected = -log_softmax(LOGITS.double().numpy(), axis=1)[[0, 1], [4, 0]]
        assert cross_entropy(LOGITS, LABELS).numpy() == pytest.approx(expected, rel=1e-5)

    def test_of_probabilities(self) -> None:
        targets = random(2, 6, seed=1).softmax(1)
        expected = -(targets.double().numpy() * log_softmax(LOGITS.double().numpy(), axis=1)).sum(1)
        assert cross_entropy(LOGITS, targets).numpy() == pytest.approx(expected, rel=1e-5)

    def test_is_taken_in_float32(self) -> None:
        logits = LOGITS.bfloat16()
        value = cross_entropy(logits, LABELS)
        assert value.dtype == torch.float32
        assert value.numpy() == pytest.approx(-log_softmax(logits.double().numpy(), axis=1)[[0, 1], [4, 0]], rel=1e-5)


class TestSoftTargets:
    def test_logits_are_as_published(self) -> None:
        labels = torch.arange(200)
        targets = soft_targets(labels, 1000, torch.Generator().manual_seed(0))
        assert targets.shape == (200, 1000)
        assert targets.sum(1).tolist() == pytest.approx([1] * 200, rel=1e-5)
        assert torch.equal(targets.argmax(1), labels)
        # Logits are known but for a shift; that of the other 999 is theirs from a mean of 0.
        logits = targets.double().log()
        others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
        rest = logits[others].view(200, 999)
        wanted = logits[~others] - rest.mean(1)
        assert (rest - rest.mean(1, keepdim=True)).std().item() == pytest.approx(1, abs=0.01)
        assert wanted.min() > 5 - 0.15
        assert wanted.max() < 10 + 0.15
        assert wanted.mean().item() == pytest.approx(7.5, abs=0.4)

    def test_hang_on_the_generator_alone(self) -> None:
        one, same, other = (soft_targets(LABELS, 6, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def plain_total_variation(x: Tensor) -> Tensor:
    differences = (
        x[..., :, :-1] - x[..., :, 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., :-1, :-1] - x[..., 1:, 1:],
        x[..., :-1, 1:] - x[..., 1:, :-1],
    )
    return torch.stack([difference.norm() for difference in differences]).sum()


class TestTotalVariation:
    def test_by_hand(self) -> None:
        image = torch.tensor([[[[0.0, 3.0], [4.0, 12.0]]]])
        # Differences: beside (-3, -8), below (-4, -9), diagonal -12, other diagonal -1.
        assert total_variation(image).item() == pytest.approx(73**0.5 + 97**0.5 + 12 + 1)

    def test_gradient_by_hand(self) -> None:
        image = torch.tensor([[[[0.0, 3.0], [4.0, 12.0]]]], requires_grad=True)
        (gradient,) = torch.autograd.grad(total_variation(image), image)
        beside, below = 73**0.5, 97**0.5
        top_left, top_right = -3 / beside - 4 / below - 1, 3 / beside - 9 / below - 1
        bottom_left, bottom_right = -8 / beside + 4 / below + 1, 8 / beside + 9 / below + 1
        assert gradient.flatten().tolist() == pytest.approx([top_left, top_right, bottom_left, bottom_right])

    def test_agrees_with_numpy(self) -> None:
        images = random(2, 3, 5, 7)
        x = images.double().numpy()
        down, right = np.diff(x, axis=2), np.diff(x, axis=3)
        differences = (down, right, down[..., 1:] + right[..., :-1, :], down[..., :-1] - right[..., :-1, :])
        value = total_variation(images)
        assert value.shape == ()
        assert value.item() == pytest.approx(sum(np.sqrt((d**2).sum()) for d in differences), rel=1e-6)

    def test_gradient_is_that_of_the_value(self) -> None:
        images = random(2, 3, 5, 7).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: 3 * total_variation(x), images)

    def test_gradient_agrees_with_autograd(self) -> None:
        images = random(2, 3, 32, 24).requires_grad_()
        (expected,) = torch.autograd.grad(plain_total_variation(images), images)
        (gradient,) = torch.autograd.grad(total_variation(images), images)
        torch.testing.assert_close(gradient, expected)

    def test_of_one_colour_is_zero_and_has_a_gradient(self) -> None:
        images = torch.full((1, 3, 4, 4), 0.7, requires_grad=True)
        value = total_variation(images)
        (gradient,) = torch.autograd.grad(value, images)
        assert value.item() == 0
        assert not gradient.any()

    def test_of_stripes_has_a_gradient(self) -> None:
        """Nothing differs downwards: that norm is zero, and the others are not."""
        images = random(1, 1, 1, 6).expand(1, 1, 5, 6).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(total_variation(images), images)
        assert gradient.isfinite().all()
        assert gradient.any()


class TestBoundedVariation:
    @staticmethod
    def target(**scene: Any) -> float:
        """What it asks for: its value where there is no variation at all."""
        return bounded_variation(scene_of(**scene))(torch.zeros(1, 3, 4, 4)).item()

    def test_the_target_as_published(self) -> None:
        grid = PatchGrid(14, 14, 16, 16)
        targets = [self.target(count=32, grid=grid, seed=seed) for seed in range(20)]
        assert 2500 <= min(targets) < 2600
        assert 2900 < max(targets) <= 3000

    def test_the_target_grows_as_a_norm_over_the_batch_does(self) -> None:
        published = self.target(count=32, grid=PatchGrid(14, 14, 16, 16))
        assert self.target(count=8, grid=PatchGrid(14, 14, 16, 16)) == pytest.approx(published / 2)
        assert self.target(count=2, grid=GRID) == pytest.approx(published * math.sqrt(2 / 32) * 32 / 224)

    @pytest.mark.parametrize("contrast", [0.1, 1.0])
    def test_distance_from_the_target_on_either_side(self, contrast: float) -> None:
        images = (contrast * random(2, 3, 32, 32)).requires_grad_()
        target, variation = self.target(), total_variation(images)
        value = bounded_variation(scene_of())(images)
        assert value.item() == pytest.approx(abs(variation.item() - target), rel=1e-5)
        (gradient,) = torch.autograd.grad(value, images)
        (towards,) = torch.autograd.grad(variation, images)
        torch.testing.assert_close(gradient, towards if variation > target else -towards)


def entropy_in_numpy(vectors: np.ndarray) -> float:
    """vectors: [windows, T, D] of one image -> the entropy of PSAQ-ViT, from its definition."""
    pairs = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for window in vectors for a in window for b in window]
    points = np.linspace(min(pairs), max(pairs), 10)
    density = np.array([norm.pdf(point, loc=pairs, scale=0.01).mean() for point in points]) + 1e-4
    return float(trapezoid(-density * np.log(density), points))


def plain_entropy(vectors: Tensor) -> Tensor:
    """vectors: [b, windows, T, D] -> [b], with the points constant."""
    similarities = F.cosine_similarity(vectors.unsqueeze(-2), vectors.unsqueeze(-3), dim=-1).flatten(1)
    ends = similarities.detach().amin(1), similarities.detach().amax(1)
    points = torch.stack([torch.linspace(a, b, 10, dtype=vectors.dtype) for a, b in zip(*ends, strict=True)])
    distances = (similarities.unsqueeze(1) - points.unsqueeze(-1)) / 0.01
    kernels = (-distances.square() / 2).exp() / (0.01 * math.sqrt(2 * math.pi))
    density = kernels.mean(-1) + 1e-4
    return torch.trapezoid(-density * density.log(), points)


def similarity_loss(*outputs: Tensor) -> Tensor:
    return patch_similarity_entropy(step_of(Attention(outputs=list(outputs))))


class TestPatchSimilarityEntropy:
    def test_agrees_with_its_definition(self) -> None:
        one, other = random(2, 9, 4) + 0.5, random(2, 5, 3, seed=1)
        expected = [-sum(entropy_in_numpy(x[[image]].double().numpy()) for x in (one, other)) for image in (0, 1)]
        assert similarity_loss(one, other).tolist() == pytest.approx(expected, rel=1e-4)

    def test_windows_of_an_image_share_a_density(self) -> None:
        windows = random(6, 4, 3)
        expected = [-entropy_in_numpy(windows[rows].double().numpy()) for rows in (slice(0, 3), slice(3, 6))]
        assert similarity_loss(windows).tolist() == pytest.approx(expected, rel=1e-4)

    def test_gradient_agrees_with_autograd(self) -> None:
        vectors = (random(6, 7, 3).double() + 0.5).requires_grad_()
        weights = torch.tensor([1.0, -2.5], dtype=torch.float64)
        (expected,) = torch.autograd.grad(-(weights * plain_entropy(vectors.view(2, 3, 7, 3))).sum(), vectors)
        (gradient,) = torch.autograd.grad((weights * similarity_loss(vectors)).sum(), vectors)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(gradient, expected)

    def test_diverse_patches_are_wanted(self) -> None:
        """Noise: all patches alike, or in as many directions as there are. A picture: every degree of likeness."""
        angles = torch.linspace(0, math.pi, 24)
        diverse = torch.stack([angles.cos(), angles.sin()], dim=-1)
        crowded = torch.tensor([[1.0, 0.0]] * 23 + [[-1.0, 0.0]])
        value = similarity_loss(torch.stack([diverse, crowded]))
        assert value[0] < value[1] - 0.3

    def test_its_gradient_makes_patches_more_diverse(self) -> None:
        vectors = (torch.tensor([1.0, 0, 0, 0]) + 0.05 * random(2, 12, 4)).requires_grad_()
        value = similarity_loss(vectors)
        (gradient,) = torch.autograd.grad(value.sum(), vectors)
        assert (similarity_loss((vectors - 1e-3 * gradient).detach()) < value).all()

    def test_an_image_does_not_depend_on_its_company(self, monkeypatch: pytest.MonkeyPatch) -> None:
        vectors = random(2, 9, 4).requires_grad_()
        together = similarity_loss(vectors)
        monkeypatch.setattr(objectives, "_MAX_KERNEL_VALUES", 1)
        apart = similarity_loss(vectors)
        alone = patch_similarity_entropy(step_of(Attention(outputs=[vectors[1:]]), rows=slice(1, 2)))
        torch.testing.assert_close(apart, together)
        torch.testing.assert_close(alone, together[1:])
        gradients = [torch.autograd.grad(value.sum(), vectors)[0] for value in (together, apart)]
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("case", ["identical", "zeros", "one zero", "one patch"])
    def test_degenerate_patches_have_a_finite_gradient(self, case: str) -> None:
        vectors = {
            "identical": torch.ones(2, 5, 4),
            "zeros": torch.zeros(2, 5, 4),
            "one zero": random(2, 5, 4) * (torch.arange(5) > 0).view(1, 5, 1),
            "one patch": random(2, 1, 4),
        }[case].requires_grad_()
        value = similarity_loss(vectors)
        (gradient,) = torch.autograd.grad(value.sum(), vectors)
        if case != "one zero":
            # One similarity has no spread, and an integral over no width is nothing.
            assert value.tolist() == pytest.approx([0, 0], abs=1e-4)
        assert value.isfinite().all()
        assert gradient.abs().max() < 100

    def test_without_what_was_to_be_captured(self) -> None:
        with pytest.raises(RuntimeError):
            similarity_loss()


class TestGaussianMixtures:
    def test_are_distributions_each_its_own(self) -> None:
        maps = gaussian_mixtures((3, 2, 4), PatchGrid(5, 7, 8, 8), torch.Generator().manual_seed(0))
        assert maps.shape == (3, 2, 4, 35)
        assert (maps > 0).all()
        assert maps.sum(-1).flatten().tolist() == pytest.approx([1] * 24, rel=1e-5)
        assert len({tuple(row) for row in maps.view(24, 35).tolist()}) == 24

    def test_hang_on_the_generator_alone(self) -> None:
        one, same, other = (gaussian_mixtures((2,), GRID, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_components(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One axis-aligned blob over an even floor is a matrix of rank 1; five may have up to 5, and five maps do."""

        def ranks() -> set[int]:
            maps = gaussian_mixtures((200,), PatchGrid(12, 12, 8, 8), torch.Generator().manual_seed(0))
            blobs = (maps.double() - objectives.PRIOR_FLOOR / 144).view(200, 12, 12)
            return set(torch.linalg.matrix_rank(blobs, rtol=1e-5).tolist())

        assert ranks() == {1, 2, 3, 4, 5}
        monkeypatch.setattr(objectives, "PRIOR_COMPONENTS", 1)
        assert ranks() == {1}

    def test_centres_and_widths(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Single blobs: centred anywhere, of the standard deviations promised where the border does not cut them."""
        monkeypatch.setattr(objectives, "PRIOR_COMPONENTS", 1)
        maps = gaussian_mixtures((2000,), PatchGrid(50, 50, 4, 4), torch.Generator().manual_seed(0))
        rows = maps.double().view(2000, 50, 50).sum(2).numpy()
        positions = (np.arange(50) + 0.5) / 50
        centres = rows @ positions
        stds = np.sqrt((rows * (positions - centres[:, None]) ** 2).sum(1))
        assert centres.min() < 0.1
        assert centres.max() > 0.9
        middle = abs(centres - 0.5) < 0.05
        assert 0.05 <= stds[middle].min() < 0.08
        assert 0.18 < stds[middle].max() <= 0.25

    def test_no_blob_falls_between_patches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Half a patch wide at least: on a side of two patches, 1 and 3 deviations from their centres at worst."""
        monkeypatch.setattr(objectives, "PRIOR_COMPONENTS", 1)
        maps = gaussian_mixtures((1000,), PatchGrid(2, 2, 8, 8), torch.Generator().manual_seed(0))
        rows = maps.view(1000, 2, 2).sum(2)
        ratios = rows.amin(1) / rows.amax(1)
        assert math.exp(-(3**2 - 1**2) / 2) < ratios.min() < 0.05


def given_priors(monkeypatch: pytest.MonkeyPatch, maps: Tensor) -> list[tuple[int, ...]]:
    """Has attention_prior find `maps`; returns the shapes it asked for, as it asks."""
    shapes: list[tuple[int, ...]] = []

    def instead(shape: tuple[int, ...], _grid: PatchGrid, _generator: torch.Generator) -> Tensor:
        shapes.append(shape)
        return maps

    monkeypatch.setattr(objectives, "gaussian_mixtures", instead)
    return shapes


class TestAttentionPrior:
    def test_by_hand(self, make_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two heads, blocks 1 and 2 of 2, three patches in play of sixteen."""
        maps = torch.full((1, 2, 2, 16), 1 / 16)
        maps[0, 1, 0, [2, 5, 11]] = torch.tensor([0.1, 0.2, 0.1])
        assert given_priors(monkeypatch, maps) == []
        term = objectives.attention_prior(scene_of(make_vit(), count=1))
        even = torch.full((1, 2, 3), 1 / 3)
        deeper = torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.1]]])
        patches = torch.tensor([[2, 5, 11]])
        value = term(step_of(Attention(class_attention={0: even, 1: deeper}), rows=slice(0, 1), patches=patches))
        # Block 1 is as wanted. Block 2, l/L = 1: head 1 is to be (1/4, 1/2, 1/4); head 2 is (2/5, 2/5, 1/5) of what
        # it gives to patches and is to be (1/3, 1/3, 1/3). Times K = 3, squared, mean over patches and heads.
        first = (0.75**2 + 0.75**2) / 3
        second = (0.2**2 + 0.2**2 + 0.4**2) / 3
        assert value.tolist() == pytest.approx([(first + second) / 2], rel=1e-5)

    def test_blocks_weigh_by_their_depth(self, make_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes = given_priors(monkeypatch, torch.full((2, 3, 2, 16), 1 / 16))
        term = objectives.attention_prior(scene_of(make_vit(depth=4)))
        assert shapes == [(2, 3, 2)]
        even, one_patch = torch.ones(2, 2, 16), torch.eye(16)[0].expand(2, 2, 16)
        values = [
            term(step_of(Attention(class_attention={b: one_patch if b == block else even for b in (1, 2, 3)})))
            for block in (1, 2, 3)
        ]
        # All on one patch of 16: errors 16 (1 - 1/16) once and -1 fifteen times; squares (225 + 15) / 16 = 15.
        assert torch.stack(values).tolist() == [pytest.approx([15 * depth] * 2) for depth in (0.5, 0.75, 1.0)]

    def test_priors_stay_with_the_picture(self, make_vit: Any) -> None:
        """Rows say which images, patches say which patch: neither the part nor the move changes an image's loss."""
        term = objectives.attention_prior(scene_of(make_vit(), count=5))
        maps = random(5, 2, 2, 16).softmax(-1)

        def loss(rows: slice, patches: Tensor) -> Tensor:
            """Each token's attention is that of the patch it shows."""
            index = patches[:, None].expand(-1, 2, -1)
            attention = {block: maps[rows, block].gather(-1, index) for block in (0, 1)}
            return term(Step(LOGITS, LABELS, rows, patches, Attention(class_attention=attention)))

        whole = loss(slice(0, 5), torch.arange(16).expand(5, -1))
        order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(seed)) for seed in range(5)])
        assert len(set(whole.tolist())) == 5
        torch.testing.assert_close(loss(slice(0, 5), order), whole)
        torch.testing.assert_close(loss(slice(3, 5), order[:2]), whole[3:])

    def test_maps_far_from_all_patches_in_play(self, make_vit: Any) -> None:
        vit = make_vit()
        term = objectives.attention_prior(scene_of(vit, count=200, grid=PatchGrid(14, 14, 16, 16)))
        attention = {block: torch.ones(200, 2, 2, requires_grad=True) for block in (0, 1)}
        rows, patches = slice(0, 200), torch.tensor([[0, 1]]).expand(200, -1)
        value = term(Step(LOGITS, LABELS, rows, patches, Attention(class_attention=attention)))
        # Nothing is asked of two patches where all maps have only their even share.
        assert value.min() < 1e-4
        # K errors of at most 1, times K: no map can ask for more than everything on one of two patches.
        assert value.max() <= 1.5
        assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), list(attention.values())))

    def test_attention_to_no_patch_has_a_finite_gradient(self, make_vit: Any) -> None:
        term = objectives.attention_prior(scene_of(make_vit()))
        # Softmax of what a class token attends to that sees itself alone: exactly 0 elsewhere.
        logits = torch.tensor([200.0] + [0.0] * 16).expand(2, 2, 17).clone().requires_grad_()
        row = logits.softmax(-1)[..., 1:]
        (gradient,) = torch.autograd.grad(term(step_of(Attention(class_attention={0: row, 1: row}))).sum(), logits)
        assert gradient.isfinite().all()

    def test_a_model_without_a_class_token(self, make_vit: Any) -> None:
        vit = make_vit(class_token=False, global_pool="avg")
        message = "the objective attention_prior shapes the attention of a class token, and VisionTransformer has none"
        with pytest.raises(DfqError, match=re.escape(message)):
            Objective({"attention_prior": 1.0}).start(scene_of(vit))


class TestObjective:
    def test_the_published_loss(self) -> None:
        images = random(2, 3, 32, 32)
        loss = Objective().start(scene_of())
        assert torch.equal(loss.of_pass(step_of()), cross_entropy(LOGITS, LABELS))
        assert loss.of_pixels(images).item() == pytest.approx(1e-4 * total_variation(images).item())
        assert Objective().describe() == {"cross_entropy": 1.0, "total_variation": 1e-4}

    def test_terms_are_summed_by_their_weights(self) -> None:
        outputs, images = random(2, 9, 4), random(2, 3, 32, 32)
        weights = {
            "bounded_variation": 0.05,
            "cross_entropy": 2.0,
            "patch_similarity_entropy": 3.0,
            "total_variation": 0.1,
        }
        loss = Objective(weights).start(scene_of())
        expected = 2 * cross_entropy(LOGITS, LABELS) + 3 * similarity_loss(outputs)
        torch.testing.assert_close(loss.of_pass(step_of(Attention(outputs=[outputs]))), expected)
        pixels = 0.05 * bounded_variation(scene_of())(images) + 0.1 * total_variation(images)
        torch.testing.assert_close(loss.of_pixels(images), pixels)

    def test_without_terms_of_one_kind(self) -> None:
        of_pixels = Objective({"total_variation": 1.0}).start(scene_of())
        assert of_pixels.of_pass(step_of()).tolist() == [0, 0]
        of_pass = Objective({"cross_entropy": 1.0}).start(scene_of())
        assert of_pass.of_pixels(random(2, 3, 32, 32)).item() == 0

    @pytest.mark.parametrize(
        ("weights", "needs"),
        [
            ({"cross_entropy": 1.0, "total_variation": 1.0}, set()),
            ({"patch_similarity_entropy": 1.0}, {"outputs"}),
            ({"attention_prior": 1e-3, "patch_similarity_entropy": 1.0}, {"outputs", "class_attention"}),
            ({"cross_entropy": 1.0, "attention_prior": 0.0}, set()),
        ],
    )
    def test_needs(self, make_vit: Any, weights: dict[str, float], needs: set[str]) -> None:
        objective = Objective(weights)
        assert objective.needs == needs
        assert objective.start(scene_of(make_vit())).needs == needs

    def test_draws_do_not_hang_on_how_weights_are_written(self, make_vit: Any) -> None:
        weights = {"bounded_variation": 1.0, "attention_prior": 1.0}
        attention = Attention(class_attention={block: random(2, 2, 16).softmax(-1) for block in (0, 1)})

        def values(weights: dict[str, float]) -> list[Tensor]:
            loss = Objective(weights).start(scene_of(make_vit()))
            return [loss.of_pass(step_of(attention)), loss.of_pixels(torch.zeros(2, 3, 32, 32))]

        for one, other in zip(values(weights), values(dict(reversed(weights.items()))), strict=True):
            assert torch.equal(one, other)

    def test_terms_are_taken_in_float32_under_autocast(self) -> None:
        step = step_of(Attention(outputs=[random(2, 9, 4)]))
        loss = Objective({"patch_similarity_entropy": 1.0}).start(scene_of())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss.of_pass(step)
        assert torch.equal(value, loss.of_pass(step))

    @pytest.mark.parametrize("name", ["cross_entropy", "patch_similarity_entropy", "attention_prior"])
    def test_a_step_down_its_gradient_lowers_a_term(self, make_vit: Any, name: str) -> None:
        vit, images = make_vit(), random(3, 3, 32, 32)
        objective = Objective({name: 1.0})
        loss: Loss = objective.start(scene_of(vit, count=3))
        patches = torch.arange(16).expand(3, -1)

        def values(images: Tensor) -> Tensor:
            return loss.of_pass(Step(vit(images), torch.tensor([1, 2, 3]), slice(0, 3), patches, attention))

        with capture(vit, objective.needs) as attention:
            before = values(images.requires_grad_())
            (gradient,) = torch.autograd.grad(before.sum(), images)
            scale = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            assert (scale > 0).all()
            with torch.no_grad():
                after = values(images - 1e-2 * gradient / scale)
        assert (after < before).all()

    def test_an_unknown_term(self) -> None:
        message = (
            "unknown objective 'entropy': choose from cross_entropy, patch_similarity_entropy, attention_prior, "
            "total_variation, bounded_variation"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            Objective({"entropy": 1.0})

    @pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
    def test_a_weight_that_is_none(self, weight: float) -> None:
        message = f"the weight of cross_entropy must be a number from 0 up, not {weight}"
        with pytest.raises(ValueError, match=re.escape(message)):
            Objective({"cross_entropy": weight})

    @pytest.mark.parametrize("weights", [{}, {"cross_entropy": 0.0}])
    def test_nothing_to_minimise(self, weights: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="an objective needs a term with a weight above 0: choose from cross_"):
            Objective(weights)
