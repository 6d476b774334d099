"""Hostile guests in every mode: each ends itself, or runs on as on the bare machine, within budget and memory."""

from __future__ import annotations

import resource
import time

import pytest

from tests.hostile_guests import HOSTILE, MACROS, Hostile
from tests.machines import Lab, lab
from vmm.vm import MODES

SECONDS = 20  # generous: two cores may be shared by many
GROWTH = 192 << 10  # KiB of memory that a run may add to the process

# What is not hidden: a kernel that touches an address where it has put nothing, and where the monitor lives, may find
# the monitor's own page in place of a page fault, or of the ones of an empty bus.
SHARED_SPACE = {
    ("jumps into the last 4 MiB, without paging", "trap"),
    ("calls into the last 4 MiB, without paging", "trap"),
    ("loads from the last 4 MiB, without paging", "trap"),
    ("loads from the last 4 MiB, unmapped", "trap"),
    ("loads from the last 4 MiB, without paging", "bt"),
    ("loads from the last 4 MiB, unmapped", "bt"),
    ("stores into the last 4 MiB, unmapped", "bt"),
    ("strings into the last 4 MiB, unmapped", "bt"),
}


def run(guest: Hostile, mode: str) -> tuple[str, Lab]:
    """How it ended, and the machine as it was then."""
    made = lab(MACROS + guest.source, mode, memory=guest.memory)
    return made.run(guest.budget).kind, made


@pytest.mark.parametrize("mode", sorted(MODES.keys() - {"native"}))
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_guest_fares_as_it_does_bare(name: str, mode: str) -> None:
    """End, console, registers, memory and time are the bare machine's; exceptions are listed, and still hold."""
    guest = HOSTILE[name]
    kind, native = run(guest, "native")
    other_kind, other = run(guest, mode)
    if mode == "trap" and guest.critical:
        return  # that it came back at all is what is promised
    assert other_kind == kind
    same = other.everything() == native.everything()
    if (name, mode) in SHARED_SPACE:
        assert not same, "this exception is none any more: take it off the list"
        return
    if not same:
        assert other.everything() == native.everything()  # for its message


@pytest.mark.parametrize("mode", sorted(MODES))
def test_hostile_guests_cost_bounded_time_and_memory(mode: str) -> None:
    """No guest of the table makes a machine slow beyond measure or lets the process grow."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, guest in HOSTILE.items():
        started = time.monotonic()
        run(guest, mode)
        assert time.monotonic() - started < SECONDS, name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH
