"""Event channels: binding, pending and mask bits, and what each operation refuses."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import domains
from tests.test_paravirt_hypercalls import call, put, started
from vmm.machine.memory import Memory
from vmm.monitor.paravirt.abi.errors import Errno
from vmm.monitor.paravirt.abi.hypercalls import Hypercall
from vmm.monitor.paravirt.events import EventChannels
from vmm.monitor.paravirt.shared import SharedInfo

SELF, DOM0, NOBODY = 0x7FF0, 0, 9


def operation(guest: domains.Guest, command: int, structure: bytes) -> tuple[int, bytes]:
    """event_channel_op: the result, and the structure afterwards."""
    address = put(guest, structure)
    result = call(guest, Hypercall.EVENT_CHANNEL_OP, command, address)
    return result, guest.domain.guest.read(address, len(structure))


def bind_ipi(guest: domains.Guest) -> int:
    result, after = operation(guest, 7, struct.pack("<II", 0, 0))
    assert result == 0
    return int(struct.unpack("<II", after)[1])


@pytest.fixture
def guest() -> Iterator[domains.Guest]:
    yield started()


def test_console_and_store_are_connected_from_the_start(guest: domains.Guest) -> None:
    """Their ports are in start_info, and lead to domain 0."""
    info = guest.read("start_info")
    for port in (guest.read(info + 48), guest.read(info + 56)):
        result, after = operation(guest, 5, struct.pack("<H2xIIIII", SELF, port, 0, 0, 0, 0))
        _, _, status, _, domain, _ = struct.unpack("<H2xIIIII", after)
        assert (result, status, domain) == (0, 2, DOM0)


def test_an_event_sets_three_bits(guest: domains.Guest) -> None:
    """Pending, its word in the selector, and the upcall."""
    shared = guest.domain.shared
    port = bind_ipi(guest)
    assert operation(guest, 4, struct.pack("<I", port))[0] == 0
    assert shared.is_pending(port) and shared.upcall_pending
    assert guest.machine.memory.read(shared.vcpu + 4, 4) == 1 << port // 32


def test_a_masked_event_is_only_pending(guest: domains.Guest) -> None:
    """No upcall until it is unmasked; EVTCHNOP_unmask then makes one."""
    shared, memory = guest.domain.shared, guest.machine.memory
    port = bind_ipi(guest)
    memory.write(shared.base + 0x880 + port // 32 * 4, 4, 1 << port % 32)
    operation(guest, 4, struct.pack("<I", port))
    assert shared.is_pending(port) and not shared.upcall_pending
    assert operation(guest, 9, struct.pack("<I", port))[0] == 0
    assert shared.upcall_pending and not shared.is_masked(port)


def test_an_event_that_is_pending_already_makes_no_second_upcall(guest: domains.Guest) -> None:
    """It is the edge that counts."""
    port = bind_ipi(guest)
    operation(guest, 4, struct.pack("<I", port))
    guest.domain.shared.upcall_pending = False
    operation(guest, 4, struct.pack("<I", port))
    assert not guest.domain.shared.upcall_pending


def test_a_domain_may_talk_to_itself(guest: domains.Guest) -> None:
    """alloc_unbound and bind_interdomain with itself: what is sent at one port comes in at the other."""
    result, after = operation(guest, 6, struct.pack("<HHI", SELF, SELF, 0))
    assert result == 0
    first = struct.unpack("<HHI", after)[2]
    result, after = operation(guest, 0, struct.pack("<H2xII", SELF, first, 0))
    assert result == 0
    second = struct.unpack("<H2xII", after)[2]
    guest.domain.shared.clear_pending(second)
    operation(guest, 4, struct.pack("<I", first))
    assert guest.domain.shared.is_pending(second) and not guest.domain.shared.is_pending(first)
    assert operation(guest, 3, struct.pack("<I", second))[0] == 0
    assert operation(guest, 4, struct.pack("<I", first))[0] == 0, "to nobody: dropped"
    _, after = operation(guest, 5, struct.pack("<H2xIIIII", SELF, first, 0, 0, 0, 0))
    assert struct.unpack("<H2xIIIII", after)[2] == 1, "unbound again"


@pytest.mark.parametrize(
    ("command", "structure", "errno"),
    [
        (1, struct.pack("<III", 24, 0, 0), Errno.EINVAL),  # no such virtual interrupt
        (1, struct.pack("<III", 0, 1, 0), Errno.ENOENT),  # no such vcpu
        (1, struct.pack("<III", 4, 0, 0), Errno.EBUSY),  # domain 0's
        (1, struct.pack("<III", 2, 1, 0), Errno.EINVAL),  # a global one is vcpu 0's
        (2, struct.pack("<III", 3, 0, 0), Errno.EPERM),
        (7, struct.pack("<II", 1, 0), Errno.ENOENT),
        (3, struct.pack("<I", 1000), Errno.EINVAL),
        (3, struct.pack("<I", 0), Errno.EINVAL),
        (4, struct.pack("<I", 5000), Errno.EINVAL),
        (4, struct.pack("<I", 77), Errno.EINVAL),
        (9, struct.pack("<I", 1024), Errno.EINVAL),
        (8, struct.pack("<II", 77, 0), Errno.EINVAL),
        (8, struct.pack("<II", 1, 1), Errno.ENOENT),
        (5, struct.pack("<H2xIIIII", NOBODY, 1, 0, 0, 0, 0), Errno.ESRCH),
        (5, struct.pack("<H2xIIIII", DOM0, 1, 0, 0, 0, 0), Errno.EPERM),
        (6, struct.pack("<HHI", NOBODY, SELF, 0), Errno.ESRCH),
        (0, struct.pack("<H2xII", NOBODY, 1, 0), Errno.ESRCH),
        (0, struct.pack("<H2xII", DOM0, 1, 0), Errno.EINVAL),
        (0, struct.pack("<H2xII", SELF, 1, 0), Errno.EINVAL),
        (10, struct.pack("<H", NOBODY), Errno.ESRCH),
        (11, bytes(24), Errno.ENOSYS),
        (99, bytes(4), Errno.ENOSYS),
    ],
)
def test_what_is_refused(guest: domains.Guest, command: int, structure: bytes, errno: Errno) -> None:
    """Each operation has Xen's own error."""
    assert operation(guest, command, structure)[0] == -errno
    assert call(guest, Hypercall.EVENT_CHANNEL_OP, command, 0xF5800000) in (-Errno.EFAULT, -Errno.ENOSYS)


