"""Direct paging, rule by rule: updates of page tables, pins, the base, the TLB. Each refusal is Xen's own error."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from tests.paravirt_memory import (
    DATA,
    DOMAIN,
    FRAME,
    L1,
    L2,
    L3,
    NX,
    OTHER_L1,
    OTHER_L2,
    OTHER_L3,
    OTHER_XEN_TABLE,
    PAGES,
    PS,
    RW,
    SPOKEN,
    US,
    XEN_TABLE,
    A,
    Board,
    D,
    P,
    op,
    read_only,
    refused,
    xens,
)
from vmm.machine.paging import PageFault
from vmm.monitor.paravirt.abi.errors import Errno
from vmm.monitor.paravirt.abi.memory import (
    DOMID_IO,
    DOMID_SELF,
    DOMID_XEN,
    HYPERVISOR_VIRT_START,
    MACH2PHYS_VIRT_START,
    MMU_UPDATE_PREEMPTED,
    ExtendedOp,
    MmuExt,
    MmuUpdate,
    Update,
    Uvmf,
)
from vmm.monitor.paravirt.area import FIRST_SLOT
from vmm.monitor.paravirt.domain import Continued
from vmm.monitor.paravirt.frames import FrameType as Type


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.check()


L1_REFUSALS = (
    # what an entry is, and what it gets
    ("a page table, writable", lambda b: b.entry(L1), Errno.EBUSY),
    ("a directory, writable", lambda b: b.entry(L2), Errno.EBUSY),
    ("the L3, writable", lambda b: b.entry(L3), Errno.EBUSY),
    ("a frame of the hypervisor's, read-only", lambda b: xens(b) << 12 | P, Errno.EBUSY),
    ("a frame of nobody's", lambda b: 0x110 << 12 | P, Errno.EBUSY),
    ("I/O", lambda b: 0xB8 << 12 | P | RW, Errno.EPERM),
    ("a frame past the end of memory", lambda b: b.frames.size << 12 | P, Errno.EPERM),
    ("an invalid frame", lambda b: FRAME | P, Errno.EINVAL),
    ("write-through", lambda b: b.entry(DATA, P | 1 << 3), Errno.EINVAL),
    ("no cache", lambda b: b.entry(DATA, P | 1 << 4), Errno.EINVAL),
    ("the page attribute table", lambda b: b.entry(DATA, P | 1 << 7), Errno.EINVAL),
    ("a reserved bit", lambda b: b.entry(DATA, P | 1 << 52), Errno.EINVAL),
)


@pytest.mark.parametrize(
    ("value", "errno"), [row[1:] for row in L1_REFUSALS], ids=[row[0] for row in L1_REFUSALS]
)
def test_a_mapping_that_is_refused(board: Board, value, errno: Errno) -> None:  # type: ignore[no-untyped-def]
    """What an L1 entry must not say gets Xen's error, by every way to say it, and the entry stays as it was."""
    entry, before = value(board), board.get(L1, DATA)
    with refused(errno, board):
        board.update((board.at(L1, DATA), entry))
    with refused(errno, board):
        board.paging.update_va_mapping(board.guest, DATA << 12, entry, 0)
    assert not board.paging.emulate_store((L1 << 12) + DATA * 8, entry.to_bytes(8, "little"))
    assert board.get(L1, DATA) == before
    board.put(OTHER_L1, DATA, entry)
    with refused(errno, board):
        board.extended(op(MmuExt.PIN_L1_TABLE, board.mfns[OTHER_L1]))


def test_a_mapping_that_is_allowed(board: Board) -> None:
    """Own frames, tables read-only, the shared page, global pages, NX and the free bits: done, and counted."""
    for entry in (
        board.entry(DATA), board.entry(L1, P), board.entry(L3, P | US), board.shared << 12 | P | RW,
        board.entry(DATA, P | 1 << 8), board.entry(DATA, P | RW | NX), board.entry(DATA, P | 0xE00), 0,
        0x1234_5678_0000,
    ):  # fmt: skip
        assert board.update((board.at(L1, 100), entry)) == 0
        assert board.get(L1, 100) == entry
        board.check()


