"""The state of the processor when a guest gets it: as multiboot has it, and Linux's 32-bit boot protocol.

32-bit protected mode, ring 0, paging off, interrupts off, A20 open, flat segments, the registers that the
loader gives. Multiboot leaves the tables to the guest; so that an interrupt gate or a far jump works before
the guest has its own, a GDT of these segments lies at `BOOT_GDT`, below where any image may be loaded. Linux
asks for one, with selectors of its own.

Sources: Multiboot Specification 0.6.96, 3.2 (machine state); Linux, Documentation/arch/x86/boot.rst, "32-bit Boot
Protocol".
"""

from __future__ import annotations

from collections.abc import Mapping

from vmm.isa.descriptors import FLAT_CODE, FLAT_DATA, SystemType
from vmm.isa.words import CR0
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.state import GENERAL
from vmm.machine.devices import firmware
from vmm.machine.machine import Machine
from vmm.machine.platform import leave_as_firmware_does

BOOT_GDT = 0x500
CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10
NO_REGISTERS: Mapping[str, int] = {}


def boot(
    machine: Machine,
    entry: int,
    registers: Mapping[str, int] = NO_REGISTERS,
    selectors: tuple[int, int] = (CODE_SELECTOR, DATA_SELECTOR),
) -> None:
    """Put the processor at `entry`, and the devices as firmware leaves them.

    `registers` are general ones, by name; the others are 0. `selectors` are those of code and data, in the order in
    which they lie in the GDT.
    """
    code, data = selectors
    for port, byte in firmware.WRITES:
        machine.bus.write(port, 1, byte)
    leave_as_firmware_does(machine)
    table = bytes(code) + bytes(FLAT_CODE).ljust(data - code, b"\0") + bytes(FLAT_DATA)
    machine.memory.load(BOOT_GDT, table)
    s = machine.state
    s.load()
    s.cr0 = CR0.PE | CR0.ET
    s.cr4 = 0
    s.load_descriptor(at.CS, code, FLAT_CODE)
    for segment in (at.SS, at.DS, at.ES, at.FS, at.GS):
        s.load_descriptor(segment, data, FLAT_DATA)
    s.set_table(at.GDT, BOOT_GDT, len(table) - 1)
    s.set_table(at.IDT, 0, 0)
    s.load_null(at.LDT)
    # As after reset, but for the type: the engine aborts the process on an inner-ring transfer through a TSS
    # that is not of an available type (LTR leaves it available in the hidden part, too).
    s.load_segment(at.TR, 0, 0, 0xFFFF, 0x8000 | SystemType.TSS32_AVAILABLE << 8)
    s.eflags = 0x2
    for register, name in enumerate(GENERAL):
        s.set(register, registers.get(name, 0))
    s.eip = entry
    s.store()
    machine.engine.flush_tlb()
