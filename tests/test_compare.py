"""Comparing modes: the instruction to blame is the right one, for every kind of difference."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guest_expectations import EXPECTATIONS, GUESTS, Expectation
from tests.test_cli import FLOOD, HALT, SPIN, V86, WILD, Cli
from tests.test_cli import vmm as vmm
from vmm.blame import SEEN_BY_PROCESSES, Divergence
from vmm.cli import exits, status
from vmm.comparison import DEFAULT_LIMIT, FIRST_STEP, Comparer, Comparison, ModeRun
from vmm.image.load import load_image
from vmm.machine.bare import Bare
from vmm.measures import Changed, changed_lines
from vmm.monitor.deprivileged.monitor import DeprivilegedMonitor
from vmm.monitor.hardware.monitor import HardwareMonitor
from vmm.monitor.translator.monitor import TranslatingMonitor
from vmm.monitor.trap.monitor import TrapMonitor
from vmm.vm import MODES

MEMORY = 16 << 20


def compare(path: Path, max_instructions: int = DEFAULT_LIMIT, mode: str = "trap") -> Comparison:
    return Comparer(load_image(path, memory=MEMORY), max_instructions=max_instructions).compare(
        ["native", mode]
    )


def divergence_of(
    folder: Path, code: bytes, max_instructions: int = DEFAULT_LIMIT, mode: str = "trap"
) -> Divergence | None:
    """Of a flat guest with a stack."""
    path = folder / "guest.bin"
    path.write_bytes(bytes.fromhex("bc00002000") + code)  # mov esp, 0x200000
    return compare(path, max_instructions, mode).runs[1].divergence


# Each guest, beside its row in the expectations

BLAMED = {
    "popf": ("popf", "POPF"),
    "pushf": ("pushf", "PUSHF"),
    "pushcs": ("push cs", "PUSH CS, SS"),
    "redpill": ("sgdt [stored]", "SGDT"),
    "user": ("iret", "IRET"),
    "processes": ("iret", "IRET"),
    "stress": ("popf", "POPF"),
}


@pytest.mark.parametrize("expectation", EXPECTATIONS, ids=str)
def test_binary_translation_leaves_no_difference(expectation: Expectation) -> None:
    """Under bt every guest ends as on the bare machine: registers, memory, console, time."""
    image = load_image(expectation.path, memory=MEMORY, defines=expectation.defines)
    (bt,) = Comparer(image, console_input=expectation.input).compare(["bt"]).runs
    assert bt.console_equal and bt.divergence is None


@pytest.mark.parametrize("expectation", EXPECTATIONS, ids=str)
def test_every_guest_is_judged_rightly(expectation: Expectation) -> None:
    """Guests that go wrong under trap do so by the instruction that they are about; the others do not differ.

    `user` goes right, but for IF after the IRET to ring 3, which no exit tells a monitor.
    """
    image = load_image(expectation.path, memory=MEMORY, defines=expectation.defines)
    native, trap = Comparer(image, console_input=expectation.input).compare(["native", "trap"]).runs
    assert native.divergence is None and native.console_equal
    assert trap.console_equal == expectation.right_in_trap
    found = trap.divergence
    if expectation.guest not in BLAMED:
        assert found is None
        return
    text, row = BLAMED[expectation.guest]
    assert found is not None and found.row is not None and found.source is not None
    assert found.row.name == row and found.explained
    assert found.source.text.split(";")[0].strip() == text
    assert GUESTS in Path(found.source.file).parents


def test_popf_is_blamed_for_the_interrupt_flag() -> None:
    """The first POPF of the guest should have set IF; the sentence and the data say so."""
    found = compare(GUESTS / "popf.asm").runs[1].divergence
    assert found is not None
    assert found.should == "IF should have become 1; it stayed 0."
    assert dict(found.difference.flags) == {"IF": (1, 0)}
    assert [line.text.strip() for line in found.context] == ["pushf", "cli", "call change_words"]


@pytest.mark.parametrize(
    ("code", "row", "should"),
    [
        ("8cc8", "MOV from CS, SS", "EAX should have become 0x8; it became 0x9"),
        ("0e", "PUSH CS, SS", "The word at 0x1ffffc should hold 0x8; it holds 0x9"),
        ("fb 9c", None, ""),  # IF is really 1, too
        ("9c", "PUSHF", "The word at 0x1ffffc should hold 0x2 (-); it holds 0x202 (IF)"),
        ("6802020000 9d", "POPF", "IF should have become 1; it stayed 0"),
        ("6802300000 9d", "POPF", "IOPL should have become 3; it stayed 0"),
        ("31db 0f20c0 83c808 0f22c0 0f01e3", "SMSW", "EBX should have become 0x19; it became 0x39"),
        ("0f00cb", "STR", "EBX"),
    ],
)  # fmt: skip
def test_the_sentence_says_what_should_have_been(
    tmp_path: Path, code: str, row: str | None, should: str
) -> None:
    """For each kind of difference: a register, memory, a flag, a field."""
    found = divergence_of(tmp_path, bytes.fromhex(code) + b"\xf4")
    if row is None:
        assert found is None
        return
    assert found is not None and found.row is not None
    assert found.row.name == row
    assert should in found.should


@pytest.mark.parametrize("before", [0, 1, FIRST_STEP - 8, FIRST_STEP, 3 * FIRST_STEP + 5, 20 * FIRST_STEP])
def test_the_place_is_exact_however_far_it_is(tmp_path: Path, before: int) -> None:
    """Wherever in a run the instruction stands, it and the count before it are found."""
    turns = bytes.fromhex("b9") + (before + 1).to_bytes(4, "little") + bytes.fromhex("49 75fd")
    found = divergence_of(tmp_path, turns + bytes.fromhex("0e") + HALT)
    assert found is not None
    assert found.instruction == "push cs"
    assert found.at == 1 + 1 + 2 * (before + 1)


def test_a_difference_that_heals_is_not_blamed(tmp_path: Path) -> None:
    """What was overwritten before anybody saw it made no difference."""
    healed = bytes.fromhex("0e 6a00 83c408 6a00 6a00")  # push cs; push 0; add esp, 8; push 0 twice
    clear = bytes.fromhex("31c0 f7d8 83e800")
    assert divergence_of(tmp_path, healed + clear + HALT) is None
    found = divergence_of(tmp_path, healed + clear + bytes.fromhex("8cd3") + HALT)
    assert found is not None and found.instruction == "mov ebx, ss"


def test_no_difference_is_said_to_be_none(vmm: Cli) -> None:
    """A guest that goes the same way everywhere gets that said."""
    assert vmm("compare", GUESTS / "hello.asm") == 0
    assert "No difference" in vmm.out


@pytest.mark.parametrize("code", [SPIN, FLOOD, WILD, HALT], ids=["spins", "floods", "jumps wild", "halts"])
def test_guests_that_misbehave_are_compared_too(tmp_path: Path, code: bytes) -> None:
    """Endless, shut down or halted: both modes end in the same way and state."""
    assert divergence_of(tmp_path, code, max_instructions=50_000) is None


def test_what_a_monitor_refuses_is_not_a_bug(tmp_path: Path) -> None:
    """Where the monitor says itself that it cannot go on, that is the explanation."""
    found = divergence_of(tmp_path, V86, 1000, "bt")
    assert found is not None and found.explained
    assert found.instruction == "iretd"
    assert "virtual-8086" in found.should


@pytest.mark.parametrize(("mode", "monitor"), [("bt", TranslatingMonitor), ("hvm", HardwareMonitor)])
def test_a_critical_instruction_is_no_excuse_for_other_modes(
    vmm: Cli, monkeypatch: pytest.MonkeyPatch, mode: str, monitor: type[Bare | DeprivilegedMonitor]
) -> None:
    """That POPF does not trap explains a difference under trap; where the guest has to be right it is a bug."""
    right = monitor.registers

    def wrong(self: Bare | DeprivilegedMonitor) -> dict[str, int]:
        """As if POPF, the guest's third instruction, destroyed EBX."""
        seen = right(self)  # type: ignore[arg-type]
        return seen if seen["eip"] <= 0x100007 else {**seen, "ebx": 0}

    monkeypatch.setattr(monitor, "registers", wrong)
    path = vmm.guest(bytes.fromhex("bc00002000 6a02 9d") + HALT)
    assert vmm("compare", path, "--modes", mode) == status.UNEXPLAINED
    assert "> popfd" in vmm.out and "not explained by the classification" in vmm.out


