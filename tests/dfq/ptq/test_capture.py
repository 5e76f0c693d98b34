"""What is recorded of activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfq.ptq import capture
from dfq.ptq.capture import Extremes, InputImportance, Sample, token_importance


def test_extremes_of_tokens_are_kept_per_channel() -> None:
    extremes = Extremes()
    extremes.add(torch.tensor([[[1.0, -5.0], [3.0, 0.0]]]))
    extremes.add(torch.tensor([[[2.0, 7.0], [-1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))
    assert extremes.values().tolist() == [[[-1.0, -5.0]], [[3.0, 7.0]]]


def test_extremes_of_heads_are_kept_apart() -> None:
    extremes = Extremes()
    extremes.add(torch.tensor([[[[1.0], [2.0]], [[-4.0], [9.0]]]]))  # [1, 2 heads, 2 tokens, 1]
    low, high = extremes.values().unbind(0)
    assert low.tolist() == [[[1.0]], [[-4.0]]]
    assert high.tolist() == [[[2.0]], [[9.0]]]


def test_attention_maps_of_different_sizes_have_the_heads_in_common() -> None:
    small = torch.tensor([[[[1.0]], [[-4.0]]]])  # [1, 2 heads, 1, 1]
    large = torch.tensor([[[[2.0, 3.0], [0.0, 5.0]], [[7.0, 6.0], [-1.0, 0.0]]]])  # [1, 2 heads, 2, 2]
    extremes, sample = Extremes(), Sample(1.0, seed=0)
    for x in (large, small, large):
        extremes.add(x)
        sample.add(x)
    low, high = extremes.values().unbind(0)
    assert low.flatten(1).tolist() == [[0.0], [-4.0]]
    assert high.flatten(1).tolist() == [[5.0], [7.0]]
    # Rows stay whole, and as long as the longest.
    rows = [[[[2.0, 3.0]], [[7.0, 6.0]]], [[[0.0, 5.0]], [[-1.0, 0.0]]]]
    assert sample.values().tolist() == [*rows, [[[1.0, 0.0]], [[-4.0, 0.0]]], *rows]


def test_extremes_keep_nan() -> None:
    extremes = Extremes()
    extremes.add(torch.tensor([[[1.0], [float("nan")]]]))
    extremes.add(torch.tensor([[[1.0], [2.0]]]))
    assert bool(extremes.values().isnan().all())


def test_a_whole_sample_is_everything() -> None:
    sample = Sample(2.0, seed=0)
    tokens = torch.arange(12.0).view(2, 3, 2)
    sample.add(tokens)
    sample.add(tokens + 100)
    assert torch.equal(sample.values(), torch.cat([tokens, tokens + 100]).flatten(0, 1))


def test_a_sample_of_heads_has_them_on_axis_1() -> None:
    sample = Sample(1.0, seed=0)
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    sample.add(x)
    values = sample.values()
    assert values.shape == (8, 3, 1, 5)
    for head in range(3):
        assert torch.equal(values[:, head].flatten(), x[:, head].flatten())


def test_a_share_is_drawn_without_replacement_and_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "SAMPLE_ELEMENTS", 75)  # of 300
    sample = Sample(1.0, seed=0)
    rows = torch.arange(100.0)[:, None].expand(100, 3)
    sample.add(rows.reshape(4, 25, 3))
    values = sample.values()
    assert values.shape == (25, 3)
    assert bool((values == values[:, :1]).all())
    assert len(set(values[:, 0].tolist())) == 25
    again = Sample(1.0, seed=0)
    again.add(rows.reshape(4, 25, 3))
    assert torch.equal(values, again.values())


def test_a_sample_of_several_batches_is_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "SAMPLE_ELEMENTS", 75)
    sample = Sample(2.5, seed=0)
    for images in (4, 4, 2):
        sample.add(torch.rand(images, 25, 3))  # 750 elements in all: a tenth of the rows
    assert sample.values().shape == (10 + 10 + 5, 3)


@pytest.mark.parametrize("recorder", [Extremes(), Sample(1.0, seed=0)])
def test_a_site_nothing_passed_is_an_error_of_the_program(recorder: Extremes | Sample) -> None:
    with pytest.raises(RuntimeError, match="no activation passed"):
        recorder.values()


def test_recording_tells_the_order_of_the_forward_pass() -> None:
    first, second, unused = nn.Identity(), nn.Identity(), nn.Identity()
    with capture.recording({unused: Extremes(), second: Extremes(), first: Extremes()}) as passed:
        for _ in range(2):
            second(first(torch.zeros(1, 1)))
    assert list(passed) == [first, second]


def test_recording_ends_with_its_block() -> None:
    slot, extremes = nn.Identity(), Extremes()
    with capture.recording({slot: extremes}):
        slot(torch.tensor([[1.0]]))
    slot(torch.tensor([[5.0]]))
    assert extremes.values().tolist() == [[1.0], [1.0]]
    with pytest.raises(ZeroDivisionError), capture.recording({slot: Extremes()}):
        raise ZeroDivisionError
    assert not slot._forward_hooks


def test_input_importance_by_hand() -> None:
    recorder = InputImportance()
    # Mean squares of the tokens are 1, 16 and 16, so their squares count 1, 1/8 and 1/8 times.
    recorder.add(torch.tensor([[[2.0**0.5, 0.0], [4.0, 4.0]]]))
    recorder.add(torch.tensor([[[32.0**0.5, 0.0]]]))
    assert recorder.values().tolist() == pytest.approx([(2 + 2 + 4) / 3, 2 / 3])
    colours = InputImportance()
    colours.add(torch.stack([torch.full((3, 2), 2.0), torch.full((3, 2), 3.0)])[None])  # [1, 2 colours, 3, 2]
    assert colours.values().tolist() == [4.0, 9.0]


def test_the_importance_of_a_token_by_hand() -> None:
    # Root mean squares 2, 0.5 and 100.
    tokens = torch.tensor([[2.0, -2.0], [0.5, 0.5], [100.0, -100.0]])
    assert token_importance(tokens)[:, 0].tolist() == pytest.approx([2**-1.5, 0.5**-1.5, 1e-3])


def test_tokens_of_zeros_are_no_trouble() -> None:
    recorder = InputImportance()
    recorder.add(torch.zeros(1, 3, 4))
    assert recorder.values().tolist() == [0.0] * 4


def test_the_largest_tokens_are_kept_whatever_is_drawn() -> None:
    x = torch.zeros(2, capture.SAMPLE_ELEMENTS // 8, 8)  # Two times what a sample takes.
    x[0, 17, 3], x[1, 5, 2] = -100.0, 90.0
    sample = Sample(1.0, seed=0, largest=2)
    sample.add(x)
    values = sample.values()
    assert (values.amin(), values.amax()) == (-100.0, 90.0)
    assert len(values) <= capture.SAMPLE_ELEMENTS // 8 + 2
    # Both large ones stand for themselves, those drawn for all others; values alike in size are far more than two.
    assert sample.importance().shape == (len(values), 1)
    counts = sample.importance()[:, 0].square()
    assert counts.sum().item() == pytest.approx(2 * capture.SAMPLE_ELEMENTS // 8)
    drawn = capture.SAMPLE_ELEMENTS // 8
    assert counts[:drawn].tolist() == pytest.approx([(2 * drawn - (len(values) - drawn)) / drawn] * drawn)
    assert counts[drawn:].tolist() == [1.0] * (len(values) - drawn)


def test_where_every_row_is_taken_all_count_alike() -> None:
    sample = Sample(2.0, seed=0, largest=16)
    for _ in range(2):
        sample.add(torch.randn(1, 3, 5, 2))  # [1, 3 heads, 5 tokens, 2]
    assert sample.importance().tolist() == [[[[1.0]]]] * 10


def test_tokens_that_count_most_are_taken_whatever_is_drawn() -> None:
    rows = capture.SAMPLE_ELEMENTS // 8  # As many as a sample takes; there are twice as many.
    x = torch.arange(2.0 * rows).view(2, rows, 1).expand(2, rows, 8)
    counts = torch.full((2, rows), 0.5)
    counts[0, 17] = counts[1, 5] = 9.0
    sample = Sample(1.0, seed=0, tokens=[counts])
    sample.add(x)
    values, importance = sample.values()[:, 0], sample.importance()[:, 0]
    # A quarter as many as were drawn, those with 9 among them; these stand for themselves, unless they were drawn.
    assert len(values) == rows + rows // 4
    assert len(values.unique()) == len(values)
    stands_for = (2 * rows - rows // 4) / rows
    for row in (17, rows + 5):
        (found,) = (values == row).nonzero()[:, 0].tolist()
        assert importance[found].item() == pytest.approx(9.0 * (stands_for**0.5 if found < rows else 1.0))
    others = (values != 17) & (values != rows + 5)
    assert importance[:rows][others[:rows]].tolist() == pytest.approx(
        [0.5 * stands_for**0.5] * int(others[:rows].sum())
    )
    assert importance[rows:][others[rows:]].tolist() == [0.5] * int(others[rows:].sum())


def test_what_tokens_count_follows_them_batch_by_batch() -> None:
    sample = Sample(2.0, seed=0, tokens=[torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])])
    for batch in (torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [4.0]]])):
        sample.add(batch)
    assert torch.equal(sample.values(), sample.importance())
