"""The Multiboot contract (version 0.6.96): the header in a guest, and what the boot loader leaves in memory.

All three formats start the way that a multiboot loader starts a kernel, so a guest cannot tell whether it
came as source, ELF or flat binary, nor whether QEMU's `-kernel` or we loaded it. The hard part is that the
information structure must lie in RAM that the guest was not promised to find empty: it is put into the
last page below the extended BIOS data area of a PC, at `INFO_ADDRESS`, where no image may be loaded.

Source: Multiboot Specification 0.6.96, 3.1 (header), 3.2 (machine state), 3.3 (information).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vmm.errors import ImageError
from vmm.image.image import ADDRESS_SPACE, HOLE_END, HOLE_START, Segment, memory_map, size_text

HEADER_MAGIC = 0x1BADB002
BOOT_MAGIC = 0x2BADB002  # in EAX at entry
SEARCH = 8192  # the header lies wholly in so many first bytes of the file
MAGIC_BYTES = struct.pack("<I", HEADER_MAGIC)

FLAG_PAGE_ALIGN, FLAG_MEMORY, FLAG_VIDEO, FLAG_ADDRESSES = 1 << 0, 1 << 1, 1 << 2, 1 << 16
REQUIREMENTS = 0xFFFF  # a loader must refuse what it does not understand among these (3.1.2)
UNDERSTOOD = FLAG_PAGE_ALIGN | FLAG_MEMORY

INFO_ADDRESS = 0x9E000
INFO_END = 0x9F000
LOADER_NAME = b"vmm\0"
INFO_MEMORY, INFO_CMDLINE, INFO_MODULES, INFO_MMAP, INFO_LOADER_NAME = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
MODULE = struct.Struct("<4I")  # start, end, string, reserved
INFO_SIZE = 120  # the structure up to its framebuffer fields, rounded up
MODULE_ALIGN = 4096


@dataclass(frozen=True, slots=True)
class Module:
    """A file that is loaded beside the guest: its bytes, and the string that tells the guest of it."""

    data: bytes
    string: str


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header: its file offset, its flags, and the address fields (`None` unless bit 16 is set)."""

    offset: int
    flags: int
    addresses: Addresses | None


@dataclass(frozen=True, slots=True)
class Addresses:
    """The address fields of a header (3.1.3), which say where an image goes without any other format."""

    header: int
    load: int
    load_end: int  # 0: to the end of the file
    bss_end: int  # 0: no bss
    entry: int


@dataclass(frozen=True, slots=True)
class Placement:
    """`file_size` bytes from `offset` of the file go to `address`, zeroes follow up to `size`."""

    address: int
    offset: int
    file_size: int
    size: int
    entry: int


def header_bytes(flags: int) -> bytes:
    """A header without address fields, with its checksum."""
    return struct.pack("<III", HEADER_MAGIC, flags, -(HEADER_MAGIC + flags) % ADDRESS_SPACE)


