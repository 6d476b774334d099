"""The console's ring, the emergency console, XenStore and grant tables."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import domains
from tests.test_paravirt_hypercalls import call, put, started
from vmm.machine.memory import Memory
from vmm.monitor.paravirt.abi import rings
from vmm.monitor.paravirt.abi.errors import Errno
from vmm.monitor.paravirt.abi.events import EventOp, Virq
from vmm.monitor.paravirt.abi.hypercalls import Hypercall
from vmm.monitor.paravirt.abi.rings import StoreOp
from vmm.monitor.paravirt.store import Store

CONSOLE_MFN, CONSOLE_PORT, STORE_MFN, STORE_PORT = 52, 56, 44, 48  # offsets in start_info


def send(guest: domains.Guest, port: int) -> int:
    return call(guest, Hypercall.EVENT_CHANNEL_OP, 4, put(guest, struct.pack("<I", port)))


def test_what_is_written_by_console_io_is_on_the_console() -> None:
    """CONSOLEIO_write gives its bytes to the machine's console."""
    guest = started()
    assert call(guest, Hypercall.CONSOLE_IO, 0, 5, put(guest, b"hello")) == 0
    assert guest.console == b"hello"
    assert call(guest, Hypercall.CONSOLE_IO, 0, 5, 0xE0000000) == -Errno.EFAULT
    assert call(guest, Hypercall.CONSOLE_IO, 0, 1 << 31, 0) == -Errno.E2BIG
    assert call(guest, Hypercall.CONSOLE_IO, 2, 0, 0) == -Errno.ENOSYS


def test_console_io_reads_what_there_is() -> None:
    """CONSOLEIO_read returns how many bytes came, and no more than asked for."""
    guest = started()
    guest.machine.devices.uart.receive(b"typed")
    address = put(guest, bytes(8))
    assert call(guest, Hypercall.CONSOLE_IO, 1, 3, address) == 3
    assert guest.domain.guest.read(address, 4) == b"typ\0"
    assert call(guest, Hypercall.CONSOLE_IO, 1, 8, address) == 2
    assert call(guest, Hypercall.CONSOLE_IO, 1, 8, address) == 0


def test_the_ring_goes_both_ways() -> None:
    """What the guest puts into `out` is written when it sends an event; what was typed is then in `in`."""
    guest = started()
    info, memory = guest.read("start_info"), guest.machine.memory
    base, port = guest.read(info + CONSOLE_MFN) << 12, guest.read(info + CONSOLE_PORT)
    guest.machine.devices.uart.receive(b"yes")
    memory.load(base + rings.CONSOLE_OUT, b"ready?")
    memory.write(base + rings.CONSOLE_OUT_PROD, 4, 6)
    assert send(guest, port) == 0
    assert guest.console == b"ready?" and memory.read(base + rings.CONSOLE_OUT_CONS, 4) == 6
    assert (
        bytes(memory.bytes[base : base + 3]) == b"yes" and memory.read(base + rings.CONSOLE_IN_PROD, 4) == 3
    )
    assert guest.domain.shared.is_pending(port)


def test_what_is_typed_comes_at_once_once_the_guest_uses_the_ring() -> None:
    """Nobody need ask for it: it is in `in`, as much as there is room for, and an event says so."""
    guest = started()
    info, memory = guest.read("start_info"), guest.machine.memory
    base, port = guest.read(info + CONSOLE_MFN) << 12, guest.read(info + CONSOLE_PORT)
    guest.machine.devices.uart.receive(b"early ")
    assert memory.read(base + rings.CONSOLE_IN_PROD, 4) == 0 and not guest.domain.shared.is_pending(port)
    assert send(guest, port) == 0
    assert guest.domain.shared.is_pending(port)
    guest.domain.shared.clear_pending(port)
    guest.machine.devices.uart.receive(b"y" * 2000)
    assert bytes(memory.bytes[base : base + 1024]) == b"early " + b"y" * 1018
    assert guest.domain.shared.is_pending(port)
    memory.write(base + rings.CONSOLE_IN_CONS, 4, 1024)
    guest.machine.devices.uart.receive(b"z")
    assert memory.read(base + rings.CONSOLE_IN_PROD, 4) == 6 + 2000 + 1


def test_who_reads_by_console_io_has_a_virtual_interrupt() -> None:
    """VIRQ_CONSOLE tells of what was typed; the bytes wait for CONSOLEIO_read."""
    guest = started()
    address = put(guest, struct.pack("<III", Virq.CONSOLE, 0, 0))
    assert call(guest, Hypercall.EVENT_CHANNEL_OP, EventOp.BIND_VIRQ, address) == 0
    port = guest.read(address + 8)
    guest.machine.devices.uart.receive(b"x")
    assert guest.domain.shared.is_pending(port)
    assert call(guest, Hypercall.CONSOLE_IO, 1, 8, address) == 1


