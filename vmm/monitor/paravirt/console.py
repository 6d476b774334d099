"""The console: a ring in a page of the guest's, and the hypervisor's own emergency console.

Both lead to the machine's serial port, which is the hypervisor's here. Input goes to whoever asks first: console_io
takes what it reads; the ring is filled once the guest has used it.

Sources: Xen's public headers io/console.h and xen.h (CONSOLEIO_*).
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.machine.bus import PortBus
from vmm.machine.memory import Memory
from vmm.machine.pc import COM1
from vmm.monitor.paravirt.abi import rings
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.services import CONSOLEIO_READ, CONSOLEIO_WRITE
from vmm.monitor.paravirt.domain import Continued
from vmm.monitor.paravirt.guest import GuestMemory

_LINE_STATUS, _READY = 5, 1
_CHUNK = 4096
_INT_MAX = (1 << 31) - 1


class Serial:
    """The machine's serial port, polled."""

    def __init__(self, bus: PortBus) -> None:
        self._bus = bus

    def send(self, data: bytes) -> None:
        for byte in data:
            self._bus.write(COM1, 1, byte)

    def receive(self, most: int) -> bytes:
        data = bytearray()
        while len(data) < most and self._bus.read(COM1 + _LINE_STATUS, 1) & _READY:
            data.append(self._bus.read(COM1, 1))
        return bytes(data)


class Ring:
    """One direction of a pair of rings: `size` bytes at `data`, indices that count on and wrap at 2**32."""

    def __init__(self, memory: Memory, data: int, size: int, consumer: int, producer: int) -> None:
        self._memory, self._data, self._size = memory, data, size
        self._consumer, self._producer = consumer, producer

    def take(self, most: int) -> bytes:
        """Consume; nothing, if the guest claims more than the ring holds."""
        memory, used = self._memory, self.used
        consumer = memory.read(self._consumer, 4)
        count = min(used, most) if used <= self._size else 0
        data = bytes(memory.bytes[self._data + (consumer + i) % self._size] for i in range(count))
        memory.write(self._consumer, 4, consumer + count)
        return data

    @property
    def used(self) -> int:
        """Bytes that wait to be consumed; more than the ring's size if the guest has broken its indices."""
        return self._memory.read(self._producer, 4) - self._memory.read(self._consumer, 4) & 0xFFFFFFFF

    @property
    def room(self) -> int:
        """Bytes that may be produced."""
        return max(0, self._size - self.used)

    def put(self, data: bytes) -> None:
        """Produce; the caller has looked at `room`."""
        memory = self._memory
        producer = memory.read(self._producer, 4)
        for i, byte in enumerate(data):
            memory.write(self._data + (producer + i) % self._size, 1, byte)
        memory.write(self._producer, 4, producer + len(data))


class Console:
    """`frame` is the machine frame of the ring's page; `notify` tells the guest of a change."""

    def __init__(self, memory: Memory, frame: int, serial: Serial) -> None:
        base = frame << 12
        self._serial = serial
        self._out = Ring(
            memory, base + rings.CONSOLE_OUT, rings.CONSOLE_OUT_SIZE,
            base + rings.CONSOLE_OUT_CONS, base + rings.CONSOLE_OUT_PROD,
        )  # fmt: skip
        self._in = Ring(
            memory, base + rings.CONSOLE_IN, rings.CONSOLE_IN_SIZE,
            base + rings.CONSOLE_IN_CONS, base + rings.CONSOLE_IN_PROD,
        )  # fmt: skip
        self.notify: Callable[[], None] = lambda: None
        self.should_yield: Callable[[int], bool] = lambda _bytes: False
        self.ring_used = False

    def kicked(self) -> None:
        """The guest has sent an event: take what it wrote, and give what there is to read."""
        self.ring_used = True
        if self._exchange():
            self.notify()

    def arrived(self) -> bool:
        """Somebody has typed: into the ring with it, if the guest uses that; whether it does."""
        if self.ring_used and self._exchange():
            self.notify()
        return self.ring_used

    def drain(self) -> None:
        """What is left in the ring when the domain ends has been written, too."""
        self._serial.send(self._out.take(rings.CONSOLE_OUT_SIZE))

    def _exchange(self) -> bool:
        data = self._out.take(rings.CONSOLE_OUT_SIZE)
        self._serial.send(data)
        given = self._serial.receive(self._in.room)
        self._in.put(given)
        return bool(data or given)

    def operation(self, guest: GuestMemory, command: int, count: int, buffer: int) -> int:
        """console_io; raises `Refused`, and `Continued` where `should_yield` asks for it."""
        if command not in (CONSOLEIO_WRITE, CONSOLEIO_READ):
            raise Refused(Errno.ENOSYS, f"console_io {command}")
        if count > _INT_MAX:
            raise Refused(Errno.E2BIG, f"{count} bytes")
        if command == CONSOLEIO_WRITE:
            done = 0
            while done < count:
                length = min(_CHUNK, count - done)
                if self.should_yield(length) and done:
                    raise Continued(command, count - done, buffer + done)
                data = guest.read(buffer + done, length)
                self._serial.send(data)
                done += len(data)
            return 0
        data = self._serial.receive(min(count, _CHUNK))
        guest.write(buffer, data)
        return len(data)
