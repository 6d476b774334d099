"""What the benchmarks run on: bare Unicorn, each mode of ours, QEMU, Bochs. Each column gives samples.

The hard part is to say why a column has nothing for a benchmark: because it has no business there, because it is
not installed, because the guest failed. Only the first goes without saying.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tools.bench.nano import images
from tools.bench.nano.catalogue import Benchmark
from tools.bench.nano.emulators import PATIENCE, Bochs, Qemu
from tools.bench.nano.worker import BARE, EXECUTABLE, SHADOWED, Sample
from vmm.vm import MODES

BASELINES = {BARE: "bare Unicorn", EXECUTABLE: "executable pages"}
OUR_MODES = (*MODES, SHADOWED)


class Column(Protocol):
    name: str
    title: str
    rounds: int  # processes that it is worth the time to start, at most

    def absent(self, benchmark: Benchmark) -> str | None:
        """Why it cannot run a benchmark at all: "" if that goes without saying, None if it can."""

    def sample(self, benchmark: Benchmark, iterations: int) -> Sample:
        """A measurement with so many iterations, or with as many as it takes if 0."""


class Ours:
    """Bare Unicorn, or a mode: in a process of its own, whose memory lies where it has not lain before."""

    rounds = 1 << 30

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.title = BASELINES.get(name, name)
        self._pv = name in MODES and MODES[name].image == "pv"
        self._folder, self._environment = folder, environment

    def absent(self, benchmark: Benchmark) -> str | None:
        able = benchmark.pv if self._pv else benchmark.bare or self.name not in BASELINES
        return None if able else ""

    def sample(self, benchmark: Benchmark, iterations: int) -> Sample:
        path = self._folder / f"{benchmark.name}{'-pv' if self._pv else ''}.image"
        if not path.exists():
            path.write_bytes(pickle.dumps(replace(images.image_of(benchmark, pv=self._pv), lines=())))
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


def columns(folder: Path, modes: tuple[str, ...] = ()) -> tuple[Column, ...]:
    """All of them, or those of some modes with what they are compared with; `folder` is for their files."""
    # As users have it: compiled modules are kept, so that only the first process compiles.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    ours = tuple(Ours(name, folder, environment) for name in (*BASELINES, *(modes or OUR_MODES)))
    return (*ours, Qemu(folder), Bochs(folder))
