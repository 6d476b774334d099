"""The state of the processor when a guest gets it: as multiboot has it.

32-bit protected mode, ring 0, paging off, interrupts off, A20 open, flat segments, the registers that the
loader gives. Multiboot leaves the tables to the guest; so that an interrupt gate or a far jump works before
the guest has its own, a three-entry GDT lies at `BOOT_GDT`, below where any image may be loaded.

Source: Multiboot Specification 0.6.96, 3.2 (machine state).
"""

from __future__ import annotations

from vmm.isa.descriptors import FLAT_CODE, FLAT_DATA, SystemType
from vmm.isa.words import CR0
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.state import EAX, EBX
from vmm.machine.devices import firmware
from vmm.machine.machine import Machine

BOOT_GDT = 0x500
CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10


def boot(machine: Machine, entry: int, eax: int, ebx: int) -> None:
    """Put the processor at `entry`, and the devices as firmware leaves them."""
    for port, byte in firmware.WRITES:
        machine.bus.write(port, 1, byte)
    table = bytes(8) + bytes(FLAT_CODE) + bytes(FLAT_DATA)
    machine.memory.load(BOOT_GDT, table)
    s = machine.state
    s.load()
    s.cr0 = CR0.PE | CR0.ET
    s.cr4 = 0
    s.load_descriptor(at.CS, CODE_SELECTOR, FLAT_CODE)
    for segment in (at.SS, at.DS, at.ES, at.FS, at.GS):
        s.load_descriptor(segment, DATA_SELECTOR, FLAT_DATA)
    s.set_table(at.GDT, BOOT_GDT, len(table) - 1)
    s.set_table(at.IDT, 0, 0)
    s.load_null(at.LDT)
    # As after reset, but for the type: the engine aborts the process on an inner-ring transfer through a TSS
    # that is not of an available type (LTR leaves it available in the hidden part, too).
    s.load_segment(at.TR, 0, 0, 0xFFFF, 0x8000 | SystemType.TSS32_AVAILABLE << 8)
    s.eflags = 0x2
    for register in range(8):
        s.set(register, 0)
    s.set(EAX, eax)
    s.set(EBX, ebx)
    s.eip = entry
    s.store()
    machine.engine.flush_tlb()
