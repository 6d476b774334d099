"""The page walk, done by us: linear addresses, access rights, A and D bits, #PF codes.

Two formats: that of 32-bit paging, and PAE's, with 64-bit entries, three levels and pages that must not be executed.

Source: SDM volume 3A, 4.3 (32-bit paging), 4.4 (PAE paging), 4.6 (access rights), 4.7 (error code), 4.8 (A and D).
"""

from __future__ import annotations

from dataclasses import dataclass

from vmm.isa.words import CR0, CR4, PTE, PaeEntry
from vmm.isa.words import PageFaultError as Code
from vmm.machine.memory import ONES, Memory

_LARGE_RESERVED = 0x3FE000  # bits 21:13 of a 4 MiB entry, where PSE-36 is not offered
PHYSICAL_BITS = 36  # of an address in a PAE entry
_RESERVED = 0x7FFF_FFFF_FFFF_FFFF & ~((1 << PHYSICAL_BITS) - 1)  # of a PAE entry, at every level
_LARGE_PAE_RESERVED = 0x1FE000  # bits 20:13 of a 2 MiB entry


class PageFault(Exception):
    """#PF: the linear address for CR2, and the error code."""

    def __init__(self, address: int, code: int) -> None:
        super().__init__(f"#PF({code}) at {address:#x}")
        self.address, self.code = address, code


@dataclass(frozen=True, slots=True)
class Translation:
    """Where a page lies and what may be done there without another walk."""

    frame: int  # physical address of the 4 KiB page
    writable: bool  # by this privilege, and D is already set
    executable: bool = True


def walk(
    memory: Memory,
    cr0: int,
    cr3: int,
    cr4: int,
    a20_mask: int,
    address: int,
    *,
    write: bool,
    user: bool,
    mark: bool = True,
    fetch: bool = False,
    no_execute: bool = False,
) -> Translation:
    """Translate `address` as the CPU would for this access; raises `PageFault`.

    `mark` sets A and D in the guest's entries as hardware does, A in the directory's as soon as it is used, whatever
    comes of the walk (SDM 3A 4.8); without it memory is untouched (for looking at a guest without disturbing it).
    Paging off is the identity. `no_execute` is EFER.NXE.
    """
    if not cr0 & CR0.PG:
        return Translation(address & 0xFFFFF000 & a20_mask, True)
    if cr4 & CR4.PAE:
        return _walk_pae(memory, cr0, cr3, a20_mask, address, write, user, mark, fetch, no_execute)
    code = (Code.WR if write else 0) | (Code.US if user else 0)
    pde_address = ((cr3 & 0xFFFFF000) + (address >> 20 & 0xFFC)) & a20_mask
    pde = memory.read(pde_address, 4)
    if not pde & PTE.P:
        raise PageFault(address, code)
    if pde & PTE.PS and cr4 & CR4.PSE:
        if pde & _LARGE_RESERVED:
            raise PageFault(address, code | Code.P | Code.RSVD)
        rights, entry, entry_address = pde, pde, pde_address
        frame = pde & 0xFFC00000 | address & 0x3FF000
    else:
        if mark and not pde & PTE.A:
            memory.write(pde_address, 4, pde | PTE.A)
        entry_address = ((pde & 0xFFFFF000) + (address >> 10 & 0xFFC)) & a20_mask
        entry = memory.read(entry_address, 4)
        if not entry & PTE.P:
            raise PageFault(address, code)
        rights = pde & entry
        frame = entry & 0xFFFFF000
    may_write = bool(rights & PTE.RW) or not user and not cr0 & CR0.WP
    if user and not rights & PTE.US or write and not may_write:
        raise PageFault(address, code | Code.P)
    if mark:
        wanted = PTE.A | (PTE.D if write else 0)
        if entry & wanted != wanted:
            entry |= wanted
            memory.write(entry_address, 4, entry)
    return Translation(frame & a20_mask, may_write and bool(entry & PTE.D))


