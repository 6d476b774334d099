"""What the processor is given of a guest's memory under direct paging, and why it is refused the rest."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.paravirt_memory import DATA, L1, L2, MAX_PAGES, MEMORY, NX, PAGES, RW, US, A, Board, D, P
from vmm.isa.descriptors import Descriptor
from vmm.isa.words import CR0, CR4, PaeEntry
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.engine import FETCH, PROT_EXEC, PROT_READ, PROT_WRITE, READ, WRITE
from vmm.machine.machine import Machine
from vmm.machine.tlb import CODE, MIXED
from vmm.monitor.paravirt.abi.memory import MACH2PHYS_VIRT_START, ExtendedOp, MmuExt
from vmm.monitor.paravirt.access import GuestAccess
from vmm.monitor.paravirt.area import FREE_PAGE, PRIVATE

RO, RWX = PROT_READ, PROT_READ | PROT_WRITE | PROT_EXEC
KERNEL, PROCESS = 1, 3
CODE_PAGE, NX_PAGE, READ_ONLY, KERNEL_ONLY = range(DATA + 4, DATA + 8)


@dataclass
class Registers:
    board: Board
    cr0: int = int(CR0.PG | CR0.PE | CR0.WP)
    cr4: int = int(CR4.PAE)

    @property
    def cr3(self) -> int:
        return self.board.paging.base << 12


class Bench:
    """A domain on a machine; `ask` is the engine's question."""

    def __init__(self) -> None:
        self.machine = Machine(MEMORY)
        self.board = board = Board(self.machine.memory)
        self.access = GuestAccess(self.machine, board.paging)
        self.machine.linear.source = Registers(board)
        for page, bits in ((NX_PAGE, P | RW | US | NX), (READ_ONLY, P | US), (KERNEL_ONLY, P | RW)):
            board.update((board.at(L1, page), board.entry(page, bits)))
        self.ring(KERNEL)

    def ring(self, ring: int) -> None:
        for segment, selector, kind in ((at.CS, 8, 0x00CF9B00), (at.SS, 16, 0x00CF9300)):
            self.machine.state.load_segment(segment, selector | ring, 0, 0xFFFFFFFF, kind | ring << 13)
        assert self.machine.state.cpl == ring
        self.machine.state.eip = CODE_PAGE << 12

    def ask(self, page: int, access: int, ring: int = KERNEL) -> int | None:
        """What may be done with the domain's page; None where it is refused."""
        self.ring(ring)
        found = self.access.fill(page << 12, access)
        if found is None:
            assert self.access.fault_of(page << 12, access) is not None
            return None
        assert found[0] == self.board.mfns[page] << 12
        return found[1]


@pytest.fixture
def bench() -> Bench:
    return Bench()


RIGHTS = (
    # page, access, what ring 1 and ring 3 get
    (DATA, READ, RO, RO),
    (DATA, WRITE, RO | PROT_WRITE, RO | PROT_WRITE),
    (DATA, FETCH, RO | PROT_EXEC, RO | PROT_EXEC),
    (READ_ONLY, READ, RO, RO),
    (READ_ONLY, WRITE, None, None),
    (KERNEL_ONLY, WRITE, RO | PROT_WRITE, None),
    (KERNEL_ONLY, FETCH, RO | PROT_EXEC, None),
    (NX_PAGE, WRITE, RO | PROT_WRITE, RO | PROT_WRITE),
    (NX_PAGE, FETCH, None, None),
    (L1, READ, RO, RO),
    (L1, WRITE, None, None),
    (L2, WRITE, None, None),
)


@pytest.mark.parametrize(("page", "access", "kernel", "process"), RIGHTS)
def test_rights(page: int, access: int, kernel: int | None, process: int | None) -> None:
    """The guest's own bits decide, for the kernel in ring 1 as for a supervisor, a page table never stored to."""
    assert Bench().ask(page, access, KERNEL) == kernel
    assert Bench().ask(page, access, PROCESS) == process


def test_accessed_and_dirty_are_marked_in_the_guests_tables(bench: Bench) -> None:
    """They are the real tables: a read sets A, a store A and D, a refused access nothing."""
    entry = bench.board.get(L1, DATA)
    bench.ask(DATA, READ)
    assert bench.board.get(L1, DATA) == entry | A
    bench.ask(DATA, WRITE)
    assert bench.board.get(L1, DATA) == entry | A | D
    before = bench.board.get(L1, NX_PAGE)
    bench.ask(NX_PAGE, FETCH)
    assert bench.board.get(L1, NX_PAGE) == before


def test_a_page_that_may_be_written_and_executed_is_given_for_one_of_them(bench: Bench) -> None:
    """It turns over from data to code and back; code is never writable, and after some turns it settles as both."""
    for _ in range(2):
        assert bench.ask(DATA, WRITE) == RO | PROT_WRITE
        assert bench.ask(DATA, FETCH) == RO | PROT_EXEC
        assert bench.machine.frames.kinds[bench.board.mfns[DATA]] == CODE
        assert bench.ask(DATA, READ) == RO | PROT_EXEC
    bench.ask(DATA, WRITE)
    bench.ask(DATA, FETCH)
    assert bench.ask(DATA, WRITE) == RWX
    assert bench.machine.frames.kinds[bench.board.mfns[DATA]] == MIXED


