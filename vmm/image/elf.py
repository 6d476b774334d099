"""Multiboot ELF32: what a linker, or `vmm build`, makes of a guest.

The program headers place the image, at their physical addresses as every boot loader has it, and the
multiboot header in the first 8 KiB says that it is a kernel at all. The hard part is that every number in
the file may be a lie: each is checked against the file's size, or against memory, before it is used, so
that nothing but `ImageError` ever comes out of a bad file.

pyelftools names and decodes the structures. Its `ELFFile` is not used: importing it costs, with the DWARF
reader that it brings, a good part of a guest's whole start.

Source: System V ABI, gABI 4.1, chapters 4 and 5; Multiboot Specification 0.6.96.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any, BinaryIO

from elftools.elf.structs import ELFStructs

from vmm.errors import ImageError
from vmm.image import flat, multiboot, xen
from vmm.image.image import ADDRESS_SPACE, Image, Segment, check, check_xen

MAGIC = b"\x7fELF"
HEADER_SIZE, PROGRAM_HEADER_SIZE, SECTION_HEADER_SIZE = 52, 32, 40
MAX_HEADERS = 1024  # of a kind; real kernels have fewer than a hundred sections
MAX_NAME = 256
SYMBOL = struct.Struct("<IIIBBH")
SYMBOL_TYPES = frozenset((0, 1, 2))  # NOTYPE, OBJECT, FUNC
PF_X = 1

# The bytes of e_ident that must be so: offset, wanted, what another value means and what to do.
IDENT = (
    (4, 1, "not a 32-bit ELF (EI_CLASS is {}; 2 is 64-bit): link it for i386, `-m elf_i386`"),
    (5, 1, "not a little-endian ELF (EI_DATA is {}): link it for i386, `-m elf_i386`"),
    (6, 1, "an ELF of unknown version {}: link it again"),
)


def read(name: str, file: BinaryIO, size: int, memory: int) -> Image:
    """The image in `file`, which has `size` bytes, for a machine of `memory` bytes."""
    start = file.read(multiboot.SEARCH)
    structs, elf = _header(name, start)
    notes = _xen_notes(name, file, size, structs, elf)
    if xen.is_paravirtual(notes):
        return _xen_guest(name, file, size, structs, elf, notes, memory)
    header = multiboot.find_header(name, start)
    if header is None:
        raise ImageError(
            f"{name}: no multiboot header in the first {multiboot.SEARCH} bytes: "
            "link one in at the front, make the ELF with `vmm build`, or give it Xen's notes"
        )
    symbols = _symbols(name, file, size, structs, elf)
    if header.addresses is not None:
        placed = flat.read_placed(name, file, multiboot.place(name, header, size), memory)
        return replace(placed, symbols=symbols)
    loads = _loads(name, file, size, structs, elf)
    entry = _physical_entry(int(elf.e_entry), loads)
    planned = check(name, [Segment(p.p_paddr, b"", p.p_memsz) for p in loads], entry, memory)
    by_address = {p.p_paddr: p for p in loads if p.p_memsz}
    segments = tuple(
        Segment(
            s.address,
            _read(name, file, by_address[s.address].p_offset, by_address[s.address].p_filesz),
            s.size,
        )
        for s in planned
    )
    return Image(name, segments, entry, symbols=symbols)


def _xen_guest(
    name: str,
    file: BinaryIO,
    size: int,
    structs: ELFStructs,
    elf: Any,
    notes: dict[str, int | str],
    memory: int,
) -> Image:
    """A guest for Xen's PV interface, with the virtual addresses that its notes make of the physical ones."""
    guest = xen.guest(name, notes, int(elf.e_entry))
    shift = guest.virt_base - guest.paddr_offset
    loads = [p for p in _loads(name, file, size, structs, elf) if p.p_memsz]
    for load in loads:
        if not 0 <= load.p_paddr + shift <= ADDRESS_SPACE - load.p_memsz:
            raise ImageError(
                f"{name}: its segment at {load.p_paddr:#x} would go to {load.p_paddr + shift:#x}, no 32-bit address: "
                "correct the notes VIRT_BASE and PADDR_OFFSET"
            )
    check_xen(name, [Segment(p.p_paddr + shift, b"", p.p_memsz) for p in loads], guest, memory)
    segments = tuple(
        Segment(p.p_paddr + shift, _read(name, file, p.p_offset, p.p_filesz), p.p_memsz)
        for p in sorted(loads, key=lambda p: int(p.p_paddr))
    )
    symbols = _symbols(name, file, size, structs, elf)
    return Image(name, segments, guest.entry, symbols=symbols, xen=guest)


