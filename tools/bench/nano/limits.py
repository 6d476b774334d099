"""What each mode has to keep: a ratio of times, a number of exits, or a rate, for a benchmark in a mode.

A limit says nothing of the mode that it is for: `LIMITS` does. Where it counts exits it may count those of one kind
alone, by a word in their reason (`worker` has the words of what is no exit, and counted all the same).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tools.bench.nano.catalogue import BATCH, ENTRIES

Versus = Literal["bare", "executable", "native", "qemu"]


@dataclass(frozen=True)
class AtMostTimes:
    """An operation may take so many times as long as on another machine of the same run."""

    times: float
    versus: Versus


@dataclass(frozen=True)
class AtLeastFaster:
    """An operation has to be so many times as fast as on another machine of the same run."""

    times: float
    versus: Versus


@dataclass(frozen=True)
class AtMostExits:
    """An operation may cost so many exits; with `containing`, only of the reasons that contain it."""

    exits: float
    containing: str = ""


@dataclass(frozen=True)
class AtLeastRate:
    """So many operations a second."""

    rate: float


Limit = AtMostTimes | AtLeastFaster | AtMostExits | AtLeastRate

_PTE = (AtMostExits(1 / ENTRIES, "hidden"),)
_PRIVATE = (AtMostExits(0), AtMostTimes(2, "qemu"))
_AS_BARE = (AtMostTimes(1.1, "bare"),)

_AS_NATIVE = (AtMostTimes(1.2, "native"),)
_NO_EXIT = (AtMostExits(0), *_AS_NATIVE)
_SEVERAL = AtLeastFaster(3, "executable")
_ONE_DELIVERY = (AtMostExits(1), AtMostExits(1, "delivery"))

LIMITS: Mapping[str, Mapping[str, tuple[Limit, ...]]] = {
    "bt": {
        "syscall": (AtMostExits(1),),
        "call": (AtMostTimes(2.5, "bare"),),
        "pte": _PTE,
        "pte-absent": _PTE,
        "pte-flush": _PTE,
        "compute": _AS_BARE,
        "memory": _AS_BARE,
        "copy": _AS_BARE,
        "cli": _PRIVATE,
        "pushf": _PRIVATE,
        "switch": (AtMostExits(3),),
        "translate": (AtLeastRate(100_000),),
    },
    "pv": {
        "syscall": (AtMostExits(1),),
        "pte-batch": (AtMostExits(1 / BATCH),),
        "switch": (AtMostExits(1, "hypercall"),),
    },
    "hvm": {
        "syscall": _ONE_DELIVERY,
        "fault": _ONE_DELIVERY,
        "divide": _ONE_DELIVERY,
        "interrupt": (AtMostExits(1, "external"), AtMostExits(0, "delivery")),
        "switch": _ONE_DELIVERY,
        "cr3": (AtMostExits(0),),
        "call": (*_NO_EXIT, _SEVERAL),
        "compute": _NO_EXIT,
        "memory": (*_NO_EXIT, _SEVERAL),
        "copy": _NO_EXIT,
        "cli": _NO_EXIT,
        "pushf": _NO_EXIT,
        "pte": _NO_EXIT,
        "pte-absent": _NO_EXIT,
        "pte-flush": _NO_EXIT,
        "pte-batch": _NO_EXIT,
        "pte-invlpg": _NO_EXIT,
        "pte-touch": _NO_EXIT,
    },
}
"""By mode, and by the benchmark's name there."""
