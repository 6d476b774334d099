"""A guest as a multiboot ELF32, so that other machines, QEMU and GRUB among them, can boot it too; or, if it is
made for Xen's interface, as one with Xen's notes, for a toolstack.

Nothing is put into the guest for this: the multiboot header stands in the file right after the ELF header,
where the search for it comes by and no program header reaches. Each segment becomes
a section as well, and the labels a symbol table, so that debuggers and `vmm` itself can name addresses.

Source: System V ABI, gABI 4.1, chapters 4 and 5; Multiboot Specification 0.6.96, 3.1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmm.errors import ImageError
from vmm.image import multiboot, xen
from vmm.image.image import ADDRESS_SPACE, Image, Segment
from vmm.image.load import checked, from_assembly
from vmm.image.xen import XenGuest

if TYPE_CHECKING:
    from vmm.image.asm import Assembly

HEADER = struct.Struct("<16sHHIIIIIHHHHHH")
PROGRAM_HEADER = struct.Struct("<8I")
SECTION_HEADER = struct.Struct("<10I")
SYMBOL = struct.Struct("<IIIBBH")
IDENT = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")  # 32-bit, little endian, version 1
ET_EXEC, EM_386 = 2, 3
PT_LOAD, PT_NOTE, PF_R, PF_RWX = 1, 4, 4, 7
SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_NOTE, SHT_NOBITS = 1, 2, 3, 7, 8
SHF_WRITE_ALLOC_EXEC = 7
SHN_ABS = 0xFFF1
GLOBAL = 1 << 4  # binding in st_info
ALIGN = 16


@dataclass(frozen=True, slots=True)
class Section:
    """One row of the section table: `data` in the file, or `size` bytes that are only in memory."""

    name: str
    type: int
    data: bytes = b""
    size: int = 0
    address: int = 0
    flags: int = 0
    link: int = 0
    info: int = 0
    entry_size: int = 0


def build_elf(guest: Image | Assembly, path: Path) -> None:
    """Write `guest` to `path` as an ELF that `qemu-system-i386 -kernel` boots.

    The multiboot information of a loaded image is left out: it belongs to the machine that loads. Raises
    `ImageError` if the image cannot be loaded anywhere or the file cannot be written.
    """
    image = guest if isinstance(guest, Image) else from_assembly(path.name, guest)
    own = image.segments
    if image.registers.get("eax") == multiboot.BOOT_MAGIC:
        own = tuple(s for s in own if s.address != image.registers["ebx"])
    segments = checked(replace(image, segments=own), ADDRESS_SPACE)
    data = elf_bytes(segments, image.entry, image.symbols, image.xen)
    try:
        path.write_bytes(data)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ImageError(f"{path}: cannot be written: {reason}: choose another -o") from None


def elf_bytes(
    segments: tuple[Segment, ...], entry: int, symbols: Mapping[str, int], guest: XenGuest | None = None
) -> bytes:
    """The file: ELF header, multiboot header, program headers, contents, section headers.

    A Xen guest has a note segment instead of the multiboot header, and its addresses are virtual.
    """
    sections = [
        Section(
            f".load{index}",
            SHT_PROGBITS if segment.data else SHT_NOBITS,
            segment.data,
            segment.size,
            segment.address,
            SHF_WRITE_ALLOC_EXEC,
        )
        for index, segment in enumerate(segments)
    ]
    sections += _symbol_sections(segments, symbols)
    noted = len(sections)
    if guest is not None:
        sections.append(Section(".note.Xen", SHT_NOTE, xen.note_bytes(guest.notes)))
    names, name_offsets = _strings(section.name for section in [*sections, Section(".shstrtab", 0)])
    sections.append(Section(".shstrtab", SHT_STRTAB, names))

    body = bytearray(HEADER.size)
    if guest is None:
        body += multiboot.header_bytes(multiboot.FLAG_MEMORY)
    program_table = len(body)
    program_headers = len(segments) + (guest is not None)
    body += bytes(PROGRAM_HEADER.size * program_headers)
    offsets = []
    for section in sections:
        body += bytes(-len(body) % ALIGN)
        offsets.append(len(body))
        body += section.data
    body += bytes(-len(body) % ALIGN)
    section_table = len(body)
    body += bytes(SECTION_HEADER.size)  # the null section
    for section, offset, name in zip(sections, offsets, name_offsets, strict=True):
        size = section.size or len(section.data)
        body += SECTION_HEADER.pack(
            name,
            section.type,
            section.flags,
            section.address,
            offset,
            size if section.type == SHT_NOBITS else len(section.data),
            section.link,
            section.info,
            1,
            section.entry_size,
        )
    HEADER.pack_into(
        body,
        0,
        IDENT,
        *(ET_EXEC, EM_386, 1, entry, program_table, section_table, 0),
        *(HEADER.size, PROGRAM_HEADER.size, program_headers),
        *(SECTION_HEADER.size, len(sections) + 1, len(sections)),
    )
    shift = 0 if guest is None else guest.virt_base - guest.paddr_offset
    for index, segment in enumerate(segments):
        PROGRAM_HEADER.pack_into(
            body,
            program_table + index * PROGRAM_HEADER.size,
            *(PT_LOAD, offsets[index], segment.address, segment.address - shift),
            *(len(segment.data), segment.size, PF_RWX, 1),
        )
    if guest is not None:
        at, length = offsets[noted], len(sections[noted].data)
        where = program_table + len(segments) * PROGRAM_HEADER.size
        PROGRAM_HEADER.pack_into(body, where, PT_NOTE, at, 0, 0, length, length, PF_R, 4)
    return bytes(body)


def _symbol_sections(segments: tuple[Segment, ...], symbols: Mapping[str, int]) -> list[Section]:
    """`.symtab` and `.strtab`; a symbol belongs to the section that its address lies in, or to none."""
    if not symbols:
        return []
    names, offsets = _strings(symbols)
    table = bytearray(SYMBOL.size)
    for value, offset in zip(symbols.values(), offsets, strict=True):
        home = next((i + 1 for i, s in enumerate(segments) if s.address <= value < s.end), SHN_ABS)
        table += SYMBOL.pack(offset, value % ADDRESS_SPACE, 0, GLOBAL, 0, home)
    string_section = len(segments) + 2  # after the null section, the segments and .symtab
    return [
        Section(".symtab", SHT_SYMTAB, bytes(table), link=string_section, info=1, entry_size=SYMBOL.size),
        Section(".strtab", SHT_STRTAB, names),
    ]


def _strings(names: Iterable[str]) -> tuple[bytes, list[int]]:
    """A string table, and the offset of each name in it."""
    table, offsets = bytearray(1), []
    for name in names:
        offsets.append(len(table))
        table += name.encode() + b"\0"
    return bytes(table), offsets
