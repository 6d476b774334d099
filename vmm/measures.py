"""What a run took besides time: memory of the host, code that the CPU executed, lines of the guest that changed.

The hard part is to measure the same thing in every mode, and cheaply enough that it can always be measured.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

from vmm.image.image import Image
from vmm.machine.machine import Machine

_RESET_PEAK = "5"  # proc(5), clear_refs: the peak of resident memory becomes what is resident now


class MemoryMeter:
    """The peak of this process's resident memory above what was resident when the meter was made.

    Linux counts it, so it costs nothing while the guest runs. It includes the pages of guest memory that were
    touched, what the CPU engine made of the code, and the monitor's own data; memory that an earlier run has left
    to this process and that is used again is not seen. On other systems there is no figure.
    """

    def __init__(self) -> None:
        gc.collect()
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write(_RESET_PEAK)
        except OSError:
            self._before = None
        else:
            self._before = _status("VmRSS")

    def peak(self) -> int | None:
        """Bytes, or None where nobody counts them."""
        now = _status("VmHWM")
        return None if self._before is None or now is None else max(0, now - self._before)


def _status(field: str) -> int | None:
    """A field of /proc/self/status that is given in kibibytes, in bytes."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(field):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


class CodeMeter:
    """Bytes of code that the CPU was given to execute: the size of the union of all blocks, by linear address.

    Under a translator that is the translation cache's code and that of processes, which run directly; elsewhere it
    is the guest's own. Code at the same linear address in two address spaces counts once.
    """

    def __init__(self, machine: Machine) -> None:
        self._blocks: dict[int, int] = {}
        find = machine.on_translated

        def note(address: int, size: int) -> tuple[int, ...]:
            if self._blocks.get(address, 0) < size:
                self._blocks[address] = size
            return find(address, size)

        machine.on_translated = note  # type: ignore[method-assign]
        machine.engine.tell_all_translations()

    def bytes(self) -> int:
        """So far."""
        total = end = 0
        for start, size in sorted(self._blocks.items()):
            total += max(0, start + size - max(start, end))
            end = max(end, start + size)
        return total


@dataclass(frozen=True)
class Changed:
    """How two builds of one source differ, in lines that make code or data.

    A line is a place (file and number), and counts once however often it is used: in a macro's expansion it is the
    macro's own line. `removed` are those of `of` that the other build does without, `added` those that only it has.
    What surrounds a line (labels, definitions, comments) is not counted.
    """

    removed: int
    added: int
    of: int

    def __str__(self) -> str:
        return f"-{self.removed:,} +{self.added:,}"


def changed_lines(plain: Image, other: Image) -> Changed:
    """How many lines of a guest's source had to change from one build to the other."""
    mine, theirs = ({(line.file, line.line) for line in image.lines} for image in (plain, other))
    return Changed(len(mine - theirs), len(theirs - mine), len(mine))


def image_bytes(image: Image) -> int:
    """The size of a guest in memory, its zeroed room and the boot loader's information included."""
    return sum(segment.size for segment in image.segments)
