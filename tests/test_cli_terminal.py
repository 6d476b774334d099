"""`run --interactive` on a real terminal: keys, the commands of Ctrl-A, and the prompt."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.terminals import ECHO, PATIENCE, POLLED_ECHO, READY, Start, Terminal, terminals
from tests.test_cli import SPIN
from tests.test_cli_script import SCAN_CODES
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


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_the_prompt_answers_and_the_guest_goes_on(start: Start, mode: str) -> None:
    """Ctrl-A c stops at a boundary; each command answers; what is typed after `cont` is the guest's again."""
    terminal = start("run", "-i", ECHO, "--mode", mode)
    terminal.until(READY)
    assert b"  start.sleep+0xc: jmp 0x" in terminal.pause()
    terminal.type(b"info registers\r")
    assert re.search(rb"eax    [0-9a-f]{8}.*\r\nflags: .*IF", terminal.until(b"(vmm) "), re.DOTALL)
    terminal.type(b"info exits\r")
    assert re.search(rb"OUT.* +\d+", terminal.until(b"(vmm) "))
    terminal.type(b"info mem\r")
    assert b"16,384 KiB of RAM\r\npaging off\r\neip 001" in terminal.until(b"(vmm) ")
    terminal.type(b"info mode\r")
    assert f"{mode}: ".encode() in terminal.until(b"(vmm) ")
    terminal.type(b"x /4b 0x100000\r")
    assert re.search(rb"00100000: bc( [0-9a-f]{2}){3}\r\n", terminal.until(b"(vmm) "))  # mov esp
    terminal.type(b"x /2i 0x100000\r")
    assert re.search(rb"\r\nstart:\r\n00100000  bc .*mov esp, 0x.*\r\n.*call 0x", terminal.until(b"(vmm) "))
    terminal.type(b"x /1w $esp\rx 0x7ffffff0\r")
    terminal.until(b"\r\n(vmm) ")
    terminal.until(b"\r\n(vmm) ")
    terminal.type(b"typo\x7f\x7f\x7f\x7fcont\rok")
    assert terminal.until(b"OK") == b"typo" + b"\b \b" * 4 + b"cont\r\n"
    terminal.type(b"\rquit\r")
    terminal.until(b"bye\r\n")
    assert terminal.end()[0] == 1


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_the_prompt_steps(start: Start, guest: Path, mode: str) -> None:
    """`step N` executes so many instructions; a guest that ends in a step ends the run."""
    guest.write_bytes(SPIN)
    terminal = start("run", "-i", guest, "--mode", mode)
    terminal.until(b"helps\r\n")
    time.sleep(0.3)
    terminal.type(b"\x01c")
    terminal.until(b"00100001  jmp 0x100001\r\n(vmm) ")
    terminal.type(b"info mode\r")
    before = re.search(rb"([\d,]+) instructions", terminal.until(b"(vmm) "))
    terminal.type(b"step 7\r")
    terminal.until(b"00100001  jmp 0x100001\r\n(vmm) ")
    terminal.type(b"info mode\r")
    after = re.search(rb"([\d,]+) instructions", terminal.until(b"(vmm) "))
    assert before and after
    assert int(after[1].replace(b",", b"")) - int(before[1].replace(b",", b"")) == 7
    terminal.type(b"quit\r")
    code, rest = terminal.end()
    assert code == status.OK and b"left at the prompt; status 0" in rest


def test_wrong_commands_are_one_line_each(start: Start) -> None:
    """The prompt says what is wrong, and stays."""
    terminal = start("run", "-i", ECHO)
    terminal.until(READY)
    terminal.pause()
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
        terminal.type(line + b"\r")
        terminal.until(line + b"\r\n" + answer)
        terminal.until(b"\r\n(vmm) ")
    terminal.type(b"\x01x")
    assert terminal.end()[0] == status.OK


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


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_the_prompt_presses_keys_and_tells_of_devices(start: Start, guest: Path, mode: str) -> None:
    """`sendkey` and `type` come to a guest that polls the keyboard; what it writes is seen once it goes on."""
    guest.write_bytes(SCAN_CODES)
    terminal = start("run", "-i", guest, "--mode", mode)
    terminal.until(b"helps\r\n")
    terminal.type(b"\x01c")
    terminal.until(b"(vmm) ")
    for line in (b"sendkey ctrl-up", b"type a b"):
        terminal.type(line + b"\r")
        assert terminal.until(b"(vmm) ") == line + b"\r\n"
    terminal.type(b"sendkey hyper\r")
    terminal.until(b"\r\nkey 'hyper' does not exist: ")
    terminal.until(b"(vmm) ")
    terminal.type(b"info devices\r")
    shown = terminal.until(b"(vmm) ")
    assert b"\r\n03f8-03ff  COM1\r\n" in shown and b"master PIC, vectors from 0x" in shown
    terminal.type(b"cont\r")
    terminal.until(bytes.fromhex("1d e0 48 e0 c8 9d  1e 9e 39 b9 30 b0 1c 9c"))
    terminal.type(b"\x01x")
    assert terminal.end()[0] == status.OK


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


