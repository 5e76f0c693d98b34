"""Accuracy and its statistics, against numbers worked out by hand or by formulas written another way."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

import dfq
from dfq.errors import DfqError, UsageError
from dfq.evaluation import ClassCounts, Evaluation, evaluate
from dfq.statistics import mcnemar_p, paired_drop, sqnr_db, wilson_interval


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()


@dataclass(frozen=True)
class RawPixels:
    """Preprocessing that leaves the pixel values as they are, 0 to 255."""

    name: str = "raw"

    def transform(self) -> Callable[[Image.Image], Tensor]:
        return to_tensor

    def describe(self) -> str:
        return self.name


class Table(nn.Module):
    """Reads the number of the image from its first pixel and gives that row of logits."""

    def __init__(self, rows: Any) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.as_tensor(rows, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[images[:, 0, 0, 0].long()]


@dataclass
class Fake:
    module: nn.Module
    num_classes: int
    name: str = "fake"
    bits: str = "fp32"
    weight_bytes: int = 1_500_000
    class_names: tuple[str, ...] | None = None
    preprocessing: RawPixels = RawPixels()
    runtime: str = "pytorch"

    def to(self, device: torch.device) -> None:
        self.module.to(device)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images)
        return logits


def fake(rows: Any, **changes: Any) -> Fake:
    table = Table(rows)
    return Fake(table, table.rows.shape[1], **changes)


class Numbered(Dataset[tuple[Tensor, int]]):
    """Images `[3, 1, 1]` whose pixels are their number, with the labels given."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 1, 1), float(index)), self.labels[index]


class Stream(IterableDataset[tuple[Tensor, int]]):
    """The same, to be read in order only."""

    def __init__(self, labels: list[int]) -> None:
        self.numbered = Numbered(labels)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self.numbered[index] for index in range(len(self.numbered)))


def one_hot(predictions: list[int], num_classes: int) -> Tensor:
    return torch.eye(num_classes)[predictions]


def test_accuracy_of_seven_images_counted_by_hand() -> None:
    # Right on images 0, 1, 3 and 6.
    result = evaluate(fake(one_hot([0, 1, 1, 2, 0, 1, 2], 3)), Numbered([0, 1, 2, 2, 1, 0, 2]), batch_size=3)
    assert result.num_images == 7
    assert result.top1 == pytest.approx(400 / 7)
    assert result.comparison is None


def test_top5_is_the_share_of_labels_among_the_five_largest_logits() -> None:
    falling = torch.arange(8.0, 0.0, -1.0).repeat(8, 1)
    result = evaluate(fake(falling), Numbered(list(range(8))))
    assert result.top1 == 12.5
    assert result.top5 == 62.5


def test_top5_of_a_model_with_three_classes_is_all() -> None:
    assert evaluate(fake(one_hot([0, 0, 0], 3)), Numbered([0, 1, 2])).top5 == 100


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 0), (4, 0), (100, 0), (2, 1)])
def test_batches_and_workers_change_no_count(batch_size: int, workers: int) -> None:
    rng = np.random.default_rng(0)
    logits, base = rng.normal(size=(9, 6)), rng.normal(size=(9, 6))
    labels = rng.integers(0, 6, 9)
    result = evaluate(
        fake(logits, bits="w4a8"),
        Numbered(labels.tolist()),
        baseline=fake(base),
        batch_size=batch_size,
        workers=workers,
    )
    assert result.comparison is not None
    ranked = np.argsort(-logits, axis=1)
    assert result.top1 == pytest.approx(100 * np.mean(ranked[:, 0] == labels))
    assert result.top5 == pytest.approx(100 * np.mean([labels[i] in ranked[i, :5] for i in range(9)]))
    assert result.comparison.baseline_top1 == pytest.approx(100 * np.mean(base.argmax(1) == labels))
    assert result.comparison.drop == pytest.approx(result.comparison.baseline_top1 - result.top1)
    assert result.comparison.agreement == pytest.approx(100 * np.mean(base.argmax(1) == logits.argmax(1)))
    db = 20 * np.log10(np.linalg.norm(base) / np.linalg.norm(base - logits))
    assert result.comparison.logit_sqnr_db == pytest.approx(db, rel=1e-5)


