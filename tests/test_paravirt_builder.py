"""The domain builder, and the layouts of what it leaves in memory."""

from __future__ import annotations

import pytest

from tests import domains
from vmm.errors import ImageError
from vmm.image.load import from_assembly
from vmm.machine.machine import Machine
from vmm.machine.memory import Memory
from vmm.monitor.paravirt import builder
from vmm.monitor.paravirt.abi import domain as abi
from vmm.monitor.paravirt.abi import events, rings, sched, traps
from vmm.monitor.paravirt.frames import MachineFrames
from vmm.monitor.paravirt.mmu import DirectPaging

MIB = 1 << 20


def started(**options: str) -> domains.Guest:
    guest = domains.build("stop: jmp stop\n", **options)  # type: ignore[arg-type]
    guest.run_to("stop")
    return guest


def test_structures_have_the_sizes_of_a_32_bit_compiler() -> None:
    """As Xen's headers come out for i386."""
    assert abi.START_INFO.size == 1112
    assert (abi.EVTCHN_PENDING, abi.EVTCHN_MASK, abi.WALLCLOCK) == (0x800, 0x880, 0x900)
    assert (abi.MAX_PFN, abi.NMI_REASON, abi.WC_SEC_HI, abi.SHARED_INFO_SIZE) == (0x90C, 0x914, 0x924, 0x928)
    assert abi.TIME_INFO.size == 32 and abi.TIME + abi.TIME_INFO.size == abi.VCPU_INFO_SIZE == 64
    assert traps.TRAP_INFO.size == 8 and traps.CALLBACK_REGISTER.size == 12
    assert (
        sched.RUNSTATE_INFO.size == 44 and sched.SCHED_POLL.size == 16 and sched.SINGLESHOT_TIMER.size == 12
    )
    assert events.STATUS.size == 24 and events.BIND_INTERDOMAIN.size == 12 and events.ALLOC_UNBOUND.size == 8
    assert rings.SETUP_TABLE.size == 16 and rings.QUERY_SIZE.size == 16 and rings.GRANT_ENTRY.size == 8


def test_the_processor_stands_at_the_entry_in_ring_1() -> None:
    """ESI is start_info, ESP the boot stack, selectors the flat ones of ring 1, events masked."""
    guest = domains.build("stop: jmp stop\n")
    state = guest.machine.state
    assert (state.eip, state.cpl) == (guest.symbol("start"), 1)
    values = guest.monitor.registers()
    assert [values[name] for name in ("cs", "ss", "ds", "es")] == [0xE019, 0xE021, 0xE021, 0xE021]
    assert not values["eflags"] & 0x200
    assert guest.read(values["esi"], 16).to_bytes(16, "little") == b"xen-3.0-x86_32p\0"
    guest.read(values["esp"] - 4)


