"""Students: the classes and the pictures of their teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dfq.architectures import build_architecture
from dfq.errors import CheckpointError, DfqError, UnsupportedModelError, UsageError
from dfq.models import Model
from dfq.transfer.student import load_student


@pytest.fixture
def teacher(tiny: Callable[..., Model]) -> Model:
    return tiny()


def test_a_convolutional_student(teacher: Model) -> None:
    student = load_student("resnet10t", teacher, random_weights=True)
    assert student(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert student.preprocessing.image_size == (32, 32)
    assert student.preprocessing.crop_pct == teacher.preprocessing.crop_pct
    assert student.preprocessing.mean == (0.485, 0.456, 0.406)


def test_a_vit_is_built_for_the_pictures_of_the_teacher(teacher: Model) -> None:
    student = load_student("vit_tiny_patch16_224", teacher, random_weights=True)
    assert student(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert student.origin.arguments["num_classes"] == 5
    # As it is told, it is built again.
    assert build_architecture(student.origin.architecture, student.origin.arguments).state_dict().keys() == (
        student.module.state_dict().keys()
    )


def test_a_classifier_that_fits_stays_unless_a_new_one_is_asked_for(reference: Model) -> None:
    kept = load_student("reference", reference)
    assert torch.equal(kept.module.head.weight, reference.module.head.weight)  # type: ignore[union-attr, arg-type]
    fresh = load_student("reference", reference, fresh_classifier=True)
    assert not fresh.module.get_parameter("head.weight").any()
    assert not fresh.module.get_parameter("head.bias").any()
    assert torch.equal(fresh.module.get_parameter("norm.weight"), reference.module.get_parameter("norm.weight"))


def test_a_classifier_for_other_classes_is_drawn_from_the_seed(teacher: Model) -> None:
    heads = [
        load_student("reference", teacher, seed=seed).module.get_parameter("head.weight").clone() for seed in (0, 0, 1)
    ]
    assert heads[0].shape[0] == teacher.num_classes != 10
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_torchs_own_generator_is_not_touched(teacher: Model) -> None:
    state = torch.random.get_rng_state()
    load_student("resnet10t", teacher, random_weights=True)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_checkpoint_with_other_classes(teacher: Model, tmp_path: Path) -> None:
    source = build_architecture("vit_tiny_patch16_224", {"img_size": 32, "num_classes": 7})
    save_file(source.state_dict(), tmp_path / "seven.safetensors")
    student = load_student("vit_tiny_patch16_224", teacher, checkpoint=tmp_path / "seven.safetensors")
    assert student.num_classes == 5
    assert torch.equal(student.module.get_parameter("pos_embed"), source.get_parameter("pos_embed"))
    with pytest.raises(CheckpointError, match="is not a checkpoint of deit_tiny_distilled_patch16_224"):
        load_student("deit_tiny_distilled_patch16_224", teacher, checkpoint=tmp_path / "seven.safetensors")


def test_bad_input(teacher: Model, reference: Model, tmp_path: Path) -> None:
    with pytest.raises(DfqError, match="timm knows no model 'resnet5000'"):
        load_student("resnet5000", teacher, random_weights=True)
    with pytest.raises(UsageError, match="exclude each other"):
        load_student("resnet10t", teacher, checkpoint=tmp_path / "x", random_weights=True)
    with pytest.raises(CheckpointError, match="is not there"):
        load_student("resnet10t", teacher, checkpoint=tmp_path / "x")
    odd = Model(teacher.module, type(teacher.preprocessing)((30, 30), (0.5,) * 3, (0.5,) * 3), teacher.origin)
    with pytest.raises(UnsupportedModelError, match="reference cannot take images of 30x30"):
        load_student("reference", odd)
