"""PCI, the local APIC and the IO-APIC against QEMU's: the same loads and stores on both, the same answers.

One guest with a script of accesses runs on our machine `pc` and on QEMU's, interrupts off, and prints each answer.
Not compared is what differs for a reason, by a mask beside it: QEMU's chips are later ones, and have more in them.
"""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

from tests.qemu import run_qemu
from tests.test_devices_ide import Medium
from vmm.image.build import build_elf
from vmm.image.load import load_image
from vmm.machine.devices import apic, ioapic
from vmm.vm import VirtualMachine

STORE, LOAD, OUT, IN = 1, 2, 3, 4  # of 32 bits: in memory, and at a port
ALL = 0xFFFF_FFFF
CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
HOST, ISA, IDE = 0x0000, 0x0800, 0x0900

GUEST = """
bits 32
org 0x100000
start:  cli
        mov esi, script
next:   mov ecx, [esi]
        mov edx, [esi + 4]
        mov eax, [esi + 8]
        add esi, 12
        cmp ecx, 1
        jb done
        je store
        cmp ecx, 3
        jb load
        je output
        in eax, dx
        jmp show
store:  mov [edx], eax
        jmp next
output: out dx, eax
        jmp next
load:   mov eax, [edx]
show:   mov ebx, eax
        mov ecx, 4
byte_:  mov edx, 0x3F8 + 5
wait_:  in al, dx
        test al, 0x20
        jz wait_
        mov edx, 0x3F8
        mov al, bl
        out dx, al
        shr ebx, 8
        loop byte_
        jmp next
done:   mov eax, 0
        out 0xF4, eax
        hlt
script:
"""

Step = tuple[int, int, int]  # what, address or port, value or mask of what to compare


def put(register: int, value: int) -> Step:
    return (STORE, apic.BASE + register, value)


def get(register: int, mask: int = ALL) -> Step:
    return (LOAD, apic.BASE + register, mask)


def io_put(index: int, value: int) -> list[Step]:
    return [(STORE, ioapic.BASE, index), (STORE, ioapic.BASE + ioapic.WINDOW, value)]


def io_get(index: int, mask: int = ALL) -> list[Step]:
    return [(STORE, ioapic.BASE, index), (LOAD, ioapic.BASE + ioapic.WINDOW, mask)]


def pci_put(function: int, register: int, value: int) -> list[Step]:
    return [(OUT, CONFIG_ADDRESS, 1 << 31 | function | register), (OUT, CONFIG_DATA, value)]


def pci_get(function: int, register: int, mask: int = ALL) -> list[Step]:
    return [(OUT, CONFIG_ADDRESS, 1 << 31 | function | register), (IN, CONFIG_DATA, mask)]


def local_apic(random: Random) -> list[Step]:
    """Registers as written, messages to itself with interrupts off, and their ends."""
    steps = [
        put(apic.SVR, apic.ENABLE | 0xFF),
        get(apic.SVR, 0x1FF),
        get(apic.ID),
        get(apic.VERSION_REGISTER, 0xF0),
    ]
    for register, mask in (
        (apic.TPR, 0xFF), (apic.LDR, ALL), (apic.DFR, ALL), (apic.ICR_HIGH, 0xFF00_0000), (apic.LVT_TIMER, 0x100FF),
        (apic.LVT_LINT0, 0x100FF), (apic.LVT_LINT1, 0x107FF), (apic.LVT_ERROR, 0x100FF), (apic.DIVIDE, 0xB),
    ):  # fmt: skip
        # What is reserved QEMU keeps as written.
        steps += [
            put(register, random.getrandbits(32) & mask | apic.MASKED * (register in _LVT)),
            get(register),
        ]
    steps += [put(apic.TPR, 0), put(apic.INITIAL_COUNT, 0), get(apic.CURRENT_COUNT), get(apic.INITIAL_COUNT)]
    for _ in range(30):
        steps += [
            put(apic.ICR_LOW, random.randrange(16, 256) | 1 << 18),
            put(apic.TPR, random.getrandbits(8)),
        ]
        bank = random.choice((apic.IRR, apic.ISR, apic.TMR))
        steps += [get(bank + 16 * i) for i in range(8)]
        steps += [get(apic.PPR), put(apic.EOI, 0)]
    return steps


