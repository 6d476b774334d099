"""Control, Popek and Goldberg's second property: nothing that a guest does reaches the real machine.

Whatever a guest in trap mode executes, afterwards the processor is in ring 1 or 3, its tables are the monitor's,
the shadow tables hold nothing that leads to ring 0, and the guest's stores into the monitor's pages are lost.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.machines import CODE, DATA, FREE, GDT, KERNEL_CODE, KERNEL_DATA, STACK, USER_STACK, Lab, lab, run
from tests.program_atoms import Salt
from tests.programs import ATOMS, DESCRIPTORS, Program, programs
from tools.fuzz import guest
from vmm.isa.descriptors import Descriptor
from vmm.isa.vectors import Vector
from vmm.isa.words import CR0, CR4
from vmm.machine.cpu import layout as at
from vmm.machine.machine import Machine
from vmm.monitor.deprivileged import descriptors as shadow
from vmm.monitor.trap.monitor import TrapMonitor
from vmm.vm import VirtualMachine

MANY = settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
LIMIT = 2000
OWN = (shadow.LDT_SELECTOR, shadow.TSS_SELECTOR)


def entries(monitor: TrapMonitor, offset: int, size: int) -> list[tuple[int, Descriptor]]:
    """(selector, descriptor) of a shadow table as the processor sees it, empty ones left out."""
    data = monitor.shadow.image()[offset : offset + size]
    words = enumerate(struct.iter_unpack("<II", data))
    return [(8 * i, Descriptor(low, high)) for i, (low, high) in words if low or high]


def assert_contained(machine: Machine, monitor: TrapMonitor) -> None:
    """The real processor is the monitor's."""
    state, base = machine.state, monitor.shadow.base
    assert state.cpl in (1, 3)
    assert state.table(at.GDT) == (base + shadow.GDT, shadow.TABLE_SIZE - 1)
    assert state.table(at.IDT) == (base + shadow.TSS + 0x800, 0x7FF)
    assert (state.selector(at.TR), state.table(at.TR)) == (
        shadow.TSS_SELECTOR,
        (base + shadow.TSS, 0x67),
    )
    assert state.selector(at.LDT) == shadow.LDT_SELECTOR
    assert state.table(at.LDT)[0] == base + shadow.LDT
    assert state.cr0 & ~(CR0.MP | CR0.EM | CR0.TS) == CR0.PE | CR0.ET | CR0.NE
    assert state.cr3 == 0
    assert not state.cr4 & ~(CR4.TSD | CR4.OSFXSR | CR4.OSXMMEXCPT)
    assert state.word(at.EFER) == 0
    for offset, size in ((shadow.GDT, shadow.TABLE_SIZE), (shadow.LDT, shadow.TABLE_SIZE)):
        for selector, entry in entries(monitor, offset, size):
            if offset == shadow.GDT and selector in OWN:
                kind = 0x82 if selector == shadow.LDT_SELECTOR else 0x8B
                assert (entry.high >> 8 & 0xFF, entry.base) == (
                    kind,
                    base + (shadow.LDT if kind == 0x82 else shadow.TSS),
                )
            elif entry.present:
                assert not entry.is_system, f"{selector:#x}: {entry}"
                assert entry.dpl, f"{selector:#x}: {entry}"
    assert not any(monitor.shadow.image()[shadow.TSS :])
    for segment in (at.ES, at.CS, at.SS, at.DS, at.FS, at.GS):
        flags = state.segment_flags(segment)
        assert not flags & 1 << 15 or flags >> 13 & 3, "a hidden segment register of ring 0"


def contained(made: Lab) -> None:
    assert isinstance(made.control, TrapMonitor)
    assert_contained(made.machine, made.control)


# Hostile guests

_PLACES = (
    *(
        shadow.BASE + offset
        for offset in (0, 4, 8, 0xC, 0xFF8, 0x1000, shadow.LDT_SELECTOR, shadow.TSS_SELECTOR + 5)
    ),
    *(
        shadow.BASE + offset
        for offset in (shadow.LDT, shadow.LDT + 13, shadow.TSS, shadow.TSS + 4, shadow.TSS + 0x800)
    ),
    *(shadow.BASE - 2, shadow.BASE + shadow.SIZE - 2, shadow.FRAME, shadow.FRAME + 8),
)


