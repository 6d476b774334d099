"""The initial file system: busybox, an `init` of ours, and the modules that `modprobe` may be asked for.

Busybox's shell knows its commands without files for them; only what the kernel or a `#!` line names has a link.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from tools.linux import cpio, modules
from tools.linux.modules import Module

INIT = Path(__file__).with_name("init")
SHELL = Path(__file__).with_name("shellrc")
SCRIPTS = sorted(Path(__file__).with_name("scripts").iterdir())
FOLDERS = ("bin", "dev", "etc", "lib", "mnt", "proc", "root", "sbin", "sys", "tmp")
LINKS = {"bin/sh": "busybox", "sbin/modprobe": "/bin/busybox"}
CONSOLE = (5, 1)


def build(
    busybox: bytes, release: str, contents: list[Module], extra: list[cpio.Entry] | None = None
) -> bytes:
    """The archive, compressed; `release` is the kernel's, as `uname -r` has it."""
    where = f"lib/modules/{release}"
    entries = [cpio.directory(path) for path in (*FOLDERS, "lib/modules", where)]
    entries += [
        cpio.character_device("dev/console", *CONSOLE),
        cpio.file("bin/busybox", busybox, executable=True),
        cpio.file("init", INIT.read_bytes(), executable=True),
        cpio.file("etc/shellrc", SHELL.read_bytes()),
        *(cpio.file(f"bin/{script.name}", script.read_bytes(), executable=True) for script in SCRIPTS),
        *(cpio.link(path, target) for path, target in LINKS.items()),
        *(cpio.file(f"{where}/{module.name}.ko", module.data) for module in contents),
        cpio.file(f"{where}/modules.dep", modules.dependency_table(contents).encode()),
        cpio.file(f"{where}/modules.alias", modules.alias_table(contents).encode()),
        *(extra or []),
    ]
    return gzip.compress(cpio.archive(entries), mtime=0)
