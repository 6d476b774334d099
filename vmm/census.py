"""The census: put every row of the classification to the real CPU and derive the classes from what happens.

Each row has cases: encodings with operands that make them do their work. Each case runs in rings 0, 1 and 3,
in many states, and in states that differ in one thing that a monitor owns (where the GDT is, what IDTR holds,
IOPL, CR0, an MSR, the time, the processor). From the outcomes alone follow:

- *trap*: it did its work in ring 0 and gave up control in rings 1 and 3; in which states decides whether it
  does so always or only when the monitor keeps IOPL or CR4.TSD as it should;
- *control*: somewhere, without a trap, it changed a resource;
- *mode-bound*: somewhere, without a trap, it did something else than in ring 0;
- *location-bound*: somewhere, without a trap, its result followed a resource.

The hard part is honesty about absence: an observation can show that an instruction is sensitive, never that
it is not. So the cases are chosen to provoke, and where the table and the CPU differ the difference is either
in `DEVIATIONS`, with a demonstration that the CPU really does that, or it is unexplained and an error.

Popek and Goldberg's definitions are for a machine with a relocation register; here the resource map is the
descriptor tables and hidden segment registers, the mode is CPL, and the processor state that only ring 0 may
set counts with them. CS, SS and CPL of the ring itself are the mode, not a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from vmm.isa.classification import TABLE
from vmm.isa.row import Row, Trap
from vmm.isa.words import EFlags
from vmm.machine import probe as lab
from vmm.machine.deviations import DEVIATIONS, Deviation
from vmm.machine.experiments import CASES, LOOSE, RINGS, TIGHT, VARIATIONS, Case, Setting
from vmm.machine.probe import End, Outcome, Probe

# From outcomes to classes

_MODE = ("CS", "SS", "CPL")  # the ring itself, as long as the instruction leaves it alone


def visible(outcome: Outcome) -> dict[str, object]:
    """All that the run did, in a form that can be compared between rings."""
    seen: dict[str, object] = dict(outcome.resources)
    for name in _MODE:
        if name not in outcome.changed:
            del seen[name]
    return seen | results(outcome) | {"flags": outcome.flags}


_HIDDEN = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
_OWNED = EFlags.IF | EFlags.IOPL


def results(outcome: Outcome) -> dict[str, object]:
    """What software gets to see of the run, without the resources that were only carried along."""
    return {
        "end": (outcome.end, outcome.vector, outcome.error_code),
        "registers": outcome.registers,
        "eip": outcome.eip,
        "flags": outcome.flags & ~_OWNED,
        "memory": outcome.memory,
        "ports": outcome.ports,
        "loaded": tuple(outcome.resources[name] for name in _HIDDEN if name in outcome.changed),
        "IDT": outcome.resources["IDTR"] if outcome.end is End.SOFTWARE_INTERRUPT else None,
    }


@dataclass(frozen=True, slots=True)
class Evidence:
    """Runs that show something: in each, a case under a setting in a ring, and what came of it."""

    what: str
    case: Case
    runs: tuple[tuple[Setting, int, Outcome], ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """What the CPU did with one row. Each list of evidence is in the order in which the states were tried."""

    row: Row
    present: bool  # ring 0 could do it
    trap: Trap
    control: tuple[Evidence, ...]
    mode_bound: tuple[Evidence, ...]
    location_bound: tuple[Evidence, ...]

    @property
    def user_sensitive(self) -> bool:
        """Control-sensitive or location-bound in ring 3, as a monitor keeps it (theorem 3)."""
        runs = (run for found in (*self.control, *self.location_bound) for run in found.runs)
        return any(ring == 3 and setting.name in _TIGHT for setting, ring, _ in runs)


_TIGHT = frozenset(setting.name for setting in (TIGHT, *VARIATIONS)) - {"IOPL"}


def _observed_trap(completed: bool, slipped: set[str]) -> Trap:
    """From whether ring 0 ever completed, and the settings in which ring 1 or 3 did not trap."""
    if not completed or slipped & _TIGHT:
        return Trap.NEVER
    if not slipped:
        return Trap.ALWAYS
    return Trap.TSD if slipped == {"TSD clear"} else Trap.IOPL


def observe(row: Row, probe: Probe, other_processor: Probe) -> Observation:
    """Run all cases of a row in all states and rings, and derive its classes."""
    completed = False
    slipped: set[str] = set()
    control: list[Evidence] = []
    mode_bound: list[Evidence] = []
    location_bound: list[Evidence] = []
    for case in CASES[row.name]:
        usual = _runs(probe, case, TIGHT)
        timed = _follows(case, "time", TIGHT, usual, _runs(probe, case, TIGHT))
        location_bound += timed
        for setting in (TIGHT, *VARIATIONS, *LOOSE):
            runs = _runs(probe, case, setting)
            completed |= not runs[0].trapped
            if not (runs[1].trapped and runs[3].trapped):
                slipped.add(setting.name)
            for ring, run in runs.items():
                if run.trapped:
                    continue
                if run.changed:
                    control.append(Evidence(", ".join(sorted(run.changed)), case, ((setting, ring, run),)))
                if ring and not timed and visible(run) != visible(runs[0]):
                    both = ((setting, 0, runs[0]), (setting, ring, run))
                    mode_bound.append(Evidence(f"ring {ring}", case, both))
            if setting in VARIATIONS and not timed:
                location_bound += _follows(case, setting.name, setting, usual, runs)
        if not timed:
            elsewhere = _runs(other_processor, case, TIGHT)
            location_bound += _follows(case, "processor", TIGHT, usual, elsewhere)
    trap = _observed_trap(completed, slipped)
    return Observation(row, completed, trap, tuple(control), tuple(mode_bound), tuple(location_bound))


def _runs(probe: Probe, case: Case, setting: Setting) -> dict[int, Outcome]:
    return {ring: probe.run(case.code, ring, case.state(setting)) for ring in RINGS}


def _follows(
    case: Case, what: str, setting: Setting, usual: dict[int, Outcome], runs: dict[int, Outcome]
) -> list[Evidence]:
    """Evidence that results follow a resource: rings in which they differ with nothing else changed."""
    return [
        Evidence(what, case, ((TIGHT, ring, usual[ring]), (setting, ring, run)))
        for ring, run in runs.items()
        if not run.trapped and not usual[ring].trapped and results(run) != results(usual[ring])
    ]


# The verdict


@dataclass(frozen=True, slots=True)
class Verdict:
    """One row after comparison: the classes that stand, what differs, and what explains it.

    `standing` is the row as the CPU has it, with the table's word where a deviation explains a difference.
    """

    observation: Observation
    present: bool
    standing: Row
    user_sensitive: bool
    explained: tuple[str, ...]
    unexplained: tuple[str, ...]

    @property
    def row(self) -> Row:
        return self.observation.row

    def as_json(self) -> dict[str, object]:
        seen, row = self.observation, self.standing
        return {
            "name": row.name,
            "entry": row.summary,
            "forms": row.forms,
            "present": self.present,
            "privileged": self.present and row.privileged,
            "sensitive": self.present and row.sensitive,
            "critical": self.present and row.critical,
            "traps": str(row.trap),
            "control": sorted({found.what for found in seen.control}),
            "mode_bound": sorted({found.what for found in seen.mode_bound}),
            "location_bound": sorted({found.what for found in seen.location_bound}),
            "user_sensitive": self.user_sensitive,
            "reason": row.reason,
            "source": row.source,
            "explained": list(self.explained),
            "unexplained": list(self.unexplained),
        }


def _compare(seen: Observation, deviations: tuple[Deviation, ...]) -> Verdict:
    row = seen.row
    about = [deviation for deviation in deviations if row.name in deviation.rows]
    excused = frozenset[str]().union(*(deviation.aspects for deviation in about))
    present = seen.present and not (row.needs and "present" in excused)
    unexplained = []
    standing = row
    if not present:
        if not row.needs and "present" not in excused:
            unexplained.append(f"{row.name}: it raises an exception in every ring, against the table")
    elif row.needs and not row.sensitive:
        unexplained.append(f"{row.name}: it runs on this CPU, against the table")
    else:
        standing = replace(
            row,
            trap=row.trap if "trap" in excused else seen.trap,
            control=row.control if "control" in excused else bool(seen.control),
            mode_bound=row.mode_bound if "mode_bound" in excused else bool(seen.mode_bound),
            location_bound=row.location_bound if "location_bound" in excused else bool(seen.location_bound),
        )
        for aspect in ("trap", "control", "mode_bound", "location_bound"):
            found, said = getattr(standing, aspect), getattr(row, aspect)
            if found != said:
                unexplained.append(
                    f"{row.name}: {aspect.replace('_', '-')} is {found} here, {said} in the table"
                )
    user = present and (seen.user_sensitive or ("control" in excused and row.critical))
    return Verdict(seen, present, standing, user, tuple(d.sentence for d in about), tuple(unexplained))


@dataclass(frozen=True, slots=True)
class Theorem:
    """The verdict on one of Popek and Goldberg's conditions."""

    name: str
    condition: str
    holds: bool
    counterexamples: tuple[str, ...]
    verdict: str

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "condition": self.condition,
            "holds": self.holds,
            "counterexamples": list(self.counterexamples),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Census:
    """The classes of this CPU's instructions, as observed. Names are `Row.summary`, each once, sorted."""

    verdicts: tuple[Verdict, ...]
    stale: tuple[str, ...]  # deviations that the CPU did not show
    deviations: tuple[Deviation, ...]

    def _names(self, wanted: Callable[[Row], bool]) -> tuple[str, ...]:
        rows = (verdict.standing for verdict in self.verdicts if verdict.present)
        return tuple(sorted({row.summary for row in rows if wanted(row)}))

    @cached_property
    def privileged(self) -> tuple[str, ...]:
        return self._names(lambda row: row.privileged)

    @cached_property
    def sensitive(self) -> tuple[str, ...]:
        return self._names(lambda row: row.sensitive)

    @cached_property
    def critical(self) -> tuple[str, ...]:
        """Sensitive and not privileged: what breaks a monitor that waits for traps."""
        return self._names(lambda row: row.critical)

    @cached_property
    def user_sensitive(self) -> tuple[str, ...]:
        """Control-sensitive or location-bound in ring 3, and not privileged."""
        names = {v.row.name for v in self.verdicts if v.user_sensitive}
        return self._names(lambda row: row.critical and row.name in names)

    @property
    def absent(self) -> tuple[str, ...]:
        """Rows that raise an exception in every ring, for want of the feature."""
        return tuple(sorted(v.row.summary for v in self.verdicts if not v.present))

    @property
    def unexplained(self) -> tuple[str, ...]:
        """Where table and CPU differ without an explanation: must be empty."""
        return (*(text for verdict in self.verdicts for text in verdict.unexplained), *self.stale)

    @property
    def theorem1(self) -> Theorem:
        holds = not self.critical
        verdict = (
            "It holds: a monitor that only waits for traps can be built."
            if holds
            else f"It fails for {len(self.critical)} instructions. It is sufficient, not necessary: what"
            " fails is the proof that trap-and-emulate is enough."
        )
        return Theorem(
            "Popek and Goldberg, theorem 1",
            "sensitive is a subset of privileged",
            holds,
            self.critical,
            verdict,
        )

    @property
    def theorem3(self) -> Theorem:
        holds = not self.user_sensitive
        verdict = (
            "It holds: a monitor that interprets the kernel and runs user code directly can be built."
            if holds
            else f"It fails for {len(self.user_sensitive)} instructions, which reach in ring 3 what the"
            " monitor owns: user code would see it even with the kernel interpreted."
        )
        return Theorem(
            "Popek and Goldberg, theorem 3",
            "user-sensitive is a subset of privileged",
            holds,
            self.user_sensitive,
            verdict,
        )

    def as_json(self) -> dict[str, object]:
        return {
            "privileged": list(self.privileged),
            "sensitive": list(self.sensitive),
            "critical": list(self.critical),
            "user_sensitive": list(self.user_sensitive),
            "absent": list(self.absent),
            "unexplained": list(self.unexplained),
            "explained": [{"rows": list(d.rows), "sentence": d.sentence} for d in self.deviations],
            "theorems": [self.theorem1.as_json(), self.theorem3.as_json()],
            "rows": [verdict.as_json() for verdict in self.verdicts],
        }


def census(rows: tuple[Row, ...] = TABLE) -> Census:
    """Run the whole census, about two seconds. Another table than the standing one serves its own test."""
    probe, other = Probe(), Probe(lab.OTHER_MODEL)
    shown = tuple(deviation for deviation in DEVIATIONS if deviation.shows(probe))
    stale = tuple(f"no longer so: {d.sentence}" for d in DEVIATIONS if d not in shown)
    verdicts = tuple(_compare(observe(row, probe, other), shown) for row in rows)
    return Census(verdicts, stale, shown)
