from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from calibration.calibration_set import (
    CalibrationSet,
    SetFolder,
    concatenate,
    load_calibration_set,
    normalise,
    to_pixels,
)
from calibration.errors import DfqError
from calibration.tokens import PatchGrid

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 0.2)
RUN: dict[str, Any] = {"method": "test", "seed": 1, "mean": MEAN, "std": list(STD), "nested": {"tuple": (1, (2, 3))}}
VERSIONS = {"torch": "0"}


def masks(*rows: str) -> Tensor:
    """2x2 patches, one string per image: `x..x` keeps top left and bottom right."""
    return torch.tensor([[c == "x" for c in row] for row in rows]).view(-1, 2, 2)


def a_set(*rows: str, seed: int = 0, labels: bool = True) -> CalibrationSet:
    random = np.random.default_rng(seed)
    return CalibrationSet(
        images=torch.from_numpy(random.integers(0, 256, (len(rows), 3, 4, 6), dtype=np.uint8)),
        mask=masks(*rows),
        labels=torch.from_numpy(random.integers(0, 10, len(rows))) if labels else None,
        confidence=torch.from_numpy(random.random(len(rows), dtype=np.float32)) if labels else None,
        mean=MEAN,
        std=STD,
        run=RUN,
        iterations=torch.from_numpy(random.integers(1, 500, len(rows))) if labels else None,
    )


PARTS = [a_set("xxxx", "x..x", seed=1), a_set(".xx.", seed=2)]


def assert_same(first: CalibrationSet, second: CalibrationSet) -> None:
    for name in ("images", "mask", "labels", "confidence", "iterations"):
        ours, theirs = getattr(first, name), getattr(second, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), name
    assert (first.mean, first.std) == (second.mean, second.std)


def saved(path: Path, parts: list[CalibrationSet] = PARTS) -> Path:
    folder = SetFolder(path, RUN, VERSIONS)
    for index, part in enumerate(parts):
        folder.write(index, part)
    folder.finish([len(part) for part in parts])
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_manifest(folder: Path, **changes: Any) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # a pixel, a label or a probability: the file can still be read
    path.write_bytes(content)