def test_a_ring_goes_round() -> None:
    """Indices count on and wrap at 2**32; data wraps at the ring's size."""
    guest = started()
    info, memory = guest.read("start_info"), guest.machine.memory
    base, port = guest.read(info + CONSOLE_MFN) << 12, guest.read(info + CONSOLE_PORT)
    for index in (rings.CONSOLE_OUT_CONS, rings.CONSOLE_OUT_PROD):
        memory.write(base + index, 4, 0xFFFFFFFE)
    text = b"round"
    for i, byte in enumerate(text):
        memory.write(base + rings.CONSOLE_OUT + (0xFFFFFFFE + i) % 2048, 1, byte)
    memory.write(base + rings.CONSOLE_OUT_PROD, 4, 3)
    send(guest, port)
    assert guest.console == text and memory.read(base + rings.CONSOLE_OUT_CONS, 4) == 3


def test_indices_that_cannot_be_give_nothing() -> None:
    """A guest that claims more than the ring holds is not believed."""
    guest = started()
    info, memory = guest.read("start_info"), guest.machine.memory
    base, port = guest.read(info + CONSOLE_MFN) << 12, guest.read(info + CONSOLE_PORT)
    memory.write(base + rings.CONSOLE_OUT_PROD, 4, 5000)
    memory.write(base + rings.CONSOLE_IN_PROD, 4, 99999)
    guest.machine.devices.uart.receive(b"x" * 10)
    assert send(guest, port) == 0
    assert guest.console == b""


class Client:
    """The guest's side of XenStore."""

    def __init__(self) -> None:
        self.memory = Memory(2 << 20)
        self.store = Store(self.memory, 0x10, 1)
        self.told = 0
        self.store.notify = self._told
        self.events: list[tuple[str, ...]] = []

    def _told(self) -> None:
        self.told += 1

    def write(self, data: bytes) -> None:
        base = 0x10000
        producer = self.memory.read(base + rings.STORE_REQ_PROD, 4)
        for i, byte in enumerate(data):
            self.memory.write(base + rings.STORE_REQ + (producer + i) % 1024, 1, byte)
        self.memory.write(base + rings.STORE_REQ_PROD, 4, producer + len(data))
        self.store.kicked()

    def read(self) -> bytes:
        base = 0x10000
        consumer = self.memory.read(base + rings.STORE_RSP_CONS, 4)
        producer = self.memory.read(base + rings.STORE_RSP_PROD, 4)
        data = bytes(self.memory.bytes[base + rings.STORE_RSP + i % 1024] for i in range(consumer, producer))
        self.memory.write(base + rings.STORE_RSP_CONS, 4, producer)
        return data

    def ask(self, kind: int, *texts: str, transaction: int = 0) -> tuple[int, bytes]:
        """Type and payload of the answer; watch events are kept apart."""
        payload = b"".join(text.encode() + b"\0" for text in texts)
        if kind == StoreOp.WRITE:
            payload = payload[:-1]
        message = struct.pack("<IIII", kind, 7, transaction, len(payload)) + payload
        self.write(message)
        data, answer = self.read(), (-1, b"")
        while data:
            got, request, _, length = struct.unpack_from("<IIII", data)
            body, data = data[16 : 16 + length], data[16 + length :]
            if got == StoreOp.WATCH_EVENT:
                self.events.append(tuple(part.decode() for part in body.split(b"\0")[:2]))
            else:
                assert request == 7
                answer = got, body
        return answer


def test_what_the_toolstack_has_written_is_read() -> None:
    """By a path of the domain's own or a whole one; what is not there is ENOENT."""
    client = Client()
    client.store.publish({"console/port": "2", "name": "guest"})
    assert client.ask(StoreOp.READ, "console/port") == (StoreOp.READ, b"2")
    assert client.ask(StoreOp.READ, "/local/domain/1/name") == (StoreOp.READ, b"guest")
    assert client.ask(StoreOp.READ, "nothing") == (StoreOp.ERROR, b"ENOENT\0")
    assert client.ask(StoreOp.DIRECTORY, "/local/domain/1") == (StoreOp.DIRECTORY, b"console\0name\0")
    assert client.ask(StoreOp.GET_DOMAIN_PATH, "1") == (StoreOp.GET_DOMAIN_PATH, b"/local/domain/1\0")


def test_a_domain_writes_below_its_own_path() -> None:
    """And nowhere else; what it removes is gone with all below."""
    client = Client()
    assert client.ask(StoreOp.WRITE, "data/a/b", "7") == (StoreOp.WRITE, b"OK\0")
    assert client.ask(StoreOp.READ, "data/a/b") == (StoreOp.READ, b"7")
    assert client.ask(StoreOp.READ, "data/a") == (StoreOp.READ, b"")
    assert client.ask(StoreOp.WRITE, "/tool/x", "7") == (StoreOp.ERROR, b"EACCES\0")
    assert client.ask(StoreOp.RM, "data/a") == (StoreOp.RM, b"OK\0")
    assert client.ask(StoreOp.READ, "data/a/b") == (StoreOp.ERROR, b"ENOENT\0")


