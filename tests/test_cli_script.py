"""`run --script` and `--until`: a conversation with a guest, for tests and graders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_cli import HALT, SPIN, Cli
from vmm.cli import status
from vmm.vm import UNMODIFIED

ECHO = "guests/echo.asm"
# Polls the keyboard, interrupts off, and writes each byte that it gives to the debug console:
# cli; in al, 64; test al, 1; jz; in al, 60; out e9, al; jmp.
SCAN_CODES = bytes.fromhex("fa e464 a801 74fa e460 e6e9 ebf4")


@pytest.fixture
def vmm(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return Cli(capfd, tmp_path)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script"


@pytest.mark.parametrize("clock", ["instructions", "host"])
@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_a_script_talks_to_the_guest(vmm: Cli, script: Path, mode: str, clock: str) -> None:
    """Each answer is sent when its question has been seen, and not a byte is lost; the guest ends by itself."""
    script.write_text('expect "ends it\\n"\nsend "one\\n"\nexpect "ONE\\n"\nsend "quit\\n"\n')
    assert vmm("run", ECHO, "--script", script, "--mode", mode, "--clock", clock) == 1
    assert vmm.out == 'echo: type; a line "quit" or Ctrl-D ends it\nONE\nQUIT\nbye\n'


def test_with_the_instruction_clock_a_conversation_is_repeatable(vmm: Cli, script: Path) -> None:
    """The answers come at the same instructions each time."""
    script.write_text('expect "ends it\\n"\nsend "one\\n"\nexpect "ONE\\n"\n')
    ends = set()
    for _ in range(2):
        assert vmm("run", ECHO, "--script", script, "--until", "\n") == status.UNSEEN
        ends.add(vmm.err.splitlines()[-1].rpartition(" in ")[0])
    assert len(ends) == 1


def test_until_ends_the_run_as_done(vmm: Cli) -> None:
    """The text is the last that the console shows, and the status says that it came."""
    assert vmm("run", ECHO, "--until", "a line") == status.OK
    assert vmm.out == "echo: type; a line"
    assert 'bt: seen: the console showed "a line"; status 0' in " ".join(vmm.err.split())


@pytest.mark.parametrize(
    ("code", "words", "why"),
    [
        (HALT, [], "halted with interrupts off"),
        (SPIN, ["--max-instructions", "1000"], "the budget of 1000 instructions is spent"),
        (SPIN, ["--timeout", "0.1"], "timeout"),
    ],
    ids=["halt", "budget", "timeout"],
)
def test_a_text_that_does_not_come_is_told(vmm: Cli, code: bytes, words: list[str], why: str) -> None:
    """However the run ended, the status is that of a text that was not seen; the line says why it ended."""
    assert vmm("run", vmm.guest(code), "--until", "login: ", *words) == status.UNSEEN
    assert f'{why}; --until: "login: " was not seen; status 16' in " ".join(vmm.err.split())


def test_a_script_gives_up_after_its_time(vmm: Cli, script: Path) -> None:
    """`timeout` is the guest's own time: a hundredth of a second is a million instructions of it."""
    script.write_text('timeout 0.01\nexpect "never"\n')
    assert vmm("run", vmm.guest(SPIN), "--mode", "native", "--script", script) == status.UNSEEN
    line = vmm.err.splitlines()[-1]
    told = 'the console did not show "never" within 0.01 s; status 16; 1,000,000 instructions in'
    assert f", native: {script}:2: {told}" in line


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_a_script_types_on_the_keyboard(vmm: Cli, script: Path, mode: str) -> None:
    """`type` and `press` come as scan codes: of set 1, for firmware leaves the controller translating."""
    script.write_text('type "a"\npress ctrl-up\n')
    codes = bytes.fromhex("1e 9e 1d e0 48 e0 c8 9d").decode(errors="surrogateescape")
    words = "--script", script, "--until", codes, "--timeout", "20"
    assert vmm("run", vmm.guest(SCAN_CODES), "--mode", mode, *words) == status.OK


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("press ctrl-hyper\n", "{script}:1: press: key 'hyper' does not exist: there are a, 1, f1, ret"),
        ("\npress\n", "{script}:2: press: key '' does not exist"),
        ("login\n", '{script}:1: login: no such step: write expect "TEXT", send "TEXT"'),
    ],
)
def test_a_script_that_makes_no_sense_is_refused(vmm: Cli, script: Path, text: str, complaint: str) -> None:
    """At once: one line with its place, before the guest runs."""
    script.write_text(text)
    assert vmm("run", ECHO, "--script", script) == 2
    assert vmm.out == "" and vmm.err.startswith("vmm: " + complaint.format(script=script))
    assert vmm.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--script", "{folder}"], "--script {folder}: cannot be read: Is a directory"),
        (["--script", "{folder}/none"], "--script {folder}/none: cannot be read: No such file or directory"),
        (["--until", ""], "--until: the text is empty"),
        (["--interactive"], "--interactive: standard input is no terminal: use --input - or --script FILE"),
    ],
)
def test_words_that_make_no_sense_are_refused(vmm: Cli, words: list[str], complaint: str) -> None:
    """One line that says what would."""
    assert vmm("run", ECHO, *(word.format(folder=vmm.folder) for word in words)) == 2
    assert vmm.err == f"vmm: {complaint.format(folder=vmm.folder)}\n"