def _xen_notes(
    name: str, file: BinaryIO, size: int, structs: ELFStructs, elf: Any
) -> dict[str, int | str]:
    """Xen's notes: those of note segments, else of note sections, else of the section that came before them."""
    found: dict[str, int | str] = {}
    table = _headers(
        name, file, size, "program headers", elf.e_phoff, elf.e_phnum, elf.e_phentsize, PROGRAM_HEADER_SIZE
    ) if elf.e_phnum else []  # fmt: skip
    for entry in table:
        header = structs.Elf_Phdr.parse(entry)
        if header.p_type == "PT_NOTE":
            found |= xen.parse_notes(name, _notes(name, file, size, header.p_offset, header.p_filesz))
    if xen.is_paravirtual(found) or not elf.e_shoff or not elf.e_shnum:
        return found
    rows = _headers(
        name, file, size, "section headers", elf.e_shoff, elf.e_shnum, elf.e_shentsize, SECTION_HEADER_SIZE
    )
    sections = [structs.Elf_Shdr.parse(entry) for entry in rows]
    for section in sections:
        if section.sh_type == "SHT_NOTE":
            found |= xen.parse_notes(name, _notes(name, file, size, section.sh_offset, section.sh_size))
    if xen.is_paravirtual(found) or elf.e_shstrndx >= len(sections):
        return found
    names = sections[elf.e_shstrndx]
    if names.sh_size > MAX_HEADERS * MAX_NAME:
        return found
    texts = _part(name, file, size, "section names", names.sh_offset, names.sh_size)
    wanted = xen.LEGACY_SECTION.encode() + b"\0"
    for section in sections:
        if texts[section.sh_name : section.sh_name + len(wanted)] == wanted:
            text = _notes(name, file, size, section.sh_offset, section.sh_size)
            found |= xen.parse_legacy(name, text.decode("latin-1"))
    return found


def _notes(name: str, file: BinaryIO, size: int, offset: int, length: int) -> bytes:
    if length > xen.NOTE_LIMIT:
        raise ImageError(f"{name}: it claims {length} bytes of notes: it is damaged; link it again")
    return _part(name, file, size, "notes", offset, length)


def _header(name: str, start: bytes) -> tuple[ELFStructs, Any]:
    if len(start) < HEADER_SIZE:
        raise ImageError(
            f"{name}: a truncated ELF of {len(start)} bytes (its header has {HEADER_SIZE}): copy it again"
        )
    for offset, wanted, problem in IDENT:
        if start[offset] != wanted:
            raise ImageError(f"{name}: {problem.format(start[offset])}")
    structs = ELFStructs(little_endian=True, elfclass=32)
    structs.create_basic_structs()
    structs.create_advanced_structs("ET_EXEC", "EM_386", "ELFOSABI_SYSV")
    elf = structs.Elf_Ehdr.parse(start[:HEADER_SIZE])
    if elf.e_machine != "EM_386":
        raise ImageError(f"{name}: an ELF for machine {elf.e_machine}, not i386 (3): link it for i386")
    if elf.e_type not in ("ET_EXEC", "ET_DYN"):
        raise ImageError(f"{name}: an ELF of type {elf.e_type}, not an executable: link it")
    return structs, elf


