"""From boots to figures: the best of several, ratios to QEMU, and the limits of a real Linux.

What else the host does only ever slows a boot down, so the least time says what it costs; ratios are of processor
time, which a busy host disturbs least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tools.bench.linux.boot import Boot, Moment
from tools.bench.linux.machines import MEMORY

BASE = "console=ttyS0 acpi=off noapic nolapic pci=off nokaslr"
DEFAULTS, LEAST = "", "cryptomgr.notests"
# What is added to the kernel's command line, and how it is shown.
VARIANTS = {DEFAULTS: "the kernel's defaults", "mitigations=off": "mitigations=off", LEAST: LEAST}
WITH_LOOPS = LEAST  # the boots that go on with `tools/linux/scripts/compute`

READY = b"userspace: ready"
LOOPS = {"md5sum": "md5sum of 64 MB", "pipe": "the same through a pipe", "awk": "awk, 100,000 rounds"}
SWITCHING = "pipe"  # more than computing: the processes change places 17,000 times
LOOP_LINES = (*(f"compute: {name}".encode() for name in LOOPS), b"compute: done")


@dataclass
class Results:
    """Boots by variant and machine, each from the moment when the machine's time began; and why there are none."""

    boots: dict[tuple[str, str], list[Boot]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, variant: str, machine: str, boot: Boot) -> None:
        self.boots.setdefault((variant, machine), []).append(boot)

    def ready(self, variant: str, machine: str) -> Moment | None:
        """The least processor time and the least wall time to userspace."""
        taken = self.boots.get((variant, machine))
        return _least([boot.moments[0] for boot in taken]) if taken else None

    def loop(self, name: str, machine: str) -> Moment | None:
        """The same of one of `LOOPS`, by itself."""
        at = 1 + list(LOOPS).index(name)
        taken = [b for b in self.boots.get((WITH_LOOPS, machine), ()) if len(b.moments) > at + 1]
        return _least([boot.moments[at + 1].since(boot.moments[at]) for boot in taken]) if taken else None

    def memory(self, variant: str, machine: str) -> int | None:
        """The largest peak until userspace, in bytes."""
        taken = self.boots.get((variant, machine))
        return max(boot.moments[0].memory for boot in taken) if taken else None

    def quickest(self, variant: str, machine: str) -> Boot | None:
        """The boot of the least processor time."""
        taken = self.boots.get((variant, machine))
        return min(taken, key=lambda boot: boot.moments[0].processor) if taken else None


def _least(moments: list[Moment]) -> Moment:
    return Moment(
        min(m.wall for m in moments), min(m.processor for m in moments), max(m.memory for m in moments)
    )


def ratio(ours: Moment | None, theirs: Moment | None) -> float | None:
    """Of processor time."""
    if ours is None or theirs is None or not theirs.processor:
        return None
    return ours.processor / theirs.processor


@dataclass(frozen=True)
class Limit:
    """At most `bound`, in the unit that `text` has; `measured` takes the results and a variant."""

    machine: str
    text: str
    bound: float
    variants: tuple[str, ...]
    measured: Callable[[Results, str], float | None]


def _times(machine: str, other: str) -> Callable[[Results, str], float | None]:
    return lambda results, variant: ratio(results.ready(variant, machine), results.ready(variant, other))


def _memory(machine: str) -> Callable[[Results, str], float | None]:
    def over(results: Results, variant: str) -> float | None:
        peak = results.memory(variant, machine)
        return None if peak is None else (peak >> 20) - MEMORY

    return over


def _loop(machine: str, name: str) -> Callable[[Results, str], float | None]:
    return lambda results, _variant: ratio(results.loop(name, machine), results.loop(name, "qemu"))


LIMITS: tuple[Limit, ...] = (
    *(
        Limit(mode, "boot, times QEMU", 4, (DEFAULTS, "mitigations=off"), _times(mode, "qemu"))
        for mode in ("hvm", "bt")
    ),
    Limit("native", "boot, times Bochs", 1, (DEFAULTS, "mitigations=off"), _times("native", "bochs")),
    *(
        Limit(mode, "memory over the guest's, MB", 400, (DEFAULTS,), _memory(mode))
        for mode in ("native", "hvm", "hvm shadow", "bt")
    ),
    *(
        Limit("bt", f"{LOOPS[name]}, times QEMU", 2.5, (WITH_LOOPS,), _loop("bt", name))
        for name in LOOPS
        if name != SWITCHING
    ),
)
