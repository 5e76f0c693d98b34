"""A range of its own for every token."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers import DynamicQuantizer, UniformQuantizer, build

RATIO_1 = {"ratio": torch.tensor([1.0])}


def tokens(seed: int = 0, shape: tuple[int, ...] = (2, 30, 16)) -> Tensor:
    """Of sizes that differ a thousandfold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** (3 * torch.rand(*shape[:-1], 1, generator=generator))


def test_by_hand() -> None:
    # 2 bits, affine. First token: -1 to 2, scale 1, zero point 1. Second: 0 to 30, scale 10. Third: -6 to 0, scale 2,
    # zero point 3. Fourth: zeros.
    x = torch.tensor([[-1.0, 0.4, 2.0], [3.0, 16.0, 30.0], [-6.0, -2.9, -1.1], [0.0, 0.0, 0.0]])
    quantizer = DynamicQuantizer(2, symmetric=False).load_tensors(RATIO_1)
    scale, zero_point = quantizer.grid(x)
    assert scale[:, 0].tolist() == [1, 10, 2, 1]
    assert zero_point[:, 0].tolist() == [1, 0, 3, 0]
    q = quantizer.quantize(x)
    assert q.dtype == torch.uint8
    assert q.tolist() == [[0, 1, 3], [0, 2, 3], [0, 2, 2], [0, 0, 0]]
    assert quantizer(x).tolist() == [[-1, 0, 2], [0, 20, 30], [-6, -2, -2], [0, 0, 0]]


def test_symmetric_by_hand() -> None:
    # 3 bits: -4 to 3, the largest magnitude is 3 scales.
    x = torch.tensor([[6.0, -1.2, 3.1], [-0.3, 0.1, 0.24]])
    quantizer = DynamicQuantizer(3, symmetric=True).load_tensors(RATIO_1)
    q = quantizer.quantize(x)
    assert q.dtype == torch.int8
    assert q.tolist() == [[3, -1, 2], [-3, 1, 2]]
    assert torch.allclose(quantizer(x), torch.tensor([[6.0, -2.0, 4.0], [-0.3, 0.1, 0.2]]))


def test_the_ratio_clips_both_ends() -> None:
    x = torch.tensor([[-4.0, 1.0, 8.0]])
    quantizer = DynamicQuantizer(2, symmetric=False).load_tensors({"ratio": torch.tensor([0.5])})
    # -2 to 4: scale 2, zero point 1.
    assert quantizer(x).tolist() == [[-2, 0, 4]]
    x.requires_grad_()
    quantizer(x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 0]]


