"""Loading models: names, weights, preprocessing, and everything that is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import dfq
from dfq import reference as embedded
from dfq.errors import CheckpointError, DfqError, UsageError
from dfq.models import Model, Origin, load_original, resolve_device
from dfq.preprocessing import Preprocessing
from dfq.weights import read_weights

VIT = "vit_tiny_patch16_224"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Mischief:
    """Unpickling it makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.fixture
def state() -> dict[str, Tensor]:
    """The reference model's weights, each value shifted a little so that they are no other file's."""
    return {key: value + 0.01 for key, value in read_weights(embedded.weights_path()).items()}


def load(**arguments: Any) -> Model:
    return dfq.load_model("reference", device="cpu", **arguments)


def check_loaded(file: Path, state: dict[str, Tensor]) -> None:
    model = load(checkpoint=file)
    assert model.origin.checkpoint == str(file)
    loaded = model.module.state_dict()
    assert loaded.keys() == state.keys()
    assert all(loaded[key].dtype == torch.float32 for key in state)
    assert all(torch.equal(loaded[key], state[key].float()) for key in state)


# --- where weights come from


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
def test_weights_of_a_file(suffix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    check_loaded(file, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, state: dict[str, Tensor], tmp_path: Path) -> None:
    halved = {key: value.to(dtype) for key, value in state.items()}
    save_file(halved, tmp_path / "weights.safetensors")
    check_loaded(tmp_path / "weights.safetensors", halved)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema", "state_dict_ema"])
def test_weights_inside_a_training_checkpoint(key: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"epoch": 3, key: {f"module.{name}": value for name, value in state.items()}}
    torch.save(content, tmp_path / "checkpoint.pth")
    check_loaded(tmp_path / "checkpoint.pth", state)


def test_averaged_weights_come_first(state: dict[str, Tensor], tmp_path: Path) -> None:
    worse = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"state_dict": worse, "state_dict_ema": state}, tmp_path / "checkpoint.pth")
    check_loaded(tmp_path / "checkpoint.pth", state)


def test_the_reference_model(reference: Model) -> None:
    assert (reference.name, reference.bits, reference.num_classes) == ("reference", "fp32", 10)
    assert reference.class_names == tuple("0123456789")
    assert reference.preprocessing == Preprocessing((32, 32), (0.305,) * 3, (0.323,) * 3, crop_pct=1.0)
    assert not reference.module.training
    assert not any(parameter.requires_grad for parameter in reference.module.parameters())
    assert reference.weight_bytes == 4 * sum(p.numel() for p in embedded.build().parameters())
    with pytest.raises(UsageError, match="image size of the reference model is fixed"):
        load(image_size=64)


def test_a_head_of_another_size_is_taken_from_the_checkpoint(tmp_path: Path) -> None:
    state = timm.create_model(VIT, num_classes=7).state_dict()
    save_file(state, tmp_path / "seven.safetensors")
    model = dfq.load_model(VIT, checkpoint=tmp_path / "seven.safetensors", device="cpu")
    assert model.num_classes == 7
    assert model.class_names is None
    assert model.origin.arguments == {"num_classes": 7}
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 7)
    assert model.module.training is False


def test_the_head_is_found_wherever_the_architecture_has_it(tmp_path: Path) -> None:
    name = "swin_tiny_patch4_window7_224"
    state = timm.create_model(name, num_classes=7, img_size=64).state_dict()
    save_file(state, tmp_path / "seven.safetensors")
    model = dfq.load_model(name, checkpoint=tmp_path / "seven.safetensors", image_size=64, device="cpu")
    assert model.num_classes == 7
    assert model.origin.arguments == {"img_size": 64, "num_classes": 7}
    assert (model.preprocessing.image_size, model.preprocessing.mean) == ((64, 64), IMAGENET[0])
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


# --- files that cannot be used


def test_files_that_hold_no_weights(tmp_path: Path, state: dict[str, Tensor]) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(state, whole)
    torch.save(state, tmp_path / "whole.pth")
    half = len(whole.read_bytes()) // 2
    files = {
        "missing.safetensors": (None, "missing.safetensors is not there"),
        "truncated.safetensors": (whole.read_bytes()[:half], "is not a whole safetensors file"),
        "text.safetensors": (b"these are no weights at all", "is not a whole safetensors file"),
        "empty.safetensors": (b"", "is not a whole safetensors file"),
        "truncated.pth": ((tmp_path / "whole.pth").read_bytes()[:half], "is damaged, or no checkpoint at all"),
        "text.pth": (b"these are no weights at all", "is damaged, or no checkpoint at all"),
        "empty.pth": (b"", "is damaged, or no checkpoint at all"),
    }
    for name, (content, said) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=said) as caught:
            load(checkpoint=tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(2)], torch.zeros(2), {"model": {"a": 1}}])
