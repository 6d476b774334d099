"""Guests made for Xen's interface, under the monitor that has it."""

from __future__ import annotations

import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.guest_expectations import EXPECTATIONS
from vmm.errors import ImageError
from vmm.image.image import Image
from vmm.image.load import ModuleFile, load_image
from vmm.monitor.paravirt.monitor import ParavirtMonitor
from vmm.vm import UNMODIFIED, VirtualMachine

GUESTS = Path(__file__).resolve().parent.parent / "guests"
PORT = GUESTS.parent / "docs" / "paravirtual-guests.md"
MEMORY = 16 << 20


def test_hello_asks_the_hypervisor_and_says_the_same() -> None:
    """The paravirtual build of hello prints what the plain one prints, by one hypercall, and ends with its status."""
    image = load_image(GUESTS / "hello.asm", memory=MEMORY, defines={"PV": ""})
    result = VirtualMachine(image, "pv", memory=MEMORY).run(100_000)
    plain = VirtualMachine(load_image(GUESTS / "hello.asm", memory=MEMORY), memory=MEMORY).run(100_000)
    assert (result.console, result.outcome) == (plain.console, plain.outcome)
    assert result.exits.rows["hypercall console_io"].count == 1


def test_the_same_guest_twice_is_the_same_bytes() -> None:
    """A run is repeatable: instructions, registers and all of memory."""
    image = load_image(GUESTS / "hello.asm", memory=MEMORY, defines={"PV": ""})
    first, second = (VirtualMachine(image, "pv", memory=MEMORY).run(100_000) for _ in range(2))
    assert first.instructions == second.instructions
    assert first.registers == second.registers
    assert first.memory_sha256 == second.memory_sha256


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_a_xen_guest_runs_in_no_other_mode(mode: str) -> None:
    """A guest for Xen's interface in another mode is one clear line."""
    image = load_image(GUESTS / "hello.asm", memory=MEMORY, defines={"PV": ""})
    with pytest.raises(ImageError, match="run it with --mode pv"):
        VirtualMachine(image, mode, memory=MEMORY)


def test_a_plain_guest_is_none_for_xen() -> None:
    """A guest without Xen's notes in mode pv is one clear line."""
    image = load_image(GUESTS / "hello.asm", memory=MEMORY)
    with pytest.raises(ImageError, match="-D PV"):
        VirtualMachine(image, "pv", memory=MEMORY)


