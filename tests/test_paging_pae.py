"""PAE's page walk, against the engine's own MMU as oracle and against the manual written down once more.

Only the walk is ours here: the guests of `native` are shown a processor without PAE. A plain Unicorn runs one access
on the same tables: it succeeds or faults in both, with the same error code, and leaves the same entries.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from unicorn import UC_ARCH_X86, UC_HOOK_INTR, UC_MODE_32, UC_PROT_ALL, Uc
from unicorn import x86_const as X

from tests.machines import GDT, KERNEL_CODE, KERNEL_DATA, STACK, TABLE_LIMIT, assemble, tables
from vmm.isa.vectors import Vector
from vmm.isa.words import CR0, CR4, PaeEntry
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.engine import Engine
from vmm.machine.cpu.verify import context_bytes
from vmm.machine.memory import ONES, Memory
from vmm.machine.paging import PageFault, Translation, walk
from vmm.machine.processor import Linear

MANY = settings(deadline=None, max_examples=250, suppress_health_check=list(HealthCheck))
SIZE = 4 << 20
P, RW, US, A, D, PS, NX = (
    PaeEntry.P, PaeEntry.RW, PaeEntry.US, PaeEntry.A, PaeEntry.D, PaeEntry.PS, PaeEntry.NX
)  # fmt: skip
TOP, DIRECTORY, LOW_TABLE, TABLE, UPPER = 0x120000, 0x121000, 0x122000, 0x123000, 0x124000
REGION = 0x4000_0000  # linear: the second gigabyte, which has a directory of its own
FRAMES = (0x140000, 0x150000)


@dataclass(frozen=True)
class Access:
    """One access: `pointer`, `upper` and `entry` are the three entries on its way."""

    kind: str  # read, write, fetch
    user: bool
    pointer: int
    upper: int
    entry: int
    write_protect: bool
    nxe: bool

    @property
    def cr0(self) -> int:
        return CR0.PG | CR0.PE | CR0.ET | (CR0.WP if self.write_protect else 0)

    @property
    def code(self) -> str:
        access = {
            "read": f"mov eax, [{REGION:#x}]",
            "write": f"mov [{REGION:#x}], eax",
            "fetch": f"mov ebx, {REGION:#x}\n jmp ebx",
        }[self.kind]
        return f"""
        mov eax, {CR4.PAE:#x}
        mov cr4, eax
        mov ecx, 0xC0000080
        mov eax, {0x800 if self.nxe else 0:#x}
        xor edx, edx
        wrmsr
        mov eax, {TOP:#x}
        mov cr3, eax
        mov eax, {self.cr0:#x}
        mov cr0, eax
        {"to_user" if self.user else ""}
        mov eax, 0x44332211
        {access}
        int 0x40
"""

    @property
    def memory(self) -> list[tuple[int, bytes]]:
        low = b"".join(struct.pack("<Q", n << 12 | P | RW | US) for n in range(512))
        return [
            (TOP, struct.pack("<4Q", DIRECTORY | P, self.pointer, 0, 0)),
            (DIRECTORY, struct.pack("<Q", LOW_TABLE | P | RW | US)),
            (LOW_TABLE, low),
            (UPPER, struct.pack("<Q", self.upper)),
            (TABLE, struct.pack("<Q", self.entry)),
            *((frame, b"\xcc" * 4096) for frame in FRAMES),
        ]


@dataclass
class Result:
    """The error code of #PF or None, and the entries afterwards."""

    error: int | None
    entries: tuple[int, int, int]


def on_the_oracle(access: Access) -> Result:
    assembly = assemble(access.code)
    uc = Uc(UC_ARCH_X86, UC_MODE_32)
    uc.ctl_set_cpu_model(X.UC_CPU_X86_EPYC)
    uc.mem_map(0, SIZE, UC_PROT_ALL)
    for address, data in (*tables(), (assembly.origin, assembly.data), *access.memory):
        uc.mem_write(address, data)
    uc.reg_write(X.UC_X86_REG_GDTR, (0, GDT, TABLE_LIMIT, 0))
    uc.reg_write(X.UC_X86_REG_CS, KERNEL_CODE)
    for register in (X.UC_X86_REG_SS, X.UC_X86_REG_DS, X.UC_X86_REG_ES):
        uc.reg_write(register, KERNEL_DATA)
    uc.reg_write(X.UC_X86_REG_ESP, STACK)
    seen: list[tuple[bool, int]] = []

    def on_interrupt(uc: Uc, vector: int, _: object) -> None:
        # What is fetched may be a page of zeroes, which is executed, and faults elsewhere.
        fault = vector == Vector.PF and uc.reg_read(X.UC_X86_REG_CR2) == REGION
        seen.append((fault, int.from_bytes(context_bytes(uc)[at.HEADER + at.ERROR_CODE :][:4], "little")))
        uc.emu_stop()

    uc.hook_add(UC_HOOK_INTR, on_interrupt)
    uc.ctl_exits_enabled(True)
    uc.ctl_set_exits([])
    uc.emu_start(assembly.entry, 0)
    fault, error = seen[0]
    entries = [struct.unpack("<Q", uc.mem_read(address, 8))[0] for address in (TOP + 8, UPPER, TABLE)]
    return Result(error if fault else None, (entries[0], entries[1], entries[2]))


def in_memory(access: Access) -> Memory:
    memory = Memory(SIZE)
    for address, data in access.memory:
        memory.load(address, data)
    return memory


def ours(access: Access, memory: Memory) -> Translation:
    return walk(
        memory, access.cr0, TOP, CR4.PAE, 0xFFFFFFFF, REGION,
        write=access.kind == "write", user=access.user, fetch=access.kind == "fetch", no_execute=access.nxe,
    )  # fmt: skip


def on_ours(access: Access) -> Result:
    memory, error = in_memory(access), None
    try:
        ours(access, memory)
    except PageFault as fault:
        assert fault.address == REGION
        error = fault.code
    return Result(error, (memory.quads[TOP + 8 >> 3], memory.quads[UPPER >> 3], memory.quads[TABLE >> 3]))


def _entry(bits: int, frame: int, high: int) -> int:
    return bits | frame | high


_BITS = st.one_of(
    st.integers(0, 0x7F).map(lambda bits: bits & ~0x18), st.sampled_from((P, P | RW, P | RW | US))
)
_HIGH = st.sampled_from((0, 0, 0, NX, NX, 1 << 52, 1 << 62))
ACCESSES = st.builds(
    Access,
    st.sampled_from(("read", "write", "fetch")),
    st.booleans(),
    st.builds(
        _entry, st.sampled_from((P, P, P, P, 0)), st.just(UPPER), st.sampled_from((0, 0, 0, 0, NX, 1 << 52))
    ),
    st.one_of(
        st.builds(_entry, _BITS, st.just(TABLE), _HIGH),
        st.builds(_entry, _BITS.map(lambda bits: bits | PS), st.sampled_from((0, 0x2000, 0x100000)), _HIGH),
    ),
    st.builds(_entry, _BITS, st.sampled_from(FRAMES), _HIGH),
    st.booleans(),
    st.booleans(),
)
ALL = P | RW | US


@MANY
@given(ACCESSES)
@example(Access("fetch", True, UPPER | P, TABLE | ALL, FRAMES[0] | ALL | NX, True, True))
@example(Access("fetch", False, UPPER | P, TABLE | ALL | NX, FRAMES[0] | ALL, True, True))
@example(Access("read", True, UPPER | P, TABLE | ALL | NX, FRAMES[0] | ALL | NX, True, True))
@example(Access("read", True, UPPER | P, TABLE | ALL, FRAMES[0] | ALL | NX, True, False))
@example(Access("write", False, UPPER | P, TABLE | ALL, FRAMES[0] | P | US, False, True))
@example(Access("write", False, UPPER | P, TABLE | ALL, FRAMES[0] | P | US, True, True))
@example(Access("write", True, UPPER | P, 0x2000 | ALL | PS, 0, True, True))
@example(Access("fetch", True, UPPER | P, ALL | PS | NX, 0, True, True))
def test_a_walk_is_what_the_oracles_mmu_makes_of_it(access: Access) -> None:
    """Success or #PF, the error code, and the accessed and dirty bits are the oracle's."""
    mine, theirs = on_ours(access), on_the_oracle(access)
    if mine.error is not None:  # the oracle marks the directory's entry before it fails at the table's
        first, second, third = mine.entries
        mine.entries = first, second | A, third
        first, second, third = theirs.entries
        theirs.entries = first, second | A, third
    assert mine == theirs


@MANY
@given(ACCESSES)
def test_a_walk_is_what_the_manual_says(access: Access) -> None:
    """The same against the rules of SDM 4.4, 4.6 and 4.7, with the page that the access reaches."""
    memory = in_memory(access)
    large = access.upper & PS
    levels = [access.upper] if large else [access.upper, access.entry]
    wrong = 0x7FF << 52 | (0 if access.nxe else NX)
    code = 2 * (access.kind == "write") | 4 * access.user | 16 * (access.kind == "fetch" and access.nxe)
    expected: int | None = None
    if not access.pointer & P:
        expected = code
    elif access.pointer & (wrong | NX):
        expected = code | 9
    else:
        for number, level in enumerate(levels):
            if not level & P:
                expected = code
            elif level & wrong or large and not number and level & 0x1FE000:
                expected = code | 9
            if expected is not None:
                break
        else:
            user, writable = (all(level & bit for level in levels) for bit in (US, RW))
            forbidden = access.kind == "fetch" and any(level & NX for level in levels)
            may_write = writable or not access.user and not access.write_protect
            if access.user and not user or access.kind == "write" and not may_write or forbidden:
                expected = code | 1
    if expected is not None:
        with pytest.raises(PageFault) as caught:
            ours(access, memory)
        assert caught.value.code == expected
        assert memory.quads[TABLE >> 3] == access.entry, "a walk that fails marks nothing"
        return
    found = ours(access, memory)
    assert found.frame == (levels[-1] & 0xFFFFFE00000 if large else access.entry & 0xFFFFFF000)
    assert found.executable == (not any(level & NX for level in levels))
    marked = memory.quads[(UPPER if large else TABLE) >> 3]
    assert marked == levels[-1] | A | (D if access.kind == "write" else 0)
    assert found.writable == bool(may_write and marked & D)


@pytest.mark.parametrize("frame", (0x40_0000, 0xA_0000, 0x1_2345_6000, 0xF_FFFF_F000))
def test_a_page_beyond_memory_reads_as_ones_and_takes_no_store(frame: int) -> None:
    """An entry may name any 36-bit address; where no RAM is, none of the machine's is reached."""
    access = Access("read", False, UPPER | P, TABLE | ALL, frame | ALL, True, True)
    memory = in_memory(access)
    found = ours(access, memory)
    assert found.frame == (frame if frame < 1 << 32 else ONES)
    assert not memory.is_ram(found.frame)


@pytest.mark.parametrize("level", ("pointer", "upper"))
def test_a_table_beyond_memory_is_ones(level: str) -> None:
    """Where a table is not in memory its entries have reserved bits set: #PF that says so."""
    nowhere = 0x1_0000_0000 | P
    pointer, upper = (nowhere, TABLE | ALL) if level == "pointer" else (UPPER | P, nowhere)
    access = Access("read", False, pointer, upper, FRAMES[0] | ALL, True, True)
    with pytest.raises(PageFault) as caught:
        ours(access, in_memory(access))
    assert caught.value.code == 9


# The cache of walks


class Registers:
    cr0 = int(CR0.PG | CR0.PE | CR0.WP)
    cr3, cr4 = TOP, int(CR4.PAE)


@dataclass(frozen=True)
class Store:
    """A change of the tables."""

    address: int
    entry: int


@dataclass(frozen=True)
class Look:
    """A translation that is asked for."""

    address: int
    kind: str
    user: bool


_STORES = st.builds(
    Store,
    st.sampled_from((TOP + 8, UPPER, TABLE, TABLE + 8)),
    st.sampled_from(
        (
            0,
            UPPER | P,
            TABLE | ALL,
            TABLE | ALL | NX,
            FRAMES[0] | ALL,
            FRAMES[1] | ALL | A | D,
            ALL | PS,
            FRAMES[0] | P,
        )
    ),
)
_LOOKS = st.builds(
    Look,
    st.sampled_from((REGION, REGION + 0x1000)),
    st.sampled_from(("read", "write", "fetch")),
    st.booleans(),
)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(_STORES, _LOOKS), max_size=30))
def test_a_walk_that_is_remembered_is_forgotten_when_an_entry_changes(steps: list[Store | Look]) -> None:
    """`Linear.translate` says at every moment what a fresh walk says, whatever was stored to the tables between."""
    memory = in_memory(Access("read", False, UPPER | P, TABLE | ALL, FRAMES[0] | ALL, True, True))
    linear = Linear(Engine().state, memory)
    linear.source, linear.no_execute = Registers(), True

    def remembered(look: Look) -> Translation:
        return linear.translate(
            look.address, write=look.kind == "write", user=look.user, fetch=look.kind == "fetch"
        )

    def fresh(look: Look) -> Translation:
        r = Registers()
        return walk(
            memory, r.cr0, r.cr3, r.cr4, 0xFFFFFFFF, look.address,
            write=look.kind == "write", user=look.user, fetch=look.kind == "fetch", no_execute=True, mark=False,
        )  # fmt: skip

    for step in steps:
        if isinstance(step, Store):
            memory.write(step.address, 8, step.entry)
            continue
        results: list[object] = []
        for translate in (remembered, fresh):
            try:
                results.append(translate(step))
            except PageFault as fault:
                results.append((fault.address, fault.code))
        assert results[0] == results[1]
    code = linear.code(REGION, 4)
    try:
        frame = linear.translate(REGION, write=False, user=False, mark=False).frame
    except PageFault:
        assert code == b""
    else:
        assert code == memory.bytes[frame : frame + 4].tobytes()
