from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibration.schedules import Dense, PatchSchedule, ProgressiveStop, Rebirth

SCHEDULES = [Dense(), ProgressiveStop(), ProgressiveStop((3, 9), 0.25), Rebirth(3)]


def random_scores(keep: Tensor) -> Tensor:
    return torch.rand(keep.shape, generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 10_000))
def test_decisions_ascend_within_the_run(iterations: int) -> None:
    for schedule in (Dense(), ProgressiveStop(), ProgressiveStop((0, 5, 5000))):
        decisions = list(schedule.decisions(iterations))
        assert decisions == sorted(set(decisions))
        assert all(0 <= at < iterations for at in decisions)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.describe()["name"])
def test_the_description_survives_the_manifest(schedule: PatchSchedule) -> None:
    described = schedule.describe()
    assert json.loads(json.dumps(described)) == described


def test_the_description_tells_everything() -> None:
    assert ProgressiveStop((3, 9), 0.25).describe() == {"name": "progressive_stop", "stops": [3, 9], "ratio": 0.25}
    assert ProgressiveStop().describe() == {"name": "progressive_stop", "stops": "in proportion", "ratio": 0.3}
    assert Rebirth(7).describe() == {"name": "rebirth", "division": 7}
    assert Dense().describe() == {"name": "dense"}


def test_dense_never_chooses() -> None:
    assert Dense().decisions(4000) == ()
    assert Dense().images_per_canvas == 1


class TestProgressiveStop:
    def test_the_published_run(self) -> None:
        schedule = ProgressiveStop()
        assert schedule.decisions(4000) == (50, 100, 200, 300)
        keep = torch.arange(196).expand(2, -1)
        counts = [196]
        for decision in range(4):
            keep = schedule.choose(keep, random_scores(keep), decision).stay
            counts.append(keep.shape[1])
        assert counts == [196, 137, 95, 66, 46]

    @pytest.mark.parametrize(
        ("iterations", "stops"),
        [
            (8000, (100, 200, 400, 600)),
            (400, (5, 10, 20, 30)),
            (40, (1, 2, 3, 4)),  # 0.5, 1, 2 and 3, but never before the first step and never two at once
            (3, (1, 2)),
            (1, ()),
        ],
    )
    def test_other_runs_in_proportion(self, iterations: int, stops: tuple[int, ...]) -> None:
        assert ProgressiveStop().decisions(iterations) == stops

    def test_stops_of_ones_own_stay_where_they_are(self) -> None:
        assert ProgressiveStop((0, 20, 900)).decisions(500) == (0, 20)
        assert ProgressiveStop(()).decisions(500) == ()

    def test_the_most_attended_patches_stay_in_ascending_order(self) -> None:
        keep = torch.tensor([[2, 5, 7, 9, 11], [0, 1, 2, 3, 4]])
        scores = torch.tensor([[0.1, 0.9, 0.3, 0.95, 0.2], [0.5, 0.1, 0.2, 0.3, 0.4]])
        # int(5 * 0.5) = 2 stay.
        stay, finished = ProgressiveStop(ratio=0.5).choose(keep, scores, 0)
        assert stay.tolist() == [[5, 9], [0, 4]]
        assert finished is None

    @given(st.integers(1, 60), st.floats(0, 0.999), st.integers(0, 2**31))
    def test_no_stopped_patch_has_a_higher_score_than_one_that_stays(self, count: int, ratio: float, seed: int) -> None:
        random = np.random.default_rng(seed)
        keep = torch.from_numpy(np.sort(random.choice(100, count, replace=False)))[None]
        scores = torch.from_numpy(random.permutation(count) / count)[None]
        stays = ProgressiveStop(ratio=ratio).choose(keep, scores, 0).stay[0].tolist()
        score = dict(zip(keep[0].tolist(), scores[0].tolist(), strict=True))
        ranked = sorted(score, key=lambda patch: -score[patch])
        assert stays == sorted(ranked[: max(1, int(round(count * (1 - ratio), 6)))])

    @pytest.mark.parametrize(("ratio", "stay"), [(0.9, 10), (0.8, 20), (0.7, 30)])
    def test_shares_that_floating_point_cannot_hold(self, ratio: float, stay: int) -> None:
        keep = torch.arange(100)[None]
        assert ProgressiveStop(ratio=ratio).choose(keep, random_scores(keep), 0).stay.shape[1] == stay

    def test_one_patch_always_stays(self) -> None:
        keep, scores = torch.tensor([[7, 8]]), torch.tensor([[0.1, 0.2]])
        assert ProgressiveStop(ratio=0.9).choose(keep, scores, 0).stay.tolist() == [[8]]

    @pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
    def test_a_ratio_that_is_no_share(self, ratio: float) -> None:
        with pytest.raises(ValueError, match=rf"must lie in \[0, 1\), not {ratio}"):
            ProgressiveStop(ratio=ratio)

    @pytest.mark.parametrize("stops", [(10, 5), (5, 5), (-1, 5)])
    def test_stops_that_do_not_ascend(self, stops: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"must ascend from 0 or later, not \("):
            ProgressiveStop(stops)


class TestRebirth:
    @pytest.mark.parametrize(
        ("division", "iterations", "expected"),
        [(4, 4000, (1000, 2000, 3000)), (2, 100, (50,)), (3, 100, (33, 66)), (1, 10, ())],
    )
    def test_images_leave_at_equal_intervals(self, division: int, iterations: int, expected: tuple[int, ...]) -> None:
        assert Rebirth(division).decisions(iterations) == expected
        assert Rebirth(division).images_per_canvas == division

    def test_the_most_attended_share_leaves(self) -> None:
        keep = torch.tensor([[3, 4, 8, 9, 10, 12]])
        scores = torch.tensor([[0.1, 0.6, 0.2, 0.9, 0.3, 0.4]])
        stay, finished = Rebirth(3).choose(keep, scores, 0)
        assert finished is not None
        assert finished.tolist() == [[4, 9]]
        assert stay.tolist() == [[3, 8, 10, 12]]

    @given(st.integers(1, 9), st.integers(9, 200))
    def test_the_images_share_out_all_patches(self, division: int, patches: int) -> None:
        schedule, keep = Rebirth(division), torch.arange(patches)[None]
        images = []
        for decision in range(division - 1):
            keep, finished = schedule.choose(keep, random_scores(keep), decision)
            assert finished is not None
            images.append(finished)
        images.append(keep)
        assert sorted(torch.cat(images, 1)[0].tolist()) == list(range(patches))
        counts = [image.shape[1] for image in images]
        assert max(counts) - min(counts) <= 1

    def test_what_cannot_be_divided(self) -> None:
        with pytest.raises(ValueError, match="at least 1 image, not 0"):
            Rebirth(0)
        with pytest.raises(ValueError, match="3 iterations cannot be divided into 4 parts"):
            Rebirth(4).decisions(3)
        with pytest.raises(ValueError, match="2 patches cannot be divided into 4 images"):
            Rebirth(4).choose(torch.tensor([[0, 1]]), torch.rand(1, 2), 0)
