"""Waiting for a guest's text and answering it: the same at every instruction count, in every mode."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.guest_expectations import GUESTS
from vmm.errors import UsageError
from vmm.expect import UNREAD_LIMIT, Expect, Press, Send, Type, Unread, parse_script, shown
from vmm.image.image import Image
from vmm.image.load import load_image
from vmm.vm import UNMODIFIED, ClockName, VirtualMachine

CLOCKS: tuple[ClockName, ...] = ("instructions", "host")
READY = "ends it\n"
STEPS = 'expect "TEXT", send "TEXT", type "TEXT", press KEY or timeout SECONDS'


@pytest.fixture(scope="module")
def echo() -> Image:
    return load_image(GUESTS / "echo.asm", memory=16 << 20, defines={})


@given(st.binary(max_size=40), st.binary(min_size=1, max_size=3), st.lists(st.integers(0, 40), max_size=6))
def test_a_text_is_found_however_it_is_split(output: bytes, text: bytes, cuts: list[int]) -> None:
    """Whatever pieces the guest writes in, the texts seen are those of a left-to-right search, each byte once."""
    unread = Unread()
    seen = int(unread.wait_for(text))
    edges = [0, *sorted(cuts), len(output)]
    for start, end in pairwise(edges):
        found = unread.write(output[start:end])
        while found:
            seen += 1
            found = unread.wait_for(text)
    assert seen == output.count(text)


def test_what_is_remembered_is_bounded() -> None:
    """A flood that nobody matches costs no more than twice the limit; what came last can still be found."""
    unread = Unread()
    for _ in range(5):
        unread.write(b"x" * UNREAD_LIMIT)
    assert len(unread._held) <= 2 * UNREAD_LIMIT
    unread.write(b"login: ")
    assert unread.wait_for(b"login: ")


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_a_conversation(echo: Image, mode: str, clock: ClockName) -> None:
    """Text seen, an answer, text that does not come in time, and on: also out of HLT, with either clock."""
    vm = VirtualMachine(echo, mode, clock=clock)
    assert vm.run_until(READY, within=30).outcome.kind == "seen"
    vm.send("hello\n")
    assert vm.run_until("HELLO").outcome.kind == "seen"
    result = vm.run_until("never", within=0.1)
    assert result.outcome.kind == "unseen"
    assert result.outcome.detail == 'the console did not show "never" within 0.1 s'
    vm.send(b"quit\n")
    result = vm.run()
    assert (result.outcome.kind, result.outcome.status) == ("exit", 1)
    assert result.console.endswith(b"\nHELLO\nQUIT\nbye\n")


def test_the_machine_stops_at_the_out_that_completes_the_text(echo: Image) -> None:
    """With the instruction clock: at the same instruction in every mode, and the console ends with the text."""
    counts = set()
    for mode in sorted(UNMODIFIED):
        vm = VirtualMachine(echo, mode)
        result = vm.run_until("a line")
        assert result.console.endswith(b"a line")
        counts.add(result.instructions)
        registers = vm.control.registers()
        code = vm.machine.linear.code(registers["eip"] - 1, 1) if mode == "native" else b"\xee"
        assert code == b"\xee"  # OUT DX, AL
    assert len(counts) == 1


def test_output_is_matched_once(echo: Image) -> None:
    """What is there already counts, without the guest's running on; what was matched does not count again."""
    vm = VirtualMachine(echo)
    vm.run_until(READY)
    vm.send("ab ab\n")
    assert vm.run_until("\n").outcome.kind == "seen"
    before = vm.machine.retired()
    assert vm.run_until("never", within=0.001).outcome.kind == "unseen"
    vm.send("AB AB\n")
    vm.run_until("never", within=0.001)
    after = vm.machine.retired()
    assert vm.run_until("AB").outcome.kind == vm.run_until("AB").outcome.kind == "seen"
    assert vm.machine.retired() == after > before
    assert vm.run_until("AB", within=0.001).outcome.kind == "unseen"


