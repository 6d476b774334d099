"""What a Linux says of its machine, compared: between our modes, and with QEMU's small PC.

    python -m tools.linux.logs [--machines native,bt,hvm,qemu] [--all]

boots the same kernel with the same command line on each, to the end of the script `machine`, and compares the log on
the serial port, `dmesg`, and files of /proc: the modes with each other to the last byte, the first of them with QEMU
but for what `explained` explains. The status is 1 if there is a difference that is not.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.linux.explained import BLURS, ROWS, Row
from vmm.image.load import ModuleFile, load_image
from vmm.vm import UNMODIFIED, VirtualMachine

MEMORY = 64 << 20
# Without what this small PC does not have; at the address that it was linked for; without the self-tests of its
# cryptography, which are half of the instructions of a boot.
SMALL_PC = "console=ttyS0 acpi=off noapic nolapic pci=off nokaslr cryptomgr.notests"
END = b"System halted"  # a kernel without power management does nothing after it
_SECTION = re.compile(r"machine: (.*)")
_SPLIT = {"flags": "flag", "bugs": "bug"}  # lines of /proc/cpuinfo that are lists


def command_line(commands: str) -> str:
    """What has `init` run these."""
    return f'{SMALL_PC} vmm.run="{commands}"'


def on_qemu(qemu: str, kernel: Path, initrd: Path, commands: str, timeout: float = 120) -> bytes:
    """The console of a boot on QEMU's small PC, to `END` or until `timeout` seconds have passed."""
    command = [
        *(qemu, "-M", "isapc", "-cpu", "pentium3", "-m", str(MEMORY >> 20), "-net", "none"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", command_line(commands)),
        *("-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot"),
    ]
    console = b""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        for line in process.stdout:
            console += line
            if END in line:
                break
        timer.cancel()
        process.kill()
    return console


def in_mode(mode: str, kernel: Path, initrd: Path, commands: str) -> bytes:
    """The console of a boot in a mode of ours."""
    image = load_image(
        kernel, memory=MEMORY, command_line=command_line(commands), modules=[ModuleFile(initrd)]
    )
    return VirtualMachine(image, mode, memory=MEMORY).run().console


# From a console to lines that can be compared


def sections(console: bytes) -> dict[str, list[str]]:
    """The lines of the log, as `log`, and those that the script `machine` printed, by what it said they are."""
    name, found = "log", dict[str, list[str]]()
    for line in console.decode(errors="replace").replace("\r", "").splitlines():
        if match := _SECTION.fullmatch(line):
            name = "log" if match[1] == "done" else match[1]
        else:
            found.setdefault(name, []).append(line)
    return found


def plain(lines: list[str], blurred: set[str] | None = None) -> Iterator[str]:
    """The lines without the numbers that mean nothing, each flag on its own. `blurred` gets what was blurred."""
    for line in lines:
        for blur in BLURS:
            line, count = re.subn(blur.pattern, blur.replacement, line)
            if count and blurred is not None:
                blurred.add(blur.what)
        name, tab, rest = line.partition("\t")
        if tab and name in _SPLIT:
            yield from (f"{_SPLIT[name]} {word}" for word in rest.strip(": \t").split())
        else:
            yield line


@dataclass
class Differences:
    """Lines that only one of two machines has, by section; `rows` say which row explains them."""

    unexplained: list[tuple[str, str, str]] = field(default_factory=list)  # section, whose, line
    explained: dict[Row, list[tuple[str, str, str]]] = field(default_factory=dict)
    unused: list[str] = field(
        default_factory=list
    )  # patterns, and what was to be blurred, that nothing needed


def compare(ours: bytes, theirs: bytes, rows: tuple[Row, ...] = ROWS) -> Differences:
    """Compare two consoles. In what order lines come is not compared: drivers start at the same time."""
    found, used, blurred = Differences(), set[tuple[str, str]](), set[str]()
    mine, other = sections(ours), sections(theirs)
    for section in {**mine, **other}:
        a, b = (Counter(plain(part.get(section, []), blurred)) for part in (mine, other))
        for whose, lines in (("ours", a - b), ("theirs", b - a)):
            for line in lines.elements():
                row, pattern = _explanation(rows, whose, line)
                if row is None:
                    found.unexplained.append((section, whose, line))
                else:
                    used.add((whose, pattern))
                    found.explained.setdefault(row, []).append((section, whose, line))
    found.unused = [
        f"{row.what}: {whose}: {pattern}"
        for row in rows
        if not row.sometimes
        for whose, patterns in (("ours", row.ours), ("theirs", row.theirs))
        for pattern in patterns
        if (whose, pattern) not in used
    ]
    found.unused += [blur.what for blur in BLURS if blur.what not in blurred]
    return found


def _explanation(rows: tuple[Row, ...], whose: str, line: str) -> tuple[Row | None, str]:
    for row in rows:
        for pattern in row.ours if whose == "ours" else row.theirs:
            if re.fullmatch(pattern, line):
                return row, pattern
    return None, ""


def table() -> str:
    """What is explained, as a table in Markdown."""
    lines = ["| differs from QEMU | because |", "|---|---|"]
    return "\n".join((*lines, *(f"| {row.what} | {row.why} |" for row in (*BLURS, *ROWS)))) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("linux"), help="the kernel's (default: linux)")
    parser.add_argument("--machines", default="native,hvm,bt,qemu", help="by commas (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="tell what is explained, too")
    parser.add_argument("--table", action="store_true", help="print the explanations, and boot nothing")
    options = parser.parse_args()
    if options.table:
        print(table(), end="")
        return 0
    machines = options.machines.split(",")
    known = [mode for mode in UNMODIFIED if mode != "trap"]
    if unknown := set(machines) - {*known, "qemu"}:
        parser.error(f"--machines {','.join(sorted(unknown))}: choose from {', '.join(known)} and qemu")
    kernel, initrd = options.folder / "vmlinuz", options.folder / "initrd.gz"
    if not (kernel.exists() and initrd.exists()):
        parser.error(f"--folder {options.folder}: there is no Linux to boot: fetch one with `make linux`")
    logs = {
        name: on_qemu("qemu-system-i386", kernel, initrd, "machine")
        if name == "qemu"
        else in_mode(name, kernel, initrd, "machine")
        for name in machines
    }
    theirs = logs.pop("qemu", None)
    first, *others = logs
    good = True
    for name in others:
        equal = logs[name] == logs[first]
        good &= equal
        print(f"{first}, {name}: {'the same to the last byte' if equal else 'DIFFERENT'}")
    if theirs is None:
        return 0 if good else 1
    found = compare(logs[first], theirs)
    for section, whose, line in found.unexplained:
        print(f"not explained: {section}: only {first if whose == 'ours' else 'qemu'}: {line}")
    for text in found.unused:
        print(f"not needed: {text}")
    for row, lines in found.explained.items() if options.all else ():
        print(f"{row.what}: {row.why}")
        for section, whose, line in lines:
            print(f"    {section}: only {first if whose == 'ours' else 'qemu'}: {line}")
    count = sum(map(len, found.explained.values()))
    print(f"{first}, qemu: {count} lines differ and are explained, {len(found.unexplained)} are not")
    return 0 if good and not found.unexplained and not found.unused else 1


if __name__ == "__main__":
    sys.exit(main())