@given(
    seed=st.integers(0, 10**6), bits=st.integers(2, 8), symmetric=st.booleans(), ratio=st.sampled_from([1.0, 0.9, 0.5])
)
@settings(deadline=None, max_examples=40)
def test_each_token_is_quantized_as_if_it_were_alone(seed: int, bits: int, symmetric: bool, ratio: float) -> None:
    x = tokens(seed, (3, 7))
    quantizer = DynamicQuantizer(bits, symmetric=symmetric).load_tensors({"ratio": torch.tensor([ratio])})
    for token, found, q in zip(x, quantizer(x), quantizer.quantize(x), strict=True):
        own = UniformQuantizer(bits, symmetric=symmetric).fit(token * np.float32(ratio))
        assert torch.equal(found, own(token))
        assert torch.equal(q, own.quantize(token))


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 30, 16), (2, 3, 30, 16)])
def test_integers_and_their_grids_say_what_forward_gives(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    quantizer = DynamicQuantizer(4, symmetric=False).fit(x)
    scale, zero_point = quantizer.grid(x)
    assert scale.shape == zero_point.shape == (*shape[:-1], 1)
    q = quantizer.quantize(x)
    assert torch.equal((q.to(torch.float32) - zero_point) * scale, quantizer(x))
    assert int(q.max()) <= 15


def test_a_token_may_be_of_any_size() -> None:
    x = tokens()
    quantizer = DynamicQuantizer(4, symmetric=False).fit(x)
    alike = quantizer(x / x.abs().amax(-1, keepdim=True)) * x.abs().amax(-1, keepdim=True)
    # Rounded apart only where a value lies next to the middle between two integers.
    assert ((quantizer(x) - alike).abs() < 1e-3 * x.abs().amax(-1, keepdim=True)).float().mean() > 0.995


def test_fit_finds_the_ratio_of_the_least_error() -> None:
    x = tokens()
    quantizer = DynamicQuantizer(3, symmetric=False).fit(x)

    def error(ratio: float) -> float:
        low, high = x.amin(-1, keepdim=True) * ratio, x.amax(-1, keepdim=True) * ratio
        scale = (high - low) / 7
        zero_point = (-low / scale).round()
        return float((((x / scale).round() + zero_point).clamp(0, 7).sub(zero_point) * scale - x).square().sum())

    ratios = [1 - step / 20 for step in range(13)]
    best = min(ratios, key=error)
    assert 0.4 < best < 1
    assert quantizer.tensors()["ratio"].item() == pytest.approx(best)
    assert DynamicQuantizer(3, symmetric=False, searched=False).fit(x).tensors()["ratio"].item() == 1


def test_importance_decides_between_tokens() -> None:
    # At 2 bits the first token is served best by its whole range, the second by clipping its one large value.
    whole, clipped = torch.tensor([-3.0, -3.0, 6.0, 6.0] * 4), torch.tensor([1.0] * 15 + [4.0])
    x = torch.stack([whole, clipped])
    fitted = {
        name: DynamicQuantizer(2, symmetric=False).fit(x, torch.tensor(counts)).tensors()["ratio"].item()
        for name, counts in {"whole": [[1.0], [0.0]], "clipped": [[0.0], [1.0]]}.items()
    }
    assert fitted["whole"] == 1
    assert fitted["clipped"] < 1


def test_fit_looks_at_whole_tokens_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(shape=(40, 16))
    at_once = DynamicQuantizer(3, symmetric=False).fit(x).tensors()["ratio"]
    monkeypatch.setattr("quantizers.base.chunk_elements", lambda _: 50)  # three tokens
    assert torch.equal(DynamicQuantizer(3, symmetric=False).fit(x).tensors()["ratio"], at_once)


def test_half_precision_and_nan() -> None:
    x = tokens().half()
    quantizer = DynamicQuantizer(8, symmetric=False).fit(x)
    assert quantizer(x).dtype == torch.float16
    assert torch.equal(quantizer(x), quantizer(x.float()).half())
    broken = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    found = quantizer(broken)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_integers_alone_stand_for_nothing() -> None:
    quantizer = DynamicQuantizer(4, symmetric=False).fit(tokens())
    with pytest.raises(TypeError, match="the scale of their token"):
        quantizer.dequantize(quantizer.quantize(tokens()))


@pytest.mark.parametrize("call", [lambda q: q(tokens()), lambda q: q.grid(tokens()), lambda q: q.tensors()])
def test_unfitted(call: Any) -> None:
    with pytest.raises(RuntimeError, match="not fitted"):
        call(DynamicQuantizer(4, symmetric=False))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 1}, "bits"),
        ({"symmetric": 1}, "symmetric must be True or False"),
        ({"searched": "yes"}, "searched must be True or False"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicQuantizer(**({"bits": 4, "symmetric": False} | wrong))


@pytest.mark.parametrize(
    "ratio",
    [
        torch.tensor([0.0]),
        torch.tensor([1.5]),
        torch.tensor([float("nan")]),
        torch.tensor([1]),
        torch.tensor(0.5),
        torch.ones(2),
    ],
)
def test_bad_ratios(ratio: Tensor) -> None:
    with pytest.raises(ValueError, match="ratio must be"):
        DynamicQuantizer(4, symmetric=False).load_tensors({"ratio": ratio})
    with pytest.raises(ValueError, match="has the tensors ratio"):
        DynamicQuantizer(4, symmetric=False).load_tensors({"scale": ratio})


def test_round_trip_through_json() -> None:
    x = tokens()
    quantizer = DynamicQuantizer(5, symmetric=True, searched=False).fit(x)
    description = json.loads(json.dumps(quantizer.describe()))
    assert torch.equal(build(description, quantizer.tensors())(x), quantizer(x))
    with pytest.raises(ValueError, match="missing: searched"):
        build({key: value for key, value in description.items() if key != "searched"})


def test_candidates_and_neighbours_can_be_loaded() -> None:
    x = tokens()
    quantizer = DynamicQuantizer(4, symmetric=False).fit(x)
    for candidate in [*quantizer.candidates(x), *quantizer.neighbours(0.2)]:
        DynamicQuantizer(4, symmetric=False).load_tensors(candidate)
    fixed = DynamicQuantizer(4, symmetric=False, searched=False).fit(x)
    assert len(fixed.candidates(x)) == 1
    assert fixed.neighbours(0.2) == []