def test_the_region_has_its_parts_in_order() -> None:
    """Kernel, frame list, start_info, store, console, tables, stack; then room, up to 4 MiB."""
    guest = started(command_line="one two")
    info = guest.read("start_info")
    fields = abi.START_INFO.unpack(guest.domain.guest.read(info, abi.START_INFO.size))
    _, pages, shared, flags, store, store_port, console, console_port = fields[:8]
    tables, table_count, frame_list, module, length, line, first, count = fields[8:]
    assert frame_list % 4096 == 0 and frame_list >= guest.symbol("user_stack")
    assert info == frame_list + -(-4 * pages // 4096) * 4096
    assert tables == info + 3 * 4096
    assert line.rstrip(b"\0") == b"one two"
    assert (flags, module, length) == (0, 0, 0) and shared == guest.domain.shared.base
    assert (first, count) == (frame_list >> 12, -(-4 * pages // 4096))
    stack = tables + table_count * 4096
    end = -(-(stack + 4096 + 512 * 1024) // (4 * MIB)) * 4 * MIB
    guest.read(end - 4)
    with pytest.raises(Exception, match="#PF"):
        guest.read(end)
    assert len({store, console, shared >> 12}) == 3 and len({store_port, console_port}) == 2


def test_frames_are_not_where_they_seem() -> None:
    """Machine frames are no identity of pseudo-physical ones, and the table back says so, read-only."""
    guest = started()
    info = guest.read("start_info")
    pages, frame_list = guest.read(info + 32), guest.read(info + 68)
    frames = guest.words(frame_list, pages)
    assert len(set(frames)) == pages
    assert sum(mfn == pfn for pfn, mfn in enumerate(frames)) < pages // 100
    for pfn in (0, 1, 77, pages - 1):
        assert guest.read(0xF5800000 + 4 * frames[pfn]) == pfn
    writable = guest.domain.guest
    with pytest.raises(Exception, match="EFAULT"):
        writable.write(0xF5800000, b"1234")
    everything = guest.machine.memory.size >> 12
    assert everything - pages > 64, "some frames stay the hypervisor's"


def test_page_tables_are_mapped_read_only_and_all_else_writable() -> None:
    """The guest's kernel may store anywhere in its region but there."""
    guest = started()
    info = guest.read("start_info")
    tables, count = guest.read(info + 60), guest.read(info + 64)
    for page in (0, info, tables - 4096, tables + 4096 * count):
        guest.domain.guest.write(page, b"x")
    for page in range(tables, tables + 4096 * count, 4096):
        with pytest.raises(Exception, match="EFAULT"):
            guest.domain.guest.write(page, b"x")


@pytest.mark.parametrize("base", [0, 0x400000, 0xC0000000, 0x20000000])
@pytest.mark.parametrize("size", [1, 4 * MIB, 30 * MIB])
def test_any_base_and_size_have_a_region(base: int, size: int) -> None:
    """The tables map all of the region, themselves included, wherever it is."""
    kernel = builder.Kernel("k", (builder.KernelSegment(base, b"", size),), base, base)
    region = builder.plan(kernel, 16384)
    assert region.l1_first << 21 <= base
    assert (region.l1_first + region.l1_count) << 21 >= region.end
    assert (
        set(range(base >> 30, (region.end - 1 >> 30) + 1)) <= set(region.directories)
        and 3 in region.directories
    )
    assert region.end % (4 * MIB) == 0 or region.end - region.stack >= 512 << 10


@pytest.mark.parametrize(
    ("base", "size", "message"),
    [
        (0xF5000000, 8 * MIB, "link it lower"),
        (0, 128 * MIB, "give more memory"),
        (0xC0000000, 900 * MIB, "link it lower"),
    ],
)
def test_what_does_not_fit_is_one_line(base: int, size: int, message: str) -> None:
    """Not into the hypervisor's part, not into more memory than there is."""
    kernel = builder.Kernel("k", (builder.KernelSegment(base, b"", size),), base, base)
    with pytest.raises(ImageError, match=message):
        builder.plan(kernel, 16384)


def test_a_command_line_has_room_or_is_refused() -> None:
    """1,023 bytes fit."""
    assert started(command_line="x" * 1023)
    with pytest.raises(ImageError, match="shorten it"):
        domains.build("stop: jmp stop\n", command_line="x" * 1024)


def test_the_hypercall_page_is_where_the_note_says() -> None:
    """A call into it is a hypercall."""
    guest = domains.build(
        """
        xor ebx, ebx
        call hypercall_page + 17 * 32
        mov [seen], eax
done:
stop:   jmp stop
"""
    )
    guest.run_to("done")
    assert guest.read("seen") == 4 << 16 | 17


def test_frames_in_bulk_are_those_given_one_by_one() -> None:
    """The frame table is the same afterwards, count for count; so is the machine-to-physical table."""

    def paging() -> tuple[Memory, MachineFrames, DirectPaging]:
        memory = Memory(6 << 20)
        frames = MachineFrames(memory)
        made = DirectPaging(
            memory, frames, 1, max_pages=9999, flush=lambda: None, invalidate=lambda _address: None
        )
        return memory, frames, made

    memory, frames, bulk = paging()
    other_memory, other_frames, single = paging()
    assert bulk.hand_frames(700) == [single.hand_frame(pfn) for pfn in range(700)]
    assert frames.save() == other_frames.save()
    assert bytes(memory.bytes) == bytes(other_memory.bytes)
    assert len(bulk.hand_frames(10_000)) == other_frames.free_frames(), "as many as there are"


@pytest.mark.parametrize("by_frame", [False, True])
def test_a_module_lies_behind_the_kernel(by_frame: bool) -> None:
    """mod_start is its virtual address, or its pseudo-physical page where the kernel's note asks for that."""
    assembly = domains.assemble("stop: jmp stop\n")
    image = from_assembly("m", assembly)
    assert image.xen is not None
    segments = tuple(builder.KernelSegment(s.address, s.data, s.size) for s in image.segments)
    module = bytes(range(256)) * 20
    kernel = builder.Kernel(
        "m", segments, image.entry, 0, image.xen.hypercall_page, mod_start_pfn=by_frame, module=module
    )
    machine = Machine(8 << 20)
    machine.attach(builder.Builder(machine, kernel).build())
    info = machine.state.get(6)
    start, length, flags = (machine.linear.read(info + offset, 4) for offset in (72, 76, 40))
    assert (length, flags) == (len(module), 8 if by_frame else 0)
    address = start << 12 if by_frame else start
    assert machine.linear.read(address, 16).to_bytes(16, "little") == module[:16]
    assert address % 4096 == 0 and address >= kernel.end
