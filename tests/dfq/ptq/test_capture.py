"""What is recorded of activations, and the stages they are recorded in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dfq.models import Model
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
    extremes, sample = Extremes(), Sample(lambda x: 1.0, seed=0)
    for x in (large, small, large):
        extremes.add(x)
        sample.add(x)
    low, high = extremes.values().unbind(0)
    assert low.flatten(1).tolist() == [[0.0], [-4.0]]
    assert high.flatten(1).tolist() == [[5.0], [7.0]]
    values = sample.values()
    assert sorted(values[:, 0].flatten().tolist()) == [0.0, 0.0, 1.0, 2.0, 2.0, 3.0, 3.0, 5.0, 5.0]
    assert sorted(values[:, 1].flatten().tolist()) == [-4.0, -1.0, -1.0, 0.0, 0.0, 6.0, 6.0, 7.0, 7.0]


def test_extremes_keep_nan() -> None:
    extremes = Extremes()
    extremes.add(torch.tensor([[[1.0], [float("nan")]]]))
    extremes.add(torch.tensor([[[1.0], [2.0]]]))
    assert bool(extremes.values().isnan().all())


def test_a_whole_sample_is_everything() -> None:
    sample = Sample(lambda x: 1.0, seed=0)
    tokens = torch.arange(12.0).view(2, 3, 2)
    sample.add(tokens)
    sample.add(tokens + 100)
    assert torch.equal(sample.values(), torch.cat([tokens, tokens + 100]).flatten(0, 1))


def test_a_sample_of_heads_has_them_on_axis_1() -> None:
    sample = Sample(lambda x: 1.0, seed=0)
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    sample.add(x)
    values = sample.values()
    assert values.shape == (8, 3, 1, 5)
    for head in range(3):
        assert torch.equal(values[:, head].flatten(), x[:, head].flatten())


def test_a_share_is_drawn_without_replacement_and_whole_rows() -> None:
    sample = Sample(lambda x: 0.25, seed=0)
    rows = torch.arange(100.0)[:, None].expand(100, 3)
    sample.add(rows.reshape(4, 25, 3))
    values = sample.values()
    assert values.shape == (25, 3)
    assert bool((values == values[:, :1]).all())
    assert len(set(values[:, 0].tolist())) == 25
    again = Sample(lambda x: 0.25, seed=0)
    again.add(rows.reshape(4, 25, 3))
    assert torch.equal(values, again.values())


@pytest.mark.parametrize("recorder", [Extremes(), Sample(lambda x: 1.0, seed=0)])
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


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_the_stages_together_are_the_forward_pass(architecture: str, tiny: Callable[..., Model]) -> None:
    module = tiny(architecture).module
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = capture.stem(module, x, None)
    assert tokens.shape == (3, module.num_prefix_tokens + 16, 24)
    for block in module.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(capture.head(module, tokens), module(x))


def test_the_stem_of_a_sparse_batch_keeps_the_prefix_and_the_kept_patches(tiny: Callable[..., Model]) -> None:
    module = tiny(reg_tokens=2).module
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dense = capture.stem(module, x, None)
    keep = torch.tensor([[0, 5, 15], [1, 2, 3]])
    sparse = capture.stem(module, x, keep)
    for image in range(2):
        expected = torch.cat([dense[image, :3], dense[image, 3 + keep[image]]])
        assert torch.equal(sparse[image], expected)


def test_the_stem_leaves_the_model_as_it_was(tiny: Callable[..., Model]) -> None:
    module = tiny().module
    slot = module.patch_drop
    capture.stem(module, torch.zeros(1, 3, 32, 32), torch.tensor([[0]]))
    assert module.patch_drop is slot
    assert not module.blocks._forward_pre_hooks

    def broken(_x: Tensor) -> Tensor:
        raise ZeroDivisionError

    module.norm_pre.forward = broken
    with pytest.raises(ZeroDivisionError):
        capture.stem(module, torch.zeros(1, 3, 32, 32), torch.tensor([[0]]))
    assert module.patch_drop is slot
    assert not module.blocks._forward_pre_hooks


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
