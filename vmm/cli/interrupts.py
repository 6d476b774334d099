"""Ctrl-C and SIGTERM while a guest runs.

A spinning guest never returns to Python, so Python's own handler would never run. The signals are blocked in
this thread, and another waits for them: the first asks the run to stop, the second ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType

from vmm.errors import Interrupted


class Interrupts:
    """Within this context, the first signal calls `stop` from another thread, the second kills.

    `last` is called before the process dies, to leave the terminal as it was.
    """

    def __init__(self, stop: Callable[[], None], last: Callable[[], None] = lambda: None) -> None:
        self._stop, self._last = stop, last
        self._over = False
        self._before: set[signal.Signals | int] = set()
        # What whoever started us has chosen to ignore (nohup, a shell's background) stays ignored.
        self._signals = {
            number
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) is not signal.SIG_IGN
        }
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
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def _watch(self) -> None:
        asked = False
        while True:
            signal.sigwait(self._signals)
            if self._over:
                return
            if asked:
                self._last()
                os._exit(Interrupted.status)
            asked = True
            threading.Thread(target=self._stop, name="stop", daemon=True).start()
