"""Knowledge transfer without data: what it comes to, what it leaves, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import dfq
from calibration import Plan
from calibration.calibration_set import CalibrationSet
from dfq import reference as embedded
from dfq.datasets import image_folder, reference_digits
from dfq.distillation import distill
from dfq.errors import DfqError, UsageError
from dfq.models import Model
from dfq.transfer.record import Round, StateFile
from dfq.transfer.student import load_student
from dfq.transfer.training import Training

QUICK = Training(optimizer="sgd", steps=4, batch_size=8)


@pytest.fixture
def student(reference: Model) -> Model:
    return load_student("reference", reference, fresh_classifier=True)


def run(teacher: Model, student: Any, method: str = "gaussian", **changes: Any) -> dfq.Distillation:
    settings: dict[str, Any] = {"rounds": 3, "num_images": 10, "training": QUICK, "progress": False}
    return distill(teacher, student, method, **(settings | changes))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_a_student_with_the_backbone_of_its_teacher_becomes_its_teacher(reference: Model, student: Model) -> None:
    """The teacher's own classifier has no divergence, and any images lead there; real ones tell that they did."""
    digits = [(image, label) for image, label in reference_digits(reference)][::5]
    result = run(
        reference,
        student,
        "leaves",
        num_images=64,
        training=Training(optimizer="sgd", steps=200, batch_size=64),
        data=digits,
    )
    before, after = result.rounds[0].top1, result.top1
    assert before is not None
    assert after is not None
    assert result.teacher_top1 is not None
    assert after >= result.teacher_top1 - 1
    assert result.rounds[-1].divergence < 0.01 < result.rounds[0].divergence
    assert [entry.images for entry in result.rounds] == [64, 128, 192]
    # Nothing needs to be held out where labelled images tell.
    assert {entry.agreement for entry in result.rounds} == {None}
    assert result.describe() == (
        f"reference taught by reference on 192 images in 3 rounds: top-1 {after:.2f} %, the teacher's "
        f"{result.teacher_top1:.2f} %"
    )


