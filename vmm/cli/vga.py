"""The text screen of a guest: all of it for `--vga`, its last lines where that is all that the guest has said."""

from __future__ import annotations

import sys

from vmm.cli.screen import Screen
from vmm.cli.terminal import is_plain
from vmm.machine.devices import vga
from vmm.vm import VirtualMachine


def _cells(vm: VirtualMachine) -> bytes:
    """Characters and attributes from where the screen begins."""
    start = vm.machine.devices.crtc.start()
    text = vm.machine.memory.bytes[vga.MEMORY : vga.MEMORY + vga.MEMORY_SIZE]
    return bytes(text[start:]) + bytes(text[:start])


def show(vm: VirtualMachine, screen: Screen) -> None:
    """To standard output, after the console, without the blank lines below."""
    cells = _cells(vm)
    lines = [line.rstrip() for line in vga.text(cells)] if is_plain(sys.stdout) else vga.ansi(cells)
    blank = [not line.strip() for line in vga.text(cells)]
    while lines and blank[len(lines) - 1]:
        lines.pop()
    if not screen.at_line_start:
        screen.write(b"\n")
    for line in lines:
        screen.write(line.encode() + b"\n")


def last_lines(vm: VirtualMachine, count: int) -> list[str]:
    """The last ones that are not blank: `count` of them, or fewer."""
    lines = [line.strip() for line in vga.text(_cells(vm))]
    return [line for line in lines if line][-count:]