def test_a_checkpoint_without_a_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth holds no state dict"):
        load(checkpoint=tmp_path / "other.pth")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_nothing_in_a_checkpoint_is_executed(writer: str, tmp_path: Path) -> None:
    marker, file = tmp_path / "executed", tmp_path / "evil.pth"
    if writer == "torch":
        torch.save({"head.weight": Mischief(marker)}, file)
    else:
        file.write_bytes(pickle.dumps({"head.weight": Mischief(marker)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"holds more than weights, and loading it could run code; it was not"):
        load(checkpoint=file)
    assert not marker.exists()
    # The file would have done it.
    torch.load(file, weights_only=False) if writer == "torch" else pickle.loads(file.read_bytes())
    assert marker.exists()


def test_a_checkpoint_of_another_architecture_names_the_keys(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    state["head.surplus"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(65)
    for key in ("cls_token", "pos_embed", "head.bias", "norm.bias"):
        del state[key]
    save_file(state, file)
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint=file)
    assert str(caught.value) == (
        f"{file} is not a checkpoint of reference: 4 missing (cls_token, pos_embed, norm.bias, ...); "
        "1 unexpected (head.surplus); 1 of another shape (norm.weight (65,) instead of (64,)); "
        "give one of this architecture, or the architecture that it is of"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, state: dict[str, Tensor], tmp_path: Path) -> None:
    state["blocks.1.mlp.fc1.weight"][0, 0] = value
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"reference hold NaN or infinite values in blocks\.1\.mlp\.fc1\.weight$"):
        load(checkpoint=tmp_path / "nan.safetensors")


# --- names


def test_random_weights_hang_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, same = (load(random_weights=True, seed=1) for _ in range(2))
    other = load(random_weights=True, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.origin.fingerprint == same.origin.fingerprint != other.origin.fingerprint
    assert (first.origin.random_weights, first.origin.seed, first.origin.checkpoint) == (True, 1, None)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first(x), same(x))
    assert not torch.equal(first(x), other(x))


def test_random_weights_of_timms_models_hang_on_the_seed_too() -> None:
    first, same = (dfq.load_model(VIT, random_weights=True, image_size=32, seed=1, device="cpu") for _ in range(2))
    assert first.origin.fingerprint == same.origin.fingerprint
    assert first.preprocessing.image_size == (32, 32)


def test_a_checkpoint_and_random_weights_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--checkpoint and --random-weights exclude each other"):
        load(checkpoint="x.safetensors", random_weights=True)


def test_without_a_network_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(*args: Any, pretrained: bool, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ConnectionError("Max retries exceeded\nwith a long story")
        return create(*args, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(DfqError) as caught:
        dfq.load_model(VIT)
    assert str(caught.value) == (
        f"timm could not get the pretrained weights of {VIT} (Max retries exceeded); without a network give "
        "--checkpoint FILE, or --random-weights to try things out"
    )


# --- preprocessing


def test_preprocessing_is_that_of_the_name() -> None:
    vit = dfq.load_model(VIT, random_weights=True, device="cpu").preprocessing
    assert vit == Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
    deit = dfq.load_model("deit_tiny_patch16_224", random_weights=True, device="cpu").preprocessing
    assert (deit.mean, deit.std) == IMAGENET
    assert (deit.image_size, deit.interpolation) == ((224, 224), "bicubic")


def test_preprocessing_can_be_replaced() -> None:
    mean, std = IMAGENET
    model = load(random_weights=True, mean=mean, std=std, interpolation="bilinear", crop_pct=0.5)
    assert model.preprocessing == Preprocessing((32, 32), mean, std, "bilinear", 0.5)
    assert model.preprocessing.describe() == (
        "32x32, bilinear, crop 0.5 (center), mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"std": (0.0, 1.0, 1.0)}, r"std must be three positive numbers, not \(0\.0, 1\.0, 1\.0\)"),
        ({"std": (1.0, 1.0)}, "std must be three positive numbers"),
        ({"std": (10**400, 1.0, 1.0)}, "std must be three positive numbers"),
        ({"mean": (0.5, -(10**400), 0.5)}, "mean must be three finite numbers"),
        ({"mean": (float("nan"), 0.0, 0.0)}, "mean must be three finite numbers"),
        ({"crop_pct": 0.0}, "crop_pct must lie above 0"),
        ({"crop_pct": 87.5}, "crop_pct must lie above 0 and at most at 1, not 87.5"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic': choose from .*bicubic"),
    ],
)
def test_preprocessing_that_cannot_be_meant(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(**change)


def test_preprocessing_survives_json() -> None:
    preprocessing = Preprocessing((32, 64), *IMAGENET, crop_mode="squash")
    assert preprocessing.to_dict()["image_size"] == [32, 64]
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


# --- devices


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x"])
def test_an_unknown_device(name: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "meta"])
def test_a_device_this_machine_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match=f"device '{name}' is not there: this machine has the CPU and 0 CUDA devices"):
        resolve_device(name)


def test_a_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="2 CUDA devices"):
        resolve_device("cuda:2")


# --- hubs and folders laid out like them


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A small DeiT-III-like model with its own size, as `timm.models.push_to_hf_hub` would lay it out."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    arguments |= {"no_embed_class": True, "init_values": 0.5}
    module = timm.create_model(VIT, **arguments)
    save_for_hf(module, tmp_path / "hub", model_args=arguments, safe_serialization=True)
    return tmp_path / "hub"


def test_a_folder_laid_out_like_a_hub(hub_folder: Path, images_for: Callable[..., Any], tmp_path: Path) -> None:
    model = dfq.load_model(f"local-dir:{hub_folder}", device="cpu")
    assert (model.num_classes, model.preprocessing.image_size) == (5, (32, 32))
    assert model.origin.architecture == VIT
    weights = read_weights(hub_folder / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in model.module.state_dict().items())

    images = images_for(mean=model.preprocessing.mean, std=model.preprocessing.std)
    quantized = dfq.quantize(model, "w4a8", calibration=images, progress=False)
    dfq.save(quantized, tmp_path / "out")
    loaded = dfq.load(tmp_path / "out", device="cpu")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x), quantized(x))
    original = load_original(loaded.origin, loaded.preprocessing, device="cpu")
    assert torch.equal(original(x), model(x))


