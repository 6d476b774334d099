"""Direct paging: no sequence of hypercalls gives a guest what is not its own, and every count is right at every step.

The property test is the promise; the tests below it say of each rule what a guest gets that breaks it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

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
    xens,
)
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.machine.paging import PageFault
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import (
    DOMID_IO,
    DOMID_SELF,
    DOMID_XEN,
    EXCHANGE_SIZE,
    EXCHANGED_OFFSET,
    HYPERVISOR_VIRT_START,
    MACH2PHYS_VIRT_START,
    MMU_UPDATE_PREEMPTED,
    ExtendedOp,
    MemoryOp,
    MmuExt,
    MmuUpdate,
    Reservation,
    Update,
    Uvmf,
)
from vmm.monitor.paravirt.area import FIRST_SLOT
from vmm.monitor.paravirt.domain import Continued
from vmm.monitor.paravirt.frames import FrameType as Type

# Any hypercalls in any order

_TABLE_PAGES = st.integers(0, 7)  # of the domain: its first tables, and a few that may become some
_PAGES = st.one_of(_TABLE_PAGES, st.integers(0, PAGES - 1))
_OTHERS = st.sampled_from(("shared", "xen", "io", "beyond", "nowhere", "free"))
_TARGETS = st.one_of(_PAGES, _PAGES, _PAGES, _OTHERS)
_BITS = st.one_of(
    st.sampled_from((P | RW | US, P | US, P, 0, P | RW, P | RW | A | D, P | US | NX)),
    st.integers(0, 0xFFF),
    st.sampled_from((1 << 52, 1 << 40)).map(lambda bit: bit | P | RW),
)
_SLOTS = st.one_of(st.integers(0, 5), st.sampled_from((FIRST_SLOT - 1, FIRST_SLOT, 511)), st.integers(0, 511))
_SEGMENT_PAGES = st.integers(DATA, DATA + 2)  # that descriptors are stored to
_LINEAR = st.one_of(_PAGES.map(lambda page: page << 12), st.integers(0, 0xFFFFF).map(lambda page: page << 12))
_DESCRIPTORS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from((0x00CF9B000000FFFF, 0x00CFFB000000FFFF, 0x0000EC0000080000, 0x0000EC00E0190000, 0)),
    st.integers(0, 31).map(lambda kind: 0x0000_8000_0008_0000 | kind << 40),
)


class AnyGuest(RuleBasedStateMachine):
    """A domain that makes any hypercall, and stores anything wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.board = Board()

    def mfn(self, to: int | str) -> int:
        board = self.board
        if isinstance(to, int):
            return board.mfns[to]
        free = board.frames.free_frames() and board.frames._free.rfind(b"\1")
        frames = {"shared": board.shared, "xen": xens(board), "io": 0xB8, "beyond": board.frames.size + 5,
                  "nowhere": FRAME >> 12, "free": free}  # fmt: skip
        return frames[to]

    def attempt(self, call: object) -> None:
        assert callable(call)
        try:
            call()
        except Refused as refused:
            assert refused.errno in Errno

    @rule(page=_PAGES, slot=_SLOTS, to=_TARGETS, bits=_BITS, command=st.sampled_from((0, 0, 0, 2, 3, 1, 5)))
    def update(self, page: int, slot: int, to: int | str, bits: int, command: int) -> None:
        value = self.mfn(to) << 12 & FRAME | bits
        self.attempt(lambda: self.board.update((self.board.at(page, slot) | command, value)))

    @rule(slots=st.lists(st.tuples(_SLOTS, _PAGES), max_size=8), page=_PAGES)
    def batch(self, slots: list[tuple[int, int]], page: int) -> None:
        board = self.board
        self.attempt(lambda: board.update(*((board.at(page, slot), board.entry(to)) for slot, to in slots)))

    @rule(linear=_LINEAR, to=_TARGETS, bits=_BITS, flags=st.integers(0, 7))
    def update_va(self, linear: int, to: int | str, bits: int, flags: int) -> None:
        value, board = self.mfn(to) << 12 & FRAME | bits, self.board
        self.attempt(lambda: board.paging.update_va_mapping(board.guest, linear, value, flags))

    @rule(page=_PAGES, slot=_SLOTS, to=_TARGETS, bits=_BITS)
    def store(self, page: int, slot: int, to: int | str, bits: int) -> None:
        """The guest's own store, where its tables let it: so pages get what makes tables of them."""
        self.store_entry(page, slot, self.mfn(to) << 12 & FRAME | bits)

    def store_entry(self, page: int, slot: int, value: int) -> None:
        where = (page << 12) + slot * 8
        self.attempt(lambda: self.board.guest.write(where, value.to_bytes(8, "little")))

    @rule(linear=_LINEAR, slot=_SLOTS, to=_TARGETS, bits=_BITS, size=st.sampled_from((1, 2, 4, 4, 8, 8)))
    def emulated_store(self, linear: int, slot: int, to: int | str, bits: int, size: int) -> None:
        value = (self.mfn(to) << 12 & FRAME | bits).to_bytes(8, "little")
        self.board.paging.emulate_store(linear + slot * 8, value[:size])
        self.board.paging.compare_exchange(linear + slot * 8, bytes(size), value[:size])

    @rule(slot=_SLOTS, to=_TARGETS, bits=_BITS, half=st.booleans(), same=st.booleans())
    def store_to_table(self, slot: int, to: int | str, bits: int, half: bool, same: bool) -> None:
        """A store to the guest's first table, which it maps read-only."""
        board, value = self.board, (self.mfn(to) << 12 & FRAME | bits).to_bytes(8, "little")
        where = (L1 << 12) + slot * 8
        if half:
            board.paging.emulate_store(where + 4, value[4:])
            board.paging.emulate_store(where, value[:4])
        else:
            old = board.get(L1, slot) if same else 0
            board.paging.compare_exchange(where, old.to_bytes(8, "little"), value)
        board.paging.emulate_store(where, value)

    @rule(table=st.sampled_from((L2, OTHER_L2, XEN_TABLE, DATA)), slot=st.integers(1, 5),
          of=st.sampled_from((L2, OTHER_L2, XEN_TABLE, DATA)), bits=st.sampled_from((P, P, P | RW)))  # fmt: skip
    def linear(self, table: int, slot: int, of: int, bits: int) -> None:
        board = self.board
        self.attempt(lambda: board.update((board.at(table, slot), board.entry(of, bits))))

    @rule(page=st.integers(DATA, PAGES - 1), entries=st.lists(st.tuples(_SLOTS, _PAGES, _BITS), max_size=4))
    def clear_and_fill(self, page: int, entries: list[tuple[int, int, int]]) -> None:
        board = self.board
        self.attempt(lambda: board.extended(ExtendedOp(MmuExt.CLEAR_PAGE, board.mfns[page])))
        for slot, to, bits in entries:
            self.store_entry(page, slot, board.entry(to, bits))

    @rule(
        command=st.one_of(st.integers(0, 4), st.integers(0, 21)), to=_TARGETS,
        second=st.one_of(st.integers(0, 8193), st.sampled_from((SPOKEN, 5))),
    )  # fmt: skip
    def extended(self, command: int, to: int | str, second: int) -> None:
        self.attempt(lambda: self.board.extended(ExtendedOp(command, self.mfn(to) & 0xFFFFFFFF, second)))

    @rule(to=_TARGETS, source=_TARGETS)
    def copy_page(self, to: int | str, source: int | str) -> None:
        frame, other = self.mfn(to) & 0xFFFFFFFF, self.mfn(source) & 0xFFFFFFFF
        self.attempt(lambda: self.board.extended(ExtendedOp(MmuExt.COPY_PAGE, frame, other)))

    @rule(page=_PAGES, level=st.sampled_from((MmuExt.PIN_L1_TABLE, MmuExt.PIN_L2_TABLE, MmuExt.PIN_L3_TABLE)))
    def pin(self, page: int, level: MmuExt) -> None:
        """The page is made read-only first, as a kernel does."""
        board = self.board
        self.attempt(lambda: board.paging.update_va_mapping(board.guest, page << 12, board.entry(page, P), 0))
        self.attempt(lambda: board.extended(ExtendedOp(level, board.mfns[page])))

    @rule(page=_TABLE_PAGES)
    def new_base(self, page: int) -> None:
        self.attempt(lambda: self.board.extended(ExtendedOp(MmuExt.NEW_BASEPTR, self.board.mfns[page])))

    @rule(page=st.integers(0, 7))
    def unpin(self, page: int) -> None:
        self.attempt(lambda: self.board.extended(ExtendedOp(MmuExt.UNPIN_TABLE, self.board.mfns[page])))

    @rule(pages=st.lists(_SEGMENT_PAGES, max_size=3), entries=st.integers(0, 1600))
    def set_gdt(self, pages: list[int], entries: int) -> None:
        board = self.board
        for page in pages:
            value = board.entry(page, P)
            self.attempt(
                lambda page=page, value=value: board.paging.update_va_mapping(
                    board.guest, page << 12, value, 0
                )
            )
        self.attempt(lambda: board.set_gdt([board.mfns[page] for page in pages] + [0] * 14, entries))

    @rule(page=_SEGMENT_PAGES, entries=st.integers(0, 1600), offset=st.integers(0, 13000))
    def set_ldt(self, page: int, entries: int, offset: int) -> None:
        board = self.board
        self.attempt(lambda: board.paging.update_va_mapping(board.guest, page << 12, board.entry(page, P), 0))
        self.attempt(lambda: board.extended(ExtendedOp(MmuExt.SET_LDT, page << 12, entries)))
        board.paging.map_ldt_page(offset)

    @rule(page=_SEGMENT_PAGES, slot=_SLOTS, descriptor=_DESCRIPTORS, off=st.sampled_from((0, 0, 0, 4)))
    def update_descriptor(self, page: int, slot: int, descriptor: int, off: int) -> None:
        board = self.board
        self.attempt(lambda: board.paging.update_descriptor(board.at(page, slot) + off, descriptor))

    @rule(page=_SEGMENT_PAGES, slot=_SLOTS, descriptor=_DESCRIPTORS)
    def store_descriptor(self, page: int, slot: int, descriptor: int) -> None:
        self.store_entry(page, slot, descriptor)

    @rule(
        command=st.sampled_from((MemoryOp.INCREASE_RESERVATION, MemoryOp.DECREASE_RESERVATION,
                                 MemoryOp.DECREASE_RESERVATION, MemoryOp.POPULATE_PHYSMAP)),
        tos=st.lists(_TARGETS, min_size=1, max_size=3), order=st.sampled_from((0, 0, 0, 1, 2, 10)),
    )  # fmt: skip
    def reserve(self, command: MemoryOp, tos: list[int | str], order: int) -> None:
        board = self.board
        reservation = Reservation(SPOKEN + 64, len(tos), order, 0, DOMID_SELF)
        words = b"".join((self.mfn(to) & 0xFFFFFFFF).to_bytes(4, "little") for to in tos)
        board.say(bytes(reservation).ljust(64, b"\0") + words)
        self.attempt(lambda: board.paging.memory_op(board.guest, command, SPOKEN))

    @rule(
        tos=st.lists(_TARGETS, min_size=1, max_size=4), orders=st.tuples(*[st.sampled_from((0, 0, 1, 2))] * 2)
    )
    def exchange(self, tos: list[int | str], orders: tuple[int, int]) -> None:
        board = self.board
        given, wanted = orders
        frames = len(tos) << given
        out = frames >> wanted
        data = bytes(Reservation(SPOKEN + 64, len(tos), given, 0, DOMID_SELF))
        data += bytes(Reservation(SPOKEN + 128, out, wanted, 0, DOMID_SELF)) + bytes(4)
        words = b"".join((self.mfn(to) & 0xFFFFFFFF).to_bytes(4, "little") for to in tos)
        board.say(data.ljust(64, b"\0") + words.ljust(64, b"\0") + bytes(64))
        self.attempt(lambda: board.paging.memory_op(board.guest, MemoryOp.EXCHANGE, SPOKEN))

    @invariant()
    def holds(self) -> None:
        self.board.check()


