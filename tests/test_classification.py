"""The classification table, its lookup, and its agreement with two other opinions."""

from __future__ import annotations

import capstone
import iced_x86
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.isa.classification import SEVENTEEN, TABLE
from vmm.isa.classify import Kind, annotate, classify, kind_of, row_of, rows_named, scan
from vmm.isa.decode import MAX_LENGTH, decode
from vmm.isa.row import Row, Trap
from vmm.machine.experiments import CASES

SEGMENT_PREFIXES = b"\x26\x2e\x36\x3e\x64\x65"

# One encoding of each key of each row, taken from the experiments.
ENCODINGS = [(row, case.code) for row in TABLE for case in CASES[row.name]]


@given(st.binary(max_size=20))
@settings(max_examples=1000)
def test_classify_is_total(code: bytes) -> None:
    """Any byte string gets a class, a text and a size that fits it, and never an exception."""
    classified = classify(code)
    assert isinstance(classified.kind, Kind)
    assert min(1, len(code)) <= classified.size <= min(len(code), MAX_LENGTH)
    assert bool(classified.text) == bool(code)
    assert classified.row is None or classified.kind is kind_of(classified.row)


@given(st.binary(max_size=100), st.integers(0, 0xFFFFFFFF))
@settings(max_examples=300)
def test_scan_covers_every_byte_once(code: bytes, base: int) -> None:
    """A linear sweep accounts for every byte, in order, without gaps."""
    at = base
    for address, classified in scan(code, base):
        assert address == at
        at += classified.size
    assert at == base + len(code)


def test_every_key_of_the_table_is_exercised() -> None:
    """Each row's experiments reach each of its encodings and no other row's."""
    for row in TABLE:
        reached = set()
        for case in CASES[row.name]:
            instruction = decode(case.code)
            assert instruction is not None and instruction.size == len(case.code), (row.name, case.code.hex())
            assert row_of(instruction) is row, (row.name, instruction.text)
            form = "r" if instruction.memory is None else "m"
            reached |= {key for key in row.keys if key in (instruction.key, instruction.key + form)}
        assert reached == set(row.keys), (row.name, set(row.keys) - reached)


def test_rows_are_complete_and_distinct() -> None:
    """Each row has its own name and says why, what and according to whom; sensitive is what it claims."""
    assert len({row.name for row in TABLE}) == len(TABLE)
    for row in TABLE:
        assert row.reason.endswith(".") and row.effect.endswith(".") and row.source, row.name
        assert row.critical == (row.sensitive and row.trap is Trap.NEVER), row.name
        assert not row.privileged or row.sensitive, f"{row.name}: privileged and yet harmless?"


def test_the_seventeen_are_all_there() -> None:
    """The rows credited to Robin and Irvine are their seventeen, and all are critical."""
    credited = {row.summary for row in TABLE if row.among_seventeen}
    merged = {"VERR/VERW" if name in ("VERR", "VERW") else name for name in credited}
    assert merged == set(SEVENTEEN) and len(SEVENTEEN) == 17
    assert all(row.critical for row in TABLE if row.among_seventeen)


