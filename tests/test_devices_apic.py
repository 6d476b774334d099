"""The local APIC and the IO-APIC, against the manuals: priorities, ends, triggers, messages, the timer."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.machine.devices import apic, ioapic
from vmm.machine.devices.apic import LocalApic
from vmm.machine.devices.ioapic import IoApic
from vmm.machine.devices.timer import ApicTimer, TimerState

ON = apic.ENABLE | 0xFF


class Chips:
    """Both chips, and what is around them: the processor's pin, the time, the old controller."""

    def __init__(self) -> None:
        self.pin, self.time, self.moves = False, 0, list[int]()
        self.local = LocalApic(self._output, lambda: self.time, lambda: 0x77, self.moves.append)
        self.io = IoApic(self.local)
        self.put(apic.SVR, ON)

    def _output(self, level: bool) -> None:
        assert level != self.pin  # called when it changes
        self.pin = level

    def put(self, register: int, value: int) -> None:
        self.local.write(register, 4, value)

    def get(self, register: int) -> int:
        return self.local.read(register, 4)

    def redirect(self, pin: int, low: int, high: int = 0) -> None:
        for index, value in ((0x11 + 2 * pin, high), (0x10 + 2 * pin, low)):
            self.io.write(ioapic.SELECT, 4, index)
            self.io.write(ioapic.WINDOW, 4, value)

    def entry(self, pin: int) -> int:
        self.io.write(ioapic.SELECT, 4, 0x10 + 2 * pin)
        return self.io.read(ioapic.WINDOW, 4)

    def pass_time(self, ns: int) -> None:
        self.time += ns
        self.local.tick()


def vectors(bank: int, chips: Chips) -> set[int]:
    """The vectors whose bits are set in ISR, TMR or IRR."""
    return {32 * i + bit for i in range(8) for bit in range(32) if chips.get(bank + 16 * i) >> bit & 1}


# Registers


def test_at_power_on_it_is_off_and_everything_masked() -> None:
    """Table values after reset (SDM 3A, 10.4.7.1): no vector gets through, nor does the old controller."""
    local = LocalApic(lambda _level: None, lambda: 0, lambda: 0)
    values = {r: local.read(r, 4) for r in (apic.ID, apic.TPR, apic.LDR, apic.DFR, apic.SVR, apic.ESR)}
    assert values == {0x20: 0, 0x80: 0, 0xD0: 0, 0xE0: 0xFFFFFFFF, 0xF0: 0xFF, 0x280: 0}
    assert {local.read(entry, 4) for entry in local.state.lvt} == {apic.MASKED}
    local.request(0x40)
    local.set_extint(True)
    assert not local.state.pin and not local.state.irr


def test_switched_off_its_entries_stay_masked() -> None:
    """Clearing SVR's enable bit masks all entries, and none can be unmasked before it is set again (10.4.7.2)."""
    chips = Chips()
    chips.put(apic.LVT_TIMER, 0x40)
    chips.put(apic.SVR, 0xFF)
    chips.put(apic.LVT_ERROR, 0x50)
    assert chips.get(apic.LVT_TIMER) == apic.MASKED | 0x40 and chips.get(apic.LVT_ERROR) == apic.MASKED | 0x50


@pytest.mark.parametrize(
    ("register", "bits"),
    [
        (apic.ID, 0x0F00_0000),
        (apic.TPR, 0xFF),
        (apic.LDR, 0xFF00_0000),
        (apic.SVR, 0x3FF),
        (apic.LVT_TIMER, 0x300FF),
        (apic.LVT_COUNTER, 0x107FF),
        (apic.LVT_LINT0, 0x1A7FF),
        (apic.LVT_LINT1, 0x1A7FF),
        (apic.LVT_ERROR, 0x100FF),
        (apic.ICR_HIGH, 0xFF00_0000),
        (apic.DIVIDE, 0xB),
        (apic.VERSION_REGISTER, 0),
        (apic.PPR, 0),
        (apic.CURRENT_COUNT, 0),
    ],
)
def test_only_the_bits_that_exist_can_be_set(register: int, bits: int) -> None:
    """Reserved bits read as they did, whatever is written."""
    chips = Chips()
    before = chips.get(register)
    chips.put(register, 0xFFFF_FFFF & ~(apic.ENABLE if register != apic.SVR else 0))
    found = chips.get(register)
    assert (found ^ before) & ~bits == 0
    assert found & bits & ~apic.ENABLE == bits & ~apic.ENABLE


