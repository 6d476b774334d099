"""The opcode maps: what follows each opcode, and the exceptions to the rules. Data for `vmm.isa.decode`.

Sources: Intel SDM volume 2D, appendix A (opcode maps), tables A-2, A-3 and A-6; volume 2A, table 2-1 and LOCK.
"""

from __future__ import annotations

MAX_LENGTH = 15  # longer is #GP(0), whatever it says (SDM 2A 2.3.11)

EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = range(8)
ES, CS, SS, DS, FS, GS = range(6)
SEGMENT_NAMES = ("ES", "CS", "SS", "DS", "FS", "GS")

SEGMENT_PREFIX = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}


def _opcode_map(formats: dict[str, str]) -> list[str]:
    """A 256-entry opcode map: for each opcode the letters of what follows it.

    M a ModRM byte; then, as in the manual's appendix A, immediates: b one byte, w two, z two or four by
    operand size, p a far pointer (z and w), o an offset of address size.
    """
    entries = [""] * 256
    for letters, ranges in formats.items():
        for part in ranges.split():
            first, _, last = part.partition("-")
            for opcode in range(int(first, 16), int(last or first, 16) + 1):
                entries[opcode] = letters
    return entries


ONE_BYTE = _opcode_map(
    {
        "M": "00-03 08-0B 10-13 18-1B 20-23 28-2B 30-33 38-3B 62-63 84-8F C4-C5 D0-D3 D8-DF F6-F7 FE-FF",
        "Mb": "6B 80 82-83 C0-C1 C6",
        "Mz": "69 81 C7",
        "b": "04 0C 14 1C 24 2C 34 3C 6A 70-7F A8 B0-B7 CD D4-D5 E0-E7 EB",
        "z": "05 0D 15 1D 25 2D 35 3D 68 A9 B8-BF E8-E9",
        "w": "C2 CA",
        "wb": "C8",
        "p": "9A EA",
        "o": "A0-A3",
    }
)
TWO_BYTE = _opcode_map(
    {
        "M": "00-03 0D 10-23 28-2F 40-6F 74-76 78-79 7C-7F 90-9F A3 A5 AB AD-B9 BB-C1 C3 C7 D0-FF",
        "Mb": "0F 70-73 A4 AC BA C2 C4-C6",
        "z": "80-8F",
    }
)

# Opcodes whose ModRM.reg selects the instruction (SDM 2D table A-6), and the moves of segment registers,
# where it selects an instruction as far as the classification goes.
GROUPS = frozenset(
    (
        *(*range(0x80, 0x84), 0x8C, 0x8E, 0x8F, 0xC0, 0xC1, 0xC6, 0xC7, *range(0xD0, 0xD4)),
        *(0xF6, 0xF7, 0xFE, 0xFF, 0x0F00, 0x0F01, 0x0F18, 0x0F71, 0x0F72, 0x0F73, 0x0FAE, 0x0FBA, 0x0FC7),
    )
)

# What may be locked: read-modify-write instructions with a memory destination (SDM 2A, LOCK).
LOCKABLE = frozenset(
    [f"{base + form:02X}" for base in range(0, 0x38, 8) for form in (0, 1)]
    + [f"{opcode}/{reg}" for opcode in ("80", "81", "82", "83") for reg in range(7)]
    + ["86", "87", "F6/2", "F6/3", "F7/2", "F7/3", "FE/0", "FE/1", "FF/0", "FF/1", "0FAB", "0FB3", "0FBB"]
    + ["0FBA/5", "0FBA/6", "0FBA/7", "0FB0", "0FB1", "0FC0", "0FC1", "0FC7/1"]
)

# The bytes of each letter of the opcode maps, by operand size and address size.
WIDTHS = {
    (operand, address): {"b": (1,), "w": (2,), "z": (operand,), "p": (operand, 2), "o": (address,)}
    for operand in (2, 4)
    for address in (2, 4)
}

# Base and index of 16-bit addressing by ModRM.rm (SDM 2A table 2-1).
BASES16: tuple[tuple[int, int | None], ...] = (
    *((EBX, ESI), (EBX, EDI), (EBP, ESI), (EBP, EDI)),
    *((ESI, None), (EDI, None), (EBP, None), (EBX, None)),
)

# Capstone's spelling, where it is not the manual's.
SPELLING = {
    "LJMP": "JMP",
    "LCALL": "CALL",
    "RETF": "RET",
    "INT1": "ICEBP",
    **{f"{name}{suffix}": name for name in ("PUSHF", "POPF", "IRET") for suffix in ("D", "Q")},
    **{name: name[:-1] for name in ("INSB", "INSD", "INSW", "OUTSB", "OUTSD", "OUTSW")},
}

# Capstone accepts them; the processor raises #UD (SWAPGS is for 64-bit code; 0FA6, 0FA7 are one vendor's own).
REFUSED = frozenset(["8E/1", "0FA6", "0FA7", "0F01F8"])

# Capstone does not know them, or not in every form, or not their ModRM byte; the processor does.
ACCEPTED = {
    "0F0D": "PREFETCHW",
    "0FB9": "UD1",
    "0FFF": "UD0",
    **{f"0F{opcode:02X}": "NOP" for opcode in range(0x19, 0x20)},
    **{f"0F18/{reg}": "NOP" for reg in range(8)},
}

# Register forms that Capstone does not know and every processor has, by opcode and ModRM & 0xF8.
ALIASES = {
    0xDCD0: "FCOM",
    0xDCD8: "FCOMP",
    0xDDC8: "FXCH",
    0xDED0: "FCOMP",
    0xDFC8: "FXCH",
    0xDFD0: "FSTP",
    0xDFD8: "FSTP",
    0x0FAEE8: "LFENCE",
    0x0FAEF0: "MFENCE",
    0x0FAEF8: "SFENCE",
}

# Where F2 and F3 select another instruction; elsewhere, but before string instructions, they mean nothing.
MANDATORY_PREFIX = frozenset(
    (
        *(0x0F01, 0x0F09, 0x0FAE, 0x0FB8, 0x0FC7, *range(0x0F10, 0x0F18), *range(0x0F28, 0x0F30)),
        *(*range(0x0F50, 0x0F80), *range(0x0FC2, 0x0FC7), *range(0x0FD0, 0x0FFF)),
    )
)

# Where a prefix makes another instruction of the opcode, with another class, the key says so: EXTRQ and INSERTQ
# are not VMREAD and VMWRITE; CLRSSBSY is not XSAVEOPT.
PREFIXED_KEYS = frozenset(["66.0F78", "66.0F79", "F2.0F78", "F2.0F79", "F3.0FAE/6"])