@pytest.mark.parametrize(
    ("code", "kind", "name"),
    [
        ("9d", Kind.CRITICAL, "POPF"),
        ("669d", Kind.CRITICAL, "POPF"),
        ("8cc8", Kind.CRITICAL, "MOV from CS, SS"),
        ("8cd8", Kind.INNOCUOUS, "MOV from DS, ES, FS, GS"),
        ("8ec8", Kind.UNDEFINED, "undefined"),  # MOV CS
        ("0f22c8", Kind.UNDEFINED, "undefined"),  # MOV CR1
        ("0f2205", Kind.PRIVILEGED, "MOV CR"),  # ModRM.mod is ignored: three bytes
        ("0f0105 00000000", Kind.CRITICAL, "SGDT"),
        ("0f01c1", Kind.INNOCUOUS, "VMCALL"),  # the register form of SGDT's opcode
        ("0f0115 00000000", Kind.PRIVILEGED, "LGDT"),
        ("0f01e0", Kind.CRITICAL, "SMSW"),
        ("0f0120", Kind.CRITICAL, "SMSW"),
        ("0f01f0", Kind.PRIVILEGED, "LMSW"),
        ("ff18", Kind.CRITICAL, "CALL far"),
        ("ff10", Kind.INNOCUOUS, "innocuous"),  # CALL near
        ("ffd8", Kind.UNDEFINED, "undefined"),  # CALL far needs memory
        ("c500", Kind.CRITICAL, "LDS"),
        ("c5f877", Kind.INNOCUOUS, "innocuous"),  # VZEROUPPER: the register form of LDS's opcode
        ("6200", Kind.INNOCUOUS, "BOUND"),
        ("c3", Kind.INNOCUOUS, "innocuous"),
        ("cb", Kind.CRITICAL, "RET far"),
        ("f3f4", Kind.PRIVILEGED, "HLT"),
        ("f0f4", Kind.UNDEFINED, "undefined"),  # LOCK HLT
        ("f0ff00", Kind.INNOCUOUS, "innocuous"),  # LOCK INC [EAX]
        ("f0ffc0", Kind.UNDEFINED, "undefined"),  # LOCK INC EAX
        ("660f78c00102", Kind.INNOCUOUS, "innocuous"),  # EXTRQ, not VMREAD
        ("0f", Kind.UNDEFINED, "undefined"),
    ],
)
def test_forms_that_share_an_opcode(code: str, kind: Kind, name: str) -> None:
    """Forms of one opcode that differ in class are told apart."""
    classified = classify(bytes.fromhex(code))
    assert (classified.kind, classified.name) == (kind, name)


@given(st.sampled_from(ENCODINGS), st.lists(st.sampled_from(SEGMENT_PREFIXES), max_size=4).map(bytes))
@settings(max_examples=300)
def test_segment_prefixes_do_not_change_the_class(encoding: tuple[Row, bytes], prefixes: bytes) -> None:
    """Segment overrides in front of an instruction leave its row as it is, as far as fifteen bytes allow."""
    row, code = encoding
    if len(prefixes + code) <= MAX_LENGTH:
        classified = classify(prefixes + code)
        assert classified.row is row and classified.size == len(prefixes + code)


@given(st.sampled_from(ENCODINGS), st.sampled_from([b"\x67", b"\xf2", b"\xf3", b"\x66"]))
@settings(max_examples=300)
def test_size_and_repeat_prefixes_do_not_change_the_class(encoding: tuple[Row, bytes], prefix: bytes) -> None:
    """Address size, operand size and REP leave the row as it is, where they do not select another opcode."""
    row, code = encoding
    first = decode(code)
    assert first is not None
    if first.opcode in (0x0F01, 0x0F78, 0x0F79, 0x0FAE, 0x0FB9, 0x0FC7) or first.opcode >> 8 == 0x0F38:
        return
    classified = classify(prefix + code + bytes(4))  # a shorter operand leaves bytes over
    assert classified.row is row, (prefix.hex(), code.hex())


@given(st.sampled_from(ENCODINGS), st.integers(0, 2), st.integers(0, 7), st.binary(min_size=5, max_size=5))
@settings(max_examples=500)
def test_memory_operands_do_not_change_the_class(
    encoding: tuple[Row, bytes], mod: int, rm: int, tail: bytes
) -> None:
    """Whatever memory operand an instruction is given, its row stays."""
    row, code = encoding
    first = decode(code)
    assert first is not None
    if first.memory is None or first.modrm is None:
        return
    opcode = code[: code.index(first.modrm, len(code) - 5 - len(first.immediates))]
    classified = classify(opcode + bytes([mod << 6 | first.reg << 3 | rm]) + tail)
    assert classified.row is row, (code.hex(), classified)


@given(st.sampled_from(ENCODINGS))
def test_lock_is_undefined(encoding: tuple[Row, bytes]) -> None:
    """No instruction of the table can be locked."""
    _, code = encoding
    assert classify(b"\xf0" + code).kind is Kind.UNDEFINED


def test_names_are_found_as_people_write_them() -> None:
    """Rows are found by row name, summary or mnemonic, in any case; what is not there gives none."""
    assert [row.name for row in rows_named("popf")] == ["POPF"]
    assert [row.name for row in rows_named("PopFD")] == ["POPF"]
    assert [row.name for row in rows_named("retf")] == ["RET far"]
    assert [row.name for row in rows_named(" mov  to ss ")] == ["MOV to SS"]
    assert "MOV from CS, SS" in [row.name for row in rows_named("mov")]
    assert [row.name for row in rows_named("vmload")] == ["VMRUN"]
    assert rows_named("add") == ()


