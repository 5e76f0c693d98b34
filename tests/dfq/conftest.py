"""Models that the tests of the upper floor share: the trained reference, and tiny untrained Vision Transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.architectures import build_architecture
from dfq.models import Model, Origin
from dfq.preprocessing import Preprocessing

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.fixture(scope="session")
def reference() -> Model:
    """The trained model that comes with dfq."""
    return dfq.load_model("reference", device="cpu")


@pytest.fixture(scope="session")
def noise(reference: Model) -> CalibrationSet:
    """Eight images of Gaussian noise for the reference model."""
    return dfq.generate(reference, "gaussian", 8, progress=False)


@pytest.fixture
def tiny() -> Callable[..., Model]:
    """A two-block ViT of 4x4 patches whose parameters are all random, so that none hides behind a zero or a one."""

    def make(architecture: str = "vit_tiny_patch16_224", seed: int = 0, **changes: Any) -> Model:
        arguments = TINY | changes
        module = build_architecture(architecture, arguments).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        preprocessing = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        return Model(module, preprocessing, Origin("tiny", architecture, arguments))

    return make


@pytest.fixture
def images_for() -> Callable[..., CalibrationSet]:
    """Random pictures of 32x32 pixels in 4x4 patches; `mask` says which patches are kept."""

    def make(count: int = 5, mask: torch.Tensor | None = None, **changes: Any) -> CalibrationSet:
        generator = torch.Generator().manual_seed(1)
        content: dict[str, Any] = {
            "images": torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
            "mask": torch.ones(count, 4, 4, dtype=torch.bool) if mask is None else mask,
            "labels": None,
            "confidence": None,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
            "run": {"method": "test"},
        }
        return CalibrationSet(**(content | changes))

    return make


class RowMeans:
    """A classifier of 32x32 images: the mean of each row of pixels, a linear layer, the mean over the three colours.

    Quantized, the means are rounded to `1/16 (0..255 - 128)`. Weights are integers times a scale per class, of 7 bits:
    with 8, sums of two products saturate on processors without VNNI.
    """

    STEP = 1 / 16

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.integers = rng.integers(-63, 64, (32, 10)).astype(np.int8)
        self.scales = rng.uniform(0.01, 0.02, 10).astype(np.float32)
        self.offset = rng.normal(size=10).astype(np.float32)

    def logits(self, images: np.ndarray, *, quantized: bool = False) -> np.ndarray:
        means = images.astype(np.float64).mean(3)
        if quantized:
            means = self.STEP * np.clip(np.round(means / self.STEP), -128, 127)
        return (means @ (self.integers * self.scales.astype(np.float64)) + self.offset).mean(1)

    def write(self, path: Path, described: dict[str, Any] | None, *, quantized: bool = False) -> Path:
        """described: what is noted in the file under `dfq`."""
        constants = {"width": np.array([3]), "colours": np.array([1]), "offset": self.offset, "integers": self.integers}
        constants |= {"scales": self.scales, "step": np.float32(self.STEP), "zero_point": np.uint8(128)}
        constants |= {"zeros": np.zeros(10, np.int8), "weight": (self.integers * self.scales).astype(np.float32)}
        nodes = [helper.make_node("ReduceMean", ["images", "width"], ["means"], keepdims=0)]
        if quantized:
            nodes += [
                helper.make_node("QuantizeLinear", ["means", "step", "zero_point"], ["rounded"]),
                helper.make_node("DequantizeLinear", ["rounded", "step", "zero_point"], ["input"]),
                helper.make_node("DequantizeLinear", ["integers", "scales", "zeros"], ["weight"], axis=1),
            ]
            del constants["weight"]
        nodes += [
            helper.make_node("MatMul", ["input" if quantized else "means", "weight"], ["product"]),
            helper.make_node("Add", ["product", "offset"], ["of_colours"]),
            helper.make_node("ReduceMean", ["of_colours", "colours"], ["logits"], keepdims=0),
        ]
        used = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            "row_means",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 32, 32])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        if described is not None:
            model.metadata_props.add(key="dfq", value=json.dumps(described))
        onnx.save(model, path)
        return path


@pytest.fixture(scope="session")
def row_means() -> RowMeans:
    """A classifier whose logits are known without any runtime."""
    return RowMeans()


@pytest.fixture
def described(reference: Model) -> dict[str, Any]:
    """What an export of the reference model at W8A8 notes in its file."""
    return {
        "format": "dfq.onnx",
        "version": 1,
        "model": reference.origin.to_dict(),
        "bits": "w8a8",
        "recipe": "deploy",
        "preprocessing": reference.preprocessing.to_dict(),
        "num_classes": 10,
        "seed": 7,
        "weight_bytes": 1234,
        "dfq": dfq.__version__,
    }
