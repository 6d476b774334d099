"""What the words of a command line mean: sizes, addresses, definitions, counts.

Each function takes the text and raises `UsageError` with one line that repeats it and says what would do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vmm.errors import UsageError
from vmm.expect import TEXT_LIMIT, Expect, Press, Step, parse_script

if TYPE_CHECKING:
    from vmm.image.load import ModuleFile
    from vmm.machine.devices.disk import Access
    from vmm.machine.pc import Model
    from vmm.vm import Paravirt

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
INPUT_LIMIT = 16 << 20  # bytes of --input
DISK_ACCESS: dict[str, Access] = {"snapshot": "snapshot", "readonly": "read"}
LONGEST_TIMEOUT = 365 * 86400.0


def memory_size(text: str) -> int:
    """Bytes of RAM: `16M`, `1G`, `4096K` or a plain number, within what a machine can have."""
    from vmm.machine.memory import MAXIMUM, MINIMUM, PAGE

    size = text.strip().upper().removesuffix("B")
    unit = UNITS.get(size[-1:], 1)
    digits = size[:-1] if unit > 1 else size
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 20:
        raise UsageError(f"-m {text}: not a size: give bytes, or a number with K, M or G, such as 16M")
    value = int(digits) * unit
    if not MINIMUM <= value <= MAXIMUM:
        raise UsageError(f"-m {text}: a machine has between 2M and 3G of memory")
    if value % PAGE:
        raise UsageError(f"-m {text}: not a multiple of {PAGE} bytes: try {-(-value // 1024 // 4) * 4}K")
    return value


def address(option: str, text: str) -> int:
    """A 32-bit physical address, in any notation of Python's."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 32:
        raise UsageError(f"{option} {text}: not an address: give a number below 4 GiB, such as 0x100000")
    return value


def count(option: str, text: str) -> int:
    """A positive number of instructions."""
    digits = text.replace("_", "").replace(",", "")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 18 or not int(digits):
        raise UsageError(f"{option} {text}: not a number of instructions: give, say, 1000000")
    return int(digits)


def seconds(option: str, text: str) -> float:
    """A positive time."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 < value <= LONGEST_TIMEOUT:
        raise UsageError(f"{option} {text}: not a time: give seconds, such as 10 or 0.5")
    return value


def defines(texts: Iterable[str]) -> dict[str, str]:
    """`NAME=VALUE`, or `NAME` alone, for an empty one; of a name given twice the last counts."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        plain = name.replace("_", "a").replace(".", "a")
        if not (plain.isascii() and plain.isalnum()) or name[0].isdigit():
            raise UsageError(f"-D {text}: not a definition: give NAME=VALUE, such as -D HZ=100")
        found[name] = value
    return found


def modules(initrd: str | None, texts: Iterable[str]) -> list[ModuleFile]:
    """The files of --initrd and of each --module, `FILE` or `FILE,ARGUMENTS`."""
    from vmm.image.load import ModuleFile

    found = []
    for option, text in (("--initrd", initrd), *(("--module", text) for text in texts)):
        if text is None:
            continue
        name, _, arguments = text.partition(",") if option == "--module" else (text, "", "")
        if not name:
            raise UsageError(f"{option} {text}: the file's name is empty: give one")
        found.append(ModuleFile(Path(name), arguments))
    return found


def input_bytes(text: str | None) -> bytes:
    """The contents of the --input file (`-`: of standard input)."""
    if text is None:
        return b""
    try:
        with open(0 if text == "-" else text, "rb", closefd=text != "-") as file:
            data = file.read(INPUT_LIMIT + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UsageError(f"--input {text}: cannot be read: {reason}") from None
    if len(data) > INPUT_LIMIT:
        raise UsageError(f"--input {text}: longer than {INPUT_LIMIT >> 20}M: give less")
    return data


def disk(text: str) -> tuple[str, Access]:
    """`FILE`, `FILE,snapshot` or `FILE,readonly`: the file's name, and what the guest may do with it."""
    name, comma, how = text.rpartition(",")
    if comma and how in DISK_ACCESS:
        access = DISK_ACCESS[how]
    else:
        name, access = text, "write"
    if not name:
        raise UsageError(f"--disk {text}: the file's name is missing: give FILE, FILE,snapshot or FILE,readonly")
    return name, access


def script(text: str | None) -> list[Step]:
    """The steps in the --script file."""
    if text is None:
        return []
    try:
        data = Path(text).read_bytes()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UsageError(f"--script {text}: cannot be read: {reason}") from None
    steps = parse_script(data.decode("utf-8", "surrogateescape"), text)
    for step in steps:
        if isinstance(step, Press):
            _check_keys(step)
    return steps


def _check_keys(step: Press) -> None:
    from vmm.machine.devices.scancodes import chord

    try:
        chord(step.names)
    except UsageError as error:
        raise UsageError(f"{step.where}: press: {error}") from None


def until(text: str | None) -> Expect | None:
    """The text of --until: the bytes that the user typed."""
    if text is None:
        return None
    data = os.fsencode(text)
    if not 0 < len(data) <= TEXT_LIMIT:
        raise UsageError(
            "--until: the text is empty" if not data else f"--until: longer than {TEXT_LIMIT >> 10}K"
        )
    return Expect(data, where="--until")


def modes(text: str, known: Iterable[str]) -> list[str]:
    """Names of modes by commas, each once."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        mode(name, known)
    return list(dict.fromkeys(names))


def mode(name: str, known: Iterable[str]) -> str:
    """The name of a mode."""
    known = list(known)
    if name not in known:
        raise UsageError(f"mode {name!r} does not exist: choose {' or '.join(known)}")
    return name


def model(text: str) -> Model:
    """The name of a machine."""
    from vmm.machine.pc import MODELS

    for known in MODELS:
        if text == known:
            return known
    raise UsageError(f"--machine {text}: no such machine: choose {' or '.join(MODELS)}")


def paravirt(text: str, known: Iterable[Paravirt]) -> Paravirt:
    """The name of a paravirtual interface."""
    for name in known:
        if text == name:
            return name
    raise UsageError(f"--paravirt {text}: no such interface: choose {' or '.join(known)}")


def path(text: str) -> Path:
    """A file name."""
    if not text:
        raise UsageError("the guest's name is empty: name a .asm, an ELF or a flat binary")
    return Path(text)
