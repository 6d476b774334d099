"""Units: runs of translated code, and what is known of every byte of them.

A unit is divided into *pieces*. Each piece stands for one guest instruction, but for the monitor's own: the check
of a unit on a page that changes, and the stubs at the end where links come out whose target has no translation
yet. EIP at the start of a piece is a guest state; inside one it is not, and the monitor completes or undoes it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from vmm.isa.decode import Instruction, decode
from vmm.monitor.translator.emitter import Context, Link, Prediction
from vmm.monitor.translator.rows import Row


class Kind(Enum):
    """What a piece is, where it is not a copy."""

    SEQUENCE = auto()
    CALL_OUT = auto()
    UNDEFINED = auto()  # no instruction: #UD
    STUB = auto()  # comes out of a link without a translation
    LANDING = auto()  # where a RET arrives, or finds that nobody has prepared for it
    CHECK = auto()  # compares the source with what was translated


class Landing(NamedTuple):
    """Where a RET to guest `eip` arrives: at `start`, and from the displacement at `miss` on if it is not its own."""

    eip: int
    start: int
    miss: int


@dataclass(slots=True)
class Piece:
    """What is special about a piece: by default it is a copy of its guest instruction."""

    kind: Kind
    row: Row | None = None
    guest: bytes = b""  # the guest's instruction, if it is one,
    eip: int = 0  # and where that is
    clobbered: Sequence[tuple[int, int]] = ()
    resume: int | None = None  # where the guest's own instruction lies, for the CPU to execute
    link: Link | None = None
    prediction: Prediction | None = None
    landing: int | None = None  # where a RET arrives that belongs to this CALL

    @property
    def instruction(self) -> Instruction | None:
        """The guest's instruction."""
        return decode(self.guest, self.eip) if self.guest else None

    @property
    def is_prepared(self) -> bool:
        """Whether the monitor makes ready for the guest's own instruction, at `resume`."""
        return self.row is not None and self.row.prepared

    def lost(self, offset: int) -> int:
        """The registers that are in the scratch page when EIP is at this offset in the cache."""
        mask = 0
        for start, clobbered in self.clobbered:
            if start <= offset:
                mask = clobbered
        return mask


@dataclass(slots=True, eq=False)
class Unit:
    """`starts[k]` is the offset in the cache of piece k, `eips[k]` the guest EIP there.

    Pieces `first` to `last - 1` are guest instructions. `sources` are (physical address, size) of the bytes that
    were translated, one or two; `pages` the linear pages they were seen at.
    """

    context: Context
    eip: int
    origin: int
    first: int = 0
    last: int = 0
    size: int = 0
    starts: list[int] = field(default_factory=list)
    eips: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # of the guest instructions
    special: dict[int, Piece] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    landings: list[Landing] = field(default_factory=list)
    after_sti: set[int] = field(default_factory=set)  # pieces that are in the shadow of STI
    sites: list[int] = field(default_factory=list)  # offsets of what the machine may have to execute itself
    sources: list[tuple[int, int]] = field(default_factory=list)
    checked: list[tuple[int, bytes]] = field(
        default_factory=list
    )  # the same with the bytes, if it has a check
    pages: tuple[int, ...] = ()
    transit: bool = False  # on the way of a RET: EIP in it is never a guest state
    uses_gdtr: bool = False
    dead: bool = False

    def piece_at(self, offset: int) -> int:
        return bisect_right(self.starts, offset) - 1

    def started(self, start: int, end: int) -> int:
        """How many guest instructions begin in these bytes of the cache."""
        low = max(bisect_left(self.starts, start), self.first)
        return max(0, min(bisect_left(self.starts, end), self.last) - low)

    def completed(self, start: int, end: int) -> int:
        """How many of those that begin from `start` on have been executed when EIP is `end`."""
        low = max(bisect_left(self.starts, start), self.first)
        return max(0, min(bisect_right(self.starts, end) - 1, self.last) - low)
