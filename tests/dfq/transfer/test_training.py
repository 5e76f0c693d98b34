"""Steps of a student, against gradients worked out by hand, and what of it they may change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.errors import DfqError, UsageError
from dfq.models import Model
from dfq.statistics import divergence
from dfq.transfer.pool import Pool, View
from dfq.transfer.student import load_student
from dfq.transfer.training import Training, optimizer_of, solve, step, trained

Images = Callable[..., CalibrationSet]
SGD = Training(optimizer="sgd")


def pool_of(teacher: Model, images: CalibrationSet) -> Pool:
    pool = Pool(View(teacher, torch.float32), 0)
    pool.add(images)
    return pool


def shown(pool: Pool, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture and its mask, alone in a batch."""
    ((_, image, mask),) = pool.batches(torch.tensor([number]))
    return image, mask


def weights(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def changed(model: Model, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.module.state_dict().items() if not torch.equal(value, before[name])}


def take_steps(student: Model, pool: Pool, training: Training, count: int = 1) -> list[float]:
    with trained(View(student, torch.float32), training) as trainee:
        optimizer = optimizer_of(trainee, training)
        chosen = torch.arange(len(pool))
        return [step(trainee, optimizer, pool, chosen, training.temperature) for _ in range(count)]


def test_the_divergence_by_hand() -> None:
    # At temperature 2 the teacher gives 3/4 and 1/4, the student one half each.
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.tensor([[1.0, 1.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert divergence(student, teacher, 2.0).tolist() == pytest.approx([expected])
    assert divergence(teacher, teacher + 3, 2.0).tolist() == pytest.approx([0.0], abs=1e-6)


def test_one_step_of_a_linear_student_by_hand(tiny: Callable[..., Model], images_for: Images) -> None:
    """Of T^2 KL, the gradient to a logit is T times the difference of the two probabilities at temperature T."""
    teacher, student = tiny(seed=1), tiny(seed=2)
    images = images_for(6)
    pool, before = pool_of(teacher, images), weights(student)
    module: Any = student.module
    pixels, _ = images.batches(6, torch.device("cpu"))[0]
    entering = module.forward_head(module.forward_features(pixels), pre_logits=True)
    error = (module(pixels) / 4).softmax(-1) - (teacher(pixels) / 4).softmax(-1)
    gradient = 4 * error.T @ entering / 6
    training = Training(optimizer="sgd", temperature=4.0, learning_rate=0.5, weight_decay=0.0)
    take_steps(student, pool, training)
    torch.testing.assert_close(module.head.weight, before["head.weight"] - 0.5 * gradient, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(module.head.bias, before["head.bias"] - 0.5 * 4 * error.mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("part", "free"),
    [
        ("linear", ("head.",)),
        ("last-1", ("head.", "norm.", "blocks.1.")),
        ("last-2", ("head.", "norm.", "blocks.1.", "blocks.0.")),
        ("full", ("",)),
    ],
)
def test_what_is_trained_and_nothing_else(
    tiny: Callable[..., Model], images_for: Images, part: str, free: tuple[str, ...]
) -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    before = weights(student)
    take_steps(student, pool_of(teacher, images_for()), Training(part, optimizer="adamw", learning_rate=0.01), 2)
    # Keys have a bias that softmax does not see.
    assert changed(student, before) == {name for name in before if name.startswith(free)}
    assert not student.module.training
    assert not any(parameter.requires_grad for parameter in student.module.parameters())


def test_a_linear_student_in_steps_of_pools_that_grow(tiny: Callable[..., Model], images_for: Images) -> None:
    """What enters the classifier is computed once per image: also for sparse images that come later."""
    teacher, student = tiny(seed=1), tiny(seed=2)
    sparse = torch.zeros(4, 4, 4, dtype=torch.bool)
    sparse[:2, 1:3], sparse[2:, 0] = True, True
    pool = pool_of(teacher, images_for(3))
    view = View(student, torch.float32)
    passes: list[int] = []
    student.module.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    with trained(view, SGD) as trainee:
        list(trainee.logits(pool, torch.arange(3)))
        pool.add(images_for(4, sparse))
        for _ in range(2):
            ((chosen, found),) = trainee.logits(pool, torch.tensor([5, 0, 3]))
        assert chosen.tolist() == [5, 0, 3]
        assert sum(passes) == 7
    expected = torch.cat([view(*shown(pool, i)) for i in (5, 0, 3)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_images_that_keep_different_numbers_of_patches_share_a_step(
    tiny: Callable[..., Model], images_for: Images
) -> None:
    """The mean is over images, however they are run."""
    teacher, student = tiny(seed=1), tiny(seed=2)
    mask = torch.ones(5, 4, 4, dtype=torch.bool)
    mask[3:, :2] = False
    pool = pool_of(teacher, images_for(5, mask))
    view = View(student, torch.float32)
    alone = [divergence(view(*shown(pool, i)), pool.logits[[i]], 20.0).item() for i in range(5)]
    (found,) = take_steps(student, pool, Training("full", optimizer="sgd", learning_rate=1e-6))
    assert found == pytest.approx(sum(alone) / 5, rel=1e-4)


def test_a_quantized_student_on_images_that_keep_different_numbers_of_patches(
    tiny: Callable[..., Model], images_for: Images
) -> None:
    """Their gradients go back through the same rounded weights."""
    teacher = tiny(seed=1)
    mask = torch.ones(5, 4, 4, dtype=torch.bool)
    mask[3:, :2] = False
    images = images_for(5, mask)
    quantized = dfq.quantize(teacher, "w3a8", calibration=images, recipe="repq", progress=False)
    before = quantized.tensors()
    training = Training("full", temperature=1.0).settled(quantized)
    with trained(View(quantized, torch.float32), training) as trainee:
        optimizer = optimizer_of(trainee, training)
        pool = pool_of(teacher, images)
        found = [step(trainee, optimizer, pool, torch.arange(5), 1.0) for _ in range(20)]
    assert found[-1] < found[0]
    assert any(not torch.equal(before[name], tensor) for name, tensor in quantized.tensors().items())


def test_a_quantized_student_that_takes_all_positions_sees_whole_images(
    tiny: Callable[..., Model], images_for: Images
) -> None:
    """What keeps means of positions apart cannot do without some of them: the others are in the mean colour, zeros."""
    teacher = tiny(seed=1)
    quantized = dfq.quantize(teacher, "w4a4", calibration=images_for(8), progress=False)
    mask = torch.ones(5, 4, 4, dtype=torch.bool)
    mask[:, :2] = False
    images = images_for(5, mask)
    shown = images.batches(5, torch.device("cpu"))[0][0].clone()
    shown[:, :, :16] = 0
    found = View(quantized, torch.float32)(images.images, images.mask)
    torch.testing.assert_close(found, quantized(shown))


def test_norms_over_batches_move_only_where_everything_is_trained(
    tiny: Callable[..., Model], images_for: Images
) -> None:
    teacher = tiny(seed=1)
    for part, moves in (("linear", False), ("last-1", False), ("full", True)):
        student = load_student("resnet10t", teacher, random_weights=True)
        before = weights(student)
        take_steps(student, pool_of(teacher, images_for()), Training(part, optimizer="sgd", learning_rate=1e-3))
        statistics = {name for name in changed(student, before) if "running" in name}
        assert bool(statistics) is moves, part
        assert not any(module.training for module in student.module.modules())


def test_the_rate_follows_half_a_cosine() -> None:
    training = Training()
    assert [training.share(at, 8) for at in (0, 4, 8)] == pytest.approx([1.0, 0.5, 0.0])
    assert Training(decay="constant").share(7, 8) == 1.0


@pytest.mark.parametrize("part", ["linear", "full"])
def test_accuracy_is_that_of_evaluate_at_every_measure(
    tiny: Callable[..., Model], images_for: Images, part: str
) -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    pool = pool_of(teacher, images_for())
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, 32, 32, generator=generator), index % 5) for index in range(70)]
    passes: list[int] = []
    student.module.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    training = Training(part, optimizer="sgd", learning_rate=0.1)
    with trained(View(student, torch.float32), training) as trainee:
        optimizer = optimizer_of(trainee, training)
        found = []
        for _ in range(3):
            step(trainee, optimizer, pool, torch.arange(5), 20.0)
            passes.clear()
            measured = trainee.top1(data)  # type: ignore[arg-type]
            looked_at = sum(passes)
            expected = dfq.evaluate(student, data, progress=False).top1  # type: ignore[arg-type]
            found.append(looked_at)
            assert measured == pytest.approx(expected)
    assert found == ([70, 0, 0] if part == "linear" else [70, 70, 70])


def test_accuracy_on_a_dataset_that_can_only_be_read_in_order(tiny: Callable[..., Model], images_for: Images) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            generator = torch.Generator().manual_seed(0)
            return iter([(torch.randn(3, 32, 32, generator=generator), index % 5) for index in range(20)])

    student = tiny(seed=2)
    with trained(View(student, torch.float32), SGD) as trainee:
        for _ in range(2):
            assert trainee.top1(Stream()) == dfq.evaluate(student, Stream(), progress=False).top1


def test_more_layers_than_there_are(tiny: Callable[..., Model], images_for: Images) -> None:
    with pytest.raises(UsageError, match="tiny has 2 layers between stem and classifier; last-3 asks for more"):
        take_steps(tiny(), pool_of(tiny(), images_for()), Training("last-3", optimizer="sgd"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"part": "head"}, "cannot train 'head' of a student"),
        ({"part": "last-0"}, "cannot train 'last-0'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"temperature": math.nan}, "temperature must be a positive number"),
        ({"learning_rate": -1.0}, "learning rate must be a positive number"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"weight_decay": -0.1}, "weight decay must be 0 or more"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion': choose from ridge, sgd, adamw"),
        ({"optimizer": "ridge", "part": "full"}, "ridge is for a classifier that is trained alone, not for full"),
        ({"shrinkage": -0.1}, "the shrinkage must be 0 or more"),
        ({"shrinkage": math.nan}, "the shrinkage must be 0 or more"),
        ({"level": "sea"}, "unknown level 'sea': choose from origin, pool"),
        ({"decay": "step"}, "unknown decay 'step'"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DfqError, match=said):
        Training(**changes)


def test_a_classifier_of_two_heads(tiny: Callable[..., Model], images_for: Images) -> None:
    """A distilled DeiT: both are trained, and no other parameter."""
    student = tiny("deit_tiny_distilled_patch16_224", seed=2)
    assert isinstance(student.module, VisionTransformer)
    assert isinstance(student.module.get_submodule("head_dist"), nn.Linear)
    before = weights(student)
    take_steps(student, pool_of(tiny(seed=1), images_for()), SGD)
    assert changed(student, before) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_what_is_left_to_the_student_to_settle(tiny: Callable[..., Model]) -> None:
    def settled(student: Any, **settings: Any) -> tuple[Any, Any]:
        training = Training(**settings).settled(student)
        return training.optimizer, training.level

    vit, cnn = tiny(), load_student("resnet10t", tiny(), random_weights=True)
    assert settled(vit) == ("ridge", "origin")
    # Features behind a ReLU are nowhere near the origin.
    assert settled(cnn) == ("ridge", "pool")
    assert settled(vit, part="last-1")[0] == settled(vit, part="full")[0] == "sgd"
    assert settled(tiny("deit_tiny_distilled_patch16_224"))[0] == "sgd"
    assert settled(cnn, optimizer="adamw", level="origin") == ("adamw", "origin")


def test_a_classifier_in_closed_form_by_hand(tiny: Callable[..., Model], images_for: Images) -> None:
    """Where the features' second moment is shrunk by nothing, the student gives the logits that least squares allow."""
    teacher, student = tiny(seed=1), tiny(seed=2)
    pool = pool_of(teacher, images_for(6))
    training = Training(shrinkage=0.0, level="pool").settled(student)
    with trained(View(student, torch.float32), training) as trainee:
        found = solve(trainee, pool, training)
    # Six pictures and 64 features: all of them are met.
    wanted = pool.logits - pool.logits.mean(1, keepdim=True)
    pixels = torch.cat([shown(pool, number)[0] for number in range(6)])
    logits = View(student, torch.float32)(pixels, torch.ones(6, 4, 4, dtype=torch.bool))
    torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=1e-3)
    assert found == pytest.approx(0.0, abs=1e-4)


def test_two_heads_have_no_closed_form(tiny: Callable[..., Model], images_for: Images) -> None:
    student = tiny("deit_tiny_distilled_patch16_224", seed=2)
    with pytest.raises(UsageError, match="the classifier of tiny is more than one linear layer: train it by sgd"):
        take_steps(student, pool_of(tiny(seed=1), images_for()), Training(optimizer="ridge"))