def test_comparison_of_ten_images_counted_by_hand() -> None:
    labels = [0] * 10
    baseline = fake(one_hot([0, 0, 0, 0, 0, 0, 0, 1, 1, 1], 3))  # right on the first seven
    model = fake(one_hot([0, 0, 0, 0, 1, 2, 1, 0, 1, 2], 3), bits="w4a8")  # loses 4, 5, 6; gains 7; 9 wrong otherwise
    result = evaluate(model, Numbered(labels), baseline=baseline)
    against = result.comparison
    assert against is not None
    assert (result.top1, against.baseline_top1) == (50.0, 70.0)
    assert against.drop == pytest.approx(20.0)
    assert against.agreement == 50.0
    assert against.mcnemar_p == pytest.approx(2 * (1 + 4) / 16)  # 0 or 1 of 4 fair coins, twice
    # With 1/2 in each cell: (3.5 - 1.5) / 12, variance (5 - 4 / 12) / 144.
    half = 1.959964 * math.sqrt(5 - 4 / 12) / 12
    assert against.drop_ci95 == pytest.approx((100 * (2 / 12 - half), 100 * (2 / 12 + half)), abs=1e-4)
    # Signal: 10 ones. Noise: 2 for each of the five rows that differ.
    assert against.logit_sqnr_db == pytest.approx(0.0, abs=1e-9)


def test_classes_and_changed_answers_of_six_images_counted_by_hand() -> None:
    labels = [0, 0, 0, 2, 2, 2]
    baseline = fake(one_hot([0, 0, 1, 2, 2, 1], 4))
    model = fake(one_hot([0, 1, 1, 0, 0, 2], 4), bits="w4a8")
    result = evaluate(model, Numbered(labels), baseline=baseline, batch_size=4)
    assert result.classes == (ClassCounts(0, 3, 1, 2, 2), ClassCounts(2, 3, 1, 2, 0))
    assert result.changed == ((2, 0, 2), (0, 1, 1), (1, 2, 1))
    plain = result.to_dict(classes=True)
    assert plain["classes"][1] == {"label": 2, "num_images": 3, "right": 1, "baseline_right": 2, "agreeing": 0}
    assert plain["changed"] == [[2, 0, 2], [0, 1, 1], [1, 2, 1]]
    assert Evaluation.from_dict(plain) == result
    alone = evaluate(model, Numbered(labels))
    assert Evaluation.from_dict(alone.to_dict(classes=True)) == alone
    assert alone.classes[1] == ClassCounts(2, 3, 1, None, None)
    assert alone.changed == ()


def test_identical_models_lose_nothing_and_the_json_stays_valid() -> None:
    rows = one_hot([0, 1, 2, 0], 3)
    result = evaluate(fake(rows), Numbered([0, 1, 2, 1]), baseline=fake(rows))
    assert result.comparison is not None
    assert result.comparison.drop == 0
    assert result.comparison.agreement == 100
    assert result.comparison.mcnemar_p == 1
    assert result.comparison.logit_sqnr_db == math.inf
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["logit_sqnr_db"] is None
    assert Evaluation.from_dict(plain).comparison == result.comparison
    assert "identical" in result.table()


