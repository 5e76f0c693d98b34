"""Exported models, run for real: in onnxruntime or OpenVINO, on the CPU, behind one small interface.

A file that `dfq.export` wrote says of itself what it was made from and how its images are prepared, so that it is
evaluated like any other model: `dfq.evaluate(dfq.open_model("model.onnx"), folder)`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfq.errors import DfqError, UsageError
from dfq.machine import this_machine
from dfq.models import Origin, class_names
from dfq.onnx_export import FORMAT, INPUT, OUTPUT, VERSION
from dfq.preprocessing import Preprocessing

RUNTIMES = ("onnxruntime", "openvino")

FULL, HALF = "fp32", "bf16"
"""What a runtime computes in where it does not in integers."""

_METADATA = "dfq"
_MAX_CLASSES = 10**7
_EXTRAS = {"onnx": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Products:
    """How many of a network's matrix products and convolutions a runtime computes in integers.

    integers: multiplied and summed as integers; all: with those in floating point; weights_only: of `all`, those whose
    weights are integers that become floating point before they are multiplied; fused: further ones inside larger
    kernels (attention in one piece), of which the runtime does not say how they are computed: in neither number.
    """

    integers: int
    all: int
    weights_only: int = 0
    fused: int = 0

    def describe(self) -> str:
        """One line for people."""
        said = f"{self.integers} of {self.all} products in integers"
        if self.weights_only:
            said += f", {self.weights_only} with integer weights only"
        if self.fused:
            said += f", {self.fused} more fused into larger kernels and not counted"
        return said


class Session(Protocol):
    """What an adapter makes of a runtime."""

    def run(self, images: Array) -> Array: ...
    def products(self) -> Products: ...


@dataclass(frozen=True)
class RuntimeModel:
    """An exported model in a runtime, on the CPU. `model(images)` gives logits, as every model here does.

    bits: of the run, `w8a8`, or `fp32` for an export of full precision; seed: of the calibration images, where they
    were made; weight_bytes: of what the model was exported from; precision: what is not computed in integers is in it.
    """

    path: Path
    runtime: str
    session: Session
    origin: Origin
    preprocessing: Preprocessing
    bits: str
    num_classes: int
    weight_bytes: int
    recipe: str | None
    seed: int | None
    precision: str = FULL

    @property
    def name(self) -> str:
        return self.origin.name

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return class_names(self.origin, self.num_classes)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Raises UsageError for any device but the CPU."""
        if device.type != "cpu":
            raise UsageError(f"{self.path} runs in {self.runtime} on the CPU, not on {device}")

    def run(self, images: Array) -> Array:
        """images: [B, 3, H, W], normalised -> logits [B, C]. Raises UsageError for another shape."""
        wanted = (3, *self.preprocessing.image_size)
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise UsageError(f"images have the shape {images.shape}, and {self.path} takes (batch, {wanted})")
        return self.session.run(np.ascontiguousarray(images, dtype=np.float32))

    def __call__(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W], normalised -> logits [B, C]."""
        return torch.from_numpy(self.run(images.numpy(force=True)))

    def describe(self) -> str:
        """One line for people."""
        recipe = "" if self.recipe is None else f", recipe {self.recipe}"
        rest = "" if self.precision == FULL else f", {self.precision} where not integers"
        return f"{self.name}, {self.bits.upper()}{recipe}, in {self.runtime}{rest}"


def open_model(
    path: Path | str, runtime: str = "onnxruntime", *, threads: int | None = None, precision: str = FULL
) -> RuntimeModel:
    """Open an ONNX file that `dfq.export` wrote.

    runtime: one of `RUNTIMES`. threads: how many compute, None for as many as the runtime chooses. precision: of what
    is not computed in integers: `fp32`, or `bf16` in OpenVINO, which takes it by itself on processors that have it.

    Raises: UsageError for a runtime or a precision that is not known or that it has not, or threads below 1; DfqError
    for a package that is not installed, a processor without bf16, and a file that is missing, damaged, not of
    `dfq.export`, or not to the runtime's liking.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"unknown runtime {runtime!r}: choose from {', '.join(RUNTIMES)}")
    if threads is not None and threads < 1:
        raise UsageError(f"the number of threads is {threads}; it must be 1 or more")
    if precision not in (FULL, HALF):
        raise UsageError(f"unknown precision {precision!r}: choose from {FULL}, {HALF}")
    if precision == HALF and runtime != "openvino":
        raise UsageError(f"{runtime} computes in {FULL} what it does not in integers; openvino can do so in {HALF}")
    if precision == HALF and this_machine().lacks_bfloat16:
        raise DfqError(f"this processor has no instruction for {HALF}: leave the precision at {FULL}")
    file = Path(path)
    package = _import(runtime)
    graph = _read(file)
    described = _description(file, graph)
    try:
        session = _ADAPTERS[runtime](package, file, threads, precision)
    # The exceptions of both runtimes share no base class but Exception.
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise DfqError(f"{runtime} cannot run {file}: {reason}") from error
    return RuntimeModel(path=file, runtime=runtime, session=session, precision=precision, **described)


