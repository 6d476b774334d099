"""The domain builder: from a kernel to a domain that stands at its entry, as a toolstack leaves it.

Into one region of pseudo-physical memory, mapped from the kernel's virtual base on, go in this order: the kernel's
image, a module, the list of machine frames, start_info, the pages of XenStore and console, the page tables, the
boot stack; then at least 512 KiB of room, up to a multiple of 4 MiB. The page tables lie in the region that they map,
read-only, and everything else is writable. The machine frames behind it are wherever the hypervisor had some.

Sources: Xen's public headers xen.h ("start-of-day memory layout") and arch-x86/xen-x86_32.h; elfnote.h.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vmm.errors import ImageError
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.words import EFlags, PaeEntry
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.state import ESI
from vmm.machine.devices.rtc import EPOCH_2000
from vmm.machine.machine import Machine
from vmm.machine.memory import PAGE
from vmm.monitor.paravirt.abi import domain as abi
from vmm.monitor.paravirt.abi import memory as layout
from vmm.monitor.paravirt.abi.events import Virq
from vmm.monitor.paravirt.abi.hypercalls import hypercall_page
from vmm.monitor.paravirt.abi.rings import GRANT_CONSOLE, GRANT_STORE
from vmm.monitor.paravirt.access import GuestAccess
from vmm.monitor.paravirt.console import Console, Serial
from vmm.monitor.paravirt.emulate import REAL_CR0, REAL_CR4
from vmm.monitor.paravirt.frames import FrameType, MachineFrames
from vmm.monitor.paravirt.machinery import DOMAIN_ID, Domain
from vmm.monitor.paravirt.mmu import DirectPaging
from vmm.monitor.paravirt.monitor import ParavirtMonitor
from vmm.monitor.paravirt.shared import SharedInfo
from vmm.monitor.paravirt.store import Store

PADDING, ROUND = 512 << 10, 4 << 20
RESERVED = 64  # frames that stay the hypervisor's, for grant tables and the like; and so that there are some
TSS_SELECTOR, LDT_SELECTOR = 0xE040, 0xE048
_TSS_PAGE = 32  # of the hypervisor's private area
_FLAT = {
    layout.FLAT_RING1_CS: 0xBB, layout.FLAT_RING1_DS: 0xB3, layout.FLAT_RING3_CS: 0xFB, layout.FLAT_RING3_DS: 0xF3,
}  # fmt: skip
_TABLE = PaeEntry.P | PaeEntry.RW | PaeEntry.US | PaeEntry.A
_PAGE = PaeEntry.P | PaeEntry.A
_WRITABLE = PaeEntry.RW | PaeEntry.D


@dataclass(frozen=True)
class KernelSegment:
    """`size` bytes at virtual `address`: `data`, then zeroes."""

    address: int
    data: bytes
    size: int


@dataclass(frozen=True)
class Kernel:
    """What the builder must know of a guest: the image by virtual addresses, and what its notes say."""

    name: str
    segments: tuple[KernelSegment, ...]
    entry: int
    virt_base: int
    hypercall_page: int | None = None
    mod_start_pfn: bool = False
    command_line: str = ""
    module: bytes = b""

    @property
    def end(self) -> int:
        return max(segment.address + segment.size for segment in self.segments)


@dataclass(frozen=True)
class Region:
    """Where things lie, by virtual address; `tables` are the L3, then L2s, then L1s."""

    base: int
    module: int
    frame_list: int
    start_info: int
    store: int
    console: int
    tables: int
    directories: tuple[int, ...]  # gigabytes that have an L2
    l1_first: int  # number of the first 2 MiB that have an L1
    l1_count: int
    stack: int
    end: int

    @property
    def table_count(self) -> int:
        return 1 + len(self.directories) + self.l1_count

    @property
    def stack_top(self) -> int:
        return self.stack + PAGE


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


def plan(kernel: Kernel, pages: int) -> Region:
    """Lay the region out for a domain of `pages` pages; raises `ImageError` where it cannot be."""
    base = kernel.virt_base
    module = _up(kernel.end, PAGE)
    frame_list = module + _up(len(kernel.module), PAGE)
    start_info = frame_list + _up(4 * pages, PAGE)
    store, console = start_info + PAGE, start_info + 2 * PAGE
    tables = start_info + 3 * PAGE
    first = base >> 21
    count = 1
    while True:
        end_of_all = base + (count << 21)
        last_l1 = end_of_all - 1 >> 21
        l1_count = last_l1 - first + 1
        directories = tuple(sorted({*range(base >> 30, (end_of_all - 1 >> 30) + 1), 3}))
        stack = tables + PAGE * (1 + len(directories) + l1_count)
        end = _up(stack + PAGE + PADDING, ROUND)
        if end > layout.HYPERVISOR_VIRT_START:
            raise ImageError(
                f"{kernel.name}: its region would end at {end:#x}, in the hypervisor's part of the address space "
                f"({layout.HYPERVISOR_VIRT_START:#x}): link it lower"
            )
        if end <= end_of_all:
            break
        count = end - base + (1 << 21) - 1 >> 21
    size = end - base
    if size > pages * PAGE:
        raise ImageError(
            f"{kernel.name}: it needs {size >> 20} MiB from its virtual base {base:#x} on to start, and the domain "
            f"has {pages * PAGE >> 20}: give more memory with -m"
        )
    return Region(
        base, module, frame_list, start_info, store, console, tables, directories, first, l1_count, stack, end
    )


class Builder:
    """Builds one domain on `machine`. Raises `ImageError` if the kernel does not fit."""

    def __init__(self, machine: Machine, kernel: Kernel) -> None:
        self.machine, self.kernel = machine, kernel
        self._frames = MachineFrames(machine.memory)
        self._paging = DirectPaging(
            machine.memory,
            self._frames,
            DOMAIN_ID,
            max_pages=machine.memory.size // PAGE,
            flush=self._flush,
            invalidate=lambda _address: machine.engine.flush_tlb(),
        )
        shared = self._paging.share_frame(writable=True)
        self._reserved = self._paging.own_frame()
        self._task = self._paging.own_frame()
        self.p2m = self._give_memory()
        self.region = plan(kernel, len(self.p2m))
        self.domain = Domain(machine, self._frames, self._paging, SharedInfo(machine.memory, shared))

    def _flush(self) -> None:
        """The base may be another one, too."""
        self.machine.state.cr3 = self._paging.base << 12
        self.machine.engine.flush_tlb()

    def _give_memory(self) -> list[int]:
        return self._paging.hand_frames(max(0, self._frames.free_frames() - RESERVED))

    # Memory by virtual address, before there is any mapping

    def _frame(self, address: int) -> int:
        return self.p2m[address - self.region.base >> 12]

    def _put(self, address: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            here = address + done
            length = min(len(data) - done, PAGE - here % PAGE)
            self.machine.memory.load((self._frame(here) << 12) + here % PAGE, data[done : done + length])
            done += length

    def build(self) -> ParavirtMonitor:
        """Fill memory, start paging, and put the processor at the kernel's entry."""
        kernel, region, domain = self.kernel, self.region, self.domain
        for segment in kernel.segments:
            self._put(segment.address, segment.data)
        self._put(region.module, kernel.module)
        self._put(region.frame_list, b"".join(mfn.to_bytes(4, "little") for mfn in self.p2m))
        if kernel.hypercall_page is not None:
            self._put(kernel.hypercall_page, hypercall_page())
        self._connect()
        self._put(region.start_info, self._start_info())
        self._write_tables()
        self._segments()
        self._shared_page()
        access = GuestAccess(self.machine, self._paging)
        monitor = ParavirtMonitor(self.machine, domain, access)
        self._paging.start(self._frame(region.tables))
        for ring in (region.store, region.console):
            self._frames.get_with_type(self._frame(ring), DOMAIN_ID, FrameType.WRITABLE)  # domain 0 maps it
        self._enter()
        return monitor

    def _connect(self) -> None:
        """XenStore and console: pages, event channels, grants, and what the store says of them."""
        domain, machine, region = self.domain, self.machine, self.region
        store_frame, console_frame = self._frame(region.store), self._frame(region.console)
        store = Store(machine.memory, store_frame, DOMAIN_ID)
        console = Console(machine.memory, console_frame, Serial(machine.bus))
        self.store_port = domain.events.connect(store.kicked)
        self.console_port = domain.events.connect(console.kicked)
        store.notify = lambda: domain.events.notify(self.store_port)
        console.notify = lambda: domain.events.notify(self.console_port)
        domain.store, domain.console = store, console

        def arrived() -> None:
            if not console.arrived():
                domain.events.raise_virq(Virq.CONSOLE)

        machine.devices.uart.on_arrival = arrived
        domain.grants.seed(GRANT_CONSOLE, console_frame)
        domain.grants.seed(GRANT_STORE, store_frame)
        store.publish(
            {
                "name": self.kernel.name,
                "domid": str(DOMAIN_ID),
                "memory/target": str(len(self.p2m) * PAGE >> 10),
                "memory/static-max": str(len(self.p2m) * PAGE >> 10),
                "cpu/0/availability": "online",
                "console/ring-ref": str(console_frame),
                "console/port": str(self.console_port),
                "console/limit": "1048576",
                "console/type": "xenconsoled",
                "store/ring-ref": str(store_frame),
                "store/port": str(self.store_port),
                "control/platform-feature-multiprocessor-suspend": "1",
                "device": "",
                "data": "",
            }
        )

    def _start_info(self) -> bytes:
        kernel, region = self.kernel, self.region
        line = kernel.command_line.encode("utf-8", "surrogateescape")
        if len(line) >= abi.MAX_COMMAND_LINE or b"\0" in line:
            raise ImageError(
                f"{kernel.name}: the guest's command line has {len(line)} bytes, and may have "
                f"{abi.MAX_COMMAND_LINE - 1} without a NUL: shorten it"
            )
        flags = abi.SIF_MOD_START_PFN if kernel.mod_start_pfn else 0
        module = region.module if kernel.module else 0
        if module and kernel.mod_start_pfn:
            module = module - region.base >> 12
        frame_list_pages = _up(4 * len(self.p2m), PAGE) // PAGE
        return abi.START_INFO.pack(
            abi.MAGIC,
            len(self.p2m),
            self.domain.shared.base,
            flags,
            self._frame(region.store),
            self.store_port,
            self._frame(region.console),
            self.console_port,
            region.tables,
            region.table_count,
            region.frame_list,
            module,
            len(kernel.module),
            line,
            region.frame_list - region.base >> 12,
            frame_list_pages,
        )

    # Page tables and segments

    def _entries(self, table: int, first: int, entries: Iterable[int]) -> None:
        self._put(table + 8 * first, b"".join(entry.to_bytes(8, "little") for entry in entries))

    def _write_tables(self) -> None:
        region = self.region
        l2 = region.tables + PAGE
        l1 = l2 + PAGE * len(region.directories)
        for number, gigabyte in enumerate(region.directories):
            self._entries(region.tables, gigabyte, [self._frame(l2 + PAGE * number) << 12 | PaeEntry.P])
        for number in range(region.l1_count):
            slot = region.l1_first + number
            table = l2 + PAGE * region.directories.index(slot >> 9)
            self._entries(table, slot & 511, [self._frame(l1 + PAGE * number) << 12 | _TABLE])
        read_only = range(region.tables, region.tables + PAGE * region.table_count)
        for page in range(region.base, region.end, PAGE):
            table = l1 + PAGE * ((page >> 21) - region.l1_first)
            entry = self._frame(page) << 12 | _PAGE | (0 if page in read_only else _WRITABLE)
            self._entries(table, page >> 12 & 511, [entry])

    def _segments(self) -> None:
        """The hypervisor's page of descriptors, and the registers of the descriptor tables."""
        state, memory, paging = self.machine.state, self.machine.memory, self._paging
        task = paging.show(_TSS_PAGE, self._task)
        rows = {selector: Descriptor.segment(0, 0xFFFFF, access, 0xC) for selector, access in _FLAT.items()}
        rows[TSS_SELECTOR] = Descriptor.segment(task, 0x67, 0x80 | SystemType.TSS32_AVAILABLE, 0)
        for selector, descriptor in rows.items():
            offset = (selector & ~7) - layout.FIRST_RESERVED_GDT_BYTE
            memory.load((self._reserved << 12) + offset, bytes(descriptor))
        paging.show_reserved_gdt(self._reserved)
        state.set_table(at.GDT, paging.gdt_base, layout.FIRST_RESERVED_GDT_BYTE + PAGE - 1)
        state.set_table(at.IDT, 0, 0)
        state.load_segment(at.TR, TSS_SELECTOR, task, 0x67, 0x8000 | SystemType.TSS32_AVAILABLE << 8)
        state.load_null(at.LDT)
        paging.segments.on_ldt = self._load_ldt

    def _load_ldt(self) -> None:
        paging, state = self._paging, self.machine.state
        if paging.ldt_entries:
            state.load_segment(at.LDT, LDT_SELECTOR, paging.ldt_base, paging.ldt_entries * 8 - 1, 0x8200)
        else:
            state.load_null(at.LDT)

    def _shared_page(self) -> None:
        domain = self.domain
        domain.shared.upcall_mask = 1
        domain.write_time()
        domain.shared.write_wallclock(EPOCH_2000 * 1_000_000_000)

    def _enter(self) -> None:
        machine, region = self.machine, self.region
        s = machine.state
        s.load()
        s.cr0, s.cr4 = REAL_CR0, REAL_CR4
        for register in range(8):
            s.set(register, 0)
        flat_code = Descriptor.segment(0, 0xFFFFF, _FLAT[layout.FLAT_RING1_CS], 0xC)
        flat_data = Descriptor.segment(0, 0xFFFFF, _FLAT[layout.FLAT_RING1_DS], 0xC)
        s.load_descriptor(at.SS, layout.FLAT_RING1_DS, flat_data)
        s.load_descriptor(at.CS, layout.FLAT_RING1_CS, flat_code)
        for segment in (at.DS, at.ES, at.FS, at.GS):
            s.load_descriptor(segment, layout.FLAT_RING1_DS, flat_data)
        s.eflags = EFlags.ONE | EFlags.IF
        s.esp = self.domain.vcpu.kernel_sp = region.stack_top
        s.set(ESI, region.start_info)
        s.eip = self.kernel.entry
        s.store()
        machine.engine.flush_tlb()
