"""Standard output for the guest's console, standard error for progress, and peace between them.

The hard part: both are often the same terminal. Progress is one line that is drawn only while the console
stands at the start of a line, and wiped before the guest writes again. Where standard error is no terminal
there is no progress.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable

PATIENCE = 1.0  # seconds before a run counts as long
PERIOD = 0.25  # seconds between two drawings
WIPE = b"\r\x1b[K"


class Screen:
    """`write` takes the guest's console output; `failed` holds why it could not be shown, if so."""

    def __init__(self, on_failure: Callable[[], None] = lambda: None) -> None:
        sys.stdout.flush()
        self._out = sys.stdout.fileno()
        self._on_failure = on_failure
        self.failed: OSError | None = None
        self.at_line_start = True
        self._shared = os.isatty(self._out)
        self._lock = threading.Lock()
        self._drawn = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self, data: bytes) -> None:
        """Show what the guest wrote, at once. Does not raise: it is called while the CPU stands in an OUT."""
        if self.failed is not None:
            return
        if self._thread is None:
            self._put(data)
            return
        with self._lock:
            self._wipe()
            self._put(data)

    def _put(self, data: bytes) -> None:
        self.at_line_start = data[-1:] == b"\n"
        left = data
        while left:
            try:
                left = left[os.write(self._out, left) :]
            except BlockingIOError:
                select.select((), (self._out,), ())
            except OSError as error:
                self.failed = error
                self._on_failure()
                return

    # Progress

    def start_progress(self, text: Callable[[], str]) -> None:
        """From now on, after `PATIENCE` seconds, show what `text` says, if standard error is a terminal."""
        if sys.stderr is None or not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
            return
        self._thread = threading.Thread(target=self._show, args=(text,), name="progress", daemon=True)
        self._thread.start()

    def stop_progress(self) -> None:
        """Leave the terminal as it was. May be called from any thread, more than once."""
        self._done.set()
        if self._lock.acquire(timeout=PERIOD):  # not if the guest's output waits for a reader, with the lock
            self._wipe()
            self._lock.release()

    def _show(self, text: Callable[[], str]) -> None:
        wait = PATIENCE
        while not self._done.wait(wait):
            wait = PERIOD
            with self._lock:
                if self._done.is_set() or self._shared and not self.at_line_start:
                    continue
                width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
                os.write(sys.stderr.fileno(), WIPE + text()[:width].encode())
                self._drawn = True

    def _wipe(self) -> None:
        if self._drawn:
            self._drawn = False
            os.write(sys.stderr.fileno(), WIPE)
