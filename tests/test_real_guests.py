"""Other real guests, unmodified: Debian's memtest86+ and GNU Mach, in every mode and beside QEMU.

They are fetched by `make real`. What the guests print is the same in each mode, and the same as on QEMU's small PC
but for what is listed here with its reason.
"""

from __future__ import annotations

import functools
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.oracles import require, require_real
from tests.serial_screen import lines
from vmm.image.build import build_elf
from vmm.image.load import ModuleFile, load_image
from vmm.vm import Result, VirtualMachine

MODES = ("native", "hvm", "bt")
TASK = Path(__file__).parent.parent / "tools" / "mach_task.asm"


def on_qemu(arguments: list[str], is_enough: Callable[[bytes], bool]) -> bytes:
    """The serial log of QEMU's small PC, whose clock begins where ours does, until it says enough."""
    command = [
        *(require("qemu-system-i386"), "-M", "isapc", "-cpu", "pentium3", "-nodefaults"),
        *(
            "-rtc",
            "base=2000-01-01T00:00:00",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
            *arguments,
        ),
    ]
    console = b""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        timer = threading.Timer(100, process.kill)
        timer.start()
        while not is_enough(console):
            data = process.stdout.read1(4096)  # type: ignore[attr-defined]
            if not data:
                break
            console += data
        timer.cancel()
        process.kill()
    return console


# GNU Mach. What it prints otherwise on QEMU, and why.
MACH_MEMORY = 32 << 20
MACH_ELSEWHERE = (
    "biosmem: ",  # the memory map is the firmware's, which keeps a part for itself; ours has none
    "pcibios_init", "pci_init", "Probing PCI", "qlogicisp",  # QEMU's firmware has a PCI BIOS even without PCI
    "FDC 0", "Floppy drive", "floppy0: no floppy",  # that machine's floppy controller cannot be left out
    "RTC time is ",  # how long the boot has taken
)  # fmt: skip
PANIC = "bootstrap_create: No bootstrap code loaded with the kernel!"
SPOKEN = "hello from a task of Mach"


def mach_lines(console: bytes) -> list[str]:
    """Its lines but for those above; a probe that it announces and wipes out is a line of its own."""
    text = console.decode().replace("\x1b[K", "\r")
    return [
        line
        for piece in re.split(r"[\r\n]+", text)
        if (line := piece.strip()) and not line.startswith(MACH_ELSEWHERE)
    ]


def mach(mode: str, modules: list[ModuleFile], last: str, times: int) -> Result:
    """GNU Mach until it has printed a line so many times."""
    image = load_image(
        require_real("gnumach"), memory=MACH_MEMORY, command_line="console=com0", modules=modules
    )
    vm = VirtualMachine(image, mode, memory=MACH_MEMORY)
    for _ in range(times):
        result = vm.run_until(last + "\r\n", within=20)
        assert result.outcome.kind == "seen", result.console[-1000:].decode()
    return result


def different_words(one: Result, other: Result) -> list[int]:
    """Addresses of the words of memory that are not the same."""
    pages = (page for page in range(0, MACH_MEMORY, 4096))
    return [
        word
        for page in pages
        if one.memory[page : page + 4096] != other.memory[page : page + 4096]
        for word in range(page, page + 4096, 4)
        if one.memory[word : word + 4] != other.memory[word : word + 4]
    ]


