"""Direct paging: the hypercalls by which a guest changes page tables that the processor really walks.

SKELETON of the contract; the functions become real in the next commits.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.machine.memory import Memory
from vmm.monitor.paravirt.frames import MachineFrames
from vmm.monitor.paravirt.guest import GuestMemory


class DirectPaging:
    """The memory of one domain. Every hypercall returns what the guest gets in EAX, or raises `Refused`.

    `flush` empties the processor's TLB, `invalidate` drops one linear page of it. `base` is the machine frame of
    the L3 table in force: CR3 is `base << 12`, with CR0.PG and WP and CR4.PAE, in the registers that
    `machine.linear.source` shows. The frames of the hypervisor itself (the machine-to-physical table, the tables
    of its part of the address space) are taken from `frames` here, so make this first and then hand out frames.
    """

    def __init__(
        self,
        memory: Memory,
        frames: MachineFrames,
        domain: int,
        *,
        max_pages: int,
        flush: Callable[[], None],
        invalidate: Callable[[int], None],
    ) -> None:
        # Asked between the items of a long batch: True ends the call early, to be continued (raises `Continued`).
        self.should_yield: Callable[[], bool] = lambda: False
        raise NotImplementedError

    # For whoever builds the domain

    def hand_frame(self, pfn: int) -> int:
        """Give the domain a zeroed frame as its pseudo-physical `pfn` (machine-to-physical set); the frame number.

        Raises `Refused(ENOMEM)` when there is none, or the domain has `max_pages`.
        """
        raise NotImplementedError

    def share_frame(self, *, writable: bool) -> int:
        """A zeroed frame of the hypervisor's that the domain may map (shared_info, grant tables); its number."""
        raise NotImplementedError

    def own_frame(self) -> int:
        """A zeroed frame of the hypervisor's that no guest may map (the reserved page of the GDT, a TSS)."""
        raise NotImplementedError

    def show(self, page: int, mfn: int, *, writable: bool = False) -> int:
        """Map a frame in the hypervisor's area at page number `page` (32..511) of it; its linear address.

        Ring 1 may read it, and write it if `writable`; ring 3 only by `GuestAccess.is_implicit`.
        """
        raise NotImplementedError

    def start(self, l3: int) -> None:
        """Validate and pin the initial L3 table, which the builder has filled, and put it in force."""
        raise NotImplementedError

    # Hypercalls; arguments in the order of the guest's registers

    def mmu_update(self, guest: GuestMemory, requests: int, count: int, done: int, foreign: int) -> int:
        """`done` (0 for none) points at a word that gets the number of requests done."""
        raise NotImplementedError

    def mmuext_op(self, guest: GuestMemory, operations: int, count: int, done: int, foreign: int) -> int:
        raise NotImplementedError

    def update_va_mapping(self, guest: GuestMemory, address: int, value: int, flags: int) -> int:
        """`value` is the 64-bit entry: the guest's second and third argument."""
        raise NotImplementedError

    def update_va_mapping_otherdomain(
        self, guest: GuestMemory, address: int, value: int, flags: int, domain: int
    ) -> int:
        raise NotImplementedError

    def set_gdt(self, guest: GuestMemory, frame_list: int, entries: int) -> int:
        """The guest's GDT pages appear at `gdt_base`, before the reserved page: see `show_reserved_gdt`."""
        raise NotImplementedError

    def update_descriptor(self, machine_address: int, descriptor: int) -> int:
        raise NotImplementedError

    def memory_op(self, guest: GuestMemory, command: int, argument: int) -> int:
        raise NotImplementedError

    def vm_assist(self, command: int, kind: int) -> int:
        raise NotImplementedError

    # Faults that are the hypervisor's business

    def emulate_store(self, address: int, data: bytes) -> bool:
        """The guest's store to a page of an L1 table that it maps read-only, done as an update; False if it is not.

        `data` is 1, 2, 4 or 8 bytes, aligned. False means that the guest gets its page fault.
        """
        raise NotImplementedError

    def compare_exchange(self, address: int, old: bytes, new: bytes) -> bytes | None:
        """The same for CMPXCHG: what was there (equal to `old` if `new` is there now); None if not to be emulated."""
        raise NotImplementedError

    def map_ldt_page(self, offset: int) -> bool:
        """After a fault over a selector of the LDT: whether the page at byte `offset` has now been mapped."""
        raise NotImplementedError

    def show_reserved_gdt(self, mfn: int) -> None:
        """The hypervisor's page of descriptors, seen after the guest's fourteen."""
        raise NotImplementedError

    @property
    def gdt_base(self) -> int:
        """Linear address for GDTR; the limit is FIRST_RESERVED_GDT_BYTE + 4095, whatever the guest has."""
        raise NotImplementedError

    @property
    def ldt_base(self) -> int:
        """Linear address for LDTR's base; its limit is `ldt_entries * 8 - 1`, and null without entries."""
        raise NotImplementedError

    @property
    def ldt_entries(self) -> int:
        raise NotImplementedError