def test_where_there_is_no_source_the_symbol_is_named(vmm: Cli) -> None:
    """Of an ELF: by the symbols that it has."""
    elf = vmm.folder / "popf.elf"
    assert vmm("build", GUESTS / "popf.asm", "-o", elf) == 0
    assert vmm("compare", elf, "--modes", "trap") == 0
    assert re.search(r"^what    popfd in start\+0x50, at EIP 0x100050, after", vmm.out, re.M), vmm.out
    vmm("compare", elf, "--modes", "trap", "--json")
    assert json.loads(vmm.out)["modes"][0]["divergence"]["symbol"] == "start+0x50"


# A process that executes a few instructions, and then spins.
PROCESS = """\
bits 32
org 0x100000
start:  mov esp, 0x200000
        lgdt [pointer]
        mov eax, 0x23
        mov ds, ax
        mov es, ax
        push dword 0x23
        push dword 0x1FF000
        push dword 2
        push dword 0x1B
        push dword process
        iret
process:
        mov ecx, {selector:#x}
        {code}
        jmp $
table:  dq 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00CF9F000000FFFF
pointer: dw 47
        dd table
stored: dq 0
"""
KERNEL_CODE, USER_CODE, USER_DATA, CONFORMING = 0x08, 0x1B, 0x23, 0x28


