"""The dialect, feature by feature, and what an `Assembly` says beyond its bytes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.asm_corpus import Corpus
from tests.oracles import require
from vmm.image.asm import Encoder, Keystone, SourceLine, assemble, assemble_text


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    with Keystone() as keystone:
        yield Encoder(keystone)


# The source, and its bytes at 1 MiB in hexadecimal.
FEATURES = {
    "numbers": ("db 0x1F, 1Fh, $1F, 31, 0d31, 37o, 37q, 0o37, 11111b, 0b11111, 0b1_1111, 0x1_F", "1f" * 12),
    "hexadecimal that looks binary": ("db 0b1h, 0b1", "b1 01"),
    "character constants": ("mov eax, 'abc'\ncmp al, `\\n`\ndb 'a' + 1", "b861626300 3c0a 62"),
    "strings": ("db 'it', \"'s\", `\\x41\\101\\t\\0\\\\`, ''", "6974 2773 4141 0900 5c"),
    "padded strings": ("dw 'abc'\ndd 'abcde'\ndq 'x'", "61626300 6162636465000000 7800000000000000"),
    "UTF-8 strings": ("db 'é', `\\u00e9`", "c3a9 c3a9"),
    "floats": ("dd 1.5, -0.25, 1.e2\ndq 1.5", "0000c03f 000080be 0000c842 000000000000f83f"),
    "data units": (
        "db 1, -1\ndw 1, -1\ndd 1, -1\ndq 1, -1",
        "01ff 0100ffff 01000000ffffffff 01" + "00" * 7 + "ff" * 8,
    ),
    "complements": ("and al, ~0x80\ndb ~0, -256\ndw ~0xFF", "247f ff00 00ff"),
    "precedence": (
        "db 2 + 3 * 4, (2 + 3) * 4, 1 << 2 + 1, 6 & 3 | 8, 1 | 6 ^ 2 & 3, 10 - 3 - 2, -2 + 5, !0 + 1",
        "0e 14 08 0a 05 05 03 02",
    ),
    "comparisons": (
        "db 1 = 1, 1 == 2, 1 != 2, 1 <> 1, 1 < 2, 2 <= 1, 2 > 1, -1 >= 0",
        "01 00 01 00 01 00 01 00",
    ),
    "logic": ("db 2 && 0, 2 || 0, 2 ^^ 1, !5, 1 ? 7 : 8, 0 ? 7 : 8", "00 01 00 00 07 08"),
    "division": ("db 7 / 2, 7 // -2 & 0xFF, 7 % 4, -7 %% 4 & 0xFF", "03 fd 03 fd"),
    "shifts": ("dd 1 << 31, 0x80000000 >> 31, -1 >> 60, -1 >>> 60", "00000080 01000000 0f000000 ffffffff"),
    "here": ("nop\ndd $, $$\na: db $ - a, $ - $$", "90 01001000 00001000 00 09"),
    "here in times": ("times 2 dd $", "00001000 00001000"),
    "labels": ("a: jmp b\nb: jmp a", "eb00 ebfc"),
    "labels without a colon": ("a db 1\nb dw b - a\nc times 2 db 3", "01 0100 0303"),
    "local labels": ("a:\n.x: jmp .x\nb:\n.x: jmp .x\njmp a.x", "ebfe ebfe ebfa"),
    "equ": ("a equ 5\nb equ a * 2\nmov eax, b\nmov ecx, c\nc equ 7", "b80a000000 b907000000"),
    "times": (
        "times 3 nop\ntimes 2 db 1, 2\ntimes 0 db 9\na: times 4 - ($ - $$) % 4 db 5",
        "909090 01020102 05",
    ),
    "align": ("db 1\nalign 4\ndb 2\nalign 4, db 0xCC\ndb 3", "01909090 02cccccc 03"),
    "define": ("%define A 5\n%define F(x, y) ((x) * (y))\ndb A, F(A, 2), F((A + 1), 2)", "05 0a 0c"),
    "define late": ("%define A B\n%define B 1\ndb A\n%define B 2\ndb A", "01 02"),
    "xdefine": ("%define B 1\n%xdefine A B\n%define B 2\ndb A", "01"),
    "define of itself": ("a equ 3\n%define a a + 1\ndb a", "04"),
    "undef": ("%define A 1\n%undef A\n%ifdef A\ndb 1\n%else\ndb 2\n%endif", "02"),
    "assign": ("%assign i 1\n%rep 3\ndb i\n%assign i i * 2\n%endrep", "01 02 04"),
    "if": ("A equ 4\n%if A > 5\ndb 1\n%elif A > 3\ndb 2\n%elif 1\ndb 3\n%else\ndb 4\n%endif", "02"),
    "nested if": ("%if 0\n%if 1\ndb 1\n%else\ndb 2\n%endif\n%else\n%ifndef X\ndb 3\n%endif\n%endif", "03"),
    "what is skipped": ("%if 0\nfrob 'x\n%foo\n%macro\n%endif\nnop", "90"),
    "macro": ("%macro put 2\nmov %1, %2\n%endmacro\nput eax, 1\nput ecx, [ebx + 4]", "b801000000 8b4b04"),
    "macro labels": ("%macro spin 0\n%%a: jmp %%a\n%endmacro\nspin\nspin", "ebfe ebfe"),
    "macro and local labels": ("a:\n%macro m 0\n%%q: nop\n%endmacro\nm\n.x: jmp a.x", "90 ebfe"),
    "macro with braces": ("%macro m 1\ndb %1\n%endmacro\nm {1, 2}", "01 02"),
    "macro with pasting": ("%macro n 1\nport%{1}x: db 1%1\n%endmacro\nn 7\ndd port7x", "11 00001000"),
    "macro with defaults": (
        "%macro m 1-3 8, 9\ndb %0, %1, %2, %3\n%endmacro\nm 1\nm 1, 2\nm 1, 2, 3",
        "03010809 03010209 03010203",
    ),
    "macro with the rest": ("%macro m 1+\ndb %1\n%endmacro\nm 1, 2, 3", "01 02 03"),
    "macro by number of parameters": (
        "%macro m 0\ndb 0\n%endmacro\n%macro m 1\nm\ndb %1\n%endmacro\nm 5",
        "00 05",
    ),
    "macro with a label": ("%macro m 0\nnop\n%endmacro\na: m\njmp a", "90 ebfd"),
    "macro with a conditional": (
        "%macro m 1\n%if %1 > 2\ndb 1\n%else\ndb 0\n%endif\n%endmacro\nm 1\nm 3",
        "00 01",
    ),
    "continued lines": ("db 1, \\\n 2\n%define A 3, \\\n 4\ndb A", "01 02 03 04"),
    "comments": ("nop ; one\n; two\ndb ';' ; three", "90 3b"),
    "directives that say nothing": ("global start\n[bits 32]\n[section .text]\ncpu 386\nstart: nop", "90"),
    "case": ("MOV EAX, [EBX]\nBITS 32\nDb 1\nTimes 2 Nop", "8b03 01 9090"),
    # instructions that Keystone gets wrong
    "32-bit stack instructions": (
        "pushf\npopf\niret\npusha\npopa\npush cs\npush ds\npop fs",
        "9c 9d cf 60 61 0e 1e 0fa1",
    ),
    "16-bit stack instructions": ("pushfw\npopfw\niretw\no16 pushf\no16 push ds", "669c 669d 66cf 669c 661e"),
    "descriptor tables": (
        "lgdt [0x10]\nlidt [ebx]\nsgdt [esp]\nsidt [bx]",
        "0f011510000000 0f011b 0f010424 670f010f",
    ),
    "far jumps": (
        "a: jmp 8:a\ncall 0x10:a + 4\njmp far [ebx]\njmp word 8:5",
        "ea000010000800 9a040010001000 ff2b 66ea05000800",
    ),
    "segment registers": (
        "mov ds, ax\nmov ax, ds\nmov eax, ss\nmov [ebx], es\nmov fs, [ebx]",
        "8ed8 668cd8 8cd0 8c03 8e23",
    ),
    "interrupts": ("int 3\nint3\nint 0x80\ninto\nint1", "cd03 cc cd80 ce f1"),
    "others": (
        "movsd\nbound eax, [ebx]\nenter 8, 0\nret 4\nsysenter\nsysexit\nud2",
        "a5 6203 c8080000 c20400 0f34 0f35 0f0b",
    ),
    "SVM": (
        "vmrun\nvmload\nvmsave\nvmmcall\nstgi\nclgi\ninvlpga",
        "0f01d8 0f01da 0f01db 0f01d9 0f01dc 0f01dd 0f01df",
    ),
    "prefixes": (
        "rep movsb\nlock inc dword [ebx]\nes movsb\nrep es movsb\na16 movsb\nrep ret",
        "f3a4 f0ff03 26a4 f326a4 67a4 f3c3",
    ),
    "addresses": (
        "mov eax, [es:di]\nmov eax, [eax*2]\nmov eax, [eax*5 + 1]\nmov eax, [ebx + esp]\nmov eax, [dword ebx + 1]",
        "26678b05 8b0400 8b448001 8b041c 8b8301000000",
    ),
    "strict": (
        "push strict dword 1\nadd eax, strict dword 1\njmp strict near $",
        "6801000000 0501000000 e9fbffffff",
    ),
    "sizes of jumps": (
        "a: jmp a\njmp near a\njz a\njz near a\ncall a\nloop a\njecxz a",
        "ebfe e9f9ffffff 74f7 0f84f1ffffff e8ecffffff e2ea e3e8",
    ),
}


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str, encoder: Encoder) -> None:
    """Each feature of the dialect gives exactly these bytes."""
    source, expected = FEATURES[name]
    assert assemble_text(source, encoder=encoder).data.hex() == expected.replace(" ", "")


@pytest.mark.parametrize("name", FEATURES)
def test_feature_in_nasm(name: str, tmp_path: Path) -> None:
    """And they are the bytes that the real NASM gives."""
    source, expected = FEATURES[name]
    (tmp_path / "a.asm").write_text(f"bits 32\norg 0x100000\n{source}\n")
    command = [require("nasm"), "-w-all", "-f", "bin", "-o", str(tmp_path / "a.bin"), str(tmp_path / "a.asm")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    assert (tmp_path / "a.bin").read_bytes().hex() == expected.replace(" ", "")


# Beyond the bytes


def test_origin_and_entry(encoder: Encoder) -> None:
    """A guest is loaded at 1 MiB unless `org` says otherwise; it begins at `start` or `_start`, or at its origin."""
    plain = assemble_text("nop", encoder=encoder)
    assert (plain.origin, plain.entry) == (0x100000, 0x100000)
    for name in ("start", "_start"):
        moved = assemble_text(f"org 0x7C00\nnop\n{name}: nop", encoder=encoder)
        assert (moved.origin, moved.entry) == (0x7C00, 0x7C01)


def test_an_equ_called_start_is_no_entry(encoder: Encoder) -> None:
    """Only a label can be where a guest begins."""
    assert assemble_text("start equ 5\nnop", encoder=encoder).entry == 0x100000


def test_bss(encoder: Encoder) -> None:
    """Reserved room has an address and a size, and is not part of the bytes."""
    text = "section .bss\na: resb 3\nb: resd 2\nsection .text\nmov eax, b\nsection .data\ndb 1"
    made = assemble_text(text, encoder=encoder)
    assert len(made.data) == 9
    assert made.bss == (0x10000C, 11)
    assert made.symbols["b"] == 0x10000F
    assert made.data[1:5] == (0x10000F).to_bytes(4, "little")


def test_symbols(encoder: Encoder) -> None:
    """Symbols are labels, local ones under their parent's name, and equs; a macro's own labels are not."""
    text = "%macro m 0\n%%x: nop\n%endmacro\na: nop\n.b: m\nc equ 5\nd equ $ - a"
    assert assemble_text(text, encoder=encoder).symbols == {"a": 0x100000, "a.b": 0x100001, "c": 5, "d": 2}


def test_defines_from_outside(tmp_path: Path) -> None:
    """-D NAME=VALUE stands for a %define before the first line, and can be tested and used."""
    path = tmp_path / "a.asm"
    path.write_text("%ifdef FAST\ndb 1\n%endif\n%if SIZE > 2\ndb SIZE\n%endif\ndb NAME\n")
    assert assemble(path, {"SIZE": "1 + 2", "NAME": "'x'"}).data == b"\x03x"
    assert assemble(path, {"SIZE": "0", "NAME": "9", "FAST": ""}).data == b"\x01\x09"


def test_includes(tmp_path: Path) -> None:
    """%include reads from the guest's folder, whoever includes, and its macros and labels are the includer's."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.inc").write_text(
        '%include "lib/b.inc"\n%macro ret5 0\nmov eax, five\nret\n%endmacro\n'
    )
    (tmp_path / "lib" / "b.inc").write_text(
        "%ifndef B\n%define B\nfive equ 5\n%endif\n%include 'lib/c.inc'\n"
    )
    (tmp_path / "lib" / "c.inc").write_text("sub: ret\n")
    path = tmp_path / "main.asm"
    path.write_text('%include "lib/a.inc"\nstart: ret5\ncall sub\n')
    made = assemble(path)
    assert made.data.hex() == "c3" + "b805000000" + "c3" + "e8f4ffffff"
    assert [(Path(x.file).name, x.line, x.text) for x in made.lines] == [
        ("c.inc", 1, "sub: ret"),
        ("a.inc", 3, "mov eax, five"),
        ("a.inc", 4, "ret"),
        ("main.asm", 3, "call sub"),
    ]


