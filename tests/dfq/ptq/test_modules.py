"""Adapted models compute what timm's compute, and their slots sit where they say."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from dfq.errors import DfqError
from dfq.models import Model
from dfq.ptq.modules import QuantizedConv2d, QuantizedLinear, adapt, quantize_parameter
from quantizers import UniformQuantizer

KINDS = {
    "plain": {},
    "no qkv bias": {"qkv_bias": False},
    "deit3-like": {"no_embed_class": True, "init_values": 1e-6},
    "registers": {"reg_tokens": 3},
    "registers without class token": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "qk_norm": {"qk_norm": True},
    "average pooling": {"class_token": False, "global_pool": "avg"},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "norms inside attention and mlp": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "pre_norm, as CLIP": {"pre_norm": True},
    "norm in the patch embedding": {"embed_norm_layer": nn.LayerNorm},
    "no position embedding": {"pos_embed": "none", "class_token": False, "global_pool": "avg"},
    "any image size": {"dynamic_img_size": True},
}


def inputs(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


class Keep(nn.Module):
    """Remembers what passes."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


class Replace(nn.Module):
    """Gives a multiple of what comes in."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def check_adapted(module: nn.Module) -> None:
    x = inputs()
    before = module(x)
    linears = sum(type(m) is nn.Linear for m in module.modules())
    adapted = adapt(copy.deepcopy(module))
    kinds = [type(m) for m in adapted.modules()]
    assert nn.Linear not in kinds
    assert nn.Conv2d not in kinds
    assert Attention not in kinds
    assert kinds.count(QuantizedLinear) == linears >= 9
    assert kinds.count(QuantizedConv2d) == 1
    after = adapted(x)
    # Logits far apart from each other, or nothing would be compared.
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_does_not_change(kind: str, tiny: Callable[..., Model]) -> None:
    check_adapted(tiny(**KINDS[kind]).module)


def test_the_function_of_a_distilled_deit_does_not_change(tiny: Callable[..., Model]) -> None:
    module = tiny("deit_tiny_distilled_patch16_224").module
    assert isinstance(module.head_dist, nn.Linear)
    check_adapted(module)


@pytest.mark.skipif(not hasattr(Attention(8), "gate"), reason="this timm has no gated attention")
def test_the_function_of_gated_attention_does_not_change(tiny: Callable[..., Model]) -> None:
    module = tiny().module
    for block in module.blocks:
        block.attn = Attention(24, num_heads=3, gated=True).requires_grad_(False)
        block.attn.gate.weight.normal_(generator=torch.Generator().manual_seed(0))
    check_adapted(module)


def test_the_original_of_an_adapted_copy_is_untouched(tiny: Callable[..., Model]) -> None:
    module = tiny().module
    state = {key: value.clone() for key, value in module.state_dict().items()}
    adapted = adapt(copy.deepcopy(module))
    adapted.blocks[0].attn.qkv.weight.zero_()
    assert type(module.blocks[0].attn) is Attention
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_the_slots_of_attention_carry_q_k_scores_softmax_and_v(tiny: Callable[..., Model]) -> None:
    module = tiny().module
    weights = module.blocks[0].attn.qkv.weight.numpy().astype(np.float64)
    bias = module.blocks[0].attn.qkv.bias.numpy().astype(np.float64)
    attention = adapt(module).blocks[0].attn
    keeps = {slot: Keep() for slot in ("q", "k", "v", "scores", "softmax")}
    for slot, keep in keeps.items():
        setattr(attention, slot, keep)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3))
    attention(x)

    projected = x.numpy().astype(np.float64) @ weights.T + bias  # [2, 5, 72]: q of all heads, then k, then v
    expected = {}
    for index, slot in enumerate("qkv"):
        part = projected[:, :, 24 * index : 24 * (index + 1)]
        expected[slot] = np.stack([part[:, :, 8 * head : 8 * (head + 1)] for head in range(3)], axis=1)
    expected["scores"] = np.einsum("bhnd,bhmd->bhnm", expected["q"], expected["k"]) / np.sqrt(8)
    powers = np.exp(expected["scores"] - expected["scores"].max(-1, keepdims=True))
    expected["softmax"] = powers / powers.sum(-1, keepdims=True)
    for slot, keep in keeps.items():
        np.testing.assert_allclose(keep.seen.numpy(), expected[slot], rtol=1e-3, atol=1e-4, err_msg=slot)


def test_what_a_slot_of_attention_gives_is_used(tiny: Callable[..., Model]) -> None:
    attention = adapt(tiny().module).blocks[0].attn
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3))
    value = attention.qkv(x)[:, :, 48:]
    # Without q, k or scores all attention is even, and the result is the mean of v; without the others it is nothing.
    even = attention.proj(value.mean(1, keepdim=True).expand(-1, 5, -1))
    nothing = attention.proj.bias.expand(2, 5, -1)
    for slot, expected in {"q": even, "k": even, "scores": even, "softmax": nothing, "v": nothing}.items():
        setattr(attention, slot, Replace(0.0))
        torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5, msg=slot)
        setattr(attention, slot, nn.Identity())


def test_normalization_can_wait_until_values_are_mixed(tiny: Callable[..., Model]) -> None:
    module = tiny().module
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 4
    plain, deferred = (adapt(copy.deepcopy(module), deferred=how) for how in (False, True))
    keeps = Keep(), Keep()
    for network, keep in zip((plain, deferred), keeps, strict=True):
        network.blocks[1].attn.softmax = keep
    torch.testing.assert_close(deferred(x), plain(x), rtol=1e-4, atol=1e-5)
    probabilities, exponentials = (keep.seen for keep in keeps)
    assert torch.equal(exponentials.amax(-1), torch.ones(exponentials.shape[:-1]))
    expected = probabilities / probabilities.amax(-1, keepdim=True)
    torch.testing.assert_close(exponentials, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_attention_add_up_to_one_however_coarse(tiny: Callable[..., Model]) -> None:
    """Half the tokens get 0.4 of what the others get: two levels leave those out, and the mean of the others."""
    attention = adapt(tiny().module, deferred=True).blocks[0].attn
    attention.softmax = UniformQuantizer(2, symmetric=True).load_tensors({"scale": torch.ones(1)})
    q = torch.ones(1, 3, 4, 8)
    k = torch.zeros(1, 3, 4, 8)
    k[:, :, 2:, 0] = float(np.log(0.4) / attention.scale)
    v = torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(3))
    mean = v[:, :, :2].mean(2).flatten(1)  # [1, 3 heads * 8]
    torch.testing.assert_close(attention.mix(q, k, v), mean.unsqueeze(1).expand(1, 4, 24))


def test_what_the_slots_of_a_block_give_is_used(tiny: Callable[..., Model]) -> None:
    block = adapt(tiny().module).blocks[0]
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3))
    middle = x + block.attn(block.norm1(x))
    last = middle + block.mlp(block.norm2(middle))
    block.residual_mlp = Replace(3.0)
    torch.testing.assert_close(block(x), 3 * last)
    block.residual_attn = Replace(0.0)
    torch.testing.assert_close(block(x), 3 * block.mlp(block.norm2(torch.zeros_like(x))))


@pytest.mark.parametrize("arguments", [{"attn_mask": torch.zeros(5, 5)}, {"is_causal": True}])
def test_a_mask_is_refused(arguments: dict[str, object], tiny: Callable[..., Model]) -> None:
    block = adapt(tiny().module).blocks[0]
    x = torch.zeros(1, 5, 24)
    with pytest.raises(DfqError, match="takes no mask"):
        block.attn(x, **arguments)
    with pytest.raises(DfqError, match="takes no mask"):
        block(x, **arguments)


def test_weights_become_what_their_integers_stand_for() -> None:
    layer = QuantizedLinear(nn.Linear(2, 1, bias=False))
    layer.weight.copy_(torch.tensor([[0.9, -0.4]]))
    quantizer = UniformQuantizer(4, symmetric=True).load_tensors({"scale": torch.tensor([0.25])})
    layer.set_integers(quantizer, quantizer.quantize(layer.weight))
    assert layer.integers is not None
    assert layer.integers.tolist() == [[4, -2]]  # 3.6 and -1.6, rounded
    assert layer(torch.tensor([[1.0, 1.0]])).tolist() == [[0.5]]  # 1.0 - 0.5


def test_a_parameter_is_put_on_the_grid() -> None:
    parameter = nn.Parameter(torch.tensor([0.1, 0.3, -0.9]))
    quantizer = UniformQuantizer(4, symmetric=True).load_tensors({"scale": torch.tensor([0.25])})
    quantize_parameter(parameter, quantizer)
    assert parameter.tolist() == [0.0, 0.25, -1.0]
