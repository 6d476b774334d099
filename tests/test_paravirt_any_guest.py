"""Direct paging: no sequence of hypercalls gets a guest what is not its own; every count is right at every step."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.paravirt_memory import (
    DATA,
    FRAME,
    L1,
    L2,
    NX,
    OTHER_L2,
    PAGES,
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
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import (
    DOMID_SELF,
    ExtendedOp,
    MemoryOp,
    MmuExt,
    Reservation,
)
from vmm.monitor.paravirt.area import FIRST_SLOT

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
