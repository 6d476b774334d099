"""`run --interactive` on a real terminal: keys, and the commands of Ctrl-A."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.terminals import ECHO, POLLED_ECHO, READY, Start, terminals
from tests.test_cli import SPIN
from vmm.cli import status
from vmm.cli.keyboard import Command, Escapes
from vmm.vm import UNMODIFIED


@pytest.fixture
def start() -> Iterator[Start]:
    with terminals() as begin:
        yield begin


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    return tmp_path / "guest.bin"


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_keys_go_to_the_guest_as_they_are_typed(start: Start, mode: str) -> None:
    """A sleeping guest gets each key at once, without the terminal's own echo, and ends the run with its status."""
    terminal = start("run", "-i", ECHO, "--mode", mode)
    terminal.until(READY)
    for key, back in ((b"h", b"H"), (b"i", b"I"), (b"\x03", b"\x03"), (b"\x1a", b"\x1a"), (b"\r", b"\r")):
        terminal.type(key)
        assert terminal.until(back) == b""
    terminal.type(b"quit\r")
    assert terminal.until(b"bye\r\n") == b"QUIT\r"
    code, rest = terminal.end()
    assert code == 1
    assert b"exit by isa-debug-exit; status 1" in rest


@pytest.mark.parametrize("clock", ["host", "instructions"])
@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_a_guest_that_computes_gets_its_keys(start: Start, guest: Path, mode: str, clock: str) -> None:
    """So does one that never sleeps and has interrupts off, with either clock; Ctrl-A Ctrl-A is one Ctrl-A."""
    guest.write_bytes(POLLED_ECHO)
    terminal = start("run", "-i", guest, "--mode", mode, "--clock", clock)
    terminal.until(b"helps\r\n")
    terminal.type(b"abc\x01\x01d")
    terminal.until(b"abc\x01d")
    terminal.type(b"\x01x")
    code, rest = terminal.end()
    assert code == status.OK
    assert b"left by Ctrl-A x; status 0" in rest


def test_with_the_instruction_clock_a_guest_waits_for_keys(start: Start) -> None:
    """What sleeps for ever without a keyboard waits for one; and Ctrl-A h helps."""
    terminal = start("run", "-i", ECHO, "--clock", "instructions")
    terminal.until(READY)
    time.sleep(0.3)
    terminal.type(b"a")
    terminal.until(b"A")
    terminal.type(b"\x01h")
    terminal.until(b"Ctrl-A c       stop the guest")
    terminal.type(b"\x01x")
    assert terminal.end()[0] == status.OK


def test_ctrl_a_x_leaves_a_sleeping_guest(start: Start) -> None:
    """Status 0, one line, the terminal as it was."""
    terminal = start("run", "-i", ECHO)
    terminal.until(READY)
    terminal.type(b"\x01x")
    code, rest = terminal.end()
    assert code == status.OK
    assert b"left by Ctrl-A x; status 0" in rest


def test_what_is_typed_ahead_is_not_lost(start: Start) -> None:
    """Keys typed while the process starts, before the terminal is raw, are the guest's."""
    terminal = start("run", "-i", ECHO)
    terminal.type(b"ab\nquit\n")
    terminal.until(b"AB\r\nQUIT\r\nbye\r\n")
    assert terminal.end()[0] == 1


def test_without_i_the_terminal_is_left_alone(start: Start) -> None:
    """`run guests/hello.asm` typed at a shell neither changes the terminal nor reads from it."""
    terminal = start("run", "guests/hello.asm")
    terminal.type(b"next\n")
    terminal.until(b"Hello from the guest.\r\n")
    assert terminal.end()[0] == 1
    assert os.read(terminal.slave, 100) == b"next\n"


def test_a_script_goes_first_and_hands_over(start: Start, tmp_path: Path) -> None:
    """With -i the terminal is there from the start, and what a script has begun the user ends."""
    script = tmp_path / "script"
    script.write_text('expect "ends it"\nsend "first\\n"\nexpect "FIRST"\n')
    terminal = start("run", "-i", ECHO, "--script", script)
    terminal.until(b"FIRST\r\n")
    terminal.type(b"quit\r")
    terminal.until(b"bye\r\n")
    assert terminal.end()[0] == 1


def test_a_key_that_means_nothing_after_ctrl_a_is_dropped() -> None:
    """As in QEMU; Ctrl-A with itself or `a` is one Ctrl-A."""
    assert list(Escapes().feed(b"1\x01z2\x01\x013\x01a\x01x")) == [
        b"1",
        b"2",
        b"\x01",
        b"3",
        b"\x01",
        "leave",
    ]


def test_a_guest_that_waits_for_a_key_costs_nothing(start: Start) -> None:
    """Asleep in HLT by the host's clock it takes no processor time to speak of, and a key wakes it at once."""
    terminal = start("run", "-i", ECHO)
    terminal.until(READY)
    time.sleep(0.5)
    before = seconds_of_processor(terminal.process.pid)
    time.sleep(2)
    assert seconds_of_processor(terminal.process.pid) - before < 0.1
    terminal.type(b"a")
    begun = time.monotonic()
    terminal.until(b"A")
    assert time.monotonic() - begun < 2  # some milliseconds, where nobody else wants the processor
    terminal.type(b"\x01x")
    assert terminal.end()[0] == status.OK


def seconds_of_processor(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_time_is_the_host_s_at_a_terminal_and_else_that_of_instructions(start: Start, guest: Path) -> None:
    """Who types wants a second to be one: with -i the clock is the host's if nothing else is said, and it is told."""
    guest.write_bytes(SPIN)
    limit = "--max-instructions", "100000"
    for words, told, clock in (
        (["-i"], b"the terminal is the guest's, time the host's: Ctrl-A x leaves, Ctrl-A h helps", "host"),
        (["-i", "--clock", "instructions"], b"the terminal is the guest's: Ctrl-A x leaves", "instructions"),
        ([], b"vmm: ", "instructions"),
    ):
        report = guest.with_name("report.json")
        terminal = start("run", guest, *limit, "--report", report, *words)
        terminal.until(told)
        assert terminal.end()[0] == status.BUDGET
        assert json.loads(report.read_text())["clock"] == clock


@given(
    typed=st.lists(st.sampled_from(b"ab\x01xcha\x03"), max_size=20).map(bytes),
    cuts=st.lists(st.integers(0, 20)),
)
def test_what_ctrl_a_means_does_not_depend_on_when_the_keys_come(typed: bytes, cuts: list[int]) -> None:
    """Whatever pieces the terminal gives it in; and without Ctrl-A every byte is the guest's."""
    edges = sorted((0, *(cut for cut in cuts if cut < len(typed)), len(typed)))
    escapes = Escapes()
    pieces = [what for start, end in pairwise(edges) for what in escapes.feed(typed[start:end])]
    whole = list(Escapes().feed(typed))

    def guest_s(found: list[bytes | Command]) -> bytes:
        return b"".join(what for what in found if isinstance(what, bytes))

    assert guest_s(pieces) == guest_s(whole)
    assert [what for what in pieces if isinstance(what, str)] == [
        what for what in whole if isinstance(what, str)
    ]
    if b"\x01" not in typed:
        assert guest_s(whole) == typed
