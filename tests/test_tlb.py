"""Code that changes: whatever writes it, from wherever, the new code is what runs; and pages settle.

A page is handed to the CPU for data or for code, and an access of the other kind turns it over. So every kind
of store is tried on code that has just run, in the page of the store itself and in another, again and again.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings

from tests.machines import CODE, DATA, PAGES, PAGING_ON, Lab, enable_paging, lab, run
from tests.programs import Program, programs
from vmm.machine.cpu import exported
from vmm.machine.machine import Machine
from vmm.machine.tlb import CODE as IS_CODE
from vmm.machine.tlb import DATA as IS_DATA
from vmm.machine.tlb import MIXED

MODE = pytest.mark.parametrize("mode", ("native", "trap"))
ROUNDS = 8

# How ECX gets into the double word at F + 1: stores of every kind. EDI, ESI, ESP may be used; ESP is restored.
STORES = {
    "MOV": "mov [f + 1], ecx",
    "MOV, piece by piece": "mov [f + 1], cl\n mov eax, ecx\n shr eax, 8\n mov [f + 2], ax\n mov [f + 1], ecx",
    "MOV across its own end": "mov [f + 1], cx\n mov eax, ecx\n shr eax, 16\n mov [f + 3], ax",
    "XCHG": "mov eax, ecx\n xchg eax, [f + 1]",
    "ADD": "mov eax, ecx\n sub eax, [f + 1]\n add [f + 1], eax",
    "LOCK ADD": "mov eax, ecx\n sub eax, [f + 1]\n lock add [f + 1], eax",
    "CMPXCHG": "mov eax, [f + 1]\n cmpxchg [f + 1], ecx",
    "INC": "mov dword [f + 1], 0\n mov eax, ecx\n dec eax\n mov [f + 1], eax\n inc dword [f + 1]",
    "STOS": "mov edi, f + 1\n mov eax, ecx\n stosd",
    "MOVS": "mov [DATA], ecx\n mov esi, DATA\n mov edi, f + 1\n movsd",
    "REP STOS": "mov edi, f + 1\n mov eax, ecx\n push ecx\n mov ecx, 1\n rep stosd\n pop ecx",
    "REP MOVS": "mov [DATA], ecx\n mov esi, DATA\n mov edi, f + 1\n push ecx\n mov ecx, 4\n rep movsb\n pop ecx",
    "REP MOVS, downwards": (
        "mov [DATA], ecx\n mov esi, DATA + 3\n mov edi, f + 4\n push ecx\n mov ecx, 4\n"
        " std\n rep movsb\n cld\n pop ecx"
    ),
    "PUSH": "mov ebp, esp\n mov esp, f + 5\n push ecx\n mov esp, ebp",
    "PUSH of memory": "mov [DATA], ecx\n mov ebp, esp\n mov esp, f + 5\n push dword [DATA]\n mov esp, ebp",
    "POP": "push ecx\n pop dword [f + 1]",
    "PUSHAD": "mov esi, 0xC3\n mov edi, ecx\n mov ebp, esp\n mov esp, f + 33\n pushad\n mov esp, ebp",
    "ENTER": "mov esi, esp\n mov ebp, ecx\n mov esp, f + 5\n enter 0, 0\n mov esp, esi",
    "MOV of a segment register": "mov [f + 1], ecx\n mov fs, ebx\n mov [f + 1], fs\n mov [f + 1], cx",
    "SETcc": "mov [f + 1], ecx\n cmp ecx, ecx\n setz [f + 4]",
    "BTS and BTR": "mov [f + 1], ecx\n bts dword [f + 1], 31\n btr dword [f + 1], 31",
    "SHL": "mov eax, ecx\n shl eax, 1\n mov [f + 1], eax\n shr dword [f + 1], 1",
    "FISTP": "mov [DATA], ecx\n fild dword [DATA]\n fistp dword [f + 1]",
    "MOVD": "movd mm0, ecx\n movd [f + 1], mm0\n emms",
    "CMPXCHG8B": (
        "mov eax, [f + 1]\n mov edx, [f + 5]\n mov ebx, ecx\n push ecx\n mov ecx, edx\n"
        " cmpxchg8b [f + 1]\n pop ecx\n xor ebx, ebx"
    ),
    "INS": "mov edx, 0xE9\n mov edi, f + 1\n insb\n mov [f + 1], ecx",
}
PLACES = {
    "the same page": "",
    "another page": "align 4096",
    "across two pages": "align 4096\n times 4093 nop",
}


def _program(store: str, place: str) -> str:
    """Store a new value into `f`'s immediate and call it, `ROUNDS` times; results at DATA + 0x100."""
    return f"""
        mov ecx, 0x01020300
        mov ebx, 0
again:  inc ecx
        {store}
        call f
        mov edx, ecx
        and edx, 0xFF
        mov [DATA + 0x100 + edx * 4], eax
        cmp dl, {ROUNDS}
        jne again
        hlt
        {place}
f:      mov eax, 0
        ret
        times 64 nop
"""


