"""Running free: with the host clock and no bound the CPU is not counted while interrupts are off."""

from __future__ import annotations

import threading

import pytest

from tests.guest_expectations import Expectation
from tests.test_guests import MEMORY, RUNS, check, image_of
from vmm.image.image import Image, Segment
from vmm.vm import UNMODIFIED, VirtualMachine


def flat(code: str) -> Image:
    data = bytes.fromhex(code)
    return Image("flat", (Segment(0x100000, data, len(data)),), 0x100000)


@pytest.mark.parametrize(("expectation", "mode"), RUNS, ids=str)
def test_guests_run_free_as_they_do_counted(expectation: Expectation, mode: str) -> None:
    """Uncounted, each guest prints and ends as its table row says, interrupts and all."""
    machine = VirtualMachine(
        image_of(expectation, mode),
        mode,
        memory=MEMORY,
        clock="host",
        console_input=expectation.input,
        model=expectation.model,
    )
    result = machine.run()
    check(expectation, result)
    assert not result.counted


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
@pytest.mark.parametrize("code", ("ebfe", "fbebfe", "9d5858ebf9"), ids=("jmp", "sti", "popf"))
def test_a_spinning_guest_can_be_interrupted(mode: str, code: str) -> None:
    """Whether the CPU is counted or not, a poke ends a guest that never exits."""
    machine = VirtualMachine(flat("bc00002000" + code), mode, clock="host")
    timer = threading.Timer(0.2, machine.poke, ("interrupted",))
    timer.start()
    result = machine.run()
    timer.join()
    assert result.outcome.kind in ("interrupted", "triple-fault")  # STI lets the firmware's timer in: no IDT


def test_bounds_and_listeners_need_the_count() -> None:
    """With a limit, a timeout or a listener every instruction is counted, whatever the clock."""
    halt = flat("9090faf4")
    assert VirtualMachine(halt, "native", clock="host").run(100).counted
    assert VirtualMachine(halt, "native", clock="host").run(timeout=5).counted
    assert VirtualMachine(halt, "native", clock="host", listeners=(lambda _event: None,)).run().counted
    assert VirtualMachine(halt, "native").run().counted
    assert not VirtualMachine(halt, "native", clock="host").run().counted
