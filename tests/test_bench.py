"""The nanobenchmarks measure what they say. No time is judged here: that is for `python -m tools.bench nano`."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from iced_x86 import Decoder
from unicorn import UcError
from unicorn import x86_const as X

from tests.oracles import require
from tools.bench import baseline, bochs, profile
from tools.bench.nano import adams_agesen, images, report
from tools.bench.nano.catalogue import (
    BATCH,
    BENCHMARKS,
    EMPTY,
    TRANSLATED,
    Benchmark,
)
from tools.bench.nano.columns import columns
from tools.bench.nano.disk import disk
from tools.bench.nano.emulators import Bochs, Qemu
from tools.bench.nano.limits import LIMITS, AtLeastFaster, AtLeastRate, AtMostExits, AtMostTimes
from tools.bench.nano.report import Grid
from tools.bench.nano.results import Results, judge
from tools.bench.nano.run import parse
from tools.bench.nano.worker import (
    BARE,
    BLOCK,
    DELIVERY,
    EXECUTABLE,
    FILL,
    SHADOWED,
    SITE,
    Failed,
    Sample,
    count_in,
    exits,
    run_in,
    timed,
)
from vmm.image.asm import assemble_text
from vmm.image.image import Image, Segment
from vmm.image.load import from_assembly, load_image
from vmm.vm import UNMODIFIED, VirtualMachine

ROOT = Path(__file__).resolve().parent.parent
EVERY = pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda b: b.name)
NO_EXITS = (FILL, SITE, BLOCK, DELIVERY)


def run(benchmark: Benchmark, iterations: int, mode: str = "native") -> VirtualMachine:
    """The machine after the guest's end."""
    image = images.with_iterations(images.image_of(benchmark), iterations)
    vm = VirtualMachine(image, mode, memory=images.MEMORY)
    result = vm.run(50_000_000)
    assert (result.outcome.kind, result.outcome.status) == ("exit", 1), result.outcome
    return vm


def words(vm: VirtualMachine, address: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}I", vm.machine.memory.bytes, address)


