"""The command as a process of its own: signals, pipes, terminals, what it imports."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import IO

import pytest

from tests.guest_expectations import GUESTS
from tests.test_cli import EXIT_5, FLOOD, SPIN
from vmm.cli import status
from vmm.errors import Interrupted, OutputError

PATIENCE = 30  # seconds until a hanging test gives up


def start(*words: str | Path, stdout: int | None = None) -> subprocess.Popen[bytes]:
    """`python -m vmm` with these words, standard error piped."""
    return subprocess.Popen(
        [sys.executable, "-m", "vmm", *map(str, words)],
        stderr=subprocess.PIPE,
        cwd=GUESTS.parent,
        # A test run in the background of a shell ignores SIGINT, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=stdout,
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The status and standard error of a process that has to end now."""
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    text = errors.decode()
    assert "Traceback" not in text and "Exception" not in text
    return process.returncode, text


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    return tmp_path / "guest.bin"


def wait_for(process: subprocess.Popen[bytes]) -> None:
    """Until the guest is about to run: its process has put the signals aside for a thread that waits for them."""
    deadline = time.monotonic() + PATIENCE
    while not blocked_signals(process.pid) >> signal.SIGTERM - 1 & 1:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)


def blocked_signals(pid: int) -> int:
    """Of a process's first thread; bit n is signal n + 1."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("SigBlk:")[2].split()[0], 16)


def wait_until_full(pipe: IO[bytes]) -> None:
    """Until nobody has written to the pipe for a while."""
    held = [-1, 0]
    while held[-1] == 0 or held[-1] != held[-2]:
        time.sleep(0.5)
        held.append(int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder))
        assert len(held) < 2 * PATIENCE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_spinning_guest_in_order(guest: Path, tmp_path: Path, number: int) -> None:
    """Ctrl-C and SIGTERM stop a guest that never comes back to us; the report is written."""
    guest.write_bytes(SPIN)
    report = tmp_path / "report"
    process = start("run", guest, "--report", report)
    wait_for(process)
    process.send_signal(number)
    code, errors = finish(process)
    assert code == Interrupted.status
    assert "interrupted; status 130" in errors
    assert '"kind": "interrupted"' in report.read_text()


def test_the_second_ctrl_c_ends_the_process_at_once(guest: Path, tmp_path: Path) -> None:
    """A run that cannot hear the first Ctrl-C, because nobody reads its output, dies of the second."""
    guest.write_bytes(FLOOD)
    trace = tmp_path / "trace"
    process = start("run", guest, "--trace", trace, stdout=subprocess.PIPE)
    wait_for(process)
    assert process.stdout is not None
    wait_until_full(process.stdout)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == Interrupted.status
    process.stdout.close()
    finish(process)


def test_ctrl_c_ends_a_comparison(guest: Path) -> None:
    """`compare` hears Ctrl-C whatever the guest does."""
    guest.write_bytes(SPIN)
    process = start("compare", guest, "--max-instructions", "1000000000000")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (Interrupted.status, "vmm: interrupted\n")


def test_a_reader_that_has_seen_enough_is_no_error(guest: Path) -> None:
    """`vmm run flood | head -c 10` ends soon and says nothing."""
    guest.write_bytes(FLOOD)
    process = start("run", guest, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(10) == b"A" * 10
    process.stdout.close()
    assert finish(process) == (OutputError.status, "")


def test_a_reader_of_a_table_may_leave_too() -> None:
    """`vmm classify --census | true` says nothing."""
    process = start("classify", "guests/popf.asm", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert finish(process) == (OutputError.status, "")


@pytest.mark.parametrize("words", [("run", "guests/hello.asm"), ("classify", "--bytes", "90", "--json")])
def test_standard_output_that_fails_is_told_in_one_line(words: tuple[str, ...]) -> None:
    """A full disk below standard output is one line and a status."""
    with open("/dev/full", "wb") as full:
        process = start(*words, stdout=full.fileno())
    expected = "vmm: standard output: No space left on device\n"
    assert finish(process) == (OutputError.status, expected)


def test_a_closed_standard_output_is_told_in_one_line() -> None:
    """`vmm run guest >&-` says why it does not run."""
    command = f"exec {sys.executable} -m vmm run guests/hello.asm >&-"
    process = subprocess.Popen(["sh", "-c", command], stderr=subprocess.PIPE, cwd=GUESTS.parent)
    code, errors = finish(process)
    assert code == OutputError.status
    assert errors.startswith("vmm: standard output is closed") and errors.count("\n") == 1


def test_a_report_that_cannot_be_written_in_the_end_is_told(guest: Path) -> None:
    """A disk that fills up under the report costs the report, not the run's console."""
    guest.write_bytes(bytes.fromhex("b041 e6e9") + EXIT_5)
    process = start("run", guest, "--report", "/dev/full", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read() == b"A"
    assert finish(process) == (OutputError.status, "vmm: --report /dev/full: No space left on device\n")


def on_terminal(*words: str | Path, seconds: float = PATIENCE, **environment: str) -> tuple[bytes, int]:
    """What a terminal gets, and the status, of `vmm`; Ctrl-C is typed after `seconds`."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.chdir(GUESTS.parent)
        variables = {**os.environ, "TERM": "xterm", **environment}
        os.execve(sys.executable, [sys.executable, "-m", "vmm", *map(str, words)], variables)
    seen = bytearray()
    begun, typed = time.monotonic(), False
    while time.monotonic() < begun + PATIENCE:
        if not typed and time.monotonic() > begun + seconds:
            os.write(terminal, b"\x03")
            typed = True
        if select.select([terminal], [], [], 0.05)[0]:
            try:
                data = os.read(terminal, 1 << 16)
            except OSError:  # Linux's way to say that the other side is gone
                break
            if not data:
                break
            seen += data
    os.close(terminal)
    return bytes(seen), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_long_run_shows_progress_on_a_terminal_and_wipes_it(guest: Path) -> None:
    """After a second a line says how far the run is; Ctrl-C ends it and leaves the terminal clean."""
    guest.write_bytes(SPIN)
    seen, code = on_terminal("run", guest, seconds=2.5)
    assert code == Interrupted.status
    assert b" instructions, 1 s" in seen
    drawn, _, rest = seen.rpartition(b"\r\x1b[K")
    assert drawn and rest.startswith(b"vmm: ") and rest.count(b"\n") == 1


def test_a_short_run_shows_no_progress() -> None:
    """The terminal gets the console, the table and the line; nothing is drawn over."""
    seen, code = on_terminal("run", "guests/hello.asm")
    assert code == 1
    assert seen.startswith(b"Hello from the guest.\r\n")
    assert b"\x1b[K" not in seen


@pytest.mark.parametrize("words", [("run", "guests/hello.asm"), ("compare", "guests/hello.asm")])
def test_no_color_means_no_escapes(words: tuple[str, ...]) -> None:
    """A terminal gets colours, and with NO_COLOR plain text."""
    assert b"\x1b[" in on_terminal(*words)[0]
    assert b"\x1b" not in on_terminal(*words, NO_COLOR="1")[0]


def test_a_run_imports_nothing_that_it_does_not_need(guest: Path) -> None:
    """Before the first instruction of a flat guest nothing is loaded for sources, ELFs, tables or JSON."""
    guest.write_bytes(EXIT_5)
    spy = f"""
import sys
from vmm.cli.main import main
from vmm.vm import VirtualMachine
run = VirtualMachine.run
def spy(self, *bounds):
    print(*sys.modules, file=sys.stderr)
    return run(self, *bounds)
VirtualMachine.run = spy
sys.exit(main(["run", {str(guest)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", spy], stderr=subprocess.PIPE, cwd=GUESTS.parent)
    code, errors = finish(process)
    assert code == 11
    loaded = set(errors.splitlines()[0].split())
    unneeded = {"keystone", "elftools", "rich", "json", "hashlib", "capstone", "vmm.isa.classification"}
    unneeded |= {
        "vmm.image.asm",
        "vmm.image.elf",
        "vmm.monitor.trap.monitor",
        "vmm.comparison",
        "vmm.cli.exits",
    }
    assert "unicorn" in loaded and not loaded & unneeded


def test_every_status_is_even_but_the_guests(guest: Path) -> None:
    """The process's status is what main returns."""
    guest.write_bytes(SPIN)
    process = start("run", guest, "--max-instructions", "10")
    assert finish(process)[0] == status.BUDGET


def test_a_signal_that_comes_at_the_end_of_a_run_does_not_kill(guest: Path) -> None:
    """One that nobody has taken when the run is over is forgotten: the process ends as the run did."""
    guest.write_bytes(EXIT_5)
    program = f"""
import os, signal, sys
from vmm.cli.main import main
from vmm.cli.session import Session
run = Session.run
def late(self):
    result = run(self)
    for number in (signal.SIGTERM, signal.SIGHUP):
        for _ in range(20):
            os.kill(os.getpid(), number)
    return result
Session.run = late
sys.exit(main(["run", {str(guest)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, cwd=GUESTS.parent)
    assert finish(process)[0] in (11, Interrupted.status)