def seen_by_a_process(folder: Path, code: str, selector: int) -> ModeRun:
    """The run under bt."""
    path = folder / "guest.asm"
    path.write_text(PROCESS.format(code=code, selector=selector))
    return compare(path, 1000, "bt").runs[1]


@pytest.mark.parametrize(
    ("code", "selector", "should"),
    [
        ("sgdt [stored]", 0, "should hold"),
        ("lar eax, ecx", CONFORMING, "EAX should have become 0xc09f00; it became 0xc0bf00"),
        ("mov word [table + 0x20], 0x1234\n lsl eax, ecx", USER_DATA, "EAX should have become 0xf1234fff"),
        ("mov word [table + 0x20], 0x1234\n verw cx", USER_DATA, "ZF should have become 1; it stayed 0"),
        ("mov word [table + 0x18], 0x1234\n verr cx", USER_CODE, "ZF should have become 1; it stayed 0"),
    ],
)
def test_what_theorem_3_lets_a_process_see(tmp_path: Path, code: str, selector: int, should: str) -> None:
    """A process that looks at GDTR, or at a shadow descriptor's DPL, or at one that is out of date, sees the monitor.

    That is explained: it is no bug.
    """
    found = seen_by_a_process(tmp_path, code, selector).divergence
    assert found is not None and found.explained
    assert found.row is not None and found.row.name in SEEN_BY_PROCESSES
    assert should in found.should


@pytest.mark.parametrize(
    "code",
    [
        *("sidt [stored]", "sldt eax", "str eax", "smsw eax", "pushf", "mov eax, cs", "mov eax, ss"),
        *("lsl eax, ecx", "verr cx", "verw cx", "lar eax, ecx"),
    ],
)
def test_what_a_process_does_not_see(tmp_path: Path, code: str) -> None:
    """Its own and the kernel's other segments, and all other registers, look to a process as on the bare machine."""
    for selector in (KERNEL_CODE, USER_CODE, USER_DATA):
        assert seen_by_a_process(tmp_path, code, selector).divergence is None


def test_a_run_that_ends_in_a_fault_is_compared_to_its_end(tmp_path: Path) -> None:
    """An instruction that ends one of the runs by a fault, and so retires nothing, is blamed all the same."""
    to_v86 = bytes.fromhex("6802000200 0e 6800000000 cf")  # IRET with VM: a mode that is not virtualized
    found = divergence_of(tmp_path, to_v86, mode="bt")
    assert found is not None and found.instruction == "iretd" and found.at == 4


def test_exits_are_grouped_by_what_they_are_for(vmm: Cli) -> None:
    """The groups of a mode add up to its exits, and only a translator translates."""
    vmm("compare", GUESTS / "popf.asm", "--json")
    for mode in json.loads(vmm.out)["modes"]:
        assert sum(mode["groups"].values()) == sum(row["count"] for row in mode["exits"].values())
        assert ("translation" in mode["groups"]) == (mode["mode"] == "bt")
        assert set(mode["groups"]) <= set(exits.GROUPS)


@pytest.mark.parametrize(
    ("reason", "group"),
    [
        ("OUT", "devices"),
        ("instruction INS", "devices"),
        ("instruction MOV", "emulated"),
        ("RDTSC", "clock reads"),
        ("VMEXIT_RDTSC", "clock reads"),
        ("hypercall mmu_update", "hypercalls"),
        ("VMEXIT_CR3_WRITE", "intercepts"),
        ("VMEXIT_NPF", "nested faults"),
        ("VMEXIT_EXCP14", "exceptions"),
        ("external interrupt", "exceptions"),
        ("never heard of", "emulated"),
    ],
)
def test_each_exit_is_in_a_group(reason: str, group: str) -> None:
    """Every mode's reasons have a group, by the first word."""
    assert exits.group_of(reason) == group


