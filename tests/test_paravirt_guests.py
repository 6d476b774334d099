"""Guests made for Xen's interface, under the monitor that has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.errors import ImageError
from vmm.image.load import ModuleFile, load_image
from vmm.vm import UNMODIFIED, VirtualMachine

GUESTS = Path(__file__).resolve().parent.parent / "guests"
MEMORY = 16 << 20


def test_hello_asks_the_hypervisor_and_says_the_same() -> None:
    """The paravirtual build of hello prints what the plain one prints, by hypercalls, and ends with its status."""
    image = load_image(GUESTS / "hello.asm", memory=MEMORY, defines={"PV": ""})
    result = VirtualMachine(image, "pv", memory=MEMORY).run(100_000)
    plain = VirtualMachine(load_image(GUESTS / "hello.asm", memory=MEMORY), memory=MEMORY).run(100_000)
    assert (result.console, result.outcome) == (plain.console, plain.outcome)
    assert result.exits.rows["hypercall console_io"].count == len(plain.console)


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
