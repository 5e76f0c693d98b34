"""Exported files: integers as stored, the scales that were evaluated, and a check that finds what is wrong."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image, ImageOps

import dfq
from calibration.calibration_set import CalibrationSet
from dfq import reference as embedded
from dfq.errors import DfqError, UsageError
from dfq.models import Model
from dfq.onnx_check import Agreement, check_graph
from dfq.onnx_export import export_network
from dfq.ptq.engine import QuantizedModel
from dfq.recipe import load_recipe, recipe_from_dict
from quantizers import UniformQuantizer

Tensors = dict[str, onnx.TensorProto]


@pytest.fixture(scope="module")
def quantized(reference: Model, noise: CalibrationSet) -> QuantizedModel:
    return dfq.quantize(reference, "w4a8", calibration=noise, recipe="deploy", progress=False)


@pytest.fixture(scope="module")
def exported(quantized: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> dfq.Export:
    return dfq.export(quantized, tmp_path_factory.mktemp("onnx") / "new" / "reference.onnx")


def initializers(path: Path) -> Tensors:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def test_weights_are_the_integers_that_were_evaluated(exported: dfq.Export, quantized: QuantizedModel) -> None:
    tensors = initializers(exported.path)
    layer: Any = quantized.module.get_submodule("blocks.0.mlp.fc1")
    stored = tensors["blocks.0.mlp.fc1.weight.integers"]
    assert stored.data_type == onnx.TensorProto.INT4
    assert len(stored.raw_data) == layer.integers.numel() // 2
    assert onnx.numpy_helper.to_array(stored).astype(np.int8).tolist() == layer.integers.t().tolist()
    assert onnx.numpy_helper.to_array(tensors["blocks.0.mlp.fc1.weight.scale"]).tolist() == (
        layer.weight_quantizer.scale.tolist()
    )
    # The ends have more bits.
    assert tensors["head.weight.integers"].data_type == onnx.TensorProto.INT8


def test_activations_have_the_scales_that_were_evaluated(exported: dfq.Export, quantized: QuantizedModel) -> None:
    graph = onnx.load(exported.path).graph
    tensors = initializers(exported.path)
    pairs = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    sites = {name: q for name, q in quantized.sites.items() if not name.endswith("weight")}
    assert pairs.keys() == sites.keys()
    assert exported.pairs == len(sites)
    assert exported.elementary == ()
    for name, quantizer in sites.items():
        _, scale, zero_point = pairs[name].input
        assert isinstance(quantizer, UniformQuantizer)
        assert onnx.numpy_helper.to_array(tensors[scale]) == quantizer.tensors()["scale"].item()
        assert onnx.numpy_helper.to_array(tensors[zero_point]) == quantizer.tensors()["zero_point"].item()


def test_any_batch_size_gives_the_logits_of_the_model(
    exported: dfq.Export, quantized: QuantizedModel, noise: CalibrationSet
) -> None:
    x, _ = noise.batches(5, torch.device("cpu"))[0]
    torch.testing.assert_close(logits(exported.path, x), quantized(x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(logits(exported.path, x[:1]), quantized(x[:1]), rtol=0.05, atol=0.05)


def test_the_file_says_what_it_is(exported: dfq.Export, quantized: QuantizedModel) -> None:
    graph = onnx.load(exported.path)
    onnx.checker.check_model(graph, full_check=True)
    (entry,) = graph.metadata_props
    said = json.loads(entry.value)
    assert (entry.key, said["format"], said["version"]) == ("dfq", "dfq.onnx", 1)
    assert (said["bits"], said["recipe"], said["num_classes"], said["seed"]) == ("w4a8", "deploy", 10, 0)
    assert said["preprocessing"] == quantized.preprocessing.to_dict()
    assert said["model"] == quantized.origin.to_dict()
    assert graph.opset_import[0].version == exported.opset == 21
    assert exported.size == exported.path.stat().st_size
    # Not where on this machine the code lies that made it.
    assert str(Path(dfq.__file__).parent).encode() not in exported.path.read_bytes()


def test_the_program_of_the_page_runs_without_dfq_and_pytorch(exported: dfq.Export, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    program = page.partition("```python\n")[2].partition("```")[0]
    shutil.copy(exported.path, tmp_path / "vit.onnx")
    images, labels = embedded.digits("test")
    # Larger than the model takes and not square, as photographs are.
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((128, 128))
    ImageOps.pad(picture, (160, 128)).save(tmp_path / "photograph.jpg")
    hidden = "import sys\nsys.modules |= dict.fromkeys(['torch', 'dfq', 'timm', 'torchvision'])\n"
    done = subprocess.run(
        [sys.executable, "-c", hidden + program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"classes: [{labels[0].item()} ")


def test_what_is_said_of_an_export(exported: dfq.Export) -> None:
    assert exported.agreement.num_images == 8
    assert exported.agreement.agreement == 100
    assert exported.agreement.sqnr_db > 20
    said = exported.describe()
    assert f"{exported.size / 1e6:.2f} MB, opset 21" in said
    assert json.loads(json.dumps(exported.to_dict()))["agreement"]["num_images"] == 8


def test_a_byte_for_each_weight_where_that_is_wanted(quantized: QuantizedModel, tmp_path: Path) -> None:
    exported = dfq.export(quantized, tmp_path / "m.onnx", int4=False, opset=23)
    stored = initializers(exported.path)["blocks.0.mlp.fc1.weight.integers"]
    assert stored.data_type == onnx.TensorProto.INT8
    assert exported.opset == 23
    assert np.abs(onnx.numpy_helper.to_array(stored)).max() <= 8


@pytest.mark.parametrize(("size", "ends"), [(32, 8), (48, None)])
def test_weights_in_groups_run_in_both_runtimes(
    size: int, ends: int | None, reference: Model, noise: CalibrationSet, tmp_path: Path
) -> None:
    """48 does not divide the 64 inputs; without bits of its own the patch embedding, a convolution, has groups too."""
    recipe = replace(load_recipe("deploy"), first_last_bits=ends).grouped(size)
    quantized = dfq.quantize(reference, "w4a8", calibration=noise, recipe=recipe, progress=False)
    exported = dfq.export(quantized, tmp_path / "m.onnx")
    layer: Any = quantized.module.get_submodule("blocks.0.mlp.fc1")
    stored = initializers(exported.path)["blocks.0.mlp.fc1.weight.integers"]
    assert stored.data_type == onnx.TensorProto.INT4
    assert list(stored.dims) == [256, 2, size]
    codes = onnx.numpy_helper.to_array(stored).astype(np.int32).reshape(256, 2 * size)[:, :64]
    assert np.array_equal(codes, layer.integers.numpy())
    x, _ = noise.batches(4, torch.device("cpu"))[0]
    for runtime in ("onnxruntime", "openvino"):
        found = dfq.open_model(exported.path, runtime)(x)
        # An activation that lies between two integers falls to either side.
        assert (found - quantized(x)).norm() < 0.02 * quantized(x).norm()


def test_other_grids_are_computed_and_named(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    quantized = dfq.quantize(tiny(), "w3a5", calibration=images_for(), recipe="fast", progress=False)
    exported = dfq.export(quantized, tmp_path / "m.onnx")
    assert {"blocks.0.attn.q", "blocks.1.attn.k"} <= set(exported.elementary)
    assert "elementary operations" in exported.describe()
    x, _ = images_for().batches(4, torch.device("cpu"))[0]
    # At 5 bits one activation that is rounded the other way moves a logit by some hundredths.
    assert (logits(exported.path, x) - quantized(x)).norm() < 0.1 * quantized(x).norm()


def test_swin(tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], tmp_path: Path) -> None:
    model = tiny(
        "swin_tiny_patch4_window7_224", depths=(1, 2), num_heads=(2, 2), patch_size=4, window_size=4, depth=None
    )
    images = images_for(8, mask=torch.ones(8, 8, 8, dtype=torch.bool))
    quantized = dfq.quantize(model, "w8a8", calibration=images, recipe="deploy", progress=False)
    exported = dfq.export(quantized, tmp_path / "swin.onnx")
    x, _ = images.batches(3, torch.device("cpu"))[0]
    torch.testing.assert_close(logits(exported.path, x), quantized(x), rtol=0.05, atol=0.05)


def test_full_precision_without_a_check(reference: Model, noise: CalibrationSet, tmp_path: Path) -> None:
    export_network(reference, tmp_path / "full.onnx")
    x, _ = noise.batches(4, torch.device("cpu"))[0]
    torch.testing.assert_close(logits(tmp_path / "full.onnx", x), reference(x), rtol=1e-3, atol=1e-3)


def damaged(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    graph = onnx.load(path)
    for tensor in graph.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), name))
    return bytes(graph.SerializeToString())


@pytest.mark.parametrize(
    ("name", "site"),
    [
        # What a changed tensor is first seen at.
        ("blocks.1.attn.qkv.input.scale", "blocks.1.attn.qkv.input"),
        ("blocks.1.norm2.weight", "blocks.1.mlp.fc1.input"),
        ("blocks.0.attn.proj.bias", "blocks.0.mlp.fc1.input"),
    ],
)
def test_a_graph_that_computes_something_else(
    name: str, site: str, exported: dfq.Export, quantized: QuantizedModel
) -> None:
    check_graph(exported.path.read_bytes(), quantized)
    content = damaged(exported.path, name, lambda values: (values * np.float32(1.1)).astype(values.dtype))
    with pytest.raises(DfqError, match=f"at {site} its integers"):
        check_graph(content, quantized)


def test_a_classifier_that_computes_something_else(exported: dfq.Export, quantized: QuantizedModel) -> None:
    content = damaged(exported.path, "head.bias", lambda values: values + np.float32(1))
    with pytest.raises(DfqError, match="its logits are off"):
        check_graph(content, quantized)


def test_a_mismatch_leaves_what_was_there(
    quantized: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m.onnx"
    target.write_text("earlier")
    monkeypatch.setattr("dfq.onnx_export.standardize", lambda module, sites: _with_another_bias(module, sites))
    with pytest.raises(DfqError, match="does not compute what the model does"):
        dfq.export(quantized, target)
    assert target.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [target]


def _with_another_bias(module: Any, sites: Any) -> Any:
    from dfq.onnx_layers import standardize

    network, elementary = standardize(module, sites)
    network.get_submodule("blocks.1.mlp.fc1").bias.data.add_(0.5)
    return network, elementary


def test_what_cannot_be_exported(
    quantized: QuantizedModel, reference: Model, noise: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="only a quantized model"):
        dfq.export(reference, tmp_path / "m.onnx")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="opset 17 is not to be had: choose from 21, 22, 23"):
        dfq.export(quantized, tmp_path / "m.onnx", opset=17)
    with pytest.raises(UsageError, match=r"ends in \.onnx"):
        dfq.export(quantized, tmp_path / "m.pt")
    content = load_recipe("deploy").to_dict() | {
        "sites": {"blocks.1.mlp.fc2.weight": {"quantizer": "log", "split": "sign", "granularity": "tensor"}}
    }
    content |= {"compensation": None}
    content = {key: value for key, value in content.items() if value is not None and key != "name"}
    recipe = recipe_from_dict(content, name="test", where="test")
    logarithmic = dfq.quantize(reference, "w8a8", calibration=noise, recipe=recipe, progress=False)
    with pytest.raises(DfqError, match=r"1 weights, blocks\.1\.mlp\.fc2\.weight the first, are not on a uniform grid"):
        dfq.export(logarithmic, tmp_path / "m.onnx")
    real = importlib.import_module

    def without(name: str, *arguments: Any) -> Any:
        if name == "onnxscript":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(DfqError, match=r'exporting needs onnxscript: pip install "dfq\[onnx\]"'):
        dfq.export(quantized, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_fusing_loses_is_put_down_to_the_processor_only_where_it_can_be() -> None:
    def said(fused: float, *, cuts_sums: bool) -> str:
        return Agreement(8, 100.0, 30.0, 60.0, fused, cuts_sums=cuts_sums).describe()

    assert "fuses" not in said(29.0, cuts_sums=True)
    assert "only 25.0 dB as onnxruntime fuses it here: processors without VNNI" in said(25.0, cuts_sums=True)
    assert "rounded the other way" in said(25.0, cuts_sums=False)
    assert "VNNI" not in said(25.0, cuts_sums=False)
