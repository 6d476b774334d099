"""Kernels that others have built for Xen, run under ours: Debian's GRUB for Xen and its GNU Mach.

    python -m tools.xen_guests [--folder DIR] [--suite NAME]

fetches the packages with the system's own package manager into a folder (a temporary one unless named), for i386 and
without touching what the system has installed or listed; and runs, printing the console of each and how it ended:

    GRUB at its prompt;
    GRUB that loads a guest of ours, whose notes it must accept and for which it makes page tables;
    GNU Mach;
    GRUB that loads GNU Mach with a task, which makes system calls (a task of ours: `mach_task.asm`).

`--suite` takes GNU Mach from another release than the system's: Debian 12's dies early, of itself.

Needs apt-get and dpkg, a 64-bit Debian (for GRUB's image maker) and the network. Nothing that it fetches belongs into
the repository.
"""

from __future__ import annotations

import argparse
import gzip
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tools.packages import fetch
from vmm.errors import VmmError
from vmm.image.build import build_elf
from vmm.image.load import load_image
from vmm.vm import VirtualMachine

MODULES = ("normal", "minicmd", "echo", "ls", "help", "halt", "reboot", "terminal", "linux", "memdisk", "tar")
GRUB = ("grub-xen-bin", "grub-common")
MACH = "gnumach-image-1.8-xen-486"
TYPED = b"echo a prompt under $grub_platform\rhalt\r"
LOAD_GUEST = "linux (memdisk)/guest.elf\nboot\n"
LOAD_MACH = (
    "multiboot (memdisk)/mach console=com0\n"
    "module (memdisk)/task.elf task '$(task-create)' '$(task-resume)'\n"
    "boot\n"
)
MEMORY, LIMIT = 64 << 20, 50_000_000
HERE = Path(__file__).resolve().parent


def make_grub(root: Path, image: Path, script: str = "", **files: Path) -> Path:
    """An image of GRUB for a 32-bit domain that goes to its prompt, or does what `script` says with `files`.

    A file's name there is its keyword's, with a point for `_`.
    """
    maker = root / "usr/bin/grub-mkimage"
    modules = root / "usr/lib/grub/i386-xen"
    command: list[str | Path] = [maker, "-d", modules, "-O", "i386-xen", "-o", image, "-p", "/boot/grub"]
    if script:
        disk, text = image.with_suffix(".tar"), image.with_suffix(".cfg")
        with tarfile.open(disk, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, path in files.items():
                archive.add(path, name.replace("_", "."))
        text.write_text(script)
        command += ["-m", disk, "-c", text]
    subprocess.run([*command, *MODULES], check=True)
    return image


def build(source: Path, elf: Path, defines: dict[str, str]) -> Path:
    """A source of ours as an ELF."""
    build_elf(load_image(source, memory=3 << 30, defines=defines), elf)
    return elf


def make_mach(folder: Path, suite: str | None) -> Path:
    """GNU Mach's kernel, unpacked."""
    root = fetch(folder / "mach", "i386", suite, (MACH,))
    kernel = folder / "gnumach-xen"
    kernel.write_bytes(gzip.decompress(next((root / "boot").glob("*.gz")).read_bytes()))
    return kernel


def boot(path: Path, typed: bytes = b"") -> None:
    """Run it, its console on standard output."""
    print(f"--- {path.name}", flush=True)

    def show(data: bytes) -> None:
        os.write(sys.stdout.fileno(), data)

    image = load_image(path, memory=MEMORY)
    vm = VirtualMachine(image, "pv", memory=MEMORY, show=show, console_input=typed)
    result = vm.run(LIMIT)
    exits = sum(row.count for row in result.exits.rows.values())
    end = f"{result.outcome.kind}: {result.outcome.detail}"
    print(f"\n--- {end}; {result.instructions:,} instructions, {exits:,} exits")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keep what is fetched here")
    parser.add_argument("--suite", help="the release that GNU Mach comes from")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        try:
            root = fetch(folder / "grub", "amd64", None, GRUB)
            boot(make_grub(root, folder / "grub.elf"), TYPED)
            guest = build(HERE.parent / "guests" / "hello.asm", folder / "hello.elf", {"PV": ""})
            boot(make_grub(root, folder / "grub-guest.elf", LOAD_GUEST, guest_elf=guest))
            mach = make_mach(folder, options.suite)
            boot(mach)
            task = build(HERE / "mach_task.asm", folder / "task.elf", {})
            boot(make_grub(root, folder / "grub-mach.elf", LOAD_MACH, mach=mach, task_elf=task))
        except VmmError as error:
            sys.exit(f"xen_guests: {error}")


if __name__ == "__main__":
    main()
