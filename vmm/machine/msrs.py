"""Model-specific registers of the machine: one row a register, and the same rows in every mode.

What lives in the processor itself (SYSENTER's three) is the control's, which looks there first; all else that a
guest may read or write by RDMSR and WRMSR is here, and what is not raises #GP(0).

Source: SDM volume 3A, 9.4; volume 2B, RDMSR and WRMSR.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.isa.vectors import Vector
from vmm.machine.delivery import Fault

TSC = 0x10


class Msrs:
    """Registers by number. A row's `write` may itself raise `Fault`, for a value that the register refuses."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[Callable[[], int], Callable[[int], None]]] = {}

    def attach(self, number: int, read: Callable[[], int], write: Callable[[int], None]) -> None:
        """From now on the machine has this register, of 64 bits."""
        assert number not in self._rows, f"two registers {number:#x}"
        self._rows[number] = read, write

    def read(self, number: int) -> int:
        """Raises #GP(0) for a register that this machine does not have."""
        if number not in self._rows:
            raise Fault(Vector.GP, 0)
        return self._rows[number][0]()

    def write(self, number: int, value: int) -> None:
        """Raises #GP(0) for a register that this machine does not have, or a value that it does not take."""
        if number not in self._rows:
            raise Fault(Vector.GP, 0)
        self._rows[number][1](value)
