"""The translation cache: of what is in it, when it is made anew, how large it gets, and who can reach it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.machines import (
    CODE,
    DATA,
    PAGES,
    PAGING_ON,
    Lab,
    assemble,
    enable_paging,
    gate,
    lab,
)
from vmm.machine import sites
from vmm.machine.cpu.stub import BEGINS, LOOK
from vmm.monitor.translator import layout
from vmm.monitor.translator.monitor import TranslatingMonitor
from vmm.monitor.translator.units import Unit

TOP = 0xFFC00000  # where the slot is as long as the guest has nothing there
TURNS = 12  # retranslations after which a page of mixed use has to have settled


def translator(made: Lab) -> TranslatingMonitor:
    assert isinstance(made.control, TranslatingMonitor)
    return made.control


def both(source: str, budget: int, **options: object) -> Lab:
    """Run on the bare machine and by translation, which must come to the same; the latter."""
    native, other = lab(source, "native", **options), lab(source, "bt", **options)  # type: ignore[arg-type]
    kinds = native.run(budget).kind, other.run(budget).kind
    assert kinds[0] == kinds[1]
    assert other.everything() == native.everything()
    return other


VERIFIED = """
        sgdt [esp - 8]
        mov ebx, [esp - 6]
        mov ecx, 6
again:  xor byte [ebx + USER_DATA / 8 * 8 + 5], %(bit)s
        mov esi, selectors
next:   lodsd
        verw ax
        pushfd
        pop edx
        verr ax
        pushfd
        pop edi
        shl edi, 8
        xor edx, edi
        rol dword [DATA], 3
        add [DATA], edx
        verw [esi - 4]
        adc dword [DATA + 4], eax
        cmp esi, selectors_end
        jb next
        dec ecx
        jnz again
over:   jmp over
        align 4
selectors: dd USER_DATA, USER_DATA - 3, KERNEL_DATA, KERNEL_DATA + 1, KERNEL_DATA + 2
        dd KERNEL_CODE, USER_CODE, 0, 0xFFF8
selectors_end:
"""


@pytest.mark.parametrize("bit", (2, 8, 0x10, 0x60, 0x80), ids=("writable", "code", "system", "DPL", "present"))
def test_verw_looks_at_the_descriptor_as_the_guest_has_just_made_it(bit: int) -> None:
    """The answer of VERR and VERW in the cache is the guest's tables', and not that of a copy from before."""
    made = both(VERIFIED % {"bit": bit}, 2_000)
    assert made.machine.exits.rows["call-out VERW"].count < 6 * 9 * 2


SITES = """
        mov ecx, 3
again:  dec ecx
        pushfd
        popfd
        mov eax, cr0
        mov dr0, eax
        push ecx
        mov ecx, 0x174
        rdmsr
        pop ecx
        loopne again
        call there
        hlt
there:  ret
"""


def test_the_marks_of_a_unit_say_what_the_monitor_does() -> None:
    """The machine code that counts and searches new blocks by marks comes to what Python would: at every byte of
    the cache the guest's instructions that begin there, and every instruction that the machine executes itself."""
    made = lab(SITES, "bt")
    control = translator(made)
    begun: list[int] = []
    found: set[int] = set()

    def look(unit: Unit) -> None:
        for offset in range(unit.origin, unit.origin + unit.size):
            address = control.slot + layout.CODE + offset
            assert bool(control.cache.marks[offset] & BEGINS) == control.started(address, 1)
            begun.append(offset)
        code = control.cache.view[layout.CODE + unit.origin : layout.CODE + unit.origin + unit.size].tobytes()
        wanted = set(sites.find(code, unit.origin))
        assert {at for at in begun if control.cache.marks[at] & LOOK} >= wanted
        found.update(wanted)

    control.observers.append(look)
    made.run(1000)
    assert len(begun) > 50 and len(found) >= 3


