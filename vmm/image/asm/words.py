"""The reserved words of the dialect: registers, sizes, prefixes, and what a label may not be called."""

from __future__ import annotations

_GENERAL = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
SEGMENTS = {"es": 0, "cs": 1, "ss": 2, "ds": 3, "fs": 4, "gs": 5}


def _numbered(prefix: str, count: int) -> dict[str, int]:
    return {f"{prefix}{n}": n for n in range(count)}


R32 = {f"e{name}": n for n, name in enumerate(_GENERAL)}
R16 = {name: n for n, name in enumerate(_GENERAL)}
R8 = {name: n for n, name in enumerate(("al", "cl", "dl", "bl", "ah", "ch", "dh", "bh"))}
# Every register: its class and its number in an encoding.
REGISTERS: dict[str, tuple[str, int]] = {
    name: (kind, n)
    for kind, names in {
        "r32": R32,
        "r16": R16,
        "r8": R8,
        "sreg": SEGMENTS,
        "cr": _numbered("cr", 8),
        "dr": _numbered("dr", 8),
        "st": _numbered("st", 8),
        "mm": _numbered("mm", 8),
        "xmm": _numbered("xmm", 8),
    }.items()
    for name, n in names.items()
}
# Bytes in a register of each class; control, debug and x87 registers take part in no size matching.
REGISTER_SIZE = {"r32": 4, "r16": 2, "r8": 1, "sreg": 2, "mm": 8, "xmm": 16}

SIZES = {"byte": 1, "word": 2, "dword": 4, "fword": 6, "qword": 8, "tword": 10, "oword": 16}
DISTANCES = frozenset({"short", "near", "far"})
REPEATS = {"rep": 0xF3, "repe": 0xF3, "repz": 0xF3, "repne": 0xF2, "repnz": 0xF2}
PREFIXES = frozenset({*REPEATS, "lock", "o16", "o32", "a16", "a32"})
OTHER_KEYWORDS = frozenset({"strict", "to", "nosplit", "rel", "abs", "seg", "wrt", "ptr"})
KEYWORDS = frozenset({*SIZES, *DISTANCES, *PREFIXES, *OTHER_KEYWORDS, "times"})

# The condition codes of Jcc, SETcc and CMOVcc; the first name of each is the one that Capstone prints.
CONDITIONS = (
    ("o",),
    ("no",),
    ("b", "c", "nae"),
    ("ae", "nb", "nc"),
    ("e", "z"),
    ("ne", "nz"),
    ("be", "na"),
    ("a", "nbe"),
    ("s",),
    ("ns",),
    ("p", "pe"),
    ("np", "po"),
    ("l", "nge"),
    ("ge", "nl"),
    ("le", "ng"),
    ("g", "nle"),
)
CONDITION_CODES = {name: code for code, names in enumerate(CONDITIONS) for name in names}
