"""Xen guests as files: notes, the older section, what our own sources say, and what is wrong in each."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.errors import ImageError
from vmm.image import xen
from vmm.image.asm import assemble_text
from vmm.image.build import build_elf
from vmm.image.image import Image, Segment
from vmm.image.load import from_assembly, load_image
from vmm.image.xen import XenGuest

MEMORY = 16 << 20
GOOD: dict[str, int | str] = {
    "ENTRY": 0x100000, "HYPERCALL_PAGE": 0x101000, "VIRT_BASE": 0, "XEN_VERSION": "xen-3.0", "LOADER": "generic",
    "GUEST_OS": "test", "PAE_MODE": "yes",
}  # fmt: skip
NOTES = """
xen_elfnote_entry equ start
xen_elfnote_virt_base equ 0
xen_elfnote_hypercall_page equ page
section .data
xen_elfnote_xen_version: db 'xen-3.0', 0
xen_elfnote_loader: db 'generic', 0
xen_elfnote_pae_mode: db 'yes', 0
section .bss
alignb 4096
page: resb 4096
section .text
start: hlt
"""


def elf(tmp_path: Path, notes: bytes, *, legacy: bytes = b"", physical: int = 0x100000) -> Path:
    """An ELF with one page at 1 MiB, these notes, and a section `__xen_guest`."""
    code, headers = b"\xf4" * 16, 3
    offset = 52 + headers * 32
    names = b"\0__xen_guest\0"
    parts = code + notes + legacy + names
    fields = (2, 3, 1, 0x100000, 52, offset + len(parts), 0, 52, 32, headers, 40, 3, 2)
    header = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\x01\x01\x01", *fields)
    programs = struct.pack("<8I", 1, offset, 0x100000, physical, len(code), 0x2000, 7, 1)
    programs += struct.pack("<8I", 4, offset + len(code), 0, 0, len(notes), len(notes), 4, 4)
    programs += struct.pack("<8I", 0, 0, 0, 0, 0, 0, 0, 0)
    at = offset + len(code) + len(notes)
    sections = bytes(40)
    sections += struct.pack("<10I", 1, 1, 0, 0, at, len(legacy), 0, 0, 1, 0)
    sections += struct.pack("<10I", 0, 3, 0, 0, at + len(legacy), len(names), 0, 0, 1, 0)
    path = tmp_path / "guest.elf"
    path.write_bytes(header + programs + parts + sections)
    return path


def test_notes_say_where_a_guest_goes(tmp_path: Path) -> None:
    """Numbers and texts of the notes become the image's."""
    image = load_image(elf(tmp_path, xen.note_bytes(GOOD)), memory=MEMORY)
    assert image.xen == XenGuest(0x100000, 0, 0, 0x101000, False, GOOD)
    assert [s.address for s in image.segments] == [0x100000] and not image.registers


def test_physical_addresses_go_to_the_virtual_base(tmp_path: Path) -> None:
    """Pseudo-physical is the segment's physical address less PADDR_OFFSET; virtual is that plus VIRT_BASE."""
    notes = GOOD | {
        "VIRT_BASE": 0xC0000000,
        "PADDR_OFFSET": 0x20000000,
        "ENTRY": 0xC0100000,
        "HYPERCALL_PAGE": 0xC0101000,
    }
    image = load_image(elf(tmp_path, xen.note_bytes(notes), physical=0x20100000), memory=MEMORY)
    assert image.segments[0].address == 0xC0100000


def test_the_older_section_says_the_same(tmp_path: Path) -> None:
    """KEY=value by commas; the hypercall page is a page number there, PADDR_OFFSET the virtual base if not given."""
    text = b"GUEST_OS=test,XEN_VER=xen-3.0,VIRT_BASE=0x100000,HYPERCALL_PAGE=0x1,PAE=yes,LOADER=generic\0"
    image = load_image(elf(tmp_path, b"", legacy=text), memory=MEMORY)
    assert image.xen is not None
    assert (image.xen.virt_base, image.xen.paddr_offset, image.xen.hypercall_page) == (
        0x100000,
        0x100000,
        0x101000,
    )