# Code that changes, in many ways. Each ends in a loop at `over`, and counts in DATA.
CHANGING: dict[str, str] = {
    "an immediate, by its own page": """
        mov ecx, 500
again:  inc dword [patched + 1]
patched: mov eax, 5
        add [DATA], eax
        dec ecx
        jnz again
""",
    "the next instruction": """
        mov ecx, 500
again:  xor byte [patched], 8           ; INC EAX and DEC EAX
patched: inc eax
        rol eax, 3
        dec ecx
        jnz again
        mov [DATA], eax
""",
    "a routine on another page, called between": """
        mov ecx, 300
again:  mov edx, ecx
        and edx, 7
        mov [0x150001], edx
        mov eax, 0x150000
        call eax
        add [DATA], eax
        dec ecx
        jnz again
        jmp over
""",
    "a routine that changes its caller": """
        mov dword [0x150000], 0x0005FF81 ; nothing of sense yet
        mov edi, 0x150000
        mov esi, routine
        mov ecx, routine_end - routine
        rep movsb
        mov ecx, 200
again:  mov eax, 0x150000
        call eax
patched: add dword [DATA], 1
        dec ecx
        jnz again
        jmp over
routine: inc byte [patched + 6]
        ret
routine_end:
""",
    "data beside code": """
        mov ecx, 3000
again:  inc dword [beside]
        call near_by
        dec ecx
        jnz again
        jmp over
near_by: add dword [DATA], 3
        ret
beside: dd 0
""",
    "its stack beside its code": """
        mov esp, small_stack
        mov ecx, 1000
again:  push ecx
        call near_by
        pop eax
        dec ecx
        jnz again
        jmp over
        times 64 db 0
small_stack:
near_by: add [DATA], ecx
        ret
""",
    "an instruction over the edge of a page": """
        mov ecx, 200
again:  mov [0x151000], cl              ; the upper bytes of the immediate of MOV EAX, imm32 at 0x150FFE
        mov eax, 0x150FFE
        call eax
        add [DATA], eax
        mov [0x150FFF], cl
        mov eax, 0x150FFE
        call eax
        add [DATA], eax
        dec ecx
        jnz again
""",
    "code that is moved up by REP MOVS over itself": """
        mov ecx, 40
again:  push ecx
        lea esi, [0x150000]
        lea edi, [0x150001]
        mov ecx, 16
        std
        add esi, 15
        add edi, 15
        rep movsb
        cld
        mov byte [0x150000], 0x40
        mov eax, 0x150000
        call eax
        add [DATA], eax
        pop ecx
        dec ecx
        jnz again
""",
    "atomically": """
        mov ecx, 300
again:  mov eax, 0x5B8
        mov edx, ecx
        shl edx, 8
        mov dl, 0xB8
        lock xchg [0x150000], edx
        lock xadd [0x150004], eax
        mov word [0x150004], 0xC300
        mov eax, 0x150000
        call eax
        add [DATA], eax
        dec ecx
        jnz again
""",
}
OTHER = [
    (0x150000, b"\xb8\x01\x00\x00\x00\xc3"),
    (0x150010, b"\xc3" * 64),
    (0x150FFE, b"\xb8\x01\x02\x03\x04\xc3"),
]


@pytest.mark.parametrize("name", CHANGING)
def test_code_that_changes_runs_as_bare(name: str) -> None:
    """Whoever stores into code, the next execution is of what is there then; and a page of mixed use settles."""
    made = both(CHANGING[name] + "\nover: jmp over\n", 60_000, memory=OTHER)
    statistics = translator(made).cache.statistics
    assert statistics.dropped <= 60 or statistics.units < 1200, statistics
    hidden = sum(translator(made).hidden_faults.values())
    assert hidden < 3000


def test_data_beside_code_costs_a_bounded_number_of_translations() -> None:
    """A thousand stores to the page of the code that makes them: it settles after a few turns."""
    counts = []
    for rounds in (100, 1000):
        made = lab(CHANGING["data beside code"].replace("3000", str(rounds)) + "\nover: jmp over\n", "bt")
        made.run(20_000)
        counts.append(translator(made).cache.statistics.units)
    assert counts[0] == counts[1] < 10 * TURNS


def test_code_at_two_linear_addresses_is_one_code() -> None:
    """A frame mapped twice: a store through one address changes what runs at the other, and at both."""
    alias = 0x1C0000
    source = f"""
{PAGING_ON}
        mov ecx, 300
again:  mov eax, 0x150000
        call eax
        add [DATA], eax
        mov eax, {alias:#x}
        call eax
        add [DATA], eax
        mov [{alias:#x} + 1], ecx
        mov eax, 0x150000
        call eax
        add [DATA + 4], eax
        dec ecx
        jnz again
over:   jmp over
"""
    both(source, 20_000, memory=[*enable_paging({alias: 0x150007}), *OTHER])