def test_annotate_marks_and_explains() -> None:
    """A listing gets a mark and an explanation at each privileged and critical instruction, none at others."""
    lines = annotate(
        [
            (0x1000, b"\x9c", "pushf"),
            (0x1001, b"\xfa\x90", "quiet:  cli_and_nop"),
            (0x1003, b"\x9d\x9d", "table:  db 0x9d, 0x9d"),
            (0x1005, b"\x9d\x9d", "times 2 db 0x9d"),
            (0x1007, b"\x0f\xff", "cut off"),
        ]
    )
    assert [(line.address, line.mark, line.source) for line in lines] == [
        (0x1000, "!", "pushf"),
        (0x1001, "*", "quiet:  cli_and_nop"),
        (0x1002, " ", ""),
        (0x1007, "?", "cut off"),
        (0x1008, "?", ""),
    ]
    assert "IOPL" in lines[0].explanation and "IOPL" in lines[1].explanation and not lines[2].explanation
    assert lines[0].as_json()["class"] == "critical"


# Other opinions

_TAIL = bytes(range(1, 12))
_OPCODES = [
    *(bytes([opcode]) for opcode in range(256) if opcode != 0x0F),
    *(b"\x0f" + bytes([opcode]) for opcode in range(256) if opcode not in (0x38, 0x3A)),
    *(bytes([0x0F, escape, opcode]) for escape in (0x38, 0x3A) for opcode in range(256)),
]
_MODRM = [*(0x05 | reg << 3 for reg in range(8)), *range(0xC0, 0x100)]
_SWEEP = [
    prefix + opcode + bytes([modrm]) + _TAIL
    for prefix in (b"", b"\x66", b"\xf3", b"\xf2")
    for opcode in _OPCODES
    for modrm in _MODRM
]

# iced-x86 calls privileged what needs CPL 0 without regard to control bits, and RSM.
ICED_ALONE = {"RSM"}
WE_ALONE_ICED = {"MONITOR", "MWAIT", "RDPMC", "RDTSC", "RDTSCP"}

# Capstone's group holds what touches privilege in any way, and misses what was added to the table by hand.
CAPSTONE_ALONE = {
    *("IRET", "MOV to DS, ES, FS, GS", "MOV to SS", "POP DS, ES, FS, GS", "POP SS", "RSM", "STR", "VMCALL"),
}
WE_ALONE_CAPSTONE = {
    *(
        "CLTS",
        "IN",
        "INS",
        "OUT",
        "OUTS",
        "MONITOR",
        "MWAIT",
        "RDMSR",
        "RDTSC",
        "VMX",
        "WBINVD",
        "XSAVES",
        "ENCLS",
    ),
}


def test_iced_agrees_on_what_is_privileged() -> None:
    """iced-x86 and the table differ on what is privileged in exactly the listed rows."""
    theirs: set[str] = set()
    ours: set[str] = set()
    for code in _SWEEP:
        other = iced_x86.Decoder(32, code).decode()
        classified = classify(code)
        if other.is_invalid or classified.kind is Kind.UNDEFINED:
            continue
        mine = classified.row is not None and classified.row.privileged
        if mine != other.is_privileged:
            (ours if mine else theirs).add(classified.name)
    assert (theirs, ours) == (ICED_ALONE, WE_ALONE_ICED)


def test_capstone_agrees_on_what_is_privileged() -> None:
    """Capstone's privileged group and the table differ in exactly the listed rows."""
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    disassembler.detail = True
    theirs: set[str] = set()
    ours: set[str] = set()
    seen: set[bytes] = set()
    for code in _SWEEP:
        classified = classify(code)
        instruction = code[: classified.size]
        if classified.kind is Kind.UNDEFINED or instruction in seen:
            continue
        seen.add(instruction)
        mine = classified.row is not None and classified.row.privileged
        for other in disassembler.disasm(instruction, 0, 1):
            if mine != (capstone.CS_GRP_PRIVILEGE in other.groups):
                (ours if mine else theirs).add(classified.name)
    assert (theirs, ours) == (CAPSTONE_ALONE, WE_ALONE_CAPSTONE)