def test_a_watch_fires_at_once_and_at_each_change() -> None:
    """By the path as it was given, with the token."""
    client = Client()
    assert client.ask(StoreOp.WATCH, "data", "t") == (StoreOp.WATCH, b"OK\0")
    assert client.events == [("data", "t")]
    client.ask(StoreOp.WRITE, "data/x", "1")
    assert client.events[1:] == [("data/x", "t")]
    assert client.ask(StoreOp.WATCH, "data", "t") == (StoreOp.ERROR, b"EEXIST\0")
    assert client.ask(StoreOp.UNWATCH, "data", "t") == (StoreOp.UNWATCH, b"OK\0")


def test_a_transaction_is_all_or_nothing() -> None:
    """Seen by others when it ends well; EAGAIN if they have written meanwhile; forgotten if it is given up."""
    client = Client()
    _, number = client.ask(StoreOp.TRANSACTION_START, "")
    transaction = int(number[:-1])
    client.ask(StoreOp.WRITE, "data/x", "1", transaction=transaction)
    assert client.ask(StoreOp.READ, "data/x") == (StoreOp.ERROR, b"ENOENT\0")
    assert client.ask(StoreOp.TRANSACTION_END, "T", transaction=transaction) == (
        StoreOp.TRANSACTION_END,
        b"OK\0",
    )
    assert client.ask(StoreOp.READ, "data/x") == (StoreOp.READ, b"1")
    _, number = client.ask(StoreOp.TRANSACTION_START, "")
    client.ask(StoreOp.WRITE, "data/y", "1")
    assert client.ask(StoreOp.TRANSACTION_END, "T", transaction=int(number[:-1]))[1] == b"EAGAIN\0"


@pytest.mark.parametrize("kind", [StoreOp.INTRODUCE, StoreOp.RELEASE, StoreOp.SET_TARGET, StoreOp.CONTROL])
def test_what_is_domain_0s_is_refused(kind: int) -> None:
    """EACCES; an operation that does not exist is ENOSYS."""
    client = Client()
    assert client.ask(kind, "1", "2", "3") == (StoreOp.ERROR, b"EACCES\0")
    assert client.ask(99, "1") == (StoreOp.ERROR, b"ENOSYS\0")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=600), max_size=8))
def test_garbage_in_the_stores_ring_is_answered_or_dropped(pieces: list[bytes]) -> None:
    """Never an exception, and a good request after a broken client is no worse off than its own bytes."""
    client = Client()
    for piece in pieces:
        client.write(piece)
        client.read()
    assert len(client.store.state.answers) < 80 << 10


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 24), st.binary(max_size=80), st.integers(0, 3))
def test_any_payload_has_an_answer(kind: int, payload: bytes, transaction: int) -> None:
    """Each request is answered once, by its own type or by ERROR."""
    client = Client()
    client.store.publish({"a": "b"})
    client.write(struct.pack("<IIII", kind, 5, transaction, len(payload)) + payload)
    answer = client.read()
    got, request, _, length = struct.unpack_from("<IIII", answer)
    assert got in (kind, StoreOp.ERROR) and request == 5 and len(answer) >= 16 + length


def test_the_grant_table_has_the_builders_entries() -> None:
    """setup_table gives frames that the guest may map; entries 0 and 1 are the console's and the store's page."""
    guest = started()
    info = guest.read("start_info")
    frames = guest.symbol("room") + 64
    address = put(guest, struct.pack("<H2xIh2xI", 0x7FF0, 2, 77, frames))
    assert call(guest, Hypercall.GRANT_TABLE_OP, 2, address, 1) == 0
    assert struct.unpack("<h", guest.domain.guest.read(address + 8, 2)) == (0,)
    table = guest.machine.memory.bytes[guest.read(frames) << 12 :][:16]
    entries = struct.unpack("<HHIHHI", table)
    assert entries == (1, 0, guest.read(info + CONSOLE_MFN), 1, 0, guest.read(info + STORE_MFN))
    mapped = call(
        guest,
        Hypercall.UPDATE_VA_MAPPING,
        guest.symbol("kernel_stack_bottom"),
        guest.read(frames) << 12 | 3,
        0,
        2,
    )
    assert mapped == 0 and guest.read("kernel_stack_bottom") == 1


@pytest.mark.parametrize(
    ("command", "structure", "result", "status"),
    [
        (2, struct.pack("<H2xIh2xI", 5, 1, 0, 0), 0, -2),
        (2, struct.pack("<H2xIh2xI", 0x7FF0, 33, 0, 0), 0, -1),
        (2, struct.pack("<H2xIh2xI", 0x7FF0, 1, 0, 0xF5800000), -Errno.EFAULT, None),
        (0, bytes(32), -Errno.ENOSYS, None),
        (8, struct.pack("<I", 2), -Errno.ENOSYS, None),
        (8, struct.pack("<I", 1), 0, None),
    ],
)
def test_what_grant_tables_refuse(command: int, structure: bytes, result: int, status: int | None) -> None:
    """By a status in the structure where Xen has one, else by an error."""
    guest = started()
    address = put(guest, structure)
    assert call(guest, Hypercall.GRANT_TABLE_OP, command, address, 1) == result
    if status is not None:
        assert struct.unpack("<h", guest.domain.guest.read(address + 8, 2)) == (status,)
