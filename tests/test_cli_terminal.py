"""`run --interactive` on a real terminal: keys, commands, the prompt, and a terminal that is left as it was."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest_expectations import GUESTS
from tests.test_cli import EXIT_5, FLOOD, SPIN, WILD
from vmm.cli import status
from vmm.cli.keyboard import Escapes
from vmm.errors import Interrupted
from vmm.vm import UNMODIFIED

PATIENCE = 10  # seconds until a hanging test gives up
ECHO = "guests/echo.asm"
READY = b"ends it\r\n"
# A flood of the serial port, interrupts off: cli; mov dx, 3f8; mov al, 'A'; out dx, al; jmp to the OUT.
SERIAL_FLOOD = bytes.fromhex("fa 66baf803 b041 ee ebfd")
# Reads the serial port, interrupts off, and sends each byte back: in al, 3fd; test 1; jz; in; out.
POLLED_ECHO = bytes.fromhex("fa 66bafd03 ec a801 74f6 66baf803 ec ee ebee")


class Session:
    """`python -m vmm` on a terminal of its own, in a session of its own, whose terminal it is."""

    def __init__(self, *words: str | Path, stderr: int | None = None) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""

        def lead() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            os.setsid()
            os.close(os.open(os.ttyname(0), os.O_RDWR))  # its controlling terminal

        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmm", *map(str, words)],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave if stderr is None else stderr,
            preexec_fn=lead,
            cwd=GUESTS.parent,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"},
        )

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def until(self, text: bytes) -> bytes:
        """What the terminal shows up to `text`, since the last time."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            self._read(0.1)
        before, _, self.seen = self.seen.partition(text)
        return before

    def pause(self) -> bytes:
        """Ctrl-A c while the guest sleeps in HLT: what the prompt says first."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self.type(b"\x01c")
            said = self.until(b"(vmm) ")
            if b"asleep in HLT" in said:
                return said
            assert time.monotonic() < deadline
            self.type(b"cont\r")
            self.until(b"cont\r\n")
            time.sleep(0.05)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        self.seen += os.read(self.master, 1 << 16)
        return True

    def end(self) -> tuple[int, bytes]:
        """The status, and what else the terminal has shown; the terminal has to be as it was."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen
            self._read(0.05)
        while self._read(0):
            pass
        assert termios.tcgetattr(self.slave) == self.before
        assert b"Traceback" not in self.seen and b"Exception" not in self.seen
        return self.process.returncode, self.seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for descriptor in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def start() -> Iterator[Callable[..., Session]]:
    sessions = []

    def begin(*words: str | Path, stderr: int | None = None) -> Session:
        sessions.append(Session(*words, stderr=stderr))
        return sessions[-1]

    yield begin
    for session in sessions:
        session.close()


Start = Callable[..., Session]


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    return tmp_path / "guest.bin"


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_keys_go_to_the_guest_as_they_are_typed(start: Start, mode: str) -> None:
    """A sleeping guest gets each key at once, without the terminal's own echo, and ends the run with its status."""
    session = start("run", "-i", ECHO, "--mode", mode)
    session.until(READY)
    for key, back in ((b"h", b"H"), (b"i", b"I"), (b"\x03", b"\x03"), (b"\x1a", b"\x1a"), (b"\r", b"\r")):
        session.type(key)
        assert session.until(back) == b""
    session.type(b"quit\r")
    assert session.until(b"bye\r\n") == b"QUIT\r"
    code, rest = session.end()
    assert code == 1
    assert b"exit by isa-debug-exit; status 1" in rest


@pytest.mark.parametrize("clock", ["host", "instructions"])
@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_a_guest_that_computes_gets_its_keys(start: Start, guest: Path, mode: str, clock: str) -> None:
    """So does one that never sleeps and has interrupts off, with either clock; Ctrl-A Ctrl-A is one Ctrl-A."""
    guest.write_bytes(POLLED_ECHO)
    session = start("run", "-i", guest, "--mode", mode, "--clock", clock)
    session.until(b"helps\r\n")
    session.type(b"abc\x01\x01d")
    session.until(b"abc\x01d")
    session.type(b"\x01x")
    code, rest = session.end()
    assert code == status.OK
    assert b"left by Ctrl-A x; status 0" in rest


def test_with_the_instruction_clock_a_guest_waits_for_keys(start: Start) -> None:
    """What sleeps for ever without a keyboard waits for one; and Ctrl-A h helps."""
    session = start("run", "-i", ECHO, "--clock", "instructions")
    session.until(READY)
    time.sleep(0.3)
    session.type(b"a")
    session.until(b"A")
    session.type(b"\x01h")
    session.until(b"Ctrl-A c       stop the guest")
    session.type(b"\x01x")
    assert session.end()[0] == status.OK


def test_ctrl_a_x_leaves_a_sleeping_guest(start: Start) -> None:
    """Status 0, one line, the terminal as it was."""
    session = start("run", "-i", ECHO)
    session.until(READY)
    session.type(b"\x01x")
    code, rest = session.end()
    assert code == status.OK
    assert b"left by Ctrl-A x; status 0" in rest


