"""Images that cannot be loaded: each is one line that names the file, the fault and the remedy."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_image import MEMORY, MIB, multiboot_header, write
from vmm.errors import ImageError
from vmm.image import multiboot
from vmm.image.build import build_elf, elf_bytes
from vmm.image.image import HOLE_END, HOLE_START, LOWEST, Image, Segment
from vmm.image.load import load_image

GOOD = elf_bytes(
    (Segment(MIB, b"\xf4" * 32, 64), Segment(2 * MIB, b"data", 4)), MIB, {"start": MIB, "data": 2 * MIB}
)
EHDR = {"e_type": (16, "H"), "e_machine": (18, "H"), "e_entry": (24, "I"), "e_phoff": (28, "I")}
EHDR |= {"e_shoff": (32, "I"), "e_phentsize": (42, "H"), "e_phnum": (44, "H")}
EHDR |= {"e_shentsize": (46, "H"), "e_shnum": (48, "H")}
PHDR = {"p_type": 0, "p_offset": 4, "p_vaddr": 8, "p_paddr": 12, "p_filesz": 16, "p_memsz": 20}
PHOFF = struct.unpack_from("<I", GOOD, 28)[0]


def elf(*, header: int = 0, ident: dict[int, int] | None = None, **fields: int) -> bytes:
    """GOOD with fields of its ELF header, or of program header number `header`, replaced."""
    data = bytearray(GOOD)
    for offset, value in (ident or {}).items():
        data[offset] = value
    for name, value in fields.items():
        offset, kind = EHDR[name] if name in EHDR else (PHOFF + header * 32 + PHDR[name], "I")
        struct.pack_into(f"<{kind}", data, offset, value)
    return bytes(data)


def with_flags(flags: int) -> bytes:
    """GOOD with other flags in its multiboot header."""
    return GOOD.replace(multiboot.header_bytes(2), multiboot.header_bytes(flags))


BAD_FILES = {
    "ELF of its magic only": (b"\x7fELF", "a truncated ELF of 4 bytes"),
    "ELF cut in its header": (GOOD[:51], "a truncated ELF of 51 bytes"),
    "ELF cut in its contents": (GOOD[:200], "reach past the end of the file"),
    "64-bit ELF": (elf(ident={4: 2}), "not a 32-bit ELF"),
    "big-endian ELF": (elf(ident={5: 2}), "not a little-endian ELF"),
    "ELF version": (elf(ident={6: 9}), "unknown version 9"),
    "ELF for ARM": (elf(e_machine=40), "machine EM_ARM, not i386"),
    "ELF for nothing known": (elf(e_machine=0xFEED), "machine 65261, not i386"),
    "object file": (elf(e_type=1), "type ET_REL, not an executable"),
    "core file": (elf(e_type=4), "type ET_CORE, not an executable"),
    "no multiboot header": (GOOD.replace(multiboot.header_bytes(2), bytes(12)), "no multiboot header"),
    "multiboot header too far": (
        GOOD.replace(multiboot.header_bytes(2), bytes(12)) + bytes(8192) + multiboot.header_bytes(2),
        "no multiboot header in the first 8192 bytes",
    ),
    "video mode wanted": (with_flags(4), "demands a video mode"),
    "unknown features wanted": (with_flags(0x8002), "demands features 0x8000"),
    "no program headers": (elf(e_phnum=0), "no program headers"),
    "absurd number of program headers": (elf(e_phnum=0xFFFF), "claims 65535 program headers"),
    "odd size of program headers": (elf(e_phentsize=56), "2 program headers of 56 bytes (they have 32)"),
    "program headers outside": (elf(e_phoff=0xFFFFFFF0), "program headers (64 bytes at offset 0xfffffff0)"),
    "absurd number of sections": (elf(e_shnum=0xFFFF), "claims 65535 section headers"),
    "section headers outside": (elf(e_shoff=0x7FFFFFFF), "section headers (240 bytes at offset 0x7fffffff)"),
    "nothing to load": (
        elf(p_type=4)[: PHOFF + 32] + elf(p_type=4, header=1)[PHOFF + 32 :],
        "nothing to load",
    ),
    "segment outside the file": (elf(p_offset=0xFFFFFFFF), "which has only"),
    "more in the file than in memory": (elf(p_filesz=65), "65 bytes in the file for 64 bytes of memory"),
    "larger than memory": (elf(p_memsz=64 * MIB, header=1), "at least 66M with -m"),
    "past 4 GiB": (elf(p_paddr=0xFFFFFFF0), "reach past 4 GiB"),
    "in the video memory": (elf(p_paddr=0xB8000), "overlaps the video and ROM area"),
    "overlapping segments": (elf(p_paddr=2 * MIB - 4), "0x1ffffc..0x20003c and 0x200000..0x200004 overlap"),
    "entry outside": (elf(e_entry=3 * MIB), "the entry point 0x300000 lies in no loaded segment"),
    "over the multiboot information": (elf(p_paddr=0x9DFFC, e_entry=2 * MIB), "the multiboot information"),
    "flat, larger than memory": (bytes(16 * MIB), "does not fit in 16M of memory"),
    "flat, header not in the file": (
        multiboot_header(2 * MIB + 4, 2 * MIB, 0, 0, 2 * MIB),
        "not in the file",
    ),
    "flat, header before the load": (multiboot_header(2 * MIB, 3 * MIB, 0, 0, 3 * MIB), "not in the file"),
    "flat, load ends early": (multiboot_header(2 * MIB, 2 * MIB, MIB, 0, 2 * MIB), "before it begins"),
    "flat, load past the file": (multiboot_header(2 * MIB, 2 * MIB, 3 * MIB, 0, 2 * MIB), "is truncated"),
    "flat, bss ends early": (multiboot_header(2 * MIB, 2 * MIB, 0, MIB, 2 * MIB), "correct bss_end_addr"),
    "flat, entry outside": (multiboot_header(2 * MIB, 2 * MIB, 0, 0, 1), "the entry point 0x1 lies in no"),
    "flat, address fields cut off": (bytes(8180) + multiboot.header_bytes(1 << 16), "is cut off"),
}


def refused(path: Path, **options: int) -> str:
    """The message with which `path` is refused; one line that names it."""
    with pytest.raises(ImageError) as caught:
        load_image(path, **{"memory": MEMORY, **options})  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_reason(tmp_path: Path, case: str) -> None:
    """Each way for a file to be wrong has its own message."""
    data, expected = BAD_FILES[case]
    assert expected in refused(write(tmp_path, "guest.elf", data))


def test_a_good_elf_is_not_refused(tmp_path: Path) -> None:
    """The file that the bad ones are made from loads, so each of them fails for its own change."""
    image = load_image(write(tmp_path, "guest.elf", GOOD), memory=MEMORY)
    assert image.entry == MIB
    assert image.symbols == {"start": MIB, "data": 2 * MIB}


def test_an_elf_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """No proper beginning of an ELF passes for the whole."""
    for size in range(4, len(GOOD)):
        message = refused(write(tmp_path, "guest.elf", GOOD[:size]))
        assert "truncated" in message or "no multiboot header" in message


def nothing(folder: Path) -> Path:
    return folder / "guest.bin"


def directory(folder: Path) -> Path:
    (folder / "guest.asm").mkdir()
    return folder / "guest.asm"


def empty(folder: Path) -> Path:
    return write(folder, "guest.bin", b"")


def empty_source(folder: Path) -> Path:
    return write(folder, "guest.asm", b"")


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "guest.bin")
    return folder / "guest.bin"


def below_a_file(folder: Path) -> Path:
    return write(folder, "file", b"x") / "guest.bin"


def nul_in_name(folder: Path) -> Path:
    return folder / "a\0guest.bin"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (nothing, "No such file or directory"),
        (directory, "is a directory"),
        (empty, "is empty"),
        (empty_source, "is empty"),
        (fifo, "is not a regular file"),
        (below_a_file, "Not a directory"),
        (nul_in_name, "null"),
    ],
)
def test_a_path_that_is_no_guest_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], expected: str
) -> None:
    """What cannot be opened, or has nothing in it, is said before anything is tried, and nothing hangs."""
    assert expected in refused(make(tmp_path))


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's refusal to open a file is passed on as one line."""

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = write(tmp_path, "guest.bin", b"\xf4")
    monkeypatch.setattr(Path, "open", deny)
    assert "Permission denied" in refused(path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"load": -1}, "the load address -0x1 is not a 32-bit address"),
        ({"load": 1 << 32}, "the load address 0x100000000 is not a 32-bit address"),
        ({"entry": -1}, "the entry point -0x1 is not a 32-bit address"),
        ({"entry": 0x100001}, "lies in no loaded segment"),
        ({"load": 0xB8000}, "overlaps the video and ROM area"),
        ({"load": 16 * MIB}, "give at least 17M with -m"),
        ({"load": 0x9E010}, "overlaps the multiboot information"),
        ({"load": 0xFFF}, "0xfff..0x1000 covers the first page of memory"),
        ({"load": 0x1000, "memory": 0x8000}, "leave no room for the multiboot information"),
        ({"memory": 0}, "does not fit in 0 bytes of memory"),
    ],
    ids=str,
)
def test_a_flat_binary_must_fit_where_it_is_put(
    tmp_path: Path, options: dict[str, int], expected: str
) -> None:
    """Addresses from the command line are checked as those from a file are."""
    assert expected in refused(write(tmp_path, "guest.bin", b"\xf4"), **options)


