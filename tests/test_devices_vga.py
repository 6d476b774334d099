"""The text screen and its registers."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from vmm.machine.devices import vga


def cells(text: str, attribute: int = vga.PLAIN) -> bytes:
    return bytes(byte for code in text.encode("cp437") for byte in (code, attribute))


def test_every_glyph_is_its_own() -> None:
    """All 256 codes have a printable glyph; only 0, 32 and 255 are blank, and no two others are the same."""
    assert len(vga.GLYPHS) == 256
    assert all(glyph.isprintable() or glyph == "\u00a0" for glyph in vga.GLYPHS)
    assert len(set(vga.GLYPHS) - {" ", "\u00a0"}) == 253
    assert vga.GLYPHS[1] == "☺" and vga.GLYPHS[0xDB] == "█" and vga.GLYPHS[0xE1] == "ß"


def test_text() -> None:
    """Cells become lines, row by row; what is missing is blank."""
    memory = cells("top".ljust(80)) + cells("second")
    lines = vga.text(memory)
    assert [len(line) for line in lines] == [80] * 25
    assert lines[0].rstrip() == "top" and lines[1].rstrip() == "second" and not lines[24].strip()


@given(st.binary(max_size=vga.MEMORY_SIZE))
def test_any_memory_renders(memory: bytes) -> None:
    """Any memory gives 25 lines of 80; the coloured form is the plain one but for escapes."""
    plain, coloured = vga.text(memory), vga.ansi(memoryview(memory))
    assert [len(line) for line in plain] == [80] * 25
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured] == plain


def test_colours() -> None:
    """Yellow on blue is ANSI 93 on 44; plain grey on black costs no escapes."""
    lines = vga.ansi(cells("hi", 0x1E) + cells(" there".ljust(78)))
    assert lines[0] == "\x1b[93;44mhi\x1b[0m there".ljust(80 + len("\x1b[93;44m\x1b[0m"))


def test_crtc() -> None:
    """The index register chooses; cursor and start address are where the guest put them."""
    crtc = vga.Crtc()
    assert crtc.cursor() == (0, 0) and crtc.start() == 0
    for index, value in ((0x0C, 0x00), (0x0D, 0xA0), (0x0E, 0x01), (0x0F, 0x45)):
        crtc.write(0, 1, index)
        crtc.write(1, 1, value)
    assert crtc.read(0, 1) == 0x0F and crtc.read(1, 1) == 0x45
    assert crtc.start() == 320
    assert crtc.cursor() == divmod(0x145 - 0xA0, 80)
    crtc.write(0, 1, 0x0A)
    crtc.write(1, 1, 0x20)
    assert crtc.cursor() is None
    crtc.write(0, 1, 0xFF)
    crtc.write(1, 1, 0xFF)
    assert crtc.read(1, 1) == 0


def test_waiting_for_retrace_ends() -> None:
    """A loop that waits for either edge of the retrace bit ends within two reads."""
    crtc = vga.Crtc()
    seen = {crtc.status.read(0, 1) & vga.STATUS_RETRACE for _ in range(2)}
    assert seen == {0, vga.STATUS_RETRACE}
