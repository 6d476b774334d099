"""A domain for tests of direct paging: memory, frames, first tables; and what its counts must be, counted afresh.

The domain has its pseudo-physical pages at linear addresses from 0 on, `pfn << 12`, each writable but for its page
tables. What it says in a hypercall lies outside of them, where no hypercall can take it away.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.paravirt_recount import Recount
from vmm.isa.words import CR0, CR4, PaeEntry
from vmm.machine.memory import PAGE, Memory
from vmm.machine.paging import PageFault, walk
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import (
    DOMID_SELF,
    DOMID_XEN,
    HYPERVISOR_VIRT_START,
    ExtendedOp,
    MmuExt,
    Update,
)
from vmm.monitor.paravirt.frames import (
    MachineFrames,
)
from vmm.monitor.paravirt.mmu import DirectPaging

P, RW, US, A, D, PS, NX = (
    int(PaeEntry.P), int(PaeEntry.RW), int(PaeEntry.US), int(PaeEntry.A), int(PaeEntry.D), int(PaeEntry.PS),
    int(PaeEntry.NX),
)  # fmt: skip
FRAME = int(PaeEntry.FRAME)
DOMAIN = 1
MEMORY = 4 << 20
L3, L2, XEN_TABLE, L1 = range(4)  # pseudo-physical pages of the first tables
OTHER_L3, OTHER_L2, OTHER_XEN_TABLE, OTHER_L1 = range(
    4, 8
)  # of others that are ready to be used, but are not
DATA = 8  # of the first page that is none
PAGES = 40
SPOKEN = 0xE000_0000  # what a hypercall points at
DONE = SPOKEN + 0x7000
MAX_PAGES = 60


@dataclass
class Guest:
    """`GuestMemory` by the domain's own tables, as ring 1 has them."""

    board: Board

    def _physical(self, address: int, write: bool) -> int:
        if address >= HYPERVISOR_VIRT_START:
            raise Refused(Errno.EFAULT, "the hypervisor's area")
        try:
            return self.board.walk(address, write=write) | address & 0xFFF
        except PageFault:
            raise Refused(Errno.EFAULT, f"{address:#x}") from None

    def read(self, address: int, size: int) -> bytes:
        if address >= SPOKEN and address + size <= SPOKEN + len(self.board.spoken):
            return bytes(self.board.spoken[address - SPOKEN : address - SPOKEN + size])
        found = bytearray()
        while len(found) < size:
            here = address + len(found)
            length = min(size - len(found), PAGE - here % PAGE)
            at = self._physical(here, False)
            found += self.board.memory.bytes[at : at + length]
        return bytes(found)

    def write(self, address: int, data: bytes) -> None:
        if address >= SPOKEN and address + len(data) <= SPOKEN + len(self.board.spoken):
            self.board.spoken[address - SPOKEN : address - SPOKEN + len(data)] = data
            return
        while data:
            length = min(len(data), PAGE - address % PAGE)
            self.board.memory.load(self._physical(address, True), data[:length])
            address, data = address + length, data[length:]