def test_in_closed_form_it_becomes_its_teacher_too(
    reference: Model, student: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least squares between equal features find the teacher's classifier, but for what all of its classes share."""
    # Whatever the processor has: in bf16 the logits that are solved for are rounded.
    monkeypatch.setattr("dfq.transfer.teaching.resolve_precision", lambda *_: torch.float32)
    training = Training(shrinkage=0.0, level="pool")
    result = run(reference, student, ["leaves", "pink"], num_images=32, rounds=2, training=training)
    assert [entry.images for entry in result.rounds] == [64, 128]
    assert result.rounds[-1].divergence < 1e-6
    assert result.rounds[-1].agreement == 100
    own, found = (model.module.get_parameter("head.weight") for model in (reference, student))
    expected = own - own.mean(0)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_student_of_half_the_width_learns_from_scratch(reference: Model) -> None:
    """It comes to answer as its teacher on generated images that it was never shown; a tenth would be chance."""
    torch.manual_seed(0)
    halves = {"embed_dim": embedded.architecture()["embed_dim"] // 2, "num_heads": 2}
    module = VisionTransformer(**embedded.architecture() | halves).eval().requires_grad_(False)
    student = Model(module, reference.preprocessing, replace(reference.origin, name="half"))
    training = Training(
        "full", optimizer="adamw", steps=80, batch_size=64, windows=4, learning_rate=1e-3, temperature=4
    )
    plan = Plan("natural", 64, 10, 64, 0, "fp32")
    first, _, last = run(reference, student, plan=plan, training=training).rounds
    assert last.images == 192
    assert last.divergence < 0.75 * first.divergence
    assert first.agreement is not None
    assert last.agreement is not None
    assert last.agreement > max(35, first.agreement)


def test_several_methods_have_a_pool_each(reference: Model, student: Model, tmp_path: Path) -> None:
    result = run(reference, student, ["gaussian", "leaves"], num_images=4, rounds=2, out=tmp_path)
    pools = [dfq.load_calibration_set(tmp_path / "pool" / name) for name in ("gaussian", "leaves")]
    assert [len(pool) for pool in pools] == [8, 8]
    assert [entry.images for entry in result.rounds] == [8, 16]
    # Both together are a pool like any other.
    again = load_student("reference", reference, fresh_classifier=True)
    found = run(reference, again, calibration=pools, rounds=1, training=Training())
    assert found.rounds[-1].images == 16
    with pytest.raises(UsageError, match="one method or more, each once, not leaves, leaves"):
        run(reference, student, ["leaves", "leaves"])
    with pytest.raises(UsageError, match="one method or more, each once, not none"):
        run(reference, student, [])
    with pytest.raises(UsageError, match="no pool is given"):
        run(reference, student, calibration=[])


def test_images_of_another_network_join_the_pool(tiny: Callable[..., Model], tmp_path: Path) -> None:
    """Of its own classes, in the same ways, as many; the teacher is asked about them."""
    teacher, other = tiny(num_classes=3), tiny(num_classes=40, seed=1)
    plan = Plan("natural", 8, 2, 8, 0, "fp32")

    def taught(plan: Plan, further: Model | None, **changes: Any) -> dfq.Distillation:
        student = load_student("vit_tiny_patch16_224", teacher, random_weights=True, fresh_classifier=True)
        return run(teacher, student, plan=plan, also_invert=further, rounds=2, out=tmp_path, **changes)

    result = taught(plan, other)
    assert [entry.images for entry in result.rounds] == [16, 32]
    pools = [dfq.load_calibration_set(tmp_path / "pool" / name) for name in ("natural", "student-natural")]
    assert [len(pool) for pool in pools] == [16, 16]
    labels = [pool.labels for pool in pools]
    assert labels[0] is not None
    assert labels[1] is not None
    assert labels[0].max() < 3 < labels[1].max() < 40
    # From starts of their own.
    assert not torch.equal(pools[0].images, pools[1].images)
    assert taught(plan, other).rounds == result.rounds
    # Another network is another run, and one that replaces it takes its pools along.
    with pytest.raises(DfqError, match="holds a transfer of another run"):
        taught(plan, tiny(num_classes=40, seed=2))
    taught(replace(plan, method="leaves", iterations=None), None, overwrite=True)
    assert [path.name for path in (tmp_path / "pool").iterdir()] == ["leaves"]


def test_a_network_of_other_patches_makes_dense_images_for_the_teacher(
    tiny: Callable[..., Model], student: Model
) -> None:
    teacher, other = tiny(num_classes=10), tiny(patch_size=16, seed=1)
    plan = Plan("natural", 4, 2, 4, 0, "fp32")
    assert run(teacher, tiny(num_classes=10), plan=plan, also_invert=other, rounds=2).rounds[-1].images == 16
    with pytest.raises(DfqError, match="patches of different sizes: smi makes sparse images"):
        run(teacher, tiny(num_classes=10), plan=Plan("smi", 4, 20, 4, 0, "fp32"), also_invert=other)
    large = tiny(img_size=64)
    large.preprocessing = replace(large.preprocessing, image_size=(64, 64))
    with pytest.raises(DfqError, match="tiny makes images of 64x64, and tiny takes 32x32"):
        run(teacher, tiny(num_classes=10), plan=plan, also_invert=large)
    with pytest.raises(UsageError, match="no images are made: leave --invert-student"):
        run(teacher, tiny(num_classes=10), also_invert=other, calibration=[dfq.generate(teacher, "leaves", 2)])


def test_dense_pools_of_any_patches_and_sparse_ones_of_one_size(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    teacher = tiny(num_classes=10)
    half = torch.zeros(5, 4, 4, dtype=torch.bool)
    half[:, :2] = True
    sparse, coarse = images_for(5, half), images_for(5, torch.ones(5, 2, 2, dtype=torch.bool))
    assert run(teacher, tiny(num_classes=10), calibration=[coarse, sparse], rounds=1).rounds[-1].images == 10
    finer = images_for(5, half.repeat_interleave(2, 1).repeat_interleave(2, 2))
    with pytest.raises(DfqError, match="the sparse pools have patches of different sizes"):
        run(teacher, tiny(num_classes=10), calibration=[finer, sparse])


def test_without_labelled_images_no_accuracy_is_claimed(reference: Model, student: Model) -> None:
    result = run(reference, student, training=Training(optimizer="sgd", steps=100, batch_size=16, learning_rate=0.1))
    assert (result.top1, result.teacher_top1) == (None, None)
    assert result.rounds[-1].agreement == 100
    assert "agree on 100.0 % of the generated images that were held out" in result.describe()
    assert "only real ones tell" in result.describe()


@pytest.mark.parametrize("method", ["smi", "pri"])
def test_sparse_images(reference: Model, student: Model, method: str, tmp_path: Path) -> None:
    plan = dfq.generation.Plan(method, 8, 6, 8, 0, "fp32")
    result = run(reference, student, plan=plan, rounds=2, out=tmp_path)
    pool = dfq.load_calibration_set(tmp_path / "pool" / method)
    assert pool.is_sparse
    assert result.rounds[-1].images == len(pool) == 16


def test_what_is_left_behind(tiny: Callable[..., Model], tmp_path: Path) -> None:
    teacher = tiny()
    student = load_student("vit_tiny_patch16_224", teacher, random_weights=True)
    result = run(teacher, student, out=tmp_path / "new" / "run", seed=5)
    out = tmp_path / "new" / "run"
    assert {path.name for path in out.iterdir()} == {
        "student.safetensors", "distillation.json", "log.jsonl", "curve.svg", "pool"
    }  # fmt: skip
    loaded = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=5, checkpoint_path=str(out / "student.safetensors")
    )
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), student(images))
    assert len(dfq.load_calibration_set(out / "pool" / "gaussian")) == 30
    assert rows(out) == result.to_dict()["rounds"]
    assert [row["round"] for row in rows(out)] == [1, 2, 3]
    manifest = json.loads((out / "distillation.json").read_text())
    assert (manifest["complete"], manifest["run"]["seed"], manifest["run"]["training"]["steps"]) == (True, 5, 4)
    root = ElementTree.parse(out / "curve.svg").getroot()
    assert "tiny" in "".join(root.itertext())


