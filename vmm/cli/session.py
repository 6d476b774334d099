"""A run in pieces: up to each text of a script, with stops in between to look at the machine, as one run.

The hard part is that others end a piece at any moment, from threads of their own: also between two pieces, and at the
very instruction at which a text was seen. So what they ask for is kept until a piece has ended with it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Protocol

from vmm.expect import Expect, Press, Send, Step
from vmm.machine.machine import Outcome
from vmm.vm import Result, VirtualMachine

PAUSED = Outcome("paused", 0, "stopped to look at")


class Prompt(Protocol):
    """Whom to ask when the run is paused; see `prompt`."""

    def ask(self, result: Result) -> Outcome | None: ...

    def give_up(self) -> None: ...


class Session:
    """Takes `vm` through `steps` and on to its end, within the bounds; `until`, if any, ends it after them."""

    def __init__(
        self,
        vm: VirtualMachine,
        steps: Sequence[Step],
        until: Expect | None,
        max_instructions: int | None,
        timeout: float | None,
    ) -> None:
        self._vm, self._steps, self._until = vm, steps, until
        self._limit, self._timeout = max_instructions, timeout
        self._seconds = 0.0
        self._lock = threading.Lock()
        self._asked: Outcome | None = None  # what somebody wants the run to come to
        self.prompt: Prompt | None = None
        self.unseen: Expect | None = None  # the text that the run was to show and did not

    # From other threads

    def ask(self, outcome: Outcome) -> None:
        """Have the run end, or pause, with this. It is heard when the loop is poked."""
        with self._lock:
            if self._asked is None or self._asked == PAUSED:
                self._asked = outcome
        if outcome != PAUSED and self.prompt is not None:
            self.prompt.give_up()
        self._vm.machine.run_state.errands.append(self._obey)

    def stop(self, reason: str) -> None:
        """End the run soon, as interrupted. Waits until that is heard."""
        self.ask(Outcome("interrupted", 0, reason))
        self._vm.poke(reason)

    # In the loop

    def run(self) -> Result:
        """The whole; `unseen` is set if it ended before a text that was waited for."""
        for step in self._steps:
            if isinstance(step, Expect):
                result = self._piece(step)
                if result.outcome.kind != "seen":
                    self.unseen = step
                    return self._whole(result)
            elif isinstance(step, Send):
                self._vm.send(step.data)
            elif isinstance(step, Press):
                self._vm.press(step.names)
            else:
                self._vm.type(step.data)
        result = self._piece(self._until)
        if self._until is not None and result.outcome.kind != "seen":
            self.unseen = self._until
        return self._whole(result)

    def _piece(self, wanted: Expect | None) -> Result:
        """Run to the text, or to the end; stops to look at the machine do not count."""
        now = self._vm.machine.now
        within = None if wanted is None else wanted.within
        until = None if within is None else now() + int(within * 1e9)
        while True:
            if self._asked is not None:
                self._vm.machine.run_state.errands.append(self._obey)
            left = None if self._timeout is None else max(0.001, self._timeout - self._seconds)
            if wanted is None:
                result = self._vm.run(self._limit, left)
            else:
                patience = None if until is None else max(1, until - now()) / 1e9
                result = self._vm.run_until(
                    wanted.text, within=patience, max_instructions=self._limit, timeout=left
                )
            self._seconds += result.seconds
            if result.outcome != PAUSED:
                return result
            ending = self._pause(result)
            if ending is not None:
                return dataclasses.replace(result, outcome=ending, instructions=self._vm.machine.retired())

    def _obey(self) -> None:
        if self._asked is not None:
            self._vm.machine.end(self._asked)

    def _pause(self, result: Result) -> Outcome | None:
        """Ask what to do; None: go on."""
        assert self.prompt is not None
        with self._lock:
            if self._asked == PAUSED:
                self._asked = None
        ending = self.prompt.ask(self._whole(result))
        return ending if self._asked in (None, PAUSED) else self._asked

    def _whole(self, result: Result) -> Result:
        return dataclasses.replace(result, seconds=self._seconds)