def test_a_batch_of_64_updates_is_one_hypercall(board: Board) -> None:
    """64 entries are changed by one call, with no flush; `done` says 64."""
    before = board.flushes
    assert board.update(*((board.at(L1, 100 + i), board.entry(DATA + i % 9)) for i in range(64))) == 0
    assert board.done == 64 and board.flushes == before
    assert [board.walk(100 + i << 12) >> 12 for i in range(64)] == [
        board.mfns[DATA + i % 9] for i in range(64)
    ]


def test_a_batch_ends_at_the_update_that_is_refused(board: Board) -> None:
    """Those before it are done and counted in `done`, those after it are not."""
    with refused(Errno.EBUSY, board):
        board.update(
            *((board.at(L1, slot), board.entry(page)) for slot, page in ((100, 9), (101, L1), (102, 9)))
        )
    assert board.done == 1
    assert (board.get(L1, 100), board.get(L1, 101), board.get(L1, 102)) == (board.entry(9), 0, 0)


def test_a_long_batch_can_be_continued(board: Board) -> None:
    """Where somebody wants the processor, a call says with which arguments it goes on, and `done` adds up."""
    data = b"".join(bytes(Update(board.at(L1, 100 + i), board.entry(9))) for i in range(5))
    arguments = (board.say(data), 5, SPOKEN + 0x7000, DOMID_SELF)
    board.paging.domain.should_yield = lambda: True
    for left in (4, 3, 2, 1):
        with pytest.raises(Continued) as caught:
            board.paging.mmu_update(board.guest, *arguments)
        arguments = caught.value.arguments  # type: ignore[assignment]
        assert arguments[1] == left | MMU_UPDATE_PREEMPTED
        assert board.done == 5 - left
    assert board.paging.mmu_update(board.guest, *arguments) == 0
    assert board.done == 5


@pytest.mark.parametrize("count", (0x7FFF_FFFF, 0x1800_0000))
def test_a_batch_that_cannot_be_read_is_refused_at_once(board: Board, count: int) -> None:
    """A count that reaches into the hypervisor's part is EFAULT before anything is done."""
    with refused(Errno.EFAULT, board):
        board.paging.mmu_update(board.guest, 0x1000, count, 0, DOMID_SELF)
    with refused(Errno.EFAULT, board):
        board.paging.mmuext_op(board.guest, 0x1000, count, 0, DOMID_SELF)


FOREIGN = ((DOMAIN, Errno.ESRCH), (7, Errno.ESRCH), (DOMID_XEN, Errno.EPERM), (2 << 16 | DOMID_SELF, None),
           (4 << 16 | DOMID_SELF, Errno.ESRCH))  # fmt: skip


@pytest.mark.parametrize(("foreign", "errno"), FOREIGN)
def test_another_domain_is_refused(board: Board, foreign: int, errno: Errno | None) -> None:
    """A domain without privileges acts for itself only, and calls itself DOMID_SELF."""
    if errno is None:
        assert board.update((board.at(L1, 100), 0), foreign=foreign) == 0
        return
    with refused(errno, board):
        board.update((board.at(L1, 100), board.entry(9)), foreign=foreign)
    if foreign < 1 << 16:
        with refused(errno, board):
            board.extended(op(MmuExt.TLB_FLUSH_LOCAL), foreign=foreign)
        with refused(errno, board):
            board.paging.update_va_mapping_otherdomain(board.guest, DATA << 12, 0, 0, foreign)


def test_input_and_output_is_for_privileged_domains(board: Board) -> None:
    """DOMID_IO lets a domain map what it has been given, which is nothing here; its own frames are not I/O."""
    with refused(Errno.EPERM, board):
        board.update((board.at(L1, 100), 0xB8 << 12 | P), foreign=DOMID_IO)
    with refused(Errno.EBUSY, board):
        board.update((board.at(L1, 100), board.entry(9)), foreign=DOMID_IO)
    with refused(Errno.EPERM, board):
        board.extended(op(MmuExt.TLB_FLUSH_LOCAL), foreign=DOMID_IO)


