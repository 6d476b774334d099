"""memory_op: a domain's frames come and go, and what it may ask about them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from tests.paravirt_memory import (
    DATA,
    DOMAIN,
    L1,
    PAGES,
    RW,
    SPOKEN,
    Board,
    P,
    refused,
    xens,
)
from vmm.monitor.paravirt.abi.errors import Errno
from vmm.monitor.paravirt.abi.memory import (
    DOMID_SELF,
    EXCHANGE_SIZE,
    EXCHANGED_OFFSET,
    MemoryOp,
    Reservation,
)


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.check()


def reserve(
    board: Board, command: int, extents: list[int], order: int = 0, domid: int = DOMID_SELF
) -> list[int]:
    """The result, and the extents afterwards."""
    reservation = bytes(Reservation(SPOKEN + 64, len(extents), order, 0, domid))
    board.say(reservation.ljust(64, b"\0") + b"".join(word.to_bytes(4, "little") for word in extents))
    result = board.paging.memory_op(board.guest, command, SPOKEN)
    board.check()
    return [result, *struct.unpack(f"<{len(extents)}I", board.spoken[64 : 64 + 4 * len(extents)])]


def test_memory_goes_and_comes(board: Board) -> None:
    """A frame that is given up is free when nothing maps it; populate_physmap gives others, zeroed and entered."""
    held, gone = board.mfns[DATA], board.mfns[DATA + 1]
    board.update((board.at(L1, DATA + 1), 0))
    assert reserve(board, MemoryOp.DECREASE_RESERVATION, [gone, held, gone])[0] == 2
    assert board.frames.owners[gone] != DOMAIN and board.frames.owners[held] == DOMAIN
    assert board.paging.domain.area.physical(gone) == 0xFFFF_FFFF
    board.update((board.at(L1, DATA), 0))
    board.check()
    assert board.frames.owners[held] != DOMAIN
    result, one, two = reserve(board, MemoryOp.POPULATE_PHYSMAP, [DATA, DATA + 1])
    assert result == 2 and board.paging.domain.area.physical(two) == DATA + 1
    assert board.update((board.at(L1, DATA), one << 12 | P | RW)) == 0


def test_a_domain_has_its_maximum(board: Board) -> None:
    """What goes past it is not done: the result says how many were."""
    assert reserve(board, MemoryOp.INCREASE_RESERVATION, [0] * 30)[0] == 20
    assert reserve(board, MemoryOp.POPULATE_PHYSMAP, [0] * 3)[0] == 0
    board.say(struct.pack("<H", DOMID_SELF))
    assert [board.paging.memory_op(board.guest, op, SPOKEN) for op in (3, 4, 14)] == [60, 60, 59]


def test_extents_that_are_refused(board: Board) -> None:
    """Another's frame, too high an order, another domain, an address that is not there: none is done, no error."""
    for extents, order, domid in (
        ([xens(board)], 0, DOMID_SELF), ([0xB8], 0, DOMID_SELF), ([0xFFFF_FFFF], 0, DOMID_SELF),
        ([board.mfns[DATA]], 10, DOMID_SELF), ([board.mfns[DATA]], 0, 7),
    ):  # fmt: skip
        assert reserve(board, MemoryOp.DECREASE_RESERVATION, extents, order, domid)[0] == 0
    assert board.paging.memory_op(board.guest, MemoryOp.DECREASE_RESERVATION, 0x5000_0000) == 0
    assert reserve(board, MemoryOp.INCREASE_RESERVATION | 3 << 6, [0] * 2)[0] == 3


def test_extents_of_a_higher_order_are_in_a_row(board: Board) -> None:
    """An extent of order n is 2^n frames, aligned."""
    result, first = reserve(board, MemoryOp.POPULATE_PHYSMAP, [1000], 3)
    assert result == 1 and not first % 8
    assert [board.paging.domain.area.physical(first + i) for i in range(8)] == list(range(1000, 1008))


def exchange(board: Board, frames: list[int], given: int, wanted: int) -> tuple[int, list[int]]:
    data = bytes(Reservation(SPOKEN + 64, len(frames), given, 0, DOMID_SELF))
    count = (len(frames) << given) >> wanted
    data += bytes(Reservation(SPOKEN + 128, count, wanted, 0, DOMID_SELF)) + bytes(4)
    words = b"".join(word.to_bytes(4, "little") for word in frames)
    board.say(
        data.ljust(64, b"\0")
        + words.ljust(64, b"\0")
        + b"".join(struct.pack("<I", 500 + i) for i in range(count))
    )
    result = board.paging.memory_op(board.guest, MemoryOp.EXCHANGE, SPOKEN)
    return result, list(struct.unpack(f"<{count}I", board.spoken[128 : 128 + 4 * count]))


def exchanged(board: Board) -> int:
    return int.from_bytes(board.spoken[EXCHANGED_OFFSET:EXCHANGE_SIZE], "little")


def test_frames_are_exchanged_for_others(board: Board) -> None:
    """Four frames that nothing uses, for one extent of four: the old ones are free, the new one is entered."""
    given = board.mfns[DATA : DATA + 4]
    board.update(*((board.at(L1, DATA + i), 0) for i in range(4)))
    result, [first] = exchange(board, given, 0, 2)
    board.check()
    assert result == 0 and not first % 4 and exchanged(board) == 4
    assert board.paging.domain.area.physical(first + 3) == 503


