"""Who answers what the engine cannot: the protocol between `engine` and the machine above it."""

from __future__ import annotations

from enum import Enum, auto
from typing import Protocol

from unicorn import unicorn_const as U

READ, WRITE, FETCH = U.UC_MEM_READ, U.UC_MEM_WRITE, U.UC_MEM_FETCH
PROT_READ, PROT_WRITE, PROT_EXEC = U.UC_PROT_READ, U.UC_PROT_WRITE, U.UC_PROT_EXEC


class Stop(Enum):
    """Why `Engine.run` came back."""

    METER = auto()  # the instruction budget, or a polled flag: at a block boundary
    REQUESTED = auto()  # a handler called `stop` or `seal`
    HALT = auto()  # HLT executed; EIP is past it
    REFUSED = auto()  # a memory access was refused; EIP is at the instruction that made it
    COLLAPSED = auto()  # the engine cannot translate the code at EIP, or a little after it
    SITE = auto()  # at an instruction that the handler wants to execute itself


class Handler(Protocol):
    """Who handles the exits. All run inside the engine's callbacks, with the CPU's state live."""

    def on_exception(self, vector: int, software: bool) -> None:
        """An exception (EIP at it) or, if `software`, INT n, INT3 or INTO (EIP past it)."""

    def on_intercept(self, code: int) -> None:
        """A #VMEXIT for this reason, which the engine has begun and not completed: the guest is live."""

    def on_in(self, port: int, size: int) -> int: ...

    def on_out(self, port: int, size: int, value: int) -> None: ...

    def on_cpuid(self) -> None: ...

    def on_rdtsc(self) -> int: ...

    def on_sysenter(self) -> None:
        """EIP is at SYSENTER; the engine adds its two bytes afterwards."""

    def fill(self, address: int, access: int) -> tuple[int, int] | None:
        """(physical page, PROT_* bits) for the page of a linear address, or None to refuse the access."""

    def on_translated(self, address: int, size: int) -> tuple[int, ...]:
        """A block was translated: the addresses in it of instructions that must end in `Stop.SITE`."""

    def on_site(self, address: int) -> bool:
        """Before the instruction at such an address: True to stop there."""

    def count(self, address: int, size: int) -> int:
        """Instructions in `size` bytes of code at a linear address."""

    def is_store_only(self, address: int, size: int) -> bool:
        """Whether the one instruction there is no transfer of control, so that no block ends with it."""

    def is_repeated(self, address: int, size: int) -> bool:
        """Whether the one instruction there is a string instruction with a REP prefix."""
