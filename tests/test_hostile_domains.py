"""Hostile domains: each ends itself with one line, or goes on; the hypervisor stays whole, within time and memory."""

from __future__ import annotations

import gc
import hashlib
import resource
import threading
from collections.abc import Iterator

import pytest

from tests import domains
from tests.hostile_domains import HOSTILE, SETUP, Hostile
from tests.paravirt_keeper import Keeper
from vmm.machine.machine import Outcome

EINVAL = (1 << 32) - 22
SECONDS = 20  # generous: two cores may be shared by many
GROWTH = 192 << 10  # KiB of memory that the whole table may add to the process


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """No guest of the table lets the process grow."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.collect()
    gc.freeze()  # what is there now is not looked through again each time
    yield
    gc.unfreeze()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH


@pytest.fixture(autouse=True)
def one_at_a_time() -> Iterator[None]:
    """A machine is in cycles: it goes with the test that made it."""
    yield
    gc.collect()


def play(guest: Hostile) -> tuple[domains.Guest, Outcome]:
    """The guest after its run, everything checked that must hold of any guest."""
    made = domains.build(SETUP + guest.source)
    keeper = Keeper(made)
    timer = threading.Timer(SECONDS, made.machine.poke, ("timeout",))
    timer.start()
    try:
        if guest.then:
            made.run_to(guest.then, 40_000)
        budget = made.machine.retired() + guest.budget
        outcome = made.run(budget)
    finally:
        timer.cancel()
        timer.join()
    keeper.check()
    assert outcome.kind in guest.ends, outcome
    assert "\n" not in outcome.detail
    assert made.machine.retired() <= budget
    return made, outcome


def trace(guest: domains.Guest) -> tuple[object, ...]:
    """All that can be seen of a machine."""
    machine = guest.machine
    digest = hashlib.sha256(machine.memory.bytes).hexdigest()
    return machine.retired(), guest.monitor.registers(), bytes(guest.console), digest


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_domain_harms_nobody_else(name: str) -> None:
    """It ends as it may, has been stopped as often as it must, and a second run is the same to the byte."""
    guest = HOSTILE[name]
    first, outcome = play(guest)
    if outcome.kind == "budget" and guest.stopped:
        assert first.read("faults") >= guest.stopped
    second, again = play(guest)
    assert again == outcome
    assert trace(second) == trace(first)


def test_the_pages_of_the_rings_stay_memory() -> None:
    """Domain 0 has the console's page mapped, so it never is a page table that a ring's index could be stored to."""
    guest, _ = play(HOSTILE["makes page tables of the console's ring, and sends"])
    assert guest.read("seen") == EINVAL


def test_a_time_area_ends_where_its_linear_addresses_do() -> None:
    """A record that lies across two pages goes to the two, not to the frame after the first."""
    guest, _ = play(HOSTILE["has the time written across the end of a page"])
    version, after = guest.words(guest.symbol("page") + 0xFF8, 2)
    assert version % 2 == 0 and version and not after
    assert guest.read("other"), "the counter, the record's third word"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("a trap table of thirty million rows", "set_trap_table"),
        ("a quarter of a gigabyte for the console", "console_io"),
        ("a multicall of eight million", "multicall"), ("sixteen million updates", "mmu_update"),
        ("twenty million operations", "mmuext_op"), ("exchanges its frames without end", "memory_op"),
    ],
)  # fmt: skip
def test_a_long_call_is_many_instructions(name: str, call: str) -> None:
    """However much a guest asks for at once, each slice of the work is an instruction, and an exit."""
    guest, _ = play(HOSTILE[name])
    before, retired = guest.count(f"hypercall {call}"), guest.machine.retired()
    assert before > 2
    assert guest.run(retired + 2).kind == "budget"
    assert guest.count(f"hypercall {call}") == before + 2


def test_a_multicall_that_blocks_goes_on_when_the_domain_wakes() -> None:
    """What stands after a block in the list is done, but not before there is an event."""
    guest = domains.build(
        SETUP
        + """
        mov ebx, 1
        mov ecx, bind
        hypercall 32            ; bind_virq VIRQ_TIMER
        mov ebx, calls
        mov ecx, 3
        hypercall 13
done:   jmp $
section .data
bind:   dd 0, 0, 0
calls:  dd 15, 0, 5000000, 0, 0, 0, 0, 0        ; set_timer_op: 5 ms
        dd 29, 0, 1, 0, 0, 0, 0, 0              ; block
        dd 5, 0, 1, 0, 0, 0, 0, 0               ; fpu_taskswitch
section .text
"""
    )
    guest.run_to("done")
    assert guest.domain.vcpu.task_switched and guest.reg("eax") == 0
    assert guest.machine.now() >= 5_000_000 and guest.read("events") == 1


def test_an_int_that_nobody_may_make_is_a_protection_fault() -> None:
    """A handler that INT may not call, and none at all, are #GP for the kernel, too."""
    guest = domains.build(
        SETUP
        + """
        mov ebx, rows
        hypercall 0
first:  int 0x20
second: int 0x30
caught: jmp $
section .data
rows:   trap 13, 0, caught
        trap 0x20, 0, over
        dd 0, 0
section .text
"""
    )
    for label, vector in (("first", 0x20), ("second", 0x30)):
        guest.run_to(label)
        guest.run_to("caught")
        assert guest.words(guest.reg("esp"), 2) == [vector << 3 | 2, guest.symbol(label)]
        guest.machine.state.eip = guest.symbol("second")
