"""A guest as an assembly file that stands alone: a failure, kept.

The random part is written as bytes beside its text. What many guests have in common, the kernel and the tables, lies
in files beside it that are named by their contents; so it stays the same guest however the generator changes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path

from tests.equivalence import layout as at
from tests.equivalence.encode import plain
from tests.equivalence.guest import Guest
from tests.equivalence.kernel import skeleton
from vmm.isa.disassemble import disassemble

FOUND = Path(__file__).parent / "found"
_WIDTH = 16
_SHARED = 512  # bytes: what is longer is written to a file of its own


def source(guest: Guest, folder: Path, reasons: Iterable[str] = ()) -> str:
    """The whole guest as a source for our assembler, or NASM's, which gives the same bytes.

    Writes what it includes into `folder`.
    """
    lines = ["; A random guest that two modes once ran differently, made smaller."]
    lines += [*(f"; {reason}" for reason in reasons), "", "bits 32", f"org {at.KERNEL:#x}", ""]
    here, names = at.KERNEL, _names()
    assert skeleton().entry == at.KERNEL
    lines.append("start:")
    for address, data in sorted(guest.segments().items()):
        data = data.rstrip(b"\0")
        if here < address and data:
            lines.append(f"times {address - here:#x} db 0")
        if address == at.BODY:
            lines += _body(guest, data)
        elif len(data) > _SHARED:
            code = _code(data, address) if address == at.KERNEL else _data(data)
            lines.append(f'%include "{_share(names[address], code, folder)}"')
        elif data:
            lines += [f"; {names[address]}", *_data(data)]
        here = address + len(data) if data else here
    return "\n".join(lines) + "\n"


def _share(name: str, code: list[str], folder: Path) -> str:
    text = "\n".join(code) + "\n"
    file = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.inc"
    (folder / file).write_text(text)
    return file


def _names() -> dict[int, str]:
    wanted = (
        "KERNEL", "GDT", "VARIABLES", "CHUNKS", "STARTS", "BODY", "DATA",
        "WINDOW_TABLE", "OTHER_WINDOW", "IDENTITY", "DIRECTORY", "OTHER_DIRECTORY",
    )  # fmt: skip
    names = {vars(at)[name]: name.lower().replace("_", "-") for name in wanted}
    return names | {at.PRISTINE: names[at.GDT]}


def _data(data: bytes) -> list[str]:
    """DB lines; a run of lines alike is one."""
    rows = [data[i : i + _WIDTH] for i in range(0, len(data), _WIDTH)]
    lines: list[str] = []
    i = 0
    while i < len(rows):
        count = 1
        while i + count < len(rows) and rows[i + count] == rows[i]:
            count += 1
        text = _values(rows[i])
        lines.append(text if count == 1 else f"times {count} {text}")
        i += count
    return lines


def _values(row: bytes) -> str:
    if len(row) % 4:
        return "db " + ",".join(f"0x{byte:02x}" for byte in row)
    return "dd " + ",".join(f"{word:#x}" for word in struct.unpack(f"<{len(row) // 4}I", row))


def _code(data: bytes, address: int) -> list[str]:
    """The kernel: bytes, with what they are."""
    lines, here = [], 0
    for instruction in disassemble(data, address):
        size = instruction.size
        lines.append(_row(data[here : here + size], str(instruction)))
        here += size
    return lines + _data(data[here:])


def _row(code: bytes, text: str) -> str:
    return ("        db " + ", ".join(f"0x{byte:02x}" for byte in code)).ljust(60) + " ; " + text


def _body(guest: Guest, data: bytes) -> list[str]:
    lines, end = [], guest.listing()[0][1][0][0] - at.BODY
    lines += _data(data[:end])
    for title, rows in guest.listing():
        lines.append(f"; {title}")
        for _, text, code in rows:
            parts = [code[i : i + _WIDTH] for i in range(0, len(code), _WIDTH)]
            lines += [_row(part, plain(text) if i == 0 else "...") for i, part in enumerate(parts)]
            end += len(code)
    return lines + _data(data[end:])


def write(guest: Guest, name: str, reasons: Iterable[str] = (), folder: Path = FOUND) -> Path:
    """The source as a file of that name in `folder`."""
    path = folder / f"{name}.asm"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(source(guest, folder, reasons))
    return path
