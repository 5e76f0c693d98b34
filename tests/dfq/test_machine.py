"""What `/proc/cpuinfo` says of a processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfq import machine
from dfq.machine import machine_of, this_machine


def test_instruction_sets_that_matter_in_the_order_they_are_told() -> None:
    new = machine_of(
        "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu amx_int8 avx avx2 avx512_vnni sse2 avx512_bf16\n\n"
        "processor\t: 1\nmodel name\t: Other\nflags\t\t: fpu\n"
    )
    assert (new.cpu, new.instruction_sets) == ("Xeon", ("avx2", "avx512_vnni", "amx_int8", "avx512_bf16"))
    assert not new.lacks_integer_dot
    assert not new.lacks_bfloat16
    assert new.describe() == f"Xeon, {new.cores} cores, avx2, avx512_vnni, amx_int8, avx512_bf16"
    assert new.to_dict()["instruction_sets"] == ["avx2", "avx512_vnni", "amx_int8", "avx512_bf16"]


def test_a_processor_without_integer_dot_products() -> None:
    # Parts of words are no words: avx2 is not in avx2048.
    old = machine_of("model name : EPYC\nflags : fpu avx2 avx2048 xavx_vnni\n")
    assert old.instruction_sets == ("avx2",)
    assert old.lacks_integer_dot
    assert old.lacks_bfloat16
    older = machine_of("model name : Pentium\nflags : fpu\n")
    assert older.instruction_sets == ()
    assert older.describe().endswith("none of the instruction sets that matter")


def test_arm_calls_them_features() -> None:
    arm = machine_of("processor : 0\nFeatures : fp asimd asimddp i8mm bf16\n")
    assert arm.instruction_sets == ("asimddp", "i8mm", "bf16")
    assert not arm.lacks_integer_dot
    assert arm.cpu


def test_where_the_system_does_not_tell_nothing_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    unknown = this_machine()
    assert unknown.instruction_sets is None
    assert unknown.to_dict()["instruction_sets"] is None
    assert not unknown.lacks_integer_dot
    assert not unknown.lacks_bfloat16
    assert "instruction sets unknown" in unknown.describe()
