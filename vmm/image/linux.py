"""Linux's boot protocol: a bzImage, its initial RAM disk and command line, put where the kernel looks for them.

The setup header at 0x1F1 of the file tells the loader what the kernel can bear; the loader answers in a copy of it
within the boot parameters ("zero page"), whose address the kernel gets in ESI. The 16-bit setup code of the file is
left out: it would ask a BIOS for the memory map, which the boot parameters hold already. The hard part is room: the
kernel unpacks itself in place, and says in `init_size` how much RAM from `pref_address` on that takes, which is much
more than the file; the initial RAM disk goes as high as it may, out of its way.

Source: Linux, Documentation/arch/x86/boot.rst (versions 2.06 to 2.15 of the protocol) and zero-page.rst.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from vmm.errors import ImageError
from vmm.image.image import ADDRESS_SPACE, HOLE_END, Image, Segment, check, memory_map, size_text

SIGNATURE_OFFSET = 0x202
SIGNATURE = b"HdrS"
HEADER_START = 0x1F1
HEADER_LEAST = 0x268  # the first byte past the fields of version 2.10
OLDEST = 0x0206  # cmdline_size is there from here on
SECTOR = 512
PARAGRAPH = 16

# Fields of the setup header, by their offset in the file and in the boot parameters alike.
SETUP_SECTS, SYSSIZE, VERSION, LOADFLAGS, CODE32_START = 0x1F1, 0x1F4, 0x206, 0x211, 0x214
TYPE_OF_LOADER, RAMDISK_IMAGE, RAMDISK_SIZE, CMD_LINE_PTR, INITRD_ADDR_MAX = 0x210, 0x218, 0x21C, 0x228, 0x22C
XLOADFLAGS, CMDLINE_SIZE, PREF_ADDRESS, INIT_SIZE = 0x236, 0x238, 0x258, 0x260
HEADER_JUMP = 0x201  # its displacement says where the header ends

# Fields of the boot parameters outside of the header.
SCREEN_INFO, ALT_MEM_K, E820_ENTRIES, E820_TABLE = 0x000, 0x1E0, 0x1E8, 0x2D0

LOADED_HIGH = 1 << 0  # loadflags: a bzImage
KERNEL_64 = 1 << 0  # xloadflags: it has a 64-bit entry, so it is made for x86-64
UNKNOWN_LOADER = 0xFF

PARAMETERS, COMMAND_LINE = 0x10000, 0x11000
PAGE = 4096
CODE, DATA = 0x10, 0x18  # __BOOT_CS and __BOOT_DS
DEFAULT_MEMORY = 128 << 20  # a distribution's kernel needs more than what suits a teaching guest

# What a BIOS leaves on a colour VGA: cursor 0, page 0, mode 3 of 80 columns; EGA memory; 25 lines; VGA; 16 points.
SCREEN = struct.pack("<BBHHBBHHHBBH", 0, 0, 0, 0, 3, 80, 0, 3, 0, 25, 1, 16)


@dataclass(frozen=True, slots=True)
class Setup:
    """What the loader needs of a setup header: sizes in bytes, physical addresses."""

    data: bytes  # the header itself, from `HEADER_START` on
    code_offset: int  # of the protected-mode code in the file
    code_size: int
    load: int
    room: int  # RAM from `load` on that the kernel needs to unpack itself
    highest_ramdisk: int  # the highest address of its last byte
    longest_command_line: int  # without the final zero


def is_kernel(start: bytes) -> bool:
    """Whether a file that starts so has a setup header."""
    return start[SIGNATURE_OFFSET : SIGNATURE_OFFSET + 4] == SIGNATURE and start[0x1FE:0x200] == b"\x55\xaa"


def read(
    name: str, file: BinaryIO, size: int, memory: int, command_line: str = "", ramdisk: bytes = b""
) -> Image:
    """The kernel in `file`, which has `size` bytes, ready to start on a machine of `memory` bytes.

    Raises `ImageError`: it is damaged or not for this machine, or there is no room for it, for the RAM disk or the
    command line.
    """
    setup = _setup(name, file.read(4096), size)
    arguments = _arguments(name, command_line, setup)
    kernel = Segment(setup.load, b"", setup.room)
    if memory < kernel.end <= ADDRESS_SPACE:
        raise ImageError(
            f"{name}: the kernel needs {kernel} to unpack itself, and there are {size_text(memory)} of memory: "
            f"give at least {size_text(-(-kernel.end >> 20) << 20)} with -m"
        )
    check(name, [kernel], kernel.address, memory)
    ramdisk_at = _place(name, ramdisk, kernel, setup, memory) if ramdisk else 0
    file.seek(setup.code_offset)
    code = file.read(setup.code_size)
    if len(code) != setup.code_size:
        raise ImageError(f"{name}: the file became shorter while it was read: try again")
    parameters = _parameters(setup, memory, ramdisk_at, len(ramdisk))
    segments = (
        Segment(setup.load, code, setup.room),
        Segment(PARAMETERS, parameters, len(parameters)),
        Segment(COMMAND_LINE, arguments, len(arguments)),
        Segment(ramdisk_at, ramdisk, len(ramdisk)),
    )
    placed = check(name, segments, setup.load, memory)
    return Image(name, placed, setup.load, registers={"esi": PARAMETERS}, selectors=(CODE, DATA))


def _setup(name: str, start: bytes, size: int) -> Setup:
    """Decode the header in the first bytes of a file of `size`."""

    def field(offset: int, kind: str) -> int:
        return int(struct.unpack_from(f"<{kind}", start, offset)[0])

    truncated = f"{name}: a truncated Linux kernel of {size} bytes"
    if len(start) < HEADER_LEAST:
        raise ImageError(f"{truncated}, cut off in its setup header: copy it again")
    version = field(VERSION, "H")
    what = f"{name}: a Linux kernel of boot protocol {version >> 8}.{version & 0xFF:02}"
    if version < OLDEST:
        raise ImageError(f"{what}, and 2.06 is the oldest that is known here: take Linux 2.6.22 or later")
    if not start[LOADFLAGS] & LOADED_HIGH:
        raise ImageError(f"{what} that loads below 1 MiB (zImage): build it as a bzImage")
    if version >= 0x020C and field(XLOADFLAGS, "H") & KERNEL_64:
        raise ImageError(f"{what} for x86-64: this machine has no 64-bit mode; take one built for i386")
    code_offset = ((start[SETUP_SECTS] or 4) + 1) * SECTOR
    code_size = field(SYSSIZE, "I") * PARAGRAPH
    missing = code_offset + code_size - size
    if not code_size or missing >= PARAGRAPH:
        raise ImageError(
            f"{truncated}: its setup header claims {code_offset + code_size} of them: copy it again"
        )
    code_size -= max(0, missing)  # a file may end within the last paragraph
    load, room = field(CODE32_START, "I"), code_size
    if version >= 0x020A:
        load, room = field(PREF_ADDRESS, "Q"), max(room, field(INIT_SIZE, "I"))
    return Setup(
        start[HEADER_START : SIGNATURE_OFFSET + start[HEADER_JUMP]],
        code_offset,
        code_size,
        load,
        room,
        field(INITRD_ADDR_MAX, "I"),
        field(CMDLINE_SIZE, "I"),
    )


def _arguments(name: str, command_line: str, setup: Setup) -> bytes:
    """The command line as a C string."""
    arguments = command_line.encode("utf-8", "surrogateescape")
    if b"\0" in arguments:
        raise ImageError(f"{name}: the kernel's command line contains a NUL character: remove it")
    if len(arguments) > setup.longest_command_line:
        raise ImageError(
            f"{name}: the command line has {len(arguments)} bytes, and this kernel takes "
            f"{setup.longest_command_line}: shorten it"
        )
    return arguments + b"\0"


def _place(name: str, ramdisk: bytes, kernel: Segment, setup: Setup, memory: int) -> int:
    """The address of the RAM disk: the highest page that it may begin at."""
    end = min(memory, setup.highest_ramdisk + 1, ADDRESS_SPACE)
    address = (end - len(ramdisk)) // PAGE * PAGE
    if address < kernel.end:
        least = -(-(kernel.end + len(ramdisk) + PAGE) >> 20) << 20
        more = f"give at least {size_text(least)} with -m" if end == memory else "make it smaller"
        raise ImageError(
            f"{name}: the initrd of {len(ramdisk)} bytes does not fit between the kernel, which needs {kernel}, "
            f"and {end:#x}: {more}"
        )
    return address


def _parameters(setup: Setup, memory: int, ramdisk_at: int, ramdisk_size: int) -> bytes:
    """The boot parameters, a page of them."""
    page = bytearray(PAGE)
    page[SCREEN_INFO : SCREEN_INFO + len(SCREEN)] = SCREEN
    page[HEADER_START : HEADER_START + len(setup.data)] = setup.data
    page[TYPE_OF_LOADER] = UNKNOWN_LOADER
    struct.pack_into("<I", page, CODE32_START, setup.load)
    struct.pack_into("<II", page, RAMDISK_IMAGE, ramdisk_at, ramdisk_size)
    struct.pack_into("<I", page, CMD_LINE_PTR, COMMAND_LINE)
    struct.pack_into("<I", page, ALT_MEM_K, max(0, memory - HOLE_END) >> 10)
    regions = memory_map(memory)
    page[E820_ENTRIES] = len(regions)
    page[E820_TABLE : E820_TABLE + 20 * len(regions)] = b"".join(
        struct.pack("<QQI", *region) for region in regions
    )
    return bytes(page)
