from __future__ import annotations

import json

import pytest
import torch

from quantizers import Granularity, PerAxis, PerGroup, PerTensor, granularity_from_dict


def test_per_tensor_is_one_group() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert PerTensor().to_groups(x).tolist() == [list(range(24))]
    assert PerTensor().broadcast(torch.tensor([5.0]), x).shape == ()


def test_groups_are_the_slices_along_the_axis() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    for axis in (-3, -2, -1, 0, 1, 2):
        groups = PerAxis(axis).to_groups(x)
        expected = torch.stack([x.select(axis, index).flatten() for index in range(x.shape[axis])])
        assert torch.equal(groups, expected)


def test_parameters_are_shaped_by_the_tensor_they_meet() -> None:
    parameter = torch.arange(4.0)
    assert PerAxis(-1).broadcast(parameter, torch.zeros(2, 3, 4)).shape == (1, 1, 4)
    assert PerAxis(-1).broadcast(parameter, torch.zeros(3, 4)).shape == (1, 4)
    assert PerAxis(1).broadcast(parameter, torch.zeros(2, 4, 7, 8)).shape == (1, 4, 1, 1)
    assert PerAxis(0).broadcast(parameter, torch.zeros(4, 3, 16, 16)).shape == (4, 1, 1, 1)


def test_a_tensor_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PerAxis\(axis=0\) was fitted on 4 groups, but axis 0 .* \[3, 5\] has 3"):
        PerAxis(0).broadcast(torch.ones(4), torch.zeros(3, 5))


@pytest.mark.parametrize("axis", [2, -3])
def test_a_tensor_without_the_axis_is_refused(axis: int) -> None:
    with pytest.raises(ValueError, match=f"has no axis {axis}"):
        PerAxis(axis).to_groups(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=f"has no axis {axis}"):
        PerAxis(axis).broadcast(torch.ones(3), torch.zeros(3, 5))


@pytest.mark.parametrize("axis", ["0", 1.0, True, None])
def test_the_axis_is_an_integer(axis: object) -> None:
    with pytest.raises(ValueError, match="axis of PerAxis must be an integer"):
        PerAxis(axis)  # type: ignore[arg-type]


def test_groups_are_so_many_in_a_row_the_last_one_filled_up_with_zeros() -> None:
    x = torch.arange(1.0, 11.0).reshape(2, 5)
    groups = PerGroup(2).to_groups(x)
    assert groups.tolist() == [[1, 2], [3, 4], [5, 0], [6, 7], [8, 9], [10, 0]]
    assert torch.equal(PerGroup(2).from_groups(groups, x), x)
    parameter = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    assert PerGroup(2).broadcast(parameter, x).tolist() == [[10, 10, 20, 20, 30], [40, 40, 50, 50, 60]]


def test_a_group_of_a_convolution_runs_through_all_that_one_output_sums_over() -> None:
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert PerGroup(6).to_groups(x).tolist() == [list(range(start, start + 6)) for start in (0, 6, 12, 18)]
    assert (
        PerGroup(6).broadcast(torch.arange(4.0), x).flatten().tolist() == [0.0] * 6 + [1.0] * 6 + [2.0] * 6 + [3.0] * 6
    )


def test_a_channel_that_is_shorter_than_a_group_is_one() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(PerGroup(2**60).to_groups(x), x)
    assert PerGroup(2**60).broadcast(torch.tensor([1.0, 2.0]), x).tolist() == [[1, 1, 1], [2, 2, 2]]


def test_groups_of_another_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fitted on 4 groups, but a tensor of shape \[2, 5\] has 6"):
        PerGroup(2).broadcast(torch.ones(4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"groups weights \[out, in\], not a tensor of shape \[5\]"):
        PerGroup(2).to_groups(torch.zeros(5))


@pytest.mark.parametrize("size", ["64", 0, -1, True, 6.0])
def test_the_size_is_a_positive_integer(size: object) -> None:
    with pytest.raises(ValueError, match="size of PerGroup must be an integer of at least 1"):
        PerGroup(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerAxis(-1), PerGroup(64)])
def test_round_trip_through_json(granularity: Granularity) -> None:
    assert granularity_from_dict(json.loads(json.dumps(granularity.to_dict()))) == granularity


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"type": "per_block"},
        {"type": "per_axis"},
        {"type": "per_group"},
        {"type": "per_group", "axis": 0},
        {"type": "per_tensor", "axis": 0},
        "per_tensor",
        {"type": ["x"]},
    ],
)
def test_descriptions_of_nothing(description: object) -> None:
    with pytest.raises(ValueError, match="no granularity is described by"):
        granularity_from_dict(description)  # type: ignore[arg-type]