@pytest.mark.parametrize("task", (False, True), ids=("alone", "with a task"))
def test_mach_boots_in_every_mode_as_on_qemu(task: bool, tmp_path: Path) -> None:
    """It finds its devices, and panics for want of a task; given one as a multiboot module it loads it, and the task
    speaks by system calls. In each mode the same to the last byte and instruction; on QEMU the same lines."""
    modules, initrd, last, times = [], [], PANIC, 1
    if task:
        elf = tmp_path / "task.elf"
        build_elf(load_image(TASK, memory=3 << 30), elf)
        words = "$(task-create) $(task-resume)"
        modules, initrd, last, times = [ModuleFile(elf, words)], ["-initrd", f"{elf} {words}"], SPOKEN, 3
    kernel = str(require_real("gnumach"))
    runs = [mach(mode, modules, last, times) for mode in MODES]
    for run in runs[1:]:
        assert (run.console, run.instructions) == (runs[0].console, runs[0].instructions)
        assert run.registers == runs[0].registers
        assert not different_words(runs[0], run)
    reference = on_qemu(
        ["-m", "32", "-kernel", kernel, "-append", "console=com0", *initrd],
        lambda console: console.decode().replace("\n\r", "\n").count(last + "\r\n") >= times,
    )
    assert mach_lines(runs[0].console) == mach_lines(reference)
    assert len(mach_lines(reference)) > 20


# memtest86+, which draws a screen, again every two seconds.
MEMTEST_MEMORY = 6 << 20
MEMTEST_LINE = "console=ttyS0,115200 nopause"
ENOUGH = 10  # percent of a pass: five of its tests
MEMTEST_ELSEWHERE = (
    r"\| (Pentium III|vmm emulated x86 processor)",  # the model
    r"CLK/Temp: +[\d.]+[MG]Hz *",
    r"L\d Cache: .{7}",  # QEMU's model has caches, this machine has none
    r"Pass +\d+%(?: #*)?",
    r"Test +\d+%(?: #*)?",
    r"Test #.*",
    r"Testing: .*",  # and PAE, which QEMU's model has
    r"Pattern: .*",
    r"Time: +[\d:]+",
    r"Testing  [-/|\\]",
    r"Using: .{24}",
    r"Bochs Bochs",  # the firmware's DMI tables
)


def progress(console: bytes) -> int:
    """Percent of the pass, by the screen."""
    found = re.search(r"Pass +(\d+)%", lines(console)[1])
    return int(found[1]) if found else 0


def still(console: bytes) -> list[str]:
    """The screen without what changes by itself, or is otherwise on QEMU."""
    rest = (re.sub("|".join(MEMTEST_ELSEWHERE), "*", line).strip() for line in lines(console))
    return ["" if line == "*" else line for line in rest]


def names_seen(console: bytes) -> dict[str, str]:
    """Number and name of each test that the screen has named."""
    return dict(re.findall(r"\x1b\[4;\d+H *(?:Test )?#(\d+) +\[([^\]]+)\]", console.decode("cp437")))


@functools.cache
def memtest_on_qemu() -> bytes:
    kernel = str(require_real("memtest.bin"))
    return on_qemu(
        ["-m", "6", "-kernel", kernel, "-append", MEMTEST_LINE],
        lambda seen: progress(seen) >= ENOUGH and seen.endswith(b"   "),
    )


@pytest.mark.parametrize("mode", MODES)
def test_memtest_finds_no_error_and_draws_what_it_draws_on_qemu(mode: str) -> None:
    """Through its first tests, by the wall clock: the screen is QEMU's, with no error on it."""
    kernel = require_real("memtest.bin")
    image = load_image(kernel, memory=MEMTEST_MEMORY, command_line=MEMTEST_LINE)
    vm = VirtualMachine(image, mode, memory=MEMTEST_MEMORY, clock="host")
    console = b""
    while progress(console) < ENOUGH:
        result = vm.run_until("Errors: ", max_instructions=None)
        assert result.outcome.kind == "seen", result.outcome
        console = result.console
    vm.run_until("\x1b", within=10)  # the number itself
    console = bytes(vm.console.kept)
    reference = memtest_on_qemu()
    assert "\n".join(still(console)) == "\n".join(still(reference))
    assert "Errors: 0" in lines(console)[8]
    ours, theirs = names_seen(console), names_seen(reference)
    assert len(ours) >= 2
    assert all(ours[number] == theirs[number] for number in ours.keys() & theirs.keys())