class StoppedError(Exception):
    """Stands for a signal."""


def stop_after(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    keep = StateFile.keep

    def keep_and_stop(self: StateFile, trainee: Any, optimizer: Any, done: list[Round]) -> None:
        keep(self, trainee, optimizer, done)
        if len(done) == rounds:
            raise StoppedError

    monkeypatch.setattr(StateFile, "keep", keep_and_stop)


@pytest.mark.parametrize(("part", "optimizer"), [("linear", "ridge"), ("linear", "sgd"), ("full", "adamw")])
def test_a_run_that_was_stopped_goes_on_to_the_same_student(
    reference: Model, part: str, optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(part, steps=3, batch_size=8, optimizer=optimizer)

    def students(out: Path) -> dfq.Distillation:
        return run(reference, load_student("reference", reference, fresh_classifier=True), training=training, out=out)

    undisturbed = students(tmp_path / "undisturbed")
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(StoppedError):
            students(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "student.safetensors").exists()
    resumed = students(tmp_path / "stopped")
    one, other = (tmp_path / name / "student.safetensors" for name in ("undisturbed", "stopped"))
    assert one.read_bytes() == other.read_bytes()
    assert [entry.divergence for entry in resumed.rounds] == [entry.divergence for entry in undisturbed.rounds]
    assert {path.name for path in one.parent.iterdir()} == {path.name for path in other.parent.iterdir()}


def test_a_finished_run_is_read(reference: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(reference, load_student("reference", reference, fresh_classifier=True), out=tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("dfq.distillation.batches", None)
    student = load_student("reference", reference, fresh_classifier=True)
    again = run(reference, student, out=tmp_path)
    assert again.rounds == first.rounds
    assert torch.equal(student.module.get_parameter("head.weight"), first.student.module.get_parameter("head.weight"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_another_run_is_not_mixed_in(reference: Model, tmp_path: Path) -> None:
    def fresh() -> Model:
        return load_student("reference", reference, fresh_classifier=True)

    run(reference, fresh(), out=tmp_path)
    before = (tmp_path / "student.safetensors").read_bytes()
    with pytest.raises(DfqError, match=r"holds a transfer of another run \(it differs in training\)"):
        run(reference, fresh(), out=tmp_path, training=Training(optimizer="sgd", steps=5))
    assert (tmp_path / "student.safetensors").read_bytes() == before
    run(reference, fresh(), out=tmp_path, training=Training(optimizer="sgd", steps=5), overwrite=True)
    assert (tmp_path / "student.safetensors").read_bytes() != before


@pytest.mark.parametrize(("first", "second"), [(["gaussian", "leaves"], ["gaussian"]), (["gaussian"], ["leaves"])])
def test_pools_of_a_run_that_is_replaced_go_with_it(
    reference: Model, first: list[str], second: list[str], tmp_path: Path
) -> None:
    def fresh() -> Model:
        return load_student("reference", reference, fresh_classifier=True)

    run(reference, fresh(), first, num_images=4, out=tmp_path)
    run(reference, fresh(), second, num_images=4, out=tmp_path, overwrite=True)
    assert [path.name for path in (tmp_path / "pool").iterdir()] == second
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run(reference, fresh(), second, num_images=4, out=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_what_is_not_ours_in_a_pool_is_told_before_anything_is_deleted(reference: Model, tmp_path: Path) -> None:
    run(reference, load_student("reference", reference, fresh_classifier=True), out=tmp_path)
    (tmp_path / "pool" / "leaves").mkdir()
    (tmp_path / "pool" / "leaves" / "thesis.txt").write_text("mine")
    student = (tmp_path / "student.safetensors").read_bytes()
    for _ in range(2):
        with pytest.raises(DfqError, match="is not empty and holds no calibration set"):
            run(
                reference,
                load_student("reference", reference, fresh_classifier=True),
                "leaves",
                out=tmp_path,
                overwrite=True,
            )
    assert (tmp_path / "student.safetensors").read_bytes() == student
    # What was there is still found.
    run(reference, load_student("reference", reference, fresh_classifier=True), out=tmp_path)
    assert (tmp_path / "pool" / "leaves" / "thesis.txt").read_text() == "mine"


def test_a_folder_is_let_go_of_while_the_exception_is_held(
    reference: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook holds it, with all that hangs on its traceback."""
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(StoppedError) as held:
            run(reference, load_student("reference", reference, fresh_classifier=True), out=tmp_path)
    run(reference, load_student("reference", reference, fresh_classifier=True), out=tmp_path)
    assert held.traceback


def test_a_second_run_in_the_same_folder_is_refused(
    reference: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, refused = StateFile.keep, []

    def keep_and_try(self: StateFile, trainee: Any, optimizer: Any, done: list[Round]) -> None:
        keep(self, trainee, optimizer, done)
        with pytest.raises(DfqError, match="another process is at work in") as error:
            run(reference, load_student("reference", reference, fresh_classifier=True), out=tmp_path)
        refused.append(str(error.value))

    monkeypatch.setattr(StateFile, "keep", keep_and_try)
    run(reference, load_student("reference", reference, fresh_classifier=True), out=tmp_path)
    assert len(refused) == 3
    assert all(str(tmp_path) in text for text in refused)


def test_a_folder_of_something_else(reference: Model, student: Model, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DfqError, match="is not empty and holds no transfer"):
        run(reference, student, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["student.safetensors", "log.jsonl", "distillation.json"])
def test_damaged_files_are_told(reference: Model, student: Model, name: str, tmp_path: Path) -> None:
    run(reference, student, out=tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DfqError, match=name.replace(".", r"\.")):
        run(reference, load_student("reference", reference, fresh_classifier=True), out=tmp_path)


def test_a_damaged_state_is_told(
    reference: Model, student: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(StoppedError):
            run(reference, student, out=tmp_path)
    state = tmp_path / "student.partial"
    state.write_bytes(state.read_bytes()[:-20])
    with pytest.raises(DfqError, match=r"student\.partial is damaged .* the student is trained anew"):
        run(reference, load_student("reference", reference, fresh_classifier=True), out=tmp_path)


def test_a_pool_made_before(
    reference: Model, student: Model, noise: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfq.distillation.batches", None)
    result = run(reference, student, calibration=noise, out=tmp_path)
    assert [entry.images for entry in result.rounds] == [8, 8, 8]
    assert not (tmp_path / "pool").exists()


def test_a_quantized_student_is_tuned_from_end_to_end(reference: Model, noise: CalibrationSet, tmp_path: Path) -> None:
    quantized = dfq.quantize(reference, "w3a4", calibration=noise, recipe="repq", progress=False)
    before = {name: q.tensors()["scale"].clone() for name, q in quantized.sites.items() if "scale" in q.tensors()}
    training = Training("full", steps=15, batch_size=8, optimizer="adamw", temperature=4.0)
    result = run(reference, quantized, calibration=noise, training=training, out=tmp_path)
    assert result.rounds[-1].divergence < 0.85 * result.rounds[0].divergence
    assert any(not torch.equal(before[name], quantized.sites[name].tensors()["scale"]) for name in before)
    images = torch.randn(2, 3, 32, 32)
    loaded = dfq.load(tmp_path / "student")
    assert torch.equal(loaded(images), quantized(images))
    # A finished run is read into the student that is given, as for those in full precision.
    again = dfq.quantize(reference, "w3a4", calibration=noise, recipe="repq", progress=False)
    found = run(reference, again, calibration=noise, training=training, out=tmp_path)
    assert found.student is again
    assert torch.equal(again(images), quantized(images))


def test_each_network_is_measured_on_images_prepared_for_it(tiny: Callable[..., Model], tmp_path: Path) -> None:
    for label in range(5):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        generator = torch.Generator().manual_seed(label)
        pixels = torch.randint(0, 256, (4, 40, 40, 3), dtype=torch.uint8, generator=generator)
        for index, picture in enumerate(pixels):
            Image.fromarray(picture.numpy()).save(tmp_path / "images" / str(label) / f"{index}.png")
    teacher = tiny()
    student = load_student("resnet10t", teacher, random_weights=True)
    result = run(teacher, student, data=tmp_path / "images")
    assert result.teacher_top1 == dfq.evaluate(teacher, tmp_path / "images", progress=False).top1
    assert result.top1 == dfq.evaluate(student, tmp_path / "images", progress=False).top1
    prepared = [(image, label) for image, label in image_folder(tmp_path / "images", teacher)]
    with pytest.raises(UsageError, match="want their images prepared differently: give a folder"):
        run(teacher, student, data=prepared)


def test_seeds_of_any_size(reference: Model, student: Model, noise: CalibrationSet) -> None:
    result = run(reference, student, calibration=noise, seed=2**63 - 1, training=Training(optimizer="sgd", steps=1))
    assert len(result.rounds) == 3


def test_bad_input(reference: Model, student: Model, tiny: Callable[..., Model], noise: CalibrationSet) -> None:
    with pytest.raises(UsageError, match="1 round or more"):
        run(reference, student, rounds=0)
    with pytest.raises(DfqError, match="has 5 classes and the teacher reference 10"):
        run(reference, tiny())
    with pytest.raises(DfqError, match="unknown method 'magic'"):
        run(reference, student, "magic")
    large = tiny(img_size=64, num_classes=10)
    large.preprocessing = replace(large.preprocessing, image_size=(64, 64))
    with pytest.raises(DfqError, match="the pool holds images of 32x32, and tiny takes 64x64"):
        run(large, student, calibration=noise)
    quantized = dfq.quantize(reference, "w8a8", calibration=noise, recipe="paper", progress=False)
    with pytest.raises(DfqError, match="trained in full, not linear"):
        run(reference, quantized)
    with pytest.raises(DfqError, match="trained by adamw"):
        run(reference, quantized, training=Training("full", optimizer="sgd"))
    with pytest.raises(DfqError, match="left the finite numbers: give a lower learning rate"):
        run(reference, student, training=Training("full", steps=20, learning_rate=1e30))