_LVT = {apic.LVT_TIMER, apic.LVT_COUNTER, apic.LVT_LINT0, apic.LVT_LINT1, apic.LVT_ERROR}


def io_apic(random: Random) -> list[Step]:
    """Entries as written, all masked, and the number of them."""
    steps = [*io_put(ioapic.ID, 0x0500_0000), *io_get(ioapic.ID), *io_get(ioapic.VERSION_REGISTER, 0xFF_0000)]
    for _ in range(30):
        pin = random.randrange(24)
        low = random.getrandbits(32) & 0x1EFFF & ~(1 << 14) | apic.MASKED
        steps += [*io_put(0x10 + 2 * pin, low), *io_put(0x11 + 2 * pin, random.getrandbits(8) << 24)]
        steps += [*io_get(0x10 + 2 * pin, ALL & ~(1 << 14)), *io_get(0x11 + 2 * pin)]
    return [*steps, *io_get(0x40), *io_get(0xFF)]


def pci(random: Random) -> list[Step]:
    """Who is there, and what can be changed: not QEMU's power management function, bus master and display."""
    steps: list[Step] = [(OUT, CONFIG_ADDRESS, 0), (IN, CONFIG_DATA, ALL), (IN, CONFIG_ADDRESS, ALL)]
    for function in (HOST, ISA, IDE, 0x0A00, 0x1F00, 0x1_0000):
        steps += pci_get(function, 0)
    for function in (HOST, ISA):
        steps += pci_get(function, 8, 0xFFFF_FF00)
    steps += pci_get(IDE, 8, 0xFFFF_7F00)  # QEMU's can be a bus master
    for function in (HOST, ISA, IDE):
        steps += pci_get(function, 0x0C, 0x00FF_0000)
        for register in (0x10, 0x14, 0x18, 0x1C, 0x24, 0x28, 0x34, 0x3C):
            if register != 0x3C:
                steps += pci_put(function, register, ALL)
            steps += pci_get(function, register, 0xFF00 if register == 0x3C else ALL)
    for _ in range(8):
        value = random.getrandbits(32) & 0x3333_3333 | 0x8000_8000
        steps += [*pci_put(IDE, 0x40, value), *pci_get(IDE, 0x40)]
    return steps


def answers(console: bytes, steps: list[Step]) -> list[int]:
    reads = [step for step in steps if step[0] in (LOAD, IN)]
    assert len(console) == 4 * len(reads)
    return [word & step[2] for (word,), step in zip(struct.iter_unpack("<I", console), reads, strict=True)]


def compare(steps: list[Step], folder: Path) -> None:
    script = b"".join(struct.pack("<III", *step) for step in steps) + bytes(12)
    source = folder / "script.asm"
    source.write_text(
        GUEST + "\n".join(f"        dd {word:#x}" for (word,) in struct.iter_unpack("<I", script))
    )
    image = load_image(source, memory=16 << 20)
    build_elf(image, folder / "script.elf")
    console, status = run_qemu(folder / "script.elf")
    assert status == 1
    ours = VirtualMachine(image, "native", model="pc", disk=Medium(8)).run(1_000_000)
    assert ours.outcome.status == 1
    reads = [step for step in steps if step[0] in (LOAD, IN)]
    found, wanted = answers(ours.console, steps), answers(console, steps)
    differ = [
        f"{i}: {reads[i][1]:#x}: {a:#x}, QEMU {b:#x}"
        for i, (a, b) in enumerate(zip(found, wanted, strict=True))
        if a != b
    ]
    assert not differ


def test_the_local_apic_answers_as_qemus(tmp_path: Path) -> None:
    """Registers, priorities, requests, what is being served, ends."""
    compare(local_apic(Random(1)), tmp_path)


def test_the_io_apic_answers_as_qemus(tmp_path: Path) -> None:
    """Identity, the number of entries, and entries as they were written."""
    compare(io_apic(Random(2)), tmp_path)


def test_pcis_configuration_space_answers_as_qemus(tmp_path: Path) -> None:
    """Identities, classes, headers, base addresses that are not there, IDE timings."""
    compare(pci(Random(3)), tmp_path)
