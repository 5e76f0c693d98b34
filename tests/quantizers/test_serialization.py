from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from quantizers import (
    MSE,
    LogQuantizer,
    PerAxis,
    Percentile,
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
    build,
)

VALUES = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
AFFINE: dict[str, Any] = {
    "type": "uniform",
    "bits": 4,
    "symmetric": False,
    "granularity": {"type": "per_tensor"},
    "search": {"type": "minmax"},
}


@pytest.mark.parametrize(
    "quantizer",
    [
        UniformQuantizer(4, symmetric=True, granularity=PerAxis(0), search=MSE(30, 0.3)),
        UniformQuantizer(8, symmetric=False, granularity=PerAxis(-1), search=Percentile(99)),
        UniformQuantizer(2, symmetric=False),
        TwinUniformQuantizer(4, split="magnitude"),
        TwinUniformQuantizer(8, split="sign"),
        LogQuantizer(4, base="2"),
        LogQuantizer(3, base="search", shift=0.17),
    ],
)
def test_round_trip_through_json(quantizer: Quantizer) -> None:
    description = json.loads(json.dumps(quantizer.describe()))
    unfitted = build(description)
    assert unfitted.describe() == quantizer.describe()
    assert not unfitted.fitted
    quantizer.fit(VALUES)
    assert quantizer.describe() == description  # fitting is told by the tensors alone
    fitted = build(description, quantizer.tensors())
    assert torch.equal(fitted.quantize(VALUES), quantizer.quantize(VALUES))
    assert torch.equal(fitted(VALUES), quantizer(VALUES))
    assert fitted.fit(VALUES * 2).tensors().keys() == quantizer.tensors().keys()


def test_symmetric_quantizers_have_no_zero_point_to_store() -> None:
    assert set(UniformQuantizer(4, symmetric=True).fit(VALUES).tensors()) == {"scale"}
    assert set(UniformQuantizer(4, symmetric=False).fit(VALUES).tensors()) == {"scale", "zero_point"}


@pytest.mark.parametrize("bits", [2, 8])
def test_zero_points_are_kept_as_the_integers_they_are_one_of(bits: int) -> None:
    """All below zero: the zero point is the largest integer, 255 at 8 bits, which int8 would not hold."""
    quantizer = UniformQuantizer(bits, symmetric=False).fit(torch.tensor([-3.0, -1.0]))
    kept = quantizer.tensors()["zero_point"]
    assert (kept.dtype, kept.tolist()) == (torch.uint8, [2**bits - 1])
    again = build(quantizer.describe(), quantizer.tensors())
    assert torch.equal(again(torch.tensor([-3.0, -1.0])), quantizer(torch.tensor([-3.0, -1.0])))
    # Arithmetic on them goes on with the ends of ranges, which lie below zero.
    assert all(bool((n["scale"] > 0).all()) for n in again.neighbours(0.1))
    assert {n["zero_point"].dtype for n in again.neighbours(0.1)} == {torch.uint8}


def test_loaded_tensors_are_copied() -> None:
    tensors = {"scale": torch.tensor([0.5]), "zero_point": torch.tensor([3])}
    quantizer = build(AFFINE, tensors)
    tensors["scale"].fill_(9)
    tensors["zero_point"].fill_(0)
    assert quantizer(torch.tensor([-9.0])).item() == -1.5


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({**AFFINE, "type": "cubic"}, "no quantizer type 'cubic'; the known ones are uniform, twin_uniform, log"),
        ({"bits": 4}, "no quantizer type None"),
        ({**AFFINE, "type": ["uniform"]}, "no quantizer type"),
        ("uniform", "is a dictionary, not str"),
        ({**AFFINE, "axis": 0}, "wrong keys; missing: none, unknown: axis"),
        ({"type": "twin_uniform", "bits": 4}, "wrong keys; missing: split, unknown: none"),
        ({"type": "log", "bits": 4, "base": 2, "shift": 0.0}, "base must be '2', 'sqrt2' or 'search', not 2"),
        ({**AFFINE, "bits": 16}, "bits must be an integer from 2 to 8, not 16"),
        ({**AFFINE, "symmetric": 1}, "symmetric must be True or False, not 1"),
        ({**AFFINE, "granularity": {"type": "per_block"}}, "no granularity is described by"),
        ({**AFFINE, "search": {"type": "entropy"}}, "no range search 'entropy'"),
        ({**AFFINE, "search": {"type": "mse", "steps": 3}}, "has no parameter 'steps'"),
    ],
)
def test_descriptions_that_cannot_be_right(description: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(description)


SCALE, ZERO = torch.tensor([0.5]), torch.tensor([3])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "an affine UniformQuantizer has the tensors scale, zero_point, not none"),
        ({"scale": SCALE}, "has the tensors scale, zero_point, not scale"),
        ({"scale": SCALE, "zero_point": ZERO, "bias": SCALE}, "not bias, scale, zero_point"),
        ({"scale": torch.tensor([1]), "zero_point": ZERO}, "scale must be floating"),
        ({"scale": torch.tensor(0.5), "zero_point": ZERO}, r"scale must be floating, of shape \[groups\]"),
        ({"scale": torch.zeros(0), "zero_point": ZERO[:0]}, "scale must be floating"),
        ({"scale": torch.ones(2), "zero_point": torch.ones(2).int()}, "per tensor has one scale, not 2"),
        ({"scale": torch.tensor([0.0]), "zero_point": ZERO}, "positive and finite"),
        ({"scale": torch.tensor([-1.0]), "zero_point": ZERO}, "positive and finite"),
        ({"scale": torch.tensor([float("nan")]), "zero_point": ZERO}, "positive and finite"),
        ({"scale": torch.tensor([float("inf")]), "zero_point": ZERO}, "positive and finite"),
        ({"scale": torch.tensor([1e300], dtype=torch.float64), "zero_point": ZERO}, "positive and finite"),
        ({"scale": SCALE, "zero_point": torch.tensor([3.0])}, "zero_point must be integers"),
        ({"scale": SCALE, "zero_point": torch.tensor([3, 3])}, "zero_point must be integers of the scale's shape"),
        ({"scale": SCALE, "zero_point": torch.tensor([16])}, r"every zero point must lie in \[0, 15\] at 4 bits"),
        ({"scale": SCALE, "zero_point": torch.tensor([-1])}, "every zero point must lie in"),
    ],
)
def test_tensors_that_cannot_be_right(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(AFFINE, tensors)
