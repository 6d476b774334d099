"""Where a disk's sectors lie: in a file, or in a file with what was written kept apart.

The hard part is what can happen to a file while a guest runs: it shrinks, its file system fills up, the
process is killed. A sector is read and written straight through, so nothing that the guest was told is
written waits in this process; what fails raises `DiskError`, which the drive tells its guest as an error of
the medium, and the first one is kept in `trouble` for whoever started the machine.

A file in use is locked: by one writer, or by any number of readers, which never change it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from dataclasses import dataclass, field
from typing import Literal, Protocol

from vmm.errors import UsageError

SECTOR = 512
LARGEST = (1 << 28) - 1  # sectors: what 28 bits can number, less the last, as the standard has it

Access = Literal["write", "snapshot", "read"]


class DiskError(Exception):
    """A sector that cannot be read or written."""


class Disk(Protocol):
    """`sectors` of 512 bytes each. The drive asks for none beyond; a failure raises `DiskError`."""

    sectors: int
    writable: bool

    def read(self, sector: int, count: int) -> bytes: ...

    def write(self, sector: int, data: bytes) -> None: ...

    def flush(self) -> None:
        """What was written survives a power failure from here on."""


@dataclass
class Overlay:
    """Sectors written over a file that stays as it is, by number."""

    sectors: dict[int, bytes] = field(default_factory=dict)


class FileDisk:
    """A disk in the file `path`; `trouble` is the first thing that went wrong with it, or empty.

    `write` changes the file; `snapshot` lets the guest write and keeps it in memory, in `state`; `read`
    lets it write nothing. Raises `UsageError` for a file that is no disk, or cannot be had in this way.
    """

    def __init__(self, path: str, access: Access = "write") -> None:
        self.path = path
        self.writable = access != "read"
        self.state = Overlay()
        self._copies = access == "snapshot"
        self.trouble = ""
        self._file = _open(path, access)
        self.sectors = os.fstat(self._file).st_size // SECTOR

    def close(self) -> None:
        os.close(self._file)

    def read(self, sector: int, count: int) -> bytes:
        written = self.state.sectors
        if not written:
            return self._read_file(sector, count)
        parts, start, end = [], sector, sector + count
        for at in range(sector, end):  # the file is read in runs between what lies over it
            if at in written:
                if start < at:
                    parts.append(self._read_file(start, at - start))
                parts.append(written[at])
                start = at + 1
        if start < end:
            parts.append(self._read_file(start, end - start))
        return b"".join(parts)

    def _read_file(self, sector: int, count: int) -> bytes:
        try:
            data = os.pread(self._file, count * SECTOR, sector * SECTOR)
        except OSError as error:
            raise self._failed(f"sector {sector} cannot be read: {error.strerror}") from None
        if len(data) < count * SECTOR:
            raise self._failed(f"sector {sector + len(data) // SECTOR} is gone: the file has become shorter")
        return data

    def write(self, sector: int, data: bytes) -> None:
        if not self.writable:
            raise DiskError(f"{self.path}: opened for reading only")  # no trouble: it was asked for
        if self._copies:
            for at in range(0, len(data), SECTOR):
                self.state.sectors[sector + at // SECTOR] = data[at : at + SECTOR]
            return
        try:
            if os.fstat(self._file).st_size < self.sectors * SECTOR:
                # Written past its end, the file would grow again with a hole that was never the guest's.
                raise self._failed(f"sector {sector} cannot be written: the file has become shorter")
            done = os.pwrite(self._file, data, sector * SECTOR)
        except OSError as error:
            raise self._failed(f"sector {sector} cannot be written: {error.strerror}") from None
        if done < len(data):
            raise self._failed(f"sector {sector + done // SECTOR} cannot be written: no room")

    def flush(self) -> None:
        if not self.writable or self._copies:
            return
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise self._failed(f"what was written may be lost: {error.strerror}") from None

    def _failed(self, what: str) -> DiskError:
        self.trouble = self.trouble or f"{self.path}: {what}"
        return DiskError(what)


def _open(path: str, access: Access) -> int:
    """A descriptor of a file that is a disk, locked; raises `UsageError`."""
    writes = access == "write"
    try:
        # Without waiting, should it be a pipe.
        file = os.open(path, (os.O_RDWR if writes else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        how = "opened"
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            how = "written; to leave it as it is, add ,snapshot or ,readonly" if writes else "read"
        raise UsageError(f"disk {path}: cannot be {how}: {reason}") from None
    try:
        _check(path, file)
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if writes else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"disk {path}: in use by another machine") from None
        except OSError:
            pass  # a file system without locks
    except UsageError:
        os.close(file)
        raise
    return file


def _check(path: str, file: int) -> None:
    """That an open file is one, of whole sectors, and as many as can be numbered; raises `UsageError`."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"disk {path}: not a file")
    size = status.st_size
    if not size:
        raise UsageError(f"disk {path}: empty: a disk has at least one sector of {SECTOR} bytes")
    if size % SECTOR:
        up = -(-size // SECTOR) * SECTOR
        raise UsageError(
            f"disk {path}: {size} bytes are no whole number of sectors: `truncate -s {up} FILE` fills the last"
        )
    if size // SECTOR > LARGEST:
        raise UsageError(f"disk {path}: {size} bytes: a disk here has at most {LARGEST * SECTOR}")
