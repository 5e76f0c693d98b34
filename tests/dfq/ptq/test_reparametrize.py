"""Channels rescaled between layers: the network's function stays, and one grid serves all channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from dfq.models import Model
from dfq.ptq.modules import QuantizedLinear, adapt
from dfq.ptq.reparametrize import Exchange, equalizing, exchanges
from dfq.ptq.stages import stages

IN_A_BLOCK = ("attn.qkv.input", "attn.proj.input", "mlp.fc1.input")
VITS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, IN_A_BLOCK),
    "no qkv bias": ({"qkv_bias": False}, IN_A_BLOCK),
    "layer scale": ({"init_values": 0.1}, IN_A_BLOCK),
    "qk_norm": ({"qk_norm": True}, IN_A_BLOCK),
    "registers": ({"reg_tokens": 3}, IN_A_BLOCK),
    "norm in the mlp": ({"scale_mlp_norm": True}, IN_A_BLOCK),
    # What is mixed is normed before `proj` sees it.
    "norm in the attention": ({"scale_attn_norm": True}, ("attn.qkv.input", "mlp.fc1.input")),
    "norms without offset": ({"norm_layer": "rmsnorm"}, ("attn.proj.input",)),
}
SWINS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows that do not divide the patches": {"window_size": 3},
    "an odd number of patches": {"img_size": 28},
    "oblong images": {"img_size": (32, 48)},
    "no qkv bias": {"qkv_bias": False},
}


def randn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found_in(module: nn.Module) -> list[Exchange]:
    return [e for stage in stages(module) if stage.module is not None for e in exchanges(stage.name, stage.module)]


def channels_of(exchange: Exchange) -> int:
    return next(iter(exchange.takers.values())).weight.shape[1]


class Keep(nn.Module):
    """Remembers what passes."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


def check_unchanged(module: nn.Module, x: Tensor) -> None:
    """Each exchange changes what passes its site as it says, and nothing of what comes out in the end."""
    adapted = adapt(copy.deepcopy(module))
    before = module(x)
    assert before.std() > 0.1
    for number, exchange in enumerate(found_in(adapted)):
        keep = Keep()
        (taker, *others) = exchange.takers.values()
        taker.input = keep
        adapted(x)
        passed = keep.seen
        ratio = randn(channels_of(exchange), seed=number).exp()
        offset = randn(len(ratio), seed=100 + number) if exchange.takes_offset else torch.zeros(len(ratio))
        exchange.rescale(ratio, offset)
        after = adapted(x)
        expected = passed / ratio + offset
        torch.testing.assert_close(keep.seen, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        torch.testing.assert_close(after, before, rtol=2e-3, atol=2e-3, msg=exchange.site)
        taker.input = nn.Identity()
        assert all(linear.weight.shape[1] == len(ratio) for linear in others)


@pytest.mark.parametrize("kind", VITS)
def test_the_function_of_a_vit_stays(kind: str, tiny: Callable[..., Model]) -> None:
    arguments, sites = VITS[kind]
    module = tiny(**arguments).module
    expected = [f"blocks.{index}.{site}" for index in range(2) for site in sites]
    assert [exchange.site for exchange in found_in(adapt(copy.deepcopy(module)))] == expected
    check_unchanged(module, randn(3, 3, 32, 32))


@pytest.mark.skipif(not hasattr(Attention(8), "gate"), reason="this timm has no gated attention")
def test_a_gate_takes_what_qkv_takes(tiny: Callable[..., Model]) -> None:
    module = tiny().module
    for block in module.blocks:
        block.attn = Attention(24, num_heads=3, gated=True).requires_grad_(False)
        block.attn.gate.weight.copy_(randn(*block.attn.gate.weight.shape))
    first = found_in(adapt(copy.deepcopy(module)))[0]
    assert list(first.takers) == ["blocks.0.attn.qkv", "blocks.0.attn.gate"]
    check_unchanged(module, randn(3, 3, 32, 32))


@pytest.mark.parametrize("kind", SWINS)
def test_the_function_of_a_swin_stays(kind: str, tiny_swin: Callable[..., Model]) -> None:
    module = tiny_swin(**SWINS[kind]).module
    sites = [exchange.site for exchange in found_in(adapt(copy.deepcopy(module)))]
    blocks = [f"layers.{layer}.blocks.{index}" for layer in range(2) for index in range(2)]
    expected = [f"{block}.{site}" for block in blocks for site in IN_A_BLOCK]
    assert sites == [*expected[:6], "layers.1.downsample.reduction.input", *expected[6:]]
    check_unchanged(module, randn(3, 3, *module.patch_embed.img_size))


def test_no_offset_where_zeros_or_probabilities_would_be_added(
    tiny: Callable[..., Model], tiny_swin: Callable[..., Model]
) -> None:
    for model in (tiny(), tiny_swin(window_size=3)):
        for exchange in found_in(adapt(model.module)):
            windows = exchange.site.startswith("layers.") and exchange.site.endswith("attn.qkv.input")
            assert exchange.takes_offset == (not windows and not exchange.site.endswith("attn.proj.input"))


def test_stem_and_head_have_none(tiny: Callable[..., Model]) -> None:
    module = adapt(tiny(pre_norm=True, global_pool="avg").module)
    assert [e.site for e in found_in(module)] == [f"blocks.{i}.{site}" for i in range(2) for site in IN_A_BLOCK]
    assert list(exchanges("patch_embed", module.patch_embed)) == []


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_norm_without_scale_or_offset_is_passed_over(part: str, tiny: Callable[..., Model]) -> None:
    module = adapt(tiny().module)
    setattr(module.blocks[0].norm1, part, None)
    assert [e.site for e in found_in(module)][:2] == ["blocks.0.attn.proj.input", "blocks.0.mlp.fc1.input"]


# --- by hand


def linear(weight: list[list[float]], bias: list[float] | None) -> QuantizedLinear:
    plain = nn.Linear(len(weight[0]), len(weight), bias=bias is not None).requires_grad_(False)
    plain.weight.copy_(torch.tensor(weight))
    if bias is not None:
        plain.bias.copy_(torch.tensor(bias))
    return QuantizedLinear(plain)


@pytest.mark.parametrize("bias", [[0.5], None])
def test_rescaling_by_hand(bias: list[float] | None) -> None:
    norm = nn.LayerNorm(2).requires_grad_(False)
    norm.weight.copy_(torch.tensor([2.0, 6.0]))
    norm.bias.copy_(torch.tensor([4.0, -3.0]))
    taker = linear([[1.0, 10.0]], bias)
    Exchange("x", {"taker": taker}, norm=norm, takes_offset=True).rescale(
        torch.tensor([0.5, 3.0]), torch.tensor([1.0, -2.0])
    )
    assert norm.weight.tolist() == [4.0, 2.0]
    assert norm.bias.tolist() == [9.0, -3.0]  # 4 / 0.5 + 1, -3 / 3 - 2
    assert taker.weight.tolist() == [[0.5, 30.0]]
    assert isinstance(taker.bias, nn.Parameter)
    assert taker.bias.tolist() == [(bias or [0.0])[0] + 59.5]  # -(0.5 * 1 + 30 * -2)


@pytest.mark.parametrize("bias", [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], None])
def test_rescaling_values_touches_the_last_third(bias: list[float] | None) -> None:
    values = linear([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]], bias)
    taker = linear([[1.0, 1.0]], None)
    exchange = Exchange("x", {"taker": taker}, values=values)
    exchange.rescale(torch.tensor([2.0, 0.5]), torch.zeros(2))
    assert values.weight[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 2.5, 12.0]
    if bias is not None:
        assert values.bias.tolist() == [1.0, 2.0, 3.0, 4.0, 2.5, 12.0]
    assert taker.weight.tolist() == [[2.0, 0.5]]
    assert taker.bias is None  # Nothing to add: none is made.