# Instructions of one iteration, the loop's own two included.
_INNER = 1024 // 8
INSTRUCTIONS = {
    "empty": 2,
    "in": 3,
    "out": 3,
    "cr3": 3,
    "call": 8 * 2 + 2,
    "cli": 4 * 2 + 2,
    "pushf": 4 * 2 + 2,
    "syscall": 4,
    "compute": 8 * 4 + 2,
    "memory": 4 + 1024 * (8 * 3 + 3),
    "pte": 4 + _INNER * (8 + 4),
    "pte-absent": 4 + _INNER * (8 + 4),
    "pte-flush": 6 + _INNER * (8 + 4),
    "pte-batch": 6 + BATCH // 8 * (8 + 4),
    "pte-invlpg": 4 + _INNER * (16 + 4),
    "pte-touch": 4 + _INNER * (24 + 4),
    "switch": 2 * (8 + 1 + 14 + 2),
    "interrupt": 6 + 2 + 1 + 5,  # the loop's, its end, the delivery, the handler
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_an_iteration_has_the_instructions_it_should(name: str) -> None:
    """Between two runs lies the operation, as often as the row says, and the two instructions of the loop."""
    before, after = (run(BENCHMARKS[name], n).machine.retired() for n in (1, 3))
    assert after - before == 2 * INSTRUCTIONS[name]


# Exits of one operation on the bare machine; the others have none.
EXITS: dict[str, dict[str, float]] = {
    "syscall": {"INT 0x80": 1},
    "in": {"IN": 1},
    "out": {"OUT": 1},
    "fault": {"exception #PF": 1},
    "divide": {"exception #DE": 1},
    "switch": {"INT 0x80": 1},
    "interrupt": {"external interrupt": 1, "OUT": 3, "IN": 1},
}
EVENTS = ("syscall", "fault", "divide", "switch", "interrupt")


def counted(benchmark: Benchmark, mode: str) -> dict[str, float]:
    """Exits, and what is none, of one operation."""
    image = images.image_of(benchmark)
    found = exits(lambda n: count_in(image, mode, n), 1, benchmark.once)
    return {reason: n / benchmark.operations for reason, n in found.items()}


@EVERY
def test_an_operation_is_the_one_in_its_name(benchmark: Benchmark) -> None:
    """On the bare machine an operation makes the exits that it is about, or none, and one delivery for an event."""
    found = counted(benchmark, "native")
    real = {reason: n for reason, n in found.items() if reason not in NO_EXITS}
    assert real == EXITS.get(benchmark.name, {})
    assert found.get(DELIVERY, 0) == (benchmark.name in EVENTS)


@EVERY
def test_hardware_assist_adds_no_exit(benchmark: Benchmark) -> None:
    """With nested paging an operation exits as on the bare machine, and the CPU delivers external interrupts."""
    found = counted(benchmark, "hvm")
    names = {"IN": "VMEXIT_IOIO IN (by hook)", "OUT": "VMEXIT_IOIO OUT (by hook)"}
    real = {reason: n for reason, n in found.items() if reason not in NO_EXITS}
    if not benchmark.once:  # code that is executed once is on pages that were never there before
        assert real == {names.get(reason, reason): n for reason, n in EXITS.get(benchmark.name, {}).items()}
    assert found.get(DELIVERY, 0) == (benchmark.name in EVENTS and benchmark.name != "interrupt")


def test_hardware_assist_with_shadow_tables_has_what_it_must_notice() -> None:
    """MOV to CR3 is an exit there."""
    assert counted(BENCHMARKS["cr3"], SHADOWED) == {"VMEXIT_CR3_WRITE": 1}


# Exits of one operation of a guest for Xen's interface; the others have none.
PARAVIRTUAL: dict[str, dict[str, float]] = {
    "syscall": {"INT 0x80": 1},
    "cr3": {"hypercall multicall": 1},
    "fault": {"exception #PF": 1},
    "divide": {"exception #DE": 1},
    "pte": {"emulated page-table store": 1},
    "pte-batch": {"hypercall mmu_update": 1 / BATCH},
    "pte-invlpg": {"hypercall update_va_mapping": 1},
    "pte-touch": {"hypercall update_va_mapping": 1},
    "switch": {"INT 0x80": 1, "hypercall multicall": 1},
}
ASKING = pytest.mark.parametrize("benchmark", [b for b in BENCHMARKS.values() if b.pv], ids=lambda b: b.name)


@ASKING
def test_a_paravirtual_operation_is_one_exit_or_none(benchmark: Benchmark) -> None:
    """A system call one, 64 updates of page tables one, a switch one besides the system call; the rest none."""

    def count(iterations: int) -> dict[str, int]:
        # By the instruction clock: a tick of the host's, in the middle of a batch, has the hypercall made again.
        rows = paravirtual(benchmark.name, iterations).machine.exits.rows
        return {reason: row.count for reason, row in rows.items()}

    real = {reason: n / benchmark.operations for reason, n in exits(count, 1, benchmark.once).items()}
    assert real == PARAVIRTUAL.get(benchmark.name, {})


@ASKING
def test_every_paravirtual_benchmark_comes_to_its_end(benchmark: Benchmark) -> None:
    """Measured as it is measured, a few iterations or none."""
    for iterations in (0, 3):
        taken, _exits = run_in(images.image_of(benchmark, pv=True), "pv", iterations)
        assert taken > 0


def paravirtual(name: str, iterations: int) -> VirtualMachine:
    image = images.with_iterations(images.image_of(BENCHMARKS[name], pv=True), iterations)
    vm = VirtualMachine(image, "pv", memory=images.MEMORY)
    assert vm.run(50_000_000).outcome.status == 1
    return vm


@pytest.mark.parametrize(
    ("name", "passes", "count"), [("pte", 2, 512), ("pte-batch", 1, BATCH), ("pte-invlpg", 2, 512)]
)
def test_paravirtual_updates_arrive(name: str, passes: int, count: int) -> None:
    """Each pass gives every entry the other of the two frames, in the table that the processor walks."""
    symbols = images.image_of(BENCHMARKS[name], pv=True).symbols
    for iterations in (1, 2):
        linear = paravirtual(name, iterations).machine.linear
        flip = linear.read(symbols["flip"], 4) & ~0xFFF
        first = linear.translate(symbols["frames"], write=False, user=False).frame
        expected = first ^ (flip if passes * iterations & 1 else 0)
        entries = [linear.read(symbols["changing"] + 8 * i, 8) for i in range(count)]
        assert {entry & ~0xFFF for entry in entries} == {expected}
        assert linear.translate(0x20000000, write=False, user=False).frame == expected


def test_paravirtual_processes_take_turns() -> None:
    """Each in a space of its own: both have counted in their own pages."""
    vm = paravirtual("switch", 5)
    symbols = images.image_of(BENCHMARKS["switch"], pv=True).symbols
    linear, memory = vm.machine.linear, vm.machine.memory
    counts = []
    for process in range(2):
        entry = linear.read(symbols["own"] + process * 0x1000, 8)
        counts.append(memory.read(entry & ~0xFFF, 4))
    assert counts in ([5, 5], [5, 4])


@EVERY
@pytest.mark.parametrize("mode", (*UNMODIFIED, SHADOWED))
def test_every_benchmark_runs_in_every_mode(benchmark: Benchmark, mode: str) -> None:
    """Measured as it is measured, by the host's clock, it comes to its own end, a few iterations or none."""
    for iterations in (0, 1) if benchmark.once else (0, 3):
        taken, _exits = run_in(images.image_of(benchmark), mode, iterations)
        assert taken > 0


@EVERY
def test_every_benchmark_runs_on_qemu(benchmark: Benchmark, tmp_path: Path) -> None:
    """The same image ends in the same way on QEMU."""
    require("qemu-system-i386")
    sample = Qemu(tmp_path).sample(benchmark, 2)
    assert not sample.failure


@EVERY
def test_the_boot_disk_starts_the_image(benchmark: Benchmark, tmp_path: Path) -> None:
    """Where there is no multiboot loader the disk brings the guest to its end, too, with all its bytes."""
    path = tmp_path / "disk"
    path.write_bytes(disk(images.with_iterations(images.image_of(benchmark), 2)))
    command = (require("qemu-system-i386"), *Qemu.MACHINE, "-drive", f"file={path},format=raw")
    assert subprocess.run(command, timeout=20).returncode == Qemu.DONE


def test_an_emulator_that_is_not_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without QEMU or Bochs the table has dashes, and says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "Debian: qemu-system-x86" in (Qemu(tmp_path).absent(EMPTY) or "")
    assert "Debian: bochs" in (Bochs(tmp_path).absent(EMPTY) or "")


def test_an_emulator_that_ends_otherwise_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the guest's own end is a measurement."""
    for name in ("qemu-system-i386", "bochs-bin", "bochs"):
        (tmp_path / name).write_text("#!/bin/sh\necho '[X] it broke'\nexit 7\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(bochs, "_rom", lambda names: Path(names[0]))
    assert Qemu(tmp_path).sample(EMPTY, 2).failure == "QEMU ended with status 7"
    assert Bochs(tmp_path).sample(EMPTY, 2).failure == "Bochs ended with status 7: [X] it broke"


@EVERY
def test_no_iteration_is_no_operation(benchmark: Benchmark) -> None:
    """With a count of zero the guest goes straight to its end."""
    found = count_in(images.image_of(benchmark), "native", 0)
    assert not set(EXITS.get(benchmark.name, {})) & (set(found) - {"OUT", "IN"})


def test_memory_is_what_the_loops_leave() -> None:
    """The stores of the copy, of the page table and of the processes all arrive."""
    copied = images.image_of(BENCHMARKS["copy"])
    vm = VirtualMachine(images.with_iterations(copied, 1), memory=images.MEMORY)
    source, target = copied.symbols["source"], copied.symbols["target"]
    vm.machine.memory.load(source, b"abcd" * 1024)
    vm.run()
    assert bytes(vm.machine.memory.bytes[target : target + 4096]) == b"abcd" * 1024

    for name, entry in (("pte", 3), ("pte-absent", 0)):
        table = images.image_of(BENCHMARKS[name]).symbols["changing"]
        for iterations, frame in ((1, 0x801000), (2, 0x800000)):
            assert {e & ~0x60 for e in words(run(BENCHMARKS[name], iterations), table, 1024)} == {
                frame | entry
            }

    vm = run(BENCHMARKS["switch"], 5)
    frames = [words(vm, 0x800000 + i * 0x1000, 1)[0] for i in range(16)]
    assert frames == [5] * 16 or frames == [5] * 8 + [4] * 8


def test_a_process_switch_changes_the_address_space_and_the_stack() -> None:
    """After the benchmark both directories, and both stacks, have been in use."""
    benchmark = BENCHMARKS["switch"]
    symbols = images.image_of(benchmark).symbols
    seen = set()
    for iterations in (2, 3):
        vm = run(benchmark, iterations)
        seen.add((vm.machine.state.cr3 - symbols["directories"], words(vm, symbols["tss"] + 4, 1)[0]))
    assert seen == {(0, symbols["stacks"] + 0x1000)}  # the first process ends it, back on its own
    assert set(words(run(benchmark, 2), symbols["saved"], 2)) & {symbols["stacks"] + 0x1000 - 52}


@pytest.mark.parametrize("seed", range(3))
def test_generated_code_is_so_many_instructions(seed: int) -> None:
    """The generator's number is the decoder's, nothing invalid is among them, and the same seed is the same code."""
    code = images.generated(500, seed)
    decoded = list(Decoder(32, code))
    assert len(decoded) == 500 and not any(i.is_invalid for i in decoded)
    assert sum(i.len for i in decoded) == len(code)
    assert images.generated.__wrapped__(500, seed) == code


def test_generated_code_is_executed_whole_and_once() -> None:
    """One iteration of the translation benchmark executes each generated instruction, and preserves ESP."""
    benchmark = BENCHMARKS["translate"]
    none, one = run(benchmark, 0), run(benchmark, 1)
    # Besides them, the jumps to the code and out of it, and the loop's two instructions.
    assert one.machine.retired() - none.machine.retired() == TRANSLATED + 4
    assert one.machine.state.esp == none.machine.state.esp


# Bare Unicorn


@pytest.mark.parametrize("benchmark", [b for b in BENCHMARKS.values() if b.bare], ids=lambda b: b.name)
def test_bare_unicorn_runs_the_same_loop(benchmark: Benchmark) -> None:
    """From `measure` to `finish`, with registers as the bare machine has them at its end."""
    image = images.with_iterations(images.image_of(benchmark), 3)
    uc = baseline.paged(image)
    uc.emu_start(image.symbols["measure"], 0)
    assert uc.reg_read(X.UC_X86_REG_EIP) == image.symbols["finish"]
    assert uc.reg_read(X.UC_X86_REG_EBP) == 0
    assert uc.reg_read(X.UC_X86_REG_ESP) == image.symbols["stack_top"]


def test_bare_unicorn_has_the_tables_of_the_monitors() -> None:
    """A page is executable or writable, never both."""
    image = images.image_of(EMPTY)
    code, data = image.symbols["measure"], image.symbols["iterations"]
    store = bytes.fromhex("8900 90")  # mov [eax], eax
    for address, allowed in ((code, False), (data, True)):
        uc = baseline.paged(image)
        uc.mem_write(code, store)
        uc.reg_write(X.UC_X86_REG_EAX, address)
        if allowed:
            uc.emu_start(code, 0, count=1)
        else:
            with pytest.raises(UcError):
                uc.emu_start(code, 0, count=1)
    uc = baseline.paged(image)
    with pytest.raises(UcError):
        uc.emu_start(data, 0, count=1)


def test_bare_unicorn_can_have_them_without_nx() -> None:
    """Then what is written may be executed: the slow way, for comparison."""
    image = images.image_of(EMPTY)
    data = image.symbols["iterations"]
    uc = baseline.paged(image, executable=True)
    uc.mem_write(data, b"\x40\x90")  # inc eax
    uc.emu_start(data, 0, count=1)
    assert uc.reg_read(X.UC_X86_REG_EAX) == 1


# Measuring


def guest(text: str) -> Image:
    """A guest with what the harness needs."""
    source = f"bits 32\norg 0x100000\n{text}\nsection .data align=4096\niterations: dd 1\n"
    return from_assembly("guest", assemble_text(source, "guest"))


def test_a_guest_that_does_not_end_itself_is_a_failure_with_its_reason() -> None:
    """A halt or a triple fault is not a measurement."""
    with pytest.raises(Failed, match="halted with interrupts off"):
        run_in(guest("cli\nhlt"), "native", 1)
    with pytest.raises(Failed, match="triple fault"):
        run_in(guest("ud2"), "native", 1)


def test_exits_are_a_slope() -> None:
    """What happens once is not counted, what happens in every iteration is."""
    assert exits(lambda n: {"once": 7, "each": 3 * n, "late": 1}, 10, False) == {"each": 3}
    assert exits(lambda n: {"each": 12 * n}, 1, True) == {"each": 12}


def test_time_is_a_slope() -> None:
    """A constant start does not count, nor does a run that was disturbed."""
    noise = iter((9, 0.5, 0, 0, 0, 0.25, 0))
    sample = timed(lambda n: 2.0 + n * 0.001 + next(noise), 1600, False)
    assert (sample.few, sample.many) == (100, 1600)
    found = Results()
    found.add(EMPTY, "native", sample)
    found.add(EMPTY, "native", Sample(100, 5.0, 1600, 6.0))  # a slower process, with a smaller difference
    assert found.seconds(EMPTY, "native") == pytest.approx(0.001)


def test_what_cannot_be_told_from_noise_is_no_figure() -> None:
    """A long run that took less than a short one measures nothing."""
    found = Results()
    found.add(EMPTY, "native", Sample(0, 1.0, 10, 0.9))
    assert found.seconds(EMPTY, "native") is None


def test_the_number_of_iterations_is_part_of_the_image() -> None:
    """Changing it changes four bytes and nothing else, and a definition sets it, too."""
    image = images.image_of(EMPTY)
    changed = images.with_iterations(image, 0x12345678)
    (a, b) = (next(s for s in i.segments if s.address == 0x100000).data for i in (image, changed))
    at = image.symbols["iterations"] - 0x100000
    assert b[at : at + 4] == bytes.fromhex("78563412")
    assert a[:at] + a[at + 4 :] == b[:at] + b[at + 4 :]
    text = EMPTY.path.read_text()
    defined = assemble_text(text, "empty", {"N": "77"}, folder=ROOT)
    assert struct.unpack_from("<I", defined.data, at) == (77,)


# Judging


def results(**seconds: float) -> Results:
    exits = {"INT 0x80": 8.0, FILL: 80.0, "hidden fault: x": 4.0, DELIVERY: 8.0}
    found = Results()
    for column, value in seconds.items():
        found.add(
            BENCHMARKS["call"],
            column,
            Sample(0, 1.0, 100, 1.0 + 100 * value, exits),
        )
    return found


def test_an_operation_is_the_best_sample_without_the_loop() -> None:
    """The least of the samples, less the least of the empty loop, divided among the operations."""
    found = Results()
    found.add(BENCHMARKS["call"], "native", Sample(0, 0.0, 1, 90.0))
    found.add(BENCHMARKS["call"], "native", Sample(0, 0.0, 1, 88.0))
    found.add(EMPTY, "native", Sample(0, 0.0, 1, 8.0))
    found.add(EMPTY, "native", Sample(0, 0.0, 1, 9.0))
    assert found.seconds(BENCHMARKS["call"], "native") == 10.0
    assert found.seconds(EMPTY, "native") == 8.0


def test_limits_judge_the_mode_they_are_for() -> None:
    """Ratios, exits by reason, and rates: kept, not kept, or nothing to judge."""
    call = BENCHMARKS["call"]
    found = results(bt=40.0, bare=20.0, qemu=16.0, executable=120.0)
    assert judge(found, call, AtMostTimes(2.5, "bare"), "bt").kept is True
    assert judge(found, call, AtMostTimes(2.4, "qemu"), "bt").kept is False
    assert judge(found, call, AtLeastFaster(3, "executable"), "bt").kept is True
    assert judge(found, call, AtLeastFaster(3.1, "executable"), "bt").kept is False
    assert judge(found, call, AtMostExits(1.5), "bt").kept is True
    assert (
        judge(found, call, AtMostExits(1), "bt").kept is False
    )  # the hidden fault is an exit, the TLB fill is not
    assert judge(found, call, AtMostExits(0.5, "hidden"), "bt").kept is True
    assert judge(found, call, AtMostExits(0), "bt").kept is False
    assert judge(found, call, AtMostExits(0, "delivery"), "bt").kept is False
    assert judge(found, call, AtMostExits(2, "delivery"), "bt").kept is True
    assert judge(found, call, AtLeastRate(0.2), "bt").kept is True
    assert judge(found, call, AtLeastRate(0.3), "bt").kept is False
    assert judge(results(bare=1.0), call, AtMostTimes(2.5, "bare"), "bt").kept is None


def limits_of(mode: str) -> set[tuple[str, str]]:
    return {
        (name, judge(Results(), BENCHMARKS[name], limit, mode).limit)
        for name, limits in LIMITS[mode].items()
        for limit in limits
    }


def test_every_limit_of_the_project_is_in_the_table() -> None:
    """The rows that have a limit have the one that was agreed on."""
    same = "<= 1.1 x bare Unicorn, same NX tables"
    assert limits_of("bt") >= {
        ("compute", same), ("memory", same), ("copy", same), ("call", "<= 2.5 x bare Unicorn, same NX tables"),
        ("cli", "no exits"), ("cli", "<= 2 x QEMU"), ("pushf", "no exits"), ("pushf", "<= 2 x QEMU"),
        ("pte", "<= 1/1,024 hidden faults"), ("syscall", "<= 1 exits"), ("switch", "<= 3 exits"),
        ("translate", ">= 100,000 a second"),
    }  # fmt: skip
    native, several = "<= 1.2 x native", ">= 3 times as fast as bare Unicorn, executable pages"
    alike = ("compute", "memory", "call", "cli", "pushf", "pte", "pte-absent", "pte-flush", "pte-invlpg")
    assert limits_of("hvm") >= {
        *((name, native) for name in alike), ("memory", several), ("call", several),
        ("cr3", "no exits"), ("pte-invlpg", "no exits"), ("syscall", "<= 1 exits"),
        *((name, "<= 1 deliveries in Python") for name in ("syscall", "fault", "divide")),
        ("interrupt", "no deliveries in Python"),
    }  # fmt: skip
    assert limits_of("pv") >= {
        ("syscall", "<= 1 exits"), ("pte-batch", "<= 1/64 exits"), ("switch", "<= 1 hypercalls"),
    }  # fmt: skip


# Showing


def test_the_tables_say_the_same_in_both_forms(tmp_path: Path) -> None:
    """A dash has its reason below; Markdown and the terminal show the same cells."""
    call = BENCHMARKS["call"]
    found = results(bare=8e-8, native=8e-7)
    found.add(call, "bt", Sample(failure="it would not at EIP 0x1234: use another"))
    found.add(EMPTY, "bt", Sample(failure="it would not at EIP 0x4: use another"))
    machines = columns(tmp_path)
    grid = report.times(found, [call], machines)
    assert grid.rows[0][:3] == ("CALL and RET", "10.0", "100")
    assert f"| {' | '.join(grid.rows[0])} |" in grid.markdown()
    notes = report.reasons(found, [EMPTY, call], machines)
    assert notes == ["bt: it would not: use another"]
    notes = report.reasons(found, [EMPTY, call, BENCHMARKS["in"]], machines)
    assert notes == ["bt, CALL and RET; empty loop: it would not: use another"]


def test_a_machine_that_is_not_there_has_no_column(tmp_path: Path) -> None:
    """Nothing is measured on it, so nothing is shown but the reason."""
    grid = report.times(results(native=8e-7, qemu=8e-8), [BENCHMARKS["call"]], columns(tmp_path, ("native",)))
    assert grid.headings == ("operation", "native", "QEMU TCG", "native / QEMU")


def test_the_limits_are_those_of_the_modes_that_were_measured() -> None:
    """A row for each limit, with its mode first."""
    grid = report.limits(results(hvm=1.0, native=2.0), [BENCHMARKS["call"]], ["native", "hvm"])
    assert [row[0] for row in grid.rows] == ["hvm"] * 3
    assert ("hvm", "CALL and RET", "<= 1.2 x native", "0.50", "yes") in grid.rows


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "tools.bench", *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_one_benchmark_alone_is_a_table_with_the_empty_loop() -> None:
    """`--only` measures what it names in every column, and prints Markdown if asked."""
    done = bench("nano", "--only", "in", "--modes", "native", "--rounds", "1", "--markdown")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows if row[0] in ("| empty loop", "| IN")] == ["| empty loop", "| IN"] * 2
    assert ["| IN", "1 IN |"] in rows


def test_a_name_that_does_not_exist_is_refused_with_those_that_do() -> None:
    """One error, status 2, and the names to choose from."""
    done = bench("nano", "--only", "nothing")
    assert done.returncode == 2
    assert "syscall" in done.stderr and "Traceback" not in done.stderr


def test_the_guests_can_be_had_as_files(tmp_path: Path) -> None:
    """`--write` leaves ELF files that load as the images do."""
    assert bench("nano", "--only", "syscall", "--write", str(tmp_path)).returncode == 0
    image = load_image(tmp_path / "syscall.elf", memory=images.MEMORY)

    def contents(segments: tuple[Segment, ...]) -> list[tuple[int, bytes]]:
        return [(s.address, s.data) for s in segments if s.address >= 0x100000]

    assert contents(image.segments) == contents(images.image_of(BENCHMARKS["syscall"]).segments)


def test_a_profile_says_where_the_time_goes() -> None:
    """The handler of the operation's exit is in the profile, called once an operation."""
    stats = profile.profile(images.image_of(BENCHMARKS["in"]), "native", 200)
    rows = profile.grid(stats, "IN", 200, top=1000).rows
    assert next(calls for name, calls, *_ in rows if name.endswith(" on_in")) == "1.00"


def test_sample_of_bare_unicorn_has_no_exits() -> None:
    """There is no monitor to count them."""
    for name in (BARE, EXECUTABLE):
        assert results(**{name: 1.0}).exits(BENCHMARKS["call"], name) is None


# Adams and Agesen's own table


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ({"native": 9.0, "bt": 26.0, "hvm": 9.5}, "native = hvm < bt"),
        ({"native": 100.0, "bt": 90.0}, "native = bt"),
        ({"native": 1.0, "bt": 100.0, "hvm": 10.0}, "native < hvm < bt"),
        ({"native": 1.0}, "native"),
        ({}, ""),
    ],
)
def test_an_order_takes_what_is_close_for_equal(figures: dict[str, float], text: str) -> None:
    """From the least to the greatest; what a busy host could have done is no difference."""
    assert adams_agesen.order(figures) == text


