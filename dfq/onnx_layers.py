"""Quantized layers as ONNX has them: QuantizeLinear and DequantizeLinear around activations, integers as weights.

`standardize` puts them where the fake-quantized ones stand. What runtimes can fuse into integer products becomes such a
pair; every other quantizer (two ranges, logarithms) stays, and is exported as the elementary operations it is made of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.ptq.modules import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from quantizers import OutlierQuantizer, PerAxis, PerGroup, PerTensor, Quantizer, UniformQuantizer

_STORED_BITS = 8


@torch.library.custom_op("dfq::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, site: str) -> Tensor:
    """ONNX's QuantizeLinear and DequantizeLinear in a row, to the integers of `zero_point.dtype`.

    x: fp32; scale, zero_point: []; site: what the integers are called in the exported graph.
    """
    limits = torch.iinfo(zero_point.dtype)
    zero = zero_point.to(torch.float32)
    return (((x / scale).round() + zero).clamp(limits.min, limits.max) - zero) * scale


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, site: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dfq::dequantize", mutates_args=())
def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """ONNX's DequantizeLinear: integers int8 or uint8, scale and zero_point [] or, along `axis`, [G] -> fp32."""
    shape = [1] * integers.dim()
    if scale.dim():
        shape[axis] = -1
    return (integers.to(torch.float32) - zero_point.to(torch.float32).view(shape)) * scale.view(shape)


@dequantize.register_fake
def _(integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty(integers.shape, dtype=torch.float32, device=integers.device)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How `torch.onnx.export` is to write the two operators."""
    from onnxscript import opset21 as op

    def write_pair(x: Any, scale: Any, zero_point: Any, site: str) -> Any:
        integers = op.QuantizeLinear(x, scale, zero_point)
        integers.name = site
        return op.DequantizeLinear(integers, scale, zero_point)

    def write_dequantize(integers: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        return op.DequantizeLinear(integers, scale, zero_point, axis=axis)

    return {
        torch.ops.dfq.quantize_dequantize.default: write_pair,
        torch.ops.dfq.dequantize.default: write_dequantize,
    }


class QuantizeDequantize(nn.Module):
    """A `UniformQuantizer` that was fitted on an activation as a whole.

    Integers of fewer than 8 bits are 8-bit ones of a clipped range: that is what products of integers take.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: UniformQuantizer, site: str) -> None:
        super().__init__()
        self.site = site
        scale, zero_point = _parameters(quantizer)
        self.register_buffer("scale", scale[0])
        self.register_buffer("zero_point", zero_point[0])
        self.limits: tuple[float, float] | None = None
        if quantizer.num_levels < 2**_STORED_BITS:
            low, high = (float((end - zero_point.float()) * scale) for end in (quantizer.qmin, quantizer.qmax))
            self.limits = low, high

    def forward(self, x: Tensor) -> Tensor:
        if self.limits is not None:
            x = x.clamp(*self.limits)
        out: Tensor = torch.ops.dfq.quantize_dequantize(x, self.scale, self.zero_point, self.site)
        return out


class IntegerWeight(nn.Module):
    """Integers, `[in, out]` or of a convolution, and what they stand for: `forward` gives it in fp32.

    axis: of the output channels.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, integers: Tensor, quantizer: UniformQuantizer, axis: int) -> None:
        super().__init__()
        scale, zero_point = _parameters(quantizer)
        self.axis, self.bits = axis, quantizer.bits
        self.register_buffer("integers", integers.contiguous())
        per_channel = isinstance(quantizer.granularity, PerAxis)
        self.register_buffer("scale", scale if per_channel else scale[0])
        self.register_buffer("zero_point", zero_point if per_channel else zero_point[0])

    def forward(self) -> Tensor:
        out: Tensor = torch.ops.dfq.dequantize(self.integers, self.scale, self.zero_point, self.axis)
        return out


class GroupedWeight(nn.Module):
    """Integers of which every so many in a row of an output channel share a scale; `forward` as of `IntegerWeight`.

    Not the blocks that DequantizeLinear has: onnxruntime 1.31 takes those of 8 bits into products that then fail, and
    OpenVINO 2026.4 does not read them. Dequantized by elementary operations, which both take.
    """

    integers: Tensor
    zero_point: Tensor
    scale: Tensor
    one: Tensor
    zero: Tensor

    def __init__(self, integers: Tensor, quantizer: UniformQuantizer, groups: PerGroup, *, transposed: bool) -> None:
        super().__init__()
        scale, zero_point = _parameters(quantizer)
        self.bits, self.shape, self.transposed = quantizer.bits, integers.shape, transposed
        shape = len(integers), groups.per_channel(integers), -1
        self.register_buffer("integers", groups.to_groups(integers).reshape(shape).contiguous())
        self.register_buffer("scale", scale.view(shape))
        self.register_buffer("zero_point", zero_point.view(shape))
        self.register_buffer("one", scale.new_ones(()))
        self.register_buffer("zero", zero_point.new_zeros(()))

    def forward(self) -> Tensor:
        codes, zero_point = (
            torch.ops.dfq.dequantize(t, self.one, self.zero, 0) for t in (self.integers, self.zero_point)
        )
        rows: Tensor = ((codes - zero_point) * self.scale).flatten(1)[:, : self.shape[1:].numel()]
        return rows.t() if self.transposed else rows.view(self.shape)


class FloatWeight(nn.Module):
    """A weight that is not quantized."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())

    def forward(self) -> Tensor:
        return self.weight


