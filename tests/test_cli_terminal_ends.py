"""How a run on a terminal ends: by whatever there is, and each time the terminal is left as it was."""

from __future__ import annotations

import os
import shutil
import signal
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest_expectations import GUESTS
from tests.terminals import ECHO, PATIENCE, POLLED_ECHO, READY, SERIAL_FLOOD, Start, terminals
from tests.test_cli import EXIT_5, FLOOD, HALT, SPIN, V86, WILD
from tests.test_disk_guest import SECTORS, writer
from vmm.cli import status
from vmm.errors import Interrupted, OutputError, VmmError
from vmm.machine.devices.disk import SECTOR, FileDisk
from vmm.vm import UNMODIFIED


@pytest.fixture
def start() -> Iterator[Start]:
    with terminals() as begin:
        yield begin


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    return tmp_path / "guest.bin"


@pytest.mark.parametrize("code", [FLOOD, SERIAL_FLOOD], ids=["debug console", "serial port"])
@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_a_flood_is_left_at_once(start: Start, guest: Path, mode: str, code: bytes) -> None:
    """A guest that writes without end, interrupts off, hears Ctrl-A x."""
    guest.write_bytes(code)
    terminal = start("run", "-i", guest, "--mode", mode)
    terminal.until(b"A" * 500)
    begun = time.monotonic()
    terminal.type(b"\x01x")
    assert terminal.end()[0] == status.OK
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("code", [FLOOD, SERIAL_FLOOD], ids=["debug console", "serial port"])
@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_without_i_ctrl_c_ends_a_flood(start: Start, guest: Path, mode: str, code: bytes) -> None:
    """Not interactive, the terminal is the user's: its Ctrl-C is a signal, and ends the run."""
    guest.write_bytes(code)
    terminal = start("run", guest, "--mode", mode)
    terminal.until(b"A" * 500)
    terminal.type(b"\x03")
    assert terminal.end()[0] == Interrupted.status


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_ctrl_c_is_the_guest_s_where_the_terminal_is(start: Start, guest: Path, mode: str) -> None:
    """In raw mode it is a byte, which even a guest that never sleeps gets; SIGINT from elsewhere ends the run."""
    guest.write_bytes(POLLED_ECHO)
    terminal = start("run", "-i", guest, "--mode", mode)
    terminal.until(b"helps\r\n")
    terminal.type(b"a\x03b")
    terminal.until(b"a\x03b")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end()[0] == Interrupted.status


# Writes lines without end: a hypercall each.
DOMAIN = """
bits 32
org 0x100000
%include "include/pc.inc"
%include "include/xen.inc"
section .text
start:  mov esp, stack_top
        call serial_setup
.again: println 'again'
        jmp .again
%include "include/serial.inc"
section .bss
        resb 1024
stack_top:
"""


@pytest.mark.parametrize("keys", [b"\x03", b"\x01x"], ids=["Ctrl-C", "Ctrl-A x"])
def test_a_domain_of_xens_is_left_too(start: Start, guest: Path, keys: bytes) -> None:
    """Under `pv` a flood of hypercalls hears either."""
    source = guest.with_suffix(".asm")
    source.write_text(DOMAIN)
    shutil.copytree(GUESTS / "include", guest.with_name("include"))
    terminal = start("run", *(["-i"] if keys == b"\x01x" else []), source, "--mode", "pv")
    terminal.until(b"again\r\n" * 20)
    terminal.type(keys)
    assert terminal.end()[0] == (status.OK if keys == b"\x01x" else Interrupted.status)


def test_a_terminal_that_takes_no_output_can_be_left(start: Start, guest: Path) -> None:
    """Where nobody reads what a flood writes the second Ctrl-A x ends the process at once."""
    guest.write_bytes(SERIAL_FLOOD)
    terminal = start("run", "-i", guest)
    terminal.until(b"A" * 100)
    time.sleep(1.5)  # until the terminal is full
    terminal.type(b"\x01x")
    time.sleep(0.3)
    assert terminal.process.poll() is None
    terminal.type(b"\x01x")
    assert terminal.process.wait(PATIENCE) == Interrupted.status
    assert terminal.is_restored()


