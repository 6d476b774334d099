"""Every guest in every mode: what it prints, how it ends, and that time and memory agree where they must."""

from __future__ import annotations

import pytest

from tests.guest_expectations import EXPECTATIONS, Expectation
from vmm.errors import AssemblyError
from vmm.image.image import Image
from vmm.image.load import load_image
from vmm.vm import MODES, UNMODIFIED, ClockName, Result, VirtualMachine

MEMORY = 16 << 20
AGREE = ("instructions", "console", "memory_sha256", "registers")  # of two runs that must be one
PARAVIRTUAL = [expectation for expectation in EXPECTATIONS if expectation.pv]
RUNS = [(e, mode) for e in EXPECTATIONS for mode in sorted(UNMODIFIED)] + [(e, "pv") for e in PARAVIRTUAL]
IMAGES: dict[str, Image] = {}


def image_of(expectation: Expectation, mode: str) -> Image:
    """The build for a mode, assembled once for all tests."""
    build = MODES[mode].image
    key = f"{expectation} {build}"
    if key not in IMAGES:
        defines = {**expectation.defines, "PV": ""} if build == "pv" else expectation.defines
        IMAGES[key] = load_image(expectation.path, memory=MEMORY, defines=defines)
    return IMAGES[key]


def run(expectation: Expectation, mode: str, clock: ClockName = "instructions") -> Result:
    machine = VirtualMachine(
        image_of(expectation, mode),
        mode,
        memory=MEMORY,
        clock=clock,
        console_input=expectation.input,
        model=expectation.model,
    )
    return machine.run(50_000_000, timeout=30)


def check(expectation: Expectation, result: Result) -> None:
    """Console, kind of end and status are what the table has for the mode."""
    expectation.check(result.mode, result.console.decode())
    _, status = expectation.wanted(result.mode)
    assert (result.outcome.kind, result.outcome.status) == (expectation.kind, status or 0)


@pytest.mark.parametrize("clock", ("instructions", "host"))
@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
@pytest.mark.parametrize("expectation", EXPECTATIONS, ids=str)
def test_guest_does_as_its_header_says(expectation: Expectation, mode: str, clock: ClockName) -> None:
    """Console, kind of end and status are the table's, which QEMU confirms for native."""
    check(expectation, run(expectation, mode, clock))


@pytest.mark.parametrize("clock", ("instructions", "host"))
@pytest.mark.parametrize("expectation", PARAVIRTUAL, ids=str)
def test_a_paravirtual_kernel_does_the_same(expectation: Expectation, clock: ClockName) -> None:
    """The build for Xen's interface prints what the other one prints, and ends as it does."""
    check(expectation, run(expectation, "pv", clock))


@pytest.mark.parametrize("expectation", [e for e in EXPECTATIONS if not e.pv], ids=str)
def test_a_guest_without_a_paravirtual_build_says_so(expectation: Expectation) -> None:
    """The others refuse -D PV, in words, wherever the assembler comes to it first."""
    with pytest.raises(AssemblyError, match=r"PV ?: this guest has no paravirtual build"):
        image_of(expectation, "pv")


@pytest.mark.parametrize(("expectation", "mode"), RUNS, ids=str)
def test_runs_are_repeatable_to_the_last_byte(expectation: Expectation, mode: str) -> None:
    """With the instruction clock two runs agree in memory, registers, console, time and exits."""
    first, second = run(expectation, mode), run(expectation, mode)
    for name in ("outcome", *AGREE):
        assert getattr(first, name) == getattr(second, name), name
    counts = [{k: r.count for k, r in result.exits.rows.items()} for result in (first, second)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("mode", sorted({*UNMODIFIED} - {"native", "trap"}))
@pytest.mark.parametrize("expectation", EXPECTATIONS, ids=str)
def test_a_correct_monitor_cannot_be_told_from_the_bare_machine(expectation: Expectation, mode: str) -> None:
    """Every guest ends with the same registers, memory, console and time as natively."""
    native, other = run(expectation, "native"), run(expectation, mode)
    for name in AGREE:
        assert getattr(native, name) == getattr(other, name), name


# Guests that execute no critical instruction whose result matters: trap-and-emulate is right for them.
FAITHFUL = {
    "hello", "timer", "faults", "echo", "shutdown", "paging", "threads", "smc", "fpu", "disk", "clock", "apic",
}  # fmt: skip


@pytest.mark.parametrize("expectation", [e for e in EXPECTATIONS if e.guest in FAITHFUL], ids=str)
def test_trap_equals_native_where_theory_says_so(expectation: Expectation) -> None:
    """A guest without critical instructions ends with the same registers, memory and time in both modes."""
    native, trap = run(expectation, "native"), run(expectation, "trap")
    for name in AGREE:
        assert getattr(native, name) == getattr(trap, name), name


def test_each_kind_of_switch_costs_what_it_is_made_of() -> None:
    """By threads' own count a user-level switch takes the fewest instructions, a process switch the most."""
    (expectation,) = (e for e in EXPECTATIONS if e.guest == "threads")
    console = run(expectation, "native").console.decode()
    costs = [int(line.split()[1]) for line in console.splitlines() if line.startswith("timing:")]
    call, user, kernel, process, inner = costs
    assert 0 < user < call < inner < kernel < process < 1000