class StandardLinear(nn.Module):
    """`QuantizedLinear`, its weights `[in, out]`."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.input, self.output, self.bias = layer.input, layer.output, layer.bias
        self.position_mean = layer.position_mean
        self.weight = _weight(layer, None)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        mean = self.position_mean
        y = self.input(x if mean is None else x - mean.common()) @ self.weight()
        y = y if self.bias is None else y + self.bias
        out: Tensor = self.output(y if mean is None else y + mean.product())
        return out


class SplitLinear(StandardLinear):
    """A linear whose input keeps some channels apart: beside the product of integers, theirs, a few columns wide."""

    channels: Tensor
    others: Tensor

    def __init__(self, layer: QuantizedLinear, quantizer: OutlierQuantizer, site: str) -> None:
        super().__init__(layer)
        assert quantizer.channels is not None
        assert is_pair(quantizer.main)
        others = layer.weight.new_ones(layer.weight.shape[1])
        others[quantizer.channels] = 0
        self.register_buffer("channels", quantizer.channels)
        self.register_buffer("others", others)
        # Its grid holds zero, so a channel of zeros adds nothing to the product.
        self.input = QuantizeDequantize(quantizer.main, site)
        self.apart = quantizer.apart
        self.rows = _weight(layer, quantizer.channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        y = self.input(x * self.others) @ self.weight()
        y = y + self.apart(x.index_select(-1, self.channels)) @ self.rows()
        out: Tensor = self.output(y if self.bias is None else y + self.bias)
        return out


class StandardConv2d(nn.Module):
    """`QuantizedConv2d`."""

    def __init__(self, layer: QuantizedConv2d) -> None:
        super().__init__()
        self.input, self.output, self.bias = layer.input, layer.output, layer.bias
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups
        self.weight = _weight(layer, None)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in, H, W] -> [B, out, H', W']."""
        y = F.conv2d(self.input(x), self.weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)
        out: Tensor = self.output(y)
        return out


def pair_sites(module: nn.Module, sites: Mapping[str, Quantizer]) -> list[str]:
    """The activations that become QuantizeLinear and DequantizeLinear; the others stay elementary operations.

    module, sites: of `QuantizedModel`.
    """
    return [name for name in _activations(sites) if is_pair(sites[name]) or _is_split(module, name, sites[name])]


def standardize(module: nn.Module, sites: Mapping[str, Quantizer]) -> tuple[nn.Module, list[str]]:
    """A copy of an adapted network with the operators of ONNX in place of its quantizers.

    module, sites: of `QuantizedModel`. Also gives the names of those activations that stay elementary operations.
    """
    network = copy.deepcopy(module)
    pairs = pair_sites(module, sites)
    for name in pairs:
        path, _, slot = name.rpartition(".")
        quantizer = sites[name]
        if is_pair(quantizer):
            setattr(network.get_submodule(path), slot, QuantizeDequantize(quantizer, name))
    for parent_path, parent in list(network.named_modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, QuantizedConv2d):
                setattr(parent, name, StandardConv2d(layer))
            elif isinstance(layer, QuantizedLinear):
                site = f"{parent_path}.{name}.input".lstrip(".")
                standard = StandardLinear(layer)
                if isinstance(layer.input, OutlierQuantizer) and site in pairs:
                    standard = SplitLinear(layer, layer.input, site)
                setattr(parent, name, standard)
    return network.eval(), [name for name in _activations(sites) if name not in pairs]


def _activations(sites: Mapping[str, Quantizer]) -> list[str]:
    """Neither weights, which are integers already, nor parameters that were put on their grid for good."""
    return [name for name in sites if "." in name and not name.endswith(".weight")]


def is_pair(quantizer: Quantizer) -> TypeGuard[UniformQuantizer]:
    """Whether it is QuantizeLinear and DequantizeLinear, on an activation.

    Not with a range per head or channel: ONNX could say it, but runtimes take it into products that they then refuse.
    """
    return isinstance(quantizer, UniformQuantizer) and isinstance(quantizer.granularity, PerTensor)


def _is_split(module: nn.Module, name: str, quantizer: Quantizer) -> bool:
    """Whether this is the input of a linear, and channels kept apart there can have a product of their own."""
    path, _, slot = name.rpartition(".")
    is_input = isinstance(module.get_submodule(path), QuantizedLinear) and slot == "input"
    return is_input and isinstance(quantizer, OutlierQuantizer) and is_pair(quantizer.main)


def _weight(layer: QuantizedLayer, channels: Tensor | None) -> nn.Module:
    """The weights of a layer, linear ones `[in, out]`; channels: those of the input, None for all."""
    is_linear, quantizer, integers = isinstance(layer, QuantizedLinear), layer.weight_quantizer, layer.integers
    if isinstance(quantizer, UniformQuantizer) and isinstance(quantizer.granularity, PerGroup) and integers is not None:
        if channels is None:
            return GroupedWeight(integers, quantizer, quantizer.granularity, transposed=is_linear)
        integers = None  # A few rows of groups have groups no more.
    whole = layer.weight if integers is None else integers
    tensor = whole.t() if is_linear else whole
    tensor = tensor if channels is None else tensor.index_select(0, channels)
    if integers is None:
        return FloatWeight(tensor)
    assert isinstance(quantizer, UniformQuantizer)
    return IntegerWeight(tensor, quantizer, 1 if is_linear else 0)


def _parameters(quantizer: UniformQuantizer) -> tuple[Tensor, Tensor]:
    """Scale `[G]` and zero point `[G]`, the latter in the dtype of the integers."""
    assert quantizer.scale is not None
    assert quantizer.zero_point is not None
    return quantizer.scale.clone(), quantizer.zero_point.to(quantizer.dtype)
