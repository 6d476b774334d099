"""`--trace`: every event of a run as a line of JSON, after a line that says what was run.

An event's line has `at` (instructions retired before it), `eip`, `kind`, `detail`, and what else belongs to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from vmm.cli.guest import open_output
from vmm.events import Event, Listener
from vmm.vm import Result

VERSION = 1


class Trace:
    """The open file; `failed` holds why it could not be written, if so. Raises `OutputError` if not at all."""

    def __init__(self, name: str, guest: str, mode: str, clock: str, memory: int) -> None:
        self._file = os.fdopen(open_output("--trace", name), "w")
        self.failed: OSError | None = None
        self._put({"trace": VERSION, "guest": guest, "mode": mode, "clock": clock, "memory": memory})

    def listener(self, on_failure: Callable[[], None]) -> Listener:
        """What a machine calls with its events. Does not raise: the CPU may stand in an exit."""

        def note(event: Event) -> None:
            if self.failed is None:
                self._put(
                    {
                        "at": event.at,
                        "eip": event.eip,
                        "kind": event.kind,
                        "detail": event.detail,
                        **event.data,
                    }
                )
                if self.failed is not None:
                    on_failure()

        return note

    def close(self, result: Result, code: int) -> None:
        """The last line: how the run ended."""
        outcome = result.outcome
        if self.failed is None:
            eip = result.registers["eip"]
            end = {"at": result.instructions, "eip": eip, "kind": "end", "detail": outcome.detail}
            self._put(end | {"outcome": outcome.kind, "status": code})
        try:
            self._file.close()
        except OSError as error:
            self.failed = self.failed or error

    def _put(self, row: dict[str, object]) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
        except OSError as error:
            self.failed = error