def _hostile(salt: int) -> bytes:
    """A few bytes that try to get at the monitor."""
    s = Salt(salt)
    place = struct.pack("<I", _PLACES[s.below(len(_PLACES))])
    value = struct.pack("<I", (0, 0xFFFFFFFF, 0x0000FFFF, 0x00CF9B00, 0x00CF9300, 0x8B00)[s.below(6)])
    selector = struct.pack("<H", (0xFFF8, 0xFFF0, 0xFFF9, 0x08, 0x10, 0x09, 0x11, 0x60, 0x28)[s.below(9)])
    return (
        b"\xc7\x05" + place + value,  # mov dword [place], value
        b"\xff\x05" + place,  # inc
        b"\x0f\xba\x2d" + place + b"\x0f",  # bts
        b"\xbf" + place + b"\xb9\x04\0\0\0\xf3\xab",  # rep stosd
        b"\xbc" + place + b"\x50\x60",  # mov esp; push eax; pushad
        b"\xbc" + place + b"\x9a" + struct.pack("<I", CODE) + selector,  # mov esp; call far
        b"\xbc" + place + b"\xcd\x30",  # mov esp; int 0x30
        b"\x0f\x01\x05" + place,  # sgdt
        b"\xdd\x35" + place,  # fnsave
        b"\xba\xe9\0\0\0\xbf" + place + b"\x6c",  # insb
        b"\x66\xb8" + selector + b"\x8e" + bytes((0xC0 | s.below(6) << 3,)),  # mov segment, ax
        b"\xea" + struct.pack("<I", CODE) + selector,  # jmp far
        b"\x66\xb8" + selector + b"\x0f\x00" + (b"\xd0", b"\xd8")[s.below(2)],  # lldt, ltr
        b"\x0f\x01" + (b"\x15", b"\x1d")[s.below(2)] + place,  # lgdt, lidt
        b"\x68" + struct.pack("<I", s.below(1 << 18) & ~(1 << 8)) + b"\x9d",  # push; popfd
        b"\x68" + value + b"\x68" + selector + b"\0\0\x68" + struct.pack("<I", CODE) + b"\xcf",  # iretd
        b"\x68" + selector + b"\0\0\x68" + struct.pack("<I", CODE) + b"\xcb",  # retf
        b"\xb8" + value + b"\x0f\x22" + (b"\xc0", b"\xd8", b"\xe0")[s.below(3)],  # mov cr, eax
        b"\xb9\x80\0\0\xc0\xb8\0\x10\0\0\x0f\x30",  # wrmsr EFER
        b"\x0f\x01\xd8\x0f\x01\xd9\x0f\x01\xda",  # vmrun, vmmcall, vmload
        b"\x0f\x34\x0f\x35\x0f\x05\x0f\x07",  # sysenter, sysexit, syscall, sysret
        b"\xff\x25" + place,  # jmp [place]
        struct.pack("<Q", s.below(1 << 64)),  # anything
    )[s.below(23)]


@MANY
@given(st.lists(st.integers(0, (1 << 80) - 1), min_size=1, max_size=25), st.booleans())
def test_a_hostile_guest_stays_inside(salts: list[int], user: bool) -> None:
    """Stores, pushes, frames, table loads, far transfers and plain noise aimed at the monitor change nothing real."""
    skips = b"\x83\xc4\x04\x83\x04\x24\x03\xcf"  # add esp, 4; add dword [esp], 3; iretd
    code = b"".join(_hostile(salt) for salt in salts) + b"\xcd\x40"
    prefix = "to_user\n" if user else ""
    made = lab(
        f"{prefix} db {', '.join(map(str, code))}",
        "trap",
        memory=[(0x6000 + 16 * 13, skips), (0x6060, skips[3:])],
    )
    outcome = made.run(LIMIT)
    assert outcome.kind in ("budget", "halt", "error", "triple-fault", "exit")
    contained(made)


@MANY
@given(st.integers(0, 1 << 32))
def test_a_fuzzed_guest_stays_inside(seed: int) -> None:
    """Random system code over random tables, as the fuzzer makes it, stays inside, too."""
    vm = VirtualMachine(guest(seed), "trap", memory=4 << 20)
    vm.run(LIMIT)
    assert isinstance(vm.control, TrapMonitor)
    assert_contained(vm.machine, vm.control)


@MANY
@given(programs((*ATOMS, *DESCRIPTORS)))
def test_at_every_moment_of_an_ordinary_guest_the_machine_is_the_monitors(program: Program) -> None:
    """Not only at the end: stopped anywhere, an ordinary guest is contained."""
    made = program.lab("trap")
    for budget in range(97, LIMIT, 97):
        kind = made.run(budget).kind
        contained(made)
        if kind != "budget":
            break


# One by one


