"""`run --explain`: every exit is put down to the line that it came from, and told what each mode makes of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.guest_expectations import GUESTS
from tests.test_cli import Cli
from tests.test_cli import vmm as vmm
from vmm.attribution import Attribution, costliest, total
from vmm.events import ExitTable
from vmm.image.build import build_elf
from vmm.image.load import load_image
from vmm.vm import MODES, VirtualMachine

MEMORY = 16 << 20
SAME = [mode for mode in MODES if MODES[mode].image == "same"]

# Each line that exits does so on its own; a table of gates, so that INT n and INT3 come back.
LINES = """\
bits 32
org 0x100000
%include "include/pc.inc"
section .text
start:  mov esp, stack_top
        call cpu_setup
        gate 3, comes_back, INTERRUPT_GATE
        gate 0x30, comes_back, INTERRUPT_GATE
        mov ecx, 3
.again: int 0x30                ; three times
        dec ecx
        jnz .again
        int3
        cpuid
        out 0x80, al
        in al, 0x80
        push dword 2
        popf                    ; IF off
        cli
        hlt
comes_back:
        iret
%include "include/cpu.inc"
"""


def watched(path: Path, mode: str) -> tuple[VirtualMachine, Attribution]:
    """A machine that has run the guest, and where its exits came from."""
    vm = VirtualMachine(load_image(path, memory=MEMORY), mode)
    attribution = Attribution(vm.machine)
    vm.run(10_000_000)
    return vm, attribution


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    shutil.copytree(GUESTS / "include", tmp_path / "include")
    path = tmp_path / "lines.asm"
    path.write_text(LINES)
    return path


@pytest.mark.parametrize("mode", SAME)
@pytest.mark.parametrize("guest", ["popf", "user", "processes", "redpill"])
def test_no_exit_is_lost(guest: str, mode: str) -> None:
    """The exits of all places, and those of none, are the machine's exits: by reason, count and time."""
    vm, attribution = watched(GUESTS / f"{guest}.asm", mode)
    summed = ExitTable()
    for table in (*(site.exits for site in attribution.sites), attribution.elsewhere):
        for reason, row in table.rows.items():
            summed.add(reason, row.nanoseconds)
            summed.rows[reason].count += row.count - 1
    assert summed.rows == vm.machine.exits.rows


@pytest.mark.parametrize("mode", SAME)
def test_watching_changes_nothing(mode: str) -> None:
    """The guest goes the same way, to the last register and byte, as when nobody asks where it exits."""
    image = load_image(GUESTS / "timer.asm", memory=MEMORY)
    plain = VirtualMachine(image, mode)
    vm, _ = watched(GUESTS / "timer.asm", mode)
    result = plain.run(10_000_000)
    assert type(plain.machine.exits) is ExitTable and "on_exception" not in vars(plain.machine)
    assert vm.control.registers() == result.registers
    assert vm.machine.retired() == result.instructions
    assert bytes(vm.console.kept) == result.console
    assert {r: row.count for r, row in vm.machine.exits.rows.items()} == {
        r: row.count for r, row in result.exits.rows.items()
    }


@pytest.mark.parametrize("mode", SAME)
def test_exits_are_put_down_to_their_own_line(lines: Path, mode: str) -> None:
    """INT n, INT3 and HLT, of which EIP is past, CPUID, IN and OUT: each line has its own exits, and no others."""
    vm, attribution = watched(lines, mode)
    found = {}
    for line in costliest(attribution.sites, vm.image, 1000):
        if line.source is not None and line.source.file == str(lines):
            text = line.source.text.split(";")[0].replace(".again:", "").strip()
            found[text] = {
                reason.removeprefix("VMEXIT_IOIO ").removesuffix(" (by hook)"): row.count
                for reason, row in line.exits.rows.items()
                if not reason.startswith(("VMEXIT_NPF", "link", "return", "look-up", "hidden"))
            }
    assert found["int 0x30"] == {"INT 0x30": 3}
    assert found["int3"] == {"INT 0x3": 1}
    assert found["cpuid"] == {"CPUID": 1}
    assert found["out 0x80, al"] == {"OUT": 1} and found["in al, 0x80"] == {"IN": 1}
    assert found["hlt"]["hlt"] == 1
    assert found.get("cli", {}) == ({"emulated CLI": 1} if mode == "trap" else {})
    assert not found.get("popf")