@pytest.mark.parametrize(
    ("code", "words", "wanted"),
    [
        (EXIT_5, [], 11),
        (HALT, [], status.OK),
        (V86, ["--mode", "bt"], 6),
        (WILD, [], status.TRIPLE_FAULT),
        (SPIN, ["--max-instructions", "1000"], status.BUDGET),
        (SPIN, ["--timeout", "0.2"], status.TIMEOUT),
        (SPIN, ["--mode", "pv"], 2),
        (SPIN, ["--report", "/dev/full", "--timeout", "0.1"], 74),
    ],
    ids=["exit", "halt", "error", "triple fault", "budget", "timeout", "image", "output"],
)
def test_every_end_restores_the_terminal(
    start: Start, guest: Path, code: bytes, words: list[str], wanted: int
) -> None:
    """However the run ends, the terminal is as it was."""
    guest.write_bytes(code)
    assert start("run", "-i", guest, *words).end()[0] == wanted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
@pytest.mark.parametrize("where", ["guest", "prompt"])
def test_signals_restore_the_terminal(start: Start, number: int, where: str) -> None:
    """A signal from elsewhere ends the run in order, while the guest runs and at the prompt."""
    terminal = start("run", "-i", ECHO)
    terminal.until(READY)
    if where == "prompt":
        terminal.type(b"\x01c")
        terminal.until(b"(vmm) ")
    terminal.process.send_signal(number)
    assert terminal.end()[0] == Interrupted.status


@pytest.mark.parametrize("guest_is", ["asleep", "flooding", "at the prompt", "not on it"])
def test_a_terminal_that_goes_away_ends_the_run(start: Start, guest: Path, guest_is: str) -> None:
    """The other side hangs up: one line, if anybody can still read it, and the status; the report is written."""
    guest.write_bytes(SERIAL_FLOOD)
    read, write = os.pipe()
    report = guest.with_name("report.json")
    floods, interactive = guest_is in ("flooding", "not on it"), guest_is != "not on it"
    name = guest if floods else ECHO
    terminal = start("run", *(["-i"] if interactive else []), name, "--report", report, stderr=write)
    os.close(write)
    terminal.until(b"A" * 9 if floods else READY)
    if guest_is == "at the prompt":
        terminal.type(b"\x01c")
        terminal.until(b"(vmm) ")
    os.close(terminal.slave)
    os.close(terminal.master)
    assert terminal.process.wait(PATIENCE) == Interrupted.status
    with os.fdopen(read, "rb") as errors:
        lines = errors.read().decode().splitlines()
    told = [line for line in lines if "Ctrl-A x leaves" not in line]
    assert told == [f"vmm: {name}, bt: the terminal went away"]
    assert report.stat().st_size


@pytest.mark.parametrize("changed", [False, True], ids=["left alone", "changed"])
def test_a_stopped_process_leaves_the_terminal_as_it_was(start: Start, changed: bool) -> None:
    """SIGTSTP gives the terminal back, SIGCONT takes it again, and the guest goes on; what was made of the terminal
    while the process stood still (by a shell, by `stty`) is how it was before."""
    terminal = start("run", "-i", ECHO)
    terminal.until(READY)
    raw = termios.tcgetattr(terminal.slave)
    assert raw != terminal.before
    terminal.process.send_signal(signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(terminal.process.pid, os.WUNTRACED)[1])
    assert terminal.is_restored()
    if changed:
        terminal.before[1] &= ~termios.ONLCR
        raw[1] &= ~termios.ONLCR
        termios.tcsetattr(terminal.slave, termios.TCSANOW, terminal.before)
    terminal.process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + PATIENCE
    while termios.tcgetattr(terminal.slave) != raw:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    terminal.type(b"quit\r")
    terminal.until(b"QUIT\rbye\n" if changed else b"QUIT\rbye\r\n")
    assert terminal.end()[0] == 1


