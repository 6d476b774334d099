"""Deliveries that have been made before end as they would have by the long way, whatever has changed meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.machines import (
    DATA16,
    GDT,
    GDT_ENTRIES,
    IDT,
    INNER_STACKS,
    KERNEL_CODE,
    KERNEL_DATA,
    PAGES,
    STACK,
    TSS,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    Lab,
    enable_paging,
    gate,
    lab,
)
from vmm.errors import GuestError
from vmm.isa.words import CR0, EFlags
from vmm.machine import delivery
from vmm.machine.bare import Bare
from vmm.machine.cpu import layout as at
from vmm.machine.delivery import Kind, TripleFault

VECTORS = (0, 3, 13, 14, 0x40)
USER_GATE = 0x40
_TABLE = PAGES + 0x1000
IDT_PTE = _TABLE + 4 * (IDT >> 12)

Deliver = Callable[[int, int, Kind], object]


@dataclass
class Twin:
    """A bare machine, and how it delivers."""

    lab: Lab
    deliver: Deliver
    start: tuple[bytes, bytes] = field(default=(b"", b""))

    def reset(self, paging: bool) -> None:
        machine, state = self.lab.machine, self.lab.machine.state
        if not self.start[0]:
            self.start = state.save(), self.lab.memory
        state.restore(self.start[0])
        machine.memory.load(0, self.start[1])
        if paging:
            state.cr3, state.cr0 = PAGES, state.cr0 | CR0.PG | CR0.WP
        machine.engine.flush_tlb()

    def event(self, vector: int, error_code: int, kind: Kind) -> str:
        try:
            self.deliver(vector, error_code, kind)
        except (TripleFault, GuestError) as error:
            return str(error)
        return ""

    def look(self) -> tuple[bytes, object]:
        return self.lab.machine.state.save(), self.lab.everything()["memory"]


def board() -> Lab:
    made = lab("hlt", idt={USER_GATE: gate(0x6400, dpl=3)}, memory=enable_paging())
    assert isinstance(made.control, Bare)
    return made


@pytest.fixture(scope="module")
def twins() -> tuple[Twin, Twin]:
    """One that remembers, and one that does not."""
    quick, slow = board(), board()
    bare = slow.control
    assert isinstance(quick.control, Bare) and isinstance(bare, Bare)
    return Twin(quick, quick.control.deliver), Twin(
        slow, lambda vector, code, kind: delivery.deliver(bare.processor, vector, code, kind)
    )


def enter_ring(lab: Lab, user: bool) -> None:
    """Stand in ring 3 or in ring 0, on its stack."""
    state = lab.machine.state
    code, data = (USER_CODE, USER_DATA) if user else (KERNEL_CODE, KERNEL_DATA)
    state.load_descriptor(at.SS, data, GDT_ENTRIES[data & ~3])
    state.load_descriptor(at.CS, code, GDT_ENTRIES[code & ~3])
    state.esp = USER_STACK if user else STACK


# Words of memory that a delivery reads, or might.
PLACES = (
    *(IDT + 8 * vector + half for vector in (*VECTORS, 8, 10, 11, 12) for half in (0, 4)),
    *(GDT + (selector & ~7) + half for selector in (KERNEL_CODE, KERNEL_DATA, USER_CODE, DATA16) for half in (0, 4)),
    *(TSS + 4, TSS + 8, TSS + 12),
    *(PAGES, PAGES + 4, *(_TABLE + 4 * (place >> 12) for place in (GDT, IDT, TSS, STACK - 1, INNER_STACKS[0] - 1))),
)  # fmt: skip
ESP = st.sampled_from((STACK, USER_STACK, INNER_STACKS[0], 0x90008, 0x8C004, 3, 0, 0xFFFFFFFC, 0x91002))

events = st.tuples(
    st.just("event"),
    st.sampled_from(VECTORS),
    st.sampled_from((0, 0x1234)),
    st.sampled_from(Kind),
)
changes = st.one_of(
    st.tuples(st.just("bit"), st.sampled_from(PLACES), st.integers(0, 31)),
    st.tuples(st.just("esp"), ESP),
    st.tuples(st.just("esp0"), ESP),
    st.tuples(st.just("ring"), st.booleans()),
    st.tuples(st.just("flags"), st.sampled_from((0, EFlags.IF, EFlags.IF | EFlags.DF | EFlags.RF | 1, EFlags.NT))),
    st.tuples(st.just("limit"), st.sampled_from((at.GDT, at.IDT, at.TR)), st.sampled_from((0, 7, 0x67, 0x7FF))),
    st.tuples(st.just("base"), st.sampled_from((at.GDT, at.IDT, at.TR)), st.sampled_from((8, 0x1000))),
    st.tuples(st.just("cr0"), st.sampled_from((CR0.PG, CR0.WP))),
    st.tuples(st.just("cr3"), st.sampled_from((PAGES, PAGES + 0x10000, 0xFFFFF000))),
)  # fmt: skip


def apply(twin: Twin, step: tuple[object, ...]) -> str:
    match step:
        case ("event", int(vector), int(code), Kind() as kind):
            return twin.event(vector, code, kind)
        case ("bit", int(place), int(bit)):
            memory = twin.lab.machine.memory
            memory.write(place, 4, memory.read(place, 4) ^ 1 << bit)
        case ("esp", int(esp)):
            twin.lab.machine.state.esp = esp
        case ("esp0", int(esp)):
            twin.lab.machine.memory.write(TSS + 4, 4, esp)
        case ("ring", bool(user)):
            enter_ring(twin.lab, user)
        case ("flags", int(flags)):
            twin.lab.machine.state.eflags = flags
        case ("limit", int(table), int(limit)):
            state = twin.lab.machine.state
            state.set_table(table, state.table(table)[0], limit)
        case ("base", int(table), int(distance)):
            state = twin.lab.machine.state
            base, limit = state.table(table)
            state.set_table(table, base + distance, limit)
        case ("cr0", int(bit)):
            twin.lab.machine.state.cr0 ^= bit
        case ("cr3", int(root)):
            twin.lab.machine.state.cr3 = root
    return ""


def both(twins: tuple[Twin, Twin], paging: bool, steps: list[tuple[object, ...]]) -> None:
    for twin in twins:
        twin.reset(paging)
    for step in steps:
        said = [apply(twin, step) for twin in twins]
        assert said[0] == said[1]
        assert twins[0].look() == twins[1].look()
        if said[0]:
            return


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.booleans(),
    st.booleans(),
    st.tuples(st.sampled_from(VECTORS), st.sampled_from(Kind)),
    st.lists(st.tuples(changes, st.booleans()), max_size=5),
)
def test_whatever_changes_between_two_deliveries_is_noticed(
    twins: tuple[Twin, Twin],
    paging: bool,
    user: bool,
    event: tuple[int, Kind],
    steps: list[tuple[tuple[object, ...], bool]],
) -> None:
    """The same event again, with changes to all that decides: registers and memory are as by the long way."""
    again: list[tuple[object, ...]] = [("ring", user), ("event", event[0], 0x18, event[1])]
    sequence = [*again, *again]
    for change, stay in steps:
        sequence += [again[0], change, again[1]] if not stay else [change, again[1]]
    both(twins, paging, sequence)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), st.lists(st.one_of(events, events, changes), max_size=16))
def test_any_sequence_of_events_and_changes_is_the_same(
    twins: tuple[Twin, Twin], paging: bool, steps: list[tuple[object, ...]]
) -> None:
    """In any order, handlers interrupted by handlers."""
    both(twins, paging, steps)


@pytest.mark.parametrize(
    "change",
    [
        *(pytest.param(("esp0", esp), id=f"ESP0 {esp:#x}") for esp in (0, 3, 19, 20, 0x8C004, 0x8D010)),
        *(pytest.param(("esp", esp), id=f"ESP {esp:#x}") for esp in (0, 3, 11, 12, 0x90004)),
        *(pytest.param(("cr0", bit), id=f"CR0 bit {bit:#x}") for bit in (int(CR0.PG), int(CR0.WP))),
        *(pytest.param(("bit", IDT_PTE, bit), id=f"PTE of IDT, bit {bit}") for bit in (0, 5, 13)),
        *(pytest.param(("bit", PAGES, bit), id=f"PDE, bit {bit}") for bit in (0, 5, 14)),
    ],
)
@pytest.mark.parametrize("user", (False, True))
@pytest.mark.parametrize("paging", (False, True))
def test_what_may_change_by_itself(
    twins: tuple[Twin, Twin], change: tuple[object, ...], user: bool, paging: bool
) -> None:
    """Each by itself, after the way is known: stacks without room or across a page, paging, the walk to the gate."""
    again: list[tuple[object, ...]] = [("ring", user), ("event", USER_GATE, 0, Kind.SOFTWARE)]
    both(twins, paging, [*again, *again, *again, again[0], change, again[1]])


@pytest.mark.parametrize("user", (False, True))
@pytest.mark.parametrize("paging", (False, True))
def test_the_second_time_nothing_is_looked_up(monkeypatch: pytest.MonkeyPatch, paging: bool, user: bool) -> None:
    """Without a change the long way is gone once; with page tables, once more after it has marked them."""
    twin = Twin(made := board(), made.control.deliver)  # type: ignore[attr-defined]
    twin.reset(paging)
    for _ in range(2):
        enter_ring(made, user)
        twin.event(USER_GATE, 0, Kind.SOFTWARE)

    def never(*_: object) -> None:
        raise AssertionError("the long way")

    monkeypatch.setattr(delivery, "deliver", never)
    enter_ring(made, user)
    twin.event(USER_GATE, 0, Kind.SOFTWARE)
    assert made.vector == USER_GATE


def test_a_way_that_never_stays_is_given_up() -> None:
    """A guest that rewrites its gate before each event costs no more than it did: it is remembered no more."""
    twin = Twin(made := board(), made.control.deliver)  # type: ignore[attr-defined]
    twin.reset(False)
    for turn in range(40):
        enter_ring(made, False)
        made.machine.memory.write(IDT + 8 * USER_GATE, 4, KERNEL_CODE << 16 | 0x6400 + 16 * (turn & 1))
        twin.event(USER_GATE, 0, Kind.SOFTWARE)
        assert made.vector == USER_GATE + (turn & 1)

