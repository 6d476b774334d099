"""Witnesses: for each critical instruction the smallest state in which one sees why it is critical.

The census collects evidence; a witness is the plainest piece of it, run again in every ring, with only those
parts of the state that tell. The hard part is "plainest": a mode-bound instruction is shown by one state in
which the rings part ways; a location-bound one by two values of a resource that its result follows; a
control-sensitive one by a resource that it changes outside ring 0 without a trap. Among the evidence of the
first of these kinds that there is, the piece that differs in the fewest places wins.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import lru_cache

from vmm.census import Evidence, Observation, observe
from vmm.errors import UsageError
from vmm.isa.classification import TABLE
from vmm.isa.classify import rows_named
from vmm.isa.decode import decode
from vmm.isa.row import Row
from vmm.isa.vectors import ERROR_CODE_VECTORS
from vmm.isa.vectors import name as vector_name
from vmm.isa.words import EFlags
from vmm.machine import probe as lab
from vmm.machine.deviations import DEVIATIONS
from vmm.machine.experiments import CASES, RINGS, TIGHT, VARIATIONS, Case
from vmm.machine.probe import End, Outcome, Probe

_GENERAL = ("EAX", "ECX", "EDX", "EBX", "ESP", "EBP", "ESI", "EDI")
_SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
_MODE = ("CS", "SS", "CPL")
_FLAGS = {name: mask for name, mask in EFlags.FIELDS.items() if name not in ("ONE", "IF", "IOPL", "AC")}


def _flatten(
    registers: tuple[int, ...], eflags: int, resources: dict[str, tuple[int, ...]]
) -> dict[str, str]:
    seen = {name: f"{value:#x}" for name, value in zip(_GENERAL, registers, strict=True)}
    seen |= {name: str(int(bool(eflags & mask))) for name, mask in _FLAGS.items()}
    for name, value in resources.items():
        if name in _SEGMENTS:
            selector, base, limit, attributes = value
            seen[name] = f"{selector:#x}"
            seen[f"{name} descriptor"] = (
                f"base {base:#x} limit {limit:#x} attributes {attributes >> 8 & 0xF0FF:#x}"
            )
        elif name in ("IF", "AC"):
            seen[name] = str(int(bool(value[0])))
        elif name == "IOPL":
            seen[name] = str(EFlags(value[0]).iopl)
        elif name in ("GDTR", "IDTR"):
            seen[name] = f"base {value[0]:#x} limit {value[1]:#x}"
        elif name != "MSRs":
            seen[name] = f"{value[0]:#x}"
    return seen


def _before(run: Outcome) -> dict[str, str]:
    seen = _flatten(run.registers_before, run.flags_before, run.resources_before)
    return seen | {f"[{at:#x}]": _number(before) for at, before, _ in run.memory}


def _after(run: Outcome) -> dict[str, str]:
    seen = _flatten(run.registers, run.flags, run.resources)
    return seen | {f"[{at:#x}]": _number(after) for at, _, after in run.memory}


def _number(data: bytes) -> str:
    return " ".join(f"{int.from_bytes(data[at : at + 4], 'little'):#x}" for at in range(0, len(data), 4))


def _ending(run: Outcome) -> str:
    if run.vector is None:
        return {End.DONE: "no trap", End.HALT: "halts"}.get(run.end, str(run.end))
    if run.end is End.SOFTWARE_INTERRUPT:
        base, _ = run.resources["IDTR"]
        return f"goes through gate {run.vector:#x} of the IDT at {base:#x}"
    code = f"({run.error_code:#x})" if run.vector in ERROR_CODE_VECTORS else ""
    return f"traps: {vector_name(run.vector)}{code}"


@dataclass(frozen=True, slots=True)
class Run:
    """One ring's part of a witness: `before` and `after` hold the telling parts of the state, as text."""

    ring: int
    setting: str  # the resource's value where two are compared, or empty
    trapped: bool
    ending: str
    before: dict[str, str]
    after: dict[str, str]

    def as_json(self) -> dict[str, object]:
        return {
            "ring": self.ring,
            "setting": self.setting,
            "trapped": self.trapped,
            "ending": self.ending,
            "before": self.before,
            "after": self.after,
        }

    def as_text(self) -> str:
        """`ring 1   IF 1 -> 1   no trap`."""
        changes = [
            f"{name} {self.before.get(name, '-')} -> {self.after.get(name, '-')}"
            for name in {**self.before, **self.after}
        ]
        where = f"ring {self.ring}" + (f", {self.setting}" if self.setting else "")
        return "   ".join([where, *([] if self.trapped else changes), self.ending])


