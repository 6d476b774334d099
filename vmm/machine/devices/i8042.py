"""The keyboard controller of a PS/2: two ports that a keyboard shares with A20, reset and an empty mouse port.

The hard part is that one byte is all there is between the guest and everybody behind the controller. While
the output buffer holds a byte that the guest has not read, keyboard and controller wait; the interrupt is
this byte's, and falls when it is read, so that the next one has an edge of its own. Nothing takes time here:
the input buffer is always empty.

The second port works, and nothing is plugged in: what is sent there is answered by the controller with a
time-out, at once. A controller without that port would cost its guests the waits by which they find out.

Sources: IBM PS/2 technical reference, keyboard and auxiliary device controller; Intel 8242 data sheet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.machine.devices.keyboard import RESEND, Keyboard
from vmm.machine.devices.scancodes import RELEASED, RELEASED_BIT, to_set_1
from vmm.machine.devices.signals import Line
from vmm.machine.devices.system import A20Gate

# Status.
FULL, SYSTEM, COMMAND, UNLOCKED = 1 << 0, 1 << 2, 1 << 3, 1 << 4
FROM_MOUSE, TIMED_OUT = 1 << 5, 1 << 6

# The command byte, which is byte 0 of the controller's memory.
INTERRUPT, MOUSE_INTERRUPT, SYSTEM_FLAG, OFF, MOUSE_OFF, TRANSLATE = 1 << 0, 1 << 1, 1 << 2, 1 << 4, 1 << 5, 1 << 6
MEMORY = 32

TESTED, TEST_GOOD = 0x55, 0x00
OUT_RUN, OUT_A20, OUT_HIGH = 1 << 0, 1 << 1, 0xCC  # of the output port; OUT_HIGH: pins that nothing pulls down
OUT_FULL, OUT_MOUSE_FULL = 1 << 4, 1 << 5
IN_PORT = 0x80  # the keyboard is not locked

# Commands that the next byte at the data port belongs to.
WRITE_OUT, AS_KEYBOARD, AS_MOUSE, TO_MOUSE = 0xD1, 0xD2, 0xD3, 0xD4
WITH_DATA = (*range(0x60, 0x80), WRITE_OUT, AS_KEYBOARD, AS_MOUSE, TO_MOUSE)


@dataclass
class I8042State:
    memory: list[int] = field(default_factory=lambda: [0] * MEMORY)
    output: int = 0  # what the data port reads as
    full: bool = False  # the guest has not read it
    source: int = 0  # FROM_MOUSE and TIMED_OUT, as they go with it
    waiting: list[int] = field(default_factory=list)  # bytes of the controller's own after it, with their source << 8
    system: bool = False  # it has passed its test
    command: int = 0  # one that waits for its data
    last_was_command: bool = True
    released: bool = False  # translating: 0xF0 has come, and stands for bit 7 of the next code


class I8042:
    """The controller: one port for commands and status (0x64), `data` (0x60), lines to IRQ1 and IRQ12."""

    def __init__(
        self, irq1: Line, irq12: Line, keyboard: Keyboard, a20: A20Gate, reset_cpu: Callable[[], None]
    ) -> None:
        self._irq1, self._irq12 = irq1, irq12
        self._keyboard, self._a20, self._reset_cpu = keyboard, a20, reset_cpu
        self.state = I8042State()
        self.data = DataPort(self)

    def reset(self) -> None:
        self.state = I8042State()
        self._update()

    def receive(self, data: bytes) -> None:
        """Type text on the keyboard."""
        self._keyboard.receive(data)
        self._fill()

    def press(self, down: tuple[int, ...]) -> None:
        """Press keys of the keyboard together."""
        self._keyboard.press(down)
        self._fill()

    # The output buffer

    def _fill(self) -> None:
        """Let the next byte in, if there is room; the controller's own come first."""
        state = self.state
        if not state.full and state.waiting:
            self._put(state.waiting[0] & 0xFF, state.waiting.pop(0) >> 8)
        while not state.full and not state.memory[0] & OFF:
            byte = self._keyboard.take()
            if byte is None:
                break
            if not state.memory[0] & TRANSLATE:
                self._put(byte, 0)
            elif byte == RELEASED:
                state.released = True
            else:
                self._put(to_set_1(byte) | RELEASED_BIT * state.released, 0)
                state.released = False
        self._update()

    def _put(self, byte: int, source: int) -> None:
        self.state.output, self.state.source, self.state.full = byte, source, True

    def _answer(self, byte: int, source: int = 0) -> None:
        self.state.waiting.append(byte | source << 8)

    def _update(self) -> None:
        state = self.state
        mouse = bool(state.source & FROM_MOUSE)
        self._irq1(state.full and not mouse and bool(state.memory[0] & INTERRUPT))
        self._irq12(state.full and mouse and bool(state.memory[0] & MOUSE_INTERRUPT))

    def read_data(self) -> int:
        state = self.state
        value = state.output
        if state.full:
            state.full = False
            self._update()
            self._fill()
        return value

    # Commands

    def read(self, offset: int, size: int) -> int:
        """The status."""
        state = self.state
        status = UNLOCKED | SYSTEM * state.system | COMMAND * state.last_was_command
        return status | (FULL | state.source if state.full else 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """A command."""
        state = self.state
        state.last_was_command, state.command = True, 0
        if value in WITH_DATA:
            state.command = value
        elif 0x20 <= value < 0x40:
            self._answer(state.memory[value & MEMORY - 1])
        elif value in SWITCHES:
            keep, put = SWITCHES[value]
            state.memory[0] = state.memory[0] & keep | put
        elif value == 0xAA:
            state.system = True
            self._answer(TESTED)
        elif value in (0xA9, 0xAB):
            self._answer(TEST_GOOD)
        elif value == 0xC0:
            self._answer(IN_PORT)
        elif value == 0xD0:
            self._answer(self.output_port())
        elif value in (0xDD, 0xDF):
            self._a20.set(value == 0xDF)
        self._fill()
        if value >= 0xF0 and not value & OUT_RUN:
            # The bits that are clear pull their pins of the output port down for a moment.
            self._reset_cpu()

    def output_port(self) -> int:
        state = self.state
        pins = OUT_HIGH | OUT_RUN | OUT_A20 * self._a20.is_open
        if state.full:
            pins |= OUT_MOUSE_FULL if state.source & FROM_MOUSE else OUT_FULL
        return pins

    def write_data(self, value: int) -> None:
        state = self.state
        command, state.command, state.last_was_command = state.command, 0, False
        if 0x60 <= command < 0x80:
            state.memory[command & MEMORY - 1] = value
            if command == 0x60 and value & SYSTEM_FLAG:
                state.system = True
        elif command == WRITE_OUT:
            self._a20.set(bool(value & OUT_A20))
        elif command == AS_KEYBOARD:
            self._answer(value)
        elif command == AS_MOUSE:
            self._answer(value, FROM_MOUSE)
        elif command == TO_MOUSE:
            state.memory[0] &= ~MOUSE_OFF
            self._answer(RESEND, FROM_MOUSE | TIMED_OUT)
        else:
            state.memory[0] &= ~OFF  # to send needs the clock
            state.released = False
            self._keyboard.write(value)
        self._fill()
        if command == WRITE_OUT and not value & OUT_RUN:
            self._reset_cpu()


class DataPort:
    """One port: the output buffer when read; data for the controller or its keyboard when written."""

    def __init__(self, controller: I8042) -> None:
        self._controller = controller

    def read(self, offset: int, size: int) -> int:
        return self._controller.read_data()

    def write(self, offset: int, size: int, value: int) -> None:
        self._controller.write_data(value)


SWITCHES = {0xA7: (0xFF, MOUSE_OFF), 0xA8: (~MOUSE_OFF, 0), 0xAD: (0xFF, OFF), 0xAE: (~OFF, 0)}
"""Commands that keep some bits of the command byte and set some: the clocks of the two ports, off and on."""
