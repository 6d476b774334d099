"""What a PC of PCI's time has more than a PC/AT: APICs, a PCI bus, power management, and tables that tell of them.

The wiring, as in `pc`; what a device does is in `devices/`. Every interrupt line of the PC/AT goes to both the old
controllers and the IO-APIC, there to the pin of its own number, but for the timer's, which goes to pin 2; pin 0 has
the old controllers' output, and so has the local APIC's LINT0. Whom the operating system listens to is its own
choice.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.machine.bus import PortBus
from vmm.machine.devices import apic, ioapic
from vmm.machine.devices.apic import LocalApic
from vmm.machine.devices.ioapic import IoApic
from vmm.machine.devices.pci import PciHost
from vmm.machine.devices.power import SIZE, PowerManagement
from vmm.machine.devices.signals import Line
from vmm.machine.firmware.tables import POWER_PORTS, SCI_IRQ, TIMER_IRQ, TIMER_PIN
from vmm.machine.mmio import DeviceMemory

POWER = range(POWER_PORTS, POWER_PORTS + SIZE)


class Chipset:
    """The chips. `interrupt` is the processor's pin; `acknowledge_extint` is the old controllers' INTA cycle.

    `flush_tlb` is called when the local APIC's page has moved.
    """

    def __init__(
        self,
        bus: PortBus,
        memory: DeviceMemory,
        *,
        now: Callable[[], int],
        interrupt: Line,
        acknowledge_extint: Callable[[], int],
        flush_tlb: Callable[[], None],
        reset: Callable[[], None],
        with_ide: bool,
    ) -> None:
        self._memory, self._flush_tlb = memory, flush_tlb
        self.apic = LocalApic(interrupt, now, acknowledge_extint, self._moved)
        self.ioapic = IoApic(self.apic)
        self.pci = PciHost(reset, with_ide)
        memory.attach(apic.BASE, self.apic)
        memory.attach(ioapic.BASE, self.ioapic)
        bus.attach(0xCF8, 4, self.pci, "PCI address", width=4)
        bus.attach(0xCFC, 4, self.pci.data, "PCI data", width=4)
        self._old = self.ioapic.line(0)

    def add_power(
        self, bus: PortBus, sci: Line, now: Callable[[], int], power_off: Callable[[], None]
    ) -> None:
        """The part that needs an interrupt line itself."""
        self.power = PowerManagement(sci, now, power_off)
        bus.attach(POWER.start, len(POWER), self.power, "power management", width=4)

    def extint(self, level: bool) -> None:
        """The old controllers' output."""
        self._old(level)
        self.apic.set_extint(level)

    def line(self, irq: int, old: Line) -> Line:
        """A line that drives both; `old` is the old controllers' side of it."""
        new = self.ioapic.line(TIMER_PIN if irq == TIMER_IRQ else irq)

        def drive(level: bool) -> None:
            new(level)
            old(level)

        return drive

    def _moved(self, page: int) -> None:
        self._memory.move(self.apic, page)
        self._flush_tlb()


__all__ = ["SCI_IRQ", "Chipset"]
