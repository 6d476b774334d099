"""A stock Linux with a shell on a real terminal: what a user types, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oracles import require_linux
from tests.terminals import Start, terminals
from tools.linux.logs import SMALL_PC
from vmm.cli import status

BOOT = 300  # seconds
PROMPT = b"/ # "


@pytest.fixture
def start() -> Iterator[Start]:
    with terminals() as begin:
        yield begin


def test_linux_gets_the_terminal_by_itself(start: Start) -> None:
    """Where both ends are a terminal and nothing else feeds it; time is the host's then. --no-interactive says no."""
    kernel, _ = require_linux()
    for words, interactive in (
        ([], True),
        (["--no-interactive"], False),
        (["--until", "login: "], False),
        (["--input", "/dev/null"], False),
    ):
        terminal = start("run", kernel, "--max-instructions", "1000", "-m", "64M", *words)
        shown = terminal.end()[1]
        told = b"the terminal is the guest's, time the host's: Ctrl-A x leaves, Ctrl-A h helps"
        assert (told in shown) == interactive, words


def test_a_shell_on_the_terminal(start: Start, tmp_path: Path) -> None:
    """A script that waits for the prompt loses not a byte; then the terminal is the user's: echo, BACKSPACE, Ctrl-C,
    Ctrl-D, long output; the prompt of Ctrl-A c sees the kernel's memory, and `exit` gives the terminal back."""
    kernel, initrd = require_linux()
    script = tmp_path / "script"
    script.write_text(
        'expect "userspace: ready"\nexpect "/ # "\n'
        'send "echo abcdefghijklmnopqrstuvwxyz0123456789 | md5sum\\n"\n'
        'timeout 60\nexpect "bbe6a719bcd23a78f4ef016ced5a2332"\n'
    )
    words = "--mode", "hvm", "-m", "64M", "--initrd", initrd, "--append", SMALL_PC
    terminal = start("run", "-i", kernel, "--script", script, *words)
    terminal.until(b"bbe6a719bcd23a78f4ef016ced5a2332", BOOT)
    terminal.until(PROMPT)

    def command(line: bytes) -> bytes:
        """What a line typed prints, its own echo included."""
        terminal.type(line)
        return terminal.until(PROMPT, 60).replace(b"\r", b"")

    def start_command(line: bytes) -> None:
        """Have a command read the terminal, which the shell, editing the line, hands over in a while."""
        terminal.type(line)
        terminal.until(line.strip())
        time.sleep(2)

    assert b"\nright\n" in command(b"echo wron\x7f\x7f\x7f\x7fright\n")
    assert b"/dev/ttyS0\n" in command(b"tty\n")
    start_command(b"sleep 1000\n")
    assert b"^C" in command(b"\x03")
    assert b"status 130\n" in command(b"echo status $?\n")
    start_command(b"cat > /tmp/typed\n")
    terminal.type(b"a line\n")
    terminal.until(b"a line")
    command(b"\x04")
    assert b"\na line\n" in command(b"cat /tmp/typed\n")
    numbers = command(b"seq 1 500\n").split(b"seq 1 500\n")[1]
    assert numbers == b"".join(b"%d\n" % number for number in range(1, 501))
    assert b"  default_idle" in terminal.pause()
    terminal.type(b"backtrace\r")
    assert b"  start_kernel+0x" in terminal.until(b"(vmm) ")
    terminal.type(b"x /4w $esp\rinfo memory\r")
    assert b"not mapped" not in terminal.until(b"paging on")
    terminal.until(b"(vmm) ")
    terminal.type(b"cont\r")
    terminal.until(b"cont\r\n")
    assert b"still here\n" in command(b"echo still here\n")
    terminal.type(b"exit\n")
    terminal.until(b"reboot: System halted", 60)
    code, rest = terminal.end()
    assert code == status.OK and b"halted with interrupts off; status 0" in rest
