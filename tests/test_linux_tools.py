"""What makes the initial RAM disk: the archive as cpio reads it, and the tables as modprobe reads them."""

from __future__ import annotations

import gzip
import re
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from tools.linux import cpio, initramfs, logs, modules
from tools.linux.explained import ROWS, Row


def test_the_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    """Folders, files with their permissions and links come out of it as they went in."""
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed: install Debian's cpio to run this comparison")
    entries = [
        cpio.directory("bin"),
        cpio.file("bin/tool", b"#!/bin/sh\n" * 7, executable=True),
        cpio.file("empty", b""),
        cpio.link("bin/sh", "tool"),
    ]
    subprocess.run(
        ["cpio", "-i", "--quiet"], input=cpio.archive(entries), cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "bin/tool").read_bytes() == b"#!/bin/sh\n" * 7
    assert stat.S_IMODE((tmp_path / "bin/tool").stat().st_mode) & 0o111
    assert (tmp_path / "empty").read_bytes() == b""
    assert (tmp_path / "bin/sh").readlink() == Path("tool")


def test_the_archive_is_laid_out_as_the_kernel_reads_it() -> None:
    """Each member is a header of 13 hexadecimal words, name and data, padded to four bytes; a trailer ends."""
    data = cpio.archive([cpio.character_device("dev/console", 5, 1), cpio.file("x", b"12345")])
    members, at = [], 0
    while at < len(data):
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        start = -(-(at + 110 + fields[11]) // 4) * 4
        members.append((name, fields[1], tuple(fields[9:11]), data[start : start + fields[6]]))
        at = -(-(start + fields[6]) // 4) * 4
    assert members == [
        ("dev/console", stat.S_IFCHR | 0o600, (5, 1), b""),
        ("x", stat.S_IFREG | 0o644, (0, 0), b"12345"),
        ("TRAILER!!!", 0, (0, 0), b""),
    ]


def module(folder: Path, name: str, *information: str) -> None:
    """A `.ko` file with nothing but a `.modinfo` section, as an ELF of three sections."""
    text = b"\0".join(line.encode() for line in information) + b"\0"
    names = b"\0.modinfo\0.shstrtab\0"
    header = struct.pack(
        "<16sHHIIIIIHHHHHH",
        b"\x7fELF\1\1\1",
        1,
        3,
        1,
        0,
        0,
        52 + len(text) + len(names),
        0,
        52,
        0,
        0,
        40,
        3,
        2,
    )
    sections = struct.pack("<10I", *[0] * 10)
    sections += struct.pack("<10I", 1, 1, 2, 0, 52, len(text), 0, 0, 1, 0)
    sections += struct.pack("<10I", 10, 3, 0, 0, 52 + len(text), len(names), 0, 0, 1, 0)
    (folder / f"{name}.ko").write_bytes(header + text + names + sections)


def test_a_module_comes_with_all_that_it_needs_and_the_tables_say_so(tmp_path: Path) -> None:
    """Dashes count as underscores; what is needed comes first in the closure, and nearest first in modules.dep."""
    module(tmp_path, "top", "license=GPL", "alias=fs-top", "depends=mid-one,base")
    module(tmp_path, "mid-one", "depends=base", "alias=fs-mid")
    module(tmp_path, "base", "depends=")
    module(tmp_path, "other", "depends=")
    found = modules.closure(tmp_path, ["top"])
    assert [one.name for one in found] == ["base", "mid_one", "top"]
    assert modules.dependency_table(found) == ("base.ko:\nmid_one.ko: base.ko\ntop.ko: mid_one.ko base.ko\n")
    assert modules.alias_table(found) == "alias fs-mid mid_one\nalias fs-top top\n"
    with pytest.raises(KeyError):
        modules.closure(tmp_path, ["nothing"])


def test_the_same_parts_make_the_same_initrd(tmp_path: Path) -> None:
    """The RAM disk depends on nothing but what is in it, so that runs with it can be compared."""
    module(tmp_path, "base", "depends=")
    contents = modules.closure(tmp_path, ["base"])
    disk = initramfs.build(b"busybox", "6.1", contents)
    assert disk == initramfs.build(b"busybox", "6.1", contents)
    data = gzip.decompress(disk)
    for part in (b"busybox", b"lib/modules/6.1/base.ko", b"userspace: ready", b"exercise: done", b"etc/shellrc"):
        assert part in data


LOG = b"""\
[    0.000000] Linux version 6.1\r
[    0.1] {}\r
machine: /proc/cpuinfo\r
flags\t\t: fpu {}\r
bogomips\t: {}\r
machine: done\r
userspace: status 0\r
"""
EXPLAINED = (
    Row("speed", "it is another", ours=("fast",), theirs=("slow",)),
    Row("a flag", "we have it", ours=("flag sse2",)),
    Row("luck", "it depends", theirs=("lucky",), sometimes=True),
)


def console(*words: str) -> bytes:
    return LOG.replace(b"{}", b"%s") % tuple(word.encode() for word in words)


def test_logs_differ_in_what_no_row_explains_and_rows_must_be_needed() -> None:
    """A line that one of two logs has is explained by its row, by no other's, and not at all without one; numbers of
    time do not differ; a row that explains nothing is told, unless it holds only sometimes."""
    ours, theirs = console("fast", "sse sse2", "200.1"), console("slow", "sse", "173.5")
    found = logs.compare(ours, theirs, EXPLAINED)
    assert not found.unexplained
    assert {row.what for row in found.explained} == {"speed", "a flag"}
    assert not [text for text in found.unused if ": " in text]
    found = logs.compare(ours, console("lucky", "mmx", "1"), EXPLAINED)
    assert found.unexplained == [
        ("/proc/cpuinfo", "ours", "flag sse"),
        ("/proc/cpuinfo", "theirs", "flag mmx"),
    ]
    assert "speed: theirs: slow" in found.unused
    found = logs.compare(theirs, ours, EXPLAINED)
    assert ("log", "ours", "slow") in found.unexplained and ("log", "theirs", "fast") in found.unexplained


def test_what_the_script_prints_is_apart_from_the_log() -> None:
    """By what it says it is; what comes after it belongs to the log again."""
    found = logs.sections(console("fast", "sse", "1"))
    assert list(found) == ["log", "/proc/cpuinfo"]
    assert found["log"][-1] == "userspace: status 0"


def test_what_a_busy_host_makes_qemus_kernel_say_of_its_counter_is_explained() -> None:
    """QEMU's time-stamp counter is the host's: a kernel that was not let run for a while trusts it no longer."""
    patterns = [pattern for row in ROWS if row.sometimes for pattern in row.theirs]
    for line in (
        "clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable: the skew is too large",
        "clocksource:                       'tsc' cs_nsec: 1024 cs_now: 2048 cs_last: 1024 mask: ffffffffffffffff",
        "tsc: Marking TSC unstable due to clocksource watchdog",
        "TSC found unstable after boot, most likely due to broken BIOS. Use 'tsc=unstable'.",
        "sched_clock: Marking unstable (1234567890, 12345)<-(1234600000, -20000)",
        "hrtimer: interrupt took 12345678 ns",
    ):
        assert any(re.fullmatch(pattern, line) for pattern in patterns), line


def test_the_document_has_the_table_of_what_is_explained() -> None:
    """As `python -m tools.linux.logs --table` prints it."""
    document = Path(__file__).parent.parent / "docs/linux.md"
    assert logs.table() in document.read_text()
