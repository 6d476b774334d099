"""QEMU and Bochs: machines that are not ours, on which the same images run.

The hard part is that only their whole processes can be timed, from outside: a sample is the difference between two
of them, and the number of iterations has to be large enough for the firmware's start to drown. The time is the
processor's, so that what else runs on the host disturbs little; these guests never sleep.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
from pathlib import Path

from tools.bench.bochs import Installation
from tools.bench.nano import images
from tools.bench.nano.catalogue import EMPTY, Benchmark
from tools.bench.nano.disk import CYLINDERS, HEADS, SECTORS, disk
from tools.bench.nano.worker import MOST, Sample

PATIENCE = 30.0  # seconds that a process may take
RUNS = 2
LONG = 0.2  # seconds over a run without iterations
FIRST = 20_000  # operations in the first run that looks for a number
FOREVER = float("inf")


class Ended(Exception):
    """The emulator did not end as the guest ends it; the text says how."""


class WholeProcess:
    """An emulator that is timed from start to end. `rounds` says how many samples it is worth the time to take."""

    name: str
    title: str
    rounds = 2

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starts: dict[str, float] = {}  # seconds without iterations, by benchmark

    def absent(self, benchmark: Benchmark) -> str | None:
        """See `columns.Column`."""
        raise NotImplementedError

    def _run(self, benchmark: Benchmark, iterations: int) -> float:
        """Seconds of a process; raises `Ended`, and `subprocess.TimeoutExpired` after `PATIENCE`."""
        raise NotImplementedError

    def _start_of(self, benchmark: Benchmark) -> Benchmark:
        """Whose start stands for this one's."""
        return benchmark

    def sample(self, benchmark: Benchmark, iterations: int) -> Sample:
        few = 0 if benchmark.once else 1
        try:
            other = self._start_of(benchmark)
            again = 1 if other.name in self._starts else RUNS
            start = min(self._run(other, few) for _ in range(again))
            self._starts[other.name] = start = min(start, self._starts.get(other.name, start))
            many, long = iterations or 1, FOREVER
            if not (iterations or benchmark.once):
                many, long = self._enough(benchmark, start)
            long = min(long, *(self._run(benchmark, many) for _ in range(RUNS)))
        except subprocess.TimeoutExpired:
            return Sample(failure=f"not done after {PATIENCE:.0f} s")
        except Ended as error:
            return Sample(failure=str(error))
        return Sample(few, start, many, long)

    def _enough(self, benchmark: Benchmark, start: float) -> tuple[int, float]:
        """(iterations, seconds) of a process that takes about `LONG` seconds more than one without."""
        n = max(1, FIRST // benchmark.operations)
        while True:
            taken = self._run(benchmark, n)
            if taken - start > LONG / 2 or n == MOST:
                return n, taken
            n = min(MOST, int(n * max(4, min(100, 1.5 * LONG / max(taken - start, 1e-3)))))

    def _seconds(self, command: tuple[str, ...]) -> tuple[float, subprocess.CompletedProcess[str]]:
        """Processor time of a whole process, and what came of it."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done


class Qemu(WholeProcess):
    """QEMU with TCG, in one thread."""

    name, title = "qemu", "QEMU TCG"
    MACHINE = (
        *("-M", "pc", "-m", str(images.MEMORY >> 20), "-accel", "tcg,thread=single", "-nodefaults"),
        *("-display", "none", "-net", "none", "-serial", "null", "-no-reboot"),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
    )
    DONE = 1  # the status when the guest has written 0 to isa-debug-exit

    def absent(self, benchmark: Benchmark) -> str | None:
        if shutil.which("qemu-system-i386"):
            return None
        return "qemu-system-i386 is not installed (Debian: qemu-system-x86)"

    def _run(self, benchmark: Benchmark, iterations: int) -> float:
        path = self._folder / f"{benchmark.name}.elf"
        images.write(images.with_iterations(images.image_of(benchmark), iterations), path)
        taken, done = self._seconds(("qemu-system-i386", *self.MACHINE, "-kernel", str(path)))
        if done.returncode != self.DONE:
            raise Ended(f"QEMU ended with status {done.returncode}")
        return taken


class Bochs(WholeProcess):
    """Bochs, an interpreter; it boots from a disk and is ended through its shutdown port."""

    name, title = "bochs", "Bochs"
    rounds = 1
    BIOS = ("BIOS-bochs-legacy", "BIOS-bochs-latest")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._installed = Installation(self.BIOS)

    def absent(self, benchmark: Benchmark) -> str | None:
        return self._installed.absent

    def _start_of(self, benchmark: Benchmark) -> Benchmark:
        """Reading the disk takes as long for all that are small; a start takes half a second."""
        return benchmark if benchmark.once else EMPTY

    def _run(self, benchmark: Benchmark, iterations: int) -> float:
        path = self._folder / "bochs.disk"
        path.write_bytes(disk(images.with_iterations(images.image_of(benchmark), iterations)))
        shape = f"cylinders={CYLINDERS}, heads={HEADS}, spt={SECTORS}"
        command = self._installed.command(
            self._folder,
            f"megs: {images.MEMORY >> 20}\n"
            f"ata0-master: type=disk, path={path}, mode=flat, {shape}\n"
            "boot: disk\n",
        )
        taken, done = self._seconds(command)
        said = done.stdout + done.stderr
        if "Shutdown port" not in said:
            reason = next((line for line in said.splitlines() if line.startswith("[")), "no reason given")
            raise Ended(f"Bochs ended with status {done.returncode}: {reason.strip()}")
        return taken