def test_only_a_flat_binary_takes_an_entry_point(tmp_path: Path) -> None:
    """An image that names its entry point does not silently ignore another."""
    placed = multiboot_header(2 * MIB, 2 * MIB, 0, 0, 2 * MIB)
    for name, data in (("a.asm", b"nop"), ("a.elf", GOOD), ("a.bin", placed)):
        assert "leave --entry out" in refused(write(tmp_path, name, data), entry=MIB)


def test_an_elf_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """`vmm build` into a place that is not there says so."""
    image = load_image(write(tmp_path, "guest.elf", GOOD), memory=MEMORY)
    with pytest.raises(ImageError, match=r"gone/guest\.elf: cannot be written: No such file"):
        build_elf(image, tmp_path / "gone" / "guest.elf")


def test_a_file_larger_than_any_memory_is_refused_unread(tmp_path: Path) -> None:
    """The size of a sparse file of a tebibyte is looked at, not its contents."""
    path = tmp_path / "guest.bin"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "reach past 4 GiB" in refused(path)


def assert_loadable(image: Image) -> None:
    """What every loaded image promises to the machine, whatever file it came from."""
    last = LOWEST
    for segment in sorted(image.segments, key=lambda s: s.address):
        assert segment.address >= last
        assert 0 < segment.size >= len(segment.data)
        assert segment.end <= HOLE_START or segment.address >= HOLE_END
        last = segment.end
    assert last <= MEMORY
    assert any(s.address <= image.entry < s.end for s in image.segments)


