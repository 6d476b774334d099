"""The frame table: owners, the two counts, what may change when; against a model that counts by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paravirt_memory import DATA, DOMAIN, L1, Board, P
from vmm.machine.memory import PAGE, Memory
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import DOMID_IO, DOMID_XEN, ExtendedOp, MmuExt
from vmm.monitor.paravirt.frames import ALLOCATED, NOBODY, VALIDATED, XEN_L2, FrameType, MachineFrames

SIZE = 2 << 20  # 256 frames of I/O, 256 free
L1_TYPE, WRITABLE, SEGDESC = FrameType.L1, FrameType.WRITABLE, FrameType.SEGDESC


@pytest.fixture
def frames() -> MachineFrames:
    return MachineFrames(Memory(SIZE))


def taken(frames: MachineFrames, order: int = 0) -> int:
    mfn = frames.allocate(DOMAIN, order)
    assert mfn is not None
    return mfn


def test_the_first_megabyte_is_io(frames: MachineFrames) -> None:
    """Nobody gets it, and nothing past the end of memory is a frame."""
    assert frames.size == 512 and frames.free_frames() == 256
    assert frames.owners[0xFF] == DOMID_IO and frames.owners[0x100] == NOBODY
    assert frames.is_io(0xB8) and frames.is_io(512) and not frames.is_io(0x100)
    assert not frames.get(0xB8, DOMAIN) and not frames.get(512, DOMAIN) and not frames.get(-1, DOMAIN)
    assert not frames.get(0x100, DOMAIN), "it is free"


def test_frames_come_from_the_top_zeroed_and_are_the_domains() -> None:
    """A frame that was used and freed has nothing of its former owner's."""
    memory = Memory(SIZE)
    frames = MachineFrames(memory)
    mfn = taken(frames)
    assert mfn == 511 and frames.owners[mfn] == DOMAIN and frames.counts[mfn] == 1
    memory.load(mfn * PAGE, b"secret")
    frames.drop_allocation(mfn)
    assert frames.owners[mfn] == NOBODY and frames.pages[DOMAIN] == 0
    assert frames.allocate(DOMID_XEN) == mfn
    assert memory.bytes[mfn * PAGE :][:6] == bytes(6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 40)), max_size=40))
def test_extents_are_aligned_and_never_shared(steps: list[tuple[bool, int, int]]) -> None:
    """What is allocated is free before, in a row, aligned to its size; all of it can be had, and no more."""
    frames = MachineFrames(Memory(SIZE))
    held: list[tuple[int, int]] = []
    for give_back, order, which in steps:
        if give_back and held:
            first, size = held.pop(which % len(held))
            for mfn in range(first, first + size):
                frames.drop_allocation(mfn)
            continue
        size = 1 << order
        free = set(range(256, 512)) - {m for first, n in held for m in range(first, first + n)}
        fits = [at for at in range(256, 512, size) if free.issuperset(range(at, at + size))]
        found = frames.allocate(DOMAIN, order)
        assert found == (fits[-1] if fits else None)
        if found is not None:
            held.append((found, size))
    assert frames.free_frames() == 256 - sum(size for _, size in held)
    below = frames.allocate(DOMAIN, 0, 300)
    assert below is None or below < 300


def test_a_frame_stays_until_its_last_reference(frames: MachineFrames) -> None:
    """To give it up ends the allocation, once; it is free when nothing refers to it."""
    mfn = taken(frames)
    assert frames.get(mfn, DOMAIN) and not frames.get(mfn, DOMAIN + 1)
    frames.drop_allocation(mfn)
    frames.drop_allocation(mfn)
    assert frames.owners[mfn] == DOMAIN and frames.counts[mfn] == 1 and not frames.flags[mfn] & ALLOCATED
    freed: list[int] = []
    frames.on_free = freed.append
    frames.put(mfn)
    assert frames.owners[mfn] == NOBODY and freed == [mfn]
    with pytest.raises(AssertionError):
        frames.put(mfn)


def test_a_frame_has_one_role_at_a_time(frames: MachineFrames) -> None:
    """Another role is EINVAL while the type count is not zero, and is taken when it is."""
    mfn = taken(frames)
    for _ in range(3):
        frames.get_type(mfn, WRITABLE)
    with pytest.raises(Refused) as caught:
        frames.get_type(mfn, SEGDESC)
    assert caught.value.errno == Errno.EINVAL and frames.type_counts[mfn] == 3
    for _ in range(3):
        frames.put_type(mfn)
    frames.get_type(mfn, SEGDESC)
    assert frames.is_locked_as(mfn) == SEGDESC
    with pytest.raises(Refused):
        frames.get_with_type(mfn, DOMAIN, WRITABLE)
    assert frames.counts[mfn] == 1, "the general reference is not kept either"


