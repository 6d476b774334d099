"""ACPI's machine language, as much of it as says what is there: names, numbers, packages, devices, resources.

Each function gives the bytes of one term. The hard part is the package length, which counts itself and takes one to
four bytes; there are no methods, for nothing here has to be worked out by the operating system.

Source: ACPI Specification 2.0, chapter 17 (AML) and 6.4 (resource data types).
"""

from __future__ import annotations

import struct

_ZERO, _ONE, _BYTE, _WORD, _DWORD = 0x00, 0x01, 0x0A, 0x0B, 0x0C
_END = b"\x79\x00"  # of a resource template; a checksum of zero is not checked

# Kinds of address space resource, and general flags: minimum and maximum fixed; the whole of memory and I/O.
MEMORY, IO, BUS = 0, 1, 2
_FIXED, _WHOLE_IO, _MEMORY_FLAGS = 0x0C, 0x03, 0x01


def integer(value: int) -> bytes:
    if value in (0, 1):
        return bytes((value,))
    for opcode, size in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4)):
        if value < 1 << 8 * size:
            return bytes((opcode,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 32 bits")


def _length(body: bytes) -> bytes:
    """PkgLength and what it counts."""
    if len(body) + 1 < 0x40:
        return bytes((len(body) + 1,)) + body
    total = len(body) + 2
    if total < 1 << 12:
        return bytes((1 << 6 | total & 0xF, total >> 4)) + body
    raise ValueError(f"a package of {len(body)} bytes is longer than any here")


def name(path: str, value: bytes) -> bytes:
    return b"\x08" + path.encode() + value


def package(*elements: bytes) -> bytes:
    return b"\x12" + _length(bytes((len(elements),)) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    return b"\x11" + _length(integer(len(data)) + data)


def scope(path: str, *terms: bytes) -> bytes:
    return b"\x10" + _length(path.encode() + b"".join(terms))


def device(segment: str, *terms: bytes) -> bytes:
    """`segment` is a name of four characters."""
    return b"\x5b\x82" + _length(segment.encode() + b"".join(terms))


def eisa(identity: str) -> bytes:
    """A device's compressed identity: three letters and four hexadecimal digits."""
    letters = 0
    for letter in identity[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return b"\x0c" + struct.pack(">HH", letters, int(identity[3:], 16))


# Resources


def template(*resources: bytes) -> bytes:
    return buffer(b"".join(resources) + _END)


def ports(base: int, count: int) -> bytes:
    """Fixed ports, all sixteen address lines decoded."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, count)


def irq(*lines: int) -> bytes:
    """Edge-triggered lines, active high."""
    return struct.pack("<BH", 0x22, sum(1 << line for line in lines))


def words(kind: int, first: int, last: int) -> bytes:
    """A range of bus numbers or ports that a bridge passes on."""
    flags = _WHOLE_IO if kind == IO else 0
    return struct.pack("<BHBBBHHHHH", 0x88, 13, kind, _FIXED, flags, 0, first, last, 0, last - first + 1)


def memory(first: int, last: int) -> bytes:
    """A range of memory that a bridge passes on."""
    head = struct.pack("<BHBBB", 0x87, 23, MEMORY, _FIXED, _MEMORY_FLAGS)
    return head + struct.pack("<IIIII", 0, first, last, 0, last - first + 1)