def test_a_register_that_is_not_there_is_an_error() -> None:
    """ESR shows what was noted before it was last written, bit 7 for an illegal address; LVT's entry interrupts."""
    chips = Chips()
    chips.put(apic.LVT_ERROR, 0x52)
    assert chips.get(0x40) == 0 and chips.get(apic.ESR) == 0
    assert chips.pin and chips.local.acknowledge() == 0x52
    chips.put(apic.ESR, 0)
    assert chips.get(apic.ESR) == apic.ILLEGAL_REGISTER
    chips.put(apic.ESR, 0)
    assert chips.get(apic.ESR) == 0
    chips.put(0x3F0, 1)
    chips.put(apic.ESR, 0)
    assert chips.get(apic.ESR) == apic.ILLEGAL_REGISTER


@pytest.mark.parametrize(("offset", "size"), [(0x80, 1), (0x80, 2), (0x82, 2), (0x84, 4), (0x8C, 4)])
def test_narrow_and_crooked_accesses_do_nothing(offset: int, size: int) -> None:
    """Only a word of 32 bits at a multiple of 16 is a register."""
    chips = Chips()
    chips.put(apic.TPR, 0x55)
    chips.local.write(offset, size, 0xAA)
    assert chips.local.read(offset, size) == 0 and chips.get(apic.TPR) == 0x55


# Priorities


def test_the_highest_vector_comes_first_and_only_a_higher_class_interrupts_it() -> None:
    """IRR to ISR at the acknowledge; what is of the same class waits for the end (10.8.3)."""
    chips = Chips()
    for vector in (0x41, 0x92, 0x95):
        chips.local.request(vector)
    assert vectors(apic.IRR, chips) == {0x41, 0x92, 0x95}
    assert chips.local.acknowledge() == 0x95 and not chips.pin
    assert vectors(apic.ISR, chips) == {0x95} and chips.get(apic.PPR) == 0x90
    chips.local.request(0xA0)
    assert chips.pin and chips.local.acknowledge() == 0xA0
    chips.put(apic.EOI, 0)
    assert not chips.pin
    chips.put(apic.EOI, 0)
    assert chips.pin and chips.local.acknowledge() == 0x92
    chips.local.eoi()
    assert chips.local.acknowledge() == 0x41


def test_the_task_priority_holds_back_its_class_and_all_below() -> None:
    """PPR is the higher of task and service; a vector that was let go meanwhile is spurious."""
    chips = Chips()
    chips.local.request(0x65)
    assert chips.pin
    chips.put(apic.TPR, 0x60)
    assert not chips.pin and chips.get(apic.PPR) == 0x60
    assert chips.local.acknowledge() == 0xFF and not chips.get(apic.ISR + 16 * 7)
    chips.put(apic.TPR, 0x5F)
    assert chips.pin and chips.local.acknowledge() == 0x65 and chips.get(apic.PPR) == 0x60
    chips.put(apic.TPR, 0x6F)
    assert chips.get(apic.PPR) == 0x6F


@given(
    st.lists(
        st.tuples(st.sampled_from(("ask", "take", "end", "priority")), st.integers(16, 255)), max_size=60
    )
)
def test_what_is_acknowledged_is_always_above_what_is_served(steps: list[tuple[str, int]]) -> None:
    """Whatever comes, the pin is up exactly when the best request is of a higher class than task and service."""
    chips = Chips()
    asked, served, task = set[int](), list[int](), 0
    for what, number in steps:
        if what == "ask":
            chips.local.request(number)
            asked.add(number)
        elif what == "priority":
            chips.put(apic.TPR, number)
            task = number
        elif what == "end":
            chips.put(apic.EOI, 0)
            if served:
                served.remove(max(served))
        elif chips.pin:
            vector = chips.local.acknowledge()
            assert vector == max(asked)
            asked.remove(vector)
            served.append(vector)
        best = max((v >> 4 for v in asked), default=0)
        assert chips.pin == (best > max([task >> 4, *(v >> 4 for v in served)]))