@dataclass(frozen=True, slots=True)
class Witness:
    """Why one row is critical, shown. `kind` is "mode-bound", "location-bound" or "control-sensitive"."""

    row: Row
    kind: str
    code: bytes
    premise: dict[str, str]  # what the instruction works on: registers and memory
    runs: tuple[Run, ...]
    conclusion: str

    @property
    def text(self) -> str:
        """The instruction as it was run."""
        instruction = decode(self.code, lab.CODE)
        return instruction.text if instruction else self.code.hex()

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.row.name,
            "entry": self.row.summary,
            "kind": self.kind,
            "instruction": self.text,
            "bytes": self.code.hex(),
            "premise": self.premise,
            "runs": [run.as_json() for run in self.runs],
            "conclusion": self.conclusion,
            "reason": self.row.reason,
            "effect": self.row.effect,
            "source": self.row.source,
        }

    def as_text(self) -> str:
        """Some lines for a terminal, without a final newline."""
        premise = ", ".join(f"{name} = {value}" for name, value in self.premise.items())
        prose = (self.conclusion, f"{self.row.reason} {self.row.effect} ({self.row.source})")
        lines = [
            f"{self.row.name}: critical, {self.kind}",
            f"  {self.text}" + (f"    with {premise}" if premise else ""),
            *(f"    {run.as_text()}" for run in self.runs),
            *(textwrap.fill(part, 100, initial_indent="  ", subsequent_indent="  ") for part in prose),
        ]
        return "\n".join(lines)


def _telling(runs: list[Outcome], *, carried: bool) -> list[str]:
    """The names of the parts of the state in which the outcomes differ.

    The ring's own CS and SS do not count, nor, unless `carried`, do resources that a run left alone.
    """
    views = []
    for run in runs:
        view = _after(run)
        for name in _MODE if carried else run.resources:
            if name not in run.changed:
                view.pop(name, None)
                view.pop(f"{name} descriptor", None)
        views.append(view)
    names = dict.fromkeys(name for view in views for name in view)
    return [name for name in names if len({view.get(name) for view in views}) > 1]


def _weight(found: Evidence, *, carried: bool = False) -> tuple[int, ...]:
    """Smaller is plainer: no trap in it, an effect, few differences, the usual state, a short premise."""
    outcomes = [run for _, _, run in found.runs]
    trapped = sum(run.trapped for run in outcomes)
    idle = int(trapped and not outcomes[-1].changed)
    settings = (TIGHT, *VARIATIONS)
    order = max(settings.index(s) if s in settings else len(settings) for s, _, _ in found.runs)
    size = sum(len(data) for _, data in found.case.memory) + len(found.case.registers)
    return (trapped, idle, len(_telling(outcomes, carried=carried)), order, size, len(found.case.code))


def _show(run: Outcome, setting: str, names: list[str]) -> Run:
    before, after = _before(run), _after(run)
    return Run(
        run.ring,
        setting,
        run.trapped,
        _ending(run),
        {name: before[name] for name in names if name in before},
        {name: after[name] for name in names if name in after},
    )


def _premise(case: Case) -> dict[str, str]:
    premise = {_GENERAL[number]: f"{value:#x}" for number, value in case.registers}
    for address, data in case.memory:
        where = "[ESP]" if address == lab.STACK else f"[{address:#x}]"
        premise[where] = _number(data)
    return premise


def _mode_bound(row: Row, seen: Observation, probe: Probe) -> Witness:
    found = min(seen.mode_bound, key=lambda one: _weight(one, carried=True))
    setting, ring, outer = found.runs[1]
    inner = found.runs[0][2]
    names = _telling([inner, outer], carried=True)
    if inner.trapped:
        names = sorted(outer.changed & set(_after(outer)))
    runs = [probe.run(found.case.code, ring, found.case.state(setting)) for ring in RINGS]
    shown = tuple(_show(run, "", names) for run in runs)
    conclusion = (
        f"The same state, another ring: ring {ring} does something else than ring 0 and does not trap."
    )
    return Witness(row, "mode-bound", found.case.code, _premise(found.case), shown, conclusion)


