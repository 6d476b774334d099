"""Signals while a guest runs: Ctrl-C, SIGTERM, a terminal that hangs up; and being stopped and going on.

A spinning guest never returns to Python, so Python's own handler would never run. The signals are blocked in
this thread, and another waits for them: the first asks the run to stop, the second ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from vmm.errors import Interrupted

HUNG_UP = "the terminal went away"
REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "interrupted", signal.SIGHUP: HUNG_UP}


class Terminal(Protocol):
    """What must be put right when the process is stopped, and again when it goes on."""

    def suspend(self) -> None: ...

    def resume(self) -> None: ...


class Interrupts:
    """Within this context, the first signal calls `stop` with a reason from another thread, the second kills.

    `last` is called before the process dies, to leave the terminal as it was. A `terminal` that is given is put right
    around SIGTSTP and after SIGCONT; SIGQUIT, which kills at once, finds it put right by `last`.
    """

    def __init__(
        self,
        stop: Callable[[str], None],
        last: Callable[[], None] = lambda: None,
        terminal: Terminal | None = None,
    ) -> None:
        self._stop, self._last, self._terminal = stop, last, terminal
        self._over = False
        self._before: set[signal.Signals | int] = set()
        wanted = [*REASONS]
        if terminal is not None:
            wanted += [signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT]
        # What whoever started us has chosen to ignore (nohup, a shell's background) stays ignored.
        self._signals = {number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN}
        self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)

    def __enter__(self) -> None:
        if self._signals:
            self._before = set(signal.pthread_sigmask(signal.SIG_BLOCK, self._signals))
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._signals:
            self._over = True
            assert self._thread.ident is not None
            signal.pthread_kill(self._thread.ident, next(iter(self._signals)))
            self._thread.join()
            while late := signal.sigpending() & self._signals:  # for a run that has ended: nothing is left to stop
                signal.sigwait(late)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def _watch(self) -> None:
        asked = False
        while True:
            number = signal.sigwait(self._signals)
            if self._over:
                return
            if number in (signal.SIGTSTP, signal.SIGCONT):
                self._pause(number)
                continue
            if asked or number == signal.SIGQUIT:
                self.kill()
            asked = True
            reason = REASONS[signal.Signals(number)]
            threading.Thread(target=self._stop, args=(reason,), name="stop", daemon=True).start()

    def _pause(self, number: int) -> None:
        assert self._terminal is not None
        if number == signal.SIGTSTP:
            self._terminal.suspend()
            # To this thread, so that it stops right here: SIGTSTP itself is blocked.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        self._terminal.resume()

    def kill(self) -> None:
        """End the process at once."""
        self._last()
        os._exit(Interrupted.status)
