"""The benchmark of a whole Linux measures what it says; times are judged by `python -m tools.bench linux` alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.oracles import require, require_linux
from tools.bench import bochs
from tools.bench.linux import boot as boot_module
from tools.bench.linux import report, run
from tools.bench.linux.boot import Boot, Command, Failed, Moment, boot
from tools.bench.linux.machines import Bochs, Guest, Machine, Ours, Qemu, machines
from tools.bench.linux.results import DEFAULTS, LIMITS, LOOP_LINES, LOOPS, VARIANTS, WITH_LOOPS, Results

MIB = 1 << 20


def python(program: str, **files: Path) -> Command:
    """A process that stands for a machine."""
    return Command((sys.executable, "-u", "-c", program), **files)


def at(*processor: float, memory: int = 100 * MIB) -> Boot:
    return Boot(tuple(Moment(2 * seconds, seconds, memory) for seconds in processor))


def test_a_moment_is_when_its_line_came_with_what_the_processor_had_spent_and_peak_memory() -> None:
    """Waiting costs time on the wall alone, computing both; memory that was given back still counts."""
    taken = boot(
        python(
            "import time\n"
            "print('first')\n"
            "time.sleep(0.3)\n"
            "print('second')\n"
            "while time.process_time() < 0.5: pass\n"
            "held = b'x' * (64 << 20)\n"
            "del held\n"
            "print('third')\n"
            "time.sleep(100)\n"
        ),
        [b"first", b"second", b"third"],
    )
    first, second, third = taken.moments
    waited, computed = second.since(first), third.since(second)
    assert waited.wall >= 0.25 and waited.processor < 0.2
    assert computed.processor >= 0.2
    assert third.memory - second.memory >= 60 * MIB


def test_a_line_counts_only_after_the_one_before_it() -> None:
    """What was written before the line that comes first is not what is waited for."""
    taken = boot(
        python("import time\nprint('b a')\ntime.sleep(0.2)\nprint('b')\ntime.sleep(100)"), [b"a", b"b"]
    )
    assert taken.moments[1].since(taken.moments[0]).wall >= 0.15


def test_a_machine_that_ends_early_says_what_it_said_last() -> None:
    """The process's end is no measurement, and does not wait for the patience of a boot."""
    with pytest.raises(Failed, match="it ended without 'ready'; its last line: panic: no init"):
        boot(python("print('booting')\nprint('panic: no init')"), [b"ready"])


def test_a_machine_that_never_says_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor time that it has had, however long that takes on a busy host."""
    monkeypatch.setattr(boot_module, "PATIENCE", 0.3)
    with pytest.raises(Failed, match="no 'ready' within 0 s of the processor"):
        boot(python("print('booting')\nwhile True: pass"), [b"ready"])


def test_a_serial_port_can_be_a_fifo(tmp_path: Path) -> None:
    """Where standard output is not the serial port; and there, too, an end is noticed."""
    serial = tmp_path / "serial"
    writes = "import time, sys\nwith open(sys.argv[1], 'wb', 0) as f: f.write(b'ready')\n"
    command = Command((sys.executable, "-c", writes + "time.sleep(100)", str(serial)), serial=serial)
    assert len(boot(command, [b"ready"]).moments) == 1
    assert not serial.exists()
    with pytest.raises(Failed, match="it ended without 'never'; its last line: ready"):
        boot(Command((sys.executable, "-c", writes, str(serial)), serial=serial), [b"never"])


def test_a_machine_of_ours_is_asked_to_end_and_reports(tmp_path: Path) -> None:
    """Its exits come from its own report, which SIGTERM makes it write."""
    source = tmp_path / "guest.asm"
    source.write_text(
        "        org 0x100000\n"
        "start:  mov dx, 0x3f8\n"
        "        mov al, 'R'\n"
        "        out dx, al\n"
        ".spin:  jmp .spin\n"
    )
    path = tmp_path / "report.json"
    words = (sys.executable, "-m", "vmm", "run", str(source), "--mode", "native", "--report", str(path))
    taken = boot(Command(words, report=path), [b"R"])
    assert taken.report["outcome"] == {"kind": "interrupted", "status": 130, "detail": "interrupted"}
    assert taken.report["exits"]["OUT"]["count"] == 1  # type: ignore[index]


# Figures


def test_the_best_of_the_boots_counts_and_loops_are_by_themselves() -> None:
    """Least time, largest memory, each loop from its line to the next."""
    results = Results()
    results.add(DEFAULTS, "bt", at(9.0, memory=300 * MIB))
    results.add(DEFAULTS, "bt", at(8.0, memory=200 * MIB))
    results.add(WITH_LOOPS, "bt", at(5.0, 5.5, 7.5, 11.5, 14.5))
    ready = results.ready(DEFAULTS, "bt")
    assert ready is not None and (ready.processor, ready.wall) == (8.0, 16.0)
    assert results.memory(DEFAULTS, "bt") == 300 * MIB
    taken = [results.loop(name, "bt") for name in LOOPS]
    assert [moment.processor for moment in taken if moment] == [2.0, 4.0, 3.0]
    assert results.ready(DEFAULTS, "hvm") is None and results.loop("awk", "qemu") is None


def test_every_machine_has_a_row_with_its_ratio_to_qemu_of_the_same_variant() -> None:
    """And one that was not measured has none."""
    results = Results()
    for variant in VARIANTS:
        results.add(variant, "qemu", at(2.0))
        results.add(variant, "bt", at(5.0))
    rows = report.boots(results, machines()).rows
    assert [row[1] for row in rows] == ["QEMU TCG", "bt"] * len(VARIANTS)
    assert rows[1] == ("the kernel's defaults", "bt", "5.00", "2.50", "10.00", "2.50", "100")


def test_loops_are_a_table_beside_qemu() -> None:
    results = Results()
    results.add(WITH_LOOPS, "qemu", at(1.0, 1.5, 2.5, 3.5, 4.5))
    results.add(WITH_LOOPS, "hvm", at(1.0, 1.5, 3.5, 6.5, 8.5))
    assert report.loops(results, machines()).rows == [
        ("QEMU TCG", *["1.00"] * 6),
        ("hvm", "2.00", "2.00", "3.00", "3.00", "2.00", "2.00"),
    ]


def test_the_exits_that_cost_most_come_first_and_three_are_named() -> None:
    """Those beyond a table's length are one row, and all are counted."""
    rows = {f"exit {n}": {"count": n, "seconds": n / 100} for n in range(1, 21)}
    results = Results()
    results.add(DEFAULTS, "bt", Boot((Moment(4.0, 4.0, MIB),), {"exits": rows, "seconds": 3.0}))
    grid, line = report.exits(results, DEFAULTS, Ours("bt"))
    assert grid is not None
    assert [row[0] for row in grid.rows[:2]] == ["exit 20", "exit 19"]
    assert grid.rows[-2:] == [
        ("8 others", "36", "10.00 ms", "360.00 ms", "17.1%"),
        ("all", "210", "10.00 ms", "2.10 s", "100.0%"),
    ]
    assert "exit 20 200.00 ms, exit 19 190.00 ms, exit 18 180.00 ms, together 27%" in line
    assert "2.1 of 3.0 s" in line
    assert report.exits(results, DEFAULTS, Ours("hvm")) == (None, "")


