"""The devices of a PC/AT, wired together: who drives which interrupt line, and which ports they answer.

The wiring is all there is here; what a device does is in `devices/`. A model says how much of a PC there is: `isapc`
is this and no more, `pc` has a `chipset` beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from vmm.machine.bus import PortBus
from vmm.machine.chipset import POWER, SCI_IRQ, Chipset
from vmm.machine.devices.disk import Disk
from vmm.machine.devices.i8042 import I8042
from vmm.machine.devices.ide import Ide
from vmm.machine.devices.identify import default_geometry
from vmm.machine.devices.keyboard import Keyboard
from vmm.machine.devices.pic import PicPair
from vmm.machine.devices.pit import Pit, SpeakerPort
from vmm.machine.devices.rtc import Rtc
from vmm.machine.devices.signals import Line, Timed
from vmm.machine.devices.system import A20Gate, DebugConsole, DebugExit, Port92
from vmm.machine.devices.uart import Uart
from vmm.machine.devices.vga import Crtc
from vmm.machine.mmio import DeviceMemory

TIMER_IRQ, KEYBOARD_IRQ, COM1_IRQ, RTC_IRQ, MOUSE_IRQ, DISK_IRQ = 0, 1, 4, 8, 12, 14
COM1 = 0x3F8
DISK, DISK_CONTROL = 0x1F0, 0x3F6

Model = Literal["isapc", "pc"]
MODELS: dict[Model, str] = {
    "isapc": "a PC/AT: no PCI, ACPI or APIC",
    "pc": "with APICs, PCI and ACPI",
}

# Ports whose access may make a timed device interrupt sooner than it would have: writes; of reads, only that of the
# clock's register C, which lets its line fall.
TIMED_WRITES = frozenset((0x40, 0x43, 0x71, *POWER))
TIMED_READS = frozenset((0x71,))


class Devices:
    """All devices of the machine. `now` is guest time in ns; the other arguments are lines and callbacks.

    `devices` is where the model `pc` has its registers in memory; `power_off` ends the run, and `flush_tlb` is called
    when such a register has moved.

    Without a `disk` there is no IDE channel either, and without a `keyboard` no controller: their ports are empty.
    """

    def __init__(
        self,
        bus: PortBus,
        memory_size: int,
        *,
        now: Callable[[], int],
        console: Callable[[bytes], None],
        interrupt: Callable[[bool], None],
        a20: Callable[[bool], None],
        reset: Callable[[], None],
        exit_run: Callable[[int], None],
        disk: Disk | None = None,
        keyboard: bool = True,
        model: Model = "isapc",
        devices: DeviceMemory | None = None,
        power_off: Callable[[], None] = lambda: None,
        flush_tlb: Callable[[], None] = lambda: None,
    ) -> None:
        self.chipset: Chipset | None = None
        if model == "pc":
            self.chipset = Chipset(
                bus,
                DeviceMemory() if devices is None else devices,
                now=now,
                interrupt=interrupt,
                acknowledge_extint=lambda: self.pics.acknowledge(),
                flush_tlb=flush_tlb,
                reset=reset,
                with_ide=disk is not None,
            )
        self.pics = PicPair(interrupt if self.chipset is None else self.chipset.extint)
        self.acknowledge = self.pics.acknowledge if self.chipset is None else self.chipset.apic.acknowledge
        self.pit = Pit(self.line(TIMER_IRQ), now)
        self.speaker = SpeakerPort(self.pit, now)
        self.uart = Uart(self.line(COM1_IRQ), console)
        self.rtc = Rtc(self.line(RTC_IRQ), now, memory_size)
        self.a20 = A20Gate(a20)
        self.port92 = Port92(self.a20, reset)
        self.debug_console = DebugConsole(console)
        self.debug_exit = DebugExit(exit_run)
        self.crtc = Crtc()
        bus.attach(0x20, 2, self.pics.master, "master PIC")
        bus.attach(0xA0, 2, self.pics.slave, "slave PIC")
        bus.attach(0x4D0, 2, self.pics.elcr, "PIC trigger modes")
        bus.attach(0x40, 4, self.pit, "PIT")
        bus.attach(0x61, 1, self.speaker, "speaker port")
        bus.attach(COM1, 8, self.uart, "COM1")
        bus.attach(0x70, 2, self.rtc, "RTC")
        bus.attach(0x92, 1, self.port92, "port 92")
        bus.attach(0xE9, 1, self.debug_console, "debug console")
        bus.attach(0xF4, 4, self.debug_exit, "isa-debug-exit", width=4)
        bus.attach(0x3D4, 2, self.crtc, "CRTC")
        bus.attach(0x3DA, 1, self.crtc.status, "VGA status")
        self.keyboard: I8042 | None = None
        if keyboard:
            lines = self.line(KEYBOARD_IRQ), self.line(MOUSE_IRQ)
            self.keyboard = I8042(*lines, Keyboard(), self.a20, reset)
            bus.attach(0x60, 1, self.keyboard.data, "keyboard data")
            bus.attach(0x64, 1, self.keyboard, "keyboard")
        self.ide: Ide | None = None
        if disk is not None:
            self.ide = Ide(self.line(DISK_IRQ), disk)
            self.rtc.describe_disk(default_geometry(disk.sectors))
            bus.attach_data(DISK, self.ide.data, "disk data")
            bus.attach(DISK + 1, 7, self.ide, "disk")
            bus.attach(DISK_CONTROL, 1, self.ide.control, "disk control")
        self._timed: tuple[Timed, ...] = (self.pit, self.rtc)
        if self.chipset is not None:
            self.chipset.add_power(bus, self.line(SCI_IRQ), now, power_off)
            self._timed = (*self._timed, self.chipset.apic, self.chipset.power)

    def line(self, irq: int) -> Line:
        """An interrupt line of the PC/AT's, to hand to the device that drives it."""
        old = self.pics.line(irq)
        return old if self.chipset is None else self.chipset.line(irq, old)

    def add(self, device: Timed) -> None:
        """Something more that happens by the clock: a monitor's own timers, say."""
        self._timed = (*self._timed, device)

    def deadline(self) -> int | None:
        """When a line next moves by itself, in ns of guest time."""
        nearest = None
        for device in self._timed:
            deadline = device.deadline()
            if deadline is not None and (nearest is None or deadline < nearest):
                nearest = deadline
        return nearest

    def tick(self) -> None:
        """Bring every line up to date with the clock."""
        for device in self._timed:
            device.tick()