def pae_pointer(cr3: int, address: int, mask: int) -> int:
    """Physical address of the page-directory-pointer entry for a linear address."""
    return ((cr3 & 0xFFFFFFE0) + (address >> 27 & 0x18)) & mask


def pae_directory(pointer: int, address: int, mask: int) -> int:
    """The same of the page-directory entry; `pointer` is the entry above it, `mask` is for 64 bits."""
    return ((pointer & PaeEntry.FRAME) + (address >> 18 & 0xFF8)) & mask


def pae_table(entry: int, address: int, mask: int) -> int:
    """The same of the page-table entry."""
    return ((entry & PaeEntry.FRAME) + (address >> 9 & 0xFF8)) & mask


def wide_mask(a20_mask: int) -> int:
    """The A20 gate's mask for physical addresses of more than 32 bits, which it leaves alone above."""
    return a20_mask | ~0xFFFFFFFF


def _read_entry(memory: Memory, address: int) -> int:
    """A 64-bit entry. Beyond 4 GiB is no memory: it reads as ones, as every empty address does."""
    return memory.read(address, 8) if address < 1 << 32 else (1 << 64) - 1


def _walk_pae(
    memory: Memory,
    cr0: int,
    cr3: int,
    a20_mask: int,
    address: int,
    write: bool,
    user: bool,
    mark: bool,
    fetch: bool,
    no_execute: bool,
) -> Translation:
    """The same with PAE's tables.

    The first level's entries are read from memory at every walk, where a processor keeps them in registers from the
    load of CR3 on; whoever changes one must flush, then there is no difference. The load refuses bits of them that
    are reserved; here those above 51 and of the address are refused as in any entry, the others mean nothing.
    """
    mask = wide_mask(a20_mask)
    code = Code.WR if write else 0
    if user:
        code |= Code.US
    if fetch and no_execute:
        code |= Code.ID
    reserved = _RESERVED if no_execute else _RESERVED | PaeEntry.NX
    pointer = _read_entry(memory, pae_pointer(cr3, address, mask))
    if not pointer & PaeEntry.P:
        raise PageFault(address, code)
    if pointer & (_RESERVED | PaeEntry.NX):
        raise PageFault(address, code | Code.P | Code.RSVD)
    pde_address = pae_directory(pointer, address, mask)
    pde = _read_entry(memory, pde_address)
    if not pde & PaeEntry.P:
        raise PageFault(address, code)
    if pde & reserved or pde & PaeEntry.PS and pde & _LARGE_PAE_RESERVED:
        raise PageFault(address, code | Code.P | Code.RSVD)
    if pde & PaeEntry.PS:
        both, either, entry, entry_address = pde, pde, pde, pde_address
        frame = pde & PaeEntry.FRAME & ~0x1FFFFF | address & 0x1FF000
    else:
        if mark and not pde & PaeEntry.A:
            memory.write(pde_address, 8, pde | PaeEntry.A)
        entry_address = pae_table(pde, address, mask)
        entry = _read_entry(memory, entry_address)
        if not entry & PaeEntry.P:
            raise PageFault(address, code)
        if entry & reserved:
            raise PageFault(address, code | Code.P | Code.RSVD)
        both, either = pde & entry, pde | entry
        frame = entry & PaeEntry.FRAME
    may_write = bool(both & PaeEntry.RW) or not user and not cr0 & CR0.WP
    executable = not either & PaeEntry.NX
    if user and not both & PaeEntry.US or write and not may_write or fetch and not executable:
        raise PageFault(address, code | Code.P)
    if mark:
        wanted = PaeEntry.A | (PaeEntry.D if write else 0)
        if entry & wanted != wanted:
            entry |= wanted
            memory.write(entry_address, 8, entry)
    frame &= mask
    return Translation(
        frame if frame < 1 << 32 else ONES, may_write and bool(entry & PaeEntry.D), executable
    )