# Guests with two builds, with one, and what the table makes of modes that cannot run them.

BOTH = """\
bits 32
org 0x100000
%include "include/pc.inc"
%ifdef PV
%include "include/xen.inc"
%endif
section .text
start:  mov esp, stack_top
        call serial_setup
%ifdef PV
        println 'made for Xen'
%else
        println 'made for the machine'
%endif
        exit 0
%include "include/serial.inc"
section .bss
        resb 4096
stack_top:
"""
ONLY_MACHINE = "bits 32\norg 0x100000\n%ifdef PV\n%error not for Xen\n%endif\nstart: cli\n hlt\n"
UNMODIFIED = [mode for mode in MODES if MODES[mode].image == "same"]


@pytest.fixture
def five(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five modes; where there are fewer, the bare machine plays another."""
    for name in ("hvm", "pv"):
        if name not in MODES:
            played = replace(MODES["native"], name=name, summary="played", knows="nothing: the hardware knows")
            monkeypatch.setitem(MODES, name, played)


def source(folder: Path, text: str) -> Path:
    shutil.copytree(GUESTS / "include", folder / "include", dirs_exist_ok=True)
    path = folder / "guest.asm"
    path.write_text(text)
    return path


def rows_of(out: str) -> dict[str, list[str]]:
    """The cells of a table of the terminal's, by row, where no cell is empty."""
    lines = out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("outcome"))
    return {
        words[0]: words[1:] for line in lines[start - 1 : start + 20] if (words := re.split(r"  +", line.strip()))
    }


def test_a_paravirtual_build_is_compared_by_what_it_shows(vmm: Cli) -> None:
    """Another build of the guest has no state to compare, but a console, an end, and lines that changed."""
    assert vmm("compare", GUESTS / "hello.asm") == 0
    out, rows = vmm.out, rows_of(vmm.out)
    assert rows["outcome"] == ["exit 1"] * len(MODES)
    assert sorted(rows["state"]) == sorted(["the reference", *["equal"] * (len(UNMODIFIED) - 1), "-"])
    assert sorted(rows["console"]) == sorted(["1 line", *["1 line, equal"] * (len(MODES) - 1)])
    assert rows["lines changed"].count("0") == len(UNMODIFIED)
    vmm("compare", GUESTS / "hello.asm", "--json")
    pv = next(mode for mode in json.loads(vmm.out)["modes"] if mode["mode"] == "pv")
    assert pv["compared"] == "console and outcome" and pv["divergence"] is None and pv["console_equal"]
    assert pv["groups"]["hypercalls"] > 0
    changed = pv["lines_changed"]
    assert f"-{changed['removed']} +{changed['added']}" in rows["lines changed"]
    assert f"\npv: another build, -{changed['removed']} +{changed['added']} of {changed['of']} lines, " in out


TIMED = """\
bits 32
org 0x100000
%include "include/pc.inc"
%include "include/xen.inc"
section .text
start:  mov esp, stack_top
        call serial_setup
        println 'hello'
%ifdef PV
        println 'timing: 7'
%else
        println 'timing: 8'
%endif
        exit 0
%include "include/serial.inc"
section .bss
        resb 4096
stack_top:
"""


def test_another_build_takes_another_time(vmm: Cli) -> None:
    """What a guest prints after `timing:` is no difference to a paravirtual build; any other line is."""
    assert vmm("compare", source(vmm.folder, TIMED), "--modes", "native,pv") == 0
    assert "2 lines, equal but for timing" in vmm.out and "Where the consoles differ" not in vmm.out
    other = TIMED.replace("timing:", "clock:")
    assert vmm("compare", source(vmm.folder, other), "--modes", "native,pv") == 0
    assert "2 lines, not equal" in vmm.out and "native | clock: 8" in vmm.out


def test_lines_changed_are_places_in_the_listing(tmp_path: Path) -> None:
    """A line counts once however often its macro is used, and only if it makes code in one build alone."""
    text = """
%macro say 1
        mov al, %1
        out 0xE9, al
%endmacro
%ifdef OTHER
%macro say_twice 1
        mov al, %1
        out 0xE9, al
        out 0xE9, al
%endmacro
%else
%macro say_twice 1
        say %1
        say %1
%endmacro
%endif
start:  say 1
        say_twice 2
        say_twice 3
        hlt
"""
    path = tmp_path / "guest.asm"
    path.write_text(text)
    plain, other = (load_image(path, memory=MEMORY, defines=defines) for defines in ({}, {"OTHER": ""}))
    changed = changed_lines(plain, other)
    assert changed == Changed(0, 3, 3)
    assert changed_lines(plain, plain) == Changed(0, 0, 3)


