from __future__ import annotations

import os
from pathlib import Path

import pytest

from calibration.errors import DfqError
from calibration.files import make_directory, read_json, replace_file, sha256_of, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_and_its_parents(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_where_a_file_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(DfqError, match=f"^cannot create the folder {path}: "):
            make_directory(path)
    assert file.read_text() == "mine"


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(DfqError, match=f"^cannot write to the folder {tmp_path}: permission denied; choose another"):
        make_directory(tmp_path)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    seen = []

    def write(partial: Path) -> None:
        partial.write_text("new")
        seen.append((partial.parent, file.read_text()))

    replace_file(file, write)
    assert seen == [(tmp_path, "old")]
    assert file.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def write(partial: Path) -> None:
        partial.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(DfqError, match=f"^cannot write {file}: No space left on device$"):
        replace_file(file, write)
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def write(partial: Path) -> None:
        partial.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "file", write)
    assert names(tmp_path) == []


def test_a_file_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "below"
    with pytest.raises(DfqError, match=f"^cannot write {below}: Not a directory$"):
        replace_file(below, lambda partial: partial.write_text("x"))


def test_json_survives(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "b": {"c": "ä"}, "tiny": 5e-324, "third": 1 / 3}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").read_text(encoding="utf-8").endswith("}\n")


def test_numbers_that_json_does_not_know_are_not_written(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"a": ', id="cut off"),
        pytest.param(b"\xff\xfe\x00", id="not text"),
        pytest.param(b"[" * 200_000, id="nested without end"),
        pytest.param(b"9" * 5000, id="a number of too many digits"),
    ],
)
def test_what_is_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DfqError, match=f"^cannot read {tmp_path / 'x.json'}: "):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("content", ["[]", "null", "3", '"run"'])
def test_json_that_is_no_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DfqError, match=f"^{tmp_path / 'x.json'} does not hold a JSON object$"):
        read_json(tmp_path / "x.json")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for read in (read_json, sha256_of):
        with pytest.raises(DfqError, match=f"^cannot read {tmp_path / 'x'}: .*No such file"):
            read(tmp_path / "x")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
