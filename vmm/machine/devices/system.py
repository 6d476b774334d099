"""The small system ports: port 0x92, and QEMU's two debugging devices.

Nothing hard here, but one thing to remember: a callback of these may end the run. It is called last, with
the state already up to date, so a snapshot taken inside it is a good one.

Sources: Intel 82371SB (PIIX3) data sheet, port 92; QEMU documentation, `-debugcon` and `isa-debug-exit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.machine.devices.signals import Line, Sink

FAST_RESET = 1 << 0
A20 = 1 << 1


@dataclass
class A20State:
    is_open: bool = True


class A20Gate:
    """The gate of address line 20, which port 0x92 and the keyboard controller move, the last one in force.

    It starts open, as firmware leaves it and multiboot demands; `a20` is called when it changes.
    """

    def __init__(self, a20: Line) -> None:
        self._a20 = a20
        self.state = A20State()

    def reset(self) -> None:
        self.set(True)

    @property
    def is_open(self) -> bool:
        return self.state.is_open

    def set(self, is_open: bool) -> None:
        if is_open is not self.state.is_open:
            self.state.is_open = is_open
            self._a20(is_open)


@dataclass
class Port92State:
    """The bits as written; A20 is the gate's."""

    value: int = 0


class Port92:
    """System control port A, one port at 0x92: bit 1 opens the A20 gate, bit 0 going up resets the CPU."""

    def __init__(self, a20: A20Gate, reset_cpu: Callable[[], None]) -> None:
        self._a20, self._reset_cpu = a20, reset_cpu
        self.state = Port92State()

    def reset(self) -> None:
        self.state = Port92State()
        self._a20.reset()

    def read(self, offset: int, size: int) -> int:
        return self.state.value & ~A20 | A20 * self._a20.is_open

    def write(self, offset: int, size: int, value: int) -> None:
        rose = ~self.state.value & value
        self.state.value = value & 0xFF
        self._a20.set(bool(value & A20))
        if rose & FAST_RESET:
            self._reset_cpu()


@dataclass
class DebugConsoleState:
    """It has none."""


class DebugConsole:
    """QEMU's debug console, one port at 0xE9: what is written is shown; it reads 0xE9, for "I am here"."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.state = DebugConsoleState()

    def reset(self) -> None:
        self.state = DebugConsoleState()

    def read(self, offset: int, size: int) -> int:
        return 0xE9

    def write(self, offset: int, size: int, value: int) -> None:
        self._sink(bytes((value & 0xFF,)))


def exit_status(value: int) -> int:
    """The process status, 0..255 and odd, of a guest that wrote `value` to isa-debug-exit."""
    return (value << 1 | 1) & 0xFF


@dataclass
class DebugExitState:
    """The value written, or -1: the guest goes on."""

    value: int = -1


class DebugExit:
    """QEMU's isa-debug-exit, four ports at 0xF4 (attach it with width 4): a write ends the run.

    `exit_run` gets the value as written; `exit_status` is the rule that turns it into a status.
    """

    def __init__(self, exit_run: Callable[[int], None]) -> None:
        self._exit_run = exit_run
        self.state = DebugExitState()

    def reset(self) -> None:
        self.state = DebugExitState()

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.state.value = value
        self._exit_run(value)
