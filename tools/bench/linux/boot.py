"""One boot, watched from outside: what the processor has spent when a line appears on the serial port.

The hard part is to ask all machines the same question. An emulator that is not ours tells nothing of itself, so each
is a process whose serial output is read as it comes; at each line that was waited for, the host's kernel is asked how
much processor time the process, its threads and the children that it has waited for have had: to 10 ms, the grain of
/proc. It is asked for peak memory then, too: what the process does at its end, a report with a checksum of all the
guest's memory, is no part of the boot.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

PATIENCE = 300.0  # seconds of the processor that a boot may take
LONGEST = 3600.0  # seconds on the wall, where other work has most of the processor
GRACE = 30.0  # seconds to write a report in, once asked to end
TICKS = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """The boot came to another end; the text says which."""


@dataclass(frozen=True)
class Moment:
    """Seconds since the process was started, on the wall and of the processor; bytes that it had resident at most."""

    wall: float
    processor: float
    memory: int

    def since(self, other: Moment) -> Moment:
        """With time counted from `other` on."""
        return Moment(self.wall - other.wall, self.processor - other.processor, self.memory)


@dataclass(frozen=True)
class Command:
    """A machine's process. Its serial port is its standard output, or else the FIFO `serial`.

    `report` is a file that it writes when SIGTERM ends it; without one it is killed.
    """

    words: tuple[str, ...]
    serial: Path | None = None
    report: Path | None = None


@dataclass(frozen=True)
class Boot:
    """What came of one: when each line appeared, in the order in which they were waited for, and what the process
    itself reported."""

    moments: tuple[Moment, ...]
    report: dict[str, object] = field(default_factory=dict)


def boot(command: Command, lines: Sequence[bytes], environment: dict[str, str] | None = None) -> Boot:
    """Start the machine, wait for each text of `lines` in turn and end it. Raises `Failed`."""
    if command.serial is not None:
        os.mkfifo(command.serial)
    try:
        process = subprocess.Popen(
            command.words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if command.serial is None else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        started = time.perf_counter()
        try:
            with _serial(command, process) as file:
                moments = _watch(process.pid, file, lines, started)
        except Failed:
            process.kill()
            process.wait()
            raise
        _end(process, command)
    finally:
        if command.serial is not None:
            command.serial.unlink()
    report = {}
    if command.report is not None:
        try:
            report = json.loads(command.report.read_text())
        except (OSError, ValueError) as error:
            raise Failed(f"it left no report: {error}") from None
    return Boot(moments, report)


def _serial(command: Command, process: subprocess.Popen[bytes]) -> IO[bytes]:
    if command.serial is None:
        assert process.stdout is not None
        return process.stdout
    # Read and write: neither waits for the other end, nor ends when that closes.
    return os.fdopen(os.open(command.serial, os.O_RDWR), "r+b", buffering=0)


def _watch(pid: int, file: IO[bytes], lines: Sequence[bytes], started: float) -> tuple[Moment, ...]:
    moments: list[Moment] = []
    unread, last = b"", b""
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while len(moments) < len(lines):
            wanted = lines[len(moments)]
            late = processor_time(pid) > PATIENCE or time.perf_counter() - started > LONGEST
            if late:
                raise Failed(f"no {wanted.decode()!r} within {PATIENCE:.0f} s of the processor")
            if not selector.select(1.0):
                if _ended(pid):
                    raise Failed(f"it ended without {wanted.decode()!r}; its last line: {_text(last)}")
                continue
            data = os.read(file.fileno(), 1 << 16)
            if not data:
                raise Failed(f"it ended without {wanted.decode()!r}; its last line: {_text(last)}")
            now = Moment(time.perf_counter() - started, processor_time(pid), peak_memory(pid))
            unread += data
            last = (last + data)[-400:]
            while len(moments) < len(lines) and lines[len(moments)] in unread:
                unread = unread.partition(lines[len(moments)])[2]
                moments.append(now)
    return tuple(moments)


def _text(data: bytes) -> str:
    found = [line for line in data.decode(errors="replace").replace("\r", "").splitlines() if line.strip()]
    return found[-1] if found else "none"


def _ended(pid: int) -> bool:
    """Whether a process is only waited for."""
    return _status(pid)[0] == "Z"


def processor_time(pid: int) -> float:
    """Seconds, in both modes, of a process with its threads and the children that it has waited for."""
    return sum(int(word) for word in _status(pid)[11:15]) / TICKS


def _status(pid: int) -> list[str]:
    """The words of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def peak_memory(pid: int) -> int:
    """Bytes that a process has had resident at most."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0  # it has ended


def _end(process: subprocess.Popen[bytes], command: Command) -> None:
    """Ask the process to end, or kill it."""
    if command.report is None:
        process.kill()
        process.wait()
        return
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    try:
        process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