def test_what_adams_and_agesen_published_is_in_the_order_that_is_said() -> None:
    """Each order in the table follows from the figures beside it."""
    for row in adams_agesen.TABLE:
        digits = [re.sub(r"\D", "", cycles) for cycles in row.cycles]
        if all(digits):
            figures = dict(zip(adams_agesen.OURS, map(float, digits), strict=True))
            assert adams_agesen.order(figures) == row.order


def test_the_page_on_adams_and_agesen_is_from_a_run() -> None:
    """Its table has our rows and the published figures, and a reason for each NO."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "adams-agesen.md").read_text()
    adams_agesen.replaced(page, Grid("", ()))
    text = page.partition(adams_agesen.START)[2].partition(adams_agesen.END)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ") and "---" not in line
    ][1:]
    assert [row[0] for row in rows] == [published.title for published in adams_agesen.TABLE]
    for row, published in zip(rows, adams_agesen.TABLE, strict=True):
        assert row[1:4] == [cycles or "-" for cycles in published.cycles]
        assert row[-1] in ("yes", "NO", "-")
        assert row[-1] != "NO" or f"- **{published.title[0].upper()}{published.title[1:]}.**" in page


def test_a_page_without_a_place_for_the_table_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured, in one line."""
    page = tmp_path / "page.md"
    page.write_text("nothing")
    for path, why in ((page, "no <!-- from a run -->"), (tmp_path / "absent.md", "No such file")):
        with pytest.raises(SystemExit):
            parse(["--adams-agesen", str(path)])
        assert why in capsys.readouterr().err


def test_the_table_of_a_run_has_the_modes_that_were_measured() -> None:
    """Modes without a figure have no column, and the orders are compared among those that have one."""
    results = Results()
    for row in adams_agesen.TABLE:
        for mode, seconds in (("native", 1e-6), ("bt", 4e-6)):
            benchmark = BENCHMARKS[row.benchmark]
            results.add(benchmark, mode, Sample(0, 0.0, 1000, seconds * 1000 * benchmark.operations))
    grid = adams_agesen.grid(results)
    assert grid.headings[4:6] == ("native, ns", "bt, ns") and "hvm, ns" not in grid.headings
    assert {row[0]: row[-1] for row in grid.rows}["CALL and RET"] == "yes"
    assert {row[0]: row[-1] for row in grid.rows}["IN"] == "NO"
