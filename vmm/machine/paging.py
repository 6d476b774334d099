"""The page walk of 32-bit paging, done by us: linear addresses, access rights, A and D bits, #PF codes.

Source: SDM volume 3A, 4.3 (translation), 4.6 (access rights), 4.7 (error code), 4.8 (A and D).
"""

from __future__ import annotations

from dataclasses import dataclass

from vmm.isa.words import CR0, CR4, PTE
from vmm.isa.words import PageFaultError as Code
from vmm.machine.memory import Memory

_LARGE_RESERVED = 0x3FE000  # bits 21:13 of a 4 MiB entry, where PSE-36 is not offered


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
) -> Translation:
    """Translate `address` as the CPU would for this access; raises `PageFault`.

    `mark` sets A and D in the guest's entries as hardware does; without it memory is untouched (for
    looking at a guest without disturbing it). Paging off is the identity.
    """
    if not cr0 & CR0.PG:
        return Translation(address & 0xFFFFF000 & a20_mask, True)
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
        if entry_address != pde_address and not pde & PTE.A:
            memory.write(pde_address, 4, pde | PTE.A)
    return Translation(frame & a20_mask, may_write and bool(entry & PTE.D))
