"""What a loader hands to the machine: bytes at physical addresses, and the registers at entry.

Every format ends here, so that the machine and the monitors know one kind of guest. The hard part is
trust: the numbers in an image come from a file, and `check` is the one place that decides that they may
be used as addresses, whatever the format they came in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from vmm.errors import ImageError
from vmm.image.xen import XenGuest

ADDRESS_SPACE = 1 << 32
LOWEST = 0x1000  # the page below holds what a loader leaves there, the first GDT among it
HOLE_START, HOLE_END = 0xA0000, 0x100000  # video memory and ROM of a PC: no RAM for an image
DEFAULT_LOAD = HOLE_END
AVAILABLE, RESERVED = 1, 2  # kinds of memory, by the numbers of the BIOS's map and of multiboot's


@dataclass(frozen=True, slots=True)
class SourceLine:
    """The bytes at `address`, `size` of them, were written by `text`, line `line` (from 1) of `file`."""

    address: int
    size: int
    file: str
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Segment:
    """`size` bytes at physical `address`: `data`, then zeroes (`size >= len(data)`)."""

    address: int
    data: bytes
    size: int

    @property
    def end(self) -> int:
        """The first address past it."""
        return self.address + self.size

    def __str__(self) -> str:
        return f"{self.address:#x}..{self.end:#x}"


@dataclass(frozen=True)
class Image:
    """A guest, ready to be put into memory and started at `entry`.

    `registers` are the general registers that its boot protocol fills, by name (`eax`), the others being 0;
    `selectors` are those by which it finds the flat code and data segments in the GDT. One for Xen's interface has
    `xen`; its addresses are virtual, and who builds its domain puts it and the `module` beside it into memory.
    """

    name: str
    segments: tuple[Segment, ...]
    entry: int
    registers: Mapping[str, int] = field(default_factory=dict)
    selectors: tuple[int, int] = (0x08, 0x10)
    symbols: dict[str, int] = field(default_factory=dict)
    lines: tuple[SourceLine, ...] = ()
    xen: XenGuest | None = None
    command_line: str = ""
    module: bytes = b""


def memory_map(memory: int) -> tuple[tuple[int, int, int], ...]:
    """Base, length and kind of each region of a PC with `memory` bytes of RAM, as firmware tells it."""
    regions = [(0, min(memory, HOLE_START), AVAILABLE), (HOLE_START, HOLE_END - HOLE_START, RESERVED)]
    if memory > HOLE_END:
        regions.append((HOLE_END, memory - HOLE_END, AVAILABLE))
    return tuple(regions)


def size_text(size: int) -> str:
    """A byte count for people: `16M`, `64K`, `1234 bytes`."""
    for shift, unit in ((30, "G"), (20, "M"), (10, "K")):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return f"{size} bytes"


def check_xen(name: str, segments: Iterable[Segment], guest: XenGuest, memory: int) -> tuple[Segment, ...]:
    """The same for a Xen guest, whose segments have virtual addresses."""
    placed = tuple(sorted((s for s in segments if s.size), key=lambda s: s.address))
    if not placed:
        raise ImageError(f"{name}: nothing to load: the image has no bytes for memory")
    low, high = placed[0].address, placed[-1].end
    for below, above in pairwise(placed):
        if above.address < below.end:
            raise ImageError(f"{name}: {below} and {above} overlap: an image may fill each address once")
    if low < guest.virt_base or high > ADDRESS_SPACE:
        raise ImageError(
            f"{name}: its image {low:#x}..{high:#x} does not lie above its virtual base {guest.virt_base:#x}: "
            "correct the notes VIRT_BASE and PADDR_OFFSET, or the link addresses"
        )
    if high - guest.virt_base > memory:
        raise ImageError(
            f"{name}: {low:#x}..{high:#x}, mapped from {guest.virt_base:#x} on, does not fit in "
            f"{size_text(memory)} of memory: give more with -m"
        )
    for what, address in (("entry point", guest.entry), ("hypercall page", guest.hypercall_page)):
        if address is not None and not low <= address < high:
            raise ImageError(f"{name}: its {what} {address:#x} does not lie in its image: correct the note")
    return placed


def check(name: str, segments: Iterable[Segment], entry: int, memory: int) -> tuple[Segment, ...]:
    """The segments that hold anything, by address; `ImageError` unless all fit `memory` bytes of a PC's RAM.

    Nothing is allocated before the sizes are known to be sane, so a file cannot ask for gigabytes of zeroes.
    """
    placed = tuple(sorted((s for s in segments if s.size), key=lambda s: s.address))
    if not placed:
        raise ImageError(f"{name}: nothing to load: the image has no bytes for memory")
    for segment in placed:
        if segment.end > ADDRESS_SPACE:
            raise ImageError(
                f"{name}: {segment.size:#x} bytes at {segment.address:#x} reach past 4 GiB: link it lower"
            )
        if segment.end > memory:
            raise ImageError(
                f"{name}: {segment} does not fit in {size_text(memory)} of memory: "
                f"give at least {size_text(-(-segment.end // (1 << 20)) << 20)} with -m, or link it lower"
            )
        if segment.address < LOWEST:
            raise ImageError(
                f"{name}: {segment} covers the first page of memory, which belongs to the boot loader: "
                f"load it at {LOWEST:#x} or above"
            )
        if segment.address < HOLE_END and segment.end > HOLE_START:
            raise ImageError(
                f"{name}: {segment} overlaps the video and ROM area {HOLE_START:#x}..{HOLE_END:#x}, "
                f"where there is no RAM: load it at {DEFAULT_LOAD:#x} or above"
            )
    for below, above in pairwise(placed):
        if above.address < below.end:
            raise ImageError(f"{name}: {below} and {above} overlap: an image may fill each address once")
    if not any(segment.address <= entry < segment.end for segment in placed):
        raise ImageError(f"{name}: the entry point {entry:#x} lies in no loaded segment: correct the entry")
    return placed
