"""Model-specific registers of the machine: one row a register, and the same rows in every mode.

What lives in the processor itself (SYSENTER's three) is the control's, which looks there first; all else that a
guest may read or write by RDMSR and WRMSR is here, and what is not raises #GP(0).

Source: SDM volume 3A, 9.4, and 9.11.7 (microcode updates); volume 2B, RDMSR and WRMSR; volume 4, "MSRs in the P6
family processors".
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.isa.vectors import Vector
from vmm.machine.delivery import Fault

TSC = 0x10
PLATFORM_ID = 0x17
BIOS_SIGN = 0x8B  # the signature of the update to the microcode: 0, or what was written, as none is ever loaded


class Msrs:
    """Registers by number; `held` are the values of those that only keep one.

    A row's `write` may itself raise `Fault`, for a value that the register refuses.
    """

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self._rows: dict[int, tuple[Callable[[], int], Callable[[int], None]]] = {}

    def attach(self, number: int, read: Callable[[], int], write: Callable[[int], None]) -> None:
        """From now on the machine has this register, of 64 bits."""
        assert number not in self._rows, f"two registers {number:#x}"
        self._rows[number] = read, write

    def hold(self, number: int) -> None:
        """The same, and it keeps what is written to it; 0 at first."""
        self.held[number] = 0
        self.attach(number, lambda: self.held[number], lambda value: self.held.__setitem__(number, value))

    def fix(self, number: int, value: int) -> None:
        """The same, and it can only be read."""

        def refuse(_value: int) -> None:
            raise Fault(Vector.GP, 0)

        self.attach(number, lambda: value, refuse)

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