# Directories and the L3


def test_the_hypervisors_slots_are_not_the_guests(board: Board) -> None:
    """In the fourth gigabyte's directory the slots from HYPERVISOR_VIRT_START on are EPERM; the one before is not."""
    with refused(Errno.EPERM, board):
        board.update((board.at(XEN_TABLE, FIRST_SLOT), 0))
    with refused(Errno.EPERM, board):
        board.update((board.at(XEN_TABLE, 511), board.entry(OTHER_L1)))
    assert board.update((board.at(XEN_TABLE, FIRST_SLOT - 1), board.entry(OTHER_L1))) == 0
    assert HYPERVISOR_VIRT_START >> 21 & 511 == FIRST_SLOT
    assert board.update((board.at(L2, 511), board.entry(OTHER_L1))) == 0


def test_the_fourth_entry_of_an_l3_never_changes(board: Board) -> None:
    """It is EINVAL to touch it once the table is in use; to have none, or one that another L3 has, is EINVAL too."""
    with refused(Errno.EINVAL, board):
        board.update((board.at(L3, 3), board.entry(OTHER_XEN_TABLE, P)))
    for value in (0, board.entry(XEN_TABLE, P), board.entry(L2, P), board.entry(L1, P)):
        board.put(OTHER_L3, 3, value)
        with refused(Errno.EINVAL, board):
            board.extended(op(MmuExt.PIN_L3_TABLE, board.mfns[OTHER_L3]))
    board.put(OTHER_L3, 3, board.entry(OTHER_XEN_TABLE, P))
    board.put(OTHER_L3, 2, board.entry(OTHER_XEN_TABLE, P))
    with refused(Errno.EINVAL, board):
        board.extended(op(MmuExt.PIN_L3_TABLE, board.mfns[OTHER_L3]))
    with refused(Errno.EINVAL, board):
        board.update((board.at(L3, 1), board.entry(XEN_TABLE, P)))


def test_a_directory_that_is_pinned_is_no_xen_directory(board: Board) -> None:
    """PIN_L2 gives the ordinary role, which the fourth entry of an L3 does not take."""
    board.extended(op(MmuExt.PIN_L2_TABLE, board.mfns[OTHER_XEN_TABLE]))
    with refused(Errno.EINVAL, board):
        board.extended(op(MmuExt.PIN_L3_TABLE, board.mfns[OTHER_L3]))
    with refused(Errno.EINVAL, board):
        board.extended(op(MmuExt.PIN_L2_TABLE, board.mfns[XEN_TABLE]))


@pytest.mark.parametrize("bits", (PS, 1 << 8, 1 << 3, 1 << 4, 1 << 52))
def test_superpages_and_cache_bits_are_refused_in_a_directory(board: Board, bits: int) -> None:
    """PSE is EINVAL, as are G, PWT, PCD and the reserved bits, whatever the frame."""
    with refused(Errno.EINVAL, board):
        board.update((board.at(L2, 1), board.entry(OTHER_L1) | bits))
    board.put(OTHER_L2, 1, board.entry(OTHER_L1) | bits)
    with refused(Errno.EINVAL, board):
        board.extended(op(MmuExt.PIN_L2_TABLE, board.mfns[OTHER_L2]))


@pytest.mark.parametrize("bits", (1 << 3, 1 << 4, PS, 1 << 8, 1 << 52, NX))
def test_bits_that_an_l3_entry_has_not(board: Board, bits: int) -> None:
    """EINVAL, both when the table is validated and when an entry of it changes."""
    with refused(Errno.EINVAL, board):
        board.update((board.at(L3, 1), board.entry(OTHER_L2, P) | bits))
    board.put(OTHER_L3, 1, board.entry(OTHER_L2, P) | bits)
    with refused(Errno.EINVAL, board):
        board.extended(op(MmuExt.PIN_L3_TABLE, board.mfns[OTHER_L3]))


