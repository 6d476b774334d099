"""The prompt of Ctrl-A c, on a real terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.terminals import ECHO, PATIENCE, READY, Start, Terminal, terminals
from tests.test_cli import SPIN
from tests.test_cli_script import SCAN_CODES
from vmm.cli import status
from vmm.vm import UNMODIFIED


@pytest.fixture
def start() -> Iterator[Start]:
    with terminals() as begin:
        yield begin


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    return tmp_path / "guest.bin"


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