def test_the_disk_is_whole_when_the_terminal_goes_away(start: Start, tmp_path: Path) -> None:
    """Amidst writes, each sector is as one write left it, nothing else has changed, and the file is free again."""
    disk = tmp_path / "disk.img"
    before = os.urandom(SECTORS * SECTOR)
    disk.write_bytes(before)
    read, write = os.pipe()
    terminal = start("run", "-i", writer(tmp_path, 1 << 30), "--disk", disk, stderr=write)
    os.close(write)
    deadline = time.monotonic() + PATIENCE
    while disk.read_bytes()[: 8 * SECTOR] == before[: 8 * SECTOR]:
        assert time.monotonic() < deadline and terminal.process.poll() is None
    os.close(terminal.slave)
    os.close(terminal.master)
    assert terminal.process.wait(PATIENCE) == Interrupted.status
    os.close(read)
    after = disk.read_bytes()
    for at in range(0, 8 * SECTOR, SECTOR):  # filled with one byte, or not come to yet
        assert len(set(after[at : at + SECTOR])) == 1 or after[at : at + SECTOR] == before[at : at + SECTOR]
    assert after[8 * SECTOR :] == before[8 * SECTOR :]
    FileDisk(str(disk)).close()


def test_whoever_reads_the_output_may_leave(start: Start, guest: Path) -> None:
    """`vmm run -i flood | head -c 10`: standard output closes, the run ends, and so does the raw mode."""
    guest.write_bytes(SERIAL_FLOOD)
    read, write = os.pipe()
    terminal = start("run", "-i", guest, stdout=write)
    os.close(write)
    assert os.read(read, 10).startswith(b"A")
    os.close(read)
    assert terminal.end()[0] == OutputError.status


@pytest.mark.parametrize("bug", ["vmm.machine.machine.Machine.run", "vmm.cli.attendant.Attendant.keys"])
def test_a_bug_of_ours_leaves_the_terminal_as_it_was(start: Start, bug: str) -> None:
    """In the loop or in the thread that reads the keyboard: one line, and the shell has its terminal back."""
    where, _, name = bug.rpartition(".")
    module, _, thing = where.rpartition(".")
    program = f"""
import sys
import {module}
from vmm.cli.main import main
def broken(*_words, **_options):
    raise ZeroDivisionError("a bug")
{module}.{thing}.{name} = broken
sys.exit(main(sys.argv[1:]))
"""
    terminal = start("run", "-i", ECHO, program=("-c", program))
    terminal.until(b"helps\r\n")
    terminal.type(b"a")
    deadline = time.monotonic() + PATIENCE
    while terminal.process.poll() is None:
        assert time.monotonic() < deadline
        terminal.read(0.05)
    assert terminal.is_restored()
    terminal.until(b"vmm: internal error, please report it: ZeroDivisionError: a bug")
    assert terminal.process.returncode == VmmError.status


# Writes 10,000 lines of 15 letters, each line another one than the line before: cli; mov ecx, 10000; mov dx, 3f8;
# mov eax, ecx; and al, 15; add al, 'A'; 15 times out dx, al; mov al, 10; out; dec; jnz to the MOV; mov al, 0; out f4.
LINES = bytes.fromhex("fa b910270000 66baf803  89c8 240f 0441" + "ee" * 15 + "b00a ee 49 75e5 b000 e6f4")


@pytest.mark.parametrize("to", ["terminal", "pipe"])
def test_a_slow_reader_loses_nothing(start: Start, guest: Path, to: str) -> None:
    """The guest waits for whoever reads its output, through all the buffers in between."""
    guest.write_bytes(LINES)
    ours, theirs = os.pipe()
    others = {"stdout": theirs} if to == "pipe" else {"stderr": theirs}
    terminal = start("run", "-i", guest, "--mode", "native", **others)
    source, newline = (ours, b"\n") if to == "pipe" else (terminal.master, b"\r\n")
    expected = b"".join(b"%c" % (ord("A") + (line & 15)) * 15 + newline for line in range(10_000, 0, -1))
    output = b""
    deadline = time.monotonic() + 3 * PATIENCE
    while len(output) < len(expected):
        assert time.monotonic() < deadline
        output += os.read(source, 1 << 12)
        if len(output) < 1 << 16:
            time.sleep(0.02)
    assert output == expected
    assert terminal.end()[0] == 1
    os.close(ours)
    os.close(theirs)
