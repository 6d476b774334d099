"""What an assembly is, for the layers above: bytes, addresses, symbols and a listing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceLine:
    """`size` bytes at `address` came from line `line` of `file`, which reads `text`.

    In a macro's expansion this is the line of the macro's body.
    """

    address: int
    size: int
    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Assembly:
    """An assembled guest.

    `data` is what lies at `origin` and above: .text, .data and .rodata, each aligned as `nasm -f bin` does;
    `bss` is the address and size of the zeroed room after it. `entry` is the label `start` or `_start`, or
    else the origin. `symbols` has labels (local ones as `parent.name`) and equs. `lines` is the listing, in
    source order: instructions and data, but not the filling of `align` and `resb`.
    """

    origin: int
    entry: int
    data: bytes
    bss: tuple[int, int]
    symbols: dict[str, int]
    lines: tuple[SourceLine, ...]