@pytest.mark.parametrize(
    "offset", (0, 8, 0xC, 0x800, shadow.LDT_SELECTOR, shadow.TSS_SELECTOR + 4, shadow.LDT, shadow.TSS)
)
def test_the_guest_may_look_but_not_touch(offset: int) -> None:
    """The monitor's pages can be read, because the ISA cannot prevent it; what is stored there is lost."""
    place = shadow.BASE + offset
    made = run(
        f"mov eax, [{place:#x}]\n mov dword [{place:#x}], 0x5A5A5A5A\n mov ebx, [{place:#x}]\n int 0x40",
        "trap",
        limit=20,
    )
    assert made.vector == 0x40
    assert isinstance(made.control, TrapMonitor)
    (shown,) = struct.unpack_from("<I", made.control.shadow.image(), offset)
    assert (made.reg("eax"), made.reg("ebx")) == (shown, shown)
    contained(made)


def test_natively_there_is_nothing() -> None:
    """The same addresses on the bare machine are empty: the monitor takes nothing from the guest that it had."""
    made = run(
        f"mov eax, [{shadow.BASE:#x}]\n mov dword [{shadow.BASE:#x}], 5\n mov ebx, [{shadow.BASE:#x}]\n hlt"
    )
    assert (made.reg("eax"), made.reg("ebx")) == (0xFFFFFFFF, 0xFFFFFFFF)


@pytest.mark.parametrize("selector", OWN)
@pytest.mark.parametrize("mode", ("native", "trap"))
@pytest.mark.parametrize(
    "code", ("mov ds, eax", "lldt ax", "ltr ax", "push eax\n push dword 0\nat2:    retf")
)
def test_the_monitors_own_selectors_do_not_exist_for_the_guest(code: str, mode: str, selector: int) -> None:
    """A load of the monitor's TSS or LDT selector faults as what it is to the guest: past its table's limit."""
    made = run(f"mov eax, {selector}\n {code}", mode, limit=20)
    assert made.vector == Vector.GP
    assert made.stack(1) == [selector]


def test_the_shadow_tables_are_the_guests_with_less_privilege() -> None:
    """Each of the guest's segments is in the copy, ring 0's moved to ring 1; gates and TSSs are not present."""
    made = run("hlt", "trap")
    assert isinstance(made.control, TrapMonitor)
    guests = made.data(GDT, 0x100)
    for selector, entry in entries(made.control, shadow.GDT, 0x100):
        theirs = Descriptor(*struct.unpack_from("<II", guests, selector))
        if theirs.is_system:
            assert not entry.present
        else:
            assert entry == (theirs if theirs.dpl else theirs.with_dpl(1))
    assert not any(made.control.shadow.image()[0x100 : shadow.LDT_SELECTOR])


def test_a_stale_copy_has_nothing_present() -> None:
    """Between a store into the guest's table and the next load no descriptor of the copy can be loaded."""
    made = lab(
        f"mov dword [{GDT + FREE:#x}], 5\nhere:   nop\n mov eax, {KERNEL_DATA}\n mov es, eax\nthen:   nop",
        "trap",
    )
    made.run_to("here")
    assert isinstance(made.control, TrapMonitor)
    assert not made.control.shadow.good
    assert not any(
        entry.present for selector, entry in entries(made.control, shadow.GDT, 0x10000) if selector not in OWN
    )
    made.run_to("then")
    assert made.control.shadow.good
    contained(made)


@pytest.mark.parametrize(
    "stack", (shadow.BASE + 0x800, shadow.BASE + 0x1008, shadow.BASE + shadow.LDT + 0x10)
)
@pytest.mark.parametrize(
    "code", (f"call {KERNEL_CODE}:next\nnext:", "call next\nnext:", "pushad", "push es", "int 0x41")
)
def test_a_stack_in_the_monitors_pages_is_no_way_in(code: str, stack: int) -> None:
    """Pushes of every kind onto the shadow tables are lost, and the run goes on and ends within its budget."""
    made = lab(f"mov esp, {stack:#x}\n {code}\n mov ebx, 7\n mov esp, {STACK}\n int 0x40", "trap")
    made.run(100)
    if code != "int 0x41":
        assert (made.vector, made.reg("ebx")) == (0x40, 7)
    else:
        assert made.vector == 0x41
    contained(made)


def test_a_process_stays_in_ring_3_and_the_kernel_in_ring_1() -> None:
    """The real rings at each instruction of a system call and back."""
    made = lab(
        f"to_user\n mov ecx, {USER_STACK}\n int 0x41\n mov [DATA], ecx\n int 0x40",
        "trap",
        memory=[(0x6410, b"\x90\xcf")],
    )
    rings = []
    while made.vector != 0x40:
        rings.append(made.machine.state.cpl)
        made.run(made.retired + 1)
    changes = [ring for i, ring in enumerate(rings) if i == 0 or rings[i - 1] != ring]
    assert changes == [1, 3, 1, 3]
    assert made.read(DATA) == USER_STACK
