"""From a path to an image: which format it is, and the way that every guest starts.

A name that ends in `.asm` is source, a file that begins with ELF's magic is an ELF, one with Linux's setup header
is a kernel, and anything else is a flat binary. A kernel starts by its own protocol, and a guest for Xen's interface
by that; whatever else it is, it starts as multiboot has it: EAX holds the boot magic, EBX the address of the
information structure, which is one more segment, as are the modules.
The assembler and the ELF reader are imported only by a guest that needs them, because each costs more than the rest
of a start.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmm.errors import ImageError
from vmm.image import flat, linux, multiboot, xen
from vmm.image.image import DEFAULT_LOAD, Image, Segment, SourceLine, check, check_xen, size_text

if TYPE_CHECKING:
    from vmm.image.asm import Assembly

NO_DEFINES: Mapping[str, str] = {}
ELF_MAGIC = b"\x7fELF"


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """A file to load beside the guest, and what the guest is told of it after the name."""

    path: Path
    arguments: str = ""


def load_image(
    path: Path,
    *,
    memory: int,
    defines: Mapping[str, str] = NO_DEFINES,
    command_line: str = "",
    load: int = DEFAULT_LOAD,
    entry: int | None = None,
    modules: Sequence[ModuleFile] = (),
) -> Image:
    """The guest at `path` for a machine with `memory` bytes of RAM.

    `defines` are names for a source's preprocessor, `command_line` is what the guest finds in its multiboot
    information, boot parameters or start_info, `load` and `entry` (`load` if None) place a flat binary. `modules` are
    those of multiboot; for Linux and for Xen there may be one, the initial RAM disk. Raises `ImageError`, one line,
    for whatever is wrong with a file, and `AssemblyError` for a source.
    """
    size = _size(path)
    name = str(path)
    if is_kernel(path):
        if entry is not None:
            raise ImageError(f"{name}: a Linux kernel has its own entry point: leave --entry out")
        ramdisk = _ramdisk(name, modules, memory, "a Linux kernel")
        with path.open("rb") as file:
            image = linux.read(name, file, size, memory, command_line, ramdisk)
        return replace(image, name=path.name, command_line=command_line)
    if is_source(path):
        if entry is not None:
            raise ImageError(f"{name}: a source has its own entry point: leave --entry out")
        image = _from_source(path, defines, memory)
    else:
        image = _from_file(path, size, memory, load, entry)
    image = replace(image, name=path.name, command_line=command_line)
    if image.xen is None:
        return with_information(image, command_line, memory, [_module(file, memory) for file in modules])
    return replace(image, module=_ramdisk(name, modules, memory, "a guest for Xen's interface"))


def is_source(path: Path) -> bool:
    """Whether `load_image` would assemble it."""
    return path.suffix.lower() == ".asm"


def is_kernel(path: Path) -> bool:
    """Whether `load_image` would boot it as Linux; a file that cannot be read is none."""
    if is_source(path):
        return False
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for whoever writes to it
            return False
        with path.open("rb") as file:
            return linux.is_kernel(file.read(1024))
    except (OSError, ValueError):
        return False


def from_assembly(name: str, assembly: Assembly) -> Image:
    """What the assembler made, as an image without multiboot information."""
    bss, bss_size = assembly.bss
    segments = [Segment(assembly.origin, assembly.data, len(assembly.data))]
    if bss_size:
        segments.append(Segment(bss, b"", bss_size))
    lines = tuple(SourceLine(at.address, at.size, at.file, at.line, at.text) for at in assembly.lines)
    notes = xen.from_symbols(name, assembly.symbols, assembly.origin, assembly.data)
    guest = xen.guest(name, notes, assembly.entry) if notes else None
    entry = assembly.entry if guest is None else guest.entry
    return Image(name, tuple(segments), entry, symbols=dict(assembly.symbols), lines=lines, xen=guest)


def with_information(
    image: Image, command_line: str, memory: int, modules: Sequence[multiboot.Module] = ()
) -> Image:
    """The image as multiboot starts it, with the information structure and modules in `memory` bytes of RAM."""
    placed = multiboot.place_modules(image.name, modules, image.segments, memory)
    information = multiboot.information(image.name, command_line, memory, modules, placed)
    for segment in image.segments:
        if segment.address < multiboot.INFO_END and segment.end > multiboot.INFO_ADDRESS:
            raise ImageError(
                f"{image.name}: {segment} overlaps the multiboot information at "
                f"{multiboot.INFO_ADDRESS:#x}..{multiboot.INFO_END:#x}: load it elsewhere"
            )
    registers = {"eax": multiboot.BOOT_MAGIC, "ebx": information.address}
    return replace(image, segments=(*image.segments, *placed, information), registers=registers)


def _ramdisk(name: str, modules: Sequence[ModuleFile], memory: int, who: str) -> bytes:
    if len(modules) > 1 or any(module.arguments for module in modules):
        raise ImageError(f"{name}: {who} takes one initrd, without arguments: give it with --initrd")
    return b"".join(_module(module, memory).data for module in modules)


def _module(file: ModuleFile, memory: int) -> multiboot.Module:
    """What is in the file; nothing is read before it is known to be smaller than memory."""
    path = file.path
    size = _size(path, "the module", "a module, such as an initrd")
    if size > memory:
        raise ImageError(
            f"{path}: {size} bytes do not fit in {size_text(memory)} of memory: give more with -m"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {_reason(error)}: check the file's permissions") from None
    return multiboot.Module(data, f"{path} {file.arguments}".rstrip())


def _size(path: Path, what: str = "the guest", choice: str = "a .asm, an ELF or a flat binary") -> int:
    """The size of a regular, non-empty file."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise ImageError(f"{path}: cannot be read: {_reason(error)}: check {what}'s path") from None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{path}: is a directory: name {what} in it, {choice}")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{path}: is not a regular file: copy {what} into one")
    if not status.st_size:
        raise ImageError(f"{path}: is empty: name {choice}")
    return status.st_size


def _from_source(path: Path, defines: Mapping[str, str], memory: int) -> Image:
    from vmm.image.asm import assemble

    image = from_assembly(str(path), assemble(path, defines))
    return replace(image, segments=checked(image, memory))


def checked(image: Image, memory: int) -> tuple[Segment, ...]:
    """The image's segments, by address, if they fit; raises `ImageError`."""
    if image.xen is not None:
        return check_xen(image.name, image.segments, image.xen, memory)
    return check(image.name, image.segments, image.entry, memory)


def _from_file(path: Path, size: int, memory: int, load: int, entry: int | None) -> Image:
    name = str(path)
    try:
        with path.open("rb") as file:
            is_elf = file.read(len(ELF_MAGIC)) == ELF_MAGIC
            file.seek(0)
            if not is_elf:
                return flat.read(name, file, size, memory, load, entry)
            from vmm.image import elf

            if entry is not None:
                raise ImageError(f"{name}: an ELF has its own entry point: leave --entry out")
            return elf.read(name, file, size, memory)
    except OSError as error:
        raise ImageError(f"{name}: cannot be read: {_reason(error)}: check the file's permissions") from None


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