def test_equalizing_by_hand() -> None:
    # Ranges [-0.3, 1.2] and [-4.5, 3] in 16 levels: steps 0.1 and 0.5, middles 0.45 and -0.75.
    scale, centre = torch.tensor([0.1, 0.5]), torch.tensor([0.45, -0.75])
    ratio, offset = equalizing(scale, centre, 1.0, offset=True)
    # Both become 4.5 wide; their middles 1.35 and -0.45 meet at 0.45.
    torch.testing.assert_close(ratio, torch.tensor([1 / 3, 5 / 3]))
    torch.testing.assert_close(offset, torch.tensor([-0.9, 0.9]))
    ratio, offset = equalizing(scale, centre, 0.5, offset=True)
    torch.testing.assert_close(ratio, torch.tensor([1 / 3, 5 / 3]).sqrt())
    torch.testing.assert_close(centre / ratio + offset, (centre / ratio).mean().expand(2))
    ratio, offset = equalizing(scale, centre, 0.0, offset=True)
    assert ratio.tolist() == [1.0, 1.0]
    torch.testing.assert_close(offset, torch.tensor([-0.6, 0.6]))
    _, offset = equalizing(scale, centre, 1.0, offset=False)
    assert offset.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_at_full_strength_all_ranges_become_the_same(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, width = torch.randn(6, generator=generator), torch.rand(6, generator=generator) + 0.01
    ratio, offset = equalizing(width / 15, low + width / 2, 1.0, offset=True)
    ends = torch.stack([low, low + width]) / ratio + offset
    torch.testing.assert_close(ends, ends[:, :1].expand(2, 6), rtol=1e-5, atol=1e-5)


def test_channels_that_are_alike_are_left_alone() -> None:
    ratio, offset = equalizing(torch.full((3,), 0.7), torch.full((3,), 9.0), 1.0, offset=True)
    assert ratio.tolist() == [1.0, 1.0, 1.0]
    assert offset.tolist() == [0.0, 0.0, 0.0]
