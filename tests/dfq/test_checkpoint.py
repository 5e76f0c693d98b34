"""Quantized models on disk: the same bits come back, and what is damaged or foreign is refused."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.checkpoint import (
    CONFIG,
    QUANTIZATION,
    WEIGHTS,
    claim_directory,
    description_of,
    is_quantized_model,
    timm_config,
)
from dfq.errors import CheckpointError, DfqError, UsageError
from dfq.models import Model
from dfq.ptq.engine import QuantizedModel
from dfq.recipe import DEFAULT_RECIPE, recipe_from_dict


@pytest.fixture(scope="module")
def w4a8(reference: Model, noise: CalibrationSet) -> QuantizedModel:
    return dfq.quantize(reference, "w4a8", calibration=noise, progress=False)


@pytest.fixture
def saved(w4a8: QuantizedModel, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    dfq.save(w4a8, folder)
    return folder


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what dfq says of the model."""
    config = json.loads((folder / CONFIG).read_text())
    change(config[QUANTIZATION])
    (folder / CONFIG).write_text(json.dumps(config))


def inputs() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def check_same(loaded: QuantizedModel, original: QuantizedModel) -> None:
    assert torch.equal(loaded(inputs()), original(inputs()))
    assert (loaded.bits, loaded.recipe, loaded.origin) == (original.bits, original.recipe, original.origin)
    assert loaded.preprocessing == original.preprocessing
    assert loaded.weight_bytes == original.weight_bytes
    assert list(loaded.sites) == list(original.sites)
    one, other = loaded.tensors(), original.tensors()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("bits", "preset"), [("w3a4", "fast"), ("w4a4", "paper"), ("w3a8", "paper"), ("w8a16", "paper")]
)
def test_logits_come_back_bit_for_bit(
    preset: str, bits: str, reference: Model, noise: CalibrationSet, tmp_path: Path
) -> None:
    quantized = dfq.quantize(reference, bits, calibration=noise, recipe=preset, progress=False)
    dfq.save(quantized, tmp_path / "out")
    loaded = dfq.load(tmp_path / "out", device="cpu")
    check_same(loaded, quantized)
    assert loaded.calibration == json.loads(json.dumps(quantized.calibration))