def load_or_refuse(folder: Path, data: bytes) -> None:
    try:
        image = load_image(write(folder, "guest.elf", data), memory=MEMORY)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert_loadable(image)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """GOOD with words of any size overwritten, mostly where it has headers, perhaps cut or longer."""
    data = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 6))):
        word = draw(
            st.one_of(
                st.binary(min_size=1, max_size=4),
                st.sampled_from((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, MIB, len(GOOD))).map(
                    lambda value: struct.pack("<I", value)
                ),
            )
        )
        at = draw(st.integers(0, len(data) - len(word)))
        data[at : at + len(word)] = word
    end = draw(st.one_of(st.none(), st.integers(1, len(data))))
    return bytes(data[:end]) + draw(st.binary(max_size=8))


@settings(max_examples=500, deadline=None)
@given(mutations())
def test_a_damaged_elf_is_loaded_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Whatever happens to an ELF's bytes, the outcome is an image that fits or an `ImageError`."""
    load_or_refuse(tmp_path_factory.getbasetemp(), data)


@settings(max_examples=200, deadline=None)
@given(
    addresses=st.lists(st.integers(0, (1 << 32) - 1) | st.integers(MIB, MIB + 300), min_size=5, max_size=5),
    flags=st.integers(0, (1 << 32) - 1) | st.just(1 << 16),
    before=st.integers(0, 20).map(lambda n: bytes(4 * n)),
    after=st.binary(max_size=100),
)
def test_any_address_fields_are_obeyed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, addresses: list[int], flags: int, before: bytes, after: bytes
) -> None:
    """Whatever a flat binary's multiboot header asks for, the outcome is an image that fits or an error."""
    data = before + multiboot_header(*addresses, flags=flags) + after
    load_or_refuse(tmp_path_factory.getbasetemp(), data)