def test_a_virtual_interrupt_is_bound_once(guest: domains.Guest) -> None:
    """-EEXIST the second time; after close it is free again, and its pending bit gone."""
    result, after = operation(guest, 1, struct.pack("<III", 0, 0, 0))
    port = struct.unpack("<III", after)[2]
    assert result == 0 and operation(guest, 1, struct.pack("<III", 0, 0, 0))[0] == -Errno.EEXIST
    assert operation(guest, 8, struct.pack("<II", port, 0))[0] == -Errno.EINVAL, "it belongs to its vcpu"
    guest.domain.events.raise_virq(0)
    assert guest.domain.shared.is_pending(port)
    assert operation(guest, 3, struct.pack("<I", port))[0] == 0
    assert not guest.domain.shared.is_pending(port)
    assert operation(guest, 1, struct.pack("<III", 0, 0, 0))[0] == 0


def test_ports_run_out(guest: domains.Guest) -> None:
    """1,023 of them, and then -ENOSPC."""
    results = [operation(guest, 7, struct.pack("<II", 0, 0))[0] for _ in range(1022)]
    assert results[:1021] == [0] * 1021 and results[1021] == -Errno.ENOSPC
    assert operation(guest, 10, struct.pack("<H", SELF))[0] == 0
    assert bind_ipi(guest) == 1


def test_the_old_operation_has_its_command_in_the_structure(guest: domains.Guest) -> None:
    """event_channel_op_compat: the same operations."""
    address = put(guest, struct.pack("<III", 7, 0, 0))
    assert call(guest, Hypercall.EVENT_CHANNEL_OP_COMPAT, address) == 0
    assert guest.read(address + 8) == 3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(("notify", "mask", "unmask", "clear", "upcall")), st.integers(1, 70)),
        max_size=40,
    )
)
def test_an_unmasked_pending_port_is_never_lost(steps: list[tuple[str, int]]) -> None:
    """Whatever the order: a port that came up unmasked is found through upcall, selector and pending bit."""
    shared = SharedInfo(Memory(2 << 20), 0x10)
    events = EventChannels(shared, 1)
    for _ in range(70):
        events.connect(lambda: None)
    owed: set[int] = set()
    for step, port in steps:
        if step == "notify":
            if not shared.is_pending(port) and not shared.is_masked(port):
                owed.add(port)
            events.notify(port)
        elif step == "mask":
            shared._put(0x880, port, True)
        elif step == "unmask":
            if shared.is_masked(port) and shared.is_pending(port):
                owed.add(port)
            shared.clear_mask(port) and shared.is_pending(port) and shared.select(port)
            if port in owed:
                shared.upcall_pending = True
        elif step == "clear":
            shared.clear_pending(port)
            owed.discard(port)
        else:  # as a guest's upcall does: the flag, the selector, then every port that is pending and not masked
            shared.upcall_pending = False
            memory, address = shared._memory, shared.vcpu + 4
            selector = memory.read(address, 4)
            memory.write(address, 4, 0)
            for found in [
                p
                for p in range(1, 71)
                if selector >> p // 32 & 1 and shared.is_pending(p) and not shared.is_masked(p)
            ]:
                shared.clear_pending(found)
                owed.discard(found)
        for waiting in owed:
            assert shared.is_masked(waiting) or shared._memory.read(shared.vcpu + 4, 4) >> waiting // 32 & 1
        if any(not shared.is_masked(p) for p in owed):
            assert shared.upcall_pending
