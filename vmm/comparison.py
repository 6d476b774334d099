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

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat

from vmm.blame import Divergence, blame
from vmm.errors import Interrupted
from vmm.image.image import Image
from vmm.lockstep import Pair, Side, same
from vmm.machine.pc import Model
from vmm.measures import Changed, CodeMeter, MemoryMeter, changed_lines, image_bytes
from vmm.vm import MODES, Paravirt, Result, VirtualMachine

REFERENCE = "native"
DEFAULT_LIMIT = 100_000_000  # instructions that each run may take
FIRST_STEP, LARGEST_STEP = 1 << 12, 1 << 22  # instructions between two samples of the first pass
SAMPLES = 64  # of each later pass
WARM = 10_000  # instructions of the run before the one that is measured
TIMED = b"timing:"  # what a guest prints before what depends on the clock


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
    is offered to all of them, on a machine that is a `model`.
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
        model: Model = "isapc",
    ) -> None:
        assert image is not None or pv is not None
        self._images = {"same": image, "pv": pv}
        self._memory, self._input = memory, console_input
        self._limit, self._paravirt, self._model = max_instructions, paravirt, model
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
                    image,
                    mode,
                    memory=self._memory,
                    console_input=self._input,
                    paravirt=self._paravirt,
                    model=self._model,
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
        return blame(reference, other, low)

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