class TestTheSet:
    @pytest.mark.parametrize(
        "change",
        [
            pytest.param({"images": torch.zeros(2, 3, 4, 6)}, id="float images"),
            pytest.param({"images": torch.zeros(3, 4, 6, dtype=torch.uint8)}, id="one image"),
            pytest.param({"images": torch.tensor(0, dtype=torch.uint8)}, id="a number"),
            pytest.param({"images": torch.zeros(0, 3, 4, 6, dtype=torch.uint8)}, id="no images"),
            pytest.param({"images": torch.zeros(2, 1, 4, 6, dtype=torch.uint8)}, id="gray images"),
            pytest.param({"images": torch.zeros(2, 3, 5, 6, dtype=torch.uint8)}, id="rows that do not fit"),
            pytest.param({"images": torch.zeros(2, 3, 4, 7, dtype=torch.uint8)}, id="columns that do not fit"),
            pytest.param({"mask": torch.ones(2, 2, 2)}, id="float mask"),
            pytest.param({"mask": torch.ones(3, 2, 2, dtype=torch.bool)}, id="masks of more images"),
            pytest.param({"mask": torch.ones(2, 4, dtype=torch.bool)}, id="flat mask"),
            pytest.param({"mask": torch.ones(2, dtype=torch.bool)}, id="mask of whole images"),
            pytest.param({"mask": torch.ones(2, 0, 2, dtype=torch.bool)}, id="mask without rows"),
            pytest.param({"labels": torch.zeros(3, dtype=torch.int64)}, id="labels of more images"),
            pytest.param({"labels": torch.zeros(2)}, id="float labels"),
            pytest.param({"confidence": torch.zeros(2, 1)}, id="confidence of another shape"),
            pytest.param({"iterations": torch.ones(3, dtype=torch.int64)}, id="iterations of more images"),
            pytest.param({"iterations": torch.ones(2)}, id="float iterations"),
            pytest.param({"iterations": torch.tensor(5)}, id="iterations of the batch"),
            pytest.param({"mean": (0.5, 0.5)}, id="two means"),
            pytest.param({"std": (0.5,) * 4}, id="four deviations"),
        ],
    )
    def test_what_is_none(self, change: dict[str, Any]) -> None:
        good = a_set("xxxx", "x..x")
        with pytest.raises(
            DfqError, match=r"^not a calibration set: images .*mask .*, labels .*, confidence .*, iterations "
        ):
            replace(good, **change)

    def test_the_message_says_what_was_found(self) -> None:
        message = "images (1, 3, 4, 6) torch.uint8, mask (2, 2, 2) torch.bool, 3 means, 3 deviations"
        with pytest.raises(DfqError, match=re.escape(message)):
            replace(a_set("xxxx", labels=False), mask=masks("xxxx", "xxxx"))

    def test_an_image_without_any_patch(self) -> None:
        with pytest.raises(DfqError, match="an image keeps no patch at all"):
            a_set("xxxx", "....")

    def test_what_it_tells_of_itself(self) -> None:
        assert len(a_set("xxxx", "x..x", "xx..")) == 3
        assert a_set("xxxx").grid == PatchGrid(rows=2, columns=2, height=2, width=3)
        assert a_set("xxxx", "xxx.").is_sparse
        assert not a_set("xxxx", "xxxx").is_sparse

    def test_sets_are_compared_by_identity(self) -> None:
        """Comparing tensors by `==` would raise, not answer."""
        first = a_set("xxxx")
        assert first == first
        assert first != a_set("xxxx")

    def test_concatenate(self) -> None:
        whole = concatenate(PARTS)
        assert len(whole) == 3
        assert torch.equal(whole.images, torch.cat([PARTS[0].images, PARTS[1].images]))
        assert torch.equal(whole.mask, masks("xxxx", "x..x", ".xx."))
        assert whole.labels is not None
        assert whole.labels.tolist() == [*PARTS[0].labels.tolist(), *PARTS[1].labels.tolist()]
        assert whole.iterations is not None
        assert whole.iterations.tolist() == [*PARTS[0].iterations.tolist(), *PARTS[1].iterations.tolist()]
        assert whole.run == RUN

    def test_labels_are_unknown_where_a_part_has_none(self) -> None:
        whole = concatenate([a_set("xxxx"), a_set("xxxx", labels=False)])
        assert whole.labels is None
        assert whole.confidence is None
        assert whole.iterations is None