# The old controller


def test_extint_passes_the_old_controllers_pin_and_vector_on() -> None:
    """Virtual wire: no bit of ISR, no end; masked, or in another mode, nothing."""
    chips = Chips()
    chips.local.wire()
    chips.local.set_extint(True)
    assert chips.pin and chips.local.acknowledge() == 0x77 and not vectors(apic.ISR, chips)
    chips.put(apic.LVT_LINT0, apic.EXTINT | apic.MASKED)
    assert not chips.pin
    chips.put(apic.LVT_LINT0, apic.NMI)
    assert not chips.pin


def test_lint0_can_be_a_vector_of_its_own_by_edge_or_level() -> None:
    """In fixed mode an edge asks once; a level asks again at each end while it is up, and remote IRR shows it."""
    chips = Chips()
    chips.put(apic.LVT_LINT0, 0x44)
    chips.local.set_extint(True)
    assert chips.local.acknowledge() == 0x44
    chips.local.eoi()
    assert not chips.pin
    chips.put(apic.LVT_LINT0, 0x45 | apic.LEVEL)
    assert chips.local.acknowledge() == 0x45 and chips.get(apic.LVT_LINT0) & apic.REMOTE_IRR
    chips.local.eoi()
    assert chips.pin and chips.local.acknowledge() == 0x45
    chips.local.set_extint(False)
    chips.local.eoi()
    assert not chips.pin and not chips.get(apic.LVT_LINT0) & apic.REMOTE_IRR


def test_an_extint_entry_of_the_io_apic_is_another_way_for_it() -> None:
    """Pin 0 has the same output; its entry in ExtINT mode lets it through where LINT0 does not."""
    chips = Chips()
    chips.redirect(0, apic.EXTINT)
    chips.io.set_pin(0, True)
    assert chips.pin and chips.local.acknowledge() == 0x77
    chips.redirect(0, apic.EXTINT | apic.MASKED)
    assert not chips.pin
    chips.redirect(0, apic.EXTINT)
    assert chips.pin
    chips.redirect(0, apic.MASKED)
    assert not chips.pin


# Messages


@pytest.mark.parametrize(
    ("command", "destination", "arrives"),
    [
        (0x40, 0, True),
        (0x40, 1, False),
        (0x40, 0xFF, True),
        (0x40 | apic.LOWEST, 0, True),
        (0x40 | 1 << 18, 5, True),
        (0x40 | 2 << 18, 5, True),
        (0x40 | 3 << 18, 0, False),
        (0x40 | apic.LOGICAL, 0x04, True),
        (0x40 | apic.LOGICAL, 0x03, False),
        (0x40 | apic.LOGICAL, 0xFF, True),
    ],
)
def test_a_message_reaches_whom_it_names(command: int, destination: int, arrives: bool) -> None:
    """Physical, logical, and by shorthand; one that nobody accepts is an error."""
    chips = Chips()
    chips.put(apic.LDR, 0x04 << 24)
    chips.put(apic.ICR_HIGH, destination << 24)
    chips.put(apic.ICR_LOW, command)
    assert chips.pin == arrives and chips.get(apic.ICR_LOW) == command
    chips.put(apic.ESR, 0)
    assert chips.get(apic.ESR) == (0 if arrives else apic.SEND_ACCEPT)


