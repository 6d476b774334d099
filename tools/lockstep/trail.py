"""The last exits of a machine, each with its moment and place."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from vmm.attribution import PLACELESS, Attribution
from vmm.machine.machine import Machine

LENGTH = 100


@dataclass(frozen=True)
class Exit:
    """`at` is in retired instructions; `eip` and ring are the guest's, None where it is no instruction's doing."""

    at: int
    reason: str
    eip: int | None
    ring: int | None
    linear: int | None


class Trail(Attribution):
    """An attribution that remembers the order of the last `LENGTH` exits, too."""

    def __init__(self, machine: Machine) -> None:
        self.exits: deque[Exit] = deque(maxlen=LENGTH)
        super().__init__(machine)

    def add(self, reason: str, nanoseconds: int) -> None:
        super().add(reason, nanoseconds)
        site = None if reason in PLACELESS else self._here
        where = (None, None, None) if site is None else (site.eip, site.ring, site.linear)
        self.exits.append(Exit(self._machine.retired(), reason, *where))