# Three functions deep, the innermost one going round for ever; each pushes EBP, and points it there.
DEEP = """
bits 32
org 0x100000
start:  mov esp, 0x180000
        xor ebp, ebp
        call outer
outer:  push ebp
        mov ebp, esp
        call inner
inner:  push ebp
        mov ebp, esp
        jmp $
"""


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_the_prompt_tells_who_called(start: Start, guest: Path, mode: str) -> None:
    """`backtrace` follows EBP from frame to frame, with the source's names."""
    source = guest.with_suffix(".asm")
    source.write_text(DEEP)
    terminal = start("run", "-i", source, "--mode", mode)
    terminal.until(b"helps\r\n")
    time.sleep(0.5)
    terminal.type(b"\x01c")
    terminal.until(b"  inner+0x3: jmp 0x")
    terminal.until(b"(vmm) ")
    terminal.type(b"backtrace\r")
    shown = [line.split() for line in terminal.until(b"(vmm) ").splitlines()[1:]]
    assert [name for _, name in shown] == [b"inner+0x3", b"inner", b"outer"]
    terminal.type(b"quit\r")
    assert terminal.end()[0] == status.OK


# Paging on: the first 4 MiB are mapped to themselves, and 0x400000 to 0x200000, where there is a word; then a loop.
MAPPED = """
bits 32
org 0x100000
start:  mov edi, 0x300000
        mov ecx, 3 * 1024
        xor eax, eax
        rep stosd
        mov dword [0x300000], 0x301003
        mov dword [0x300004], 0x302003
        mov dword [0x302000], 0x200003
        mov dword [0x200000], 0x600DCAFE
        mov edi, 0x301000
        mov eax, 3
fill:   stosd
        add eax, 0x1000
        cmp edi, 0x302000
        jb fill
        mov eax, 0x300000
        mov cr3, eax
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
there:  jmp there
"""


@pytest.mark.parametrize(
    "words",
    [(mode,) for mode in sorted(UNMODIFIED)] + [("hvm", "--memory-virtualization", "shadow")],
    ids=" ".join,
)
def test_the_prompt_reads_through_the_guest_s_own_tables(
    start: Start, guest: Path, words: tuple[str]
) -> None:
    """In every mode `x` finds what the guest would, or that nothing is mapped, and sets no accessed bit."""
    source = guest.with_suffix(".asm")
    source.write_text(MAPPED)
    terminal = start("run", "-i", source, "--mode", *words)
    terminal.until(b"helps\r\n")
    deadline = time.monotonic() + PATIENCE
    while b"there: jmp" not in pause(terminal):
        assert time.monotonic() < deadline
        terminal.type(b"cont\r")
        terminal.until(b"cont\r\n")
        time.sleep(0.1)
    for line, answer in (
        (b"x 0x400000", b"00400000: 600dcafe"),
        (b"x /2w 0x400ffc", b"00400ffc: 00000000\r\n00401000: not mapped"),
        (b"x 0x302000", b"00302000: 00200003"),
        (b"x 0x800000", b"00800000: not mapped"),
    ):
        terminal.type(line + b"\r")
        terminal.until(line + b"\r\n" + answer + b"\r\n(vmm) ")
    terminal.type(b"quit\r")
    assert terminal.end()[0] == status.OK


def pause(terminal: Terminal) -> bytes:
    """Ctrl-A c: what the prompt says first."""
    terminal.type(b"\x01c")
    return terminal.until(b"(vmm) ")


def test_the_prompt_reads_no_device(start: Start, guest: Path) -> None:
    """A look at registers in memory would do something; a page below, or where nothing is mapped, is what it is."""
    guest.write_bytes(SPIN)
    terminal = start("run", "-i", guest, "--machine", "pc")
    terminal.until(b"helps\r\n")
    terminal.type(b"\x01c")
    terminal.until(b"(vmm) ")
    terminal.type(b"x 0xfee00020\r")
    terminal.until(b"\r\nfee00020: a device, which is not read\r\n(vmm) ")
    terminal.type(b"x /2w 0xfedffffc\r")
    terminal.until(b"\r\nfedffffc: ffffffff\r\nfee00000: a device, which is not read\r\n(vmm) ")
    terminal.type(b"\x01x")
    assert terminal.end()[0] == status.OK


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


def test_ctrl_a_c_at_the_prompt_goes_on(start: Start) -> None:
    """Whatever stands on the line is not done; and the guest gets nothing of it."""
    terminal = start("run", "-i", ECHO)
    terminal.until(READY)
    terminal.pause()
    terminal.type(b"quit\x01c")
    terminal.until(b"quit" + b"\b \b" * 4 + b"cont\r\n")
    terminal.type(b"on")
    assert terminal.until(b"ON") == b""
    terminal.type(b"\x01x")
    assert terminal.end()[0] == status.OK
