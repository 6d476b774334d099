"""From samples to figures: the best of several processes, the empty loop subtracted, and what the limits say.

A loop's speed has more than one mode, by the layout of memory, and the machine's load only ever slows it down: so
the least of the samples is the one that says what the operation costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tools.bench.nano.catalogue import EMPTY, Benchmark
from tools.bench.nano.limits import AtLeastFaster, AtLeastRate, AtMostExits, AtMostTimes, Limit
from tools.bench.nano.worker import BARE, BLOCK, DELIVERY, EXECUTABLE, FILL, NAMES, Sample

NO_EXIT = frozenset((FILL, BLOCK, DELIVERY))  # are shown, and happen without a monitor, too

STRAY = 1.01  # a tick of the host's clock may fall into a count, and is none of the operation's exits
KINDS = {
    "": "exits",
    "hidden": "hidden faults",
    "hypercall": "hypercalls",
    "external": "external interrupts",
    "delivery": "deliveries in Python",
}


@dataclass
class Results:
    """Samples by benchmark and column, and why there are none."""

    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, benchmark: Benchmark, column: str, sample: Sample) -> None:
        if sample.failure:
            self.failures[benchmark.name, column] = sample.failure
        else:
            self.samples.setdefault((benchmark.name, column), []).append(sample)

    def iterations(self, benchmark: Benchmark, column: str) -> int:
        """What the first process found to be enough, or 0."""
        taken = self.samples.get((benchmark.name, column))
        return taken[0].many if taken else 0

    def _iteration(self, name: str, column: str) -> float | None:
        """Seconds for one: the slope between the best of all short runs and the best of all long ones."""
        taken = self.samples.get((name, column))
        if not taken:
            return None
        few, many = taken[0].few, taken[0].many
        alike = [s for s in taken if (s.few, s.many) == (few, many)]
        slope = (min(s.long for s in alike) - min(s.short for s in alike)) / (many - few)
        return slope if slope > 0 else None

    def seconds(self, benchmark: Benchmark, column: str) -> float | None:
        """Seconds for one operation."""
        whole = self._iteration(benchmark.name, column)
        if whole is None:
            return None
        loop = self._iteration(EMPTY.name, column) if benchmark.net else 0.0
        return max(0.0, whole - (loop or 0.0)) / benchmark.operations

    def exits(self, benchmark: Benchmark, column: str) -> dict[str, float] | None:
        """Exits for one operation, by reason; the worker's `CALLBACKS` are among them."""
        taken = self.samples.get((benchmark.name, column))
        if not taken or column in (BARE, EXECUTABLE):
            return None
        counted = next((s.exits for s in taken if s.exits), {})
        return {reason: n / benchmark.operations for reason, n in counted.items()}

    def ratio(self, benchmark: Benchmark, column: str, versus: str) -> float | None:
        """How many times as long an operation takes in one column as in another."""
        ours, theirs = self.seconds(benchmark, column), self.seconds(benchmark, versus)
        return ours / theirs if ours is not None and theirs else None


@dataclass(frozen=True)
class Verdict:
    """`measured` and `limit` as text; `kept` is None where there is nothing to compare."""

    limit: str
    measured: str
    kept: bool | None


def judge(results: Results, benchmark: Benchmark, limit: Limit, mode: str) -> Verdict:
    """What this run says about a limit."""
    match limit:
        case AtMostTimes(times, versus):
            ratio = results.ratio(benchmark, mode, versus)
            text = "-" if ratio is None else f"{ratio:.2f}"
            bound = f"<= {times:g} x {NAMES[versus]}"
            return Verdict(bound, text, None if ratio is None else ratio <= times)
        case AtLeastFaster(times, versus):
            ratio = results.ratio(benchmark, versus, mode)
            text = "-" if ratio is None else f"{ratio:.2f}"
            bound = f">= {times:g} times as fast as {NAMES[versus]}"
            return Verdict(bound, text, None if ratio is None else ratio >= times)
        case AtMostExits(most, containing):
            counted = results.exits(benchmark, mode)
            what = KINDS.get(containing, containing)
            bound = f"no {what}" if not most else f"<= {_count(most)} {what}"
            if counted is None:
                return Verdict(bound, "-", None)
            n = sum(v for reason, v in counted.items() if containing in reason and _counts(reason, containing))
            return Verdict(bound, _count(n), n <= most * STRAY)
        case AtLeastRate(least):
            seconds = results.seconds(benchmark, mode)
            rate = 1 / seconds if seconds else None
            text = "-" if rate is None else f"{rate:,.0f} a second"
            return Verdict(f">= {least:,.0f} a second", text, None if rate is None else rate >= least)


def _counts(reason: str, containing: str) -> bool:
    """Whether a reason is an exit, or what was asked for."""
    return bool(containing) or reason not in NO_EXIT


def _count(n: float) -> str:
    """A number of exits for an operation; few of them as one in so many."""
    if 0 < n < 0.02:
        return f"1/{1 / n:,.0f}"
    return f"{n:.2f}".rstrip("0").rstrip(".")


count_text = _count
