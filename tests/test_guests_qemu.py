"""The guests on a machine that is not ours: QEMU boots what `build_elf` writes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.guest_expectations import EXPECTATIONS, GUESTS, Expectation
from tests.qemu import ENDLESS, run_qemu
from vmm.image import multiboot
from vmm.image.build import build_elf
from vmm.image.load import load_image

MEMORY = 16 << 20
QEMU_STATUS = {"triple-fault": 0, "halt": ENDLESS}  # with -no-reboot, and with a timeout


def elf_of(expectation: Expectation, folder: Path) -> Path:
    """The guest as an ELF in `folder`."""
    path = folder / f"{expectation.guest}.elf"
    build_elf(load_image(expectation.path, memory=MEMORY, defines=expectation.defines), path)
    return path


@pytest.mark.parametrize("expectation", EXPECTATIONS, ids=str)
def test_qemu_agrees_with_the_expectation(expectation: Expectation, tmp_path: Path) -> None:
    """On QEMU each guest prints what its table row says, and ends as it says."""
    timeout = 2 if expectation.kind == "halt" else 20
    console, status = run_qemu(elf_of(expectation, tmp_path), expectation.input, timeout)
    expectation.check("native", console.decode())
    assert status == QEMU_STATUS.get(expectation.kind, expectation.status)


def test_popf_guest_notices_a_popf_that_leaves_the_interrupt_flag_alone(tmp_path: Path) -> None:
    """Where POPF only drops its operand, the guest prints what it has to print in trap mode."""
    (expectation,) = (e for e in EXPECTATIONS if e.guest == "popf")
    image = load_image(expectation.path, memory=MEMORY, defines={"popf": "add esp, 4"})
    build_elf(image, tmp_path / "popf.elf")
    console, status = run_qemu(tmp_path / "popf.elf")
    assert console.decode() == expectation.trap_console
    assert status == expectation.trap_status


def test_qemu_places_a_flat_binary_by_its_address_fields_as_we_do(tmp_path: Path) -> None:
    """A flat file placed by its multiboot header runs on QEMU, and is loaded to the same bytes here."""
    (expectation,) = (e for e in EXPECTATIONS if e.guest == "hello")
    source = load_image(expectation.path, memory=MEMORY)
    code, bss = source.segments[0], source.segments[1]
    text = code.data + bytes(-len(code.data) % 4)
    end = code.address + len(text) + 32
    header = multiboot.header_bytes(multiboot.FLAG_ADDRESSES) + struct.pack(
        "<5I", code.address + len(text), code.address, end, max(end, bss.end), source.entry
    )
    flat = tmp_path / "hello.bin"
    flat.write_bytes(b"skip" + text + header + b"not loaded")
    assert run_qemu(flat) == (expectation.console.encode(), expectation.status)
    image = load_image(flat, memory=MEMORY)
    assert image.segments[0].data == text + header
    assert (image.segments[0].end, image.entry) == (max(end, bss.end), source.entry)


def test_every_guest_has_an_expectation() -> None:
    """No guest lies in the folder without a row in the table."""
    assert {path.stem for path in GUESTS.glob("*.asm")} == {e.guest for e in EXPECTATIONS}


@pytest.mark.parametrize("path", sorted(GUESTS.glob("*.asm")), ids=lambda path: path.stem)
def test_every_guest_says_what_it_teaches(path: Path) -> None:
    """Each guest opens with a comment: what it teaches, and what it prints in each mode."""
    header = path.read_text().split("\n\nbits 32", 1)[0]
    assert all(line.startswith(";") for line in header.splitlines())
    assert header.startswith(f"; {path.stem}: ")
    for promised in ("; Teaches", "; native prints:", "; trap prints:"):
        assert promised in header