AnyGuest.TestCase.settings = settings(
    deadline=None, max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
TestAnyGuest = AnyGuest.TestCase


# Each rule


def refused(errno: Errno, board: Board) -> _Refusal:
    """The call in the block gets this error, and leaves the domain as it was but for what was done before it."""
    return _Refusal(errno, board)


class _Refusal:
    def __init__(self, errno: Errno, board: Board) -> None:
        self._errno, self._board = errno, board

    def __enter__(self) -> None:
        self._board.check()

    def __exit__(self, kind: type | None, error: BaseException | None, _trace: object) -> bool:
        assert isinstance(error, Refused), error
        assert error.errno == self._errno, error
        self._board.check()
        return True


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.check()


def op(command: MmuExt, arg1: int = 0, arg2: int = 0) -> ExtendedOp:
    return ExtendedOp(command, arg1, arg2)


def read_only(board: Board, *pages: int) -> None:
    for page in pages:
        board.update((board.at(L1, page), board.entry(page, P | US)))


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


# Descriptors

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


# Reservations


def reserve(
    board: Board, command: int, extents: list[int], order: int = 0, domid: int = DOMID_SELF
) -> list[int]:
    """The result, and the extents afterwards."""
    reservation = bytes(Reservation(SPOKEN + 64, len(extents), order, 0, domid))
    board.say(reservation.ljust(64, b"\0") + b"".join(word.to_bytes(4, "little") for word in extents))
    result = board.paging.memory_op(board.guest, command, SPOKEN)
    board.check()
    return [result, *struct.unpack(f"<{len(extents)}I", board.spoken[64 : 64 + 4 * len(extents)])]


def test_memory_goes_and_comes(board: Board) -> None:
    """A frame that is given up is free when nothing maps it; populate_physmap gives others, zeroed and entered."""
    held, gone = board.mfns[DATA], board.mfns[DATA + 1]
    board.update((board.at(L1, DATA + 1), 0))
    assert reserve(board, MemoryOp.DECREASE_RESERVATION, [gone, held, gone])[0] == 2
    assert board.frames.owners[gone] != DOMAIN and board.frames.owners[held] == DOMAIN
    assert board.paging.domain.area.physical(gone) == 0xFFFF_FFFF
    board.update((board.at(L1, DATA), 0))
    board.check()
    assert board.frames.owners[held] != DOMAIN
    result, one, two = reserve(board, MemoryOp.POPULATE_PHYSMAP, [DATA, DATA + 1])
    assert result == 2 and board.paging.domain.area.physical(two) == DATA + 1
    assert board.update((board.at(L1, DATA), one << 12 | P | RW)) == 0


def test_a_domain_has_its_maximum(board: Board) -> None:
    """What goes past it is not done: the result says how many were."""
    assert reserve(board, MemoryOp.INCREASE_RESERVATION, [0] * 30)[0] == 20
    assert reserve(board, MemoryOp.POPULATE_PHYSMAP, [0] * 3)[0] == 0
    board.say(struct.pack("<H", DOMID_SELF))
    assert [board.paging.memory_op(board.guest, op, SPOKEN) for op in (3, 4, 14)] == [60, 60, 59]


def test_extents_that_are_refused(board: Board) -> None:
    """Another's frame, too high an order, another domain, an address that is not there: none is done, no error."""
    for extents, order, domid in (
        ([xens(board)], 0, DOMID_SELF), ([0xB8], 0, DOMID_SELF), ([0xFFFF_FFFF], 0, DOMID_SELF),
        ([board.mfns[DATA]], 10, DOMID_SELF), ([board.mfns[DATA]], 0, 7),
    ):  # fmt: skip
        assert reserve(board, MemoryOp.DECREASE_RESERVATION, extents, order, domid)[0] == 0
    assert board.paging.memory_op(board.guest, MemoryOp.DECREASE_RESERVATION, 0x5000_0000) == 0
    assert reserve(board, MemoryOp.INCREASE_RESERVATION | 3 << 6, [0] * 2)[0] == 3


def test_extents_of_a_higher_order_are_in_a_row(board: Board) -> None:
    """An extent of order n is 2^n frames, aligned."""
    result, first = reserve(board, MemoryOp.POPULATE_PHYSMAP, [1000], 3)
    assert result == 1 and not first % 8
    assert [board.paging.domain.area.physical(first + i) for i in range(8)] == list(range(1000, 1008))


def exchange(board: Board, frames: list[int], given: int, wanted: int) -> tuple[int, list[int]]:
    data = bytes(Reservation(SPOKEN + 64, len(frames), given, 0, DOMID_SELF))
    count = (len(frames) << given) >> wanted
    data += bytes(Reservation(SPOKEN + 128, count, wanted, 0, DOMID_SELF)) + bytes(4)
    words = b"".join(word.to_bytes(4, "little") for word in frames)
    board.say(
        data.ljust(64, b"\0")
        + words.ljust(64, b"\0")
        + b"".join(struct.pack("<I", 500 + i) for i in range(count))
    )
    result = board.paging.memory_op(board.guest, MemoryOp.EXCHANGE, SPOKEN)
    return result, list(struct.unpack(f"<{count}I", board.spoken[128 : 128 + 4 * count]))


def exchanged(board: Board) -> int:
    return int.from_bytes(board.spoken[EXCHANGED_OFFSET:EXCHANGE_SIZE], "little")


def test_frames_are_exchanged_for_others(board: Board) -> None:
    """Four frames that nothing uses, for one extent of four: the old ones are free, the new one is entered."""
    given = board.mfns[DATA : DATA + 4]
    board.update(*((board.at(L1, DATA + i), 0) for i in range(4)))
    result, [first] = exchange(board, given, 0, 2)
    board.check()
    assert result == 0 and not first % 4 and exchanged(board) == 4
    assert board.paging.domain.area.physical(first + 3) == 503


def test_an_exchange_that_is_refused_leaves_the_frames(board: Board) -> None:
    """A frame in use is EINVAL, and the domain has what it had; `nr_exchanged` says how far it came."""
    frames = board.mfns[DATA : DATA + 4]
    board.update(*((board.at(L1, DATA + i), 0) for i in range(3)))
    with refused(Errno.EINVAL, board):
        exchange(board, frames, 0, 2)
    assert exchanged(board) == 0 and all(board.frames.owners[mfn] == DOMAIN for mfn in frames)
    with refused(Errno.EINVAL, board):
        exchange(board, [board.shared], 0, 0)
    with refused(Errno.EPERM, board):
        exchange(board, frames, 10, 0)


QUESTIONS = (
    (MemoryOp.MAXIMUM_RAM_PAGE, b"", 1024),
    (MemoryOp.MAXIMUM_RAM_PAGE | 1 << 6, b"", Errno.EINVAL),
    (MemoryOp.CURRENT_RESERVATION, struct.pack("<H", DOMAIN), PAGES),
    (MemoryOp.CURRENT_RESERVATION, struct.pack("<H", 7), Errno.ESRCH),
    (MemoryOp.MEMORY_MAP, struct.pack("<II", 5, SPOKEN + 64), Errno.ENOSYS),
    (MemoryOp.MACHINE_MEMORY_MAP, b"", Errno.EPERM),
    (MemoryOp.ADD_TO_PHYSMAP, struct.pack("<HHIII", DOMID_SELF, 0, 0, 0, 0), Errno.EACCES),
    (MemoryOp.ADD_TO_PHYSMAP, struct.pack("<HHIII", DOMID_SELF, 0, 4, 0, 0), Errno.ENOSYS),
    (MemoryOp.REMOVE_FROM_PHYSMAP, struct.pack("<HxxI", DOMID_SELF, 0), Errno.EACCES),
    (60, b"", Errno.ENOSYS),
)


@pytest.mark.parametrize(("command", "argument", "answer"), QUESTIONS)
def test_questions_about_memory(board: Board, command: int, argument: bytes, answer: int | Errno) -> None:
    """Each has its answer, or Xen's error for a domain without privileges."""
    where = board.say(argument)
    if isinstance(answer, Errno):
        with refused(answer, board):
            board.paging.memory_op(board.guest, command, where)
    else:
        assert board.paging.memory_op(board.guest, command, where) == answer


def test_where_the_machine_to_physical_table_is(board: Board) -> None:
    """XENMEM_machphys_mapping: start, end, and the last frame that it could have."""
    assert board.paging.memory_op(board.guest, MemoryOp.MACHPHYS_MAPPING, SPOKEN) == 0
    assert struct.unpack("<III", board.spoken[:12]) == (0xF580_0000, 0xF680_0000, (16 << 20) // 4 - 1)


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