def test_a_new_table_is_validated_when_a_directory_names_it(board: Board) -> None:
    """It becomes an L1 table as a whole, or EINVAL, EBUSY or EPERM and nothing; taken out it is a page like any."""
    assert board.update((board.at(L2, 1), board.entry(OTHER_L1))) == 0
    assert board.walk(0x200000 + (DATA << 12)) >> 12 == board.mfns[DATA]
    board.check()
    assert board.update((board.at(L2, 1), 0)) == 0
    assert board.update((board.at(L1, OTHER_L1), board.entry(OTHER_L1))) == 0
    with refused(Errno.EINVAL, board):
        board.update((board.at(L2, 1), board.entry(OTHER_L1)))


def test_a_change_of_a_directory_flushes(board: Board) -> None:
    """After an L2 or L3 entry changed the TLB is empty, because linear page tables may show through it."""
    for table, slot in ((L2, 1), (L3, 1)):
        before = board.flushes
        board.update((board.at(table, slot), board.entry(OTHER_L1 if table == L2 else OTHER_L2, P)))
        assert board.flushes == before + 1


# Linear page tables


def test_a_linear_page_table_is_read_only_and_of_one_kind(board: Board) -> None:
    """A directory may name a directory, itself or another, to be read; not writable, and never two deep."""
    with refused(Errno.EINVAL, board):
        board.update((board.at(L2, 10), board.entry(L2, P | RW)))
    assert board.update((board.at(L2, 10), board.entry(L2, P))) == 0
    linear = 10 << 21 | 0 << 12
    assert board.walk(linear) >> 12 == board.mfns[L1]
    with pytest.raises(PageFault):
        board.walk(linear, write=True)
    board.check()
    assert board.update((board.at(L2, 11), board.entry(XEN_TABLE, P))) == 0
    board.check()
    with refused(Errno.EINVAL, board):
        board.update((board.at(XEN_TABLE, 3), board.entry(L2, P)))  # it is the object of one
    assert board.update((board.at(L2, 11), 0)) == 0
    with refused(Errno.EINVAL, board):
        board.update((board.at(L3, 1), board.entry(L3, P)))


# Pins, and the base


def test_a_page_is_pinned_once(board: Board) -> None:
    """Twice is EINVAL, to unpin what is not pinned is EINVAL, and so is to pin what is none of the domain's."""
    mfn = board.mfns[OTHER_L1]
    assert board.extended(op(MmuExt.PIN_L1_TABLE, mfn)) == 0
    with refused(Errno.EINVAL, board):
        board.extended(op(MmuExt.PIN_L1_TABLE, mfn))
    assert board.extended(op(MmuExt.UNPIN_TABLE, mfn)) == 0
    with refused(Errno.EINVAL, board):
        board.extended(op(MmuExt.UNPIN_TABLE, mfn))
    for other in (xens(board), 0xB8, board.frames.size, 0xFFFF_FFFF):
        for command in (MmuExt.PIN_L1_TABLE, MmuExt.UNPIN_TABLE, MmuExt.NEW_BASEPTR, MmuExt.CLEAR_PAGE):
            with refused(Errno.EINVAL, board):
                board.extended(op(command, other))


def test_unpinned_while_live_a_table_stays_one(board: Board) -> None:
    """The base keeps its L3; when another base is in force, the first is let go of, and may be written."""
    assert board.extended(op(MmuExt.UNPIN_TABLE, board.mfns[L3])) == 0
    with refused(Errno.EBUSY, board):
        board.update((board.at(L1, L3), board.entry(L3)))
    assert board.extended(op(MmuExt.NEW_BASEPTR, board.mfns[OTHER_L3])) == 0
    board.check()
    assert board.paging.base == board.mfns[OTHER_L3]
    assert board.update((board.at(OTHER_L1, L3), board.entry(L3))) == 0
    board.check()


@pytest.mark.parametrize("level", (MmuExt.PIN_L1_TABLE, MmuExt.PIN_L2_TABLE, MmuExt.PIN_L3_TABLE))
def test_a_page_has_one_role(board: Board, level: MmuExt) -> None:
    """A page that is writable, or a table of another level, or of descriptors, is not pinned: EINVAL."""
    pages = {L1, L2, L3, XEN_TABLE, DATA} - {{0: L1, 1: L2, 2: L3}[level]}
    read_only(board, DATA + 1)
    board.set_gdt([board.mfns[DATA + 1]], 512)
    for page in (*pages, DATA + 1):
        with refused(Errno.EINVAL, board):
            board.extended(op(level, board.mfns[page]))