def test_folders_that_are_no_models(hub_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DfqError, match=r"cannot find out what local-dir:.*nowhere is: "):
        dfq.load_model(f"local-dir:{tmp_path / 'nowhere'}")
    (hub_folder / "model.safetensors").unlink()
    with pytest.raises(DfqError, match="timm could not build local-dir:"):
        dfq.load_model(f"local-dir:{hub_folder}")
    (hub_folder / "config.json").write_text("{}")
    with pytest.raises(DfqError, match="cannot find out what local-dir:"):
        dfq.load_model(f"local-dir:{hub_folder}")


# --- the original of a quantized model


def test_the_original_is_found_again_and_checked(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    model = load(checkpoint=file, crop_pct=0.8)
    again = load_original(model.origin, model.preprocessing, device="cpu")
    assert again.preprocessing == model.preprocessing
    assert again.origin == model.origin

    moved = tmp_path / "moved.safetensors"
    file.rename(moved)
    with pytest.raises(CheckpointError, match=r"are not at .*weights\.safetensors any more: give --checkpoint FILE"):
        load_original(model.origin, model.preprocessing, device="cpu")
    assert load_original(model.origin, model.preprocessing, checkpoint=moved, device="cpu").num_classes == 10

    state["head.bias"][0] += 1
    save_file(state, moved)
    with pytest.raises(CheckpointError, match="are not those the quantized model was made from"):
        load_original(model.origin, model.preprocessing, checkpoint=moved, device="cpu")


def test_random_originals_are_drawn_again() -> None:
    model = load(random_weights=True, seed=4)
    again = load_original(model.origin, model.preprocessing, device="cpu")
    assert again.origin == model.origin
    forged: Origin = replace(model.origin, seed=5)
    with pytest.raises(CheckpointError, match="the weights of reference are not those"):
        load_original(forged, model.preprocessing, device="cpu")
