"""A quantized model as a plain state dict: timm itself takes it, and computes what the quantized model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.architectures import build_architecture
from dfq.checkpoint import plain_state_dict, save_plain
from dfq.errors import DfqError
from dfq.models import Model, Origin
from dfq.preprocessing import Preprocessing
from dfq.ptq.engine import QuantizedModel
from dfq.recipe import Recipe, recipe_from_dict

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", {}),
    "scaled residuals, registers, normed q and k": (
        "vit_tiny_patch16_224",
        {"init_values": 0.1, "reg_tokens": 2, "qk_norm": True},
    ),
    "two classifiers": ("deit_tiny_distilled_patch16_224", {}),
    "mean of tokens": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
}


def pictures() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def check_timm_computes_the_same(quantized: QuantizedModel, original: Model) -> None:
    built: nn.Module = timm.create_model(quantized.origin.architecture, **quantized.origin.arguments)
    built.load_state_dict(plain_state_dict(quantized), strict=True)
    logits = built.eval()(pictures())
    torch.testing.assert_close(logits, quantized(pictures()), rtol=1e-4, atol=1e-4)
    # The weights are those of few bits, not the original ones.
    assert not torch.allclose(logits, original(pictures()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", ["fast", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_timm_computes_the_same_where_activations_are_left_alone(
    kind: str, recipe: str, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    architecture, changes = KINDS[kind]
    model = tiny(architecture, **changes)
    quantized = dfq.quantize(model, "w4a16", calibration=images_for(), recipe=recipe, progress=False)
    check_timm_computes_the_same(quantized, model)


@pytest.mark.parametrize("recipe", ["fast", "paper"])
def test_timm_computes_the_same_of_swin(recipe: str, images_for: Callable[..., CalibrationSet]) -> None:
    architecture = "swin_tiny_patch4_window7_224"
    arguments = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}
    module = build_architecture(architecture, arguments).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    preprocessing = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model = Model(module, preprocessing, Origin("tiny", architecture, arguments))
    images = images_for(mask=torch.ones(5, 8, 8, dtype=torch.bool))
    quantized = dfq.quantize(model, "w4a16", calibration=images, recipe=recipe, progress=False)
    check_timm_computes_the_same(quantized, model)


def test_weights_lie_on_their_grid(tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]) -> None:
    quantized = dfq.quantize(tiny(), "w2a8", calibration=images_for(), progress=False)
    state = plain_state_dict(quantized)
    # Two bits, a range for each output channel: at most four values in a row.
    assert max(len(row.unique()) for row in state["blocks.1.mlp.fc1.weight"]) == 4
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert not any(tensor.requires_grad for tensor in state.values())


def test_weights_that_are_no_site_are_there_too(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    recipe = recipe_from_dict({"sites": {"head.weight": {"quantize": False}}}, name="mine", where="test")
    model = tiny()
    quantized = dfq.quantize(model, "w4a8", calibration=images_for(), recipe=recipe, progress=False)
    assert torch.equal(plain_state_dict(quantized)["head.weight"], model.module.head.weight)


def without_qkv_bias(
    recipe: Recipe, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> QuantizedModel:
    return dfq.quantize(tiny(qkv_bias=False), "w4a8", calibration=images_for(), recipe=recipe, progress=False)


def test_an_offset_without_a_place_is_named(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    content = {"reparametrize": "full", "sites": {"*.attn.qkv.input": {"granularity": "channel"}}}
    quantized = without_qkv_bias(recipe_from_dict(content, name="mine", where="test"), tiny, images_for)
    wanted = r"vit_tiny_patch16_224 has no place for blocks\.0\.attn\.qkv\.bias, which recipe mine put there"
    for call in (lambda: plain_state_dict(quantized), lambda: save_plain(quantized, tmp_path / "plain.safetensors")):
        with pytest.raises(DfqError, match=wanted):
            call()
    assert not list(tmp_path.iterdir())
    # As the message advises.
    plain = without_qkv_bias(recipe_from_dict({}, name="mine", where="test"), tiny, images_for)
    assert "blocks.0.attn.qkv.bias" not in plain_state_dict(plain)


def test_the_reference_model(reference: Model, noise: CalibrationSet, tmp_path: Path) -> None:
    """Not one of timm's names: its own builder takes the file."""
    quantized = dfq.quantize(reference, "w8a16", calibration=noise, progress=False)
    file = tmp_path / "new" / "plain.safetensors"
    save_plain(quantized, file)
    (file.parent / "notes.txt").write_text("mine")
    save_plain(quantized, file)
    assert sorted(path.name for path in file.parent.iterdir()) == ["notes.txt", "plain.safetensors"]
    expected = plain_state_dict(quantized)
    state = load_file(file)
    assert state.keys() == expected.keys() == reference.module.state_dict().keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    again = dfq.load_model("reference", checkpoint=file, device="cpu")
    torch.testing.assert_close(again(pictures()), quantized(pictures()), rtol=1e-4, atol=1e-4)


def test_a_path_that_cannot_be_written(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    quantized = dfq.quantize(tiny(), "w8a16", calibration=images_for(), progress=False)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DfqError, match=r"cannot write .*folder"):
        save_plain(quantized, tmp_path / "folder")
