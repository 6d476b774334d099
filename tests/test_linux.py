"""A stock Linux: Debian's kernel, unmodified, from its first instruction to userspace and the end.

It is fetched by `make linux`. The boot is the same for all of them but for the mode; what the commands print then is
compared with QEMU's.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from itertools import islice

import pytest

from tests.oracles import require, require_linux
from tests.test_devices_ide import Medium
from tools.linux import logs
from tools.linux.logs import MEMORY
from tools.lockstep.search import Found, Search
from vmm.image import kallsyms
from vmm.image.load import ModuleFile, load_image
from vmm.vm import UNMODIFIED, ClockName, Paravirt, Result, VirtualMachine

COMMANDS = "machine; exercise; container"
READY = "userspace: ready"
TIMEOUT = 600  # seconds


@functools.cache
def boot(
    mode: str,
    commands: str,
    clock: ClockName = "instructions",
    paravirt: Paravirt | None = None,
    timeout: float = TIMEOUT,
) -> Result:
    """Linux in a mode until it has run `commands` and powered off; kept, for another test to look at, too."""
    kernel, initrd = require_linux()
    image = load_image(
        kernel, memory=MEMORY, command_line=logs.command_line(commands), modules=[ModuleFile(initrd)]
    )
    return VirtualMachine(image, mode, memory=MEMORY, clock=clock, paravirt=paravirt).run(None, timeout)


def printed(console: bytes) -> list[str]:
    """What userspace printed, without what it tells of the machine and without the kernel's own lines."""
    lines = logs.sections(console)["log"]
    assert READY in lines, f"no userspace: {console[-2000:].decode(errors='replace')}"
    after = lines[lines.index(READY) + 1 :]
    return [line for line in after if line and not re.match(r"\[ *\d+\.\d+\]", line)]


@functools.cache
def on_qemu(commands: str) -> bytes:
    """The same on QEMU's small PC: its console."""
    kernel, initrd = require_linux()
    return logs.on_qemu(require("qemu-system-i386"), kernel, initrd, commands)


def test_an_unmodified_linux_does_under_hardware_assist_what_it_does_on_qemu() -> None:
    """Files, pipes, twenty processes, signals, a container: each line as on QEMU."""
    hvm = boot("hvm", COMMANDS)
    assert (hvm.outcome.kind, hvm.outcome.status) == ("halt", 0)
    assert b"reboot: System halted" in hvm.console
    assert b"unchecked MSR access" not in hvm.console  # it has read no register that it did not know may be missing
    lines = printed(hvm.console)
    assert "exercise: done" in lines
    assert "container: box, process 1" in lines
    assert "container: over the limit: 1" in lines
    assert lines[-1] == "userspace: status 0"
    assert lines == printed(on_qemu(COMMANDS))


def test_under_translation_all_is_the_same_to_the_last_byte() -> None:
    """Of two monitors as unlike as can be, a boot is the same to the last byte of the log and the last of three
    billion instructions."""
    hvm, translated = boot("hvm", COMMANDS), boot("bt", COMMANDS)
    assert translated.console == hvm.console
    assert (translated.outcome, translated.instructions) == (hvm.outcome, hvm.instructions)
    assert translated.registers == hvm.registers
    assert translated.memory_sha256 == hvm.memory_sha256


# What a kernel says only where it knows that it runs on KVM, or only where it does not.
OF_THE_CLOCK = (
    "tsc: ", "clocksource: ", "kvm-clock: ", "sched_clock: ", "Calibrating delay loop", "smpboot: Total of 1 ",
    "rtc_cmos ", "audit: type=2000 audit(",
)  # fmt: skip
OF_THE_PROCESSOR = (
    "Hypervisor detected: KVM", "Booting paravirtualized kernel on ", "kvm-guest: ", "microcode: ",
    "PMU not available ", "Broken PMU hardware ", "Failed to access perfctr ", "ITS: ",
)  # fmt: skip


def messages(console: bytes) -> Counter[str]:
    """The kernel's lines without their times, and how often each came."""
    found = (re.match(r"\[ *\d+\.\d+\] (.*)", line) for line in logs.sections(console)["log"])
    return Counter(match[1] for match in found if match)


