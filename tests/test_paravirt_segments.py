"""GDT and LDT of a domain with direct paging: which descriptors it may have, and how they come into force."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.paravirt_memory import (
    DATA,
    L1,
    L3,
    Board,
    op,
    read_only,
    refused,
    xens,
)
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.machine.paging import PageFault
from vmm.monitor.paravirt.abi.errors import Errno
from vmm.monitor.paravirt.abi.memory import (
    HYPERVISOR_VIRT_START,
    MmuExt,
)


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.check()


FLAT1, FLAT0 = Descriptor.segment(0, 0xFFFFF, 0xBB, 0xC), Descriptor.segment(0, 0xFFFFF, 0x9B, 0xC)
DESCRIPTORS = (
    # stored, and what becomes of it (None: refused)
    (Descriptor(0, 0), Descriptor(0, 0)),
    (FLAT1, FLAT1),
    (FLAT0, FLAT1),
    (Descriptor.segment(0, 0xFFFFF, 0xFB, 0xC), Descriptor.segment(0, 0xFFFFF, 0xFB, 0xC)),
    (Descriptor.segment(0, 0xF67FF, 0xB3, 0xC), Descriptor.segment(0, 0xFFFFF, 0xB3, 0xC)),
    (Descriptor.segment(0, 0xF57FF, 0xB3, 0xC), Descriptor.segment(0, 0xF57FF, 0xB3, 0xC)),
    (Descriptor.segment(0, 0xFFFFF, 0xBB, 0xA), None),  # 64-bit code
    (Descriptor.segment(0, 0x67, 0x89, 0), None),  # a TSS
    (Descriptor.segment(0, 0x67, 0x82, 0), None),  # an LDT
    (Descriptor.segment(0, 0x67, 0x09, 0), Descriptor.segment(0, 0x67, 0x09, 0)),  # one that is not present
    (Descriptor.gate(0x08, 0x1000, SystemType.INTERRUPT_GATE32, 3), None),
    (Descriptor.gate(0x08, 0x1000, SystemType.TASK_GATE, 3), None),
    (
        Descriptor.gate(0x08, 0x1000, SystemType.CALL_GATE32, 3),
        Descriptor.gate(0x0B, 0x1000, SystemType.CALL_GATE32, 0),
    ),
    (
        Descriptor.gate(0xE019, 0x1000, SystemType.CALL_GATE32, 1),
        Descriptor.gate(0xE019, 0x1000, SystemType.CALL_GATE32, 0),
    ),
    (Descriptor.gate(0xE008, 0x1000, SystemType.CALL_GATE32, 3), None),  # into the hypervisor
    (Descriptor(0x80000, 0xEC20), None),  # a reserved bit
)


@pytest.mark.parametrize(("stored", "becomes"), DESCRIPTORS)
def test_a_descriptor(board: Board, stored: Descriptor, becomes: Descriptor | None) -> None:
    """Ring 0 is raised to ring 1, a call gate is shut, every other system descriptor is EINVAL; by both ways."""
    read_only(board, DATA, DATA + 1)
    board.memory.load(board.mfns[DATA] << 12, bytes(stored).rjust(16, b"\0"))
    value = stored.low | stored.high << 32
    board.set_gdt([board.mfns[DATA + 1]], 512)
    if becomes is None:
        with refused(Errno.EINVAL, board):
            board.set_gdt([board.mfns[DATA]], 2)
        with refused(Errno.EINVAL, board):
            board.paging.update_descriptor(board.at(DATA + 1, 1), value)
        assert board.paging.segments.gdt_frames() == [board.mfns[DATA + 1]]
        return
    assert board.paging.update_descriptor(board.at(DATA + 1, 1), value) == 0
    assert board.memory.bytes[board.at(DATA + 1, 1) :][:8] == bytes(becomes)
    assert board.set_gdt([board.mfns[DATA]], 2) == 0
    assert board.memory.bytes[board.at(DATA, 1) :][:8] == bytes(becomes)
    at = board.paging.gdt_base + 8
    assert board.memory.bytes[board.walk(at & ~0xFFF) | at & 0xFFF :][:8] == bytes(becomes)


def test_a_gdt_that_is_refused(board: Board) -> None:
    """Too long, a writable page, a table, another's page: EINVAL, and the old GDT stays; a bad list is EFAULT."""
    read_only(board, DATA)
    board.set_gdt([board.mfns[DATA]], 100)
    for frames, entries in (
        ([board.mfns[DATA]], 7169), ([board.mfns[DATA], board.mfns[DATA + 1]], 600), ([board.mfns[L1]], 1),
        ([xens(board)], 1), ([0xFFFF_FFFF], 1),
    ):  # fmt: skip
        with refused(Errno.EINVAL, board):
            board.set_gdt(frames, entries)
    with refused(Errno.EFAULT, board):
        board.paging.set_gdt(board.guest, 0x5000_0000, 1)
    assert board.paging.segments.gdt_frames() == [board.mfns[DATA]]
    with refused(Errno.EBUSY, board):
        board.update((board.at(L1, DATA), board.entry(DATA)))
    board.set_gdt([], 0)
    assert board.update((board.at(L1, DATA), board.entry(DATA))) == 0


@pytest.mark.parametrize("off", (1, 4))
def test_a_descriptor_that_is_not_aligned(board: Board, off: int) -> None:
    """It would change two, and is EINVAL; so is one in a table, or in another's frame."""
    for address in (board.at(DATA, 1) + off, board.at(L1, 1), xens(board) << 12, 1 << 40):
        with refused(Errno.EINVAL, board):
            board.paging.update_descriptor(address, 0)
    assert board.paging.update_descriptor(board.at(DATA, 1), 0) == 0


def test_the_ldt_is_mapped_page_by_page(board: Board) -> None:
    """SET_LDT checks its arguments; a page is mapped when it is needed, in the role, and let go of with the base."""
    for base, entries in ((DATA << 12, 8193), ((DATA << 12) + 8, 1), (HYPERVISOR_VIRT_START, 1)):
        with refused(Errno.EINVAL, board):
            board.extended(op(MmuExt.SET_LDT, base, entries))
    loads = []
    board.paging.segments.on_ldt = lambda: loads.append(board.paging.ldt_entries)
    assert board.extended(op(MmuExt.SET_LDT, DATA << 12, 600)) == 0
    assert loads == [600] and not board.paging.segments.ldt_frames()
    assert not board.paging.map_ldt_page(0), "it is mapped writable"
    read_only(board, DATA, DATA + 1)
    assert board.paging.map_ldt_page(8) and board.paging.map_ldt_page(599 * 8)
    assert not board.paging.map_ldt_page(600 * 8) and not board.paging.map_ldt_page(8)
    assert board.paging.segments.ldt_frames() == [board.mfns[DATA], board.mfns[DATA + 1]]
    assert board.walk(board.paging.ldt_base + 0x1000) >> 12 == board.mfns[DATA + 1]
    board.check()
    with refused(Errno.EBUSY, board):
        board.update((board.at(L1, DATA), board.entry(DATA)))
    assert board.extended(op(MmuExt.NEW_BASEPTR, board.mfns[L3])) == 0
    assert not board.paging.segments.ldt_frames()
    with pytest.raises(PageFault):
        board.walk(board.paging.ldt_base)