def without(*labels: str, **changes: int | str) -> bytes:
    return xen.note_bytes({k: v for k, v in (GOOD | changes).items() if k not in labels})


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        (without(XEN_VERSION="xen-2.0"), "this is xen-3.0"),
        (without("LOADER"), "generic"),
        (without(PAE_MODE="no"), "PAE"),
        (without("PAE_MODE"), "PAE"),
        (without(ENTRY=0x5000), "entry point 0x5000 does not lie in its image"),
        (without(HYPERCALL_PAGE=0x101001), "does not begin a page"),
        (without(HYPERCALL_PAGE=0x900000), "hypercall page 0x900000 does not lie in its image"),
        (without(VIRT_BASE=0x400001), "not a multiple of a page"),
        (without("VIRT_BASE", PADDR_OFFSET=0x1000), "give both"),
        (without(VIRT_BASE=0xFFFFF000), "no 32-bit address"),
        (without(PADDR_OFFSET=0x200000), "no 32-bit address"),
        (without(FEATURES="!auto_translated_physmap"), "cannot have"),
        (without(FEATURES="teleportation"), "does not exist"),
        (xen.note_bytes(GOOD)[:-4], "more than there are"),
        (xen.note_bytes(GOOD) + b"\1\0\0", "in the middle of one"),
        (xen.note_bytes(GOOD) + struct.pack("<III", 4, 3, 1) + b"Xen\0abc\0", "is a number"),
        (xen.note_bytes(GOOD) + struct.pack("<III", 4, 8, 1) + b"Xen\0" + b"\xff" * 8, "no 32-bit number"),
        (struct.pack("<III", 4, 0xFFFFFFF0, 5) + b"Xen\0xyz", "more than there are"),
    ],
)
def test_what_is_wrong_with_notes_is_one_line(tmp_path: Path, notes: bytes, message: str) -> None:
    """Each in its own words."""
    with pytest.raises(ImageError) as error:
        load_image(elf(tmp_path, notes), memory=MEMORY)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"XEN_VER=xen-3.0,LOADER=generic,PAE=yes,VIRT_BASE=ten", "no number"),
        (b"XEN_VER=xen-3.0,LOADER=generic,PAE=yes,VIRT_BASE=0x1000000000", "no 32-bit number"),
        (b"XEN_VER=xen-3.0,LOADER=generic,VIRT_BASE=0", "PAE"),
    ],
)
def test_what_is_wrong_with_the_older_section_is_one_line(tmp_path: Path, text: bytes, message: str) -> None:
    """Each in its own words."""
    with pytest.raises(ImageError, match=message):
        load_image(elf(tmp_path, b"", legacy=text), memory=MEMORY)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.binary(max_size=40).map(lambda tail: xen.note_bytes(GOOD) + b"Xen\0" + tail),
    )
)
def test_any_bytes_for_notes_are_an_image_or_one_line(data: bytes) -> None:
    """No note, however broken, gives anything but `ImageError`."""
    try:
        notes = xen.parse_notes("n", data)
        if xen.is_paravirtual(notes):
            xen.guest("n", notes, 0)
    except ImageError as error:
        assert "\n" not in str(error)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="XENVIR_BASE=,0x19 PHYCAL\0", max_size=60))
def test_any_text_for_the_older_section(text: str) -> None:
    """The same for that."""
    try:
        xen.parse_legacy("n", text)
    except ImageError as error:
        assert "\n" not in str(error)


def test_a_source_says_it_by_labels_and_its_elf_by_notes(tmp_path: Path) -> None:
    """`vmm build` writes a note segment, no multiboot header, and what it writes loads as the source does."""
    source = from_assembly("s", assemble_text("bits 32\norg 0x100000\n" + NOTES))
    path = tmp_path / "built.elf"
    build_elf(source, path)
    data = path.read_bytes()
    assert struct.pack("<I", 0x1BADB002) not in data[:8192]
    assert b"\4\0\0\0" + struct.pack("<II", 8, 5) + b"Xen\0xen-3.0\0" in data
    image = load_image(path, memory=MEMORY)
    assert image.xen == source.xen and image.entry == source.entry
    assert [(s.address, s.size) for s in image.segments] == [(s.address, s.size) for s in source.segments]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("xen_elfnote_entrance equ 5", "names no Xen note"),
        ("xen_elfnote_guest_os equ 5", "labels no text"),
        ("section .bss\nxen_elfnote_guest_os: resb 4\nsection .text", "labels no text"),
    ],
)
def test_what_is_wrong_with_labels_is_one_line(line: str, message: str) -> None:
    """A note that does not exist, a text that is none."""
    with pytest.raises(ImageError, match=message):
        from_assembly("s", assemble_text("bits 32\norg 0x100000\n" + NOTES + line + "\n"))


def test_images_without_notes_are_as_before() -> None:
    """A guest that says nothing of Xen is none of Xen's."""
    image = from_assembly("s", assemble_text("start: hlt\n"))
    assert image.xen is None
    assert Image("n", (Segment(0x100000, b"", 1),), 0x100000).xen is None
