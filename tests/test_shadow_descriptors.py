"""Descriptor tables of a guest with paging: copied where its tables say that they lie, when it may be known."""

from __future__ import annotations

import struct

import pytest

from tests.machines import (
    DATA,
    GDT,
    IDT,
    INNER_STACKS,
    PAGES,
    PAGING_ON,
    TABLE_LIMIT,
    USER_DATA,
    Lab,
    enable_paging,
    lab,
    run,
)
from vmm.isa.descriptors import Descriptor
from vmm.isa.vectors import Vector
from vmm.isa.words import PTE
from vmm.monitor.trap.monitor import TrapMonitor

MODES = pytest.mark.parametrize("mode", ("native", "trap"))
FAR = 0x180000  # a linear page that the tests map as they like
ENTRY = PAGES + 0x1000 + (FAR >> 12) * 4
GDT_ENTRY = PAGES + 0x1000 + (GDT >> 12) * 4


def _descriptors() -> bytes:
    return run("hlt", limit=2).data(GDT, TABLE_LIMIT + 1)


def _at_far(code: str, mode: str, entry: int, *more: tuple[int, bytes], frame: int = FAR) -> Lab:
    """The GDT at `FAR`, whose page-table entry is `entry`; then `code`."""
    made = lab(
        f"lgdt [pointer]\n {PAGING_ON} {code}\n int 0x40\npointer: dw {TABLE_LIMIT}\n dd {FAR:#x}",
        mode,
        memory=[*enable_paging({FAR: entry}), (frame, _descriptors()), *more],
    )
    made.run(80)
    return made


@MODES
@pytest.mark.parametrize("load", ("mov es, ecx", "push ecx\n pop fs", "to_user"))
def test_a_load_marks_the_page_of_the_descriptor_accessed(mode: str, load: str) -> None:
    """The accessed bit of the GDT's page appears with the first load of a descriptor from it, and not before."""
    made = lab(
        f"lgdt [pointer]\n {PAGING_ON} mov ecx, {USER_DATA}\nbefore: {load}\nafter:  nop\n"
        f"pointer: dw {TABLE_LIMIT}\n dd {FAR:#x}",
        mode,
        memory=[*enable_paging({FAR: FAR | 3}), (FAR, _descriptors())],
    )
    made.run_to("before")
    assert not made.read(ENTRY) & PTE.A
    made.run_to("after")
    assert made.read(ENTRY) & PTE.A


@MODES
def test_an_accessed_bit_that_is_cleared_comes_back(mode: str) -> None:
    """A kernel that clears the accessed bit and flushes finds it set again after the next load."""
    made = _at_far(
        f"mov ecx, {USER_DATA}\n mov es, ecx\n and dword [{ENTRY:#x}], 0xFFFFFFDF\n invlpg [{FAR:#x}]\n"
        f" mov eax, [{ENTRY:#x}]\n mov fs, ecx\n mov ebx, [{ENTRY:#x}]",
        mode,
        FAR | 0x23,
    )
    assert made.vector == 0x40
    assert not made.reg("eax") & PTE.A
    assert made.reg("ebx") & PTE.A


@MODES
@pytest.mark.parametrize("absent", (0, 2))
def test_a_table_that_is_absent_faults_at_the_load(mode: str, absent: int) -> None:
    """A load from a page that is not mapped is #PF at the load, with CR2 at the descriptor and code 0."""
    made = lab(
        f"lgdt [pointer]\n {PAGING_ON} mov ecx, 0x1010\nhere:   mov es, ecx\n"
        f"pointer: dw 0x1FFF\n dd {FAR:#x}",
        mode,
        memory=[*enable_paging({FAR + 0x1000: FAR + 0x1000 & absent}), (FAR, _descriptors())],
    )
    made.run(60)
    assert made.vector == Vector.PF
    assert made.stack(2) == [0, made.symbol("here")]
    assert made.reg("cr2") & ~7 == FAR + 0x1010