@pytest.mark.parametrize("code", [FLOOD, SERIAL_FLOOD], ids=["debug console", "serial port"])
@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_a_flood_is_left_at_once(start: Start, guest: Path, mode: str, code: bytes) -> None:
    """A guest that writes without end, interrupts off, hears Ctrl-A x."""
    guest.write_bytes(code)
    session = start("run", "-i", guest, "--mode", mode)
    session.until(b"A" * 500)
    begun = time.monotonic()
    session.type(b"\x01x")
    assert session.end()[0] == status.OK
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_without_i_ctrl_c_ends_a_flood(start: Start, guest: Path, mode: str) -> None:
    """Not interactive, the terminal is the user's: its Ctrl-C is a signal, and ends the run."""
    guest.write_bytes(SERIAL_FLOOD)
    session = start("run", guest, "--mode", mode)
    session.until(b"A" * 500)
    session.type(b"\x03")
    assert session.end()[0] == Interrupted.status


def test_a_terminal_that_takes_no_output_can_be_left(start: Start, guest: Path) -> None:
    """Where nobody reads what a flood writes the second Ctrl-A x ends the process at once."""
    guest.write_bytes(SERIAL_FLOOD)
    session = start("run", "-i", guest)
    session.until(b"A" * 100)
    time.sleep(1.5)  # until the terminal is full
    session.type(b"\x01x")
    time.sleep(0.3)
    assert session.process.poll() is None
    session.type(b"\x01x")
    assert session.process.wait(PATIENCE) == Interrupted.status
    assert termios.tcgetattr(session.slave) == session.before


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_the_prompt_answers_and_the_guest_goes_on(start: Start, mode: str) -> None:
    """Ctrl-A c stops at a boundary; each command answers; what is typed after `cont` is the guest's again."""
    session = start("run", "-i", ECHO, "--mode", mode)
    session.until(READY)
    assert b"jmp 0x" in session.pause()
    session.type(b"info registers\r")
    assert re.search(rb"eax    [0-9a-f]{8}.*\r\nflags: .*IF", session.until(b"(vmm) "), re.DOTALL)
    session.type(b"info exits\r")
    assert re.search(rb"OUT.* +\d+", session.until(b"(vmm) "))
    session.type(b"info mem\r")
    assert b"16,384 KiB of RAM\r\npaging off\r\neip 001" in session.until(b"(vmm) ")
    session.type(b"info mode\r")
    assert f"{mode}: ".encode() in session.until(b"(vmm) ")
    session.type(b"x /4b 0x100000\r")
    assert re.search(rb"00100000: bc( [0-9a-f]{2}){3}\r\n", session.until(b"(vmm) "))  # mov esp
    session.type(b"x /2i 0x100000\r")
    assert re.search(rb"mov esp, 0x.*\r\n.*call 0x", session.until(b"(vmm) "))
    session.type(b"x /1w $esp\rx 0x7ffffff0\r")
    session.until(b"\r\n(vmm) ")
    session.until(b"\r\n(vmm) ")
    session.type(b"typo\x7f\x7f\x7f\x7fcont\rok")
    assert session.until(b"OK") == b"typo" + b"\b \b" * 4 + b"cont\r\n"
    session.type(b"\rquit\r")
    session.until(b"bye\r\n")
    assert session.end()[0] == 1


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_the_prompt_steps(start: Start, guest: Path, mode: str) -> None:
    """`step N` executes so many instructions; a guest that ends in a step ends the run."""
    guest.write_bytes(SPIN)
    session = start("run", "-i", guest, "--mode", mode)
    session.until(b"helps\r\n")
    time.sleep(0.3)
    session.type(b"\x01c")
    session.until(b"00100001  jmp 0x100001\r\n(vmm) ")
    session.type(b"info mode\r")
    before = re.search(rb"([\d,]+) instructions", session.until(b"(vmm) "))
    session.type(b"step 7\r")
    session.until(b"00100001  jmp 0x100001\r\n(vmm) ")
    session.type(b"info mode\r")
    after = re.search(rb"([\d,]+) instructions", session.until(b"(vmm) "))
    assert before and after
    assert int(after[1].replace(b",", b"")) - int(before[1].replace(b",", b"")) == 7
    session.type(b"quit\r")
    code, rest = session.end()
    assert code == status.OK and b"left at the prompt; status 0" in rest


def test_wrong_commands_are_one_line_each(start: Start) -> None:
    """The prompt says what is wrong, and stays."""
    session = start("run", "-i", ECHO)
    session.until(READY)
    session.pause()
    for line, answer in {
        b"frobnicate": b"frobnicate: no such command; help lists them",
        b"info world": b"info world: there are registers, exits, memory, mode and devices",
        b"x /9999999 0": b"x /9999999: between 1 and 4096",
        b"x nowhere": b"nowhere: not an address: give a number below 4 GiB, such as 0x100000, or $eip",
        b"x $cr9": b"$cr9: no such register: there are ",
        b"step never": b"step never: not a number of instructions",
        b"step 5": b"only 0 in 2 s",
        b"quit now": b"quit now: no such command; help lists them",
    }.items():
        session.type(line + b"\r")
        session.until(line + b"\r\n" + answer)
        session.until(b"\r\n(vmm) ")
    session.type(b"\x01x")
    assert session.end()[0] == status.OK