class TestPixels:
    def test_normalise_by_hand(self) -> None:
        images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
        # (0 - 0.5) / 0.5, (1 - 0.25) / 0.25, 0.2 / 0.2
        values = normalise(images, MEAN, STD)
        assert values.dtype == torch.float32
        assert values.flatten().tolist() == pytest.approx([-1.0, 3.0, 1.0])

    def test_every_pixel_survives(self) -> None:
        images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
        for mean, std in ((MEAN, STD), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
            assert torch.equal(to_pixels(normalise(images, mean, std), mean, std), images)

    def test_pixels_lie_in_the_order_of_a_file(self) -> None:
        images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
        other_order = images.contiguous(memory_format=torch.channels_last)
        assert to_pixels(other_order, MEAN, STD).is_contiguous()
        assert torch.equal(to_pixels(other_order, MEAN, STD), to_pixels(images, MEAN, STD))

    def test_the_nearest_picture(self) -> None:
        # In units of 1/255: 99.6 -> 100, 99.4 -> 99; beyond white and black it is white and black.
        values = torch.tensor([99.6, 99.4, 300.0, -7.0]).view(1, 1, 2, 2) / 255
        assert to_pixels(values, (0.0,), (1.0,)).flatten().tolist() == [100, 99, 255, 0]


class TestBatches:
    CPU = torch.device("cpu")

    def test_images_that_keep_different_numbers_of_patches_come_apart(self) -> None:
        whole = a_set("x..x", "xxxx", ".x..", "xx..", "xxxx", "..xx")
        made = list(whole.batches(2, self.CPU))
        assert [None if keep is None else keep.tolist() for _, keep in made] == [
            [[1]],
            [[0, 3], [0, 1]],
            [[2, 3]],
            None,
        ]
        for (images, _), members in zip(made, ([2], [0, 3], [5], [1, 4]), strict=True):
            x = whole.images[members].double().numpy() / 255
            x = (x - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
            pixels = np.kron(whole.mask[members].numpy(), np.ones((2, 3)))[:, None]
            assert images.dtype == torch.float32
            assert images.numpy() == pytest.approx(x * pixels, abs=1e-6)
            assert not images.numpy()[np.broadcast_to(pixels == 0, images.shape)].any()  # exactly

    def test_the_last_batch_may_be_smaller(self) -> None:
        assert [len(images) for images, _ in a_set(*["xxxx"] * 5).batches(2, self.CPU)] == [2, 2, 1]


class TestSavingAndLoading:
    @pytest.mark.parametrize("labels", [True, False])
    def test_what_is_saved_is_loaded(self, tmp_path: Path, labels: bool) -> None:
        parts = [a_set("xxxx", "x..x", seed=1, labels=labels), a_set(".xx.", seed=2, labels=labels)]
        loaded = load_calibration_set(str(saved(tmp_path / "set", parts)))
        assert_same(loaded, concatenate(parts))
        assert loaded.run == json.loads(json.dumps(RUN))

    def test_a_set_that_does_not_tell_how_long_it_was_inverted(self, tmp_path: Path) -> None:
        """As those made before that was kept."""
        parts = [replace(part, iterations=None) for part in PARTS]
        loaded = load_calibration_set(saved(tmp_path, parts))
        assert loaded.iterations is None
        assert_same(loaded, concatenate(parts))

    def test_the_folder_holds_a_manifest_and_a_shard_for_each_batch(self, tmp_path: Path) -> None:
        saved(tmp_path)
        assert sorted(files(tmp_path)) == ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert (manifest["format"], manifest["version"], manifest["complete"]) == ("dfq.calibration_set", 1, True)
        assert [shard["images"] for shard in manifest["shards"]] == [2, 1]
        assert manifest["versions"] == VERSIONS

    def test_the_same_run_makes_the_same_bytes(self, tmp_path: Path) -> None:
        assert files(saved(tmp_path / "a")) == files(saved(tmp_path / "b"))

    def test_a_run_that_was_stopped_goes_on(self, tmp_path: Path) -> None:
        whole = files(saved(tmp_path / "whole"))
        SetFolder(tmp_path / "a", RUN, VERSIONS).write(0, PARTS[0])
        again = SetFolder(tmp_path / "a", RUN, VERSIONS)
        part = again.read(0)
        assert part is not None
        assert_same(part, PARTS[0])
        assert again.read(1) is None
        again.write(1, PARTS[1])
        again.finish([len(part) for part in PARTS])
        assert files(tmp_path / "a") == whole

    def test_a_finished_run_is_opened_again(self, tmp_path: Path) -> None:
        before = files(saved(tmp_path))
        folder = SetFolder(tmp_path, RUN, VERSIONS)
        for index, part in enumerate(PARTS):
            read = folder.read(index)
            assert read is not None
            assert_same(read, part)
        assert files(tmp_path) == before

    def test_a_failed_write_leaves_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = SetFolder(tmp_path, RUN, VERSIONS)

        def fail(path: Path, content: bytes) -> None:
            with path.open("wb") as file:
                file.write(content[:100])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", fail)
        with pytest.raises(DfqError, match=r"cannot write .*shard-00000\.safetensors: No space left on device"):
            folder.write(0, PARTS[0])
        assert sorted(files(tmp_path)) == ["manifest.json"]
        assert folder.read(0) is None


class TestClaimingAFolder:
    OTHER = RUN | {"seed": 2}

    def test_another_run_is_refused(self, tmp_path: Path) -> None:
        before = files(saved(tmp_path))
        with pytest.raises(DfqError, match=f"^{tmp_path} holds a calibration set of another run; .*--overwrite$"):
            SetFolder(tmp_path, self.OTHER, VERSIONS)
        assert files(tmp_path) == before

    def test_overwrite_removes_the_files_of_the_set_and_nothing_else(self, tmp_path: Path) -> None:
        saved(tmp_path)
        mine = {"notes.txt": b"mine", "shard-best.safetensors": b"mine", "photo.png": b"mine"}
        for name, content in (mine | {"preview.png": b"theirs", "trace.png": b"theirs"}).items():
            (tmp_path / name).write_bytes(content)
        folder = SetFolder(tmp_path, self.OTHER, VERSIONS, overwrite=True)
        after = files(tmp_path)
        assert json.loads(after.pop("manifest.json"))["run"]["seed"] == 2
        assert after == mine
        assert folder.read(0) is None

    def test_overwrite_keeps_what_belongs_to_the_same_run(self, tmp_path: Path) -> None:
        before = files(saved(tmp_path))
        SetFolder(tmp_path, RUN, VERSIONS, overwrite=True)
        assert files(tmp_path) == before

    def test_a_set_of_another_version_is_another_run(self, tmp_path: Path) -> None:
        edit_manifest(saved(tmp_path), version=0)
        with pytest.raises(DfqError, match="another run"):
            SetFolder(tmp_path, RUN, VERSIONS)

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(DfqError, match=f"^{tmp_path} is not empty and holds no calibration set; choose another"):
            SetFolder(tmp_path, RUN, VERSIONS, overwrite=overwrite)
        assert files(tmp_path) == {"thesis.tex": b"mine"}

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_a_manifest_of_something_else_is_refused(self, tmp_path: Path, overwrite: bool) -> None:
        """A manifest.json is found in browser extensions and web pages, too."""
        (tmp_path / "manifest.json").write_text('{"name": "My extension"}')
        with pytest.raises(DfqError, match=r"manifest\.json does not describe a calibration set; choose another"):
            SetFolder(tmp_path, RUN, VERSIONS, overwrite=overwrite)
        assert files(tmp_path) == {"manifest.json": b'{"name": "My extension"}'}

    def test_a_path_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(DfqError, match=r"^cannot create the folder /.*/file/set: "):
            SetFolder(tmp_path / "file" / "set", RUN, VERSIONS)

    def test_a_damaged_shard_of_a_finished_set_is_not_declared_good(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shard = saved(tmp_path) / "shard-00001.safetensors"
        flip_a_byte(shard)
        folder = SetFolder(tmp_path, RUN, VERSIONS)
        assert folder.complete
        assert folder.read(1) is None
        (said,) = caplog.messages
        assert said == f"{shard} is damaged (its checksum is not that in manifest.json): it is made again"
        # Doing so mends the set, even where other hardware makes slightly other images.
        remade = a_set(".xx.", seed=3)
        folder.write(1, remade)
        assert not folder.complete
        part = folder.read(1)
        assert part is not None
        assert_same(part, remade)
        folder.finish([len(PARTS[0]), len(remade)])
        assert_same(load_calibration_set(tmp_path), concatenate([PARTS[0], remade]))

    @pytest.mark.parametrize("how", ["truncated", "flipped", "another format"])
    def test_a_damaged_shard_of_an_unfinished_set(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        SetFolder(tmp_path, RUN, VERSIONS).write(0, PARTS[0])
        shard = tmp_path / "shard-00000.safetensors"
        if how == "truncated":
            shard.write_bytes(shard.read_bytes()[:-1])
        elif how == "flipped":
            flip_a_byte(shard)
        else:
            save_file({"images": PARTS[0].images, "mask": PARTS[0].mask}, shard)
        assert SetFolder(tmp_path, RUN, VERSIONS).read(0) is None
        (said,) = caplog.messages
        assert re.fullmatch(rf"{shard} is damaged \(.*\): it is made again", said)

    def test_one_run_at_a_time(self, tmp_path: Path) -> None:
        first = SetFolder(tmp_path, RUN, VERSIONS)
        with pytest.raises(DfqError, match=rf"^another process is at work in {tmp_path}: wait .* or choose another"):
            SetFolder(tmp_path, RUN, VERSIONS)
        first.release()
        second = SetFolder(tmp_path, RUN, VERSIONS)
        # Nor does a run that is gone keep others out.
        del second
        SetFolder(tmp_path, RUN, VERSIONS)


class TestWhatCannotBeLoaded:
    def test_nothing_there(self, tmp_path: Path) -> None:
        for path, wrong in ((tmp_path, r"it has no manifest\.json"), (tmp_path / "missing", "there is no such folder")):
            with pytest.raises(
                DfqError, match=f"^{path} is not a calibration set: {wrong}; `dfq generate` makes one, "
            ):
                load_calibration_set(path)

    def test_an_unfinished_set(self, tmp_path: Path) -> None:
        SetFolder(tmp_path, RUN, VERSIONS).write(0, PARTS[0])
        with pytest.raises(DfqError, match=f"^{tmp_path} is unfinished: run the command that made it again"):
            load_calibration_set(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "dfq.model"}, r"does not describe a calibration set \(format 'dfq\.model'\)"),
            ({"version": 2}, "has version 2; this dfq reads version 1"),
            ({"version": None}, "has version None; this dfq reads version 1"),
            ({"shards": []}, "is damaged: it has no shards"),
            ({"run": None}, "is damaged: .*tells of no run"),
            ({"shards": None}, "is damaged: its list of shards cannot be read"),
            ({"shards": {"file": "x"}}, "is damaged: its list of shards cannot be read"),
            ({"shards": [{"file": "shard-00000.safetensors"}]}, "is damaged: its list of shards .*'sha256'"),
            ({"shards": [{"file": "../secret", "sha256": ""}]}, r"names '\.\./secret', which is not a file in "),
            ({"shards": [{"file": "..", "sha256": ""}]}, r"names '\.\.', which is not a file in "),
            ({"shards": [{"file": "/etc/passwd", "sha256": ""}]}, "names '/etc/passwd', which is not a file in "),
        ],
    )
    def test_a_manifest_that_is_wrong(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        folder = saved(tmp_path / "set")
        (tmp_path / "secret").write_text("mine")
        edit_manifest(folder, **change)
        with pytest.raises(DfqError, match=rf"^{folder / 'manifest.json'} {message}"):
            load_calibration_set(folder)

    def test_a_manifest_that_is_no_json(self, tmp_path: Path) -> None:
        (saved(tmp_path) / "manifest.json").write_text("{")
        with pytest.raises(DfqError, match=f"^cannot read {tmp_path / 'manifest.json'}: "):
            load_calibration_set(tmp_path)

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        (saved(tmp_path) / "shard-00001.safetensors").unlink()
        with pytest.raises(DfqError, match=rf"names 'shard-00001\.safetensors', which is not a file in {tmp_path}$"):
            load_calibration_set(tmp_path)

    @pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
    def test_a_damaged_shard(self, tmp_path: Path, damage: str) -> None:
        shard = saved(tmp_path) / "shard-00000.safetensors"
        if damage == "flipped":
            flip_a_byte(shard)
        else:
            shard.write_bytes(b"" if damage == "empty" else shard.read_bytes()[:-10])
        with pytest.raises(
            DfqError, match=f"^{shard} is damaged .its checksum is not that in manifest.json.: the command that made"
        ):
            load_calibration_set(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"mean": [0.5]}, "not a calibration set: .*, 1 means, 3 deviations"),
            ({"mean": None}, "not iterable"),
            ({"std": ["wide", 1, 1]}, "could not convert"),
        ],
    )
    def test_a_shard_that_does_not_fit_its_manifest_is_named(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        edit_manifest(saved(tmp_path), run=RUN | change)
        with pytest.raises(DfqError, match=rf"^{tmp_path / 'shard-00000.safetensors'} is damaged \(.*{message}"):
            load_calibration_set(tmp_path)