def test_logical_destinations_in_clusters() -> None:
    """In the cluster model the upper four bits name a cluster and the others its members."""
    chips = Chips()
    chips.put(apic.DFR, 0)
    chips.put(apic.LDR, 0x32 << 24)
    assert [chips.local.accepts(d, True) for d in (0x32, 0x3F, 0x31, 0x22, 0xFF)] == [
        True,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("mode", (2 << 8, 4 << 8, 5 << 8, 6 << 8))
def test_what_is_not_a_vector_goes_nowhere(mode: int) -> None:
    """SMI, NMI, INIT and start-up change nothing: the machine says so in its document."""
    chips = Chips()
    before = copy.deepcopy(chips.local.state)
    chips.put(apic.ICR_LOW, mode | 1 << 18)
    before.icr = chips.local.state.icr
    assert chips.local.state == before


@pytest.mark.parametrize("vector", (0, 5, 15))
def test_a_vector_below_16_is_an_error(vector: int) -> None:
    """Sent, and received."""
    chips = Chips()
    chips.put(apic.ICR_LOW, vector | 1 << 18)
    chips.local.request(vector)
    chips.put(apic.ESR, 0)
    assert chips.get(apic.ESR) == apic.SEND_ILLEGAL | apic.RECEIVE_ILLEGAL and not chips.pin


# The IO-APIC


def test_an_edge_asks_once_and_not_while_masked() -> None:
    """As the data sheet has it: what rises under a mask is lost."""
    chips = Chips()
    chips.redirect(4, 0x54)
    chips.io.set_pin(4, True)
    assert chips.local.acknowledge() == 0x54 and not vectors(apic.TMR, chips)
    chips.local.eoi()
    chips.io.set_pin(4, True)
    assert not chips.pin
    chips.io.set_pin(4, False)
    chips.redirect(4, 0x54 | apic.MASKED)
    chips.io.set_pin(4, True)
    chips.redirect(4, 0x54)
    assert not chips.pin


def test_a_level_asks_until_it_falls() -> None:
    """Remote IRR is set until the end, then the pin is looked at again; TMR says which vectors do so."""
    chips = Chips()
    chips.redirect(9, 0x59 | apic.LEVEL)
    chips.io.set_pin(9, True)
    assert chips.entry(9) & apic.REMOTE_IRR
    for _ in range(3):
        assert chips.local.acknowledge() == 0x59 and not chips.pin
        assert vectors(apic.TMR, chips) == {0x59}
        chips.put(apic.EOI, 0)
    assert chips.local.acknowledge() == 0x59
    chips.io.set_pin(9, False)
    chips.put(apic.EOI, 0)
    assert not chips.pin and not chips.entry(9) & apic.REMOTE_IRR


def test_a_level_that_is_up_asks_when_it_is_unmasked() -> None:
    """Masking loses nothing of a level."""
    chips = Chips()
    chips.io.set_pin(9, True)
    chips.redirect(9, 0x59 | apic.LEVEL)
    assert chips.pin


def test_an_active_low_entry_sees_the_other_level() -> None:
    """A line of this PC is up when it asks: told that down is active, the pin asks all the time."""
    chips = Chips()
    chips.redirect(9, 0x59 | apic.LEVEL | ioapic.ACTIVE_LOW)
    assert chips.pin and chips.local.acknowledge() == 0x59
    chips.io.set_pin(9, True)
    chips.put(apic.EOI, 0)
    assert not chips.pin


def test_an_entry_for_somebody_else_is_for_nobody() -> None:
    """A destination that is not this processor's gets no interrupt here."""
    chips = Chips()
    chips.redirect(4, 0x54, 3 << 24)
    chips.io.set_pin(4, True)
    assert not chips.pin


def test_the_io_apics_registers() -> None:
    """Identity, version with 24 entries, and in each entry only the bits that exist."""
    chips = Chips()
    found = []
    for index in (0, 1, 2, 0x40, 0x0F):
        chips.io.write(ioapic.SELECT, 4, index)
        chips.io.write(ioapic.WINDOW, 4, 0xFFFF_FFFF)
        found.append(chips.io.read(ioapic.WINDOW, 4))
    assert found == [0x0F00_0000, 0x0017_0011, 0x0F00_0000, 0, 0]
    chips.redirect(23, 0xFFFF_FFFF, 0xFFFF_FFFF)
    assert chips.entry(23) == 0x1AFFF and chips.io.state.high[23] == 0xFF00_0000
    assert chips.io.read(ioapic.SELECT, 4) == 0x3E and chips.io.read(0x20, 4) == 0
    assert chips.io.read(ioapic.WINDOW, 1) == 0


# The timer


@pytest.mark.parametrize("divide", range(16))
def test_each_divisor(divide: int) -> None:
    """Bits 3, 1 and 0: by 2, 4 ... 128, and by one with all of them set; bit 2 means nothing."""
    shift = {0: 1, 1: 2, 2: 3, 3: 4, 8: 5, 9: 6, 10: 7, 11: 0}[divide & 0xB]
    chips = Chips()
    chips.put(apic.DIVIDE, divide)
    chips.put(apic.INITIAL_COUNT, 1000)
    chips.pass_time((10 << shift) * 400)
    assert chips.get(apic.CURRENT_COUNT) == 600 and chips.get(apic.INITIAL_COUNT) == 1000


def test_one_shot_interrupts_once() -> None:
    """At zero, and it stays there."""
    chips = Chips()
    chips.put(apic.DIVIDE, 0xB)
    chips.put(apic.LVT_TIMER, 0x60)
    chips.put(apic.INITIAL_COUNT, 100)
    assert chips.local.deadline() == 1000
    chips.pass_time(999)
    assert not chips.pin and chips.get(apic.CURRENT_COUNT) == 1
    chips.pass_time(1)
    assert chips.local.acknowledge() == 0x60 and chips.get(apic.CURRENT_COUNT) == 0
    assert chips.local.deadline() is None
    chips.local.eoi()
    chips.pass_time(10**9)
    assert not chips.pin


def test_periodic_goes_on_from_where_it_was_due() -> None:
    """However late it is looked at, one interrupt, and the next in step with the first."""
    chips = Chips()
    chips.put(apic.DIVIDE, 0xB)
    chips.put(apic.LVT_TIMER, 0x60 | apic.PERIODIC)
    chips.put(apic.INITIAL_COUNT, 100)
    chips.pass_time(3550)
    assert chips.pin and chips.get(apic.CURRENT_COUNT) == 45 and chips.local.deadline() == 4000
    chips.put(apic.INITIAL_COUNT, 0)
    assert chips.local.deadline() is None and chips.get(apic.CURRENT_COUNT) == 0


def test_masked_it_counts_and_does_not_ask() -> None:
    """And what it would have asked is not made up for."""
    chips = Chips()
    chips.put(apic.DIVIDE, 0xB)
    chips.put(apic.LVT_TIMER, 0x60 | apic.MASKED)
    chips.put(apic.INITIAL_COUNT, 100)
    assert chips.local.deadline() is None
    chips.pass_time(2000)
    chips.put(apic.LVT_TIMER, 0x60)
    assert not chips.pin


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 15)), max_size=8), st.integers(1, 10**6))
def test_another_divisor_keeps_the_count(steps: list[tuple[int, int]], count: int) -> None:
    """The count is the same before and after the divisor changes, and never goes up."""
    time = 0
    state = TimerState()
    timer = ApicTimer(state, lambda: time)
    timer.start(count)
    last = count
    for ns, divide in steps:
        time += ns
        before = timer.current()
        timer.set_divide(divide)
        assert before == timer.current() <= last
        last = before


