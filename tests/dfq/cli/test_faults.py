"""What a machine does to a run: a full disk, a folder that is taken, files that rot, two runs at once."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from calibration.calibration_set import SetFolder
from calibration.files import FolderLock

if sys.platform == "win32":
    pytest.skip("limits and locks are those of POSIX", allow_module_level=True)

import resource

Files = dict[str, bytes]

LEAVES = ("--method", "leaves", "-n", 6, "--batch-size", 2, "--device", "cpu")
TUNED = "[reconstruction]\niterations = 1\nbatch_size = 4\n"
SECONDS = re.compile(rb'"(generating|training)_seconds": [0-9.e-]+')


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: what a full disk does to the one that is being written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "tuned.toml"
    file.write_text(TUNED)
    return file


def command_of(name: str, recipe: Path) -> tuple[object, ...]:
    return {
        "generate": ("generate", "reference", *LEAVES),
        "quantize": ("quantize", "reference", *LEAVES, "--bits", "w4a8", "--recipe", recipe),
        "distill": ("distill", "reference", "reference", *LEAVES[:4], *LEAVES[-2:], "--rounds", 3, "--steps", 2),
    }[name]


@pytest.mark.parametrize("name", ["generate", "quantize", "distill"])
def test_a_full_disk(
    status: Callable[..., int],
    files_below: Callable[[Path], Files],
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    command, out = command_of(name, recipe), tmp_path / "disturbed"
    assert status(*command, "--quiet", "--out", tmp_path / "undisturbed") == 0
    wanted = files_below(tmp_path / "undisturbed")
    failures = 0
    for size in sorted({1, *(len(content) - 1 for content in wanted.values())}):
        capsys.readouterr()
        with full_after(size):
            failed = status(*command, "--quiet", "--out", out)
        said = capsys.readouterr().err
        if failed:
            failures += 1
            assert failed == 1
            assert re.fullmatch(rf"dfq: error: cannot write {out}/[^ ]+: .*File too large.*\n", said), said
        assert not list(out.rglob(".*.partial"))
    assert failures >= 3
    assert status(*command, "--quiet", "--out", out) == 0
    found = files_below(out)
    # A log tells how long it took, and the picture of it.
    same = [SECONDS.sub(b"", found[path]) == SECONDS.sub(b"", wanted[path]) for path in wanted if "curve" not in path]
    assert all(same)
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize("name", ["generate", "quantize", "distill"])
def test_two_runs_in_one_folder(
    refused: Callable[..., None], status: Callable[..., int], recipe: Path, tmp_path: Path, name: str
) -> None:
    command, out = (*command_of(name, recipe), "--out", tmp_path / "out"), tmp_path / "out"
    out.mkdir()
    lock = FolderLock(out)
    refused(command, 1, f"another process is at work in {out}: wait until it is done, or choose another --out", out)
    lock.release()
    assert status(*command, "--quiet") == 0
    # A finished one is let go.
    FolderLock(out).release()


def test_a_finished_set_is_left_alone(
    status: Callable[..., int],
    files_below: Callable[[Path], Files],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ("generate", "reference", *LEAVES, "--out", tmp_path / "set")
    assert status(*command) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    capsys.readouterr()
    assert status(*command) == 0
    assert f"{tmp_path / 'set'} already holds this set; nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before


@pytest.mark.parametrize("rot", ["flipped", "truncated", "gone"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_that_rots_is_named_and_made_again(
    status: Callable[..., int],
    files_below: Callable[[Path], Files],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rot: str,
    finished: bool,
) -> None:
    command, out = ("generate", "reference", *LEAVES, "--out"), tmp_path / "set"
    assert status(*command, tmp_path / "good") == 0
    if finished:
        assert status(*command, out) == 0
    else:
        with monkeypatch.context() as patched:

            def stop(*_: object) -> None:
                raise KeyboardInterrupt

            patched.setattr(SetFolder, "finish", stop)
            assert status(*command, out) == 130
    shard = out / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5000] ^= 16
    if rot == "gone":
        shard.unlink()
    else:
        shard.write_bytes(content if rot == "flipped" else content[:-7])
    capsys.readouterr()
    assert status(*command, out) == 0
    said = capsys.readouterr().err
    assert bool(re.search(rf"{shard} is damaged \(.+\): it is made again\n", said)) == (rot != "gone")
    assert files_below(out) == files_below(tmp_path / "good")


def test_what_a_killed_run_left_half_written_goes(status: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    (out / ".shard-00000.safetensors.4711.partial").write_bytes(b"half")
    assert status("generate", "reference", *LEAVES, "--quiet", "--out", out) == 0
    assert not list(out.glob(".*"))