def find_header(name: str, start: bytes) -> Header | None:
    """The header in the first bytes of a file, or None; `ImageError` if it asks for what we cannot give."""
    start = start[:SEARCH]
    at = start.find(MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= len(start):
            _, flags, checksum = struct.unpack_from("<III", start, at)
            if (HEADER_MAGIC + flags + checksum) % ADDRESS_SPACE == 0:
                return Header(at, flags, _addresses(name, start, at, flags))
        at = start.find(MAGIC_BYTES, at + 1)
    return None


def _addresses(name: str, start: bytes, at: int, flags: int) -> Addresses | None:
    if flags & FLAG_VIDEO:
        raise ImageError(
            f"{name}: the multiboot header at {at:#x} demands a video mode, and this machine has text only: "
            "clear bit 2 of its flags"
        )
    if unknown := flags & REQUIREMENTS & ~UNDERSTOOD:
        raise ImageError(
            f"{name}: the multiboot header at {at:#x} demands features {unknown:#x} that do not exist: "
            "clear these flags"
        )
    if not flags & FLAG_ADDRESSES:
        return None
    if at + 32 > len(start):
        raise ImageError(
            f"{name}: the multiboot header at {at:#x} is cut off before its address fields: "
            f"put all of it into the first {SEARCH} bytes of the file"
        )
    return Addresses(*struct.unpack_from("<5I", start, at + 12))


def place(name: str, header: Header, size: int) -> Placement:
    """Where the address fields of `header` put a file of `size` bytes (3.1.3)."""
    a = header.addresses
    if a is None:
        raise ImageError(f"{name}: the multiboot header has no address fields: set bit 16 and give them")
    where = f"{name}: the multiboot header at {header.offset:#x}"
    offset = header.offset - (a.header - a.load)
    if not a.load <= a.header or offset < 0:
        raise ImageError(
            f"{where} loads at {a.load:#x} and claims to lie at {a.header:#x}, which is not in the file: "
            "correct load_addr or header_addr"
        )
    if a.load_end and a.load_end < a.load:
        raise ImageError(f"{where} ends loading at {a.load_end:#x}, before it begins: correct load_end_addr")
    file_size = a.load_end - a.load if a.load_end else size - offset
    if offset + file_size > size:
        raise ImageError(
            f"{where} loads {file_size} bytes from offset {offset:#x}, but the file has only {size}: "
            "it is truncated, or load_end_addr is wrong"
        )
    if a.bss_end and a.bss_end < a.load + file_size:
        raise ImageError(f"{where} ends its bss at {a.bss_end:#x}, inside the image: correct bss_end_addr")
    total = a.bss_end - a.load if a.bss_end else file_size
    return Placement(a.load, offset, file_size, total, a.entry)


def place_modules(
    name: str, modules: Sequence[Module], image: Iterable[Segment], memory: int
) -> list[Segment]:
    """A segment a module, in their order, each on a page of its own above the image."""
    at = max([HOLE_END, *(segment.end for segment in image)])
    placed = []
    for module in modules:
        at = -(-at // MODULE_ALIGN) * MODULE_ALIGN
        segment = Segment(at, module.data, len(module.data))
        if segment.end > memory:
            raise ImageError(
                f"{name}: the module {module.string} at {segment} does not fit in {size_text(memory)} of memory: "
                f"give at least {size_text(-(-segment.end // (1 << 20)) << 20)} with -m"
            )
        placed.append(segment)
        at = segment.end
    return placed


def information(
    name: str,
    command_line: str,
    memory: int,
    modules: Sequence[Module] = (),
    placed: Sequence[Segment] = (),
) -> Segment:
    """The information structure with its memory map and strings, to be put at `INFO_ADDRESS` (3.3).

    The command line's first word is the image's name, as GRUB and QEMU have it. `memory` is bytes of RAM. `placed`
    says where each of `modules` lies.
    """
    strings = [_string(name, f"{name} {command_line}".rstrip() if command_line else name)]
    strings += [_string(name, module.string) for module in modules]
    regions = memory_map(memory)
    memory_regions = b"".join(struct.pack("<IQQI", 20, base, length, kind) for base, length, kind in regions)
    map_at = INFO_ADDRESS + INFO_SIZE
    modules_at = map_at + len(memory_regions)
    loader_at = modules_at + MODULE.size * len(modules)
    at = command_at = loader_at + len(LOADER_NAME)
    string_at = []
    for string in strings:
        string_at.append(at)
        at += len(string)
    if at > INFO_END:
        what = "command line has" if not modules else "and the modules' command lines have"
        raise ImageError(
            f"{name}: the guest's {what} {sum(map(len, strings)) - len(strings)} bytes, "
            f"{at - INFO_END} more than there is room for: shorten it"
        )
    if memory < INFO_END:
        raise ImageError(
            f"{name}: {size_text(memory)} of memory leave no room for the multiboot information at "
            f"{INFO_ADDRESS:#x}: give at least 1M with -m"
        )
    fixed = struct.pack(
        "<18I",
        INFO_MEMORY | INFO_CMDLINE | INFO_MODULES * bool(modules) | INFO_MMAP | INFO_LOADER_NAME,
        min(memory, HOLE_START) >> 10,
        max(0, min(memory, ADDRESS_SPACE) - HOLE_END) >> 10,
        0,  # boot_device: absent
        command_at,
        *((len(modules), modules_at) if modules else (0, 0)),
        *(0, 0, 0, 0),  # symbols: absent
        len(memory_regions),
        map_at,
        *(0, 0, 0),  # drives, ROM configuration: absent
        loader_at,
        0,  # APM: absent
    )
    table = [
        MODULE.pack(at.address, at.end, string, 0) for at, string in zip(placed, string_at[1:], strict=True)
    ]
    data = b"".join((fixed.ljust(INFO_SIZE, b"\0"), memory_regions, *table, LOADER_NAME, *strings))
    return Segment(INFO_ADDRESS, data, len(data))


def _string(name: str, text: str) -> bytes:
    """A C string for the guest."""
    data = text.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise ImageError(f"{name}: the guest's command line contains a NUL character: remove it")
    return data + b"\0"