def test_code_seen_through_a_mapping_that_forbids_execution(bench: Bench) -> None:
    """The frame of a page of code, mapped NX elsewhere, is read there without the right to execute."""
    board = bench.board
    board.update((board.at(L1, 200), board.entry(DATA, P | NX)))
    bench.ask(DATA, FETCH)
    assert bench.access.fill(200 << 12, READ) == (board.mfns[DATA] << 12, RO)
    assert bench.access.fill(200 << 12, FETCH) is None
    fault = bench.access.fault_of(200 << 12, FETCH)
    assert fault is not None and fault.code == 0x11


FAULTS = (
    # address, access, ring, the error code
    (0x4000_0000, READ, KERNEL, 0),
    (0x4000_0000, WRITE, PROCESS, 6),
    (READ_ONLY << 12, WRITE, KERNEL, 3),
    (L1 << 12, WRITE, PROCESS, 7),
    (NX_PAGE << 12, FETCH, PROCESS, 0x15),
    (KERNEL_ONLY << 12, READ, PROCESS, 5),
    (MACH2PHYS_VIRT_START, WRITE, KERNEL, 3),
    (MACH2PHYS_VIRT_START, READ, PROCESS, 5),
    (0xF700_0000, READ, KERNEL, 0),
)


@pytest.mark.parametrize(("address", "access", "ring", "code"), FAULTS)
def test_why_an_access_is_refused(bench: Bench, address: int, access: int, ring: int, code: int) -> None:
    """The fault is the guest's, with the address and the code that the manual gives it."""
    bench.ring(ring)
    assert bench.access.fill(address, access) is None
    fault = bench.access.fault_of(address, access)
    assert fault is not None and (fault.address, fault.code) == (address, code)


def test_the_machine_to_physical_table_is_ring_1s_to_read(bench: Bench) -> None:
    """The kernel is given its frames for reading only."""
    found = bench.access.fill(MACH2PHYS_VIRT_START, READ)
    assert found == (bench.board.paging.domain.area.m2p[0] << 12, RO)
    assert bench.access.fill(MACH2PHYS_VIRT_START, FETCH) is None


def test_descriptor_tables_are_the_processors(bench: Bench) -> None:
    """Ring 3 reaches them only where the access is the processor's own, which also marks a descriptor accessed."""
    board, access = bench.board, bench.access
    flat = bytes(Descriptor.segment(0, 0xFFFFF, 0xF2, 0xC))
    board.memory.load(board.mfns[DATA] << 12, bytes(8) + flat)
    board.update((board.at(L1, DATA), board.entry(DATA, P)))
    board.set_gdt([board.mfns[DATA]], 2)
    gdt = board.paging.gdt_base
    bench.ring(PROCESS)
    assert access.fill(gdt, READ) is None
    access.is_implicit = lambda address, _access: address >= PRIVATE
    assert access.fill(gdt, READ) == (board.mfns[DATA] << 12, RO)
    assert access.fill(gdt, WRITE) is None
    assert access.fault_of(gdt + 8 + 5, WRITE) is None, "done over"
    assert board.memory.bytes[board.at(DATA, 1) + 5] == 0xF3
    fault = access.fault_of(gdt + 0x1000, WRITE)
    assert fault is not None, "no descriptors of the guest's are there"
    page = board.paging.own_frame()
    where = board.paging.show(FREE_PAGE, page)
    assert access.fill(where, READ) == (page << 12, RO)
    assert access.fault_of(where, WRITE) is not None


def test_a_page_of_the_ldt_comes_when_it_is_needed(bench: Bench) -> None:
    """The first use of a selector maps its page; where that cannot be, the fault has the address the guest knows."""
    board, access = bench.board, bench.access
    access.is_implicit = lambda address, _access: address >= PRIVATE
    board.extended(ExtendedOp(MmuExt.SET_LDT, DATA << 12, 1024))
    ldt = board.paging.ldt_base
    fault = access.fault_of(ldt + 0x1008, READ)
    assert fault is not None and (fault.address, fault.code) == ((DATA << 12) + 0x1008, 0)
    board.update((board.at(L1, DATA + 1), board.entry(DATA + 1, P)))
    assert access.fill(ldt + 0x1000, READ) is None
    assert access.fault_of(ldt + 0x1008, READ) is None
    assert access.fill(ldt + 0x1000, READ) == (board.mfns[DATA + 1] << 12, RO)
    board.check()


def test_what_is_given_is_what_may_be_written(bench: Bench) -> None:
    """No page of the first four megabytes is handed out for stores unless its frame is the domain's, and no table."""
    board = bench.board
    tables = board.recount.tables()
    given = 0
    for page in range(1024):
        found = bench.access.fill(page << 12, WRITE)
        if found is not None:
            given += 1
            mfn = found[0] >> 12
            assert board.frames.owners[mfn] == 1 and mfn not in tables
    assert given == PAGES - DATA - 1 < MAX_PAGES
    assert not board.get(L2, 0) & PaeEntry.PS