def test_other_architectures_come_back_too(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    model = tiny("deit_tiny_distilled_patch16_224")
    recipe = recipe_from_dict({"sites": {"head*.weight": {"quantize": False}}}, name="mine", where="test")
    quantized = dfq.quantize(model, "w5a8", calibration=images_for(), recipe=recipe, progress=False)
    dfq.save(quantized, tmp_path)
    check_same(dfq.load(tmp_path, device="cpu"), quantized)


def test_offsets_that_the_architecture_does_not_know_come_back(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    """Ranges moved out of a layer norm leave an offset in the linear after it."""
    model = tiny(qkv_bias=False)
    assert model.module.blocks[0].attn.qkv.bias is None
    content = {"reparametrize": "full", "sites": {"*.attn.qkv.input": {"granularity": "channel"}}}
    recipe = recipe_from_dict(content, name="mine", where="test")
    quantized = dfq.quantize(model, "w4a8", calibration=images_for(), recipe=recipe, progress=False)
    assert quantized.tensors()["blocks.0.attn.qkv.bias"].abs().max() > 0
    dfq.save(quantized, tmp_path)
    loaded = dfq.load(tmp_path, device="cpu")
    check_same(loaded, quantized)
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_groups_cost_a_scale_in_half_precision_and_a_zero_point_each(
    reference: Model, noise: CalibrationSet, tmp_path: Path
) -> None:
    by_channel, grouped = (
        dfq.quantize(reference, "w4a8", calibration=noise, recipe=recipe, progress=False)
        for recipe in ("fast", "fast-g48")
    )
    dfq.save(grouped, tmp_path)
    check_same(dfq.load(tmp_path, device="cpu"), grouped)
    # 64 inputs are two groups, of 48 and of 16; the 256 of fc2 six. A channel has 4 bytes and 1.
    groups = 4 * ((192 + 64 + 256) * 2 + 64 * 6)
    channels = 4 * (192 + 64 + 256 + 64)
    assert grouped.weight_bytes - by_channel.weight_bytes == 3 * groups - 5 * channels


def test_weights_take_the_space_of_their_bits(reference: Model, noise: CalibrationSet, tmp_path: Path) -> None:
    weights = {"symmetric": True, "granularity": "channel", "range": "minmax"}
    recipe = recipe_from_dict({"first_last_bits": 8, "weights": weights}, name="minmax", where="test")
    quantized = dfq.quantize(reference, "w4a8", calibration=noise, recipe=recipe, progress=False)
    dfq.save(quantized, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    qkv = tensors["blocks.0.attn.qkv.weight.integers"]
    assert (qkv.dtype, qkv.numel()) == (torch.uint8, 3 * 64 * 64 // 2)
    # 4 blocks of 12 * 64^2 weights at half a byte; the patch embedding and the head at one; 4 bytes for the rest: a
    # scale for each of the weights' output channels, norms and biases, the class token, and a few hundred of the
    # activations; 2 bytes for the position embedding.
    integers = 4 * 12 * 64**2 // 2 + 64 * 48 + 10 * 64
    scales = 4 * (192 + 64 + 256 + 64) + 64 + 10
    biases_and_norms = scales + 4 * 4 * 64 + 2 * 64
    positions = 2 * 64 * 65
    least = integers + 4 * (scales + biases_and_norms + 64) + positions
    assert least < quantized.weight_bytes < least + 4 * 400
    size = (tmp_path / WEIGHTS).stat().st_size
    header = int.from_bytes((tmp_path / WEIGHTS).read_bytes()[:8], "little")
    assert size == 8 + header + quantized.weight_bytes


@pytest.mark.usefixtures("umask")
def test_files_can_be_read_by_others(w4a8: QuantizedModel, tmp_path: Path) -> None:
    dfq.save(w4a8, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [CONFIG, WEIGHTS]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()} == {0o644}


def test_the_config_tells_what_the_model_is(saved: Path, w4a8: QuantizedModel) -> None:
    config = json.loads((saved / CONFIG).read_text())[QUANTIZATION]
    assert config["quant_method"] == "dfq"
    assert config["bits"] == "w4a8"
    assert config["model"]["name"] == "reference"
    assert len(config["model"]["fingerprint"]) == 64
    assert config["recipe"]["name"] == DEFAULT_RECIPE
    assert config["sites"]["blocks.0.attn.qkv.weight"]["shape"] == [192, 64]
    assert config["sites"]["blocks.0.attn.qkv.weight"]["bits"] == 4
    assert config["preprocessing"]["mean"] == [0.305, 0.305, 0.305]
    assert config["calibration"]["num_images"] == 8
    assert config["calibration"]["run"]["method"] == "gaussian"
    assert config["versions"]["dfq"] == dfq.__version__


def test_timm_finds_its_own_keys(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    model = tiny("deit_tiny_distilled_patch16_224", num_classes=7)
    quantized = dfq.quantize(model, "w8a8", calibration=images_for(), progress=False)
    dfq.save(quantized, tmp_path / "out")
    # Without weights: those are packed, and only dfq reads them.
    built = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=False)
    assert (built.num_classes, built.num_features, len(built.blocks)) == (7, 24, 2)
    assert built.state_dict().keys() == model.module.state_dict().keys()
    inputs_of = timm.data.resolve_model_data_config(built)
    assert inputs_of["input_size"] == (3, 32, 32)
    assert (tuple(inputs_of["mean"]), tuple(inputs_of["std"])) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert (inputs_of["interpolation"], inputs_of["crop_pct"], inputs_of["crop_mode"]) == ("bicubic", 0.9, "center")
    assert list(built.pretrained_cfg["classifier"]) == ["head", "head_dist"]
    # What comes back says the same again.
    dfq.save(dfq.load(tmp_path / "out", device="cpu"), tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_weights_with_a_tag_are_of_the_architecture_without(w4a8: QuantizedModel) -> None:
    origin = replace(w4a8.origin, architecture="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert timm_config(replace(w4a8, origin=origin))["architecture"] == "vit_tiny_patch16_224"


def test_a_folder_as_a_hub_hands_it_out(saved: Path, w4a8: QuantizedModel, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(saved, clone)
    (clone / ".git").mkdir()
    (clone / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (clone / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (clone / "README.md").write_text("---\nlibrary_name: dfq\n---\n")
    check_same(dfq.load(clone, device="cpu"), w4a8)
    assert claim_directory(clone, identity(w4a8), overwrite=False) is True


def test_a_quantized_model_is_no_model_to_start_from(saved: Path) -> None:
    with pytest.raises(DfqError, match=r"holds a quantized model, not one to start from; `dfq\.load` reads those"):
        dfq.load_model(f"local-dir:{saved}")


@pytest.mark.parametrize("said", [{"quant_method": "gptq", "bits": 4}, None, "dfq"])
def test_a_model_quantized_by_others(said: object, saved: Path) -> None:
    (saved / CONFIG).write_text(json.dumps({"architecture": "vit_tiny_patch16_224", QUANTIZATION: said}))
    with pytest.raises(CheckpointError, match=r"config\.json does not describe a quantized model \(None\)"):
        dfq.load(saved)


def test_folders_of_version_1_are_read(saved: Path, w4a8: QuantizedModel) -> None:
    """Their `config.json` held nothing but the description, their zero points were int32, and all else float32."""
    tensors = load_file(saved / WEIGHTS)
    assert tensors["pos_embed"].dtype == torch.float16
    for name, tensor in tensors.items():
        if name.endswith("zero_point"):
            tensors[name] = tensor.int()
    tensors["pos_embed"] = tensors["pos_embed"].float()
    save_file(tensors, saved / WEIGHTS, {"format": "dfq.quantized_model"})
    description = json.loads((saved / CONFIG).read_text())[QUANTIZATION]
    del description["quant_method"]
    description |= {"version": 1, "sha256": sha256(saved / WEIGHTS)}
    (saved / CONFIG).write_text(json.dumps(description))
    check_same(dfq.load(saved, device="cpu"), w4a8)
    assert claim_directory(saved, identity(w4a8), overwrite=False) is True
    with pytest.raises(DfqError, match=r"of another run \(it differs in bits\)"):
        claim_directory(saved, identity(w4a8) | {"bits": "w8a8"}, overwrite=False)


def test_saving_again_replaces(saved: Path, reference: Model, noise: CalibrationSet) -> None:
    (saved / "notes.txt").write_text("mine")
    other = dfq.quantize(reference, "w8a8", calibration=noise, recipe="paper", progress=False)
    dfq.save(other, saved)
    check_same(dfq.load(saved, device="cpu"), other)
    assert (saved / "notes.txt").read_text() == "mine"


def test_a_flipped_bit_is_noticed(saved: Path) -> None:
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its checksum is not the one in config"):
        dfq.load(saved)


def test_a_truncated_file_is_noticed(saved: Path) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        dfq.load(saved)
    # Also where the checksum was mended.
    edit(saved, lambda config: config.update(sha256=sha256(saved / WEIGHTS)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        dfq.load(saved)


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(name: str, saved: Path) -> None:
    assert is_quantized_model(saved)
    (saved / name).unlink()
    assert not is_quantized_model(saved)
    with pytest.raises(CheckpointError, match=f"is not a quantized model: it has no {name}"):
        dfq.load(saved)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"nowhere is not a quantized model: there is no such folder; `dfq quantize` makes one"
    ):
        dfq.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(version=3), r"config\.json has version 3; this dfq reads 1 to 2"),
        (lambda c: c.update(version=0), r"config\.json has version 0; this dfq reads 1 to 2"),
        (lambda c: c.update(format="other"), r"config\.json does not describe a quantized model \('other'\)"),
        (lambda c: c.pop("format"), r"config\.json does not describe a quantized model \(None\)"),
        (lambda c: c.update(sha256="0" * 64), "checksum"),
        (lambda c: c.pop("model"), "do not make a model: 'model'"),
        (lambda c: c.update(model={}), "do not make a model"),
        (lambda c: c["model"].update(architecture="vit_tiny_patch16_224"), "do not make a model"),
        (lambda c: c["model"].update(architecture="resnet18"), "do not make a model"),
        (lambda c: c["model"].update(architecture="no_such_net"), "timm knows no model 'no_such_net'"),
        (lambda c: c["model"].update(architecture="hf-hub:some/body"), "timm knows no model 'hf-hub:some/body'"),
        (lambda c: c["model"].update(surplus=1), "do not make a model"),
        (lambda c: c.update(sites=None), "do not make a model"),
        (lambda c: c["sites"].pop("head.weight"), "do not make a model"),
        (lambda c: c["sites"]["head.weight"].update(bits=4), "do not make a model"),
        (lambda c: c["sites"]["head.weight"].update(bits="8"), "bits must be an integer"),
        (lambda c: c["sites"]["head.weight"].update(type="os.system"), "there is no quantizer type 'os.system'"),
        (
            lambda c: c["sites"]["head.weight"].update(granularity={"type": "per_group", "size": 32}),
            "fitted on 10 groups, but a tensor of shape .10, 64. has 20",
        ),
        (lambda c: c["sites"].update({"head.nowhere": c["sites"].pop("head.input")}), "do not make a model"),
        (lambda c: c["recipe"].update(scope="everything"), "scope must be one of 'gemm', 'full'"),
        (lambda c: c.update(recipe=[]), "do not make a model"),
        (lambda c: c["preprocessing"].pop("mean"), "do not make a model"),
        (lambda c: c["preprocessing"].update(std=[0, 0, 0]), "std must be three positive numbers"),
        (lambda c: c.update(bits="w1a1"), "bits 'w1a1' are not to be had"),
        (lambda c: c.update(bits=8), "do not make a model"),
    ],
)
def test_a_config_edited_by_hand(change: Callable[[dict[str, Any]], object], said: str, saved: Path) -> None:
    edit(saved, change)
    with pytest.raises(CheckpointError, match=said) as caught:
        dfq.load(saved, device="cpu")
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"[" * 10000])
def test_a_config_that_is_not_json(content: bytes, saved: Path) -> None:
    (saved / CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        dfq.load(saved)


def test_no_further_file_is_read_for_the_architecture(saved: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save({}, weights)

    def name_a_file(config: dict[str, Any]) -> None:
        config["model"] |= {"architecture": "vit_tiny_patch16_224", "arguments": {"checkpoint_path": str(weights)}}

    edit(saved, name_a_file)
    with pytest.raises(CheckpointError, match="checkpoint_path is not an argument of the architecture"):
        dfq.load(saved)


def test_an_architecture_timm_cannot_build(saved: Path) -> None:
    edit(saved, lambda c: c["model"].update(architecture="vit_tiny_patch16_224", arguments={"num_heads": 0}))
    with pytest.raises(CheckpointError, match="timm could not build vit_tiny_patch16_224"):
        dfq.load(saved)


def test_a_tensor_of_another_shape(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    tensors["head.weight.integers"] = tensors["head.weight.integers"][:-1].clone()
    save_file(tensors, saved / WEIGHTS)
    edit(saved, lambda config: config.update(sha256=sha256(saved / WEIGHTS)))
    with pytest.raises(CheckpointError, match="do not make a model"):
        dfq.load(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blocks.0.attn.nothing.bias", torch.zeros(192)),
        ("blocks.0.norm1.surplus", torch.zeros(64)),
        ("blocks.0.attn.qkv.bias", torch.zeros(191)),
    ],
)
def test_a_tensor_without_a_place(name: str, value: torch.Tensor, saved: Path) -> None:
    save_file(load_file(saved / WEIGHTS) | {name: value}, saved / WEIGHTS)
    edit(saved, lambda config: config.update(sha256=sha256(saved / WEIGHTS)))
    with pytest.raises(CheckpointError, match="do not make a model"):
        dfq.load(saved)


def test_an_unknown_device_is_wrong_usage(saved: Path) -> None:
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        dfq.load(saved, device="gpu")


def identity(quantized: QuantizedModel) -> dict[str, Any]:
    config = description_of(quantized)
    return {key: config[key] for key in ("bits", "model", "preprocessing", "recipe", "calibration")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_is_made_and_free(w4a8: QuantizedModel, tmp_path: Path) -> None:
    assert claim_directory(tmp_path / "a" / "b", identity(w4a8), overwrite=False) is False
    assert (tmp_path / "a" / "b").is_dir()


def test_the_same_model_is_found(saved: Path, w4a8: QuantizedModel) -> None:
    before = contents(saved)
    assert claim_directory(saved, identity(w4a8), overwrite=False) is True
    assert claim_directory(saved, identity(w4a8), overwrite=True) is True
    assert contents(saved) == before


def test_another_model_is_kept_until_it_is_replaced(saved: Path, w4a8: QuantizedModel) -> None:
    before = contents(saved)
    other = identity(w4a8) | {"bits": "w8a8"}
    with pytest.raises(DfqError, match=r"of another run \(it differs in bits\); choose another --out or give --overw"):
        claim_directory(saved, other, overwrite=False)
    assert claim_directory(saved, other, overwrite=True) is False
    # A run that is stopped now must not have cost the old model.
    assert contents(saved) == before


def test_a_stopped_run_is_continued(saved: Path, w4a8: QuantizedModel) -> None:
    (saved / CONFIG).unlink()
    (saved / "calibration").mkdir()
    (saved / f".{WEIGHTS}.123.partial").write_bytes(b"half")
    assert claim_directory(saved, identity(w4a8), overwrite=False) is False


def test_a_folder_of_something_else_is_refused(w4a8: QuantizedModel, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"jpeg")
    with pytest.raises(DfqError, match=r"is not empty and holds no quantized model \(photo\.jpg\); choose another"):
        claim_directory(tmp_path, identity(w4a8), overwrite=False)
    assert claim_directory(tmp_path, identity(w4a8), overwrite=True) is False
    assert contents(tmp_path) == {"photo.jpg": b"jpeg"}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_weights_of_others_are_never_replaced(
    with_config: bool, overwrite: bool, w4a8: QuantizedModel, tmp_path: Path
) -> None:
    # As the hub lays out a full-precision model.
    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / WEIGHTS)
    if with_config:
        (tmp_path / CONFIG).write_text('{"architecture": "vit_tiny_patch16_224"}')
    before = contents(tmp_path)
    with pytest.raises(DfqError, match=r"model\.safetensors is not a file that dfq made, and would be replaced"):
        claim_directory(tmp_path, identity(w4a8), overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_path_below_a_file(w4a8: QuantizedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for call in (
        lambda: claim_directory(tmp_path / "file" / "out", identity(w4a8), overwrite=False),
        lambda: dfq.save(w4a8, tmp_path / "file" / "out"),
    ):
        with pytest.raises(DfqError, match="cannot create the folder"):
            call()