def test_code_that_a_kernel_has_copied_is_found_by_its_bytes() -> None:
    """A process's INT 0x80 has its line, although it lies in frames and at addresses of its own."""
    vm, attribution = watched(GUESTS / "processes.asm", "bt")
    calls = [line for line in costliest(attribution.sites, vm.image, 1000) if "INT 0x80" in line.exits.rows]
    assert sum(total(line.exits).count for line in calls) > 50
    known = [line for line in calls if line.source is not None]
    assert all(line.source and line.source.text.strip().startswith("int") for line in known)
    assert sum(total(line.exits).count for line in known) > 0.8 * sum(total(line.exits).count for line in calls)
    assert all(line.eip >= 0x40000000 for line in calls)


def test_a_hypercall_is_put_down_to_who_makes_it() -> None:
    """Not to the hypercall page, through which all of them go, but to the CALL there."""
    image = load_image(GUESTS / "hello.asm", memory=MEMORY, defines={"PV": ""})
    vm = VirtualMachine(image, "pv")
    attribution = Attribution(vm.machine)
    vm.run(100_000)
    (line,) = (
        line for line in costliest(attribution.sites, image, 100) if "hypercall console_io" in line.exits.rows
    )
    assert line.exits.rows["hypercall console_io"].count == vm.console.kept.count(b"\n")
    assert line.source is not None and line.source.text.split()[:2] == ["call", "hypercall_page"]
    assert line.acts("pv")["pv"].text.startswith("asks the hypervisor")


def test_the_ten_costliest_lines_are_told(vmm: Cli) -> None:
    """Ten at most, the costliest first, each with its exits, its class, and every mode; the last line is the end."""
    assert vmm("run", GUESTS / "processes.asm", "--explain") == 1
    text = vmm.err
    numbers = re.findall(r"^ ?(\d+)\. \S+:\d+  \S", text, re.M)
    assert numbers == [str(number) for number in range(1, 11)]
    blocks = re.split(r"^ ?\d+\. ", text, flags=re.M)[1:]
    for block in blocks:
        words = set(re.findall(r"\w+", block))
        assert set(MODES) <= words
        assert "exits" in words and "class" in words
    assert "external interrupt" in blocks[-1]
    assert text.splitlines()[-1].startswith("vmm: ")


def test_what_modes_do_with_a_line_is_told(vmm: Cli, lines: Path) -> None:
    """CLI under trap: an exit there, a store in the cache for a translator, nothing on the machine."""
    vmm("run", lines, "--explain", "--mode", "trap")
    _, _, after = vmm.err.partition("  cli\n")
    block = after.split("\n\n")[0]
    assert "CLI, privileged" in block
    assert re.search(r"native\s+executes", block)
    assert re.search(r"trap\s+#GP in ring 1, emulated by the monitor", block)
    assert re.search(r"bt\s+in the cache: a store to the virtual IF, no exit", block)


def test_an_intercept_that_was_asked_for_is_told_as_such(vmm: Cli) -> None:
    """What a hardware guest does by itself, it does by an exit where the user wants to see it."""
    words = ("--mode", "hvm", "--explain")
    vmm("run", GUESTS / "processes.asm", *words, "--intercept", "cr3")
    block = vmm.err.partition("mov cr3, %1\n")[2].split("\n\n")[0]
    assert "VMEXIT_CR3_WRITE" in block and "intercepted, since that was asked for" in block
    vmm("run", GUESTS / "processes.asm", *words)
    assert "mov cr3" not in vmm.err and "since that was asked for" not in vmm.err


def test_a_guest_without_source_is_told_by_address(vmm: Cli, lines: Path) -> None:
    """An ELF's lines are addresses and instructions, a flat binary's as well."""
    elf = vmm.folder / "guest.elf"
    build_elf(load_image(lines, memory=MEMORY), elf)
    vmm("run", elf, "--explain")
    assert re.search(r"^ ?\d+\. 0x10[0-9a-f]{4}.*  int 0x30$", vmm.err, re.M)
    assert vmm("run", vmm.guest(bytes.fromhex("e680 b000 e6f4")), "--explain") == 1
    assert re.search(r"^ ?\d\. 0x100000  out 0x80, al$", vmm.err, re.M)


def test_a_guest_that_never_exits_has_nothing_to_explain(vmm: Cli) -> None:
    """No exits, no lines."""
    words = ("--explain", "--mode", "native", "--max-instructions", "1000")
    assert vmm("run", vmm.guest(bytes.fromhex("ebfe")), *words) == 10
    assert vmm.err.count("\n") == 1