def test_a_build_that_prints_something_else_is_shown(vmm: Cli) -> None:
    """That is not called wrong, for it is another program; the lines that differ are shown."""
    assert vmm("compare", source(vmm.folder, BOTH)) == 0
    assert "1 line, not" in vmm.out and "WRONG" not in vmm.out
    assert "native | made for the machine" in vmm.out and "pv     | made for Xen" in vmm.out
    *most, last = UNMODIFIED[1:]
    assert f"No difference under {', '.join(most)} and {last}: " in vmm.out


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ONLY_MACHINE, "its source refuses -D PV: not for Xen"),
        ("start: cli\n hlt\n", "its source makes no Xen guest of -D PV"),
        (None, "it is made for the machine, and there is no source to make another of"),
    ],
)
def test_a_guest_that_a_mode_cannot_run_is_a_dash(vmm: Cli, text: str | None, why: str) -> None:
    """By default such a mode is shown as such; asked for by name, it is an error of one line."""
    path = vmm.guest(HALT) if text is None else source(vmm.folder, text)
    assert vmm("compare", path) == 0
    assert sorted(rows_of(vmm.out)["outcome"]) == sorted(["halt"] * len(UNMODIFIED) + ["-"])
    assert f"\npv: {why}.\n" in vmm.out
    assert vmm("compare", path, "--json") == 0
    assert json.loads(vmm.out)["absent"] == {"pv": why}
    assert vmm("compare", path, "--modes", "native,pv") == 2
    assert vmm.out == "" and vmm.err == f"vmm: --modes pv: cannot run {path}: {why}\n"


def test_a_guest_that_only_a_paravirtual_mode_can_run_has_no_reference(vmm: Cli) -> None:
    """Then there is one run, and nothing beside it: of a source with -D PV, and of the ELF made of it."""
    path, elf = source(vmm.folder, BOTH), vmm.folder / "guest.elf"
    assert vmm("build", path, "-D", "PV", "-o", elf) == 0
    for words in ([path, "-D", "PV"], [elf]):
        assert vmm("compare", *words) == 0
        assert sorted(rows_of(vmm.out)["outcome"]) == sorted(["-"] * len(UNMODIFIED) + ["exit 1"])
        assert "native: it is made for Xen's interface.\n" in vmm.out
        assert vmm("compare", *words, "--modes", "native") == 2
        assert "--modes native: cannot run" in vmm.err and vmm.err.count("\n") == 1


@pytest.mark.usefixtures("five")
@pytest.mark.parametrize("guest", ["popf", "processes"])
def test_five_modes_fit_beside_each_other(vmm: Cli, guest: str) -> None:
    """In 100 columns no line of the table is cut, and each mode keeps its column."""
    vmm("compare", GUESTS / f"{guest}.asm")
    lines = vmm.out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("outcome"))
    end = lines.index("", start)
    assert all(len(line) <= 100 for line in lines[start - 1 : end])
    starts = [lines[start - 1].index(mode) for mode in MODES]
    for line in lines[start : start + 2]:
        assert all(line.ljust(100)[at - 1] == " " for at in starts)
    assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines[start - 1 : end])


def test_what_a_run_takes_is_measured(vmm: Cli) -> None:
    """Memory is some megabytes, not this process's; a translator executes more code than the guest has."""
    vmm("compare", GUESTS / "popf.asm", "--json", "--modes", "native,trap,bt")
    native, _, bt = json.loads(vmm.out)["modes"]
    assert native["ratio"] == 1 and bt["ratio"] > 0
    assert bt["code_bytes"] > 2 * native["code_bytes"] > 0
    assert native["image_bytes"] == bt["image_bytes"] >= native["code_bytes"]
    for mode in (native, bt):
        assert mode["peak_memory"] is None or 0 < mode["peak_memory"] < 16 << 20


def test_code_is_counted_once(tmp_path: Path) -> None:
    """A loop's code counts once, whatever blocks the CPU makes of it, and what is not executed not at all."""
    code = bytes.fromhex("b90a000000 49 75fd eb05 9090909090") + HALT
    path = tmp_path / "guest.bin"
    path.write_bytes(code)
    (native,) = Comparer(load_image(path, memory=MEMORY)).compare(["native"]).runs
    assert native.code == len(code) - 5


