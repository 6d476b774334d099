"""Hardware words as types that print themselves.

A `Word` is an `int` whose class names its fields. The names are plain `int` masks, so that the hot path
pays nothing for them (`eflags & EFlags.IF`), and `str(EFlags(0x202))` reads `IF`.

Sources: Intel SDM volume 3A, 2.3 (EFLAGS), 2.5 (control registers), 6.13 (error codes), 4.7 (#PF).
"""

from __future__ import annotations

from typing import ClassVar


class Word(int):
    """An integer that knows the names of its bits; fields wider than a bit print as `NAME=value`."""

    FIELDS: ClassVar[dict[str, int]] = {}

    def __init_subclass__(cls) -> None:
        cls.FIELDS = {k: v for k, v in vars(cls).items() if k.isupper() and isinstance(v, int)}

    def __str__(self) -> str:
        parts = []
        for name, mask in self.FIELDS.items():
            low = mask & -mask
            if mask == low:
                if self & mask:
                    parts.append(name)
            elif self & mask:
                parts.append(f"{name}={(self & mask) // low}")
        return " ".join(parts) or "-"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({int(self):#x}: {self})"


class EFlags(Word):
    CF = 1 << 0
    ONE = 1 << 1  # reads as one, always
    PF = 1 << 2
    AF = 1 << 4
    ZF = 1 << 6
    SF = 1 << 7
    TF = 1 << 8
    IF = 1 << 9
    DF = 1 << 10
    OF = 1 << 11
    IOPL = 3 << 12
    NT = 1 << 14
    RF = 1 << 16
    VM = 1 << 17
    AC = 1 << 18
    VIF = 1 << 19
    VIP = 1 << 20
    ID = 1 << 21

    @property
    def iopl(self) -> int:
        return self >> 12 & 3


ARITHMETIC = EFlags.CF | EFlags.PF | EFlags.AF | EFlags.ZF | EFlags.SF | EFlags.OF
IOPL_SHIFT = 12


class CR0(Word):
    PE = 1 << 0
    MP = 1 << 1
    EM = 1 << 2
    TS = 1 << 3
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16
    AM = 1 << 18
    NW = 1 << 29
    CD = 1 << 30
    PG = 1 << 31


class CR4(Word):
    VME = 1 << 0
    PVI = 1 << 1
    TSD = 1 << 2
    DE = 1 << 3
    PSE = 1 << 4
    PAE = 1 << 5
    MCE = 1 << 6
    PGE = 1 << 7
    PCE = 1 << 8
    OSFXSR = 1 << 9
    OSXMMEXCPT = 1 << 10
    UMIP = 1 << 11
    SMEP = 1 << 20
    SMAP = 1 << 21


class SelectorError(Word):
    """The error code of #TS, #NP, #SS and #GP: a selector with three bits of its own (SDM 3A 6.13)."""

    EXT = 1 << 0
    IDT = 1 << 1
    TI = 1 << 2
    INDEX = 0x1FFF << 3


class PageFaultError(Word):
    """The error code of #PF (SDM 3A 4.7)."""

    P = 1 << 0
    WR = 1 << 1
    US = 1 << 2
    RSVD = 1 << 3
    ID = 1 << 4


class PTE(Word):
    """A 32-bit page-table or page-directory entry (SDM 3A 4.3)."""

    P = 1 << 0
    RW = 1 << 1
    US = 1 << 2
    PWT = 1 << 3
    PCD = 1 << 4
    A = 1 << 5
    D = 1 << 6
    PS = 1 << 7
    G = 1 << 8


class PaeEntry(Word):
    """A 64-bit entry of PAE's tables (SDM 3A 4.4); what a page-directory-pointer entry has of it is P and FRAME."""

    P = 1 << 0
    RW = 1 << 1
    US = 1 << 2
    PWT = 1 << 3
    PCD = 1 << 4
    A = 1 << 5
    D = 1 << 6
    PS = 1 << 7
    G = 1 << 8
    AVAILABLE = 7 << 9
    FRAME = 0xFFFFFFFFFF << 12
    HIGH = 0x7FF << 52
    NX = 1 << 63


class DR6(Word):
    BD = 1 << 13
    BS = 1 << 14
    BT = 1 << 15


class DR7(Word):
    GD = 1 << 13
