"""Running the `dfq` command, and what there is to run it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dfq import reference as embedded
from dfq.cli import main

Files = dict[str, bytes]


def exit_status(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def contents(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def status() -> Callable[..., int]:
    """Runs a command; the exit status, also where argparse gives it."""
    return exit_status


@pytest.fixture
def files_below() -> Callable[[Path], Files]:
    """What lies in a folder, by path."""
    return contents


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs a command and checks that it fails with this status and one line that says so, `out` left as it was."""

    def check(arguments: tuple[object, ...], code: int, said: str, out: Path | None = None) -> None:
        before = contents(out) if out is not None and out.is_dir() else None
        capsys.readouterr()
        assert exit_status(*arguments, "--quiet") == code
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("dfq: error: ")
        assert said in lines[0]
        assert printed.out == ""
        if out is not None:
            assert (contents(out) if out.is_dir() else None) == before

    return check


@pytest.fixture(scope="session")
def w8a8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model at W8A8, calibrated on eight images of noise; tests leave it as it is."""
    out = tmp_path_factory.mktemp("cli") / "w8a8"
    noise = ("--method", "gaussian", "-n", "8", "--device", "cpu")
    assert main(["quantize", "reference", *noise, "--bits", "w8a8", "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Twenty held-out digits as pictures, one folder per class."""
    images, labels = embedded.digits("test")
    for index in range(20):
        folder = tmp_path / "digits" / str(labels[index].item())
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index].permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return tmp_path / "digits"
