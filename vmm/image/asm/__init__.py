"""The assembler: a guest's source in NASM's 32-bit dialect to bytes, symbols and a listing.

Reading order, which is also the order in which a source goes through it: `source` (files and positions),
`tokens`, `preprocessor` with `macros`, `statements` with `parser`, `expressions` and `operands`, then
`layout`, which sizes and emits through `encoder`: `branches` for jumps, `forms` and `modrm` for what Keystone
gets wrong, `engine` and `worker` for Keystone itself, `check` to decode everything again.

Where NASM cuts a number off, with or without a warning, this assembler refuses it: there is no channel here
for warnings, and a silent truncation is the kind of mistake that it exists to keep out of guests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from vmm.errors import ImageError
from vmm.image.asm.encoder import Encoder
from vmm.image.asm.engine import Keystone
from vmm.image.asm.layout import Layout
from vmm.image.asm.preprocessor import Preprocessor
from vmm.image.asm.result import Assembly, SourceLine
from vmm.image.asm.source import Limits, Line, Sources
from vmm.image.asm.statements import StatementParser

__all__ = ["Assembly", "Encoder", "Keystone", "Limits", "SourceLine", "assemble", "assemble_text"]

ORIGIN = 0x100000  # where multiboot guests are loaded


def assemble(path: Path, defines: Mapping[str, str] = {}) -> Assembly:
    """Assemble the file at `path`, with each of `defines` as if by `%define NAME VALUE`.

    Raises AssemblyError for what is wrong in the source, ImageError if it cannot be read at all.
    """
    limits = Limits()
    sources = Sources(path.parent, limits)
    with Keystone() as keystone:
        return _assemble(sources.main(path), str(path), sources, defines, Encoder(keystone), limits)


def assemble_text(
    text: str,
    name: str = "<text>",
    defines: Mapping[str, str] = {},
    folder: Path | None = None,
    encoder: Encoder | None = None,
    limits: Limits | None = None,
) -> Assembly:
    """Assemble `text`, which errors call `name`; it may include files below `folder`, if one is given.

    `encoder` lets many assemblies share one worker process and what it has answered. Raises as `assemble`.
    """
    limits = limits or Limits()
    if len(text) > limits.source_bytes:
        raise ImageError(f"{name}: the source is too large: more than {limits.source_bytes} bytes")
    sources = Sources(folder, limits)
    lines = Sources.lines(text, name)
    if encoder is not None:
        return _assemble(lines, name, sources, defines, encoder, limits)
    with Keystone() as keystone:
        return _assemble(lines, name, sources, defines, Encoder(keystone), limits)


def _assemble(
    lines: Iterator[Line],
    name: str,
    sources: Sources,
    defines: Mapping[str, str],
    encoder: Encoder,
    limits: Limits,
) -> Assembly:
    encoder.start()
    constants: dict[str, int] = {}
    expanded = Preprocessor(lines, sources, defines, constants, limits)
    program = StatementParser(constants).parse(expanded)
    origin = ORIGIN if program.origin is None else program.origin
    placed = Layout(program, encoder, origin, limits).place()
    if not placed.data and not placed.sizes.get(".bss"):
        raise ImageError(f"{name}: assembles to nothing: there is no instruction and no data in it")
    entry = next((placed.symbols[s] for s in ("start", "_start") if s in program.labels), origin)
    bss = placed.starts.get(".bss", origin + len(placed.data))
    return Assembly(
        origin, entry, placed.data, (bss, placed.sizes.get(".bss", 0)), placed.symbols, placed.lines
    )
