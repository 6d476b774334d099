"""Which instruction each exit came from: a table of exits for each place in the guest, kept only when asked for.

The machine's own table says why the CPU was left, not where. Here every way in which the CPU can leave its code is
noted with the guest's EIP, and what the machine then adds to its table is added to that place's as well. A machine
that nobody watches so is not changed and pays nothing.

The hard part is what EIP means: after INT n and HLT it is past the instruction, in a translation it is the monitor's.
And some exits have no place: an external interrupt comes between two instructions, and a translator that catches a
return which it has not foreseen does not know which one it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vmm.events import ExitRow, ExitTable
from vmm.image.image import Image, Segment, SourceLine
from vmm.isa.classify import Classified, classify
from vmm.isa.decode import MAX_LENGTH
from vmm.isa.modes import INTERCEPTED, Act, acts_of, acts_upon
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.engine import Stop
from vmm.machine.machine import Machine
from vmm.machine.paging import PageFault
from vmm.monitor.paravirt.abi.hypercalls import HYPERCALL_VECTOR
from vmm.naming import Names

PLACELESS = frozenset(("external interrupt", "event upcall", "NMI", "return missed"))
_INT, _ONE_BYTE = 0xCD, (b"\xcc", b"\xce", b"\xf4")  # INT n; INT3, INTO, HLT
_CALL_SIZE = 5  # bytes of CALL rel32
_STUB = bytes((_INT, HYPERCALL_VECTOR, 0xC3))  # in the hypercall page, which a kernel calls
_PAST = (Stop.HALT, Stop.REQUESTED)  # a HLT is over


@dataclass
class Site:
    """A place in the guest: `eip` and ring as the CPU has them, the code that stood there when it first exited.

    `linear` is EIP by CS; `physical` where that lay in memory, or None where it could not be told.
    """

    eip: int
    ring: int
    linear: int
    physical: int | None
    code: bytes
    exits: ExitTable = field(default_factory=ExitTable)


class Attribution:
    """The exits of a machine by site, from when this is made; `elsewhere` has those of no instruction."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._sites: dict[tuple[int, int, bool], Site] = {}
        self._here: Site | None = None
        self.elsewhere = ExitTable()
        for name in dir(type(machine)):
            if name.startswith("on_") and name not in ("on_translated", "on_site"):
                setattr(machine, name, self._noting(getattr(machine, name)))
        machine.on_in, machine.on_out = self._noting(machine.on_in), self._noting(machine.on_out)
        run = machine.engine.run

        def watched() -> Any:
            stop = run()
            self._note(stop in _PAST)
            return stop

        machine.engine.run = watched  # type: ignore[method-assign]
        machine.exits = _Shared(self)
        machine.engine.counter.close()  # what is answered without us has no place

    @property
    def sites(self) -> list[Site]:
        """Every place that exited; the same EIP in two rings is two."""
        return list(self._sites.values())

    def add(self, reason: str, nanoseconds: int) -> None:
        """An exit that the machine has counted."""
        table = self.elsewhere if reason in PLACELESS or self._here is None else self._here.exits
        table.add(reason, nanoseconds)

    def _noting(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        def note(*arguments: Any) -> Any:
            self._note(len(arguments) == 2 and arguments[1] is True)
            return callback(*arguments)

        return note

    def _note(self, past: bool) -> None:
        machine = self._machine
        eip, ring = machine.control.where(), machine.state.cpl
        if past and (caller := self._caller(eip)) is not None:
            eip, past = caller, False
        key = eip, ring, past
        site = self._sites.get(key)
        if site is None:
            site = self._sites[key] = self._look(eip, ring, past)
        self._here = site

    def _caller(self, eip: int) -> int | None:
        """The CALL of a kernel that has called into the hypercall page, EIP being past the stub's INT."""
        machine, state = self._machine, self._machine.state
        linear = eip + state.segment_base(at.CS) - 2 & 0xFFFFFFFF
        if machine.linear.code(linear, len(_STUB)) != _STUB:
            return None
        try:
            returns = machine.linear.read(state.esp + state.segment_base(at.SS) & 0xFFFFFFFF, 4, mark=False)
            return returns - _CALL_SIZE & 0xFFFFFFFF
        except PageFault:
            return None

    def _look(self, eip: int, ring: int, past: bool) -> Site:
        machine = self._machine
        base = machine.state.segment_base(at.CS)
        linear = eip + base & 0xFFFFFFFF
        if past:
            linear = self._before(linear)
            eip = linear - base & 0xFFFFFFFF
        try:
            frame = machine.linear.translate(linear, write=False, user=False, mark=False).frame
            physical = frame | linear & 0xFFF
        except PageFault:
            physical = None
        return Site(eip, ring, linear, physical, machine.linear.code(linear, MAX_LENGTH))

    def _before(self, linear: int) -> int:
        """Where the instruction lies that EIP has passed."""
        code = self._machine.linear.code(linear - 2 & 0xFFFFFFFF, 2)
        if code[:1] == bytes((_INT,)):
            return linear - 2 & 0xFFFFFFFF
        return linear - 1 & 0xFFFFFFFF if code[1:] in _ONE_BYTE else linear


class _Shared(ExitTable):
    """The machine's table of exits, which passes on what is added."""

    def __init__(self, attribution: Attribution) -> None:
        machine = attribution._machine
        super().__init__(machine.exits.rows)
        self._attribution = attribution

    def add(self, reason: str, nanoseconds: int, count: int = 1) -> None:
        ExitTable.add(self, reason, nanoseconds, count)
        self._attribution.add(reason, nanoseconds)


def total(table: ExitTable) -> ExitRow:
    """All rows of a table as one."""
    rows = table.rows.values()
    return ExitRow(sum(row.count for row in rows), sum(row.nanoseconds for row in rows))


# From places to lines


@dataclass
class Costly:
    """A source line, or an instruction that no line is known for, with the exits it took.

    `symbol` is the nearest one at or below it, "" for none; `acts` are what each mode does about it, by mode.
    """

    source: SourceLine | None
    eip: int
    symbol: str
    classified: Classified
    exits: ExitTable = field(default_factory=ExitTable)

    def acts(self, mode: str) -> dict[str, Act]:
        """What each mode does here, seen from a run in `mode`: by the instruction, or by the costliest exit."""
        acts = acts_of(self.classified.row)
        reason = max(self.exits.rows, key=lambda reason: self.exits.rows[reason].nanoseconds)
        own = acts[mode].exit if mode in acts else ""
        if own and reason.startswith(own):
            return acts
        upon = acts_upon(reason)
        if upon is None and reason.startswith(INTERCEPTED.exit):
            return acts | {mode: INTERCEPTED}
        return upon or acts


def costliest(sites: Iterable[Site], image: Image, count: int, names: Names | None = None) -> list[Costly]:
    """The lines that took the most time in exits, `count` at most; `names`, if not the image's own, for addresses."""
    names = names or Names(image)
    found: dict[object, Costly] = {}
    for site in sites:
        if not site.exits.rows:
            continue
        source = _line_of(site, image)
        key = (source.file, source.line) if source else site.eip
        if key not in found:
            found[key] = Costly(source, site.eip, names.name(site.linear), classify(site.code, site.eip))
        for reason, row in site.exits.rows.items():
            mine = found[key].exits.rows.setdefault(reason, ExitRow())
            mine.count += row.count
            mine.nanoseconds += row.nanoseconds
    order = sorted(found.values(), key=lambda line: total(line.exits).nanoseconds, reverse=True)
    return order[:count]


def _line_of(site: Site, image: Image) -> SourceLine | None:
    """Where the code at a site was written: by its address, or, where a kernel has copied it, by its bytes."""
    for address in (site.linear, site.physical):
        if address is not None and _holds(image, address, site.code):
            return _line_at(image, address)
    if len(site.code) < MAX_LENGTH:
        return None
    lines = [_line_at(image, address) for address in _places(image, site.code)]
    same = {(line.file, line.line) if line else None for line in lines}
    return lines[0] if len(same) == 1 else None  # a macro's code is in several places, and one line


def _line_at(image: Image, address: int) -> SourceLine | None:
    return next((line for line in image.lines if 0 <= address - line.address < line.size), None)


def _holds(image: Image, address: int, code: bytes) -> bool:
    return any(s.data.startswith(code, address - s.address) for s in image.segments if address in _of(s))


def _of(segment: Segment) -> range:
    return range(segment.address, segment.address + len(segment.data))


def _places(image: Image, code: bytes) -> Iterator[int]:
    """Addresses of these bytes in an image."""
    for segment in image.segments:
        at = segment.data.find(code)
        while at >= 0:
            yield segment.address + at
            at = segment.data.find(code, at + 1)