def test_a_page_of_code_that_is_mapped_elsewhere_runs_what_is_there_now() -> None:
    """A table entry changes between two frames with different code, with and without INVLPG; CR3 is loaded again."""
    where, entry = 0x1C0000, PAGES + 0x1000 + (0x1C0000 >> 12) * 4
    flushes = {"invlpg": f"invlpg [{where:#x}]", "mov cr3": "mov eax, cr3\n mov cr3, eax"}
    for flush in flushes.values():
        source = f"""
{PAGING_ON}
        mov ecx, 200
again:  xor dword [{entry:#x}], 0x150000 ^ 0x160000
        {flush}
        mov eax, {where:#x}
        call eax
        add [DATA], eax
        rol dword [DATA], 1
        dec ecx
        jnz again
over:   jmp over
"""
        memory = [*enable_paging({where: 0x150007}), *OTHER, (0x160000, b"\xb8\x77\x00\x00\x00\xc3")]
        both(source, 20_000, memory=memory)


def test_code_over_two_pages_of_which_one_is_mapped_elsewhere() -> None:
    """An instruction whose second half comes from another frame is another instruction."""
    where, entry = 0x1C0000, PAGES + 0x1000 + (0x1C1000 >> 12) * 4
    source = f"""
{PAGING_ON}
        mov ecx, 200
again:  xor dword [{entry:#x}], 0x151000 ^ 0x161000
        invlpg [{where + 0x1000:#x}]
        mov eax, {where + 0xFFE:#x}
        call eax
        add [DATA], eax
        dec ecx
        jnz again
over:   jmp over
"""
    memory = [
        *enable_paging({where: 0x150007, where + 0x1000: 0x151007}),
        *OTHER,
        (0x161000, b"\x09\x09\x09\xc3"),
    ]
    both(source, 20_000, memory=memory)


def test_code_that_a_device_writes_is_executed() -> None:
    """REP INSB from the RTC's data port over a routine that has run: what it read is what runs."""
    source = """
        mov ebx, 50
again:  mov eax, 0x150000
        call eax
        add [DATA], eax
        mov al, 0x0F                    ; a byte of CMOS memory that keeps what is stored
        out 0x70, al
        mov eax, ebx
        out 0x71, al
        mov al, 0x0F
        out 0x70, al
        mov edi, 0x150001
        mov ecx, 3
        mov edx, 0x71
        rep insb
        dec ebx
        jnz again
over:   jmp over
"""
    both(source, 10_000, memory=OTHER)


# Nothing is made twice without cause


def test_a_plain_guest_is_translated_once() -> None:
    """Loops, calls, interrupts and system calls, and not one unit a second time."""
    source = """
        mov ecx, 300
again:  push ecx
        call routine
        int 0x30
        pushfd
        popfd
        mov eax, routine
        call eax
        pop ecx
        dec ecx
        jnz again
over:   jmp over
on_30:  iretd
routine: ret
"""
    made = both(source, 20_000, idt={0x30: gate(assemble(source).symbols["on_30"])})
    statistics = translator(made).cache.statistics
    assert (statistics.again, statistics.dropped, statistics.flushes) == (0, 0, 0)


@pytest.mark.parametrize("accessed", (0, 0x20))
def test_switches_between_address_spaces_that_map_the_kernel_alike_drop_nothing(accessed: int) -> None:
    """Two directories, entries of their own besides the kernel's: a thousand loads of CR3, and no unit made anew.

    But where a directory's accessed bit is clear, the next fetch has to set it: once, what runs there is made anew.
    """
    second = 0x160000
    source = f"""
{PAGING_ON}
        mov ecx, 500
again:  mov eax, {second:#x}
        mov cr3, eax
        inc dword [DATA]
        mov eax, {PAGES:#x}
        mov cr3, eax
        call routine
        dec ecx
        jnz again
over:   jmp over
routine: ret
"""
    tables = enable_paging({CODE: CODE | 0x47 | accessed}, directory={0: PAGES + 0x1007 | accessed})
    directory = bytearray(tables[0][1][:0x1000])
    directory[4 * 5 : 4 * 5 + 4] = (0x170007).to_bytes(4, "little")
    made = both(source, 20_000, memory=[*tables, (second, bytes(directory))])
    statistics = translator(made).cache.statistics
    assert statistics.flushes == 0
    if accessed:
        assert (statistics.again, statistics.dropped) == (0, 0)
    else:
        assert statistics.again <= 2 and statistics.dropped <= 4


