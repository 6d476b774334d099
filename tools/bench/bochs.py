"""Bochs as it is installed: its program, its firmware, and how to start it without a person at the terminal."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cached_property
from pathlib import Path

FOLDERS = ("/usr/share/bochs", "/usr/share/vgabios", "/usr/local/share/bochs", "/usr/share/seabios")
VGA_BIOS = ("VGABIOS-lgpl-latest", "VGABIOS-lgpl-latest.bin", "vgabios.bin")
HELP = 30.0  # seconds that it may take to tell its options


class Installation:
    """What is there; `absent` says what is not. `bios` are the names of the BIOS images that will do."""

    def __init__(self, bios: tuple[str, ...]) -> None:
        self.program = shutil.which("bochs-bin") or shutil.which("bochs")
        self._names = bios

    @property
    def absent(self) -> str | None:
        """What is to be installed, None if nothing."""
        if self.program is None:
            return "bochs is not installed (Debian: bochs, bochsbios, vgabios)"
        if self.bios is None or self.vga_bios is None:
            return "bochs is installed, and its BIOS images are not (Debian: bochsbios, vgabios)"
        return None

    @cached_property
    def bios(self) -> Path | None:
        return _rom(self._names)

    @cached_property
    def vga_bios(self) -> Path | None:
        return _rom(VGA_BIOS)

    @cached_property
    def has_debugger(self) -> bool:
        """With its debugger built in, it waits for a command before it starts, and runs slower."""
        told = subprocess.run((str(self.program), "--help"), capture_output=True, text=True, timeout=HELP)
        return "-rc " in told.stdout + told.stderr

    def command(self, folder: Path, configuration: str) -> tuple[str, ...]:
        """How to start it with a configuration beyond firmware and display; its files go to `folder`."""
        path, commands = folder / "bochsrc", folder / "bochs.commands"
        path.write_text(
            'display_library: rfb, options="timeout=0"\n'  # the one that needs no display
            f"romimage: file={self.bios}\nvgaromimage: file={self.vga_bios}\n"
            f"clock: sync=none\nlog: {folder / 'bochs.log'}\npanic: action=fatal\n{configuration}"
        )
        commands.write_text("c\n")
        flags = ("-rc", str(commands)) if self.has_debugger else ()
        return (str(self.program), "-q", "-f", str(path), *flags)


def _rom(names: tuple[str, ...]) -> Path | None:
    """One of these files, where distributions put them and where BXSHARE points."""
    own = os.environ.get("BXSHARE")
    folders = [Path(own), Path(own).parent / "vgabios"] if own else []
    folders += map(Path, FOLDERS)
    found = (folder / name for name in names for folder in folders)
    return next((path for path in found if path.is_file()), None)
