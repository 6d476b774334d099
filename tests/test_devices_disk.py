"""The file behind a disk: what a guest writes reaches it, or never touches it, whatever happens to either."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.errors import UsageError
from vmm.machine.devices.disk import LARGEST, SECTOR, Access, DiskError, FileDisk

CONTENT = b"".join(bytes([n]) * SECTOR for n in range(8))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


def test_what_is_written_is_in_the_file_at_once(image: Path) -> None:
    """A sector written can be read from the file before anything is flushed or closed: a kill loses nothing."""
    disk = FileDisk(str(image))
    disk.write(2, b"w" * 2 * SECTOR)
    assert image.read_bytes() == CONTENT[: 2 * SECTOR] + b"w" * 2 * SECTOR + CONTENT[4 * SECTOR :]
    assert disk.read(1, 3) == CONTENT[SECTOR : 2 * SECTOR] + b"w" * 2 * SECTOR
    disk.flush()
    disk.close()


writes = st.lists(st.tuples(st.integers(0, 7), st.binary(min_size=1, max_size=3)), max_size=10)


@given(writes=writes)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_snapshot_reads_as_written_and_leaves_the_file_alone(
    writes: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    """Every range reads as on a disk that was written; the file keeps every byte, and may be read only."""
    image = tmp_path / "disk.img"
    image.write_bytes(CONTENT)
    disk, model = FileDisk(str(image), "snapshot"), bytearray(CONTENT)
    for sector, tags in writes:
        data = b"".join(bytes([tag]) * SECTOR for tag in tags[: 8 - sector])
        disk.write(sector, data)
        model[sector * SECTOR : sector * SECTOR + len(data)] = data
    for start in range(8):
        for end in range(start + 1, 9):
            assert disk.read(start, end - start) == model[start * SECTOR : end * SECTOR]
    disk.flush()
    assert image.read_bytes() == CONTENT
    disk.close()


def test_a_disk_for_reading_refuses_writes_and_has_no_trouble(image: Path) -> None:
    """Its guest is told by an error of the drive, its user knows already."""
    disk = FileDisk(str(image), "read")
    with pytest.raises(DiskError):
        disk.write(0, bytes(SECTOR))
    disk.flush()
    assert (disk.trouble, disk.writable, image.read_bytes()) == ("", False, CONTENT)
    disk.close()


@pytest.mark.parametrize("access", ("write", "snapshot", "read"))
def test_a_file_that_shrinks_is_an_error_of_the_medium(image: Path, access: Access) -> None:
    """What is gone cannot be read, what is there can; the first trouble is kept in one line."""
    disk = FileDisk(str(image), access)
    os.truncate(image, 3 * SECTOR)
    assert disk.read(0, 3) == CONTENT[: 3 * SECTOR]
    with pytest.raises(DiskError):
        disk.read(2, 4)
    assert disk.trouble == f"{image}: sector 3 is gone: the file has become shorter"
    if access == "write":
        with pytest.raises(DiskError):
            disk.write(5, bytes(SECTOR))
        assert image.stat().st_size == 3 * SECTOR, "and it does not grow again"
    assert "sector 3" in disk.trouble
    disk.close()


def test_a_full_file_system_is_an_error_of_the_medium(image: Path) -> None:
    """A write that the host refuses raises, and is told."""
    disk = FileDisk(str(image), "read")
    disk.writable = True  # the descriptor still is not
    with pytest.raises(DiskError):
        disk.write(1, bytes(SECTOR))
    assert disk.trouble.startswith(f"{image}: sector 1 cannot be written: ")
    disk.close()


@pytest.mark.parametrize(
    ("size", "what"),
    (
        (0, "empty"),
        (1000, "1000 bytes are no whole number of sectors: `truncate -s 1024 FILE` fills the last"),
        ((LARGEST + 1) * SECTOR, "at most"),
    ),
)
def test_what_is_no_disk_is_refused(tmp_path: Path, size: int, what: str) -> None:
    """A file must be whole sectors, at least one, and no more than 28 bits can number."""
    path = tmp_path / "odd.img"
    path.touch()
    os.truncate(path, size)
    with pytest.raises(UsageError, match=what) as refused:
        FileDisk(str(path))
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A missing file, a directory, a device, a pipe and a name that cannot be one: a line each, no waiting."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", ".", "pipe", "a\0b", "x" * 5000, "pipe/x"):
        for access in ("write", "snapshot", "read"):
            with pytest.raises(UsageError, match=r"\Adisk [^\n]*\Z"):
                FileDisk(str(tmp_path / name), access)
    with pytest.raises(UsageError, match="not a file"):
        FileDisk("/dev/zero")


def test_a_refusal_to_write_says_what_to_do(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EACCES and EROFS name the two ways to leave the file as it is."""

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UsageError, match="to leave it as it is, add ,snapshot or ,readonly: Permission denied"):
        FileDisk(str(image))


def test_one_writer_or_many_readers(image: Path) -> None:
    """A disk that is being written belongs to one machine; one that is only read to any number of them."""
    writer = FileDisk(str(image))
    for access in ("write", "snapshot", "read"):
        with pytest.raises(UsageError, match="in use by another machine"):
            FileDisk(str(image), access)
    writer.close()
    readers = [FileDisk(str(image), "read"), FileDisk(str(image), "snapshot")]
    with pytest.raises(UsageError, match="in use"):
        FileDisk(str(image))
    for reader in readers:
        reader.close()
    FileDisk(str(image)).close()


def test_a_snapshot_can_be_saved(image: Path) -> None:
    """What was written is plain values in the disk's state: put into another disk, it reads the same."""
    first, second = FileDisk(str(image), "snapshot"), FileDisk(str(image), "snapshot")
    first.write(1, b"x" * SECTOR)
    second.state = first.state
    assert second.read(0, 8) == first.read(0, 8)
    first.close()
    second.close()
