"""What a monitor asks of its guest's memory: pages of its own, fetches of its own, notice of stores to code."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from tests.machines import CODE, DATA, PAGES, PAGING_ON, Lab, enable_paging, lab
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.engine import FETCH, PROT_EXEC, PROT_READ, PROT_WRITE, READ, WRITE, Engine
from vmm.machine.memory import ONES, SINK
from vmm.machine.tlb import MIXED
from vmm.monitor.memory.shadow import KernelFetch, ShadowMemory
from vmm.monitor.memory.slot import EXECUTE, LOOK, SIZE, STORE
from vmm.monitor.trap.monitor import TrapMonitor

FRAME = 0xF800_0000  # where the bus shows the pages of these tests
OFFSET = 0x200000  # where they are in the slot
RIGHTS = (LOOK, LOOK | STORE, EXECUTE, LOOK | EXECUTE)


class Board:
    """A guest under a monitor that has four pages more in the slot, one of each of `RIGHTS`."""

    def __init__(self, made: Lab, fetch: KernelFetch) -> None:
        class Monitor(TrapMonitor):
            def make_memory(self) -> ShadowMemory:
                return ShadowMemory(self.machine, self.vcpu, kernel_fetch=fetch)

        self.lab, self.machine = made, made.machine
        self._pages = mmap.mmap(-1, 4 * 4096)
        host = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        self.machine.engine.map_memory(FRAME, 4 * 4096, host)
        self.monitor = Monitor(made.machine)
        self.memory = self.monitor.memory
        for n, rights in enumerate(RIGHTS):
            self.memory.slot.add_page(OFFSET + 4096 * n, FRAME + 4096 * n, rights)
        self.monitor.start()
        made.machine.attach(self.monitor)
        made.control = self.monitor

    def ask(self, address: int, access: int, ring: int = 1) -> tuple[int, int] | None:
        """What the processor gets for an access from a ring, whoever answers."""
        words = self.machine.state.words
        words[at.HFLAGS // 4] = words[at.HFLAGS // 4] & ~3 | ring
        found = self.machine.engine.walker.look(address, access, ring == 3)
        asked = self.memory.fill(address, access)
        assert found is None or asked == found
        words[at.HFLAGS // 4] = words[at.HFLAGS // 4] & ~3 | 1
        return asked

    @property
    def page(self) -> int:
        return self.memory.slot.base + OFFSET


def board(
    fetch: KernelFetch = "own", code: str = "hlt", paging: bool = True, engine: Engine | None = None
) -> Board:
    made = Board(lab(code, memory=enable_paging(), engine=engine), fetch)
    if paging:
        made.monitor.vcpu.cr3, made.monitor.vcpu.cr0 = PAGES, 0x80000011
        made.memory.control_changed()
    return made


@pytest.mark.parametrize("paging", (False, True))
def test_each_page_gives_ring_1_its_rights_and_no_more(paging: bool) -> None:
    """LOOK, STORE and EXECUTE are what they say; what a page does not give is the guest's fault, or emptiness."""
    made = board(paging=paging)
    nothing = {READ: (ONES, PROT_READ), WRITE: (SINK, PROT_WRITE), FETCH: None}
    for n, rights in enumerate(RIGHTS):
        page, frame = made.page + 4096 * n, FRAME + 4096 * n
        looks = PROT_READ | PROT_WRITE if rights & STORE else PROT_READ
        for access, needed, perms in (
            (READ, LOOK, looks),
            (WRITE, STORE, looks),
            (FETCH, EXECUTE, PROT_EXEC),
        ):
            expected = (frame, perms) if rights & needed else None if paging else nothing[access]
            assert made.ask(page, access) == expected, (rights, access)


def test_a_process_gets_none_of_them() -> None:
    """In ring 3 the addresses of the slot are the guest's own, whatever the monitor has there."""
    made = board()
    for n in range(len(RIGHTS)):
        for access in (READ, WRITE, FETCH):
            assert made.ask(made.page + 4096 * n, access, 3) is None


def test_a_kernel_with_fetches_of_its_own_fetches_nowhere_else() -> None:
    """Ring 1 reads its own code, but does not execute it; ring 3 executes the guest's pages as ever."""
    made = board()
    for _ in range(2):
        assert made.ask(CODE, FETCH) is None
        assert made.ask(CODE, READ) is not None
        assert made.ask(CODE, FETCH) is None
        assert made.ask(CODE, FETCH, 3) == (CODE, PROT_READ | PROT_EXEC)
    assert made.ask(CODE, READ) == (CODE, PROT_READ)


def test_without_it_the_guests_pages_are_executed() -> None:
    """With fetches from the guest's pages ring 1 executes there."""
    made = board("guest")
    assert made.ask(CODE, FETCH) == (CODE, PROT_READ | PROT_EXEC)
    assert made.ask(made.page, FETCH) is None


