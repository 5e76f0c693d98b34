from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration.schedules import Dense, ProgressiveStop


def test_the_published_counts() -> None:
    schedule = ProgressiveStop()
    assert schedule.decisions == (50, 100, 200, 300)
    keep = torch.arange(196).expand(2, -1)
    counts = [196]
    for _ in schedule.decisions:
        keep = schedule.choose(keep, torch.rand(keep.shape, generator=torch.Generator().manual_seed(0)))
        counts.append(keep.shape[1])
    assert counts == [196, 137, 95, 66, 46]


def test_the_most_attended_patches_stay_in_ascending_order() -> None:
    keep = torch.tensor([[2, 5, 7, 9, 11], [0, 1, 2, 3, 4]])
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.95, 0.2], [0.5, 0.1, 0.2, 0.3, 0.4]])
    # int(5 * 0.5) = 2 stay.
    assert ProgressiveStop(ratio=0.5).choose(keep, scores).tolist() == [[5, 9], [0, 4]]


@given(st.integers(1, 60), st.floats(0, 0.999), st.integers(0, 2**31))
def test_no_stopped_patch_has_a_higher_score_than_one_that_stays(count: int, ratio: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    keep = torch.from_numpy(np.sort(random.choice(100, count, replace=False)))[None]
    scores = torch.from_numpy(random.permutation(count) / count)[None]
    stays = ProgressiveStop(ratio=ratio).choose(keep, scores)[0].tolist()
    score = dict(zip(keep[0].tolist(), scores[0].tolist(), strict=True))
    ranked = sorted(score, key=lambda patch: -score[patch])
    assert stays == sorted(ranked[: max(1, int(count * (1 - ratio)))])


def test_one_patch_always_stays() -> None:
    assert ProgressiveStop(ratio=0.9).choose(torch.tensor([[7, 8]]), torch.tensor([[0.1, 0.2]])).tolist() == [[8]]


def test_dense_never_chooses() -> None:
    keep = torch.tensor([[3, 4]])
    assert Dense().decisions == ()
    assert Dense().choose(keep, torch.zeros(1, 2)) is keep


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_that_is_no_share(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"must lie in \[0, 1\), not {ratio}"):
        ProgressiveStop(ratio=ratio)


@pytest.mark.parametrize("iterations", [(10, 5), (5, 5), (-1, 5)])
def test_iterations_that_do_not_ascend(iterations: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must ascend from 0 or later, not \("):
        ProgressiveStop(iterations)


@pytest.mark.parametrize("schedule", [Dense(), ProgressiveStop((3, 9), 0.25)])
def test_the_description_survives_the_manifest(schedule: Dense | ProgressiveStop) -> None:
    described = schedule.describe()
    assert json.loads(json.dumps(described)) == described


def test_the_description_tells_everything() -> None:
    assert ProgressiveStop((3, 9), 0.25).describe() == {
        "name": "progressive_stop",
        "iterations": [3, 9],
        "ratio": 0.25,
    }
    assert Dense().describe() == {"name": "dense"}
