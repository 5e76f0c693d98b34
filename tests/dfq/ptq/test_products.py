"""Ranges searched by the error of matrix products: which there are, how errors count, and that they become less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.models import Model
from dfq.ptq import products
from dfq.ptq.modules import adapt
from dfq.ptq.products import Product, search_stage, stage_products
from dfq.ptq.search import fisher_logit_gradient
from dfq.ptq.stages import stages
from dfq.recipe import OutputSearch, Recipe, recipe_from_dict
from quantizers import OutlierQuantizer, Quantizer, TwinUniformQuantizer, UniformQuantizer, outlier_channels

Network = Callable[..., Model]
VIT_BLOCK = {
    ("attn.qkv.input", "attn.qkv.weight"),
    ("attn.q", "attn.k"),
    ("attn.softmax", "attn.v"),
    ("attn.proj.input", "attn.proj.weight"),
    ("mlp.fc1.input", "mlp.fc1.weight"),
    ("mlp.fc2.input", "mlp.fc2.weight"),
}


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recipe(range_search: dict[str, Any] | None, **changes: Any) -> Recipe:
    content = {"weights": {"granularity": "channel"}, "sites": {"*.attn.[qkv]": {"granularity": "head"}}} | changes
    return recipe_from_dict(
        content | ({} if range_search is None else {"range_search": range_search}), name="test", where="test"
    )


class Tape:
    """What passes every slot of an adapted network in full precision."""

    def __init__(self, network: nn.Module) -> None:
        self.values: dict[str, Tensor] = {}
        for path, module in network.named_modules():
            if isinstance(module, nn.Identity):
                module.register_forward_hook(lambda _m, _a, x, path=path: self.values.update({path: x.detach()}))

    def operands(self, product: Product) -> tuple[Tensor, Tensor]:
        """Left and right, the right one such that `left @ right` is the product."""
        right = self.values[product.right] if product.weights is None else product.weights
        return product.left_rows(self.values[product.left]), right.mT if product.transpose_right else right

    def error(self, product: Product, fitted: dict[str, Quantizer]) -> float:
        """Squared error of the product of the quantized operands."""
        left, right = self.operands(product)
        left_quantizer, right_quantizer = fitted.get(product.left), fitted.get(product.right)
        rounded_left = left if left_quantizer is None else left_quantizer(left)
        rounded_right = right
        if right_quantizer is not None:
            rounded_right = right_quantizer(right.mT).mT if product.transpose_right else right_quantizer(right)
        return float((rounded_left.double() @ rounded_right.double() - left.double() @ right.double()).square().sum())


def gated(tiny: Network) -> Model:
    if not hasattr(Attention(8), "gate"):
        pytest.skip("this timm has no gated attention")
    model = tiny()
    for block in model.module.blocks:
        block.attn = Attention(24, num_heads=3, gated=True).eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", ["vit", "qk_norm", "scale_norm", "gated", "swin"])
def test_the_products_are_those_that_the_network_computes(kind: str, tiny: Network, tiny_swin: Network) -> None:
    changes: dict[str, dict[str, Any]] = {"qk_norm": {"qk_norm": True}, "scale_norm": {"scale_attn_norm": True}}
    model = tiny_swin() if kind == "swin" else gated(tiny) if kind == "gated" else tiny(**changes.get(kind, {}))
    network = adapt(model.module)
    tape = Tape(network)
    network(randn(2, 3, 32, 32))
    without_result = []
    for stage in stages(network):
        for product in stage_products(network, stage):
            assert stage.owns(product.left)
            assert stage.owns(product.right)
            left, right = tape.operands(product)
            if product.result is None:
                without_result.append(product.left)
                continue
            expected = left @ right
            if product.weights is not None:
                bias = network.get_submodule(product.left.rpartition(".")[0]).bias
                expected = expected + (0 if bias is None else bias)
            elif product.transpose_right:
                expected = expected * network.get_submodule(product.left.rpartition(".")[0]).scale
            torch.testing.assert_close(product.result_rows(tape.values[product.result]), expected, rtol=1e-4, atol=1e-4)
    # There the result is normed or gated before it can be seen.
    assert without_result == (
        ["blocks.0.attn.softmax", "blocks.1.attn.softmax"] if kind in ("scale_norm", "gated") else []
    )


def test_every_stage_has_its_products(tiny: Network, tiny_swin: Network) -> None:
    def names(model: Model) -> dict[str, set[tuple[str, str]]]:
        network = adapt(model.module)
        return {s.name: {(p.left, p.right) for p in stage_products(network, s)} for s in stages(network)}

    found = names(tiny())
    assert found.pop("stem") == {("patch_embed.proj.input", "patch_embed.proj.weight")}
    assert found.pop("head") == {("head.input", "head.weight")}
    for block, pairs in found.items():
        assert pairs == {(f"{block}.{left}", f"{block}.{right}") for left, right in VIT_BLOCK}
    merging = "layers.1.downsample"
    assert names(tiny_swin())[merging] == {(f"{merging}.reduction.input", f"{merging}.reduction.weight")}


def test_a_search_of_activations_leaves_weights_as_they_are(
    tiny: Network, images_for: Callable[..., CalibrationSet]
) -> None:
    plain, both, activations = (
        dfq.quantize(tiny(), "w4a4", calibration=images_for(), recipe=recipe(search), progress=False)
        for search in (None, {"error": "output"}, {"error": "output", "operands": "activations"})
    )

    def changed(found: dfq.QuantizedModel) -> set[str]:
        """Sites that end on another grid than without a search."""
        return {
            name.rpartition(".")[2]
            for name, quantizer in found.sites.items()
            if any(not torch.equal(t, plain.sites[name].tensors()[key]) for key, t in quantizer.tensors().items())
        }

    assert changed(both) >= {"weight", "input", "q", "softmax"}
    assert changed(activations) >= {"input", "q", "k", "v", "softmax"}
    assert "weight" not in changed(activations)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_no_product_has_more_error_and_all_have_less(
    kind: str, tiny: Network, tiny_swin: Network, images_for: Callable[..., CalibrationSet]
) -> None:
    model = tiny() if kind == "vit" else tiny_swin()
    images = images_for() if kind == "vit" else images_for(mask=torch.ones(5, 8, 8, dtype=torch.bool))
    plain, searched = (
        dfq.quantize(model, "w4a4", calibration=images, recipe=recipe(search), progress=False)
        for search in (None, {"error": "output", "images": 5})
    )
    network = adapt(model.module)
    tape = Tape(network)
    network((images.images.float() / 255 - 0.5) / 0.25)
    ratios = []
    for product in (p for stage in stages(network) for p in stage_products(network, stage)):
        before, after = tape.error(product, plain.sites), tape.error(product, searched.sites)
        ratios.append(after / before)
    assert max(ratios) <= 1 + 1e-4
    assert sum(ratios) < 0.9 * len(ratios)
    # What is searched is what is used.
    integers = searched.module.get_submodule("head" if kind == "vit" else "head.fc").integers
    name = "head.weight" if kind == "vit" else "head.fc.weight"
    weight = model.module.get_submodule(name.removesuffix(".weight")).weight
    assert torch.equal(integers, searched.sites[name].quantize(weight))


def weights_of_errors(
    network: nn.Module, index: int, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor | None]:
    """What `search_product` is told about every product of a stage, by the name of its left operand."""
    chain = stages(network)
    fitted: dict[str, Quantizer] = {p.left: UniformQuantizer(4, symmetric=False) for p in products_of(network, index)}
    given: list[Tensor | None] = []
    monkeypatch.setattr(products, "search_product", lambda *args, **_: given.append(args[4]))
    value: Any = (images, None)
    for stage in chain[:index]:
        value = stage.run(value)
    search_stage(network, chain[index], chain[index + 1 :], fitted, [value], chain[index].run, OutputSearch("fisher"))
    return dict(zip(fitted, given, strict=True))


def products_of(network: nn.Module, index: int) -> list[Product]:
    return list(stage_products(network, stages(network)[index]))


def test_errors_count_by_the_squared_gradients_of_timms_model(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed over two draws, found by hooks on timm's own modules; of scores through the softmax by hand."""
    model = tiny()
    images = randn(4, 3, 32, 32)
    passed: dict[str, Tensor] = {}
    block = model.module.blocks[1]
    block.attn.fused_attn = False
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        layer = block.get_submodule(name)
        layer.register_forward_hook(lambda _m, _a, x, name=name: passed.update({name: x}))
    block.attn.attn_drop.register_forward_hook(lambda _m, _a, x: passed.update(probabilities=x))
    block.attn.proj.register_forward_pre_hook(lambda _m, args: passed.update(mixed=args[0]))
    logits = model.module(images.clone().requires_grad_())
    generator = torch.Generator().manual_seed(0)
    squares = {name: torch.zeros_like(x) for name, x in passed.items()}
    for _ in range(2):
        gradient = fisher_logit_gradient(logits, generator)
        found = torch.autograd.grad(logits, list(passed.values()), gradient, retain_graph=True)
        for name, g in zip(passed, found, strict=True):
            if name == "probabilities":
                p = passed[name].detach()
                g = p * (g - (g * p).sum(-1, keepdim=True))
            squares[name] += g.square()
    weights = weights_of_errors(adapt(model.module), 2, images, monkeypatch)

    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"blocks.1.{name}.input": squares[name].flatten(0, 1) for name in layers}
    expected["blocks.1.attn.q"] = squares["probabilities"]
    expected["blocks.1.attn.softmax"] = squares["mixed"].view(4, 17, 3, 8).transpose(1, 2)
    assert weights.keys() == expected.keys()
    for name, square in expected.items():
        assert square.max() > 0
        torch.testing.assert_close(weights[name], square, rtol=1e-3, atol=float(1e-5 * square.max()), msg=name)


