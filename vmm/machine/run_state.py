"""What a run of the machine came to, and what its loop remembers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from vmm.events import Listener
from vmm.machine.delivery import Fault
from vmm.machine.paging import PageFault

Kind = Literal[
    "exit",
    "halt",
    "triple-fault",
    "budget",
    "timeout",
    "error",
    "interrupted",
    "seen",
    "unseen",
    "left",
    "paused",
]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: for `exit` the guest's status, else the reason in `detail`.

    `seen`: the console has shown what was waited for; `unseen`: not in the time given. `left` and `paused`: whoever
    sits at the terminal has had enough, or wants to look at the machine.
    """

    kind: Kind
    status: int
    detail: str


@dataclass
class Run:
    """What the loop must remember between exits."""

    outcome: Outcome | None = None
    fault: Fault | PageFault | None = None  # to be raised at the instruction where the machine stands
    step: bool = False  # the next block is more than the deadline allows
    borrowed: bool = False  # the interrupt shadow is the machine's own, for a step: the guest has none
    active: bool = False  # inside `run`
    free: bool = False  # no block is counted
    counted: bool = True  # every instruction until now was
    halted: bool = False  # an emulated HLT: the loop sleeps
    asleep: bool = False  # in HLT: a run that ended there goes on there
    attended: bool = False  # somebody outside may yet have something for a guest that sleeps for ever
    errands: deque[Callable[[], None]] = field(default_factory=deque)  # of other threads', for the loop
    poke: str = ""  # why somebody outside asked to stop
    listeners: list[Listener] = field(default_factory=list)