def test_an_initrd_is_the_domains_module(tmp_path: Path) -> None:
    """`--initrd` for a Xen guest lies where start_info says; one, and without arguments."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"ramdisk!" * 1000)
    guest, defines = GUESTS / "hello.asm", {"PV": ""}
    image = load_image(guest, memory=MEMORY, defines=defines, modules=[ModuleFile(disk)])
    vm = VirtualMachine(image, "pv", memory=MEMORY)
    start = vm.machine.state.get(6)
    address, length = (vm.machine.linear.read(start + offset, 4) for offset in (72, 76))
    assert length == 8000 and vm.machine.linear.read(address, 8) == int.from_bytes(b"ramdisk!", "little")
    for modules in ([ModuleFile(disk, "why")], [ModuleFile(disk), ModuleFile(disk)]):
        with pytest.raises(ImageError, match="takes one initrd"):
            load_image(guest, memory=MEMORY, defines=defines, modules=modules)


@pytest.mark.parametrize("name", ("threads", "processes"))
def test_hypercalls_may_be_made_in_pieces(name: str) -> None:
    """A hypervisor that always has something else to do changes nothing but the number of exits."""
    (wanted,) = (e for e in EXPECTATIONS if e.guest == name)
    image = load_image(wanted.path, memory=MEMORY, defines={"PV": ""})
    machines = [VirtualMachine(image, "pv", memory=MEMORY) for _ in range(2)]
    control = machines[1].control
    assert isinstance(control, ParavirtMonitor)
    control.domain.paging.domain.should_yield = lambda: True
    whole, pieces = (machine.run(10_000_000) for machine in machines)
    wanted.check("pv", pieces.console.decode())
    counts = [result.exits.rows["hypercall multicall"].count for result in (whole, pieces)]
    assert counts[1] > counts[0]


# What a switch costs: the difference between two runs, in exits.


@cache
def image_of(path: Path, *defines: tuple[str, str]) -> Image:
    return load_image(path, memory=MEMORY, defines=dict(defines))


def exits_of(path: Path, mode: str = "pv", **defines: str) -> Counter[str]:
    build = (("PV", ""),) if mode == "pv" else ()
    image = image_of(path, *build, *defines.items())
    result = VirtualMachine(image, mode, memory=MEMORY).run(10_000_000)
    assert (result.outcome.kind, result.outcome.status) == ("exit", 1), result.outcome
    return Counter({reason: row.count for reason, row in result.exits.rows.items()})


@pytest.mark.parametrize(
    ("kind", "exits"),
    [
        pytest.param("1", {"INT 0x80": 1}, id="a system call"),
        pytest.param("2", {}, id="a switch of user-level threads"),
        pytest.param("3", {"INT 0x80": 1, "hypercall multicall": 1}, id="a switch of kernel threads"),
        pytest.param("4", {"INT 0x80": 1, "hypercall multicall": 1}, id="a switch of processes"),
        pytest.param("5", {"hypercall multicall": 1}, id="a switch inside the kernel"),
    ],
)
def test_what_a_switch_costs(kind: str, exits: dict[str, int]) -> None:
    """A system call and the way back are one exit, whoever goes on then is one more, stack and page tables in one."""
    few, many = (exits_of(GUESTS / "threads.asm", KIND=kind, ROUNDS=rounds) for rounds in ("50", "100"))
    assert many - few == Counter({reason: 100 * count for reason, count in exits.items()})


def test_the_costs_of_a_switch_that_are_told() -> None:
    """The table in docs/paravirtual-guests.md is what each kind of switch takes in each mode, in exits."""
    rows = [line.strip("| ").split("|") for line in PORT.read_text().splitlines() if line.startswith("| ")]
    header = next(number for number, row in enumerate(rows) if "bt" in [cell.strip() for cell in row])
    modes = [cell.strip() for cell in rows[header]]
    for kind, row in enumerate(rows[header + 1 : header + 6], 1):
        told = dict(zip(modes, map(int, row[1:]), strict=True))
        assert {mode: cost_of(str(kind), mode) for mode in modes} == told


def cost_of(kind: str, mode: str) -> float:
    """Exits of one switch."""
    few, many = (exits_of(GUESTS / "threads.asm", mode, KIND=kind, ROUNDS=rounds) for rounds in ("50", "100"))
    return (many.total() - few.total()) / 100


BATCH = """\
bits 32
org 0x100000
%include "include/pc.inc"
%include "include/xen.inc"
%include "include/privileged.inc"
%include "include/process.inc"
section .text
start:  mov esp, stack_top
        call serial_setup
        call cpu_setup
        mov eax, stacks + KERNEL_STACK
        call tss_setup
        call tasks_setup
        call new_space
        mov edx, [shared_frame]
        or edx, PTE_USER
        mov eax, USER_SPACE             ; so that the table is there
        call map_page
        commit
        mov edi, PAGES
.map:   add eax, PAGE
        push eax
        call frame_alloc
        lea edx, [eax + PTE_USER]
        pop eax
        call map_page
        dec edi
        jnz .map
        commit
        load_cr3 ebx
        mov ecx, PAGES
.touch: mov [eax], ecx
        sub eax, PAGE
        loop .touch
        exit 0
dispatch: ret
%include "include/serial.inc"
%include "include/cpu.inc"
%include "include/tss.inc"
%include "include/paging.inc"
"""


def test_64_page_table_updates_are_one_exit(tmp_path: Path) -> None:
    """As many entries as fit are one exit, and the pages are there: each is stored to."""
    shutil.copytree(GUESTS / "include", tmp_path / "include")
    path = tmp_path / "batch.asm"
    path.write_text(BATCH)
    one, batch, more = (exits_of(path, PAGES=pages) for pages in ("1", "64", "65"))
    assert batch == one
    assert more - batch == Counter({"hypercall multicall": 1})
