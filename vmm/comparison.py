"""The same guest in several modes: did it go the same way, and if not, which instruction is to blame?

Runs by the instruction clock are repeatable to the last byte. So two modes can be run in lock-step and their
whole visible state compared: registers as the guest believes them, memory, console, the way they ended. The
instruction to blame is the first one after the *last* moment at which both were in the same state: from equal
states only the mode can make a difference, and whatever differed before that moment had healed.

The hard part is to find that moment without comparing after each of a hundred million instructions. The run
is sampled; the interval between the last equal sample and the next is run again from the start and sampled
more finely, until the interval is one instruction.

A mode that runs another build of the guest (`Mode.image`) executes other instructions at other addresses. Of it
only what a user sees is compared: the console, and the way it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat

from vmm.errors import Interrupted
from vmm.events import Event
from vmm.image.image import Image, SourceLine
from vmm.isa.classify import Classified, Kind, classify
from vmm.isa.decode import MAX_LENGTH
from vmm.isa.descriptors import RPL
from vmm.isa.row import Row
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.lockstep import Difference, Pair, Side, difference, same
from vmm.lockstep import field as flag
from vmm.machine.cpu import layout as at
from vmm.machine.machine import Machine
from vmm.machine.paging import PageFault
from vmm.measures import Changed, CodeMeter, MemoryMeter, changed_lines, image_bytes
from vmm.vm import MODES, Paravirt, Result, VirtualMachine

REFERENCE = "native"
DEFAULT_LIMIT = 100_000_000  # instructions that each run may take
FIRST_STEP, LARGEST_STEP = 1 << 12, 1 << 22  # instructions between two samples of the first pass
SAMPLES = 64  # of each later pass
SHOWN_PARTS = 4  # differences that the sentence names
WARM = 10_000  # instructions of the run before the one that is measured
CONTEXT = 3  # source lines before the one to blame
TIMED = b"timing:"  # what a guest prints before what depends on the clock
# What the translator, which leaves processes alone, cannot keep from them: theorem 3 asks that these trap there.
SEEN_BY_PROCESSES = frozenset(("SGDT", "LAR", "LSL", "VERR", "VERW"))
USER_RING = 3


@dataclass(frozen=True)
class Divergence:
    """The instruction with which a mode left the reference's way for good.

    `at` is the number of instructions retired before it. `should` says what it should have done and what it
    did; `explained` is False where neither the classification nor the mode's own limits give a reason: then it is a
    bug of ours.
    """

    instruction: str
    eip: int
    at: int
    source: SourceLine | None
    context: tuple[SourceLine, ...]  # the lines executed or standing just before it
    classified: Classified
    should: str
    difference: Difference
    explained: bool

    @property
    def row(self) -> Row | None:
        return self.classified.row

    def as_json(self) -> dict[str, object]:
        source = self.source
        return {
            "instruction": self.instruction,
            "eip": self.eip,
            "at": self.at,
            "source": {"file": source.file, "line": source.line, "text": source.text} if source else None,
            "class": str(self.classified.kind),
            "row": row_json(self.row) if self.row else None,
            "should": self.should,
            "difference": self.difference.as_json(),
            "explained": self.explained,
        }


def row_json(row: Row) -> dict[str, object]:
    """A row of the classification for JSON."""
    return {
        "name": row.name,
        "forms": row.forms,
        "privileged": row.privileged,
        "traps": str(row.trap),
        "control": row.control,
        "mode_bound": row.mode_bound,
        "location_bound": row.location_bound,
        "critical": row.critical,
        "reason": row.reason,
        "effect": row.effect,
        "source": row.source,
    }


def timeless(console: bytes) -> bytes:
    """A console without the lines that begin with `TIMED`."""
    return b"".join(line for line in console.splitlines(keepends=True) if not line.startswith(TIMED))


@dataclass(frozen=True)
class ModeRun:
    """One mode's run beside the reference's.

    `by_state`: every register and byte was compared. If not, it is the console and the end alone, without lines that
    begin with `TIMED`, because another build takes another time. `console_equal` is True, too, where there is no
    reference. `ratio` is the time's to the reference's; `code` and `memory` in bytes, as `measures` has them;
    `changed` only where the build is another than the reference's, and both have a source.
    """

    result: Result
    console_equal: bool
    divergence: Divergence | None
    by_state: bool
    ratio: float | None
    code: int
    memory: int | None
    image: int  # bytes of the guest as it was loaded
    changed: Changed | None = None

    def as_json(self) -> dict[str, object]:
        result, outcome, changed = self.result, self.result.outcome, self.changed
        return {
            "mode": result.mode,
            "image": MODES[result.mode].image,
            "knows": MODES[result.mode].knows,
            "compared": "state" if self.by_state else "console and outcome",
            "outcome": {"kind": outcome.kind, "status": outcome.status, "detail": outcome.detail},
            "console_equal": self.console_equal,
            "exits": {
                reason: {"count": row.count, "seconds": row.nanoseconds / 1e9}
                for reason, row in result.exits.rows.items()
            },
            "instructions": result.instructions,
            "seconds": result.seconds,
            "ratio": self.ratio,
            "code_bytes": self.code,
            "image_bytes": self.image,
            "lines_changed": None
            if changed is None
            else {"removed": changed.removed, "added": changed.added, "of": changed.of},
            "peak_memory": self.memory,
            "divergence": self.divergence.as_json() if self.divergence else None,
        }


@dataclass(frozen=True)
class Comparison:
    """The runs, in the order asked for; `reference` is the bare machine's, asked for or not.

    There is none of a guest that only a paravirtual interface can run. `absent` has the modes that cannot run the
    guest, and why.
    """

    guest: str
    reference: Result | None
    runs: tuple[ModeRun, ...]
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def explained(self) -> bool:
        """Whether the classification explains every divergence."""
        return all(run.divergence is None or run.divergence.explained for run in self.runs)

    def as_json(self) -> dict[str, object]:
        runs = [run.as_json() for run in self.runs]
        return {"guest": self.guest, "modes": runs, "absent": dict(self.absent)}


@dataclass(frozen=True)
class _Run:
    """A whole run, and what it took."""

    side: Side
    result: Result
    code: int
    memory: int | None


class Comparer:
    """Compares modes on one guest. Another thread may `stop` it: what runs then raises `Interrupted`.

    `image` is the build that the bare machine runs, `pv` the paravirtual one; one of them may be missing. `paravirt`
    is offered to all of them.
    """

    def __init__(
        self,
        image: Image | None,
        *,
        pv: Image | None = None,
        memory: int = 16 << 20,
        console_input: bytes = b"",
        max_instructions: int = DEFAULT_LIMIT,
        paravirt: Paravirt | None = None,
    ) -> None:
        assert image is not None or pv is not None
        self._images = {"same": image, "pv": pv}
        self._memory, self._input = memory, console_input
        self._limit, self._paravirt = max_instructions, paravirt
        self._current: tuple[VirtualMachine, ...] = ()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True
        for vm in self._current:
            vm.poke("interrupted")

    def compare(self, modes: Iterable[str]) -> Comparison:
        """Run the guest in each of `modes` (names of `vm.MODES`) and on the bare machine."""
        reference = self._whole(REFERENCE) if self._images["same"] is not None else None
        runs = [
            self._beside(reference, reference)
            if mode == REFERENCE and reference is not None
            else self._beside(self._whole(mode), reference)
            for mode in modes
        ]
        image = self._images["same"] or self._images["pv"]
        assert image is not None
        return Comparison(image.name, reference.result if reference else None, tuple(runs))

    def _beside(self, run: _Run, reference: _Run | None) -> ModeRun:
        result, by_state = run.result, MODES[run.result.mode].image == "same"
        divergence = changed = ratio = None
        equal = True
        image = run.side.vm.image
        if reference is not None:
            consoles = reference.result.console, result.console
            equal = consoles[0] == consoles[1] if by_state else timeless(consoles[0]) == timeless(consoles[1])
            ratio = result.seconds / reference.result.seconds
            if by_state and run is not reference and not same(reference.side, run.side):
                # One more than either: an ending fault retires nothing.
                end = max(reference.result.instructions, result.instructions) + 1
                divergence = self._search(result.mode, end)
            if not by_state and image.lines and reference.side.vm.image.lines:
                changed = changed_lines(reference.side.vm.image, image)
        size = image_bytes(image)
        return ModeRun(result, equal, divergence, by_state, ratio, run.code, run.memory, size, changed)

    def _make(self, *modes: str) -> list[Side]:
        """Machines at the guest's entry; the only ones that `stop` has to reach."""
        machines = []
        for mode in modes:
            image = self._images[MODES[mode].image]
            assert image is not None, f"{mode} cannot run this guest"
            machines.append(
                VirtualMachine(
                    image, mode, memory=self._memory, console_input=self._input, paravirt=self._paravirt
                )
            )
        self._current = tuple(machines)
        if self._stopped:
            raise Interrupted("interrupted")
        return [Side(vm) for vm in machines]

    def _whole(self, mode: str) -> _Run:
        self._make(mode)[0].vm.run(WARM)  # what is loaded when something is first done is not the guest's
        self._current = ()
        meter = MemoryMeter()
        (side,) = self._make(mode)
        code = CodeMeter(side.vm.machine)
        result = side.vm.run(self._limit)
        peak = meter.peak()
        side.note(result.outcome)
        return _Run(side, result, code.bytes(), peak)

    def _search(self, mode: str, end: int) -> Divergence:
        """The divergence of `mode`, whose state differs from the reference's after `end` instructions."""
        low, high = self._last_equal(mode, 0, end, _growing_steps())
        while high - low > 1:
            low, high = self._last_equal(mode, low, high, repeat(max(1, (high - low) // SAMPLES)))
        reference, other = self._pair(mode, low)
        return _blame(reference, other, mode, low)

    def _pair(self, mode: str, at: int) -> list[Side]:
        """The reference and `mode`, both run for `at` instructions."""
        sides = self._make(REFERENCE, mode)
        for side in sides:
            side.advance(at)
        return sides

    def _last_equal(self, mode: str, low: int, end: int, steps: Iterable[int]) -> Pair:
        """Sample both from `low`, where they are equal, to `end`: (last equal sample, the one after it)."""
        reference, other = self._pair(mode, low)
        position, after = low, 0
        for step in steps:
            position = min(position + step, end)
            reference.advance(position)
            other.advance(position)
            if same(reference, other):
                low, after = position, 0
            elif not after:
                after = position
            if position == end or reference.ended and other.ended:
                break
        assert after, "two runs of the same guest in the same mode went different ways"
        return low, after


def _growing_steps() -> Iterator[int]:
    step = FIRST_STEP
    while True:
        yield step
        step = min(2 * step, LARGEST_STEP)


# Blame


def _blame(reference: Side, other: Side, mode: str, low: int) -> Divergence:
    """Step both machines, in the same state after `low` instructions, once more; who made the difference?"""
    machine, image = reference.vm.machine, reference.vm.image
    before = reference.vm.control.registers()
    eip, address = before["eip"], machine.state.linear_eip
    classified = classify(machine.linear.code(address, MAX_LENGTH), address)
    events: list[Event] = []
    machine.run_state.listeners.append(events.append)
    for side in (reference, other):
        side.advance(low + 1)
    apart = difference(reference, other)
    handler = _handler(machine, events)
    if handler is not None and "eip" not in apart.registers:
        # Both went through the handler's first instruction. It is to blame unless it is harmless: then the
        # delivery is.
        first = classify(machine.linear.code(handler, MAX_LENGTH), handler)
        if first.kind is Kind.CRITICAL:
            eip, address, classified = handler, handler, first
    should = _should(apart, classified, before, other, mode)
    lines = image.lines
    number = next((i for i, line in enumerate(lines) if 0 <= address - line.address < line.size), None)
    source = None if number is None else lines[number]
    context = () if number is None else lines[max(0, number - CONTEXT) : number]
    refused = other.ended is not None and other.ended.kind == "error"
    explained = refused or _is_explained(mode, classified, before)
    return Divergence(classified.text, eip, low, source, context, classified, should, apart, explained)


def _is_explained(mode: str, classified: Classified, before: Mapping[str, int]) -> bool:
    """Whether theory says that this instruction may make a difference in this mode: in others none may."""
    if mode == "bt":
        return classified.name in SEEN_BY_PROCESSES and before["cs"] & RPL == USER_RING
    return mode == "trap" and classified.kind is Kind.CRITICAL


def _handler(machine: Machine, events: list[Event]) -> int | None:
    """Where the last exception or interrupt of these events was delivered to on the bare machine."""
    vectors = [
        int(event.data.get("vector", Vector.PF))
        for event in events
        if event.kind in ("interrupt", "page fault") or event.kind.startswith("exception")
    ]
    if not vectors:
        return None
    base, _ = machine.state.table(at.IDT)
    try:
        low, high = (
            machine.linear.read(base + 8 * vectors[-1] + i & 0xFFFFFFFF, 4, mark=False) for i in (0, 4)
        )
    except PageFault:
        return None
    return high & 0xFFFF0000 | low & 0xFFFF


def _should(
    apart: Difference, classified: Classified, before: Mapping[str, int], other: Side, mode: str
) -> str:
    """What should have happened and what did, in a sentence or a few."""
    parts = []
    if apart.endings:
        right, wrong = (ending or "goes on" for ending in apart.endings)
        detail = f" ({other.ended.detail})" if other.ended else ""
        parts.append(f"{REFERENCE}: {right}; {mode}: {wrong}{detail}")
    for name, pair in apart.flags.items():
        parts.append(_became(name, flag(before["eflags"], name), pair, str))
    for name, pair in apart.registers.items():
        if name != "eflags" and (name != "eip" or len(apart.registers) == 1):
            parts.append(_became(name.upper(), before[name], pair, hex))
    show = _flags_word if classified.name == "PUSHF" else hex
    for address, values in apart.words.items():
        right, wrong = map(show, values)
        parts.append(f"the word at {address:#x} should hold {right}; it holds {wrong}")
    if apart.console:
        parts.append("the console should show something else")
    return ". ".join(part[0].upper() + part[1:] for part in parts[:SHOWN_PARTS]) + "."


def _flags_word(value: int) -> str:
    return f"{value:#x} ({EFlags(value & ~EFlags.ONE)})"


def _became(name: str, was: int, pair: Pair, show: Callable[[int], str]) -> str:
    right, wrong = pair
    demand = "stayed" if right == was else "become"
    fact = "stayed" if wrong == was else "became"
    return f"{name} should have {demand} {show(right)}; it {fact} {show(wrong)}"