# Its bounds

LARGE = 16 << 20


def straight(size: int) -> bytes:
    """Code without a branch but at its end: RET. Units of it are as large as their source, and more."""
    body = bytes.fromhex(
        "81c078563412 90 050a000000 40 9c 9d".replace(" ", "")
    )  # ADD, NOP, ADD, INC, PUSHF, POPF
    return body * (size // len(body)) + b"\xc3"


def test_more_code_than_fits_runs_as_bare() -> None:
    """A way through more code than the cache holds: it is flushed, is never larger, and all is right."""
    code = straight(layout.CODE_SIZE // 4)
    source = """
        mov ebx, 1
again:  mov ecx, 0x400000
        call ecx
        add [DATA], eax
        dec ebx
        jnz again
        mov dword [DATA + 4], 1
over:   jmp over
"""
    made = both(source, 2_000_000, memory=[(0x400000, code)], size=LARGE)
    cache = translator(made).cache
    assert made.read(DATA + 4) == 1
    assert cache.statistics.flushes >= 1
    assert cache.cursor <= layout.CODE_SIZE
    assert len(cache.units) < layout.CODE_SIZE // 8


# Who can reach it


@pytest.mark.parametrize("paging", (False, True))
def test_a_kernel_that_looks_at_the_cache_sees_its_own_memory(paging: bool) -> None:
    """Loads and stores at the code's addresses find what the guest has there: nothing, or a page fault."""
    address = TOP + layout.CODE
    source = f"""
{PAGING_ON if paging else ""}
        mov eax, [{address:#x}]
        mov [{address:#x}], esp
        mov ebx, [{address + 0x1234:#x}]
        mov dword [{address + 0x1FFFF0:#x}], 0xF4F4F4F4
        jmp $
"""
    made = both(source, 100, memory=enable_paging())
    assert made.vector == (14 if paging else None)


@pytest.mark.parametrize("paging", (False, True))
@pytest.mark.parametrize(
    "act", ("mov eax, [{0:#x}]", "mov [{0:#x}], eax", "mov eax, {0:#x}\n jmp eax", "lock inc dword [{0:#x}]")
)
def test_a_process_reaches_no_page_of_the_slot(act: str, paging: bool) -> None:
    """Loads, stores and jumps of ring 3 over the whole slot find what they find bare."""
    cells = (layout.DATA, layout.FLAG, layout.RISE, layout.CONSTANTS, layout.TAGS, layout.TRANSLATIONS)
    pages = (*cells, layout.LANDINGS, layout.CODE, layout.SIZE - 0x1000, 0, 0x1000, 0x10000, 0x20000)
    for page in pages:
        source = f"""
{PAGING_ON if paging else ""}
        cli
        sti
        pushfd
        to_user
        {act.format(TOP + page)}
        int 0x40
        jmp $
"""
        made = both(source, 200, memory=enable_paging())
        if paging:
            assert made.vector == 14, hex(page)


@pytest.mark.parametrize(
    "directory", ({1023: PAGES + 0x1007}, {1023: 0x87}, {1023: PAGES + 0x1007, 1022: PAGES + 0x1007})
)
def test_the_slot_moves_out_of_the_guests_way(directory: Mapping[int, int]) -> None:
    """A guest that maps the slot's addresses has its own pages there, reads, writes and executes them as bare."""
    source = f"""
{PAGING_ON}
        mov ecx, 100
again:  cli
        mov eax, {TOP:#x} + 0x150000
        mov [eax + 1], ecx
        call eax
        add [DATA], eax
        mov eax, [{TOP:#x} + {layout.DATA:#x}]
        mov [{TOP:#x} + {0x130000 + layout.FLAG:#x}], ecx
        sti
        pushfd
        pop eax
        add [DATA + 4], eax
        dec ecx
        jnz again
over:   jmp over
"""
    options = {"memory": [*enable_paging(directory=directory), *OTHER]}
    if any(entry & 0x80 for entry in directory.values()):
        source = source.replace(
            "mov eax, cr0\n", "mov eax, cr4\n or eax, 0x10\n mov cr4, eax\n mov eax, cr0\n", 1
        )
    made = both(source, 5_000, **options)
    assert translator(made).slot not in {number << 22 for number in directory}
    assert made.read(DATA + 4)
