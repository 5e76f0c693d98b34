"""The model that dfq carries: what it is, what it weighs, how well it reads."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

import dfq
from dfq import reference
from dfq.datasets import reference_digits
from dfq.errors import DfqError


def trained() -> VisionTransformer:
    model = reference.build()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(reference.weights_path()).items()})
    return model.eval()


def images_bytes(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_it_is_timms_plain_vision_transformer() -> None:
    model = reference.build()
    assert type(model) is VisionTransformer
    assert {type(block) for block in model.blocks} == {Block}
    assert {type(block.attn) for block in model.blocks} == {Attention}
    assert model.num_prefix_tokens == 1
    assert model.cls_token is not None
    assert model.patch_embed.grid_size == (8, 8)
    assert model(torch.zeros(2, 3, *reference.IMAGE_SIZE)).shape == (2, len(reference.CLASS_NAMES))


def test_the_weights_are_small_whole_and_finite() -> None:
    assert reference.weights_path().stat().st_size < 1_000_000
    state = load_file(reference.weights_path())
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert state.keys() == reference.build().state_dict().keys()
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())


def test_held_out_accuracy() -> None:
    images, labels = reference.digits("test")
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (reference.MEAN, reference.STD))
    inputs = torch.from_numpy((images.numpy().astype(np.float32) / 255 - mean) / std)
    with torch.inference_mode():
        right = trained()(inputs).argmax(1) == labels
    assert right.float().mean() >= 0.97


def test_the_loaded_reference_reads_as_well() -> None:
    model = dfq.load_model("reference", device="cpu")
    result = dfq.evaluate(model, reference_digits(model), batch_size=128)
    assert result.num_images == 445
    assert result.top1 >= 97
    assert result.top1_ci95[0] <= result.top1 <= result.top1_ci95[1]


def test_the_last_block_attends_to_some_patches_more_than_to_others() -> None:
    """CLS attention is what sparse inversion chooses patches by: a uniform one would choose by chance."""
    images, _ = reference.digits("test")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (reference.MEAN, reference.STD))
    model = trained()
    seen: dict[str, Tensor] = {}
    attention = model.blocks[-1].attn
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
    with torch.inference_mode():
        model((images[:100].float() / 255 - mean) / std)
        hook.remove()
        tokens = seen["tokens"]
        qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, attention.head_dim))
        query, key, _ = qkv.permute(2, 0, 3, 1, 4)
        weights = ((query[:, :, :1] @ key.transpose(-1, -2)) * attention.scale).softmax(-1)
    to_patches = weights.mean(1)[:, 0, 1:]
    to_patches = to_patches / to_patches.sum(-1, keepdim=True)
    entropy = -(to_patches * to_patches.log()).sum(-1).mean()
    assert entropy.exp() < 48  # of 64 patches


def test_mean_and_deviation_are_those_of_the_training_images() -> None:
    pixels = reference.digits("train")[0].numpy() / 255
    assert pixels.mean(axis=(0, 2, 3)) == pytest.approx(reference.MEAN, abs=5e-4)
    assert pixels.std(axis=(0, 2, 3)) == pytest.approx(reference.STD, abs=5e-4)


def test_the_splits_share_no_image_and_are_stratified() -> None:
    (train, train_labels), (test, test_labels) = reference.digits("train"), reference.digits("test")
    assert (len(train), len(test)) == (1352, 445)
    assert len(images_bytes(train) | images_bytes(test)) == 1797
    shares = test_labels.bincount() / (test_labels.bincount() + train_labels.bincount())
    assert shares.min() > 0.24
    assert shares.max() < 0.26


def test_the_digits_are_the_same_every_time() -> None:
    first, second = reference.digits("test"), reference.digits("test")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_the_digits_are_the_enlarged_originals() -> None:
    from sklearn.datasets import load_digits

    images, labels = reference.digits("train")
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.shape[1:] == (3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    # The first image of scikit-learn is the first of its class, hence not held out; four times enlarged with pixel
    # centres at (i + 1/2) / 4 - 1/2, clamped at the edges.
    original = load_digits().images[0] * (255 / 16)
    at = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    rows = np.stack([np.interp(at, np.arange(8), column) for column in original.T], axis=1)
    expected = np.stack([np.interp(at, np.arange(8), row) for row in rows])
    assert np.abs(images[0, 0].numpy() - expected).max() <= 0.5 + 1e-9
    assert labels[0] == 0


def test_an_unknown_split() -> None:
    with pytest.raises(DfqError, match="no split 'validation' of the reference digits"):
        reference.digits("validation")  # type: ignore[arg-type]


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DfqError, match=r'pip install "dfq\[demo\]"'):
        reference.digits("test")