def integer_products(model: RuntimeModel) -> Products:
    """What of the model its runtime computes in integers, after it has optimised the graph."""
    return model.session.products()


def is_onnx_file(target: Path | str) -> bool:
    """Whether `target` names an ONNX file; it may be missing."""
    return Path(target).suffix == ".onnx"


def missing_packages(runtime: str) -> str | None:
    """What has to be installed before `runtime` can be used, as one line; None where all is there."""
    for package in ("onnx", runtime):
        if importlib.util.find_spec(package) is None:
            return _missing(package)
    return None


def _missing(package: str) -> str:
    return f'{package} is not installed: pip install "dfq[{_EXTRAS[package]}]"'


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DfqError(_missing(package)) from error


def _read(file: Path) -> Any:
    """The file as an `onnx.ModelProto`."""
    onnx = _import("onnx")
    if not file.is_file():
        raise DfqError(f"there is no file {file}; `dfq export` makes one of a quantized model")
    try:
        model = onnx.load(file, load_external_data=False)
    except OSError as error:
        raise DfqError(f"cannot read {file}: {error.strerror or error}") from error
    # What protobuf raises for other bytes is a class of its C extension, and not always the same one.
    except Exception as error:
        raise DfqError(f"{file} is not a whole ONNX file; export the model again") from error
    if any(tensor.external_data or tensor.data_location for tensor in _tensors(model)):
        raise DfqError(f"{file} has data in other files, which `dfq export` never does; export the model again")
    if not model.graph.node:
        raise DfqError(f"{file} is not a whole ONNX file: it holds no network; export the model again")
    return model


def _tensors(model: Any) -> Iterator[Any]:
    """All of an `onnx.ModelProto`, also those in attributes, functions and inner graphs."""
    # Not by recursion: graphs may lie in one another as deep as a file is long.
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes += graph.node
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            continue
        for attribute in nodes.pop().attribute:
            graphs += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def _description(file: Path, model: Any) -> dict[str, Any]:
    """What the file says of itself, as the fields of a `RuntimeModel`."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    if _METADATA not in entries:
        raise DfqError(f"{file} was not written by dfq.export: it does not say how its images are prepared")
    try:
        said = json.loads(entries[_METADATA])
        if said["format"] != FORMAT or said["version"] != VERSION:
            raise DfqError(
                f"{file} has the format {said['format']!r}, version {said['version']!r}; this dfq reads {FORMAT}, "
                f"version {VERSION}"
            )
        described = {
            "origin": Origin.from_dict(said["model"]),
            "preprocessing": Preprocessing.from_dict(said["preprocessing"]),
            "bits": str(said["bits"]),
            "num_classes": int(said["num_classes"]),
            "weight_bytes": int(said["weight_bytes"]),
            "recipe": said.get("recipe"),
            "seed": said.get("seed"),
        }
        if not isinstance(described["recipe"], str | None) or not isinstance(described["seed"], int | None):
            raise TypeError("the recipe is no name, or the seed no number")
        if not 0 < described["num_classes"] <= _MAX_CLASSES or described["weight_bytes"] < 0:
            raise ValueError("the number of classes or bytes cannot be meant")
    except UsageError as error:
        raise DfqError(f"{file} is damaged: {error}") from error
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        raise DfqError(f"{file} is damaged: what dfq noted in it cannot be read ({_reason(error)})") from error
    names = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    if names != ([INPUT], [OUTPUT]):
        raise DfqError(f"{file} is damaged: its input is not `{INPUT}` alone, or its output not `{OUTPUT}`")
    return described


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class _OnnxRuntime:
    """onnxruntime's CPU kernels."""

    def __init__(self, package: Any, file: Path, threads: int | None, _precision: str) -> None:
        self._package, self._file, self._threads = package, file, threads
        self._session = self._open()

    def run(self, images: Array) -> Array:
        logits: Array = self._session.run([OUTPUT], {INPUT: images})[0]
        return logits

    def products(self) -> Products:
        with tempfile.TemporaryDirectory() as folder:
            optimised = Path(folder) / "optimised.onnx"
            self._open(optimised)
            return count_products(_read(optimised))

    def _open(self, optimised: Path | None = None) -> Any:
        options = self._package.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads or 0
        # Threads that wait for the next images by spinning take the cores from whatever else is measured or loaded.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
        return self._package.InferenceSession(str(self._file), options, providers=["CPUExecutionProvider"])