@pytest.mark.parametrize("index", [0, 3])
def test_errors_at_both_ends_count_by_gradients(index: int, tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny(), randn(4, 3, 32, 32)
    passed: list[Tensor] = []
    layer = model.module.head if index else model.module.patch_embed.proj
    layer.register_forward_hook(lambda _m, _a, x: passed.append(x))
    logits = model.module(images.clone().requires_grad_())
    generator = torch.Generator().manual_seed(0)
    expected = sum(
        torch.autograd.grad(logits, passed, fisher_logit_gradient(logits, generator), retain_graph=True)[0].square()
        for _ in range(2)
    )
    assert isinstance(expected, Tensor)
    if not index:
        expected = expected.permute(0, 2, 3, 1).flatten(0, 2)
    (weight,) = weights_of_errors(adapt(model.module), index, images, monkeypatch).values()
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=float(1e-5 * expected.max()))


def test_a_result_that_cannot_be_seen_has_no_weight(tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    network = adapt(tiny(scale_attn_norm=True).module)
    weights = weights_of_errors(network, 1, randn(2, 3, 32, 32), monkeypatch)
    assert [name for name, weight in weights.items() if weight is None] == ["blocks.0.attn.softmax"]


def test_gradients_leave_nothing_behind(tiny: Network, images_for: Callable[..., CalibrationSet]) -> None:
    model = tiny()
    model.module.requires_grad_(True)
    quantized = dfq.quantize(
        model, "w4a4", calibration=images_for(), recipe=recipe({"error": "fisher"}), progress=False
    )
    assert all(parameter.grad is None for parameter in quantized.module.parameters())
    assert not any(buffer.requires_grad for buffer in quantized.module.buffers())


@pytest.mark.parametrize("error", ["output", "fisher"])
def test_only_the_first_images_are_looked_at(error: str, tiny: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they come in batches, and nothing else of a batch runs."""
    network = adapt(tiny().module)
    chain = stages(network)
    images = randn(7, 3, 32, 32)
    tokens: Tensor = chain[0].run((images, None))
    seen: list[Tensor] = []
    monkeypatch.setattr(products, "search_product", lambda *args, **_: seen.append(args[0]))
    monkeypatch.setattr(products, "_IMAGES_PER_PASS", 2)
    fitted: dict[str, Quantizer] = {"blocks.0.attn.qkv.input": UniformQuantizer(4, symmetric=False)}
    for batches in ([tokens], [tokens[:1], tokens[1:3], tokens[3:]]):
        settings = OutputSearch("fisher" if error == "fisher" else "output", images=4)
        search_stage(network, chain[1], chain[2:], fitted, batches, chain[1].run, settings)
    expected = network.blocks[0].norm1(tokens[:4]).flatten(0, 1)
    assert len(seen) == 2
    for left in seen:
        torch.testing.assert_close(left, expected)


def test_attention_over_different_numbers_of_tokens(tiny: Network) -> None:
    """Probabilities and values of both batches at once: the error is that of each by itself."""
    network = adapt(tiny().module)
    block = stages(network)[1]
    parts = [randn(2, 5, 24), randn(1, 9, 24, seed=4)]
    product = next(p for p in stage_products(network, block) if p.right.endswith(".v"))
    tapes = []
    for part in parts:
        tape = Tape(network)
        block.run(part)
        tapes.append(tape.values.copy())
    tape = Tape(network)

    def errors(fitted: dict[str, Quantizer]) -> float:
        total = 0.0
        for values in tapes:
            tape.values = values
            total += tape.error(product, fitted)
        return total

    twins = [
        TwinUniformQuantizer(3, split="magnitude").load_tensors({"exponent": torch.tensor([exponent])})
        for exponent in range(20)
    ]
    every = [errors({product.left: twin}) for twin in twins]
    fitted: dict[str, Quantizer] = {product.left: twins[-1]}
    search_stage(network, block, [], fitted, parts, block.run, OutputSearch("output", images=3))
    assert errors(fitted) == pytest.approx(min(every), rel=1e-5)
    assert errors(fitted) < 0.9 * every[-1]


def test_channels_apart_stay_and_the_others_are_searched(tiny: Network) -> None:
    model = tiny()
    fc1 = model.module.blocks[0].mlp.fc1
    fc1.bias[5] = 300.0
    network = adapt(model.module)
    chain = stages(network)
    tokens = chain[0].run((randn(4, 3, 32, 32), None))
    tape = Tape(network)
    chain[1].run(tokens)
    name = "blocks.0.mlp.fc2.input"
    channels = outlier_channels(tape.values[name], 10)
    assert channels.tolist() == [5]
    quantizer = OutlierQuantizer(UniformQuantizer(3, symmetric=False), channels).fit(tape.values[name])
    apart = quantizer.apart.tensors()
    main = quantizer.main.tensors()["scale"].clone()
    product = next(p for p in stage_products(network, chain[1]) if p.left == name)
    before = tape.error(product, {name: quantizer})
    search_stage(network, chain[1], chain[2:], {name: quantizer}, [tokens], chain[1].run, OutputSearch("output"))
    assert tape.error(product, {name: quantizer}) < 0.95 * before
    assert not torch.equal(quantizer.main.tensors()["scale"], main)
    assert all(torch.equal(quantizer.apart.tensors()[key], apart[key]) for key in apart)


def test_what_is_left_in_floating_point_stays_so(tiny: Network, images_for: Callable[..., CalibrationSet]) -> None:
    changes = {"sites": {"*.softmax": {"quantize": False}, "head.*": {"quantize": False}}}
    chosen = recipe({"error": "fisher"}, **changes)
    quantized = dfq.quantize(tiny(), "w4a16", calibration=images_for(), recipe=chosen, progress=False)
    assert set(quantized.sites) == {
        "patch_embed.proj.weight",
        *(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }


@pytest.mark.parametrize("preset", ["ptq4vit", "repq"])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_published_methods_come_back_bit_for_bit(
    kind: str,
    preset: str,
    tiny: Network,
    tiny_swin: Network,
    images_for: Callable[..., CalibrationSet],
    tmp_path: Path,
) -> None:
    model = tiny() if kind == "vit" else tiny_swin()
    images = images_for() if kind == "vit" else images_for(mask=torch.ones(5, 8, 8, dtype=torch.bool))
    quantized = dfq.quantize(model, "w8a8", calibration=images, recipe=preset, progress=False)
    x = randn(3, 3, 32, 32)
    error = (quantized(x) - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.1
    dfq.save(quantized, tmp_path / "saved")
    assert torch.equal(dfq.load(tmp_path / "saved", device="cpu")(x), quantized(x))