def test_a_bad_base_is_refused_and_the_old_one_stays(board: Board) -> None:
    """NEW_BASEPTR takes an L3 only; a second base for processes is for 64-bit guests: EINVAL."""
    for page in (L1, L2, XEN_TABLE, DATA):
        with refused(Errno.EINVAL, board):
            board.extended(op(MmuExt.NEW_BASEPTR, board.mfns[page]))
    assert board.paging.base == board.mfns[L3]
    with refused(Errno.EINVAL, board):
        board.extended(op(MmuExt.NEW_USER_BASEPTR, board.mfns[L3]))


ANSWERS = (
    (MmuExt.PIN_L4_TABLE, None), (MmuExt.TLB_FLUSH_LOCAL, None), (MmuExt.TLB_FLUSH_ALL, None),
    (MmuExt.INVLPG_LOCAL, None), (MmuExt.INVLPG_ALL, None), (MmuExt.FLUSH_CACHE, Errno.EACCES),
    (MmuExt.FLUSH_CACHE_GLOBAL, Errno.EACCES), (MmuExt.MARK_SUPER, Errno.EOPNOTSUPP),
    (MmuExt.UNMARK_SUPER, Errno.EOPNOTSUPP), (MmuExt.INVLPG_MULTI, Errno.EINVAL), (14, Errno.ENOSYS),
    (21, Errno.ENOSYS),
)  # fmt: skip


@pytest.mark.parametrize(("command", "errno"), ANSWERS)
def test_the_other_operations(board: Board, command: int, errno: Errno | None) -> None:
    """Each has its answer; the mask of processors of a MULTI must be readable."""
    if errno is None:
        assert board.extended(ExtendedOp(command, 0x5000, 0xFFFF_FFF0)) == 0
    else:
        with refused(errno, board):
            board.extended(ExtendedOp(command, 0x5000, 0xFFFF_FFF0))


def test_flushes_reach_the_tlb(board: Board) -> None:
    """LOCAL, ALL and a MULTI with our bit empty it, INVLPG drops a page; a MULTI without our bit does nothing."""
    for operation, emptied in (
        (op(MmuExt.TLB_FLUSH_LOCAL), True), (op(MmuExt.TLB_FLUSH_ALL), True),
        (op(MmuExt.TLB_FLUSH_MULTI, 0, SPOKEN + 0x100), True), (op(MmuExt.TLB_FLUSH_MULTI, 0, SPOKEN + 0x104), False),
    ):  # fmt: skip
        board.spoken[0x100:0x108] = struct.pack("<II", 1, 2)
        board.look()
        board.extended(operation)
        assert bool(board.tlb) != emptied
    board.look()
    board.extended(op(MmuExt.INVLPG_LOCAL, DATA << 12))
    assert DATA not in {page for page, _ in board.tlb} and board.tlb


def test_a_stale_translation_never_outlives_the_role_of_its_frame(board: Board) -> None:
    """A writable mapping that was taken back without a flush is flushed when its frame becomes a table."""
    board.put(DATA, 0, board.entry(DATA + 1))
    board.look()
    read_only(board, DATA)
    assert (DATA, board.mfns[DATA]) in board.tlb
    board.extended(op(MmuExt.PIN_L1_TABLE, board.mfns[DATA]))
    assert (DATA, board.mfns[DATA]) not in board.tlb
    before = board.flushes
    read_only(board, DATA + 2)
    board.extended(op(MmuExt.TLB_FLUSH_LOCAL), op(MmuExt.PIN_L1_TABLE, board.mfns[DATA + 2]))
    assert board.flushes == before + 1, "what was flushed in between is not flushed again"


