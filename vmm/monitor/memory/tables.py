"""The guest's page tables, and what has been derived from each of their words.

A guest's table of 1,024 words of 32 bits becomes two shadow tables of 512 entries. A frame may serve as a table,
as a directory, or as both (a directory that maps itself), so one `GuestTable` stands for the frame in all its
roles. What its words say together with its place is not needed: rights of the directory's entry stay in the
shadow's upper level, so that one pair of shadow tables serves every directory that names the frame.

A table is *in sync* while no store reaches it without notice: its shadow entries are what its words say. At the
first store it goes *out of sync*, and stays so: the guest writes freely, as a processor's TLB would let it, and
`derived` keeps the words that the shadow entries were made from. Where the guest must see its stores (CR3,
INVLPG, CR0, CR4), the two are compared and what differs is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vmm.machine.memory import PAGE, Memory

_CHUNK = 256
NOBODY = -1


@dataclass(eq=False, slots=True)
class Root:
    """The shadow of one page directory: `top` is the index of its four top entries in the pool.

    `directories` are the indices of its upper tables, NOBODY where there is none yet.
    """

    key: int
    top: int
    directories: list[int] = field(default_factory=lambda: [NOBODY] * 4)
    code: dict[int, int] = field(default_factory=dict)  # frames of code, by linear page number
    # A number that `ShadowMemory.vouch` was given, until one of these (frame, word) of the guest's tables changes.
    vouched: int = -1
    relied_on: set[tuple[int, int]] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class GuestTable:
    """A frame that holds page tables of the guest's."""

    frame: int
    halves: list[int] = field(default_factory=lambda: [NOBODY] * 2)  # as a table: its shadows in the pool
    root: Root | None = None  # as a directory
    users: set[Root] = field(default_factory=set)  # roots that it may be reached from
    derived: bytearray | None = None  # None while it is in sync
    words: memoryview | None = None  # the same as 32-bit words

    def let_go(self, memory: Memory) -> None:
        """Out of sync from now on."""
        self.derived = bytearray(memory.bytes[self.frame : self.frame + PAGE])
        self.words = memoryview(self.derived).cast("I")

    def changes(self, memory: Memory) -> Iterator[int]:
        """Indices of the words that are no longer what was derived from; afterwards they count as such."""
        derived, start = self.derived, self.frame
        if derived is None:
            return
        now = bytes(memory.bytes[start : start + PAGE])
        if now == derived:
            return
        words, theirs = self.words, memoryview(now).cast("I")
        assert words is not None
        for at in range(0, PAGE, _CHUNK):
            if now[at : at + _CHUNK] != derived[at : at + _CHUNK]:
                for i in range(at // 4, (at + _CHUNK) // 4):
                    if words[i] != theirs[i]:
                        words[i] = theirs[i]
                        yield i
