"""Stopping the CPU at a moment of wall time.

Nothing may stop the engine from another thread but a flag that the CPU itself reads at its next block
boundary; `Machine.poke` raises that flag. This thread does so when the host clock reaches a device's
deadline. It exists only while a machine with the host clock runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SLACK = 50e-6  # seconds: the same deadline, reckoned again a moment later, need not wake the thread


class Alarm:
    """Calls `ring` from its own thread once after each `set`, at the moment set."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._at: float | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._wait, name="alarm", daemon=True)
        self._thread.start()

    def set(self, seconds: float) -> None:
        """Ring in `seconds`, instead of whenever was set before."""
        with self._changed:
            at = time.monotonic() + seconds
            sooner = self._at is None or at < self._at - SLACK
            self._at = at
            if sooner:  # a later moment is noticed when the thread wakes for the earlier one
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _wait(self) -> None:
        with self._changed:
            while not self._closed:
                if self._at is None:
                    self._changed.wait()
                    continue
                remaining = self._at - time.monotonic()
                if remaining > 0:
                    self._changed.wait(remaining)
                    continue
                self._at = None
                self._changed.release()
                try:
                    self._ring()
                finally:
                    self._changed.acquire()