def test_pages_are_cleared_and_copied(board: Board) -> None:
    """CLEAR_PAGE and COPY_PAGE work on writable memory; a table may be copied from, never to: EINVAL."""
    board.memory.load(board.mfns[DATA] << 12, b"abc")
    board.extended(op(MmuExt.COPY_PAGE, board.mfns[DATA + 1], board.mfns[DATA]))
    assert board.guest.read(DATA + 1 << 12, 3) == b"abc"
    board.extended(op(MmuExt.CLEAR_PAGE, board.mfns[DATA + 1]))
    assert board.guest.read(DATA + 1 << 12, 3) == bytes(3)
    board.extended(op(MmuExt.COPY_PAGE, board.mfns[DATA], board.mfns[L1]))
    for operation in (
        op(MmuExt.CLEAR_PAGE, board.mfns[L1]),
        op(MmuExt.COPY_PAGE, board.mfns[L2], board.mfns[DATA]),
    ):
        with refused(Errno.EINVAL, board):
            board.extended(operation)


# One mapping


def test_a_mapping_is_changed_by_its_address(board: Board) -> None:
    """update_va_mapping changes one entry and flushes as it is told; where there is no table, EINVAL."""
    paging, guest = board.paging, board.guest
    for flags, flushes, left in (
        (Uvmf.NONE, 0, True),
        (Uvmf.INVLPG, 0, False),
        (Uvmf.TLB_FLUSH | Uvmf.ALL, 1, False),
    ):
        board.look()
        before = board.flushes
        assert paging.update_va_mapping(guest, DATA << 12, board.entry(DATA + 1), flags) == 0
        assert board.walk(DATA << 12) >> 12 == board.mfns[DATA + 1]
        assert board.flushes - before == flushes
        assert (DATA in {page for page, _ in board.tlb}) == left
        paging.update_va_mapping(guest, DATA << 12, board.entry(DATA), Uvmf.TLB_FLUSH)
    for linear in (0x4000_0000, 0x20_0000, HYPERVISOR_VIRT_START, 0xFFFF_F000):
        with refused(Errno.EINVAL, board):
            paging.update_va_mapping(guest, linear, 0, 0)
    board.update((board.at(L2, 10), board.entry(L2, P)))
    with refused(Errno.EINVAL, board):
        paging.update_va_mapping(guest, 10 << 21, 0, 0)  # by a linear page table


def test_the_accessed_and_dirty_bits_are_kept_if_asked(board: Board) -> None:
    """PRESERVE_AD leaves A and D set that are set; a normal update does not."""
    board.put(L1, 100, board.entry(9, P | RW | A | D))
    board.frames.get(board.mfns[9], DOMAIN)
    board.frames.get_type(board.mfns[9], Type.WRITABLE)
    board.update((board.at(L1, 100) | MmuUpdate.PT_UPDATE_PRESERVE_AD, board.entry(9)))
    assert board.get(L1, 100) == board.entry(9, P | RW | US | A | D)
    board.update((board.at(L1, 100), board.entry(9)))
    assert board.get(L1, 100) == board.entry(9)


def test_an_update_of_what_is_no_table(board: Board) -> None:
    """A page in no role is stored to; one of descriptors is EINVAL, and so is one that is not the domain's."""
    assert board.update((board.at(DATA, 5), 0x1234)) == 0
    assert board.get(DATA, 5) == 0x1234
    read_only(board, DATA)
    board.put(DATA, 5, 0)
    board.set_gdt([board.mfns[DATA]], 512)
    with refused(Errno.EINVAL, board):
        board.update((board.at(DATA, 5), 0))
    with refused(Errno.EINVAL, board):
        board.update((xens(board) << 12, 0))
    with refused(Errno.EINVAL, board):
        board.update((1 << 60, 0))
    with refused(Errno.ENOSYS, board):
        board.update((board.at(L1, 5) | 4, 0))


# Stores to tables, emulated