def test_a_guest_that_sleeps_for_ever_ends_the_wait(echo: Image) -> None:
    """Where nothing is due, and nobody attends, a text that does not come ends as every sleep does."""
    result = VirtualMachine(echo).run_until("never")
    assert result.outcome.detail == "halted, and no device will interrupt"


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_input_from_another_thread_wakes_an_attended_guest(echo: Image, mode: str, clock: ClockName) -> None:
    """A guest that sleeps for ever waits while somebody attends; what they send comes in between instructions."""
    vm = VirtualMachine(echo, mode, clock=clock)
    vm.machine.run_state.attended = True

    def type_later() -> None:
        time.sleep(0.1)
        for key in ("q", "u", "i", "t", "\r"):
            vm.machine.call_soon(lambda key=key: vm.send(key))  # type: ignore[misc]

    thread = threading.Thread(target=type_later)
    thread.start()
    result = vm.run(timeout=20)
    thread.join()
    assert (result.outcome.kind, result.outcome.status) == ("exit", 1)
    assert result.console.endswith(b"QUIT\rbye\n")


def test_a_domain_of_xens_is_heard_too() -> None:
    """Under `pv` text is seen at the exit that wrote it."""
    image = load_image(GUESTS / "hello.asm", memory=16 << 20, defines={"PV": ""})
    result = VirtualMachine(image, "pv").run_until("Hello")
    assert result.outcome.kind == "seen"
    assert result.console.startswith(b"Hello")


def test_a_script_says_what_it_means() -> None:
    """Each kind of line, each escape, comments and the times that apply."""
    text = '# log in\nexpect "login: "\n\n  send "root\\n"   # no password\ntimeout 2.5\nexpect "\\x23 \\e[\\"\\\\"\n'
    text += 'type "ls\\n"\npress ctrl-alt-delete # and again\n'
    assert parse_script(text, "s") == [
        Expect(b"login: ", None, "s:2"),
        Send(b"root\n", "s:4"),
        Expect(b'# \x1b["\\', 2.5, "s:6"),
        Type(b"ls\n", "s:7"),
        Press("ctrl-alt-delete", "s:8"),
    ]
    assert parse_script('send "Grüße"', "s") == [Send("Grüße".encode(), "s:1")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("expect login:", 'expect login:: give the text in double quotes, such as expect "login: "'),
        ("expect", 'expect : give the text in double quotes, such as expect "login: "'),
        ('send "half', 'send "half: give the text in double quotes, such as send "login: "'),
        ('send "a" "b"', 'send "a" "b": give the text in double quotes, such as send "login: "'),
        ('expect ""', "expect: the text is empty"),
        ('send "\\q"', '\\q: no such escape: there are \\n, \\r, \\t, \\e, \\0, \\xHH, \\\\ and \\"'),
        ("timeout soon", "timeout soon: not a time: give seconds of the guest's time, such as 10 or 0.5"),
        ("timeout nan", "timeout nan: not a time: give seconds of the guest's time, such as 10 or 0.5"),
        ("wait 5", f"wait: no such step: write {STEPS}"),
        ('"text"', f'"text": no such step: write {STEPS}'),
    ],
)
def test_a_script_s_error_is_one_line_with_its_place(line: str, complaint: str) -> None:
    """What is wrong, and in which line."""
    with pytest.raises(UsageError) as error:
        parse_script(f"\n{line}\n", "s")
    assert str(error.value) == f"s:2: {complaint}"


@given(st.binary(min_size=1, max_size=50))
def test_a_text_shown_reads_back(text: bytes) -> None:
    """What messages call a text is how a script spells it, on one line, whatever its bytes."""
    spelled = shown(text)
    assert spelled.isprintable()
    assert parse_script(f"send {spelled}", "s") == [Send(text, "s:1")]
