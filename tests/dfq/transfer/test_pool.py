"""The pool, and how networks are shown it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
    some, others = images_for(5, mixed), images_for(3)
    pool.add(some)
    pool.add(others)
    assert (len(pool), pool.num_images, pool.logits.shape) == (8, 8, (8, 5))
    view = View(teacher, torch.float32)
    for index in range(8):
        of, place = (some, index) if index < 5 else (others, index - 5)
        alone = view(of.images[[place]], of.mask[[place]])[0]
        torch.testing.assert_close(pool.logits[index], alone, atol=1e-5, rtol=1e-4)


def pictures(pool: Pool) -> dict[int, torch.Tensor]:
    return {
        int(number): image
        for numbers, images, _ in pool.batches(pool.trained_on)
        for number, image in zip(numbers, images, strict=True)
    }


def test_windows_are_cut_from_each_image(tiny: Callable[..., Model], images_for: Images) -> None:
    teacher, part = tiny(), images_for(4)
    # Red grows to the right, green downwards, blue is the image's number.
    across = torch.arange(0, 256, 8, dtype=torch.uint8).expand(32, 32)
    part.images[:] = torch.stack([torch.stack([across, across.T, torch.full_like(across, 50 * i)]) for i in range(4)])
    pool = Pool(View(teacher, torch.float32), 0, windows=6)
    pool.add(part)
    shown = pictures(pool)
    assert sorted(shown) == list(range(28))
    assert (len(pool), pool.num_images) == (28, 4)
    mirrored = 0
    for number, picture in shown.items():
        image, window = divmod(number, 7)
        assert picture.shape == (3, 32, 32)
        assert picture[2].unique().tolist() == [50 * image]
        rows, columns = picture.float().mean(2)[1], picture.float().mean(1)[0]
        extent = [float(abs(line[-1] - line[0])) / 248 for line in (rows, columns)]
        if window == 0:
            assert torch.equal(picture, part.images[image])
        else:
            # A quarter of the area or more, and not all too narrow.
            assert 0.2 < extent[0] * extent[1] < 0.999
            assert rows[-1] > rows[0]
        mirrored += int(columns[0] > columns[-1])
        torch.testing.assert_close(
            pool.logits[number],
            View(teacher, torch.float32)(picture[None], part.mask[:1])[0].detach(),
            atol=1e-5,
            rtol=1e-4,
        )
    assert 6 <= mirrored <= 18
    assert len({picture.numpy().tobytes() for picture in shown.values()}) == 28


def test_windows_depend_on_nothing_but_the_image(tiny: Callable[..., Model], images_for: Images) -> None:
    part = images_for(4)
    whole, in_parts = (Pool(View(tiny(), torch.float32), 0, windows=2) for _ in range(2))
    torch.manual_seed(1)
    whole.add(part)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    for some in (slice(0, 1), slice(1, 4)):
        in_parts.add(replace(part, images=part.images[some], mask=part.mask[some]))
    assert torch.equal(torch.random.get_rng_state(), state)
    one, other = pictures(whole), pictures(in_parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[number], other[number]) for number in one)


def test_windows_of_sparse_images_have_dead_leaves_behind_their_patches(
    tiny: Callable[..., Model], images_for: Images, left_half: torch.Tensor
) -> None:
    kept, left_out = torch.tensor([255, 0, 255]), torch.tensor([0, 255, 0])
    part = images_for(3, left_half)
    part.images[..., :16] = kept.view(3, 1, 1)
    part.images[..., 16:] = left_out.view(3, 1, 1)
    pool = Pool(View(tiny(), torch.float32), 0, windows=8)
    pool.add(part)

    def share(image: torch.Tensor, colour: torch.Tensor) -> float:
        return float((image == colour.view(3, 1, 1)).all(0).float().mean())

    windows, edges, grounds = 0, set[bool](), set[bytes]()
    for numbers, images, masks in pool.batches(torch.arange(27)):
        for number, image, mask in zip(numbers.tolist(), images, masks, strict=True):
            if number % 9 == 0:
                assert torch.equal(image, part.images[number // 9])
                assert torch.equal(mask, left_half[0])
                continue
            windows += 1
            assert bool(mask.all())
            assert share(image, left_out) == 0.0
            if number % 9 % 2 == 1:  # A sharp one.
                assert share(image, kept) < 1.0
                edges |= {bool(share(image[..., column, None], kept) > 0.5) for column in (0, -1)}
                ground = image[:, (image != kept.view(3, 1, 1)).any(0)]
                grounds.add(ground.numpy().tobytes())
                assert ground.float().std() > 1.0
    assert windows == 24
    assert edges == {False, True}  # The patches are not always in the same place.
    assert len(grounds) == 12


def test_every_other_window_is_seen_at_a_lower_resolution(tiny: Callable[..., Model], images_for: Images) -> None:
    part = images_for(8)  # White noise, of which little is left then.
    pool = Pool(View(tiny(), torch.float32), 0, windows=8)
    pool.add(part)
    contrast = torch.zeros(len(pool))
    for number, picture in pictures(pool).items():
        contrast[number] = picture.float().std()
    windows = contrast.view(8, 9)[:, 1:]
    sharp, coarse = windows[:, ::2], windows[:, 1::2]
    assert coarse.mean() < 0.7 * sharp.mean()
    # From hardly lower to a seventh of rows and columns: noise averaged over 7 x 7 pixels.
    assert coarse.min() < sharp.mean() / 4
    assert coarse.max() > 0.7 * sharp.mean()


def test_images_held_out_are_not_drawn(tiny: Callable[..., Model], images_for: Images) -> None:
    pool = Pool(View(tiny(), torch.float32), 3)
    pool.add(images_for(4))
    pool.add(images_for(4))
    assert pool.held_out.tolist() == [2, 5]
    assert pool.trained_on.tolist() == [0, 1, 3, 4, 6, 7]
    everything = Pool(View(tiny(), torch.float32), 0)
    everything.add(images_for(4))
    assert (everything.trained_on.tolist(), everything.held_out.tolist()) == ([0, 1, 2, 3], [])
    # Nor are windows of them, and what is measured on is no window.
    windows = Pool(View(tiny(), torch.float32), 3, windows=1)
    windows.add(images_for(4))
    assert (windows.trained_on.tolist(), windows.held_out.tolist()) == ([0, 1, 2, 3, 6, 7], [4])