def test_a_store_to_a_table_is_an_update(board: Board) -> None:
    """A store of 1, 2, 4 or 8 aligned bytes to an L1 table that is mapped read-only changes the entry, checked."""
    where = (L1 << 12) + 100 * 8
    emulate = board.paging.emulate_store
    assert emulate(where, board.entry(9).to_bytes(8, "little"))
    assert board.walk(100 << 12) >> 12 == board.mfns[9]
    assert emulate(where + 1, bytes((board.mfns[10] << 4 & 0xF0 | 0,)))
    assert emulate(where, bytes(4))
    assert board.get(L1, 100) & 0xFFFFFFFF == 0
    for address, size in ((where + 4, 8), (where + 1, 2), (where, 3), (where, 16), (DATA << 12, 4), (L2 << 12, 8),
                          (0x4000_0000, 4), (HYPERVISOR_VIRT_START, 4)):  # fmt: skip
        assert not emulate(address, bytes(size)), hex(address)


def test_an_entry_stored_in_halves_the_wrong_way_round(board: Board) -> None:
    """The upper half first may make an entry that is not allowed: it is made, not present, until the lower half."""
    where, new = (L1 << 12) + 100 * 8, board.entry(9)
    board.update((board.at(L1, 100), board.entry(10)))
    assert board.paging.emulate_store(where + 4, (0x80_0000 + 1 << 4).to_bytes(4, "little"))
    assert not board.get(L1, 100) & P
    board.check()
    assert board.paging.emulate_store(where + 4, (new >> 32).to_bytes(4, "little"))
    assert board.paging.emulate_store(where, (new & 0xFFFFFFFF).to_bytes(4, "little"))
    assert board.get(L1, 100) == new
    assert not board.paging.emulate_store(where, (board.entry(L1) & 0xFFFFFFFF).to_bytes(4, "little"))


def test_compare_and_exchange_of_an_entry(board: Board) -> None:
    """CMPXCHG stores what is allowed if the old value is there, and says what was."""
    where, old, new = (L1 << 12) + DATA * 8, board.entry(DATA), board.entry(DATA + 1)
    exchange = board.paging.compare_exchange
    assert exchange(where, bytes(8), new.to_bytes(8, "little")) == old.to_bytes(8, "little")
    assert board.get(L1, DATA) == old
    assert exchange(where, old.to_bytes(8, "little"), new.to_bytes(8, "little")) == old.to_bytes(8, "little")
    assert board.get(L1, DATA) == new
    assert exchange(where, new.to_bytes(8, "little"), board.entry(L1).to_bytes(8, "little")) is None
    assert exchange(DATA << 12, bytes(8), bytes(8)) is None


# The machine-to-physical table


def test_the_machine_to_physical_table(board: Board) -> None:
    """Ring 1 reads it at its place, nobody writes it, ring 3 has nothing of it; it is right, and changes if asked."""

    def look(mfn: int) -> int:
        at = MACH2PHYS_VIRT_START + mfn * 4
        return board.memory.read(board.walk(at & ~0xFFF) | at & 0xFFF, 4)

    assert [look(mfn) for mfn in board.mfns] == list(range(PAGES))
    assert look(xens(board)) == 0xFFFF_FFFF
    assert all(mfn != pfn for pfn, mfn in enumerate(board.mfns))
    assert board.update((board.mfns[9] << 12 | MmuUpdate.MACHPHYS_UPDATE, 77)) == 0
    assert look(board.mfns[9]) == 77
    with refused(Errno.EINVAL, board):
        board.update((xens(board) << 12 | MmuUpdate.MACHPHYS_UPDATE, 77))
    for denied in ({"write": True}, {"user": True}):
        with pytest.raises(PageFault):
            board.walk(MACH2PHYS_VIRT_START, **denied)


@pytest.mark.parametrize(
    ("command", "kind", "errno"), ((0, 6, Errno.EINVAL), (0, 32, Errno.EINVAL), (2, 0, Errno.ENOSYS))
)
def test_assists(board: Board, command: int, kind: int, errno: Errno) -> None:
    """Those of x86_32 go on and off; an unknown one is EINVAL, an unknown command ENOSYS."""
    assert [board.paging.vm_assist(0, kind) for kind in range(6)] == [0] * 6
    assert board.paging.state.assists == 0x3F
    assert board.paging.vm_assist(1, 2) == 0 and board.paging.state.assists == 0x3B
    with refused(errno, board):
        board.paging.vm_assist(command, kind)
