"""memory_op: how much memory a domain has, and which frames. One row a subcommand.

The commands that work through a list of extents return how many of them they did; one that cannot be done ends the
list. So Xen has it, and so a guest knows how far it came.

Source: Xen's rules, as its common/memory.c and arch/x86/mm.c have them (do_memory_op, arch_memory_op), for a domain
without privileges whose physical memory is not translated for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import (
    ADD_TO_PHYSMAP,
    ADD_TO_PHYSMAP_BATCH,
    DOMAIN_ID,
    E820_ENTRY,
    EXCHANGE_SIZE,
    EXCHANGED_OFFSET,
    MACH2PHYS_ENTRIES,
    MACH2PHYS_VIRT_END,
    MACH2PHYS_VIRT_START,
    MACHPHYS_MAPPING,
    MEMF_ADDRESS_BITS,
    MEMF_POPULATE_ON_DEMAND,
    MEMOP_COMMAND_MASK,
    MEMOP_EXTENT_SHIFT,
    MEMORY_MAP,
    REMOVE_FROM_PHYSMAP,
    SET_MEMORY_MAP,
    MemoryOp,
    Reservation,
)
from vmm.monitor.paravirt.domain import Continued, PagedDomain
from vmm.monitor.paravirt.guest import GuestMemory

MAX_ORDER = 9  # of an extent, for a domain without privileges
_MAX_EXTENTS = 0xFFFF_FFFF >> MEMOP_EXTENT_SHIFT
_GMFN_RANGE, _GMFN_FOREIGN = 3, 4  # XENMAPSPACE_*
MAX_RANGES = 1024  # of a memory map
_CONTINUED = frozenset((
    MemoryOp.INCREASE_RESERVATION, MemoryOp.DECREASE_RESERVATION, MemoryOp.POPULATE_PHYSMAP,
    MemoryOp.ADD_TO_PHYSMAP, MemoryOp.ADD_TO_PHYSMAP_BATCH,
))  # fmt: skip


@dataclass(frozen=True)
class MemoryRange:
    """A row of the memory map that a guest is shown: bytes, and an E820 type."""

    start: int
    size: int
    kind: int


class Reservations:
    """The frames of one domain, which has at most `max_pages`."""

    def __init__(self, domain: PagedDomain, max_pages: int) -> None:
        self._domain, self._frames, self._area = domain, domain.frames, domain.area
        self.max_pages = max_pages
        self.memory_map: tuple[MemoryRange, ...] = ()  # none: the guest is told that there is no such call
        self.maximum_pfns: Callable[[], int] = lambda: max_pages  # what the guest says in its shared_info
        self._rows: dict[int, Callable[[GuestMemory, int, int], int]] = {
            MemoryOp.INCREASE_RESERVATION: self._increase,
            MemoryOp.DECREASE_RESERVATION: self._decrease,
            MemoryOp.POPULATE_PHYSMAP: self._populate,
            MemoryOp.EXCHANGE: self._exchange,
            MemoryOp.MAXIMUM_RAM_PAGE: lambda _guest, _argument, _start: self._frames.size,
            MemoryOp.CURRENT_RESERVATION: self._about(lambda: self._frames.pages.get(domain.id, 0)),
            MemoryOp.MAXIMUM_RESERVATION: self._about(lambda: self.max_pages),
            MemoryOp.MAXIMUM_GPFN: self._about(lambda: max(self.maximum_pfns(), 1) - 1),
            MemoryOp.MACHPHYS_MAPPING: self._machphys_mapping,
            MemoryOp.MEMORY_MAP: self._memory_map,
            MemoryOp.MACHINE_MEMORY_MAP: self._privileged,
            MemoryOp.ADD_TO_PHYSMAP: self._add_to_physmap,
            MemoryOp.SET_MEMORY_MAP: self._set_memory_map,
            MemoryOp.ADD_TO_PHYSMAP_BATCH: self._add_to_physmap_batch,
            MemoryOp.REMOVE_FROM_PHYSMAP: self._remove_from_physmap,
        }

    def call(self, guest: GuestMemory, command: int, argument: int) -> int:
        """`command` carries in its upper bits how many extents of a continued call are done."""
        start, number = command >> MEMOP_EXTENT_SHIFT, command & MEMOP_COMMAND_MASK
        row = self._rows.get(number)
        if row is None:
            raise Refused(Errno.ENOSYS, f"memory operation {number}")
        if start and number not in _CONTINUED:
            raise Refused(Errno.EINVAL, "a call that is never continued")
        return row(guest, argument, start)

    def allocate(self, order: int = 0, below: int | None = None) -> int | None:
        """Frames for the domain, as `MachineFrames.allocate`; None also where it has as many as it may."""
        if self._frames.pages.get(self._domain.id, 0) + (1 << order) > self.max_pages:
            return None
        return self._frames.allocate(self._domain.id, order, below)

    # Lists of extents

    def _each(
        self, guest: GuestMemory, op: MemoryOp, argument: int, start: int, act: Callable[[Reservation, int], None]
    ) -> int:
        """Do what `act` does for the extents from `start` on, until one is refused; how many are done."""
        try:
            reservation = Reservation.unpack(guest.read(argument, Reservation.LAYOUT.size))
        except Refused:
            return start
        count = reservation.nr_extents
        if count > _MAX_EXTENTS or start >= count or not self._domain.is_own(reservation.domid):
            return start
        bits = reservation.mem_flags & MEMF_ADDRESS_BITS
        if reservation.extent_order > MAX_ORDER or 0 < bits <= 12:
            return start
        for number in range(start, count):
            if self._domain.should_yield(1 << reservation.extent_order) and number > start:
                raise Continued(op | number << MEMOP_EXTENT_SHIFT, argument)
            try:
                act(reservation, number)
            except Refused:
                return number
        return count

    def _increase(self, guest: GuestMemory, argument: int, start: int) -> int:
        def act(reservation: Reservation, number: int) -> None:
            mfn = self._extent(reservation)
            if reservation.extent_start:
                guest.write(reservation.extent_start + 4 * number, mfn.to_bytes(4, "little"))

        return self._each(guest, MemoryOp.INCREASE_RESERVATION, argument, start, act)

    def _populate(self, guest: GuestMemory, argument: int, start: int) -> int:
        def act(reservation: Reservation, number: int) -> None:
            where = reservation.extent_start + 4 * number
            pfn = int.from_bytes(guest.read(where, 4), "little")
            if reservation.mem_flags & MEMF_POPULATE_ON_DEMAND:
                raise Refused(Errno.EINVAL, "populate on demand, for oneself")
            mfn = self._extent(reservation)
            for page in range(1 << reservation.extent_order):
                self._area.set_physical(mfn + page, pfn + page & 0xFFFFFFFF)
            guest.write(where, mfn.to_bytes(4, "little"))

        return self._each(guest, MemoryOp.POPULATE_PHYSMAP, argument, start, act)

    def _extent(self, reservation: Reservation) -> int:
        bits = reservation.mem_flags & MEMF_ADDRESS_BITS
        mfn = self.allocate(reservation.extent_order, 1 << bits - 12 if bits else None)
        if mfn is None:
            raise Refused(Errno.ENOMEM, "no frames")
        return mfn

    def _decrease(self, guest: GuestMemory, argument: int, start: int) -> int:
        def act(reservation: Reservation, number: int) -> None:
            first = int.from_bytes(guest.read(reservation.extent_start + 4 * number, 4), "little")
            for mfn in range(first, first + (1 << reservation.extent_order)):
                self._remove(mfn)

        return self._each(guest, MemoryOp.DECREASE_RESERVATION, argument, start, act)

    def _remove(self, mfn: int) -> None:
        frames = self._frames
        if not frames.get(mfn, self._domain.id):
            raise Refused(Errno.ENXIO, f"frame {mfn:#x} is not the domain's")
        frames.drop_allocation(mfn)
        frames.put(mfn)

    # Exchange

    def _exchange(self, guest: GuestMemory, argument: int, _start: int) -> int:
        """Frames against others: in whole chunks, each of one extent of the larger kind."""
        data = guest.read(argument, EXCHANGE_SIZE)
        size = Reservation.LAYOUT.size
        given, wanted = Reservation.unpack(data[:size]), Reservation.unpack(data[size : 2 * size])
        done = int.from_bytes(data[EXCHANGED_OFFSET:], "little")
        try:
            self._check_exchange(given, wanted, done)
            chunk = max(given.extent_order, wanted.extent_order)
            per_chunk = 1 << chunk - given.extent_order, 1 << chunk - wanted.extent_order
            before = done
            while done < given.nr_extents:
                if self._domain.should_yield(1 << chunk) and done > before:
                    raise Continued(MemoryOp.EXCHANGE, argument)
                self._exchange_chunk(guest, given, wanted, done // per_chunk[0], per_chunk)
                done += per_chunk[0]
        finally:
            guest.write(argument + EXCHANGED_OFFSET, done.to_bytes(4, "little"))
        return 0

    def _check_exchange(self, given: Reservation, wanted: Reservation, done: int) -> None:
        if max(given.extent_order, wanted.extent_order) > MAX_ORDER:
            raise Refused(Errno.EPERM, "an extent of too high an order")
        amounts = given.nr_extents << given.extent_order, wanted.nr_extents << wanted.extent_order
        overflow = max(amounts) > 0xFFFFFFFF
        if done > given.nr_extents or given.domid != wanted.domid or overflow or amounts[0] != amounts[1]:
            raise Refused(Errno.EINVAL, "what is given and what is wanted do not match")
        if not self._domain.is_own(given.domid):
            raise Refused(Errno.ESRCH, f"domain {given.domid:#x}")

    def _exchange_chunk(
        self,
        guest: GuestMemory,
        given: Reservation,
        wanted: Reservation,
        number: int,
        per_chunk: tuple[int, int],
    ) -> None:
        frames, domain = self._frames, self._domain.id
        stolen: list[int] = []
        gained: list[int] = []
        bits = wanted.mem_flags & MEMF_ADDRESS_BITS
        try:
            for extent in range(per_chunk[0]):
                where = given.extent_start + 4 * (number * per_chunk[0] + extent)
                first = int.from_bytes(guest.read(where, 4), "little")
                for mfn in range(first, first + (1 << given.extent_order)):
                    frames.steal(mfn, domain)
                    stolen.append(mfn)
            for _ in range(per_chunk[1]):
                below = 1 << max(bits - 12, 0) if bits else None
                found = frames.allocate(domain, wanted.extent_order, below)
                if found is None:
                    raise Refused(Errno.ENOMEM, "no frames to exchange for")
                gained.append(found)
        except Refused:
            for mfn in stolen:
                frames.own(mfn, domain)
            for first in gained:
                for mfn in range(first, first + (1 << wanted.extent_order)):
                    frames.drop_allocation(mfn)
            raise
        for mfn in stolen:
            frames.give_up(mfn)
        for extent, first in enumerate(gained):
            where = wanted.extent_start + 4 * (number * per_chunk[1] + extent)
            pfn = int.from_bytes(guest.read(where, 4), "little")
            for page in range(1 << wanted.extent_order):
                self._area.set_physical(first + page, pfn + page & 0xFFFFFFFF)
            guest.write(where, first.to_bytes(4, "little"))

    # Questions

    def _about(self, answer: Callable[[], int]) -> Callable[[GuestMemory, int, int], int]:
        """A row that answers for the domain that the argument names."""

        def row(guest: GuestMemory, argument: int, _start: int) -> int:
            self._same_domain(DOMAIN_ID.unpack(guest.read(argument, DOMAIN_ID.size))[0])
            return answer()

        return row

    def _same_domain(self, domain: int) -> None:
        if not self._domain.is_own(domain):
            raise Refused(Errno.ESRCH, f"domain {domain:#x}")

    def _machphys_mapping(self, guest: GuestMemory, argument: int, _start: int) -> int:
        answer = MACH2PHYS_VIRT_START, MACH2PHYS_VIRT_END, MACH2PHYS_ENTRIES - 1
        guest.write(argument, MACHPHYS_MAPPING.pack(*answer))
        return 0

    def _memory_map(self, guest: GuestMemory, argument: int, _start: int) -> int:
        room, buffer = MEMORY_MAP.unpack(guest.read(argument, MEMORY_MAP.size))
        if not self.memory_map:
            raise Refused(Errno.ENOSYS, "the domain has no memory map")
        ranges = self.memory_map[:room]
        guest.write(buffer, b"".join(E820_ENTRY.pack(r.start, r.size, r.kind) for r in ranges))
        guest.write(argument, MEMORY_MAP.pack(len(ranges), buffer))
        return 0

    def _set_memory_map(self, guest: GuestMemory, argument: int, _start: int) -> int:
        """A domain may set its own."""
        domain, count, buffer = SET_MEMORY_MAP.unpack(guest.read(argument, SET_MEMORY_MAP.size))
        if count > MAX_RANGES:
            raise Refused(Errno.EINVAL, f"{count} ranges in a memory map")
        self._same_domain(domain)
        data = guest.read(buffer, count * E820_ENTRY.size)
        self.memory_map = tuple(MemoryRange(*row) for row in E820_ENTRY.iter_unpack(data))
        return 0

    # What is not for such a domain

    def _privileged(self, _guest: GuestMemory, _argument: int, _start: int) -> int:
        raise Refused(Errno.EPERM, "for a privileged domain")

    def _add_to_physmap(self, guest: GuestMemory, argument: int, start: int) -> int:
        if start > 0xFFFF:
            raise Refused(Errno.EDOM, "more pages than the call can have")
        domain, _, space, _, _ = ADD_TO_PHYSMAP.unpack(guest.read(argument, ADD_TO_PHYSMAP.size))
        if space == _GMFN_FOREIGN:
            raise Refused(Errno.ENOSYS, "a foreign frame")
        self._same_domain(domain)
        raise Refused(Errno.EACCES, "the domain's physical memory is not translated")

    def _add_to_physmap_batch(self, guest: GuestMemory, argument: int, start: int) -> int:
        if start > 0xFFFF:
            raise Refused(Errno.EDOM, "more pages than the call can have")
        data = guest.read(argument, ADD_TO_PHYSMAP_BATCH.size)
        domain, space, *_ = ADD_TO_PHYSMAP_BATCH.unpack(data)
        if space == _GMFN_RANGE:
            raise Refused(Errno.EOPNOTSUPP, "a range of frames")
        self._same_domain(domain)
        raise Refused(Errno.EACCES, "the domain's physical memory is not translated")

    def _remove_from_physmap(self, guest: GuestMemory, argument: int, _start: int) -> int:
        domain, _ = REMOVE_FROM_PHYSMAP.unpack(guest.read(argument, REMOVE_FROM_PHYSMAP.size))
        self._same_domain(domain)
        raise Refused(Errno.EACCES, "the domain's physical memory is not translated")