def test_the_address_is_the_msrs() -> None:
    """The page moves with it; bits that do not exist are refused, and off stays off."""
    chips = Chips()
    assert chips.local.read_base() == 0xFEE00900
    assert not chips.local.write_base(0xFEE00901) and not chips.local.write_base(1 << 36)
    assert chips.local.write_base(0xFE700800) and chips.local.read_base() == 0xFE700900
    assert chips.local.write_base(0xFE700000) and chips.local.write_base(0xFE700800)
    assert chips.local.read_base() == 0xFE700100
    assert chips.moves == [0xFE700000, 0]
    chips.local.set_extint(True)
    assert chips.pin and chips.local.acknowledge() == 0x77


def test_a_copy_of_the_state_goes_on_alike() -> None:
    """All there is to know of both chips is in their states, plain values."""
    first, second = Chips(), Chips()
    first.put(apic.DIVIDE, 0xB)
    first.put(apic.LVT_TIMER, 0x60 | apic.PERIODIC)
    first.put(apic.INITIAL_COUNT, 77)
    first.redirect(9, 0x59 | apic.LEVEL)
    first.io.set_pin(9, True)
    second.local.restore(copy.deepcopy(first.local.state))
    second.io.state = copy.deepcopy(first.io.state)
    second.pin = first.pin
    for chips in (first, second):
        chips.pass_time(770)
    assert [c.local.acknowledge() for c in (first, second)] == [0x60, 0x60]
    assert first.local.state == second.local.state and first.io.state == second.io.state