def test_listing_names_the_line_of_a_macro_body(encoder: Encoder) -> None:
    """Bytes of a macro are listed under the macro's own lines, in order, at their addresses."""
    text = "%macro twice 1\n  mov eax, %1\n  mov ebx, %1 ; again\n%endmacro\nstart:\n  twice 5\n  hlt"
    lines = assemble_text(text, "g.asm", encoder=encoder).lines
    assert lines == (
        SourceLine(0x100000, 5, "g.asm", 2, "  mov eax, %1"),
        SourceLine(0x100005, 5, "g.asm", 3, "  mov ebx, %1 ; again"),
        SourceLine(0x10000A, 1, "g.asm", 7, "  hlt"),
    )


@pytest.mark.parametrize("seed", range(3))
def test_listing_covers_the_program(seed: int, encoder: Encoder) -> None:
    """No two lines of the listing share a byte, and what no line has is filling between them."""
    made = assemble_text(Corpus(seed, 800).text, encoder=encoder)
    at = made.origin
    for line in sorted(made.lines, key=lambda line: line.address):
        assert line.address >= at
        gap = made.data[at - made.origin : line.address - made.origin]
        assert gap.strip(b"\x90") == b"" or gap.strip(b"\0") == b""
        at = line.address + line.size
    assert at <= made.origin + len(made.data)


def test_assembling_twice_gives_the_same(encoder: Encoder) -> None:
    """An assembly is a function of its source: nothing is left in an encoder that serves another."""
    text = Corpus(7, 500).text
    first = assemble_text(text, encoder=encoder)
    assemble_text("mov eax, 5\nfoo: jmp foo", encoder=encoder)
    assert assemble_text(text, encoder=encoder) == first == assemble_text(text)
