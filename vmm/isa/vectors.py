"""The architecture's exception vectors (SDM volume 3A, table 6-1), one row each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Vector(IntEnum):
    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19


@dataclass(frozen=True)
class VectorRow:
    """What the manual's table says of a vector."""

    vector: int
    mnemonic: str
    description: str
    error_code: bool = False
    contributory: bool = False  # SDM 3A table 6-4


VECTORS: dict[int, VectorRow] = {
    row.vector: row
    for row in (
        VectorRow(0, "#DE", "divide error", contributory=True),
        VectorRow(1, "#DB", "debug exception"),
        VectorRow(2, "NMI", "non-maskable interrupt"),
        VectorRow(3, "#BP", "breakpoint"),
        VectorRow(4, "#OF", "overflow"),
        VectorRow(5, "#BR", "BOUND range exceeded"),
        VectorRow(6, "#UD", "invalid opcode"),
        VectorRow(7, "#NM", "device not available"),
        VectorRow(8, "#DF", "double fault", error_code=True),
        VectorRow(10, "#TS", "invalid TSS", error_code=True, contributory=True),
        VectorRow(11, "#NP", "segment not present", error_code=True, contributory=True),
        VectorRow(12, "#SS", "stack-segment fault", error_code=True, contributory=True),
        VectorRow(13, "#GP", "general protection", error_code=True, contributory=True),
        VectorRow(14, "#PF", "page fault", error_code=True),
        VectorRow(16, "#MF", "x87 floating-point error"),
        VectorRow(17, "#AC", "alignment check", error_code=True),
        VectorRow(18, "#MC", "machine check"),
        VectorRow(19, "#XM", "SIMD floating-point exception"),
    )
}

ERROR_CODE_VECTORS = frozenset(v for v, row in VECTORS.items() if row.error_code)
CONTRIBUTORY = frozenset(v for v, row in VECTORS.items() if row.contributory)


def name(vector: int) -> str:
    """`#GP` for 13, `vector 0x80` for what the architecture does not name."""
    row = VECTORS.get(vector)
    return row.mnemonic if row else f"vector {vector:#x}"