def _part(name: str, file: BinaryIO, size: int, what: str, offset: int, length: int) -> bytes:
    """`length` bytes at `offset` of the file, which holds `what`."""
    if offset + length > size:
        raise ImageError(
            f"{name}: its {what} ({length} bytes at offset {offset:#x}) reach past the end of the file "
            f"({size} bytes): it is truncated or damaged; copy or link it again"
        )
    return _read(name, file, offset, length)


def _read(name: str, file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ImageError(f"{name}: the file became shorter while it was read: try again")
    return data


def _headers(
    name: str, file: BinaryIO, size: int, what: str, offset: int, count: int, each: int, right: int
) -> list[bytes]:
    """A table of `count` headers of `each` bytes, which has to be `right`."""
    if count > MAX_HEADERS or each != right:
        raise ImageError(
            f"{name}: it claims {count} {what} of {each} bytes (they have {right}): "
            "it is damaged; link it again"
        )
    data = _part(name, file, size, what, offset, count * each)
    return [data[i : i + each] for i in range(0, len(data), each)]


def _loads(name: str, file: BinaryIO, size: int, structs: ELFStructs, elf: Any) -> list[Any]:
    """The PT_LOAD program headers, each of them inside the file."""
    if not elf.e_phnum:
        raise ImageError(f"{name}: it has no program headers, so nothing to load: link it as an executable")
    table = _headers(
        name, file, size, "program headers", elf.e_phoff, elf.e_phnum, elf.e_phentsize, PROGRAM_HEADER_SIZE
    )
    loads = []
    for index, entry in enumerate(table):
        header = structs.Elf_Phdr.parse(entry)
        if header.p_type != "PT_LOAD":
            continue
        if header.p_filesz > header.p_memsz:
            raise ImageError(
                f"{name}: program header {index} has {header.p_filesz} bytes in the file for "
                f"{header.p_memsz} bytes of memory: it is damaged; link it again"
            )
        if (end := header.p_offset + header.p_filesz) > size:
            raise ImageError(
                f"{name}: program header {index} needs the file up to byte {end}, "
                f"which has only {size}: it is truncated; copy or link it again"
            )
        loads.append(header)
    return loads


def _physical_entry(entry: int, loads: list[Any]) -> int:
    """e_entry is virtual; QEMU and GRUB make it physical by the code segment that it lies in."""
    for header in loads:
        if header.p_flags & PF_X and header.p_vaddr <= entry < header.p_vaddr + header.p_filesz:
            return int(entry - header.p_vaddr + header.p_paddr)
    return entry


def _symbols(name: str, file: BinaryIO, size: int, structs: ELFStructs, elf: Any) -> dict[str, int]:
    """Name to value of the first symbol table; a stripped file has none."""
    if not elf.e_shoff or not elf.e_shnum:
        return {}
    table = _headers(
        name, file, size, "section headers", elf.e_shoff, elf.e_shnum, elf.e_shentsize, SECTION_HEADER_SIZE
    )
    sections = [structs.Elf_Shdr.parse(entry) for entry in table]
    found = next((section for section in sections if section.sh_type == "SHT_SYMTAB"), None)
    if found is None:
        return {}
    if found.sh_link >= len(sections):
        raise ImageError(
            f"{name}: its symbols name string table {found.sh_link}, which is not there: strip it"
        )
    strings = sections[found.sh_link]
    names = _part(name, file, size, "symbol names", strings.sh_offset, strings.sh_size)
    symbols = _part(name, file, size, "symbols", found.sh_offset, found.sh_size // SYMBOL.size * SYMBOL.size)
    result = {}
    for at, value, _, info, _, section in SYMBOL.iter_unpack(symbols):
        if section and info & 0xF in SYMBOL_TYPES and at < len(names):
            end = names.find(b"\0", at, at + MAX_NAME)
            label = names[at : end if end >= 0 else at + MAX_NAME].decode("utf-8", "replace")
            if label:
                result[label] = value
    return result
