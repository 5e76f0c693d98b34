"""The pool, and how networks are shown it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from calibration.calibration_set import CalibrationSet, normalise
from calibration.tokens import token_gather
from dfq.models import Model
from dfq.transfer.pool import Pool, View
from dfq.transfer.student import load_student

Images = Callable[..., CalibrationSet]


@pytest.fixture
def left_half() -> torch.Tensor:
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    return mask


def test_a_vit_is_given_the_kept_patches_alone(
    tiny: Callable[..., Model], images_for: Images, left_half: torch.Tensor
) -> None:
    model, images = tiny(), images_for(3, left_half)
    pixels = normalise(images.images, model.preprocessing.mean, model.preprocessing.std)
    with token_gather(model.module) as gather:  # type: ignore[arg-type]
        gather.keep = torch.tensor([[0, 1, 4, 5, 8, 9, 12, 13]] * 3)
        expected = model(pixels)
    found = View(model, torch.float32)(images.images, images.mask)
    torch.testing.assert_close(found, expected)
    # And the network is as it was.
    torch.testing.assert_close(View(model, torch.float32)(images.images, torch.ones_like(images.mask)), model(pixels))


@pytest.mark.parametrize("other", ["resnet10t", "of other patches"])
def test_any_other_network_sees_the_rest_in_its_mean_colour(
    tiny: Callable[..., Model], images_for: Images, left_half: torch.Tensor, other: str
) -> None:
    teacher, images = tiny(), images_for(3, left_half)
    model = tiny(patch_size=16) if other == "of other patches" else load_student(other, teacher, random_weights=True)
    pixels = normalise(images.images, model.preprocessing.mean, model.preprocessing.std)
    pixels[..., 16:] = 0
    torch.testing.assert_close(View(model, torch.float32)(images.images, images.mask), model(pixels))


def test_each_network_has_its_own_normalisation(tiny: Callable[..., Model], images_for: Images) -> None:
    student = load_student("resnet10t", tiny(), random_weights=True)
    assert student.preprocessing.mean != tiny().preprocessing.mean
    images = images_for(2)
    seen: list[torch.Tensor] = []
    student.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    View(student, torch.float32)(images.images, images.mask)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (student.preprocessing.mean, student.preprocessing.std)
    )
    torch.testing.assert_close(seen[0], (images.images / 255 - mean) / std)


def test_what_the_teacher_makes_of_each_image(
    tiny: Callable[..., Model], images_for: Images, left_half: torch.Tensor
) -> None:
    teacher = tiny()
    pool = Pool(View(teacher, torch.float32), 0)
    mixed = torch.ones(5, 4, 4, dtype=torch.bool)
    mixed[1::2] = left_half[0]
    pool.add(images_for(5, mixed))
    pool.add(images_for(3))
    assert (len(pool), pool.logits.shape) == (8, (8, 5))
    view = View(teacher, torch.float32)
    for index in range(8):
        alone = view(pool.images[[index]], pool.mask[[index]])[0]
        torch.testing.assert_close(pool.logits[index], alone, atol=1e-5, rtol=1e-4)


def test_images_held_out_are_not_drawn(tiny: Callable[..., Model], images_for: Images) -> None:
    pool = Pool(View(tiny(), torch.float32), 3)
    pool.add(images_for(4))
    pool.add(images_for(4))
    assert pool.held_out.tolist() == [2, 5]
    assert pool.trained_on.tolist() == [0, 1, 3, 4, 6, 7]
    everything = Pool(View(tiny(), torch.float32), 0)
    everything.add(images_for(4))
    assert (everything.trained_on.tolist(), everything.held_out.tolist()) == ([0, 1, 2, 3], [])
