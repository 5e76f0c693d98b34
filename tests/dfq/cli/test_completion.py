"""What the Tab key gives."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dfq.recipe import preset_names

# Calls what bash calls at Tab, with the words typed so far, the last of them unfinished.
TAB = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_dfq; printf "%s\\n" "${COMPREPLY[@]}"'


def check_syntax(shell: str, script: Path) -> None:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"there is no {shell} here")
    done = subprocess.run([found, "-n", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_valid(
    shell: str, status: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("completion", shell) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert "vit_tiny_patch16_224 " in script.read_text()
    check_syntax(shell, script)


def test_completing_in_bash(status: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("completion", "bash") == 0
    script = tmp_path / "script.bash"
    script.write_text(capsys.readouterr().out)
    here = tmp_path / "here"
    (here / "vit_tiny_folder").mkdir(parents=True)
    (here / "mixed.toml").touch()
    check_syntax("bash", script)

    def completed(*words: str) -> list[str]:
        command = ["bash", "--norc", "-c", TAB, "bash", str(script), "dfq", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=here)
        assert done.stderr == ""
        return sorted(done.stdout.split())

    model = "vit_tiny_patch16_224"
    assert completed("qu") == ["quantize"]
    assert completed("quantize", "vit_tiny_") == [
        "vit_tiny_folder",
        model,
        "vit_tiny_patch16_384",
        "vit_tiny_patch16_dinov3_qkvb",
    ]
    assert completed("evaluate", "refer") == ["reference"]
    assert completed("quantize", model, "--rec") == ["--recipe"]
    assert completed("quantize", model, "--recipe", "") == sorted([*preset_names(), "mixed.toml", "vit_tiny_folder"])
    assert completed("generate", model, "--method", "ap") == ["apa", "apa-smi"]
    assert completed("generate", model, "--precision", "") == ["auto", "bf16", "fp32"]
    assert completed("generate", model, "--checkpoint", "mi") == ["mixed.toml"]
    assert completed("generate", model, "--out", "") == ["vit_tiny_folder"]
    assert completed("list", "") == ["methods", "models", "recipes"]


def test_other_shells(status: Callable[..., int]) -> None:
    assert status("completion", "tcsh") == 2