@MODE
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("store", STORES)
def test_what_has_just_been_stored_is_what_runs(store: str, place: str, mode: str) -> None:
    """Every kind of store changes code that has run before, wherever that code lies, every time."""
    made = lab(_program(STORES[store], PLACES[place]), mode)
    assert made.run().detail == "halted with interrupts off"
    got = [made.read(DATA + 0x100 + 4 * n) for n in range(1, ROUNDS + 1)]
    assert got == [0x01020300 + n for n in range(1, ROUNDS + 1)]


@MODE
@pytest.mark.parametrize("distance", (0, 1, 5, 40))
def test_an_instruction_ahead_in_the_same_block_is_the_new_one(distance: int, mode: str) -> None:
    """A store into an instruction that lies ahead in the block being executed is seen by that very pass."""
    nops = "\n".join(["nop"] * distance)
    made = run(
        f"xor ecx, ecx\nagain:  inc ecx\n mov [there + 1], cl\n {nops}\nthere:  mov al, 0\n"
        " cmp al, cl\n jne wrong\n cmp ecx, 20\n jne again\n mov ebx, 1\nwrong:  hlt",
        mode,
    )
    assert (made.reg("ebx"), made.reg("ecx")) == (1, 20)


@MODE
def test_an_instruction_that_changes_itself(mode: str) -> None:
    """A store by an instruction into its own bytes changes the next time that it runs, not this one."""
    made = run(
        "mov eax, 0x00100000\n jmp there\nthere:  mov byte [there + 6], 0x55\n"
        " mov bl, [there + 6]\n mov byte [there + 6], 0x66\n mov bh, [there + 6]\n hlt",
        mode,
    )
    assert made.reg("ebx") & 0xFFFF == 0x6655


def test_a_linear_alias_changes_the_same_code() -> None:
    """Code stored through one linear address runs new at another address of the same page, in both directions."""
    function = DATA  # physical
    alias, other = 0x180000, 0x190000
    pages = enable_paging({alias: function | 7, other: function | 7})
    made = run(
        f"""
        {PAGING_ON}
        mov esi, {alias:#x}
        mov edi, {other:#x}
        mov ecx, 1
again:  mov [esi + 1], ecx
        call edi
        mov [DATA + 0x3000 + ecx * 4], eax
        inc ecx
        mov [edi + 1], ecx
        call esi
        mov [DATA + 0x3000 + ecx * 4], eax
        inc ecx
        mov [{function + 1:#x}], ecx
        call esi
        mov [DATA + 0x3000 + ecx * 4], eax
        inc ecx
        cmp ecx, 30
        jb again
        hlt
        """,
        memory=[*pages, (function, b"\xb8\0\0\0\0\xc3")],
    )
    assert [made.read(DATA + 0x3000 + 4 * n) for n in range(1, 30)] == list(range(1, 30))


def test_a_page_mapped_elsewhere_runs_what_lies_there() -> None:
    """After a change of the tables and INVLPG, or a load of CR3, the code of the new page runs at the address."""
    spot = 0x180000
    for flush in (f"invlpg [{spot:#x}]", "mov eax, cr3\n mov cr3, eax"):
        made = run(
            f"""
            {PAGING_ON}
            mov esi, {spot:#x}
            call esi
            mov ebx, eax
            mov dword [{PAGES + 0x1000 + (spot >> 12) * 4:#x}], {DATA + 0x1000 | 7:#x}
            {flush}
            call esi
            mov ecx, eax
            mov dword [{PAGES + 0x1000 + (spot >> 12) * 4:#x}], {DATA | 7:#x}
            {flush}
            call esi
            hlt
            """,
            memory=[
                *enable_paging({spot: DATA | 7}),
                (DATA, b"\xb8\x01\0\0\0\xc3"),
                (DATA + 0x1000, b"\xb8\x02\0\0\0\xc3"),
            ],
        )
        assert [made.reg(name) for name in ("ebx", "ecx", "eax")] == [1, 2, 1]


# Settling


def _kind(machine: Machine, address: int) -> int:
    return machine.frames.kinds[address >> 12]


@MODE
def test_a_page_of_data_that_is_executed_becomes_code_and_back(mode: str) -> None:
    """Data, executed, is code and no longer writable without notice; written, it is data again."""
    made = lab(
        "mov dword [DATA], 0xC3\n mov eax, DATA\n call eax\none:    nop\n mov [DATA + 0x80], eax\ntwo:    nop",
        mode,
    )
    made.run_to("one")
    assert _kind(made.machine, DATA) == IS_CODE
    made.run_to("two")
    assert _kind(made.machine, DATA) == IS_DATA
    assert _kind(made.machine, CODE) == IS_CODE