def test_a_role_is_checked_once_and_let_go_of_once(frames: MachineFrames) -> None:
    """Tables are validated at the first use, released at the last; descriptors stay good until another role."""
    seen: list[str] = []

    def note(what: str) -> Callable[[int, int], None]:
        return lambda _mfn, flags: seen.append(f"{what} {flags}")

    frames.validate[FrameType.L2], frames.release[FrameType.L2] = note("check"), note("release")
    frames.validate[SEGDESC] = note("descriptors")
    table, page = taken(frames), taken(frames)
    for _ in range(2):
        frames.get_type(table, FrameType.L2, XEN_L2)
        frames.get_type(page, SEGDESC)
    with pytest.raises(Refused):
        frames.get_type(table, FrameType.L2)
    for _ in range(2):
        frames.put_type(table)
        frames.put_type(page)
    assert not frames.flags[table] & (VALIDATED | XEN_L2) and frames.flags[page] & VALIDATED
    frames.get_type(table, FrameType.L2)
    frames.get_type(page, SEGDESC)
    frames.put_type(page)
    frames.get_type(page, WRITABLE)
    frames.put_type(page)
    frames.get_type(page, SEGDESC)
    assert seen == [f"check {XEN_L2}", "descriptors 0", f"release {XEN_L2}", "check 0", "descriptors 0"]


def test_a_role_that_is_refused_leaves_none(frames: MachineFrames) -> None:
    """The error is that of the check, and the frame may take any role."""

    def no(_mfn: int, _flags: int) -> None:
        raise Refused(Errno.EPERM)

    frames.validate[L1_TYPE] = no
    mfn = taken(frames)
    with pytest.raises(Refused) as caught:
        frames.get_type(mfn, L1_TYPE)
    assert caught.value.errno == Errno.EPERM
    assert frames.types[mfn] == FrameType.NONE and not frames.type_counts[mfn]
    frames.get_type(mfn, WRITABLE)


def test_the_tlb_is_flushed_for_a_frame_that_was_in_use_since(frames: MachineFrames) -> None:
    """A frame changes its role or owner after a flush, unless there was one since its last use; else none is made."""
    flushes: list[int] = []

    def flush() -> None:
        flushes.append(1)
        frames.flushed()

    frames.flush = flush
    mfn = taken(frames)
    frames.get_type(mfn, WRITABLE)
    frames.put_type(mfn)
    frames.get_type(mfn, WRITABLE)
    assert not flushes, "the same role again"
    frames.put_type(mfn)
    frames.get_type(mfn, SEGDESC)
    assert len(flushes) == 1
    frames.put_type(mfn)
    frames.flushed()
    frames.get_type(mfn, WRITABLE)
    assert len(flushes) == 1, "it was flushed in between"
    frames.put_type(mfn)
    frames.drop_allocation(mfn)
    assert taken(frames) == mfn and len(flushes) == 2


def test_a_shared_frame_is_the_domains_to_map_and_the_hypervisors_to_keep(frames: MachineFrames) -> None:
    """Its role is held for ever, it is none of the domain's pages, and given up it is not free."""
    mfn = frames.allocate(DOMID_XEN)
    assert mfn is not None
    frames.share(mfn, DOMAIN, writable=True)
    assert frames.pages.get(DOMAIN, 0) == 0
    frames.get_with_type(mfn, DOMAIN, WRITABLE)
    with pytest.raises(Refused):
        frames.get_type(mfn, L1_TYPE)
    frames.put_with_type(mfn)
    with pytest.raises(Refused):
        frames.steal(mfn, DOMAIN)
    free = frames.free_frames()
    frames.drop_allocation(mfn)
    assert frames.free_frames() == free and not frames.get(mfn, DOMAIN)


def test_the_state_is_a_value() -> None:
    """What is saved and put back, with the memory, is the same domain, and goes on as it would have."""
    board = Board()
    memory, state = board.memory.bytes.tobytes(), board.frames.save()
    paging = board.paging.state
    before = (paging.base, paging.gdt_entries)
    board.update((board.at(L1, DATA), board.entry(DATA, P)))
    board.extended(ExtendedOp(MmuExt.PIN_L1_TABLE, board.mfns[DATA]))
    assert board.frames.save() != state
    board.memory.bytes[:] = memory
    board.frames.restore(state)
    assert board.frames.save() == state and (paging.base, paging.gdt_entries) == before
    board.check_counts()
    board.update((board.at(L1, DATA), board.entry(DATA, P)))
    board.check_counts()
