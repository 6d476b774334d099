"""A guest as an assembly file that stands alone: a failure, kept.

The kernel is copied as source, the random part as bytes beside its text, and the tables as data; so the file
stays the same guest however the generator changes.
"""

from __future__ import annotations

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


def source(guest: Guest, reasons: Iterable[str] = ()) -> str:
    """The whole guest as a source for our assembler, or NASM's, which gives the same bytes."""
    lines = [
        "; A random guest that two modes once ran differently; made smaller.",
        *(f"; {reason}" for reason in reasons),
    ]
    lines += ["", "bits 32", f"org {at.KERNEL:#x}", ""]
    here, entry = at.KERNEL, skeleton().entry
    for address, data in sorted(guest.segments().items()):
        data = data.rstrip(b"\0") if address not in (at.BODY,) else data
        if not data:
            continue
        lines += [f"times {address - here:#x} db 0", f"; ---- {_names()[address]}, at {address:#x}"]
        if address <= entry < address + len(data):
            assert address == entry
            lines.append("start:")
        lines += (
            _body(guest, data)
            if address == at.BODY
            else _code(data, address)
            if address == at.KERNEL
            else _data(data)
        )
        here = address + len(data)
    return "\n".join(lines) + "\n"


def _names() -> dict[int, str]:
    wanted = (
        "KERNEL", "GDT", "PRISTINE", "VARIABLES", "CHUNKS", "STARTS", "BODY", "DATA",
        "WINDOW_TABLE", "OTHER_WINDOW", "IDENTITY", "DIRECTORY", "OTHER_DIRECTORY",
    )  # fmt: skip
    return {vars(at)[name]: name.lower().replace("_", " ") for name in wanted}


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
    path.write_text(source(guest, reasons))
    return path
