"""ONNX files with integers in them, and the proof that such a file computes what was evaluated.

A site that a runtime can take into an integer product is a QuantizeLinear / DequantizeLinear pair with the very scale
and zero point it was evaluated with; weights are integers. In the graph the integers of a site bear the site's name.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibration.files import make_directory, replace_file
from dfq.errors import DfqError, UsageError
from dfq.models import Model
from dfq.onnx_check import Agreement, check_graph
from dfq.onnx_layers import GroupedWeight, IntegerWeight, standardize, translations
from dfq.ptq.engine import QuantizedModel
from dfq.versions import versions
from quantizers import UniformQuantizer, pack

if TYPE_CHECKING:
    import onnx

FORMAT = "dfq.onnx"
VERSION = 1
INPUT, OUTPUT = "images", "logits"
OPSETS = (21, 22, 23)
_NIBBLE_BITS = 4
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Export:
    """An ONNX file that was written, and how it was found to agree with the model.

    size: of the file, in bytes; pairs: activation sites as Q/DQ pairs; elementary: the names of those sites that are
    elementary operations in floating point, their quantizer having no operator in ONNX.
    """

    path: Path
    size: int
    opset: int
    pairs: int
    elementary: tuple[str, ...]
    agreement: Agreement

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"path": str(self.path), "elementary": list(self.elementary)}

    def describe(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.path}: {self.size / 1e6:.2f} MB, opset {self.opset}, {self.pairs} activations as Q/DQ pairs",
            self.agreement.describe(),
        ]
        if self.elementary:
            lines.append(
                f"{len(self.elementary)} activations are rounded by elementary operations, exactly but in floating "
                f"point ({self.elementary[0]}, ...): recipe deploy has none of them"
            )
        return "\n".join(lines)


def export(
    qmodel: QuantizedModel,
    path: Path | str,
    *,
    opset: int = OPSETS[0],
    int4: bool = True,
    num_images: int = 8,
) -> Export:
    """Write a quantized model as ONNX: one file, inputs `images` [B, 3, H, W] normalised, outputs `logits` [B, C].

    Scales and zero points are those that were evaluated, nothing is calibrated again. int4: weights of 4 bits and
    fewer two to a byte, as ONNX's INT4 and UINT4; else a byte each, for runtimes without those types. num_images: dead
    leaves on which the file is compared with the model in onnxruntime, see `check_graph`, before it takes its place.

    Raises DfqError: a missing package, an opset or a name that will not do, weights on a grid that ONNX has no integers
    for, or a file that does not compute what the model does, with the first site that differs.
    """
    target = Path(path)
    if not isinstance(qmodel, QuantizedModel):
        raise UsageError("only a quantized model can be exported; make one with dfq.quantize")
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} is not to be had: choose from {', '.join(map(str, OPSETS))}")
    if target.suffix != ".onnx":
        raise UsageError(f"{target}: the name of an ONNX file ends in .onnx")
    _require_packages()
    _check_weights(qmodel)
    network, elementary = standardize(qmodel.module, qmodel.sites)
    graph = _graph(qmodel, network, opset)
    if int4:
        _pack_nibbles(graph, network)
    content = graph.SerializeToString()
    agreement = check_graph(content, qmodel, num_images=num_images)
    _write(content, target)
    pairs = sum(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    return Export(target, target.stat().st_size, opset, pairs, tuple(elementary), agreement)


def export_network(model: Model | QuantizedModel, path: Path | str) -> None:
    """Write any model as ONNX without a check, a full-precision one with its weights as they are: to measure speed.

    Raises DfqError where a package is missing or the file cannot be written.
    """
    _require_packages()
    if isinstance(model, QuantizedModel):
        network, _ = standardize(model.module, model.sites)
        graph = _graph(model, network, OPSETS[0])
        _pack_nibbles(graph, network)
    else:
        graph = _graph(model, model.module, OPSETS[0])
    _write(graph.SerializeToString(), Path(path))


def _require_packages() -> None:
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DfqError(f'exporting needs {name}: pip install "dfq[onnx]"') from error


def _check_weights(qmodel: QuantizedModel) -> None:
    """Raise DfqError for weights that are no integers times a scale."""
    weights = {name: quantizer for name, quantizer in qmodel.sites.items() if name.endswith(".weight")}
    odd = [name for name, quantizer in weights.items() if not isinstance(quantizer, UniformQuantizer)]
    if odd:
        raise DfqError(
            f"{len(odd)} weights, {odd[0]} the first, are not on a uniform grid, and ONNX has no integers "
            'for them; quantize with quantizer = "uniform" for weights, as recipe deploy does'
        )


def _graph(model: Model | QuantizedModel, network: nn.Module, opset: int) -> onnx.ModelProto:
    """The network as ONNX, with a batch of any size."""
    images = torch.zeros(2, 3, *model.preprocessing.image_size, device=model.device)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table=translations(),
        )
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    # The exporter notes where in the source each node comes from: paths of this machine, a fifth of the file.
    for node in graph.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    graph.graph.ClearField("metadata_props")
    graph.graph.ClearField("value_info")
    graph.ClearField("metadata_props")
    graph.metadata_props.add(key="dfq", value=json.dumps(_description(model)))
    graph.producer_name, graph.producer_version = "dfq", versions()["dfq"]
    return graph


def _description(model: Model | QuantizedModel) -> dict[str, Any]:
    """What a file says of itself."""
    quantized = model if isinstance(model, QuantizedModel) else None
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model.origin.to_dict(),
        "bits": model.bits,
        "recipe": None if quantized is None else quantized.recipe.name,
        "preprocessing": model.preprocessing.to_dict(),
        "num_classes": model.num_classes,
        "seed": None if quantized is None else quantized.calibration.get("run", {}).get("seed"),
        "weight_bytes": model.weight_bytes,
        "dfq": versions()["dfq"],
    }


def _pack_nibbles(graph: onnx.ModelProto, network: nn.Module) -> None:
    """Store the integers of weights that fit half a byte, and their zero points, two to a byte."""
    import onnx

    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    weights = {p: m for p, m in network.named_modules() if isinstance(m, IntegerWeight | GroupedWeight)}
    paths = [path for path, weight in weights.items() if weight.bits <= _NIBBLE_BITS]
    wanted = {f"{path}.integers" for path in paths}
    for node in graph.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in wanted:
            _pack(stored[node.input[0]])
            # Layers of other bits may share it: the exporter keeps equal tensors once.
            zero_point = onnx.TensorProto()
            zero_point.CopyFrom(stored[node.input[2]])
            zero_point.name = node.input[0].removesuffix("integers") + "zero_point_4"
            _pack(zero_point)
            graph.graph.initializer.append(zero_point)
            node.input[2] = zero_point.name
    _drop_unused(graph)


def _pack(tensor: onnx.TensorProto) -> None:
    """Integers in place, the first in the lower half of the first byte: ONNX's layout and that of `quantizers.pack`."""
    import onnx

    integers = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
    tensor.raw_data = pack(integers, _NIBBLE_BITS).numpy().tobytes()
    tensor.data_type = onnx.TensorProto.INT4 if integers.dtype == torch.int8 else onnx.TensorProto.UINT4


def _drop_unused(graph: onnx.ModelProto) -> None:
    used = {name for node in graph.graph.node for name in node.input}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name in used]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter tells its developers goes nowhere."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _write(content: bytes, path: Path) -> None:
    make_directory(path.absolute().parent)
    replace_file(path, lambda partial: partial.write_bytes(content))
