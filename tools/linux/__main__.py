"""A real Linux to boot: Debian's kernel for i386 and an initial RAM disk of busybox, in the folder `linux/`.

    python -m tools.linux [--folder DIR] [--suite NAME] [--again]

fetches the packages, unless the folder has them already, and makes `vmlinuz` and `initrd.gz` of them. Nothing is
installed, and nothing of it belongs into the repository.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tools.linux import initramfs, modules
from tools.packages import RELEASE, apt, dependencies, suite, unpack

KERNEL, BUSYBOX = "linux-image-686", "busybox-static"
MODULES = ("overlay", "pata_legacy", "ata_piix", "sd_mod", "ext4", "crc32c_generic")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("linux"), help="where it goes (default: linux)")
    parser.add_argument("--suite", default=suite(), help=f"the release (default: {RELEASE})")
    parser.add_argument("--again", action="store_true", help="fetch the packages even if they are there")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.again or not _complete(folder):
        fetch(folder, options.suite)
    make(folder)
    print(
        f"{options.folder}: kernel {release_of(folder)}, initrd of {(folder / 'initrd.gz').stat().st_size} bytes"
    )


def _complete(folder: Path) -> bool:
    """Whether a fetch has been finished there, with all the modules that are wanted now."""
    needed = ["vmlinuz", "busybox", "release", *(f"modules/{name}.ko" for name in MODULES)]
    return all((folder / name).exists() for name in needed)


def release_of(folder: Path) -> str:
    """The kernel's release, as `uname -r` has it."""
    return (folder / "release").read_text().strip()


def fetch(folder: Path, suite: str | None) -> None:
    """Get the packages and keep of them the kernel, its configuration, busybox and the modules."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        sys.exit("tools.linux: needs apt-get and dpkg: run it on Debian or a relative")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary)
        apt(work, "i386", suite, "apt-get", "update")
        kernels = [
            name for name in dependencies(work, "i386", suite, KERNEL) if name.startswith("linux-image-")
        ]
        if not kernels:
            sys.exit(f"tools.linux: {KERNEL} depends on no kernel: name a release that has one with --suite")
        root = unpack(work, "i386", suite, (kernels[0], BUSYBOX))
        release = kernels[0].removeprefix("linux-image-")
        found = modules.closure(root / "lib/modules" / release, MODULES)
        shutil.rmtree(folder / "modules", ignore_errors=True)
        (folder / "modules").mkdir()
        for module in found:
            (folder / "modules" / f"{module.name}.ko").write_bytes(module.data)
        shutil.copyfile(root / "boot" / f"config-{release}", folder / "config")
        shutil.copyfile(root / "bin/busybox", folder / "busybox")
        shutil.copyfile(root / "boot" / f"vmlinuz-{release}", folder / "vmlinuz")
        (folder / "release").write_text(f"{release}\n")


def make(folder: Path) -> None:
    """The initial RAM disk, of what was fetched."""
    contents = modules.closure(folder / "modules", sorted(p.stem for p in (folder / "modules").glob("*.ko")))
    busybox = (folder / "busybox").read_bytes()
    (folder / "initrd.gz").write_bytes(initramfs.build(busybox, release_of(folder), contents))


if __name__ == "__main__":
    main()