def test_a_kernel_that_finds_kvm_takes_its_clock_and_is_otherwise_the_same() -> None:
    """Offered KVM's interface Linux says so, does not measure its counter, and switches to kvm-clock; all other lines
    of its log, and all of userspace's, are as without."""
    plain, offered = boot("hvm", COMMANDS), boot("hvm", COMMANDS, paravirt="kvm")
    assert (offered.outcome.kind, offered.outcome.status) == ("halt", 0)
    for line in (
        "Hypervisor detected: KVM",
        "kvm-clock: Using msrs 4b564d01 and 4b564d00",
        "Booting paravirtualized kernel on KVM",
        "clocksource: Switched to clocksource kvm-clock",
    ):
        assert messages(offered.console)[line] == 1
    assert printed(offered.console) == printed(plain.console)
    without, with_it = messages(plain.console), messages(offered.console)
    differing = (without - with_it) + (with_it - without)
    assert [line for line in differing if not line.startswith(OF_THE_CLOCK + OF_THE_PROCESSOR)] == []
    reads = [result.exits.rows["VMEXIT_IOIO IN (by hook)"].count for result in (plain, offered)]
    assert reads[1] * 4 < reads[0]


def test_the_kernel_says_of_its_machine_what_it_says_on_qemu_but_for_what_is_explained() -> None:
    """The log, dmesg, /proc/cpuinfo, /proc/interrupts and more of /proc: each line that only one of the two has is
    explained by a row of the table, and the table has no row that nothing needs."""
    found = logs.compare(boot("hvm", COMMANDS).console, on_qemu(COMMANDS))
    assert found.unexplained == []
    assert found.unused == []


# What a kernel says of the machine `pc`, in this order.
OF_A_PC = (
    "ACPI: PM-Timer IO Port: 0x608",
    "IOAPIC[0]: apic_id 1, version 17, address 0xfec00000, GSI 0-23",
    "ACPI: INT_SRC_OVR (bus 0 bus_irq 0 global_irq 2 dfl dfl)",
    "Enabling APIC mode:  Flat.  Using 1 I/O APICs",
    "tsc: PIT calibration matches PMTIMER. 1 loops",
    "PCI: Using configuration type 1 for base access",
    "ACPI: Interpreter enabled",
    "ACPI: PM: (supports S0 S5)",
    "ACPI: Using IOAPIC for interrupt routing",
    "PCI host bridge to bus 0000:00",
    "pci 0000:00:01.1: [8086:7010] type 00 class 0x010100",
    "pnp: PnP ACPI: found 5 devices",
    "ata_piix 0000:00:01.1: BMDMA: BAR4 is zero, falling back to PIO",
    "ata1.00: ATA-5: VMM ATA DISK, 1.0, max PIO4",
    "ACPI: PM: Preparing to enter system sleep state S5",
    "reboot: Power down",
)


@functools.cache
def boot_pc(mode: str) -> tuple[Result, Medium]:
    """The machine `pc` with a disk, which its own driver reads; and the disk."""
    kernel, initrd = require_linux()
    disk = Medium(64)
    commands = "modprobe ata_piix; modprobe sd_mod; dd if=/dev/sda bs=512 | md5sum; cat /proc/interrupts"
    line = f'console=ttyS0 nokaslr noisapnp cryptomgr.notests vmm.run="{commands}"'
    image = load_image(kernel, memory=MEMORY, command_line=line, modules=[ModuleFile(initrd)])
    return VirtualMachine(image, mode, memory=MEMORY, disk=disk, model="pc").run(None, TIMEOUT), disk


