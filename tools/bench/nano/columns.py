"""What the benchmarks run on: bare Unicorn, each mode of ours, QEMU, Bochs. Each column gives samples.

The hard part is QEMU: only its whole process can be timed, from outside, so that a sample is the difference
between two processes, and the number of iterations has to be large enough for the firmware's start to drown.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tools.bench.nano import images
from tools.bench.nano.catalogue import Benchmark
from tools.bench.nano.worker import BARE, LONG, MOST, RUNS, Sample
from vmm.vm import MODES

PATIENCE = 30.0  # seconds that a process may take
QEMU_LONG = 0.2  # seconds over an empty run, which takes about a third of that
GUEST_DONE = 1  # the status of QEMU when the guest has written 0 to isa-debug-exit
QEMU = (
    *("-M", "pc", "-m", str(images.MEMORY >> 20), "-accel", "tcg,thread=single", "-nodefaults"),
    *("-display", "none", "-net", "none", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
)  # fmt: skip


class Column(Protocol):
    name: str
    title: str

    def absent(self, benchmark: Benchmark) -> str | None:
        """Why it cannot run a benchmark at all: "" if that goes without saying, None if it can."""

    def sample(self, benchmark: Benchmark, iterations: int) -> Sample:
        """A measurement with so many iterations, or with as many as it takes if 0."""


class Ours:
    """Bare Unicorn, or a mode: in a process of its own, whose memory lies where it has not lain before."""

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.title = "bare Unicorn" if name == BARE else name
        self._folder, self._environment = folder, environment

    def absent(self, benchmark: Benchmark) -> str | None:
        return None if benchmark.bare or self.name != BARE else ""

    def sample(self, benchmark: Benchmark, iterations: int) -> Sample:
        path = self._folder / f"{benchmark.name}.image"
        if not path.exists():
            path.write_bytes(pickle.dumps(replace(images.image_of(benchmark), lines=())))
        padding = {"VMM_BENCH_PADDING": "x" * random.randrange(1 << 13)}
        command = (
            *(sys.executable, "-m", "tools.bench.nano.worker", str(path), self.name, str(iterations)),
            *(str(benchmark.trial), "once" if benchmark.once else "loop"),
        )
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                env={**self._environment, **padding},
            )
        except subprocess.TimeoutExpired:
            return Sample(failure=f"not done after {PATIENCE:.0f} s")
        if done.returncode < 0:
            return Sample(failure=f"the process ended by signal {-done.returncode}")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            return Sample(failure=f"a bug of vmm's: {lines[-1]}")
        return Sample(**json.loads(done.stdout))


class Qemu:
    """QEMU with TCG, in one thread, by the whole process's time."""

    name, title = "qemu", "QEMU TCG"

    def __init__(self, folder: Path) -> None:
        self._program = shutil.which("qemu-system-i386")
        self._folder = folder

    def absent(self, benchmark: Benchmark) -> str | None:
        return None if self._program else "qemu-system-i386 is not installed (Debian: qemu-system-x86)"

    def _run(self, benchmark: Benchmark, iterations: int) -> float:
        """Seconds of a process; raises `subprocess.SubprocessError`."""
        path = self._folder / f"{benchmark.name}.elf"
        images.write(images.with_iterations(images.image_of(benchmark), iterations), path)
        command = (str(self._program), *QEMU, "-kernel", str(path))
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE)
        taken = time.perf_counter() - started
        if done.returncode != GUEST_DONE:
            raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)
        return taken

    def sample(self, benchmark: Benchmark, iterations: int) -> Sample:
        few = 0 if benchmark.once else 1
        try:
            start = min(self._run(benchmark, few) for _ in range(RUNS))
            if benchmark.once:
                many, taken = 1, self._run(benchmark, 1)
            else:
                many, taken = self._long(benchmark, start, iterations)
        except subprocess.TimeoutExpired:
            return Sample(failure=f"not done after {PATIENCE:.0f} s")
        except subprocess.SubprocessError as error:
            return Sample(failure=str(error).splitlines()[0])
        return Sample(many, max(0.0, taken - start) / (many - few))

    def _long(self, benchmark: Benchmark, start: float, iterations: int) -> tuple[int, float]:
        """(iterations, seconds of a process) of a run that is long enough."""
        n = iterations or 100
        while True:
            taken = self._run(benchmark, n)
            if iterations or taken - start > QEMU_LONG / 2 or n >= MOST:
                return n, taken
            n = min(MOST, int(n * max(4, min(50, QEMU_LONG / max(taken - start, 1e-3)))))


def columns(folder: Path, modes: tuple[str, ...] = ()) -> tuple[Column, ...]:
    """All of them, or those of some modes with what they are compared with; `folder` is for their files."""
    # As users have it: compiled modules are kept, so that only the first process compiles.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    ours = tuple(Ours(name, folder, environment) for name in (BARE, *(modes or MODES)))
    return (*ours, Qemu(folder))


__all__ = ["LONG", "Column", "Ours", "Qemu", "columns"]
