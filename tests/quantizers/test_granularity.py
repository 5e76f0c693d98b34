from __future__ import annotations

import json

import pytest
import torch

from quantizers import Granularity, PerAxis, PerTensor, granularity_from_dict


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


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerAxis(-1)])
def test_round_trip_through_json(granularity: Granularity) -> None:
    assert granularity_from_dict(json.loads(json.dumps(granularity.to_dict()))) == granularity


@pytest.mark.parametrize(
    "description",
    [{}, {"type": "per_block"}, {"type": "per_axis"}, {"type": "per_tensor", "axis": 0}, "per_tensor", {"type": ["x"]}],
)
def test_descriptions_of_nothing(description: object) -> None:
    with pytest.raises(ValueError, match="no granularity is described by"):
        granularity_from_dict(description)  # type: ignore[arg-type]
