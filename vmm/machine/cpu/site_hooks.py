"""Hooks on single instructions: those that the machine executes itself are found, and stopped at.

Each translated block is searched once. Where such an instruction stands in it, a hook is placed on its address and
the block translated again, with the hook in it. A hook that then leaves the instruction to the engine has disturbed
something: should the instruction fault, the engine forgets what its lazy flags were, so they are kept here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

from vmm.machine.cpu.state import CpuState

MOST = 512  # a guest that scatters such instructions must not slow every translation


class SiteHooks:
    """`place` hooks an address, `remove` takes a hook away, `forget_block` has a block translated again."""

    def __init__(
        self,
        place: Callable[[int], ctypes.c_size_t],
        remove: Callable[[ctypes.c_size_t], None],
        forget_block: Callable[[int, int], None],
        forget_all: Callable[[], None],
    ) -> None:
        self._place, self._remove = place, remove
        self._forget_block, self._forget_all = forget_block, forget_all
        self._hooks: dict[int, ctypes.c_size_t] = {}
        self.new: list[tuple[int, int, int]] = []  # site, and address and size of its block
        self.stopped = False  # the CPU stands at one
        self.left_to_engine = -1  # EIP of the last one that was, and that has not yet gone on
        self._flags = 0

    def found(self, sites: Iterable[int], address: int, size: int) -> None:
        """A block has been translated, with these in it."""
        self.new += [(site, address, size) for site in sites if site not in self._hooks]

    def place(self) -> None:
        """Hook the new ones (only outside `run`)."""
        if len(self._hooks) > MOST:
            self.forget()
        for site, address, size in self.new:
            if site not in self._hooks:
                self._hooks[site] = self._place(site)
            self._forget_block(address, size)
        self.new.clear()

    def forget(self) -> None:
        """All code is translated anew, and searched anew."""
        for handle in self._hooks.values():
            self._remove(handle)
        self._hooks.clear()
        self._forget_all()

    def leave(self, state: CpuState) -> None:
        """The instruction at EIP is the engine's to execute."""
        self.left_to_engine, self._flags = state.eip, state.eflags

    def restore_flags(self, state: CpuState) -> None:
        """It has faulted."""
        state.eflags = self._flags
        self.left_to_engine = -1