def test_an_exchange_that_is_refused_leaves_the_frames(board: Board) -> None:
    """A frame in use is EINVAL, and the domain has what it had; `nr_exchanged` says how far it came."""
    frames = board.mfns[DATA : DATA + 4]
    board.update(*((board.at(L1, DATA + i), 0) for i in range(3)))
    with refused(Errno.EINVAL, board):
        exchange(board, frames, 0, 2)
    assert exchanged(board) == 0 and all(board.frames.owners[mfn] == DOMAIN for mfn in frames)
    with refused(Errno.EINVAL, board):
        exchange(board, [board.shared], 0, 0)
    with refused(Errno.EPERM, board):
        exchange(board, frames, 10, 0)


QUESTIONS = (
    (MemoryOp.MAXIMUM_RAM_PAGE, b"", 1024),
    (MemoryOp.MAXIMUM_RAM_PAGE | 1 << 6, b"", Errno.EINVAL),
    (MemoryOp.CURRENT_RESERVATION, struct.pack("<H", DOMAIN), PAGES),
    (MemoryOp.CURRENT_RESERVATION, struct.pack("<H", 7), Errno.ESRCH),
    (MemoryOp.MEMORY_MAP, struct.pack("<II", 5, SPOKEN + 64), Errno.ENOSYS),
    (MemoryOp.MACHINE_MEMORY_MAP, b"", Errno.EPERM),
    (MemoryOp.ADD_TO_PHYSMAP, struct.pack("<HHIII", DOMID_SELF, 0, 0, 0, 0), Errno.EACCES),
    (MemoryOp.ADD_TO_PHYSMAP, struct.pack("<HHIII", DOMID_SELF, 0, 4, 0, 0), Errno.ENOSYS),
    (MemoryOp.ADD_TO_PHYSMAP_BATCH, struct.pack("<HHHHIII", DOMID_SELF, 0, 1, 0, 0, 0, 0), Errno.EACCES),
    (MemoryOp.ADD_TO_PHYSMAP_BATCH, struct.pack("<HHHHIII", DOMID_SELF, 3, 1, 0, 0, 0, 0), Errno.EOPNOTSUPP),
    (MemoryOp.ADD_TO_PHYSMAP_BATCH, struct.pack("<HHHHIII", 7, 0, 1, 0, 0, 0, 0), Errno.ESRCH),
    (MemoryOp.SET_MEMORY_MAP, struct.pack("<HxxII", 7, 1, SPOKEN), Errno.ESRCH),
    (MemoryOp.SET_MEMORY_MAP, struct.pack("<HxxII", DOMID_SELF, 1025, SPOKEN), Errno.EINVAL),
    (MemoryOp.SET_MEMORY_MAP, struct.pack("<HxxII", DOMID_SELF, 1, 0x5000_0000), Errno.EFAULT),
    (MemoryOp.REMOVE_FROM_PHYSMAP, struct.pack("<HxxI", DOMID_SELF, 0), Errno.EACCES),
    (60, b"", Errno.ENOSYS),
)


@pytest.mark.parametrize(("command", "argument", "answer"), QUESTIONS)
def test_questions_about_memory(board: Board, command: int, argument: bytes, answer: int | Errno) -> None:
    """Each has its answer, or Xen's error for a domain without privileges."""
    where = board.say(argument)
    if isinstance(answer, Errno):
        with refused(answer, board):
            board.paging.memory_op(board.guest, command, where)
    else:
        assert board.paging.memory_op(board.guest, command, where) == answer


def test_where_the_machine_to_physical_table_is(board: Board) -> None:
    """XENMEM_machphys_mapping: start, end, and the last frame that it could have."""
    assert board.paging.memory_op(board.guest, MemoryOp.MACHPHYS_MAPPING, SPOKEN) == 0
    assert struct.unpack("<III", board.spoken[:12]) == (0xF580_0000, 0xF680_0000, (16 << 20) // 4 - 1)


def test_a_domain_sets_its_memory_map_and_reads_it(board: Board) -> None:
    """What SET_MEMORY_MAP says, MEMORY_MAP shows, as many rows as there is room for, and says how many."""
    rows = ((0, 0xA0000, 1), (0x100000, 0x300000, 1), (0xF000_0000, 0x1000, 2))
    board.spoken[64 : 64 + 60] = b"".join(struct.pack("<QQI", *row) for row in rows)
    where = board.say(struct.pack("<HxxII", DOMID_SELF, 3, SPOKEN + 64))
    assert board.paging.memory_op(board.guest, MemoryOp.SET_MEMORY_MAP, where) == 0
    for room, shown in ((2, 2), (9, 3)):
        where = board.say(struct.pack("<II", room, SPOKEN + 256))
        assert board.paging.memory_op(board.guest, MemoryOp.MEMORY_MAP, where) == 0
        assert struct.unpack("<II", board.spoken[:8]) == (shown, SPOKEN + 256)
        found = struct.iter_unpack("<QQI", board.spoken[256 : 256 + 20 * shown])
        assert tuple(found) == rows[:shown]