def test_a_mistake_of_a_monitor_is_called_a_bug(vmm: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A privileged instruction emulated wrongly is found, and not excused by the classification."""
    right = TrapMonitor.registers

    def wrong(self: TrapMonitor) -> dict[str, int]:
        """As if STI, the guest's first instruction, destroyed EBX."""
        seen = right(self)
        return seen if seen["eip"] == 0x100000 else {**seen, "ebx": 0}

    monkeypatch.setattr(TrapMonitor, "registers", wrong)
    path = vmm.guest(bytes.fromhex("fb") + HALT)
    assert vmm("compare", path) == status.UNEXPLAINED
    assert "> sti" in vmm.out and "EBX should have stayed 0x9e000; it became 0x0" in vmm.out
    assert "not explained by the classification" in vmm.out


# The command


def test_the_demonstration_fits_on_a_screen(vmm: Cli) -> None:
    """`vmm compare guests/popf.asm`: right on native, wrong under trap, POPF named with its rule; 50 lines."""
    assert vmm("compare", GUESTS / "popf.asm") == 0
    lines = vmm.out.splitlines()
    assert len(lines) <= 50
    assert lines[len(MODES) + 2].split() == list(MODES)
    assert lines[-1].startswith("No difference under bt")
    assert "native | verdict: RIGHT, POPF set and cleared the interrupt flag" in lines
    assert any(line.startswith("trap   | verdict: WRONG") for line in lines)
    assert any(line.startswith(">   43  popf") for line in lines)
    assert any(line.startswith("class") and "POPF, critical" in line for line in lines)
    assert any(line.startswith("rule") for line in lines)
    assert not any(line != line.rstrip() for line in lines)


def test_the_comparison_as_json(vmm: Cli) -> None:
    """The JSON has a row a mode, and for the one that diverged the instruction, its source and its row."""
    assert vmm("compare", GUESTS / "popf.asm", "--json", "--modes", "native,trap,bt") == 0
    found = json.loads(vmm.out)
    assert found["guest"] == str(GUESTS / "popf.asm")
    native, trap, bt = found["modes"]
    keys = ["mode", "image", "knows", "compared", "outcome", "console_equal", "exits", "instructions", "seconds"]
    keys += ["ratio", "code_bytes", "image_bytes", "lines_changed", "peak_memory", "divergence", "groups"]
    assert list(native) == list(trap) == list(bt) == keys
    for right in (native, bt):
        assert right["divergence"] is None and right["console_equal"]
    assert not trap["console_equal"]
    assert trap["outcome"] == {"kind": "exit", "status": 3, "detail": "isa-debug-exit"}
    divergence = trap["divergence"]
    assert divergence["instruction"] == "popfd" and divergence["source"]["line"] == 43
    assert divergence["row"]["name"] == "POPF" and divergence["row"]["critical"]
    assert divergence["difference"]["IF"] == [1, 0]
    assert divergence["explained"]


def test_one_mode_is_compared_with_the_bare_machine_all_the_same(vmm: Cli) -> None:
    """--modes trap lists only trap, and its divergence from native."""
    vmm("compare", GUESTS / "popf.asm", "--modes", "trap", "--json")
    (trap,) = json.loads(vmm.out)["modes"]
    assert trap["mode"] == "trap" and trap["divergence"]["row"]["name"] == "POPF"


def test_consoles_of_different_length_are_compared(vmm: Cli) -> None:
    """Lines that only one mode printed are shown with its name."""
    # Prints "A\n" if it is in ring 0, and then "B\n" always.
    code = "8cc8 a803 7508 b041 e6e9 b00a e6e9 b042 e6e9 b00a e6e9"
    assert vmm("compare", vmm.guest(bytes.fromhex(code) + HALT)) == 0
    assert "native | A" in vmm.out and "trap   | A" not in vmm.out and "| B" not in vmm.out


def test_a_console_cannot_steer_the_terminal(vmm: Cli) -> None:
    """Control characters of the guest's are not passed on by `compare`."""
    code = "8cc8 0430 e6e9 b01b e6e9 b05b e6e9 b00a e6e9"
    vmm("compare", vmm.guest(bytes.fromhex(code) + HALT))
    assert "\x1b" not in vmm.out and "native | 8\N{REPLACEMENT CHARACTER}[" in vmm.out