# How to call the two values of what was varied, where the registers do not show it.
_VALUES = {
    "shadow descriptors": ("the guest's descriptors", "the monitor's shadow descriptors"),
    "XCR0": ("XCR0 0x3", "XCR0 0x1"),
    "time": ("once", "again"),
    "processor": ("one processor", "another processor"),
}


def _location_bound(row: Row, seen: Observation, probe: Probe) -> Witness:
    outside = [found for found in seen.location_bound if found.runs[0][1]]
    found = min(outside or seen.location_bound, key=_weight)
    names = _telling([run for _, _, run in found.runs], carried=False)
    shown = []
    for ring in RINGS if found.what not in ("time", "processor") else ():
        for number, (setting, _, _) in enumerate(found.runs):
            run = probe.run(found.case.code, ring, found.case.state(setting))
            value = _VALUES.get(found.what, (f"{found.what} {_before(run).get(found.what)}",) * 2)[number]
            shown.append(_show(run, value, names))
    if not shown:
        shown = [_show(run, _VALUES[found.what][i], names) for i, (_, _, run) in enumerate(found.runs)]
    what = {"shadow descriptors": "descriptor table"}.get(found.what, found.what)
    conclusion = f"Only the {what} differs: the result follows the real one, the monitor's, without a trap."
    return Witness(row, "location-bound", found.case.code, _premise(found.case), tuple(shown), conclusion)


def _control(row: Row, seen: Observation, probe: Probe) -> Witness:
    found = min(seen.control, key=lambda one: (not one.runs[0][1], len(one.what), _weight(one)))
    setting, _, witness_run = found.runs[0]
    names = sorted(witness_run.changed & set(_after(witness_run)))
    runs = [probe.run(found.case.code, ring, found.case.state(setting)) for ring in RINGS]
    shown = tuple(_show(run, "", names) for run in runs)
    conclusion = f"Outside ring 0 it changes what the monitor owns ({found.what}), and it does not trap."
    return Witness(row, "control-sensitive", found.case.code, _premise(found.case), shown, conclusion)


def _deviating(row: Row, probe: Probe, sentence: str) -> Witness:
    case = CASES[row.name][0]
    runs = [probe.run(case.code, ring, case.state(TIGHT)) for ring in RINGS]
    shown = tuple(_show(run, "", []) for run in runs)
    conclusion = f"It does not trap outside ring 0. {sentence}"
    return Witness(row, "control-sensitive", case.code, _premise(case), shown, conclusion)


@lru_cache(maxsize=1)
def _probes() -> tuple[Probe, Probe]:
    return Probe(), Probe(lab.OTHER_MODEL)


def _witness(row: Row) -> Witness:
    probe, other = _probes()
    about = [deviation for deviation in DEVIATIONS if row.name in deviation.rows]
    if any("present" in deviation.aspects for deviation in about):
        raise UsageError(f"{row.name}: no witness on this CPU: {about[0].sentence}")
    seen = observe(row, probe, other)
    if seen.mode_bound:
        return _mode_bound(row, seen, probe)
    if seen.location_bound:
        return _location_bound(row, seen, probe)
    if seen.control:
        return _control(row, seen, probe)
    return _deviating(row, probe, about[0].sentence if about else "")


def witnesses(name: str) -> tuple[Witness, ...]:
    """A witness for each critical row that `name` means (see `rows_named`): one for "popf", more for "mov".

    Raises `UsageError` for a name that means no critical row, or one that this CPU does not have.
    """
    rows = rows_named(name)
    critical = [row for row in rows if row.critical]
    if not critical:
        known = ", ".join(sorted({row.summary.lower() for row in TABLE if row.critical}))
        what = "it is not critical, so there is nothing to witness" if rows else "no row has that name"
        raise UsageError(f"{name}: {what}; the critical ones are {known}")
    return tuple(_witness(row) for row in critical)


def witness(name: str) -> Witness:
    """The first of `witnesses`."""
    return witnesses(name)[0]