@MODE
@pytest.mark.parametrize("rounds", (50, 1000))
def test_a_page_that_is_written_and_executed_in_turn_settles(rounds: int, mode: str) -> None:
    """A page under alternating use is turned over a few times at most, then serves both, and is still right."""
    made = lab(
        f"mov edx, DATA\n mov byte [edx + 5], 0xC3\n mov ecx, {rounds}\n"
        "again:  mov byte [edx], 0xB8\n mov [edx + 1], ecx\n call edx\n"
        " cmp eax, ecx\n jne wrong\n dec ecx\n jnz again\nwrong:  hlt",
        mode,
    )
    made.run(100_000)
    assert made.reg("ecx") == 0
    assert _kind(made.machine, DATA) == MIXED
    assert made.machine.frames.turned <= 8


@MODE
def test_code_that_keeps_its_variables_beside_it_settles(mode: str) -> None:
    """A program with data in the page of its own code turns that page over once."""
    made = lab("mov ecx, 1000\nagain:  inc dword [count]\n dec ecx\n jnz again\n hlt\ncount:  dd 0", mode)
    made.run()
    assert made.read(made.symbol("count")) == 1000
    assert made.machine.frames.turned <= 2


@MODE
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(program=programs())
def test_every_page_that_changed_is_known(mode: str, program: Program) -> None:
    """`touched` names every page of RAM that differs from when the machine was made."""
    made: Lab = program.lab(mode)
    before = made.memory
    made.run(1500)
    after = made.memory
    changed = {at for at in range(0, len(before), 4096) if before[at : at + 4096] != after[at : at + 4096]}
    assert changed <= made.machine.frames.touched


@MODE
def test_stores_in_a_row_cost_no_exit(mode: str) -> None:
    """A loop that only stores asks for its page once: the TLB is filled by us, and filled once."""
    made = lab(
        "mov ecx, 5000\nagain:  mov [DATA], ecx\n mov [DATA + 0x1000], ecx\n dec ecx\n jnz again\n hlt", mode
    )
    fills = []
    fill = made.control.fill

    def counted(address: int, access: int) -> tuple[int, int] | None:
        fills.append(address)
        return fill(address, access)

    made.control.fill = counted  # type: ignore[method-assign]
    made.run(100_000)
    assert made.read(DATA) == 1
    assert len(fills) < 20


def test_the_hosts_write_to_a_page_of_code_is_noticed_once_it_is_code() -> None:
    """The host's store into code drops what was translated from these bytes, and no other code."""
    made = lab(f"mov edx, DATA\nagain:  call edx\n add ebx, eax\n call {DATA + 0x100}\n jmp again", memory=[
        (DATA, b"\xb8\x01\0\0\0\xc3"), (DATA + 0x100, b"\xb9\x07\0\0\0\xc3")])  # fmt: skip
    made.run(20)
    made.machine.memory.write(DATA + 1, 4, 5)
    before = made.reg("ebx")
    made.run(20 + 14)
    assert made.reg("ebx") - before in (10, 6)
    assert made.reg("ecx") == 7
    assert struct.unpack("<I", made.data(DATA + 1, 4)) == (5,)


@pytest.mark.parametrize("exports", (True, False))
@pytest.mark.parametrize("store", ("MOV", "REP MOVS", "PUSHAD"))
def test_code_is_dropped_the_long_way_where_the_library_exports_less(
    store: str, exports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the library's own functions or by its interface alone, what has just been stored is what runs."""
    if not exports:
        monkeypatch.setattr(exported, "_drop", None)
        monkeypatch.setattr(exported, "flush_page", None)
    made = lab(_program(STORES[store], PLACES["another page"]), "bt")
    assert bool(made.machine.engine._dropper._known) == exports
    made.run()
    assert made.read(DATA + 0x100 + 4 * ROUNDS) == 0x01020300 + ROUNDS


@pytest.mark.parametrize("exports", (True, False))
def test_a_page_that_is_invalidated_is_asked_for_again(exports: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flush_page` forgets that page; the others stay known, where the library can do that."""
    if not exports:
        monkeypatch.setattr(exported, "flush_page", None)
    made = lab("again:  mov eax, [DATA]\n mov eax, [DATA + 0x1000]\n out 0xE9, al\n jmp again")
    engine, control = made.machine.engine, made.control
    asked: list[int] = []
    fill, write = control.fill, made.machine.bus.write

    def counted(address: int, access: int) -> tuple[int, int] | None:
        asked.append(address)
        return fill(address, access)

    def flushing(port: int, size: int, value: int) -> None:
        write(port, size, value)
        asked.clear()
        engine.flush_page(DATA + 0x234)

    made.machine.fill = counted
    made.machine.bus.write = flushing  # type: ignore[method-assign]
    made.run(4 * 8)
    made.machine.bus.write = write  # type: ignore[method-assign]
    made.run(4 * 8 + 3)
    assert DATA in asked
    assert (DATA + 0x1000 in asked) == (not exports)