@pytest.mark.parametrize(
    ("code", "words", "wanted"),
    [
        (EXIT_5, [], 11),
        (WILD, [], status.TRIPLE_FAULT),
        (SPIN, ["--max-instructions", "1000"], status.BUDGET),
        (SPIN, ["--timeout", "0.2"], status.TIMEOUT),
        (SPIN, ["--mode", "pv"], 2),
        (SPIN, ["--report", "/dev/full", "--timeout", "0.1"], 74),
    ],
    ids=["exit", "triple fault", "budget", "timeout", "image", "output"],
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
    session = start("run", "-i", ECHO)
    session.until(READY)
    if where == "prompt":
        session.type(b"\x01c")
        session.until(b"(vmm) ")
    session.process.send_signal(number)
    assert session.end()[0] == Interrupted.status


@pytest.mark.parametrize("guest_is", ["asleep", "flooding", "at the prompt"])
def test_a_terminal_that_goes_away_ends_the_run(start: Start, guest: Path, guest_is: str) -> None:
    """The other side hangs up: one line, if anybody can still read it, and the status; the report is written."""
    guest.write_bytes(SERIAL_FLOOD)
    read, write = os.pipe()
    report = guest.with_name("report.json")
    session = start("run", "-i", guest if guest_is == "flooding" else ECHO, "--report", report, stderr=write)
    os.close(write)
    session.until(b"A" * 9 if guest_is == "flooding" else READY)
    if guest_is == "at the prompt":
        session.type(b"\x01c")
        session.until(b"(vmm) ")
    os.close(session.slave)
    os.close(session.master)
    assert session.process.wait(PATIENCE) == Interrupted.status
    with os.fdopen(read, "rb") as errors:
        lines = errors.read().decode().splitlines()
    assert [line for line in lines if "Ctrl-A x leaves" not in line] == [
        f"vmm: {guest if guest_is == 'flooding' else ECHO}, bt: the terminal went away"
    ]
    assert report.stat().st_size


def test_a_stopped_process_leaves_the_terminal_as_it_was(start: Start) -> None:
    """SIGTSTP gives the terminal back, SIGCONT takes it again, and the guest goes on."""
    session = start("run", "-i", ECHO)
    session.until(READY)
    raw = termios.tcgetattr(session.slave)
    assert raw != session.before
    session.process.send_signal(signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(session.process.pid, os.WUNTRACED)[1])
    assert termios.tcgetattr(session.slave) == session.before
    session.process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + PATIENCE
    while termios.tcgetattr(session.slave) != raw:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    session.type(b"quit\r")
    session.until(b"QUIT\rbye\r\n")
    assert session.end()[0] == 1


def test_what_is_typed_ahead_is_not_lost(start: Start) -> None:
    """Keys typed while the process starts, before the terminal is raw, are the guest's."""
    session = start("run", "-i", ECHO)
    session.type(b"ab\nquit\n")
    session.until(b"AB\r\nQUIT\r\nbye\r\n")
    assert session.end()[0] == 1


def test_without_i_the_terminal_is_left_alone(start: Start) -> None:
    """`run guests/hello.asm` typed at a shell neither changes the terminal nor reads from it."""
    session = start("run", "guests/hello.asm")
    session.type(b"next\n")
    session.until(b"Hello from the guest.\r\n")
    assert session.end()[0] == 1
    assert os.read(session.slave, 100) == b"next\n"


def test_a_script_goes_first_and_hands_over(start: Start, tmp_path: Path) -> None:
    """With -i the terminal is there from the start, and what a script has begun the user ends."""
    script = tmp_path / "script"
    script.write_text('expect "ends it"\nsend "first\\n"\nexpect "FIRST"\n')
    session = start("run", "-i", ECHO, "--script", script)
    session.until(b"FIRST\r\n")
    session.type(b"quit\r")
    session.until(b"bye\r\n")
    assert session.end()[0] == 1


@pytest.mark.parametrize("pieces", [[b"ab\x01", b"xc"], [b"ab\x01xc"], [b"a", b"b", b"\x01", b"x", b"c"]])
def test_an_escape_may_be_split(pieces: list[bytes]) -> None:
    """Ctrl-A and its key are two keys, whenever they come."""
    escapes = Escapes()
    found = [what for piece in pieces for what in escapes.feed(piece)]
    assert b"".join(what for what in found if isinstance(what, bytes)) == b"abc"
    assert [what for what in found if not isinstance(what, bytes)] == ["leave"]


def test_a_key_that_means_nothing_after_ctrl_a_is_dropped() -> None:
    """As in QEMU."""
    assert list(Escapes().feed(b"1\x01z2\x01\x013")) == [b"1", b"2", b"\x01", b"3"]