def test_a_limit_is_judged_where_both_sides_were_measured() -> None:
    """Each by its own variants; what is kept and what is not says so."""
    results = Results()
    assert report.limits(results).rows == []
    results.add(DEFAULTS, "qemu", at(2.0))
    results.add(DEFAULTS, "hvm", at(6.0))
    results.add(DEFAULTS, "bt", at(9.0, memory=700 * MIB))
    rows = report.limits(results).rows
    assert ("hvm", "boot, times QEMU", "the kernel's defaults", "4", "3.00", "yes") in rows
    assert ("bt", "boot, times QEMU", "the kernel's defaults", "4", "4.50", "NO") in rows
    assert ("bt", "memory over the guest's, MB", "the kernel's defaults", "400", "572.0", "NO") in rows
    assert {limit.machine for limit in LIMITS} == {"native", "hvm", "hvm shadow", "bt"}


# Machines


def test_what_is_not_installed_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without QEMU, Bochs or its boot loader there are no figures, and a line says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "Debian: qemu-system-x86" in (Qemu().absent() or "")
    assert "Debian: bochs" in (Bochs().absent() or "")
    (tmp_path / "bochs").write_text("#!/bin/sh\n")
    (tmp_path / "bochs").chmod(0o755)
    monkeypatch.setattr(bochs, "_rom", lambda names: Path(names[0]))
    assert "Debian: xorriso, isolinux" in (Bochs().absent() or "")
    results = Results()
    guest = Guest(tmp_path / "vmlinuz", tmp_path / "initrd.gz")
    results = run.measure(guest, [Qemu()], [DEFAULTS], 2, False, False)
    assert report.reasons(results, machines()) == [
        "QEMU TCG, the kernel's defaults: qemu-system-i386 is not installed (Debian: qemu-system-x86)"
    ]


def test_without_a_kernel_the_command_says_how_to_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.parse(["--folder", str(tmp_path)])
    assert "make linux" in capsys.readouterr().err


def test_a_real_boot_is_measured_from_the_command_to_userspace_and_through_the_loops() -> None:
    """QEMU's boot has a moment for userspace and one for each line of the loops, one after the other."""
    require("qemu-system-i386")
    kernel, initrd = require_linux()
    machine: Machine = Qemu()
    started = time.perf_counter()
    taken = run.booted(Guest(kernel, initrd), machine, WITH_LOOPS, True)
    took = time.perf_counter() - started
    assert len(taken.moments) == 1 + len(LOOP_LINES)
    walls = [moment.wall for moment in taken.moments]
    assert walls == sorted(walls) and walls[-1] <= took
    assert all(moment.processor > 0 for moment in taken.moments)


def test_the_command_prints_tables() -> None:
    """`--help` names the machines and the variants."""
    done = subprocess.run(
        (sys.executable, "-m", "tools.bench", "linux", "--help"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "hvm shadow" in done.stdout and "mitigations=off" in done.stdout