@dataclass
class Board:
    """The domain. `mfns` are its frames by pseudo-physical page."""

    memory: Memory = field(default_factory=lambda: Memory(MEMORY))
    mfns: list[int] = field(default_factory=list)
    spoken: bytearray = field(default_factory=lambda: bytearray(0x8000))
    flushes: int = 0
    # What a TLB could still hold: writable translations, linear page number to frame, since the last flush.
    tlb: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.frames = MachineFrames(self.memory)
        self.paging = DirectPaging(
            self.memory,
            self.frames,
            DOMAIN,
            max_pages=MAX_PAGES,
            flush=self._flush,
            invalidate=self._invalidate,
        )
        self.guest = Guest(self)
        self.shared = self.paging.share_frame(writable=True)
        self.mfns = [self.paging.hand_frame(pfn) for pfn in range(PAGES)]
        for root in (L3, OTHER_L3):
            self.put(root, 0, self.entry(root + L2, P))
            self.put(root, 3, self.entry(root + XEN_TABLE, P))
            self.put(root + L2, 0, self.entry(root + L1))
            for pfn in range(PAGES):
                self.put(root + L1, pfn, self.entry(pfn, P | US if pfn < DATA else P | RW | US))
        self.paging.start(self.mfns[L3])
        self.paging.vm_assist(0, 2)
        self.look()

    def _flush(self) -> None:
        self.flushes += 1
        self.tlb.clear()

    def _invalidate(self, linear: int) -> None:
        self.tlb = {entry for entry in self.tlb if entry[0] != linear >> 12}

    def entry(self, pfn: int, bits: int = P | RW | US) -> int:
        return self.mfns[pfn] << 12 | bits

    def put(self, table: int, slot: int, value: int) -> None:
        """Store an entry as the domain's builder does, unchecked."""
        self.memory.write(self.at(table, slot), 8, value)

    def at(self, table: int, slot: int) -> int:
        """Machine address of an entry of a table that is the domain's page `table`."""
        return (self.mfns[table] << 12) + slot * 8

    def get(self, table: int, slot: int) -> int:
        return self.memory.quads[self.at(table, slot) >> 3]

    def walk(self, address: int, *, write: bool = False, user: bool = False) -> int:
        """The frame's address, as the processor finds it."""
        return walk(
            self.memory, CR0.PG | CR0.PE | CR0.WP, self.paging.base << 12, CR4.PAE, 0xFFFFFFFF, address,
            write=write, user=user, no_execute=True, mark=False,
        ).frame  # fmt: skip

    # Hypercalls

    def say(self, data: bytes) -> int:
        """Put what a hypercall points at where it can read it; the address."""
        self.spoken[: len(data)] = data
        return SPOKEN

    @property
    def done(self) -> int:
        """What the last batch said that it had done."""
        return int.from_bytes(self.guest.read(DONE, 4), "little")

    def update(self, *updates: tuple[int, int], foreign: int = DOMID_SELF) -> int:
        data = b"".join(bytes(Update(ptr, value)) for ptr, value in updates)
        return self.paging.mmu_update(self.guest, self.say(data), len(updates), DONE, foreign)

    def extended(self, *operations: ExtendedOp, foreign: int = DOMID_SELF) -> int:
        data = b"".join(bytes(operation) for operation in operations)
        return self.paging.mmuext_op(self.guest, self.say(data), len(operations), DONE, foreign)

    def set_gdt(self, mfns: list[int], entries: int) -> int:
        data = b"".join(mfn.to_bytes(4, "little") for mfn in mfns)
        return self.paging.set_gdt(self.guest, self.say(data), entries)

    # What must be true

    @property
    def recount(self) -> Recount:
        return Recount(self.memory, self.frames, self.paging)

    def check_counts(self) -> None:
        """Every count and every role is what a fresh count finds."""
        self.recount.check_counts()

    def writable(self) -> set[tuple[int, int]]:
        """Linear page and frame of all that ring 1 could store to, by the entries alone."""
        return self.recount.writable()

    def look(self) -> None:
        """Let the TLB have everything that it could have taken up by now."""
        self.tlb |= self.writable()

    def check_containment(self) -> None:
        """Nothing that the domain can store to, or that its TLB still lets it, is a table, or another's."""
        self.look()
        self.recount.check_containment(self.tlb)

    def check(self) -> None:
        self.check_counts()
        self.check_containment()


def xens(board: Board) -> int:
    """A frame of the hypervisor's."""
    return next(mfn for mfn in range(board.frames.size) if board.frames.owners[mfn] == DOMID_XEN)


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


def op(command: MmuExt, arg1: int = 0, arg2: int = 0) -> ExtendedOp:
    return ExtendedOp(command, arg1, arg2)


def read_only(board: Board, *pages: int) -> None:
    for page in pages:
        board.update((board.at(L1, page), board.entry(page, P | US)))
