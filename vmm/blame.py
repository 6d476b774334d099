"""The instruction with which two machines that were in the same state parted, and what the theory says about it.

The hard part is to name the culprit where the next instruction is none: an exception or interrupt is delivered, and
it is the handler's first instruction, or the delivery itself, that made the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vmm.events import Event
from vmm.image.image import SourceLine
from vmm.isa.classify import Classified, Kind, classify
from vmm.isa.decode import MAX_LENGTH
from vmm.isa.descriptors import RPL
from vmm.isa.row import Row
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.lockstep import Difference, Pair, Side, difference
from vmm.lockstep import field as flag
from vmm.machine.cpu import layout as at
from vmm.machine.machine import Machine
from vmm.machine.paging import PageFault
from vmm.naming import Names

SHOWN_PARTS = 4  # differences that the sentence names
CONTEXT = 3  # source lines before the one to blame
# What the translator, which leaves processes alone, cannot keep from them: theorem 3 asks that these trap there.
SEEN_BY_PROCESSES = frozenset(("SGDT", "LAR", "LSL", "VERR", "VERW"))
USER_RING = 3
HAS_THE_GUESTS_IDT = ("native", "hvm")  # modes in which the processor's own IDTR is the guest's


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
    symbol: str  # by which the guest itself, or its kernel, knows the place; "" for none
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
            "symbol": self.symbol,
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


def blame(reference: Side, other: Side, low: int) -> Divergence:
    """Step both machines, in the same state after `low` instructions, once more; who made the difference?"""
    machine, image = reference.vm.machine, reference.vm.image
    before = reference.vm.control.registers()
    eip = before["eip"]
    address = eip + machine.state.segment_base(at.CS) & 0xFFFFFFFF
    classified = classify(machine.linear.code(address, MAX_LENGTH), address)
    events: list[Event] = []
    machine.run_state.listeners.append(events.append)
    for side in (reference, other):
        side.advance(low + 1)
    apart = difference(reference, other)
    handler = _handler(machine, events) if reference.vm.mode.name in HAS_THE_GUESTS_IDT else None
    if handler is not None and "eip" not in apart.registers:
        # Both went through the handler's first instruction. It is to blame unless it is harmless: then the
        # delivery is.
        first = classify(machine.linear.code(handler, MAX_LENGTH), handler)
        if first.kind is Kind.CRITICAL:
            eip, address, classified = handler, handler, first
    lines = image.lines
    number = next((i for i, line in enumerate(lines) if 0 <= address - line.address < line.size), None)
    refused = other.ended is not None and other.ended.kind == "error"
    modes = (reference.vm.mode.name, other.vm.mode.name)
    return Divergence(
        classified.text,
        eip,
        low,
        None if number is None else lines[number],
        () if number is None else lines[max(0, number - CONTEXT) : number],
        Names(image, machine.memory.bytes).name(address),
        classified,
        _should(apart, classified, before, other, modes),
        apart,
        refused or any(_is_explained(mode, classified, before) for mode in modes),
    )


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
    apart: Difference, classified: Classified, before: Mapping[str, int], other: Side, modes: tuple[str, str]
) -> str:
    """What should have happened and what did, in a sentence or a few."""
    parts = []
    if apart.endings:
        right, wrong = (ending or "goes on" for ending in apart.endings)
        detail = f" ({other.ended.detail})" if other.ended else ""
        parts.append(f"{modes[0]}: {right}; {modes[1]}: {wrong}{detail}")
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
