"""`--dump-translations`: every unit that is translated, written as it is made, so that no flush loses it.

What is written is made by `vmm.monitor.translator.dump`; here is the file, and where the bytes come from.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.cli.guest import open_output

if TYPE_CHECKING:
    from vmm.monitor.translator.monitor import TranslatingMonitor
    from vmm.monitor.translator.units import Unit
    from vmm.vm import VirtualMachine


class Translations:
    """The open file; `failed` holds why it could not be written, if so. Raises `OutputError` if not at all."""

    def __init__(self, name: str, guest: str) -> None:
        from vmm.monitor.translator.dump import Dump

        self._file = os.fdopen(open_output("--dump-translations", name), "w")
        self._dump = Dump(guest)
        self.failed: OSError | None = None
        self._put(self._dump.head())

    def watch(self, vm: VirtualMachine, on_failure: Callable[[], None]) -> None:
        """Have each unit written that `vm`, in mode `bt`, makes from now on."""
        from vmm.monitor.translator import layout
        from vmm.monitor.translator.dump import Made

        monitor = _monitor(vm)
        memory = vm.machine.memory

        def source(address: int, size: int) -> bytes:
            if not memory.is_ram(address):
                return b"\xff" * size  # what the bus says where nothing is
            return memory.bytes[address : address + size].tobytes()

        def note(unit: Unit) -> None:
            """Does not raise: the CPU may stand in an exit."""
            if self.failed is not None:
                return
            # Its own page is the last of the sources; before that comes the page that it runs into.
            guest = b"".join(source(*place) for place in (unit.sources[-1], *unit.sources[:-1]))
            start = layout.CODE + unit.origin
            code = monitor.cache.view[start : start + unit.size].tobytes()
            made = Made(unit, guest, code, monitor.slot, monitor.cache.statistics.flushes)
            self._put(self._dump.unit(made))
            if self.failed is not None:
                on_failure()

        monitor.observers.append(note)

    def close(self, vm: VirtualMachine) -> None:
        """Write the summary."""
        if self.failed is None:
            self._put(self._dump.summary(_monitor(vm).cache.statistics))
        try:
            self._file.close()
        except OSError as error:
            self.failed = self.failed or error

    def _put(self, text: str) -> None:
        try:
            self._file.write(text)
        except OSError as error:
            self.failed = error


def _monitor(vm: VirtualMachine) -> TranslatingMonitor:
    from vmm.monitor.translator.monitor import TranslatingMonitor

    assert isinstance(vm.control, TranslatingMonitor)
    return vm.control
