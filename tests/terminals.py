"""`python -m vmm` on a terminal of its own, as a user has it, for tests to type at and to look at."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.guest_expectations import GUESTS

PATIENCE = 20  # seconds until a hanging test gives up
ECHO = "guests/echo.asm"
READY = b"ends it\r\n"
# A flood of the serial port, interrupts off: cli; mov dx, 3f8; mov al, 'A'; out dx, al; jmp to the OUT.
SERIAL_FLOOD = bytes.fromhex("fa 66baf803 b041 ee ebfd")
# Reads the serial port, interrupts off, and sends each byte back: in al, 3fd; test 1; jz; in; out.
POLLED_ECHO = bytes.fromhex("fa 66bafd03 ec a801 74f6 66baf803 ec ee ebee")


class Terminal:
    """A process in a session of its own, whose terminal it is; `stdout` and `stderr` take another way if given."""

    def __init__(self, *command: str, stdout: int | None = None, stderr: int | None = None) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""

        def lead() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            os.setsid()
            os.close(os.open(os.ttyname(0), os.O_RDWR))  # its controlling terminal

        self.process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave if stdout is None else stdout,
            stderr=self.slave if stderr is None else stderr,
            preexec_fn=lead,
            cwd=GUESTS.parent,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"},
        )

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def until(self, text: bytes, patience: float = PATIENCE) -> bytes:
        """What the terminal shows up to `text`, since the last time."""
        deadline = time.monotonic() + patience
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            self.read(0.1)
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

    def read(self, seconds: float) -> bool:
        """Take what the terminal shows, if it does within `seconds`."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        self.seen += os.read(self.master, 1 << 16)
        return True

    def is_restored(self) -> bool:
        """Whether the terminal is as it was before."""
        return termios.tcgetattr(self.slave) == self.before

    def end(self) -> tuple[int, bytes]:
        """The status, and what else the terminal has shown; the terminal has to be as it was."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen
            self.read(0.05)
        while self.read(0):
            pass
        assert self.is_restored()
        assert b"Traceback" not in self.seen and b"Exception" not in self.seen
        return self.process.returncode, self.seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for descriptor in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)


Start = Callable[..., Terminal]


@contextlib.contextmanager
def terminals() -> Iterator[Start]:
    """Starts `python -m vmm` with words, each time on a terminal of its own; `program` runs something else."""
    started = []

    def start(
        *words: str | Path,
        stdout: int | None = None,
        stderr: int | None = None,
        program: tuple[str, ...] = ("-m", "vmm"),
    ) -> Terminal:
        command = sys.executable, *program, *map(str, words)
        started.append(Terminal(*command, stdout=stdout, stderr=stderr))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()
