"""Whether an exported graph computes what the model it was made from does.

Two right implementations of a quantized network do not agree to the last bit: sums are added up in another order, a
value next to the middle between two integers is rounded the other way, and from layer to layer that grows. How far is
found by running the model itself twice, in single and in double precision: a graph may be as far from the latter as a
small multiple of the former. A graph that is wrong (a scale, an axis, an offset) is farther off, on every image, at a
site where what went in was still right.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.initial import initial_images
from dfq.errors import DfqError
from dfq.machine import this_machine
from dfq.onnx_layers import pair_sites
from dfq.ptq.engine import QuantizedModel
from dfq.statistics import sqnr_db
from quantizers import OutlierQuantizer, Quantizer

# How much farther than single precision is from double a graph may be, and by how much in any case: the mean distance
# of a site's integers, in integers, and that of the logits, relative. In a small model few values are rounded the other
# way, in one of the two runs only, but each is seen in all layers behind it; so the median image of the graph is held
# against the worst one of the model.
_TIMES = 4.0
_INTEGERS = 0.02
_LOGITS = 0.02
# So much of its signal to noise ratio a graph may lose by being fused before that is said.
_FUSED_DECIBELS = 2.0


@dataclass(frozen=True)
class Agreement:
    """How the logits of a graph compare with the model's.

    agreement: percent of images with the same class; sqnr_db: power of the model's logits over that of the difference;
    floor_db: the same for the model in single against double precision, infinite where they are equal; fused_sqnr_db:
    of the graph as onnxruntime fuses it into integer products for this processor; cuts_sums: whether this processor is
    not known to have an instruction that sums such products in full.
    """

    num_images: int
    agreement: float
    sqnr_db: float
    floor_db: float
    fused_sqnr_db: float
    cuts_sums: bool

    def describe(self) -> str:
        """A line or two for people."""
        said = (
            f"checked on {self.num_images} made images: the same class on {self.agreement:.0f} %; logits with a signal "
            f"to noise ratio of {self.sqnr_db:.1f} dB (the model against itself in double precision: "
            f"{self.floor_db:.1f} dB)"
        )
        if self.fused_sqnr_db < self.sqnr_db - _FUSED_DECIBELS:
            why = "values that lie between two integers are rounded the other way; `dfq evaluate` says what that costs"
            if self.cuts_sums:
                why = (
                    "processors without VNNI cut sums of 8-bit products off; quantize to 7-bit weights (--bits w7a8) "
                    "for them, see docs/deploy.md"
                )
            said += f"\nonly {self.fused_sqnr_db:.1f} dB as onnxruntime fuses it here: {why}"
        return said


def check_graph(content: bytes, qmodel: QuantizedModel, *, num_images: int = 8, seed: int = 0) -> Agreement:
    """Compare a graph, as onnxruntime computes it without fusing anything, with the model it was exported from.

    content: an ONNX file in which the integers of a site bear its name; num_images: dead leaves, at least 4, in two
    batches of different size.

    Raises DfqError where they differ by more than rounding, naming the first site at which they do.
    """
    wanted = qmodel.preprocessing
    images = initial_images(
        "leaves", num_images, wanted.image_size, torch.Generator().manual_seed(seed), wanted.mean, wanted.std
    )
    sites = {name: qmodel.sites[name] for name in pair_sites(qmodel.module, qmodel.sites)}
    single, codes_single = _model_run(qmodel.module, images.to(qmodel.device), sites)
    double, codes_double = _model_run(copy.deepcopy(qmodel.module).double(), images.double().to(qmodel.device), sites)
    found, codes_found = _graph_run(content, images, list(sites))
    fused, _ = _graph_run(content, images, [], fuse=True)
    for name in codes_double:  # In the order of the forward pass.
        allowed = _TIMES * float(_distances(codes_single[name], codes_double[name]).max()) + _INTEGERS
        distance = float(_distances(codes_found[name], codes_double[name]).median())
        if not distance <= allowed:
            raise DfqError(
                f"the exported graph does not compute what the model does: at {name} its integers are {distance:.3g} "
                f"off on average, where rounding explains {allowed:.3g}. Nothing was written; please report this"
            )
    allowed = _TIMES * float(_relative(single, double).max()) + _LOGITS
    error = float(_relative(found, double).median())
    if not error <= allowed:
        raise DfqError(
            f"the exported graph does not compute what the model does: its logits are off by {error:.1%}, where "
            f"rounding explains {allowed:.1%}, though the integers before them agree. Nothing was "
            "written; please report this"
        )
    same = (found.argmax(1) == single.argmax(1)).double().mean().item()
    here = this_machine()
    return Agreement(
        num_images,
        100 * same,
        _sqnr_db(found, single),
        _sqnr_db(single, double),
        _sqnr_db(fused, single),
        cuts_sums=here.instruction_sets is None or here.lacks_integer_dot,
    )


def _model_run(network: nn.Module, images: Tensor, sites: Mapping[str, Quantizer]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [B, C] and the integers of these sites, by name."""
    codes: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(quantizer: Quantizer, inputs: tuple[Tensor, ...]) -> None:
            codes[name] = _integers(quantizer, inputs[0].float()).cpu()

        return hook

    handles = [network.get_submodule(name).register_forward_pre_hook(note(name)) for name in sites]
    try:
        with torch.no_grad():
            return network(images).double().cpu(), codes
    finally:
        for handle in handles:
            handle.remove()


def _integers(quantizer: Quantizer, x: Tensor) -> Tensor:
    """As the graph has them: channels apart are zero in the product of the others."""
    if isinstance(quantizer, OutlierQuantizer):
        assert quantizer.channels is not None
        return quantizer.main.quantize(x.index_fill(-1, quantizer.channels, 0.0))
    return quantizer.quantize(x)


def _graph_run(
    content: bytes, images: Tensor, sites: list[str], *, fuse: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Like `_model_run`, in two batches."""
    import onnx
    import onnxruntime

    graph = onnx.load_from_string(content)
    made = {output for node in graph.graph.node for output in node.output}
    missing = [name for name in sites if name not in made]
    if missing:
        raise DfqError(f"the exported graph has no integers of {missing[0]}; please report this")
    for name in sites:
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    if not fuse:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (inputs,) = session.get_inputs()
    first = len(images) // 2 - 1
    parts = [session.run(None, {inputs.name: batch.numpy()}) for batch in (images[:first], images[first:])]
    logits, *codes = (torch.from_numpy(np.concatenate(outputs)) for outputs in zip(*parts, strict=True))
    return logits.double(), dict(zip(sites, codes, strict=True))


def _distances(codes: Tensor, exact: Tensor) -> Tensor:
    """[B, ...], [B, ...] -> mean distance between integers by image, [B]; infinite where shapes differ."""
    if codes.shape != exact.shape:
        return torch.full((1,), torch.inf)
    return (codes.short() - exact.short()).abs().float().flatten(1).mean(1)


def _relative(logits: Tensor, exact: Tensor) -> Tensor:
    """[B, C], [B, C] -> relative distance by image, [B]."""
    distances: Tensor = (logits - exact).norm(dim=1) / exact.norm(dim=1)
    return distances


def _sqnr_db(logits: Tensor, exact: Tensor) -> float:
    """Of all images."""
    return sqnr_db(float(exact.square().sum()), float((logits - exact).square().sum()))
