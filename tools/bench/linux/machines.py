"""What Linux boots on: QEMU, Bochs, and our modes. Each gives the command for a kernel with its command line.

All have 128 MB, one CPU and no network, and the same words for the kernel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from tools.bench.bochs import Installation
from tools.bench.linux.boot import Command

MEMORY = 128  # MiB


@dataclass(frozen=True)
class Guest:
    """The files of the kernel and its initial RAM disk."""

    kernel: Path
    initrd: Path


class Machine(Protocol):
    """`begins` is the text from which on time counts, empty if from the start of the process; `notes` say what has to
    be known of its figures."""

    name: str
    title: str
    begins: bytes

    @property
    def notes(self) -> list[str]: ...

    def absent(self) -> str | None:
        """Why nothing can be measured on it, None if it can."""

    def command(self, guest: Guest, command_line: str, folder: Path) -> Command:
        """How to boot; files of the machine's own go to `folder`, which is empty."""


class Ours:
    """A mode, by the command line that a user would give."""

    begins = b""
    notes: ClassVar[list[str]] = []

    def __init__(self, name: str, *options: str) -> None:
        self.name = self.title = name
        self._options = options

    def absent(self) -> str | None:
        return None

    def command(self, guest: Guest, command_line: str, folder: Path) -> Command:
        report = folder / "report.json"
        words = (
            *(sys.executable, "-m", "vmm", "run", str(guest.kernel), "--initrd", str(guest.initrd)),
            *("-m", f"{MEMORY}M", "--append", command_line, "--clock", "host", *self._options),
            *("--report", str(report)),
        )
        return Command(words, report=report)


class Qemu:
    """QEMU with TCG, on the small PC that these modes are, too."""

    name, title, begins = "qemu", "QEMU TCG", b""
    notes: ClassVar[list[str]] = []

    def absent(self) -> str | None:
        if shutil.which("qemu-system-i386"):
            return None
        return "qemu-system-i386 is not installed (Debian: qemu-system-x86)"

    def command(self, guest: Guest, command_line: str, folder: Path) -> Command:
        return Command((
            *("qemu-system-i386", "-M", "isapc", "-cpu", "pentium3", "-accel", "tcg,thread=single"),
            *("-m", str(MEMORY), "-net", "none", "-display", "none", "-monitor", "none", "-serial", "stdio"),
            *("-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", command_line),
            "-no-reboot",
        ))  # fmt: skip


class Bochs:
    """Bochs, an interpreter, from a CD with a boot loader that says on the serial port when it is done.

    Its firmware's start and the loader are not the kernel's: time counts from the loader's last line.
    """

    name, title, begins = "bochs", "Bochs", b"initrd...ok"
    BIOS = ("BIOS-bochs-latest",)
    LOADER: ClassVar = {  # of the CD, where distributions put it
        "isolinux.bin": ("/usr/lib/ISOLINUX", "/usr/lib/syslinux", "/usr/share/syslinux"),
        "ldlinux.c32": ("/usr/lib/syslinux/modules/bios", "/usr/lib/syslinux", "/usr/share/syslinux"),
    }
    CONFIGURATION = """\
serial 0 115200
default linux
prompt 0
label linux
 kernel vmlinuz
 initrd initrd
 append {command_line}
"""

    def __init__(self) -> None:
        self._installed = Installation(self.BIOS)

    def absent(self) -> str | None:
        if self._installed.absent is not None:
            return self._installed.absent
        if shutil.which("xorriso") is None or not all(self._loader(name) for name in self.LOADER):
            return "there is no CD to boot from: xorriso or isolinux is not installed (Debian: xorriso, isolinux)"
        return None

    @property
    def notes(self) -> list[str]:
        slow = "Bochs is a build with its debugger, as Debian packages it, which costs it some speed"
        return [slow] if self._installed.has_debugger else []

    def _loader(self, name: str) -> Path | None:
        found = (Path(folder) / name for folder in self.LOADER[name])
        return next((path for path in found if path.is_file()), None)

    def command(self, guest: Guest, command_line: str, folder: Path) -> Command:
        files, disc, serial = folder / "files", folder / "boot.iso", folder / "serial"
        files.mkdir()
        for name in self.LOADER:
            source = self._loader(name)
            assert source is not None
            shutil.copyfile(source, files / name)
        shutil.copyfile(guest.kernel, files / "vmlinuz")
        shutil.copyfile(guest.initrd, files / "initrd")
        (files / "isolinux.cfg").write_text(self.CONFIGURATION.format(command_line=command_line))
        subprocess.run(
            ("xorriso", "-as", "mkisofs", "-quiet", "-o", disc, "-b", "isolinux.bin", "-c", "boot.cat",
             "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", files),
            check=True,
            capture_output=True,
        )  # fmt: skip
        words = self._installed.command(
            folder,
            f"megs: {MEMORY}\ncpu: model=p3_katmai\n"
            f"ata0-master: type=cdrom, path={disc}, status=inserted\nboot: cdrom\n"
            f"com1: enabled=1, mode=file, dev={serial}\nerror: action=ignore\ninfo: action=ignore\n"
            "speaker: enabled=0\n",
        )
        return Command(words, serial=serial)


def machines() -> tuple[Machine, ...]:
    """All of them, the one to compare with first."""
    return (
        Qemu(),
        Bochs(),
        Ours("native", "--mode", "native"),
        Ours("hvm", "--mode", "hvm"),
        Ours("hvm shadow", "--mode", "hvm", "--memory-virtualization", "shadow"),
        Ours("bt", "--mode", "bt"),
    )
