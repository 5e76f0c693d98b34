"""The processor a speed was measured on, and those of its instructions that decide what 8 bits gain."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")
# Sums of products of bytes in one instruction; then products of bfloat16; the last of each are ARM's.
_INTEGER_DOT = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
_TOLD = ("avx2", *_INTEGER_DOT, *_BFLOAT16)


@dataclass(frozen=True)
class Machine:
    """instruction_sets: as Linux calls them, of those that matter here; None where the system does not tell."""

    cpu: str
    cores: int
    instruction_sets: tuple[str, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        told = self.instruction_sets
        return asdict(self) | {"instruction_sets": None if told is None else list(told)}

    def describe(self) -> str:
        """One line for people."""
        told = self.instruction_sets
        sets = (
            "instruction sets unknown"
            if told is None
            else ", ".join(told) or "none of the instruction sets that matter"
        )
        return f"{self.cpu}, {self.cores} cores, {sets}"

    @property
    def lacks_integer_dot(self) -> bool:
        """Whether it is known to have no instruction that sums products of bytes (VNNI, AMX, ARM's dot product)."""
        return self.instruction_sets is not None and not set(self.instruction_sets) & set(_INTEGER_DOT)

    @property
    def lacks_bfloat16(self) -> bool:
        """Whether it is known to have no instruction for products of bfloat16."""
        return self.instruction_sets is not None and not set(self.instruction_sets) & set(_BFLOAT16)


def this_machine() -> Machine:
    """The one this runs on."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # Only Linux has it.
        text = ""
    return machine_of(text)


def machine_of(cpuinfo: str) -> Machine:
    """What Linux's `/proc/cpuinfo` says; empty where there is none."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.machine()
    flags = fields.get("flags") or fields.get("Features")
    told = None if flags is None else tuple(entry for entry in _TOLD if entry in flags.split())
    return Machine(name, os.cpu_count() or 1, told)