@MODES
def test_a_table_that_is_mapped_in_later_is_used(mode: str) -> None:
    """A page fault handler that maps the table's page and returns: the load is done over, and succeeds."""
    mapping = b"\x83\xc4\x04\xc7\x05" + struct.pack("<II", ENTRY, FAR | 3) + b"\xcf"
    made = lab(
        f"lgdt [pointer]\n {PAGING_ON} mov ecx, {USER_DATA}\n jmp there\nthere:  mov [DATA], ecx\n lgdt [old]\n"
        f" lgdt [pointer]\n mov es, ecx\n mov eax, es\n int 0x40\n"
        f"pointer: dw {TABLE_LIMIT}\n dd {FAR:#x}\nold: dw {TABLE_LIMIT}\n dd {GDT:#x}",
        mode,
        # Delivering the fault reads the code segment's descriptor: it must be there, on the page before.
        memory=[*enable_paging({FAR: FAR | 3}), (FAR, _descriptors()), (0x6000 + 16 * 14, mapping[:16])],
    )
    made.run(80)
    assert (made.vector, made.reg("eax")) == (0x40, USER_DATA)


@MODES
@pytest.mark.parametrize("flush", ("cr3", "invlpg"))
def test_a_table_that_is_mapped_elsewhere_is_another(mode: str, flush: str) -> None:
    """After the GDT's page has been replaced and flushed, a load takes the new descriptor."""
    other = bytearray(_descriptors())
    small = Descriptor.segment(0x5000, 0x123, 0xF2, 4)
    other[0x58:0x60] = bytes(small)
    flushes = {"cr3": "mov eax, cr3\n mov cr3, eax", "invlpg": f"invlpg [{FAR:#x}]"}
    first = bytearray(_descriptors())
    first[0x58:0x60] = bytes(Descriptor.segment(0, 0xFFFFF, 0xF2, 0xC))
    made = _at_far(
        f"mov ecx, 0x5B\n mov es, ecx\n mov dword [{ENTRY:#x}], {DATA | 3}\n {flushes[flush]}\n mov fs, ecx\n"
        " mov eax, [fs:4]",
        mode,
        FAR | 3,
        (FAR, bytes(first)),
        (DATA, bytes(other)),
        (0x5004, b"\x77\x66\x55\x44"),
    )
    assert (made.vector, made.reg("eax")) == (0x40, 0x44556677)


@MODES
def test_descriptors_beside_data_cost_no_lasting_harm(mode: str) -> None:
    """A page that holds both the GDT and variables: every store and every load is right."""
    code = f"""{PAGING_ON}
        mov edi, 50
again:  mov [{GDT + 0x800:#x}], edi
        mov ecx, USER_DATA
        mov es, ecx
        mov eax, edi
        and eax, 3
        shl eax, 16
        or eax, 0xFFFF
        mov [{GDT + 0x58:#x}], eax
        mov dword [{GDT + 0x5C:#x}], 0x00CFF200
        mov ecx, 0x5B
        mov fs, ecx
        mov eax, [fs:0]
        add ebx, eax
        dec edi
        jnz again
        int 0x40"""
    bases = [(n << 16, struct.pack("<I", 3 + n)) for n in range(4) if n != 1]
    made = lab(code, mode, memory=[*enable_paging(), *bases])
    made.run(2000)
    assert made.vector == 0x40
    native = lab(code, "native", memory=[*enable_paging(), *bases])
    native.run(2000)
    assert made.reg("ebx") == native.reg("ebx")
    if isinstance(made.control, TrapMonitor):
        assert made.control.hidden_faults["store to a descriptor table"] > 50


@MODES
def test_a_process_that_returns_by_hidden_descriptors(mode: str) -> None:
    """GDT, IDT, TSS and kernel stack in supervisor pages: a process loads segments and comes back by INT."""
    hidden = (GDT, IDT, 0x4000, INNER_STACKS[0] - 0x1000)
    pages = enable_paging({page & ~0xFFF: page & ~0xFFF | 3 for page in hidden})
    made = run(
        f"{PAGING_ON} to_user\n mov ecx, USER_DATA\n mov es, ecx\n push ecx\n pop gs\n int 0x40",
        mode,
        memory=pages,
        limit=80,
    )
    assert made.vector == 0x40
    assert made.read(GDT_ENTRY) & PTE.A
