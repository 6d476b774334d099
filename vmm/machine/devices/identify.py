"""What an ATA disk says of itself: the 256 words of IDENTIFY DEVICE, and its geometry.

The hard part is only that software believes every bit of it. What is said here is what `ide` does: PIO, LBA
of 28 bits, CHS by a geometry that the host may change, multiple sectors an interrupt, a flush. No DMA, no
48-bit addresses, no security, no SMART.

Source: ATA/ATAPI-5 (T13/1321D), 8.12.
"""

from __future__ import annotations

from typing import NamedTuple

WORDS = 256
MOST_MULTIPLE = 16  # sectors an interrupt

POWER_MANAGEMENT, WRITE_CACHE, LOOK_AHEAD, NOP = 1 << 3, 1 << 5, 1 << 6, 1 << 14  # of words 82 and 85
MODEL, SERIAL, FIRMWARE = "VMM ATA DISK", "VMM00001", "1.0"


class Geometry(NamedTuple):
    """How sectors are numbered by cylinder, head and sector (from 1)."""

    cylinders: int
    heads: int
    sectors: int

    def capacity(self) -> int:
        return self.cylinders * self.heads * self.sectors

    def number(self, cylinder: int, head: int, sector: int) -> int:
        """The sector's number from 0 on; below 0 if there is none such."""
        if not 1 <= sector <= self.sectors or head >= self.heads or cylinder >= self.cylinders:
            return -1
        return (cylinder * self.heads + head) * self.sectors + sector - 1


def default_geometry(sectors: int) -> Geometry:
    """That of a disk of so many sectors which nobody has asked for another: 16 heads, 63 sectors a track."""
    return translated(sectors, 16, 63)


def translated(sectors: int, heads: int, track: int) -> Geometry:
    """The geometry with these heads and sectors a track, and at most 65,535 cylinders."""
    most = 16383 if (heads, track) == (16, 63) else 65535
    return Geometry(min(sectors // (heads * track), most) or 1, heads, track)


def identify(sectors: int, now: Geometry, multiple: int, write_cache: bool, look_ahead: bool) -> bytes:
    """512 bytes for a disk whose host has chosen the geometry `now` and the other settings."""
    default = default_geometry(sectors)
    addressable = min(now.capacity(), sectors)
    enabled = POWER_MANAGEMENT | NOP | WRITE_CACHE * write_cache | LOOK_AHEAD * look_ahead
    words = {
        0: 1 << 6,  # a fixed disk
        1: default.cylinders,
        3: default.heads,
        6: default.sectors,
        47: 0x8000 | MOST_MULTIPLE,
        48: 1,  # the data port takes doublewords
        49: 1 << 9 | 1 << 11 | 1 << 10,  # LBA; IORDY, which may be disabled
        51: 2 << 8,
        53: 3,  # words 54 to 58 and 64 to 70 mean something
        54: now.cylinders,
        55: now.heads,
        56: now.sectors,
        57: addressable & 0xFFFF,
        58: addressable >> 16,
        59: multiple and 0x100 | multiple,
        60: sectors & 0xFFFF,
        61: sectors >> 16,
        64: 3,  # PIO modes 3 and 4
        65: 120,  # nanoseconds a cycle
        66: 120,
        67: 120,
        68: 120,
        80: 0x3E,  # ATA-1 to ATA-5
        82: POWER_MANAGEMENT | WRITE_CACHE | LOOK_AHEAD | NOP,
        83: 1 << 14 | 1 << 12,  # FLUSH CACHE
        84: 1 << 14,
        85: enabled,
        86: 1 << 12,
        87: 1 << 14,
    }
    for at, length, text in ((10, 20, SERIAL), (23, 8, FIRMWARE), (27, 40, MODEL)):
        padded = text.ljust(length).encode()
        for i in range(0, length, 2):  # the first character of each pair in the word's upper half
            words[at + i // 2] = padded[i] << 8 | padded[i + 1]
    return b"".join(words.get(i, 0).to_bytes(2, "little") for i in range(WORDS))
