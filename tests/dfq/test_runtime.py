"""Exported models in onnxruntime and OpenVINO, against logits worked out in numpy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch.utils.data import TensorDataset

import dfq
from dfq import runtime as runtime_module
from dfq.errors import DfqError, UsageError
from dfq.machine import Machine
from dfq.models import Model
from dfq.runtime import Products, count_products, integer_products, is_onnx_file, missing_packages, open_model

RUNTIMES = ["onnxruntime", "openvino"]


def random_images(count: int, seed: int = 0) -> np.ndarray:
    # Means over 32 pixels would all be near zero: each row gets one of its own. They are odd multiples of 1/4096, so
    # that none lies where the last bit of a sum decides how it is rounded to 1/16.
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(count, 3, 32, 32)) + rng.normal(size=(count, 3, 32, 1)) * 3
    return (np.round(pixels * 64) / 64 + 1 / 4096).astype(np.float32)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("quantized", [False, True])
def test_logits(runtime: str, quantized: bool, row_means: Any, described: dict[str, Any], tmp_path: Path) -> None:
    path = row_means.write(tmp_path / "m.onnx", described, quantized=quantized)
    model = open_model(path, runtime, threads=1)
    for count in (1, 5, 2):
        images = random_images(count, seed=count)
        expected = row_means.logits(images, quantized=quantized)
        np.testing.assert_allclose(model.run(images), expected, atol=1e-4)
        np.testing.assert_allclose(model(torch.from_numpy(images)).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_logits_stay_when_the_next_batch_is_run(
    runtime: str, row_means: Any, described: dict[str, Any], tmp_path: Path
) -> None:
    model = open_model(row_means.write(tmp_path / "m.onnx", described), runtime)
    first = model.run(random_images(3))
    kept = first.copy()
    model.run(random_images(3, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_models_closed_in_any_order_leave_signals_a_place_to_be_handled(
    row_means: Any, described: dict[str, Any], tmp_path: Path
) -> None:
    """Where OpenVINO's are closed in the order they were opened, it can leave a process that the next signal ends."""
    path = row_means.write(tmp_path / "m.onnx", described)
    program = f"""
import gc, signal, subprocess
from dfq.runtime import open_model
signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch's DataLoader does when it has workers
first, second = (open_model({str(path)!r}, "openvino", threads=1) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
subprocess.run(["true"], check=True)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_images_that_are_not_contiguous_or_not_float32(
    row_means: Any, described: dict[str, Any], tmp_path: Path
) -> None:
    images = random_images(4)
    model = open_model(row_means.write(tmp_path / "m.onnx", described))
    expected = row_means.logits(images[::2])
    np.testing.assert_allclose(model.run(images[::2]), expected, atol=1e-4)
    np.testing.assert_allclose(model.run(images[::2].astype(np.float64)), expected, atol=1e-4)
    transposed = torch.from_numpy(images).transpose(2, 3)
    np.testing.assert_allclose(model(transposed).numpy(), row_means.logits(transposed.numpy()), atol=1e-4)


def test_what_the_file_says(row_means: Any, described: dict[str, Any], reference: Model, tmp_path: Path) -> None:
    path = row_means.write(tmp_path / "m.onnx", described)
    model = dfq.open_model(str(path))
    assert (model.origin, model.preprocessing) == (reference.origin, reference.preprocessing)
    assert (model.name, model.bits, model.num_classes, model.seed) == ("reference", "w8a8", 10, 7)
    assert (model.weight_bytes, model.recipe, model.runtime) == (1234, "deploy", "onnxruntime")
    assert model.class_names == reference.class_names
    assert model.describe() == "reference, W8A8, recipe deploy, in onnxruntime"
    plain = open_model(row_means.write(path, described | {"bits": "fp32", "recipe": None, "seed": None}), "openvino")
    assert plain.describe() == "reference, FP32, in openvino"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_evaluate(runtime: str, row_means: Any, described: dict[str, Any], tmp_path: Path) -> None:
    images = random_images(12)
    logits = row_means.logits(images, quantized=True)
    # The best class on nine images, the second best on three.
    labels = np.argsort(-logits, axis=1)[np.arange(12), [0] * 9 + [1] * 3]
    data = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    model = open_model(row_means.write(tmp_path / "m.onnx", described, quantized=True), runtime)
    full = open_model(row_means.write(tmp_path / "f.onnx", described | {"bits": "fp32"}), runtime)
    result = dfq.evaluate(model, data, baseline=full, batch_size=5, progress=False)
    assert (result.top1, result.top5, result.num_images) == (75.0, 100.0, 12)
    assert (result.bits, result.device, result.runtime, result.weight_bytes) == ("w8a8", "cpu", runtime, 1234)
    assert result.comparison is not None
    exact = row_means.logits(images)
    assert result.comparison.agreement == pytest.approx(100 * np.mean(exact.argmax(1) == logits.argmax(1)))
    noise = 20 * np.log10(np.linalg.norm(exact) / np.linalg.norm(exact - logits))
    assert result.comparison.logit_sqnr_db == pytest.approx(noise, abs=0.01)
    assert result.to_dict()["runtime"] == runtime
    assert result.versions[runtime] == sys.modules[runtime].__version__.split("-")[0]
    speed = result.table().splitlines()[-1]
    assert speed.endswith(f"forward passes in {runtime} on cpu")
    assert "fake" not in speed


def test_it_stays_on_the_cpu(row_means: Any, described: dict[str, Any], tmp_path: Path) -> None:
    model = open_model(row_means.write(tmp_path / "m.onnx", described))
    model.to(torch.device("cpu"))
    with pytest.raises(UsageError, match=r"m\.onnx runs in onnxruntime on the CPU, not on cuda:0"):
        model.to(torch.device("cuda:0"))


def test_images_of_another_shape(row_means: Any, described: dict[str, Any], tmp_path: Path) -> None:
    model = open_model(row_means.write(tmp_path / "m.onnx", described))
    for shape in ((3, 32, 32), (1, 3, 32, 31), (1, 1, 32, 32)):
        with pytest.raises(UsageError, match="images have the shape"):
            model.run(np.zeros(shape, np.float32))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_products_in_integers(runtime: str, row_means: Any, described: dict[str, Any], tmp_path: Path) -> None:
    full = open_model(row_means.write(tmp_path / "f.onnx", described), runtime)
    integer = open_model(row_means.write(tmp_path / "m.onnx", described, quantized=True), runtime)
    assert integer_products(full) == Products(0, 1)
    assert integer_products(integer) == Products(1, 1)


def graph_of(*operators: tuple[str, dict[str, Any]]) -> Any:
    nodes = [helper.make_node(kind, ["x"], [f"y{index}"], **given) for index, (kind, given) in enumerate(operators)]
    return helper.make_model(helper.make_graph(nodes, "products", [], []))


def test_products_counted_by_operator() -> None:
    own = {"domain": "com.microsoft"}
    floating = graph_of(("MatMul", {}), ("Gemm", {}), ("Conv", {}), ("Softmax", {}), ("FusedMatMul", own))
    assert count_products(floating) == Products(0, 4)
    # q k^T and the product with v; onnxruntime's operator of that name also computes q, k and v, in one product.
    attention = graph_of(("Attention", {}), ("Attention", own), ("MultiHeadAttention", own))
    assert count_products(attention) == Products(0, 7)
    kinds = ("MatMulIntegerToFloat", "QGemm", "DynamicQuantizeMatMul")
    assert count_products(graph_of(("QLinearConv", {}), *((kind, own) for kind in kinds))) == Products(4, 4)
    nibbles = graph_of(*(("MatMulNBits", own | {"accuracy_level": level}) for level in (0, 1, 4)), ("MatMulNBits", own))
    assert count_products(nibbles) == Products(1, 4, weights_only=3)


def test_products_described() -> None:
    assert Products(72, 74).describe() == "72 of 74 products in integers"
    said = Products(50, 52, weights_only=2, fused=22).describe()
    assert said == (
        "50 of 52 products in integers, 2 with integer weights only, 22 more fused into larger kernels and not counted"
    )


def test_what_cannot_be_asked_for(row_means: Any, described: dict[str, Any], tmp_path: Path) -> None:
    path = row_means.write(tmp_path / "m.onnx", described)
    with pytest.raises(UsageError, match="unknown runtime 'tensorrt': choose from onnxruntime, openvino"):
        open_model(path, "tensorrt")
    with pytest.raises(UsageError, match="the number of threads is 0; it must be 1 or more"):
        open_model(path, threads=0)


def test_what_is_not_integers_in_bf16(
    row_means: Any, described: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = row_means.write(tmp_path / "m.onnx", described, quantized=True)
    monkeypatch.setattr(runtime_module, "this_machine", lambda: Machine("old", 2, ("avx2",)))
    with pytest.raises(DfqError, match="this processor has no instruction for bf16: leave the precision at fp32"):
        open_model(path, "openvino", precision="bf16")
    monkeypatch.setattr(runtime_module, "this_machine", lambda: Machine("new", 2, ("amx_bf16",)))
    for runtime, precision, said in (
        ("openvino", "fp16", "unknown precision 'fp16': choose from fp32, bf16"),
        (
            "onnxruntime",
            "bf16",
            "onnxruntime computes in fp32 what it does not in integers; openvino can do so in bf16",
        ),
    ):
        with pytest.raises(UsageError, match=said):
            open_model(path, runtime, precision=precision)
    model = open_model(path, "openvino", precision="bf16")
    assert model.describe().endswith("in openvino, bf16 where not integers")
    images = random_images(6)
    expected = row_means.logits(images, quantized=True)
    np.testing.assert_allclose(model.run(images), expected, atol=2**-6 * np.abs(expected).max())
    data = TensorDataset(torch.from_numpy(images), torch.zeros(6, dtype=torch.int64))
    result = dfq.evaluate(model, data, progress=False)
    assert result.runtime == "openvino (bf16)"
    assert "openvino" in result.versions


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "openvino"])
def test_a_missing_package_names_the_extra(
    package: str, row_means: Any, described: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = row_means.write(tmp_path / "m.onnx", described)
    runtime = "openvino" if package == "openvino" else "onnxruntime"
    assert missing_packages(runtime) is None
    monkeypatch.setitem(sys.modules, package, None)
    said = f'{package} is not installed: pip install "dfq[{"openvino" if package == "openvino" else "onnx"}]"'
    with pytest.raises(DfqError) as caught:
        open_model(path, runtime)
    assert str(caught.value) == said
    assert missing_packages(runtime) == said


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_files_that_are_no_exported_models(
    runtime: str, row_means: Any, described: dict[str, Any], tmp_path: Path
) -> None:
    path = row_means.write(tmp_path / "m.onnx", described)
    whole = path.read_bytes()

    def refused(said: str) -> None:
        with pytest.raises(DfqError) as caught:
            open_model(path, runtime)
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    for content in (b"", whole[: len(whole) // 2], whole[:-1], b"no onnx", np.random.default_rng(0).bytes(500)):
        path.write_bytes(content)
        refused("is not a whole ONNX file")
    row_means.write(path, None)
    refused("was not written by dfq.export")
    path.unlink()
    refused("there is no file")
    path.mkdir()
    refused("there is no file")


def test_metadata_that_is_damaged(row_means: Any, described: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    without = {key: value for key, value in described.items() if key != "preprocessing"}
    pixels = described["preprocessing"]
    for wrong, said in (
        (without, "cannot be read (KeyError: 'preprocessing')"),
        ([], "cannot be read"),
        (described | {"model": {"nme": "vit"}}, "cannot be read (TypeError"),
        (described | {"num_classes": "many"}, "cannot be read (ValueError"),
        (described | {"preprocessing": pixels | {"std": [0, 1, 1]}}, "is damaged: std must be three positive numbers"),
        (described | {"preprocessing": None}, "cannot be read"),
        (described | {"format": "other"}, "has the format 'other', version 1; this dfq reads dfq.onnx, version 1"),
        (described | {"version": 2}, "has the format 'dfq.onnx', version 2"),
    ):
        row_means.write(path, wrong)
        with pytest.raises(DfqError) as caught:
            open_model(path)
        assert said in str(caught.value)
    row_means.write(path, described)
    model = onnx.load(path)
    model.metadata_props[0].value = json.dumps(described)[:-5]
    onnx.save(model, path)
    with pytest.raises(DfqError, match=r"is damaged: what dfq noted in it cannot be read \(JSONDecodeError"):
        open_model(path)


def changed(path: Path, change: Callable[[Any], None]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_graphs_that_cannot_be_run(runtime: str, row_means: Any, described: dict[str, Any], tmp_path: Path) -> None:
    path = row_means.write(tmp_path / "m.onnx", described)

    def unknown_operator(model: Any) -> None:
        model.graph.node[0].op_type = "ReduceMeaning"

    changed(path, unknown_operator)
    with pytest.raises(DfqError, match=rf"^{runtime} cannot run .*m\.onnx: ") as caught:
        open_model(path, runtime)
    assert "\n" not in str(caught.value)

    def another_input(model: Any) -> None:
        model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"

    changed(row_means.write(path, described), another_input)
    with pytest.raises(DfqError, match="its input is not `images` alone"):
        open_model(path, runtime)


def test_which_targets_are_onnx_files() -> None:
    assert is_onnx_file("vit.onnx")
    assert is_onnx_file(Path("models/vit.w8a8.onnx"))
    assert not is_onnx_file("vit_tiny_patch16_224.augreg_in21k")
    assert not is_onnx_file("vit-onnx")