class _OpenVino:
    """OpenVINO's CPU plugin."""

    def __init__(self, package: Any, file: Path, threads: int | None, precision: str) -> None:
        self._file = file
        core = _core(package)
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINTS[precision]}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)
        self._request = self._compiled.create_infer_request()

    def run(self, images: Array) -> Array:
        self._request.infer({INPUT: images}, share_inputs=True)
        # Its memory is the runtime's, and written again in the next run.
        logits: Array = self._request.get_tensor(OUTPUT).data.copy()
        return logits

    def products(self) -> Products:
        layers: Counter[str] = Counter()
        for operation in self._compiled.get_runtime_model().get_ordered_ops():
            info = operation.get_rt_info()
            if info["layerType"].value in ("FullyConnected", "MatMul", "Convolution"):
                layers[info["runtimePrecision"].value] += 1
        # Attention in one piece is a kernel of a kind that also has nothing to do with products: what is not seen is
        # fused, and known from the file.
        fused = count_products(_read(self._file)).all - layers.total()
        return Products(layers["u8"] + layers["i8"], layers.total(), fused=max(0, fused))


@cache
def _core(openvino: Any) -> Any:
    """One for the process. Each core gives the thread a stack for its signal handlers and takes it away in the end.

    Cores that do not end in the reverse of the order they began in leave the thread a stack that is gone, and the next
    signal that is handled there (SIGCHLD, after a `DataLoader` with workers) ends the process.
    """
    return openvino.Core()


def count_products(model: Any) -> Products:
    """By operator, in an `onnx.ModelProto`."""
    integers = floating = weights_only = 0
    for node in model.graph.node:
        if node.op_type in _INTEGER:
            integers += 1
        elif node.op_type == "MatMulNBits":
            level = next((entry.i for entry in node.attribute if entry.name == "accuracy_level"), 0)
            if level == _INT8_LEVEL:
                integers += 1
            else:
                weights_only += 1
        elif node.op_type == "Attention":
            # Of these two operators, onnxruntime's own projects its input too.
            floating += 3 if node.domain == "com.microsoft" else 2
        else:
            floating += _FLOATING.get(node.op_type, 0)
    return Products(integers, integers + floating + weights_only, weights_only)


_INTEGER = {"ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
_INTEGER |= {"QGemm", "QLinearConv", "QLinearMatMul"}
_FLOATING = {"Conv": 1, "FusedConv": 1, "FusedGemm": 1, "FusedMatMul": 1, "Gemm": 1, "MatMul": 1}
_FLOATING |= {"MultiHeadAttention": 2, "NhwcFusedConv": 1, "TransposeMatMul": 1}
# At this `accuracy_level` activations are rounded to 8 bits, and products are sums of integers.
_INT8_LEVEL = 4
_HINTS = {FULL: "f32", HALF: "bf16"}
_ADAPTERS: dict[str, Callable[[Any, Path, int | None, str], Session]] = {
    "onnxruntime": _OnnxRuntime,
    "openvino": _OpenVino,
}
