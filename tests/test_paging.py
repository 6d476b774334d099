"""The guest's own paging on the bare machine, against the engine's own MMU as oracle.

The machine walks the guest's tables itself and fills the TLB with what it finds. A plain Unicorn, whose MMU is
its own, runs the same code on the same tables: the access succeeds on both or faults on both, with the same
error code and CR2, and the accessed and dirty bits are the same afterwards.

One difference is left out: where a walk fails at the second level, the oracle has already set the accessed bit
of the first. The manual lets a processor set it for any entry that it used; ours sets none unless all succeed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from unicorn import UC_ARCH_X86, UC_HOOK_INTR, UC_MODE_32, UC_PROT_ALL, Uc, UcError
from unicorn import x86_const as X

from tests.machines import (
    DATA,
    GDT,
    IDT,
    INNER_STACKS,
    KERNEL_CODE,
    KERNEL_DATA,
    MEMORY,
    PAGES,
    PAGING_ON,
    STACK,
    TABLE_LIMIT,
    USER_STACK,
    assemble,
    enable_paging,
    gate,
    handler,
    lab,
    run,
    tables,
)
from vmm.isa.vectors import Vector
from vmm.isa.words import CR0, CR4, PTE
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.verify import context_bytes

MANY = settings(deadline=None, max_examples=250, suppress_health_check=list(HealthCheck))
TABLE = PAGES + 0x3000  # the table of the four megabytes under test
REGION = 0x400000  # linear, directory entry 1
DONE = b"\xcd\x40"  # INT 0x40


@dataclass(frozen=True)
class Access:
    """One access under some tables: `entry` is the directory's, `table` the first pages'."""

    kind: str  # read, write, fetch
    user: bool
    offset: int  # from REGION
    entry: int
    table: tuple[int, int]
    write_protect: bool
    large_pages: bool

    @property
    def code(self) -> str:
        access = {
            "read": f"mov eax, [{REGION + self.offset:#x}]",
            "write": f"mov [{REGION + self.offset:#x}], eax",
            "fetch": f"mov ebx, {REGION + self.offset:#x}\n jmp ebx",
        }[self.kind]
        cr0 = 0x80000011 | (CR0.WP if self.write_protect else 0)
        return f"""
        mov eax, {CR4.PSE if self.large_pages else 0}
        mov cr4, eax
        mov eax, {PAGES:#x}
        mov cr3, eax
        mov eax, {cr0:#x}
        mov cr0, eax
        {"to_user" if self.user else ""}
        mov eax, 0x44332211
here:   {access}
        int 0x40
"""

    @property
    def memory(self) -> list[tuple[int, bytes]]:
        second = b"".join(struct.pack("<I", entry) for entry in (*self.table, *([0] * 1022)))
        return [
            *enable_paging(directory={1: self.entry}),
            (TABLE, second),
            # What a fetch finds, in each page that an entry may name: INT3 anywhere.
            *((frame, b"\xcc" * 4096) for frame in FRAMES),
        ]


FRAMES = (0x140000, 0x150000)  # of pages
LARGE = (0, 0x1000000)  # frames of large pages: all of RAM, or none of it


def _entry(bits: int, frame: int) -> int:
    return frame | bits


_BITS = st.integers(0, 0x7F).map(lambda bits: bits & ~0x18)  # P, RW, US, A, D; no cache control
_PAGE = st.builds(
    _entry, st.one_of(_BITS, st.sampled_from((3, 5, 7))), st.sampled_from((*FRAMES, 0xA0000, 0x40000000))
)
_DIRECTORY = st.one_of(
    st.builds(_entry, st.one_of(_BITS, st.just(7)), st.just(TABLE)),
    st.builds(lambda bits, frame: bits | PTE.PS | frame, _BITS, st.sampled_from((*LARGE, TABLE))),
)
ACCESSES = st.builds(
    Access,
    st.sampled_from(("read", "write", "fetch")),
    st.booleans(),
    st.sampled_from((0, 0x10, 0xFFC, 0xFFE, 0xFFF, 0x1000)),
    _DIRECTORY,
    st.tuples(_PAGE, _PAGE),
    st.booleans(),
    st.booleans(),
)


@dataclass
class Result:
    """What an access came to. `vector` is 0x40 if it succeeded, 3 for a fetch."""

    vector: int
    error: int | None
    cr2: int | None
    eax: int
    entry: int
    table: tuple[int, int]
    data: tuple[bytes, ...]


def on_the_oracle(access: Access) -> Result:
    """The same on plain Unicorn, up to its first exception."""
    assembly = assemble(access.code)
    uc = Uc(UC_ARCH_X86, UC_MODE_32)
    uc.ctl_set_cpu_model(X.UC_CPU_X86_EPYC)
    uc.mem_map(0, MEMORY, UC_PROT_ALL)
    for address, data in (*tables(), (assembly.origin, assembly.data), *access.memory):
        uc.mem_write(address, data)
    uc.reg_write(X.UC_X86_REG_GDTR, (0, GDT, TABLE_LIMIT, 0))
    uc.reg_write(X.UC_X86_REG_CS, KERNEL_CODE)
    for register in (X.UC_X86_REG_SS, X.UC_X86_REG_DS, X.UC_X86_REG_ES):
        uc.reg_write(register, KERNEL_DATA)
    uc.reg_write(X.UC_X86_REG_ESP, STACK)
    seen: list[tuple[int, int, int]] = []

    def on_interrupt(uc: Uc, vector: int, _: object) -> None:
        error = int.from_bytes(context_bytes(uc)[at.HEADER + at.ERROR_CODE :][:4], "little")
        seen.append((vector, error, uc.reg_read(X.UC_X86_REG_CR2)))
        uc.emu_stop()

    uc.hook_add(UC_HOOK_INTR, on_interrupt)
    uc.ctl_exits_enabled(True)
    uc.ctl_set_exits([])
    uc.emu_start(assembly.entry, 0)
    vector, error, cr2 = seen[0]
    fault = vector == Vector.PF
    return Result(
        vector,
        error if fault else None,
        cr2 if fault else None,
        uc.reg_read(X.UC_X86_REG_EAX),
        int.from_bytes(uc.mem_read(PAGES + 4, 4), "little"),
        struct.unpack("<2I", uc.mem_read(TABLE, 8)),
        tuple(bytes(uc.mem_read(frame, 4096)) for frame in FRAMES),
    )


def on_the_machine(access: Access) -> Result:
    made = run(access.code, memory=access.memory, limit=60)
    assert made.vector is not None
    fault = made.vector == Vector.PF
    if fault:
        eip = made.stack(2)[1]
        assert eip == (REGION + access.offset if access.kind == "fetch" else made.symbol("here"))
    return Result(
        made.vector,
        made.stack(1)[0] if fault else None,
        made.reg("cr2") if fault else None,
        made.reg("eax"),
        made.read(PAGES + 4),
        (made.read(TABLE), made.read(TABLE + 4)),
        tuple(made.data(frame, 4096) for frame in FRAMES),
    )


def _reaches_ram(access: Access) -> bool:
    """The oracle has no memory where the PC has none, and fails there in its own way."""
    frames = [entry & 0xFFFFF000 for entry in access.table]
    if access.entry & PTE.PS and access.large_pages:
        return not access.entry & 0xFFFFF000  # and no bits that mean another thing to a processor with PSE-36
    return access.entry & 0xFFFFF000 == TABLE and all(frame in FRAMES for frame in frames)


@MANY
@given(ACCESSES.filter(_reaches_ram))
@example(Access("write", True, 0xFFE, TABLE | 7, (FRAMES[0] | 7, FRAMES[1] | 5), False, False))
@example(Access("write", False, 0x10, TABLE | 7, (FRAMES[0] | 5, 0x150007), True, False))
@example(Access("write", False, 0x10, TABLE | 5, (FRAMES[0] | 7, 0x150007), True, False))
@example(Access("write", False, 0x10, TABLE | 5, (FRAMES[0] | 5, 0x150007), False, False))
@example(Access("read", True, 0x10, TABLE | 3, (FRAMES[0] | 7, 0x150007), False, False))
@example(Access("fetch", True, 0xFFE, TABLE | 7, (FRAMES[0] | 5, 0x150003), False, False))
@example(Access("write", True, 0x10, 0x87, (FRAMES[0] | 5, 0x150003), False, True))
@example(Access("write", False, 0x10, 0x85, (FRAMES[0] | 5, 0x150003), True, True))
def test_an_access_is_what_the_oracles_mmu_makes_of_it(access: Access) -> None:
    """Success or #PF, error code, CR2, data, and the accessed and dirty bits are the oracle's."""
    ours, theirs = on_the_machine(access), on_the_oracle(access)
    if ours.vector == Vector.PF:
        ours.entry |= PTE.A
        theirs.entry |= PTE.A
    assert ours == theirs


@MANY
@given(ACCESSES)
def test_an_access_is_what_the_manual_says(access: Access) -> None:
    """The same against the manual's rules written down once more, memory that is not there included."""
    large = access.entry & PTE.PS and access.large_pages
    where = access.entry & 0xFFFFF000  # a table, or what is read as one: zeroes, or nothing, which is ones
    table = {TABLE: access.table, 0: (0, 0)}.get(where, (0xFFFFFFFF, 0xFFFFFFFF))
    pages = [(access.offset + i) >> 12 for i in range(4 if access.kind != "fetch" else 1)]
    expected = None
    for page in dict.fromkeys(pages):
        entries = (access.entry,) if large else (access.entry, table[page])
        present = all(entry & PTE.P for entry in entries)
        user = all(entry & PTE.US for entry in entries)
        writable = all(entry & PTE.RW for entry in entries)
        write = access.kind == "write"
        reserved = bool(large and access.entry & 0x3FE000)
        refused = access.user and not user or write and not writable and (access.user or access.write_protect)
        if not present or reserved or refused:
            code = write << 1 | access.user << 2 | (1 if present else 0) | (8 if present and reserved else 0)
            expected = code, max(REGION + access.offset, REGION + page * 0x1000)
            break
    result = on_the_machine(access)
    if expected is None:
        # Zeroes are executed until something else comes; ones are no instruction.
        fetched = (Vector.BP, Vector.UD, Vector.PF, Vector.GP)
        assert result.vector in (fetched if access.kind == "fetch" else (0x40,))
    else:
        assert (result.vector, result.error, result.cr2) == (Vector.PF, *expected)


# The TLB


def test_a_stale_translation_may_be_used_until_it_is_flushed() -> None:
    """After a change of the tables the old page may still be seen; after INVLPG, or a load of CR3, never."""
    spot, entry = 0x180000, PAGES + 0x1000 + 0x180 * 4
    for flush in (
        f"invlpg [{spot:#x}]",
        "mov ecx, cr3\n mov cr3, ecx",
        "mov ecx, cr0\n xor ecx, 0x10000\n mov cr0, ecx",
    ):
        made = run(
            f"{PAGING_ON} mov eax, [{spot:#x}]\n mov dword [{entry:#x}], {DATA + 0x1000 | 7}\n mov ebx, [{spot:#x}]\n"
            f" {flush}\n mov edx, [{spot:#x}]\n int 0x40",
            memory=[*enable_paging({spot: DATA | 7}), (DATA, b"\x11\0\0\0"), (DATA + 0x1000, b"\x22\0\0\0")],
            limit=60,
        )
        assert made.vector == 0x40
        assert (made.reg("eax"), made.reg("edx")) == (0x11, 0x22)
        assert made.reg("ebx") in (0x11, 0x22)


def test_invlpg_takes_rights_away_at_once() -> None:
    """A page made read-only and flushed faults at the next store, in a process that has just written it."""
    entry = PAGES + 0x1000 + (DATA >> 12) * 4
    protect = struct.pack("<II", entry, DATA | 5)
    made = run(
        f"{PAGING_ON} to_user\n mov [DATA], eax\n int 0x41\nhere:   mov [DATA], eax",
        memory=[
            *enable_paging(),
            (handler(0x41), b"\xc7\x05" + protect + b"\x0f\x01\x3d" + struct.pack("<I", DATA) + b"\xcf"),
        ],
        limit=60,
    )
    assert made.vector == Vector.PF
    assert made.stack(2) == [7, made.symbol("here")]


def test_the_same_page_is_another_for_the_kernel() -> None:
    """A supervisor's page that the kernel has just used faults in a process, and the other way round works."""
    pages = enable_paging({DATA: DATA | 3})
    made = run(
        f"{PAGING_ON} mov eax, [DATA]\n mov [DATA], eax\n to_user\nhere:   mov eax, [DATA]",
        memory=pages,
        limit=60,
    )
    assert made.vector == Vector.PF
    assert made.stack(2) == [5, made.symbol("here")]
    assert made.reg("cr2") == DATA


def test_turning_paging_off_and_on_again() -> None:
    """With CR0.PG clear addresses are physical; set again the tables are in force as before."""
    spot = 0x180000
    made = run(
        f"""
        {PAGING_ON}
        mov ebx, [{spot:#x}]
        mov eax, cr0
        and eax, 0x7FFFFFFF
        mov cr0, eax
        mov ecx, [{spot:#x}]
        or eax, 0x80000000
        mov cr0, eax
        mov edx, [{spot:#x}]
        int 0x40
        """,
        memory=[*enable_paging({spot: DATA | 7}), (DATA, b"\x11\0\0\0"), (spot, b"\x33\0\0\0")],
        limit=60,
    )
    assert [made.reg(name) for name in ("ebx", "ecx", "edx")] == [0x11, 0x33, 0x11]


def test_code_whose_page_has_been_taken_away_is_still_counted() -> None:
    """Code that runs by a stale translation counts instruction by instruction, as after any other fetch."""
    entry = PAGES + 0x1000 + (DATA >> 12) * 4
    code = b"\x43" * 20 + b"\xc3"
    made = lab(
        f"{PAGING_ON} mov eax, DATA\n call eax\n mov dword [{entry:#x}], 0\nhere:   call eax\n int 0x40",
        memory=[*enable_paging(), (DATA, code)],
    )
    made.run_to("here")
    before = made.retired
    made.run(before + 1 + 7)
    if made.vector is None:  # the translation is still there, as a TLB may keep it
        assert (made.machine.state.eip, made.reg("ebx")) == (DATA + 7, 27)
    assert made.retired == before + 8


# Fetches


@pytest.mark.parametrize("before", range(16))
def test_a_missing_page_of_code_faults_only_when_it_is_reached(before: int) -> None:
    """A block that runs up to a missing page executes its instructions first; leaving before the border, all is well.

    EIP and CR2 are those of the instruction that really needs the page.
    """
    border = DATA + 0x1000
    nops = b"\x43" * before
    straight = nops  # falls over the border
    made = run(
        f"{PAGING_ON} mov eax, {border - before:#x}\n jmp eax",
        memory=[*enable_paging({border: 0}), (border - before, straight)],
        limit=60,
    )
    assert (made.vector, made.stack(2), made.reg("cr2")) == (Vector.PF, [0, border], border)
    assert made.reg("ebx") == before
    if before >= 3:
        leaves = b"\x43" * (before - 2) + DONE
        made = run(
            f"{PAGING_ON} mov eax, {border - before:#x}\n jmp eax",
            memory=[*enable_paging({border: 0}), (border - before, leaves)],
            limit=60,
        )
        assert (made.vector, made.reg("ebx")) == (0x40, before - 2)


@pytest.mark.parametrize("cut", range(1, 5))
def test_an_instruction_across_the_border_needs_both_pages(cut: int) -> None:
    """MOV EAX, imm32 cut by a missing page faults with EIP at it and CR2 at the missing page; mapped, it runs."""
    border = DATA + 0x1000
    code = b"\x43\xb8\x44\x33\x22\x11" + DONE
    start = border - cut - 1
    mapping = (
        b"\x83\xc4\x04\xc7\x05"
        + struct.pack("<II", PAGES + 0x1000 + (border >> 12) * 4, border | 7)
        + b"\xcf"
    )
    for handlers, vector in (([], Vector.PF), ([(handler(14), mapping)], 0x40)):
        made = run(
            f"{PAGING_ON} mov eax, {start:#x}\n jmp eax",
            memory=[*enable_paging({border: 0}), (start, code), *handlers],
            limit=60,
        )
        assert (made.vector, made.reg("cr2")) == (vector, border)
        if vector == Vector.PF:
            assert made.stack(2) == [0, start + 1]
        else:
            assert (made.reg("eax"), made.reg("ebx")) == (0x11223344, 1)


def test_a_branch_back_from_the_border_never_reaches_it() -> None:
    """A loop whose last instruction ends right before a missing page runs without a fault."""
    border = DATA + 0x1000
    code = bytes.fromhex("43 81fbe8030000 75f7")  # again: inc ebx; cmp ebx, 1000; jne again
    made = run(
        f"{PAGING_ON} mov eax, {border - len(code):#x}\n jmp eax",
        memory=[*enable_paging({border: 0}), (border - len(code), code)],
        limit=6000,
    )
    assert (made.vector, made.reg("ebx"), made.stack(2)) == (Vector.PF, 1000, [0, border])


# The processor's own accesses

_SEGMENT_USERS = {
    "MOV to a segment register": "mov ecx, USER_DATA\n mov es, ecx",
    "POP of a segment register": "push dword USER_DATA\n pop fs",
    "LES": "les eax, [pointer]",
    "LAR": "mov ecx, USER_CODE\n lar eax, ecx",
    "LSL": "mov ecx, USER_DATA\n lsl eax, ecx",
    "VERR": "mov ecx, USER_DATA\n verr cx",
    "a far jump": "jmp USER_CODE:next\nnext:   nop",
    "a far call and return": "call USER_CODE:next\n jmp over\nnext:   retf\nover:   nop",
    "a far jump through memory": "jmp far [target]\nnext:   nop",
    "IRET to itself": "pushfd\n push dword USER_CODE\n push dword next\n iretd\nnext:   nop",
    "INT n": "int 0x41",
}


@pytest.mark.parametrize("name", _SEGMENT_USERS)
def test_a_process_may_use_descriptors_that_it_may_not_read(name: str) -> None:
    """With the GDT, IDT, TSS and the inner stack in supervisor pages, a process's segment loads and traps work."""
    hidden = (GDT, IDT, 0x4000, INNER_STACKS[0] - 0x1000)
    pages = enable_paging({page & ~0xFFF: page & ~0xFFF | 3 for page in hidden})
    made = run(
        f"{PAGING_ON} to_user\n {_SEGMENT_USERS[name]}\n int 0x40\n"
        "pointer: dd 5\n dw USER_DATA\ntarget: dd next\n dw USER_CODE"
        + ("" if "next:" in _SEGMENT_USERS[name] else "\nnext:"),
        memory=[*pages, (handler(0x41), b"\xcf")],
        limit=80,
    )
    assert made.vector == 0x40


@pytest.mark.parametrize(
    "kind", ("mov eax, [{}]", "mov [{}], eax", "les eax, [{}]", "push dword [{}]", "verr [{}]")
)
def test_a_process_may_not_read_them(kind: str) -> None:
    """A process's own access to the same pages faults, also by an instruction that loads a segment register."""
    pages = enable_paging({GDT: GDT | 3})
    made = run(f"{PAGING_ON} to_user\nhere:   {kind.format(hex(GDT + 0x20))}", memory=pages, limit=80)
    assert made.vector == Vector.PF
    assert made.stack(2) == [7 if kind.startswith("mov [") else 5, made.symbol("here")]


def test_using_them_does_not_open_them() -> None:
    """After a process has loaded a segment from a supervisor's page, its own read of that page still faults."""
    pages = enable_paging({GDT: GDT | 3})
    made = run(
        f"{PAGING_ON} to_user\n mov ecx, USER_DATA\n mov es, ecx\n lar eax, ecx\nhere:   mov eax, [GDT + 8]",
        memory=pages,
        limit=80,
    )
    assert made.vector == Vector.PF
    assert made.stack(2) == [5, made.symbol("here")]


def test_a_descriptor_in_a_missing_page_faults_as_the_supervisors() -> None:
    """A segment load whose descriptor lies in an absent page is #PF at the load, CR2 at the descriptor."""
    far_table = 0x180000
    descriptors = run("hlt").data(GDT, TABLE_LIMIT + 1)
    made = run(
        f"lgdt [pointer]\n {PAGING_ON}\n mov ecx, 0x1010\nhere:   mov es, ecx\n"
        f"pointer: dw 0x1FFF\n dd {far_table:#x}",
        memory=[*enable_paging({far_table + 0x1000: 0}), (far_table, descriptors)],
        limit=60,
    )
    assert made.vector == Vector.PF
    assert made.stack(2)[1] == made.symbol("here")
    assert made.reg("cr2") & ~7 == far_table + 0x1010


def test_delivery_writes_through_write_protected_pages_only_without_wp() -> None:
    """With CR0.WP clear the frame goes onto a read-only stack; with it set that is a page fault."""
    stack_page = STACK - 0x1000
    pages = enable_paging({stack_page: stack_page | 1})
    made = run(f"{PAGING_ON} int 0x41", memory=pages, limit=40)
    assert made.vector == 0x41
    on_other_stack = {14: gate(handler(14))}
    made = run(
        f"{PAGING_ON} or eax, 0x10000\n mov cr0, eax\n to_user\n int 0x41",
        memory=[*enable_paging({INNER_STACKS[0] - 0x1000: INNER_STACKS[0] - 0x1000 | 1})],
        idt={**on_other_stack, 14: gate(handler(14), selector=0x1B)},
        limit=60,
    )
    assert made.vector == Vector.PF
    assert made.stack(1) == [3]
    assert made.reg("esp") < USER_STACK


def test_dirty_and_accessed_bits_are_set_by_the_processors_own_accesses() -> None:
    """Delivery marks the pages of IDT and GDT accessed, and the stack's page dirty."""
    made = run(f"{PAGING_ON} int 0x41", memory=enable_paging(), limit=40)
    bits = {
        page: made.read(PAGES + 0x1000 + (page >> 12) * 4) & (PTE.A | PTE.D) for page in (GDT, IDT, STACK - 1)
    }
    assert bits[GDT] & PTE.A
    assert bits[IDT] == PTE.A
    assert bits[STACK - 1] == PTE.A | PTE.D


def test_an_engine_error_is_never_the_guests_answer() -> None:
    """Page tables outside RAM read as ones: present, and pointing to where nothing is."""
    made = lab(
        f"mov eax, {MEMORY:#x}\n mov cr3, eax\n mov eax, cr0\n or eax, 0x80000000\n mov cr0, eax\n hlt"
    )
    try:
        assert made.run(200).kind in ("budget", "triple-fault")
    except UcError as error:
        pytest.fail(f"the engine's own error came out: {error}")