def test_the_pages_move_together() -> None:
    """Where the guest maps the slot's addresses, all pages are elsewhere, and who asked is told where."""
    made = board()
    told: list[int] = []
    made.memory.slot.on_move.append(told.append)
    before = made.page
    made.machine.memory.write(PAGES + 0x3FF * 4, 4, PAGES + 0x1000 | 7)
    made.memory.load_cr3()
    assert told == [made.memory.slot.base] != [before - OFFSET]
    assert made.ask(made.page, READ) == (FRAME, PROT_READ)
    assert made.ask(made.page + 2 * 4096, FETCH) == (FRAME + 2 * 4096, PROT_EXEC)
    assert made.ask(0xFFC00000 + DATA, READ) == (DATA, PROT_READ)
    assert made.machine.state.table(at.GDT)[0] == made.memory.slot.base


def test_the_slot_is_four_megabytes() -> None:
    """It contains its own addresses and no others, up to the end of the address space."""
    slot = board().memory.slot
    assert slot.contains(slot.base) and slot.contains(slot.base + SIZE - 1)
    assert not slot.contains(slot.base - 1)
    assert slot.page_at(slot.base + OFFSET + 5) is slot.pages[OFFSET >> 12]
    assert slot.page_at(slot.base - 1) is None


# Code that was translated


def _noticed(made: Lab) -> list[tuple[int, int]]:
    """Protect the page at DATA; what is noticed, with what is there at that moment."""
    assert isinstance(made.control, TrapMonitor)
    memory, noticed = made.control.memory, []

    def notice(frame: int) -> None:
        noticed.append((frame, made.read(DATA)))
        memory.release(frame)

    memory.on_code_write = notice
    memory.protect(DATA)
    return noticed


@pytest.mark.parametrize("before", ("", "mov [DATA + 4], eax\n mov ebx, [DATA]"))
@pytest.mark.parametrize("paged", (False, True))
def test_a_store_to_translated_code_is_noticed_before_it_is_made(before: str, paged: bool) -> None:
    """Once, with the old bytes still there; then the store is made, and further ones are free."""
    stores = "mov dword [DATA], 5\n mov dword [DATA], 6\n int 0x40"
    code = f"{PAGING_ON if paged else ''} {before}\nat:     nop\n {stores}"
    made = lab(code, "trap", memory=enable_paging())
    made.run_to("at")
    noticed = _noticed(made)
    made.run(made.retired + 10)
    assert (made.vector, made.read(DATA)) == (0x40, 6)
    assert noticed == [(DATA, 0)]


def test_so_is_one_without_machine_code() -> None:
    """The same where Python fills the TLB."""
    made = lab(
        "mov [DATA + 4], eax\nat:     mov dword [DATA], 5\n int 0x40",
        "trap",
        engine=Engine(native_code=False),
    )
    made.run_to("at")
    noticed = _noticed(made)
    made.run(made.retired + 10)
    assert (made.vector, made.read(DATA), noticed) == (0x40, 5, [(DATA, 0)])


def test_a_devices_store_is_noticed() -> None:
    """What the host writes into translated code is noticed, too."""
    made = lab("hlt", "trap")
    noticed = _noticed(made)
    made.machine.memory.write(DATA + 8, 4, 1)
    assert noticed == [(DATA, 0)]
    made.machine.memory.write(DATA + 8, 4, 2)
    assert len(noticed) == 1


def test_a_store_that_faults_is_the_guests_fault() -> None:
    """A store that the guest's own tables forbid is its page fault; the translated code is not touched."""
    made = lab(
        f"{PAGING_ON} or eax, 0x10000\n mov cr0, eax\nat:     mov dword [DATA], 5\n int 0x40",
        "trap",
        memory=enable_paging({DATA: DATA | 5}),
    )
    made.run_to("at")
    noticed = _noticed(made)
    made.run(made.retired + 10)
    assert (made.vector, made.stack(2)) == (14, [3, made.symbol("at")])
    assert noticed == []


def test_a_page_of_mixed_use_is_not_protected() -> None:
    """Code beside the data that it changes is checked by whoever translated it; stores there are free."""
    made = lab("mov ecx, 100\nagain:  inc dword [count]\n dec ecx\n jnz again\nat:     nop\n mov dword [count], 5\n"
               " int 0x40\ncount:  dd 0", "trap")  # fmt: skip
    made.run_to("at")
    assert made.machine.frames.kinds[CODE >> 12] == MIXED
    assert isinstance(made.control, TrapMonitor)
    made.control.memory.protect(CODE)
    noticed: list[int] = []
    made.control.memory.on_code_write = noticed.append
    made.run(made.retired + 10)
    assert (made.vector, noticed) == (0x40, [])
