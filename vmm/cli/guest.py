"""From the options that name a guest to its image; shared by the commands."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from vmm.cli import values
from vmm.errors import OutputError, UsageError
from vmm.image.image import DEFAULT_LOAD, Image
from vmm.image.linux import DEFAULT_MEMORY
from vmm.image.load import is_kernel, is_source, load_image

LARGEST = 3 << 30  # memory for commands that run nothing
USUAL_MEMORY = 16 << 20


def memory_of(options: argparse.Namespace) -> int:
    """Bytes of RAM that `options` ask for, or that suit such a guest. Raises `UsageError`."""
    if options.memory is not None:
        return values.memory_size(options.memory)
    return DEFAULT_MEMORY if is_kernel(values.path(options.guest)) else USUAL_MEMORY


def image_of(options: argparse.Namespace, memory: int = LARGEST) -> Image:
    """The guest that `options` name, for a machine with `memory` bytes; raises `UsageError`, `ImageError`."""
    path = values.path(options.guest)
    defines = values.defines(options.defines)
    load, entry = getattr(options, "load", None), getattr(options, "entry", None)
    if is_source(path) and load is not None:
        raise UsageError(f"--load {load}: a source says itself where it goes, by org: leave --load out")
    if defines and not is_source(path):
        raise UsageError(f"-D {options.defines[0]}: {path} is not a source: only a .asm takes definitions")
    return load_image(
        path,
        memory=memory,
        defines=defines,
        command_line=getattr(options, "append", ""),
        load=DEFAULT_LOAD if load is None else values.address("--load", load),
        entry=None if entry is None else values.address("--entry", entry),
        modules=values.modules(getattr(options, "initrd", None), getattr(options, "modules", ())),
    )


def check_distinct(options: argparse.Namespace, outputs: Mapping[str, str | None]) -> None:
    """Refuse an output that would overwrite an input or another output, by option. Raises `UsageError`."""
    seen = [(options.guest, "the guest")]
    if getattr(options, "disk", None) is not None:
        disk = values.disk(options.disk)[0]
        if _same_file(options.guest, disk):
            raise UsageError(f"--disk {disk}: that is the guest: choose another file")
        seen.append((disk, "the guest's disk"))
    for option in ("initrd", "script", "input"):
        name = getattr(options, option, None)
        if name is not None and name != "-":
            seen.append((name, f"the file of --{option}"))
    seen += [(text.partition(",")[0], "the file of --module") for text in getattr(options, "modules", ())]
    for option, name in outputs.items():
        if name is None:
            continue
        for other, what in seen:
            if _same_file(name, other):
                raise UsageError(f"{option} {name}: that is {what}: choose another file")
        seen.append((name, f"the file of {option}"))


def _same_file(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return os.path.abspath(a) == os.path.abspath(b)


def open_output(option: str, name: str, *, keep: bool = False) -> int:
    """A file descriptor to write to, before the run, so that nothing is lost after it; `OutputError`.

    With `keep` what the file holds is still there until `replace_output`.
    """
    try:
        return os.open(Path(name), os.O_WRONLY | os.O_CREAT | (0 if keep else os.O_TRUNC), 0o666)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutputError(f"{option} {name}: cannot be written: {reason}: choose another file") from None


def replace_output(option: str, name: str, descriptor: int, text: str) -> None:
    """Write all that the file shall hold, and close it; `OutputError`."""
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                file.truncate(0)
            file.write(text)
    except OSError as error:
        raise OutputError(f"{option} {name}: {error.strerror}") from None
