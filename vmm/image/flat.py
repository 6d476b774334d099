"""Flat binaries: bytes that go to one address as they are.

A flat file says nothing about itself, unless a multiboot header with address fields (bit 16) is in it:
then these fields place it, not the caller.
"""

from __future__ import annotations

from typing import BinaryIO

from vmm.errors import ImageError
from vmm.image import multiboot
from vmm.image.image import ADDRESS_SPACE, Image, Segment, check


def read(name: str, file: BinaryIO, size: int, memory: int, load: int, entry: int | None) -> Image:
    """The `size` bytes of `file` at `load`, started at `entry` (`load` if None)."""
    header = multiboot.find_header(name, file.read(multiboot.SEARCH))
    if header is not None and header.addresses is not None:
        if entry is not None:
            raise ImageError(f"{name}: its multiboot header gives the entry point: leave --entry out")
        return read_placed(name, file, multiboot.place(name, header, size), memory)
    for what, value in (("load address", load), ("entry point", entry)):
        if value is not None and not 0 <= value < ADDRESS_SPACE:
            raise ImageError(f"{name}: the {what} {value:#x} is not a 32-bit address: correct it")
    entry = load if entry is None else entry
    return read_placed(name, file, multiboot.Placement(load, 0, size, size, entry), memory)


def read_placed(name: str, file: BinaryIO, place: multiboot.Placement, memory: int) -> Image:
    """The part of `file` that `place` names; nothing is read before it is known to fit."""
    check(name, [Segment(place.address, b"", place.size)], place.entry, memory)
    file.seek(place.offset)
    data = file.read(place.file_size)
    if len(data) != place.file_size:
        raise ImageError(f"{name}: the file became shorter while it was read: try again")
    return Image(name, (Segment(place.address, data, place.size),), place.entry)
