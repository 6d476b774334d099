"""Every guest in every mode: what it prints, how it ends, and that time and memory agree where they must."""

from __future__ import annotations

import pytest

from tests.guest_expectations import EXPECTATIONS, Expectation
from vmm.image.image import Image
from vmm.image.load import load_image
from vmm.vm import ClockName, Result, VirtualMachine

MEMORY = 16 << 20
IMAGES: dict[str, Image] = {}


def image_of(expectation: Expectation) -> Image:
    """Assembled once for all tests."""
    key = str(expectation)
    if key not in IMAGES:
        IMAGES[key] = load_image(expectation.path, memory=MEMORY, defines=expectation.defines)
    return IMAGES[key]


def run(expectation: Expectation, mode: str, clock: ClockName = "instructions") -> Result:
    machine = VirtualMachine(
        image_of(expectation), mode, memory=MEMORY, clock=clock, console_input=expectation.input
    )
    return machine.run(50_000_000, timeout=30)


def expected(expectation: Expectation, mode: str) -> tuple[str, str, int]:
    """(console, kind, status) by the table."""
    console, status = expectation.console, expectation.status
    if mode == "trap":
        console = expectation.trap_console if expectation.trap_console is not None else console
        status = expectation.trap_status if expectation.trap_status is not None else status
    return console, expectation.kind, status or 0


@pytest.mark.parametrize("clock", ("instructions", "host"))
@pytest.mark.parametrize("mode", ("native", "trap"))
@pytest.mark.parametrize("expectation", EXPECTATIONS, ids=str)
def test_guest_does_as_its_header_says(expectation: Expectation, mode: str, clock: ClockName) -> None:
    """Console, kind of end and status are the table's, which QEMU confirms for native."""
    result = run(expectation, mode, clock)
    found = result.console.decode(), result.outcome.kind, result.outcome.status
    assert found == expected(expectation, mode)


@pytest.mark.parametrize("expectation", EXPECTATIONS, ids=str)
def test_runs_are_repeatable_to_the_last_byte(expectation: Expectation) -> None:
    """With the instruction clock two runs agree in memory, registers, console, time and exits."""
    for mode in ("native", "trap"):
        first, second = run(expectation, mode), run(expectation, mode)
        for name in ("outcome", "instructions", "console", "memory_sha256", "registers"):
            assert getattr(first, name) == getattr(second, name), name
        counts = [{k: r.count for k, r in result.exits.rows.items()} for result in (first, second)]
        assert counts[0] == counts[1]


# Guests that execute no critical instruction whose result matters: trap-and-emulate is right for them.
FAITHFUL = {"hello", "timer", "faults", "echo", "shutdown"}


@pytest.mark.parametrize("expectation", [e for e in EXPECTATIONS if e.guest in FAITHFUL], ids=str)
def test_trap_equals_native_where_theory_says_so(expectation: Expectation) -> None:
    """A guest without critical instructions ends with the same registers, memory and time in both modes."""
    native, trap = run(expectation, "native"), run(expectation, "trap")
    for name in ("instructions", "console", "memory_sha256", "registers"):
        assert getattr(native, name) == getattr(trap, name), name