def test_json_fields() -> None:
    always = {"model", "bits", "device", "runtime", "seed", "num_images", "top1", "top5", "top1_ci95"}
    always |= {"images_per_second", "weight_bytes", "versions"}
    against = {"baseline_top1", "drop", "drop_ci95", "agreement", "mcnemar_p", "logit_sqnr_db"}
    rows = one_hot([0, 1], 2)
    alone = evaluate(fake(rows), Numbered([0, 0])).to_dict()
    both = evaluate(fake(rows, bits="w4a8"), Numbered([0, 0]), baseline=fake(rows + 0.1), seed=7).to_dict()
    assert alone.keys() == always
    assert both.keys() == always | against
    assert (alone["seed"], both["seed"]) == (None, 7)
    assert (both["model"], both["bits"], both["device"], both["weight_bytes"]) == ("fake", "w4a8", "cpu", 1_500_000)
    assert both["versions"]["dfq"] == dfq.__version__
    assert both["versions"]["torch"] == torch.__version__
    assert both["versions"]["python"] == platform.python_version()
    assert both["versions"].keys() >= {"dfq", "torch", "timm", "python"}
    assert json.loads(json.dumps(both, allow_nan=False)) == both


def test_speed_counts_only_the_forward_passes_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Slow(Table):
        def __init__(self, rows: Any, seconds: list[float]) -> None:
            super().__init__(rows)
            self.seconds = iter(seconds)

        def forward(self, images: Tensor) -> Tensor:
            now[0] += next(self.seconds)
            return super().forward(images)

    class SlowToLoad(Numbered):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            now[0] += 50.0
            return super().__getitem__(index)

    monkeypatch.setattr("dfq.tally.time.perf_counter", lambda: now[0])
    rows = one_hot([0] * 5, 2)
    model = Fake(Slow(rows, [9.0, 0.5, 0.25]), 2)
    baseline = Fake(Slow(rows, [100.0] * 3), 2)
    result = evaluate(model, SlowToLoad([0] * 5), baseline=baseline, batch_size=2)
    # The first batch warms up; then 2 images in 0.5 s and 1 in 0.25 s.
    assert result.images_per_second == pytest.approx(4.0)
    single = evaluate(Fake(Slow(rows, [2.0]), 2), SlowToLoad([0] * 5), batch_size=8)
    assert single.images_per_second == pytest.approx(2.5)


def test_table_shows_every_number_with_its_interval_and_the_number_of_images() -> None:
    labels = [0] * 10
    baseline = fake(one_hot([0] * 7 + [1] * 3, 3))
    model = fake(one_hot([0, 0, 0, 0, 1, 2, 1, 0, 1, 2], 3), bits="w4a8", name="tiny")
    lines = evaluate(model, Numbered(labels), baseline=baseline).table().splitlines()
    assert lines[0] == "tiny  w4a8  10 images; in brackets 95 % intervals"
    assert [line.split("  ")[1] for line in lines[1:]] == [
        "top-1",
        "top-5",
        "full-precision top-1",
        "drop",
        "agreement",
        "logit SQNR",
        "weights",
        "speed",
    ]
    by_name = {line.split("  ")[1]: line for line in lines[1:]}
    assert by_name["top-1"].endswith("   50.00 %  [23.66, 76.34] %")
    assert by_name["drop"].endswith("20.00 points  [-18.62, 51.95] points, p = 0.62")
    assert by_name["weights"].endswith("1.50 MB")
    assert by_name["speed"].endswith("fake-quantized forward passes on cpu")
    # Values end in the same column, whatever their width.
    ends = [line.index(" %") for line in lines[1:4]]
    assert all(a == b for a, b in pairwise(ends))


def test_a_full_precision_table_speaks_of_no_quantization_and_no_drop() -> None:
    table = evaluate(fake(one_hot([0], 2)), Numbered([0])).table()
    assert "quantized" not in table
    assert "drop" not in table