def test_on_a_pc_with_pci_it_finds_everything_by_acpi() -> None:
    """APICs, PCI and power management, of which the small PC has none: interrupts come by the IO-APIC and the local
    APIC's timer, PCI's own driver reads the disk, and `poweroff` switches the machine off."""
    result, disk = boot_pc("hvm")
    assert (result.outcome.kind, result.outcome.status) == ("halt", 0)
    assert result.outcome.detail == "the guest switched the machine off"
    said = [line for line in messages(result.console) if line in OF_A_PC]
    assert said == list(OF_A_PC)
    lines = printed(result.console)
    assert f"{hashlib.md5(disk.read(0, 64)).hexdigest()}  -" in lines
    interrupts = {match[2]: int(match[1]) for line in lines if (match := re.match(r" *\w+: +(\d+) +(.*)", line))}
    assert interrupts["IO-APIC   2-edge      timer"] and interrupts["IO-APIC  14-edge      ata_piix"]
    assert interrupts["Local timer interrupts"] > 500
    assert not interrupts["Spurious interrupts"]
    assert interrupts["IO-APIC   9-fasteoi   acpi"] == 0


@pytest.mark.long
@pytest.mark.parametrize("mode", ("native", "bt"))
def test_a_pc_with_pci_is_the_same_in_every_mode(mode: str) -> None:
    """Devices in memory, whose accesses each mode refuses in its own way, change nothing that a kernel can see."""
    hvm, other = boot_pc("hvm")[0], boot_pc(mode)[0]
    assert other.console == hvm.console
    assert (other.outcome, other.instructions) == (hvm.outcome, hvm.instructions)
    assert other.registers == hvm.registers
    assert other.memory_sha256 == hvm.memory_sha256


def check_symbols(result: Result) -> kallsyms.Symbols:
    """The symbols in memory, which must be those that the script `machine` has seen."""
    found = kallsyms.find(result.memory)
    assert found is not None
    symbols = zip(found.addresses, found.kinds, found.names, strict=True)
    lines = "".join(f"{address:08x} {kind} {name}\n" for address, kind, name in islice(symbols, 5000))
    (line,) = logs.sections(result.console)["symbols"]
    assert hashlib.sha256(lines.encode()).hexdigest() == line.split()[0]
    return found


def test_the_kernels_own_symbols_are_read_as_the_kernel_reads_them() -> None:
    """From its memory, what /proc/kallsyms tells root: address, kind and name."""
    assert check_symbols(boot("hvm", COMMANDS)).address("_text") == 0xC1000000


@pytest.mark.long
@pytest.mark.parametrize("mode", UNMODIFIED)
def test_linux_boots_by_the_wall_clock_too(mode: str) -> None:
    """Where time is the host's, and trap-and-emulate apart, userspace is reached and says the same."""
    if mode == "trap":  # shows the kernel its real IF by PUSHF: it never gets to print
        result = boot(mode, "exercise", "host", timeout=100)
        assert result.outcome.kind == "timeout"
        assert READY.encode() not in result.console
    else:
        assert printed(boot(mode, "exercise", "host", timeout=1200).console) == printed(on_qemu("exercise"))


@pytest.mark.long
def test_symbols_are_found_wherever_the_kernel_has_put_itself() -> None:
    """With memory to choose from and without nokaslr it lies elsewhere, and its symbols with it."""
    kernel, initrd = require_linux()
    words = logs.command_line("machine").replace(" nokaslr", "")
    image = load_image(kernel, memory=4 * MEMORY, command_line=words, modules=[ModuleFile(initrd)])
    result = VirtualMachine(image, "hvm", memory=4 * MEMORY).run(None, TIMEOUT)
    assert check_symbols(result).address("_text") != 0xC1000000


@pytest.mark.long
def test_lock_step_finds_the_instruction_with_which_trap_goes_wrong() -> None:
    """Over two billion instructions after the start, with the function that it is in."""
    kernel, initrd = require_linux()
    image = load_image(kernel, memory=MEMORY, command_line=logs.SMALL_PC, modules=[ModuleFile(initrd)])
    found = Search(*(VirtualMachine(image, mode, memory=MEMORY) for mode in ("native", "trap"))).run()
    assert isinstance(found, Found)
    blamed = found.divergence
    assert blamed.instruction == "pushfd" and blamed.symbol.startswith("vprintk_store+")
    assert blamed.explained and blamed.at > 2_000_000_000
    (store,) = found.stores
    assert (store.after[0] ^ store.after[1]) == 0x200  # IF
