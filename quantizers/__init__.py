"""Tensors in, integers out: quantizers, the searches for their ranges, and the packing of their integers."""

from quantizers.base import Quantizer
from quantizers.dynamic import DynamicQuantizer
from quantizers.granularity import Granularity, PerAxis, PerGroup, PerTensor, granularity_from_dict
from quantizers.logarithmic import LogQuantizer
from quantizers.outliers import OutlierQuantizer, outlier_channels
from quantizers.packing import pack, packed_length, unpack
from quantizers.ranges import MSE, MinMax, Percentile, RangeSearch, range_search, range_search_from_dict
from quantizers.serialization import build
from quantizers.twin_uniform import GELU_MINIMUM, TwinUniformQuantizer
from quantizers.uniform import UniformQuantizer

__all__ = [
    "GELU_MINIMUM",
    "MSE",
    "DynamicQuantizer",
    "Granularity",
    "LogQuantizer",
    "MinMax",
    "OutlierQuantizer",
    "PerAxis",
    "PerGroup",
    "PerTensor",
    "Percentile",
    "Quantizer",
    "RangeSearch",
    "TwinUniformQuantizer",
    "UniformQuantizer",
    "build",
    "granularity_from_dict",
    "outlier_channels",
    "pack",
    "packed_length",
    "range_search",
    "range_search_from_dict",
    "unpack",
]