def test_limit_takes_images_evenly_over_the_classes() -> None:
    labels = [index // 10 for index in range(100)]
    right_on_class_9 = fake(one_hot([9] * 100, 10))
    result = evaluate(right_on_class_9, Numbered(labels), limit=20, batch_size=8)
    assert result.num_images == 20
    assert result.top1 == 10


@pytest.mark.parametrize("limit", [3, 4, 5, 8, 100])
def test_limit_on_a_stream_takes_the_first_images(limit: int) -> None:
    result = evaluate(fake(one_hot([0] * 8, 2)), Stream([0, 0, 0, 0, 1, 1, 1, 1]), limit=limit, batch_size=4)
    taken = min(limit, 8)
    assert result.num_images == taken
    assert result.top1 == pytest.approx(100 * min(4, taken) / taken)


def test_a_folder_of_images_is_evaluated_by_the_models_class_names(tmp_path: Path) -> None:
    for name, value in (("cat", 0), ("dog", 1)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (2, 2), (value, 0, 0)).save(tmp_path / name / "a.png")
    model = fake(one_hot([2, 0], 3), class_names=("dog", "bird", "cat"))
    assert evaluate(model, tmp_path).top1 == 100
    assert evaluate(model, str(tmp_path)).num_images == 2


def test_a_damaged_image_stops_it_with_one_sentence_also_from_a_worker(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "bad.png").write_bytes(b"not an image")
    for workers in (0, 1):
        with pytest.raises(DfqError) as caught:
            evaluate(fake(one_hot([0], 2)), tmp_path, workers=workers)
        assert str(caught.value).startswith("cannot read the image")
        assert "bad.png" in str(caught.value)
        assert "Traceback" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nothing_of_the_users_state_is_changed() -> None:
    model = fake(one_hot([0, 1], 2))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    evaluate(model, Numbered([0, 1]))
    assert torch.equal(torch.rand(4), expected)
    assert torch.is_grad_enabled()
    assert model.module.training  # as it was


def test_progress_is_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(fake(one_hot([0, 1], 2)), Numbered([0, 1]), progress=True)
    evaluate(fake(one_hot([0, 1], 2)), Numbered([0, 1]), progress=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(DfqError, match="the dataset is empty"):
        evaluate(fake(one_hot([0], 2)), Numbered([]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused_with_the_models_name(value: float) -> None:
    broken = fake([[0.0, 1.0], [value, 0.0]], name="broken_vit", bits="w2a4")
    with pytest.raises(DfqError, match=r"broken_vit \(w2a4\) gives logits that are NaN or infinite"):
        evaluate(broken, Numbered([0, 0]))
    with pytest.raises(DfqError, match="broken_vit"):
        evaluate(fake(one_hot([0, 0], 2)), Numbered([0, 0]), baseline=broken)


def test_images_that_are_no_numbers_are_not_blamed_on_the_model() -> None:
    class Broken(Numbered):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((3, 1, 1), math.nan), 0

    model = Fake(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), 2)
    with pytest.raises(DfqError, match="the dataset holds images that are NaN or infinite"):
        evaluate(model, Broken([0]))


def test_ties_are_broken_alike_for_both_models() -> None:
    tied = torch.zeros(6, 40)
    result = evaluate(fake(tied), Numbered([0] * 6), baseline=fake(tied))
    assert result.comparison is not None
    assert result.comparison.agreement == 100
    assert result.top1 == result.comparison.baseline_top1


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_the_model_has_not_are_refused(label: int) -> None:
    with pytest.raises(DfqError, match=f"the label {label} and the classes of fake are 0 to 1"):
        evaluate(fake(one_hot([0, 1], 2)), Numbered([0, label]))


def test_an_output_that_is_not_one_logit_per_class_is_refused() -> None:
    model = Fake(Table(one_hot([0, 1], 5)), num_classes=3)
    with pytest.raises(DfqError, match=r"shape \(2, 5\) for 2 images and 3 classes"):
        evaluate(model, Numbered([0, 1]))


def test_a_baseline_of_other_classes_or_other_preprocessing_is_refused() -> None:
    model = fake(one_hot([0], 2))
    with pytest.raises(DfqError, match="has 2 classes and the baseline other has 3"):
        evaluate(model, Numbered([0]), baseline=fake(one_hot([0], 3), name="other"))
    with pytest.raises(DfqError, match=r"prepared differently \(raw; cropped\)"):
        evaluate(model, Numbered([0]), baseline=fake(one_hot([0], 2), preprocessing=RawPixels("cropped")))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "the batch size is 0"),
        ({"workers": -1}, "the number of workers is -1"),
        ({"limit": 0}, "the number of images to evaluate on is 0"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_wrong_usage(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(fake(one_hot([0], 2)), Numbered([0]), **wrong)


def test_a_model_that_does_not_fit_into_memory_is_named() -> None:
    class Huge(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")

    with pytest.raises(DfqError, match="fake does not fit into the memory of cpu with 3 images at once"):
        evaluate(Fake(Huge(), 2), Numbered([0, 0, 0]))


def test_wilson_interval_of_published_examples() -> None:
    # R. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_shares_whose_z_score_is_below_the_bound(case: tuple[int, int]) -> None:
    successes, trials = case
    low, high = wilson_interval(successes, trials)
    assert -1e-12 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1 + 1e-12
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:  # Wilson's ends are where |p^ - p| = z sqrt(p (1 - p) / n)
            assert abs(successes / trials - end) == pytest.approx(
                1.959964 * math.sqrt(end * (1 - end) / trials), rel=1e-5
            )


def test_paired_drop_of_a_hand_worked_table() -> None:
    # 100 pairs, 12 lost, 3 gained: (12.5 - 3.5) / 102, variance (16 - 81 / 102) / 102^2.
    drop, (low, high) = paired_drop(12, 3, 100)
    assert drop == pytest.approx(0.09)
    half = 1.959964 * math.sqrt(16 - 81 / 102) / 102
    assert (low, high) == pytest.approx((9 / 102 - half, 9 / 102 + half), abs=1e-6)
    assert (low, high) == pytest.approx((0.01329, 0.16318), abs=5e-5)


def test_paired_drop_covers_a_known_difference() -> None:
    rng = np.random.default_rng(5)
    tables = rng.multinomial(200, [0.10, 0.04, 0.86], size=2000)
    intervals = [paired_drop(int(lost), int(gained), 200)[1] for lost, gained, _ in tables]
    covered = np.mean([low <= 0.06 <= high for low, high in intervals])
    assert 0.935 <= covered <= 0.97


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))))
def test_paired_drop_is_antisymmetric_and_bounded(case: tuple[int, int, int]) -> None:
    lost, gained, pairs = case
    gained = min(gained, pairs - lost)
    drop, (low, high) = paired_drop(lost, gained, pairs)
    mirrored, (mirrored_low, mirrored_high) = paired_drop(gained, lost, pairs)
    assert (mirrored, mirrored_low, mirrored_high) == pytest.approx((-drop, -high, -low))
    assert -1 <= low <= high <= 1
    assert low - 1e-12 <= drop <= high + 1e-12


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (6, 0, 2 / 64), (3, 3, 1.0), (8, 2, 2 * (1 + 10 + 45) / 1024)],
)
def test_mcnemar_p_is_a_doubled_binomial_tail(lost: int, gained: int, p: float) -> None:
    assert mcnemar_p(lost, gained) == pytest.approx(p)
    assert mcnemar_p(gained, lost) == pytest.approx(p)


def test_sqnr() -> None:
    assert sqnr_db(1000.0, 1.0) == pytest.approx(30.0)
    assert sqnr_db(1.0, 0.0) == math.inf
    assert sqnr_db(0.0, 1.0) == -math.inf


def test_an_evaluation_cannot_be_changed() -> None:
    result = evaluate(fake(one_hot([0], 2)), Numbered([0]))
    assert isinstance(result, Evaluation)
    with pytest.raises(AttributeError):
        result.top1 = 100.0  # type: ignore[misc]
