"""One benchmark on one of our machines, in a process of its own: prints a `Sample` as JSON.

    python -m tools.bench.nano.worker IMAGE COLUMN ITERATIONS CODE

IMAGE is a pickled guest, COLUMN is one of `columns`, ITERATIONS 0 asks to find the number and to count exits.
A process of its own because the speed of a loop depends on where the engine's memory lies, and because a guest that
brings the engine down must not take the table with it.

The hard part is to keep what happens once (imports, translation, the first exit of each kind) out of the figure:
it is the slope between two numbers of iterations (`results`), each at the best of several runs.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tools.bench import baseline
from tools.bench.nano.images import MEMORY, with_iterations
from vmm.errors import VmmError
from vmm.image.image import Image
from vmm.machine.bare import Bare
from vmm.vm import VirtualMachine, hardware

BARE = "bare"
EXECUTABLE = "executable"  # what bare Unicorn is without NX
SHADOWED = "hvm-shadow"  # hvm with shadow page tables instead of nested ones
NAMES = {
    BARE: "bare Unicorn, same NX tables",
    EXECUTABLE: "bare Unicorn, executable pages",
    "native": "native",
    "qemu": "QEMU",
}
LONG = 0.06  # seconds of a run that is long enough to be measured
RUNS = 3
MOST = 1 << 30  # iterations
HIDDEN = "hidden fault: "
# What the engine asks the machine besides exits. Each costs about as much as an exit.
FILL, SITE, BLOCK = "TLB fill", "site check", "block translated"
DELIVERY = "delivery in Python"  # of an exception or an interrupt, by the manual's steps: a part of an exit
CALLBACKS = {"fill": FILL, "on_site": SITE, "on_translated": BLOCK}

Run = Callable[[int], float]


class Failed(Exception):
    """The guest did not reach its end; the text says why."""


@dataclass
class Sample:
    """The best of the runs with `few` iterations, and of those with `many`, in seconds.

    `exits` are those of one iteration, by reason, `CALLBACKS` among them.
    """

    few: int = 0
    short: float = 0.0
    many: int = 0
    long: float = 0.0
    exits: dict[str, float] = field(default_factory=dict)
    failure: str = ""


def run_in(
    image: Image, mode: str, iterations: int, watch: Callable[[VirtualMachine], None] = lambda _vm: None
) -> tuple[float, dict[str, int]]:
    """(seconds, exits by reason) of a whole guest, without a bound, by the host's clock; raises `Failed`.

    The seconds are the processor's, because these guests never sleep and the host may have other work.
    `watch` gets the machine before it runs.
    """
    try:
        attach = hardware(memory_virtualization="shadow") if mode == SHADOWED else None
        name = "hvm" if mode == SHADOWED else mode
        guest = with_iterations(image, iterations)
        vm = VirtualMachine(guest, name, memory=MEMORY, clock="host", attach=attach)
        watch(vm)
        started = time.process_time()
        result = vm.run()
        taken = time.process_time() - started
    except VmmError as error:
        raise Failed(str(error)) from None
    if result.outcome.kind != "exit":
        raise Failed(result.outcome.detail or result.outcome.kind)
    return taken, {reason: row.count for reason, row in result.exits.rows.items()}


def count_in(image: Image, mode: str, iterations: int) -> dict[str, int]:
    """Exits by reason, and with them hidden faults, `CALLBACKS` and deliveries; raises `Failed`."""
    calls = dict.fromkeys((*CALLBACKS.values(), DELIVERY), 0)
    machines: list[VirtualMachine] = []

    def watch(vm: VirtualMachine) -> None:
        machines.append(vm)
        for name, reason in CALLBACKS.items():
            setattr(vm.machine, name, counting(getattr(vm.machine, name), reason))
        if isinstance(vm.control, Bare):
            vm.control.deliver = counting(vm.control.deliver, DELIVERY)  # type: ignore[assignment]

    def counting(callback: Callable[..., object], reason: str) -> Callable[..., object]:
        def count(*arguments: object) -> object:
            calls[reason] += 1
            return callback(*arguments)

        return count

    counted = run_in(image, mode, iterations, watch)[1] | calls
    # Where shadow tables are filled on demand, a hidden fault is inside a fill and not in the table of exits.
    hidden: dict[str, int] = getattr(machines[0].control, "hidden_faults", {})
    return {HIDDEN + kind: n for kind, n in hidden.items()} | counted


def exits(count: Callable[[int], dict[str, int]], trial: int, once: bool) -> dict[str, float]:
    """Exits for one iteration in the long run: the slope between two runs that are past their beginning."""
    few, many = (0, 1) if once else (2 * trial, 6 * trial)
    before, after = count(few), count(many)
    slopes = {reason: (n - before.get(reason, 0)) / (many - few) for reason, n in after.items()}
    return {reason: slope for reason, slope in slopes.items() if slope}


def calibrated(run: Run) -> int:
    """A number of iterations that takes about `LONG` seconds."""
    n, least = 16, run(1)
    while n < MOST:
        taken = run(n) - least
        if taken > LONG / 2:
            return max(n, min(MOST, int(n * LONG / taken)))
        n *= 2 if taken > LONG / 4 else max(2, min(16, int(LONG / max(taken, 1e-4) / 2)))
    return MOST


def timed(run: Run, iterations: int, once: bool) -> Sample:
    """Short and long runs; of as many iterations as it takes to be exact if `iterations` is 0."""
    run(1)  # what is imported and compiled at the first exit is not the guest's
    many = 1 if once else iterations or calibrated(run)
    few = many // 16
    return Sample(few, min(run(few) for _ in range(RUNS)), many, min(run(many) for _ in range(RUNS)))


def sample(image: Image, column: str, iterations: int, trial: int, once: bool) -> Sample:
    """The sample of one process; a failure is part of it."""
    try:
        if column in (BARE, EXECUTABLE):
            loop = partial(baseline.run_loop, executable=column == EXECUTABLE)
            return timed(lambda n: loop(with_iterations(image, n)), iterations, once)
        counted = {} if iterations else exits(lambda n: count_in(image, column, n), trial, once)
        return replace(timed(lambda n: run_in(image, column, n)[0], iterations, once), exits=counted)
    except (Failed, VmmError) as error:
        return Sample(failure=str(error))


def main(path: str, column: str, iterations: str, trial: str, once: str) -> dict[str, Any]:
    image: Image = pickle.loads(Path(path).read_bytes())
    return asdict(sample(image, column, int(iterations), int(trial), once == "once"))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
