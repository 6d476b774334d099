"""A guest on a bootable disk, for machines that know nothing of multiboot: Bochs.

The first sector reads the image with the BIOS (INT 13h, AH=42h) into low memory, enters protected mode, copies it
to where it belongs and jumps to its entry with multiboot's magic number in EAX. The hard part is that a boot sector
is 16-bit code, which the project's assembler does not make: it is short enough to be written in hexadecimal.
"""

from __future__ import annotations

import struct

from vmm.image.image import DEFAULT_LOAD, Image

SECTOR = 512
CYLINDERS, HEADS, SECTORS = 4, 16, 63  # the disk's shape: 2 MiB
_CHUNK = 64  # sectors read at a time: 32 KiB, half a segment
_BOOT, _PACKET, _TABLE, _POINTER = 0x7C00, 0x7D00, 0x7D20, 0x7D40
_LOW = 0x10000  # where the BIOS reads to; up to 0x90000
_MOST = 0x80000


def disk(image: Image) -> bytes:
    """The whole disk; raises `ValueError` if the image has more than 512 KiB, or does not begin at 1 MiB."""
    (main,) = (s for s in image.segments if s.address == DEFAULT_LOAD)
    if len(main.data) > _MOST:
        raise ValueError(f"{image.name}: {len(main.data)} bytes do not fit below the first megabyte")
    chunks = -(-len(main.data) // (_CHUNK * SECTOR))
    body = main.data.ljust(chunks * _CHUNK * SECTOR, b"\0")
    return (_boot_sector(image.entry, chunks) + body).ljust(CYLINDERS * HEADS * SECTORS * SECTOR, b"\0")


def _boot_sector(entry: int, chunks: int) -> bytes:
    start = b"".join((
        b"\xfa",  # cli
        b"\x31\xc0\x8e\xd8\x8e\xd0",  # xor ax, ax; mov ds, ax; mov ss, ax
        struct.pack("<BH", 0xBC, _BOOT),  # mov sp, _BOOT
        struct.pack("<BH", 0xB9, chunks),  # mov cx, chunks
    ))  # fmt: skip
    read = b"".join((
        b"\x51",  # push cx
        struct.pack("<BH", 0xBE, _PACKET),  # mov si, _PACKET
        b"\xb4\x42\xcd\x13",  # mov ah, 42h; int 13h
        b"\x59\x72\xfe",  # pop cx; jc $
        struct.pack("<HHH", 0x0681, _PACKET + 6, _CHUNK * SECTOR >> 4),  # add word [_PACKET + 6], paragraphs
        struct.pack("<HHB", 0x0683, _PACKET + 8, _CHUNK),  # add word [_PACKET + 8], sectors
    ))  # fmt: skip
    read += struct.pack("<Bb", 0xE2, -len(read) - 2)  # loop
    switch = b"".join((
        b"\xe4\x92\x0c\x02\xe6\x92",  # in al, 92h; or al, 2; out 92h, al: A20
        struct.pack("<BBBH", 0x0F, 0x01, 0x16, _POINTER),  # lgdt [_POINTER]
        b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0",  # mov eax, cr0; or al, 1; mov cr0, eax
    ))  # fmt: skip
    wide = _BOOT + len(start) + len(read) + len(switch) + 8
    switch += struct.pack("<BBIH", 0x66, 0xEA, wide, 8)  # jmp dword 8:wide
    copy = b"".join((
        b"\x66\xb8\x10\x00\x8e\xd8\x8e\xc0\x8e\xd0",  # mov ax, 10h; mov ds, ax; mov es, ax; mov ss, ax
        struct.pack("<BI", 0xBE, _LOW),  # mov esi, _LOW
        struct.pack("<BI", 0xBF, DEFAULT_LOAD),  # mov edi, DEFAULT_LOAD
        struct.pack("<BI", 0xB9, chunks * _CHUNK * SECTOR // 4),  # mov ecx, double words
        b"\xf3\xa5",  # rep movsd
        struct.pack("<BI", 0xB8, 0x2BADB002),  # mov eax, multiboot's magic
        struct.pack("<BI", 0xBA, entry),  # mov edx, entry
        b"\xff\xe2",  # jmp edx
    ))  # fmt: skip
    sector = bytearray(SECTOR)
    sector[: wide - _BOOT + len(copy)] = start + read + switch + copy
    packet = struct.pack("<BBHHHQ", 16, 0, _CHUNK, 0, _LOW >> 4, 1)
    for address, data in (
        (_PACKET, packet),
        (_TABLE, struct.pack("<3Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)),
        (_POINTER, struct.pack("<HI", 23, _TABLE)),
    ):
        sector[address - _BOOT : address - _BOOT + len(data)] = data
    sector[-2:] = b"\x55\xaa"
    return bytes(sector)
