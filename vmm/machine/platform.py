"""What a machine with a `chipset` has beside its ports: registers in memory, an MSR, a bit of CPUID, firmware's
tables.

The hard part is order: the window on the devices' registers and CPUID's answer are there before any monitor looks,
the tables when the processor is put at the guest's entry, like all else that firmware does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.isa.vectors import Vector
from vmm.machine.cpuid import APIC
from vmm.machine.delivery import Fault
from vmm.machine.devices.apic import BASE_ENABLE, BASE_MSR
from vmm.machine.firmware import tables
from vmm.machine.memory import BIOS_START
from vmm.machine.mmio import PAGE, WINDOW, WINDOW_PAGES

if TYPE_CHECKING:
    from vmm.machine.machine import Machine


def fit(machine: Machine) -> None:
    """To a machine that has just been made; nothing, if it has no chipset."""
    chipset = machine.devices.chipset
    if chipset is None:
        return
    local, devices = chipset.apic, machine.memory.devices

    def move_apic(value: int) -> None:
        if not local.write_base(value):
            raise Fault(Vector.GP, 0)
        if not local.read_base() & BASE_ENABLE:
            machine.cpuid.remove(1, edx=APIC)  # as if there were none

    machine.engine.map_window(WINDOW, WINDOW_PAGES * PAGE, devices.window_read, devices.window_write)
    machine.msrs.attach(BASE_MSR, local.read_base, move_apic)
    machine.cpuid.add(1, edx=APIC)
    machine.memory.has_bios_area = True


def leave_as_firmware_does(machine: Machine) -> None:
    """Interrupts by way of the old controllers, and the tables in memory."""
    chipset = machine.devices.chipset
    if chipset is None:
        return
    chipset.apic.wire()
    features = machine.cpuid.answer(1, 0)[3]
    keyboard = machine.devices.keyboard is not None
    machine.memory.load(BIOS_START, tables.build(machine.memory.size, features, keyboard))
