"""A stock Linux: Debian's kernel, unmodified, from its first instruction to userspace and the end.

It is fetched by `make linux`. The boot is the same for all of them but for the mode; what the commands print then is
compared with QEMU's.
"""

from __future__ import annotations

import functools
import re
import subprocess
import threading
from collections import Counter

import pytest

from tests.oracles import require, require_linux
from vmm.image.load import ModuleFile, load_image
from vmm.vm import UNMODIFIED, ClockName, Paravirt, Result, VirtualMachine

MEMORY = 64 << 20
COMMANDS = "exercise; container"
READY = b"userspace: ready"
TIMEOUT = 600  # seconds
# Without what this small PC does not have; at the address that it was linked for; without the self-tests of its
# cryptography, which are half of the instructions of a boot.
SMALL_PC = "console=ttyS0 acpi=off noapic nolapic pci=off nokaslr cryptomgr.notests"


@functools.cache
def boot(
    mode: str, commands: str, clock: ClockName = "instructions", paravirt: Paravirt | None = None
) -> Result:
    """Linux in a mode until it has run `commands` and powered off; kept, for another test to look at, too."""
    kernel, initrd = require_linux()
    image = load_image(
        kernel,
        memory=MEMORY,
        command_line=f'{SMALL_PC} vmm.run="{commands}"',
        modules=[ModuleFile(initrd)],
    )
    return VirtualMachine(image, mode, memory=MEMORY, clock=clock, paravirt=paravirt).run(None, TIMEOUT)


def printed(console: bytes) -> list[str]:
    """What userspace printed, without the kernel's own lines, which tell the time."""
    _, found, after = console.partition(READY)
    assert found, f"no userspace: {console[-2000:].decode(errors='replace')}"
    lines = after.decode().replace("\r", "").splitlines()
    return [line for line in lines if line and not re.match(r"\[ *\d+\.\d+\]", line)]


def on_qemu(commands: str) -> list[str]:
    """The same on QEMU's small PC. A kernel without power management only halts: the line before ends it."""
    kernel, initrd = require_linux()
    command = [
        *(require("qemu-system-i386"), "-M", "isapc", "-cpu", "pentium3", "-m", "64", "-net", "none"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", f'{SMALL_PC} vmm.run="{commands}"'),
        *("-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot"),
    ]
    console = b""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        timer = threading.Timer(120, process.kill)
        timer.start()
        for line in process.stdout:
            console += line
            if b"System halted" in line:
                break
        timer.cancel()
        process.kill()
    return printed(console)


def test_an_unmodified_linux_does_under_hardware_assist_and_translation_what_it_does_on_qemu() -> None:
    """Files, pipes, twenty processes, signals, a container: each line as on QEMU. And of two monitors as unlike as
    can be, the whole boot is the same to the last byte of the log and the last of three billion instructions."""
    hvm = boot("hvm", COMMANDS)
    assert (hvm.outcome.kind, hvm.outcome.status) == ("halt", 0)
    assert b"reboot: System halted" in hvm.console
    lines = printed(hvm.console)
    assert "exercise: done" in lines
    assert "container: box, process 1" in lines
    assert "container: over the limit: 1" in lines
    assert lines[-1] == "userspace: status 0"
    assert lines == on_qemu(COMMANDS)
    translated = boot("bt", COMMANDS)
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
    found = re.findall(rb"^\[ *\d+\.\d+\] ([^\r\n]*)", console, re.MULTILINE)
    return Counter(line.decode() for line in found)


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


@pytest.mark.long
@pytest.mark.parametrize("mode", UNMODIFIED)
def test_linux_boots_by_the_wall_clock_too(mode: str) -> None:
    """Where time is the host's, and trap-and-emulate apart, userspace is reached and says the same."""
    result = boot(mode, "exercise", "host")
    if mode == "trap":  # shows the kernel its real IF by PUSHF: it never gets to print
        assert READY not in result.console
    else:
        assert printed(result.console) == on_qemu("exercise")
