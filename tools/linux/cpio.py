"""Archives that Linux unpacks as its initial file system: cpio in the "new ASCII" format, without CRC.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

MAGIC = "070701"
TRAILER = "TRAILER!!!"
ALIGN = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of type and permissions `mode`; a link's `data` is its target, a device has a number."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str) -> Entry:
    return Entry(path, stat.S_IFDIR | 0o755)


def file(path: str, data: bytes, *, executable: bool = False) -> Entry:
    return Entry(path, stat.S_IFREG | (0o755 if executable else 0o644), data)


def link(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int) -> Entry:
    return Entry(path, stat.S_IFCHR | 0o600, device=(major, minor))


def archive(entries: list[Entry]) -> bytes:
    """The archive; whatever it is made from, the same entries give the same bytes."""
    parts = [_member(entry, number) for number, entry in enumerate(entries, 1)]
    return b"".join([*parts, _member(Entry(TRAILER, 0), 0)])


def _member(entry: Entry, inode: int) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        *(inode, entry.mode, 0, 0, links, 0, len(entry.data)),  # user and group 0, no time
        *(0, 0, *entry.device, len(name), 0),  # lies on device 0:0, no checksum
    )
    header = (MAGIC + "".join(f"{field:08X}" for field in fields)).encode()
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGN)
