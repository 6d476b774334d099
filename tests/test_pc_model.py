"""The machine `pc` as a whole: how it ends, whose interrupt comes by which way, and who can have it."""

from __future__ import annotations

import pytest

from tests.guest_expectations import GUESTS
from tests.machines import handler, lab
from tests.test_cli import Cli, vmm  # noqa: F401  # a fixture
from tests.test_devices_ide import Medium
from vmm.errors import UsageError
from vmm.image.load import load_image
from vmm.machine.bus import PortBus
from vmm.machine.devices import apic, ioapic
from vmm.machine.pc import DISK_IRQ, KEYBOARD_IRQ, TIMER_IRQ, Devices
from vmm.vm import UNMODIFIED, VirtualMachine

ENDS = {
    "soft-off": ("mov dx, 0x604\n mov ax, 0x3400\n out dx, ax", "the guest switched the machine off"),
    "the reset register": ("mov dx, 0xCF9\n mov al, 6\n out dx, al", "the guest reset the machine"),
}


@pytest.mark.parametrize("mode", UNMODIFIED)
@pytest.mark.parametrize("way", ENDS)
def test_acpi_ends_the_run(way: str, mode: str) -> None:
    """Power off and reset end it with status 0, right after the store: nothing of what comes next happens."""
    source, detail = ENDS[way]
    made = lab(source + "\n inc ebx\n mov [0x1F0000], ebx\nstop: jmp stop", mode, model="pc")
    outcome = made.run(100)
    assert (outcome.kind, outcome.status, outcome.detail) == ("halt", 0, detail)
    assert made.reg("ebx") == 0 and made.read(0x1F0000) == 0 and made.retired == 3


class Board:
    """The devices of a `pc`, and the processor's pin."""

    def __init__(self) -> None:
        self.pin, self.time = False, 0
        self.devices = Devices(
            PortBus(),
            64 << 20,
            now=lambda: self.time,
            console=lambda _data: None,
            interrupt=self._interrupt,
            a20=lambda _level: None,
            reset=lambda: None,
            exit_run=lambda _value: None,
            disk=Medium(8),
            model="pc",
        )
        assert self.devices.chipset is not None
        self.chipset = self.devices.chipset
        self.chipset.apic.wire()

    def _interrupt(self, level: bool) -> None:
        self.pin = level

    def redirect(self, pin: int, low: int) -> None:
        self.chipset.ioapic.write(ioapic.SELECT, 4, 0x10 + 2 * pin)
        self.chipset.ioapic.write(ioapic.WINDOW, 4, low)


@pytest.mark.parametrize(("irq", "pin"), [(TIMER_IRQ, 2), (KEYBOARD_IRQ, 1), (DISK_IRQ, 14), (9, 9)])
def test_each_line_reaches_its_pin(irq: int, pin: int) -> None:
    """The number of the line, but for the timer's, which is on pin 2; the old controllers hear it, too."""
    board = Board()
    board.redirect(pin, 0x60)
    line = board.devices.line(irq)
    line(True)
    assert board.pin and board.devices.acknowledge() == 0x60
    lines = board.devices.pics.state.slave.lines << 8 | board.devices.pics.state.master.lines
    assert lines >> irq & 1


def test_the_old_controllers_reach_the_processor_as_before() -> None:
    """As firmware leaves it, an interrupt of the keyboard's comes by way of the 8259A, with its vector."""
    board = Board()
    pics = board.devices.pics
    for port, value in ((0, 0x11), (1, 0x20), (1, 4), (1, 1), (1, 0)):
        pics.master.write(port, 1, value)
    board.devices.line(KEYBOARD_IRQ)(True)
    assert board.pin and board.devices.acknowledge() == 0x21


def test_the_timers_deadlines_are_the_machines() -> None:
    """What the APIC's timer and the power management timer are due at, the machine stops for."""
    board = Board()
    before = board.devices.deadline()
    board.chipset.apic.write(apic.LVT_TIMER, 4, 0x40)
    board.chipset.apic.write(apic.INITIAL_COUNT, 4, 1)
    assert board.devices.deadline() == 20 != before  # the divisor is two after reset
    board.time = 20
    board.devices.tick()
    assert board.pin and board.devices.acknowledge() == 0x40


@pytest.mark.parametrize("mode", UNMODIFIED)
def test_a_disk_interrupts_by_the_io_apic(mode: str) -> None:
    """A guest that has masked the old controllers gets line 14 as the vector that it chose, by its edge."""
    image = load_image(GUESTS / "apic.asm", memory=4 << 20)
    machine = VirtualMachine(image, mode, memory=4 << 20, disk=Medium(8), model="pc").machine
    assert machine.devices.chipset is not None and machine.devices.ide is not None
    assert machine.bus.owner(0x1F1) == "disk"
    chips = machine.devices.chipset
    chips.ioapic.write(ioapic.SELECT, 4, 0x10 + 2 * DISK_IRQ)
    chips.ioapic.write(ioapic.WINDOW, 4, 0x6E)
    machine.bus.write(0x21, 1, 0xFF)
    machine.bus.write(0x1F7, 1, 0xEC)
    assert machine.interrupt_pending and machine.devices.acknowledge() == 0x6E


def test_an_interrupt_in_a_sleeping_guest() -> None:
    """HLT ends when the APIC's timer is due, and not before."""
    source = f"""
        mov dword [{apic.BASE + apic.DIVIDE:#x}], 0xB
        mov dword [{apic.BASE + apic.LVT_TIMER:#x}], 0x40
        mov dword [{apic.BASE + apic.INITIAL_COUNT:#x}], 100000
        sti
        hlt
        nop"""
    times = []
    for mode in UNMODIFIED:
        made = lab(source, mode, model="pc")
        made.run(6)  # the last one is the delivery
        assert made.control.where() == handler(0x40)
        times.append(made.machine.now())
    assert set(times) == {(3 + 100_000) * 10 + 10}


# On the command line


def test_a_machine_that_does_not_exist_is_refused(vmm: Cli) -> None:  # noqa: F811
    """One line names what there is."""
    for command in ("run", "compare"):
        assert vmm(command, GUESTS / "hello.asm", "--machine", "q35") == 2
        assert vmm.err == "vmm: --machine q35: no such machine: choose isapc or pc\n"


def test_a_domain_has_no_machine(vmm: Cli) -> None:  # noqa: F811
    """Xen's interface has no hardware to choose."""
    why = "a guest of pv has no machine, but Xen's interface: use native, hvm, bt or trap"
    assert vmm("run", GUESTS / "hello.asm", "--mode", "pv", "--machine", "pc") == 2
    assert vmm.err == f"vmm: --machine pc: {why}\n"
    with pytest.raises(UsageError, match="--machine pc"):
        VirtualMachine(load_image(GUESTS / "hello.asm", memory=16 << 20), "pv", model="pc")
    assert vmm("compare", GUESTS / "apic.asm", "--machine", "pc", "--json") == 0
    assert '"pv"' in vmm.out


def test_without_an_apic_the_guest_says_so(vmm: Cli) -> None:  # noqa: F811
    """On the small PC CPUID tells of none."""
    assert vmm("run", GUESTS / "apic.asm") == 3
    assert vmm.out == "apic: none; add --machine pc\n"
