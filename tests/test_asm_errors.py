"""Bad sources: each is refused with one line that says what is wrong and where, and nothing else happens."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.errors import AssemblyError, ImageError
from vmm.image.asm import Encoder, Keystone, Limits, assemble, assemble_text


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    with Keystone() as keystone:
        yield Encoder(keystone)


# The source, and the error without the file's name: line, column and what is wrong.
BAD = {
    # what is written is no assembly
    "unknown %directive": ("%foo 3", "1:1: unknown directive '%foo'"),
    "unknown [directive]": ("[foo 3]", "1:2: unknown directive 'foo'"),
    "unknown instruction": (
        "nop\n  frob eax",
        "2:3: unknown instruction 'frob' (a label needs a colon after it)",
    ),
    "orphan label": ("frobnicate", "1:1: unknown instruction 'frobnicate' (a label needs a colon after it)"),
    "AT&T suffix": ("movl eax, ebx", "1:1: unknown instruction 'movl' (a label needs a colon after it)"),
    "comment of another assembler": (
        "foo#bar eax",
        "1:1: unknown instruction 'foo#bar' (a label needs a colon after it)",
    ),
    "bad operands": ("mov eax, bl", "1:1: 'mov' does not take these operands"),
    "half an operand": ("mov eax, [", "1:11: expected a value, found the end of the line"),
    "unclosed bracket": ("mov eax, [ebx", "1:14: expected ']', found the end of the line"),
    "unclosed parenthesis": ("mov eax, (1 + 2", "1:16: expected ')', found the end of the line"),
    "nothing after a comma": ("mov eax,", "1:9: expected a value, found the end of the line"),
    "unclosed string": ("db 'abc", "1:4: this string does not end on its line"),
    "odd character": ("mov eax, ¤", "1:10: unexpected character '¤'"),
    "control character": ("mov eax, \x1b", "1:10: unexpected character 'U+001B'"),
    "bad number": ("mov eax, 12zz", "1:10: '12zz' is not a number"),
    "prefix alone": ("lock", "1:5: a prefix needs an instruction after it, on the same line"),
    "two repeats": ("rep repne movsb", "1:11: two prefixes of the same kind"),
    "lock on a register": (
        "lock inc eax",
        "1:6: 'inc' cannot be encoded as written: it would become 'no instruction'",
    ),
    "ptr": ("mov eax, dword ptr [ebx]", "1:16: NASM has no 'ptr': write 'dword [address]'"),
    "a reserved label": ("eax: nop", "1:1: 'eax' is a reserved word and cannot be a label"),
    "equ without a name": ("equ 5", "1:1: equ needs a name before it: NAME equ VALUE"),
    "16-bit code": ("bits 16", "1:6: guests are 32-bit code: only 'bits 32' is supported"),
    "64-bit code": ("[bits 64]", "1:7: guests are 32-bit code: only 'bits 32' is supported"),
    "unknown section": ("section .foo", "1:9: a section is one of .text, .data, .rodata, .bss, not '.foo'"),
    "extern": (
        "extern f",
        "1:1: 'extern' is not supported: a guest is one source, there is nothing to link with",
    ),
    "incbin": (
        "incbin 'x'",
        "1:1: 'incbin' is not supported: a guest's source cannot read other files as data",
    ),
    "incbin after times": (
        "times 2 incbin 'x'",
        "1:9: 'incbin' is not supported: a guest's source cannot read other files as data",
    ),
    ".incbin": (
        ".incbin '/etc/passwd'",
        "1:1: unknown instruction '.incbin' (a label needs a colon after it)",
    ),
    # symbols
    "undefined symbol": ("nop\nmov eax, nope", "2:10: undefined symbol 'nope'"),
    "undefined jump": ("jmp nope", "1:5: undefined symbol 'nope'"),
    "undefined in data": ("dd 1, nope + 2", "1:7: undefined symbol 'nope'"),
    "unscoped local": ("a: nop\n.x: nop\nb: jmp .x", "3:8: undefined symbol 'b.x'"),
    "duplicate label": ("a: nop\nnop\na: nop", "3:1: 'a' is already defined at bad.asm:1"),
    "duplicate equ": ("a equ 1\na equ 2", "2:1: 'a' is already defined at bad.asm:1"),
    "equ of itself": ("a equ a + 1\nmov eax, a", "1:9: 'a' is defined by itself"),
    "equ in a circle": ("a equ b\nb equ a\nmov eax, a", "1:7: 'a' is defined by itself"),
    # numbers
    "division by zero": ("mov eax, 1 / 0", "1:12: division by zero"),
    "modulo zero": ("db 5 % (3 - 3)", "1:6: division by zero"),
    "byte too large": ("db 1, 256", "1:7: 0x100 does not fit 8 bits"),
    "byte too small": ("db -257", "1:4: -0x101 does not fit 8 bits"),
    "word too large": ("dw 70000", "1:4: 0x11170 does not fit 16 bits"),
    "double word too large": ("dd 0x123456789", "1:4: 0x123456789 does not fit 32 bits"),
    "address in a word": ("a: dw a", "1:7: 0x100000 does not fit 16 bits"),
    "immediate too large": ("mov al, 300", "1:9: 0x12c does not fit 8 bits"),
    "count too large": ("shl eax, 300", "1:10: 0x12c does not fit 8 bits"),
    "interrupt too large": ("int 256", "1:5: 'int' does not take these operands, or a number does not fit"),
    "byte that is no byte": ("add eax, byte 200", "1:15: 0xc8 does not fit a sign-extended byte"),
    "number of 65 bits": (
        "dq 0x11111111111111111",
        "1:4: the number 0x11111111111111111 does not fit 64 bits",
    ),
    "sum of labels": (
        "a: mov eax, a + a",
        "1:13: a sum, multiple or negative of addresses is no address; a difference is a number",
    ),
    "bits of a label": (
        "a: mov eax, a & 0xFFFF",
        "1:15: '&' works on plain numbers, not on an address; 'label - $$' is a plain number",
    ),
    "float in an operand": (
        "mov eax, 1.5",
        "1:10: a floating-point number can only stand alone, in dd or dq",
    ),
    "long character constant": ("mov eax, 'abcdefghi'", "1:10: a character constant has at most 8 bytes"),
    # addresses
    "no operation size": (
        "mov [eax], 5",
        "1:1: 'mov' does not take these operands, or needs the operation size: byte, word, dword, ... before the '['",
    ),
    "push without a size": ("push [eax]", "1:1: 'push' needs the operation size: push dword [...]"),
    "three registers": ("mov eax, [eax + ebx + ecx]", "1:10: an address has at most two registers"),
    "scaled esp": ("mov eax, [esp*4]", "1:10: esp cannot be multiplied in an address"),
    "scale of six": ("mov eax, [ebx*6]", "1:10: a register of an address is multiplied by 1, 2, 4 or 8"),
    "mixed widths": ("mov eax, [bx + eax]", "1:10: an address mixes 16- and 32-bit registers"),
    "no 16-bit address": (
        "mov eax, [ax]",
        "1:10: a 16-bit address is [bx|bp + si|di + number], each part optional",
    ),
    "lgdt of a double word": (
        "lgdt dword [eax]",
        "1:12: 'lgdt' does not take these operands, or a number does not fit",
    ),
    # jumps
    "short jump too far": (
        "jmp short x\ntimes 200 nop\nx: nop",
        "1:11: the target is 73 bytes too far for a short jump",
    ),
    "loop too far": ("x: times 200 nop\nloop x", "2:6: the target is 74 bytes too far for a short jump"),
    "16-bit jump": (
        "a: jmp word a",
        "1:13: a 16-bit jump would clear the upper half of EIP; write it without the size",
    ),
    "far without selector": ("jmp far 5", "1:9: a far jmp needs selector:offset"),
    # room
    "times -1": ("times -1 nop", "1:7: times is negative: -1"),
    "huge times": ("times 0x7FFFFFFF db 0", "1:18: the program grows past 64 MiB here"),
    "endless times": ("times 1 << 40 db 0", "1:9: times is too large: 1099511627776"),
    "times of an address": (
        "a: times a nop",
        "1:10: times needs a plain number; a difference of labels is one",
    ),
    "times of what follows": (
        "a: times b - a nop\nb: nop",
        "1:10: 'b' is defined further down: a count must be known here",
    ),
    "huge resb": ("nop\nresb 0x7FFFFFFF", "2:1: the program grows past 64 MiB here"),
    "bss past 4 GiB": (
        "section .bss\nresb 0xFFFFFFFF",
        "2:1: the program passes the end of the address space",
    ),
    "many jumps": ("a: times 70000 jz a", "1:16: times repeats a jump at most 65536 times"),
    "data in bss": (
        "section .bss\ndb 1",
        "2:1: the .bss section holds no data: reserve room with resb, resw, resd, resq",
    ),
    "odd alignment": ("align 3", "1:7: an alignment must be a power of two, not 3"),
    "org past 4 GiB": ("org 0x100000000", "1:5: org 0x100000000 does not fit 32 bits"),
    # conditionals
    "unclosed %if": ("nop\n%if 1\nnop", "2:1: this %if has no %endif"),
    "%endif alone": ("nop\n%endif", "2:1: %endif without %if"),
    "%else alone": ("%else", "1:1: %else without %if"),
    "two %else": ("%if 0\n%else\n%else\n%endif", "3:1: %else after %else"),
    "%if of a label": (
        "a: nop\n%if a\n%endif",
        "2:5: 'a' is not a constant here: neither a %define nor an earlier equ of a plain number",
    ),
    "%ifdef of nothing": ("%ifdef\n%endif", "1:7: %ifdef needs a name"),
    "%error": ('%if 1\n%error "no timer"\n%endif', "2:1: %error: no timer"),
    # macros
    "unclosed %macro": ("%macro m 0\nnop", "1:1: this %macro has no %endmacro"),
    "%endmacro alone": ("%endmacro", "1:1: %endmacro without %macro"),
    "recursive macro": (
        "%macro m 0\nm\n%endmacro\nm",
        "2:1: macro 'm' uses itself: recursive macros are not supported (in macro 'm', used at bad.asm:4)",
    ),
    "macros in a circle": (
        "%macro a 0\nb\n%endmacro\n%macro b 0\na\n%endmacro\na",
        "5:1: macro 'a' uses itself: recursive macros are not supported (in macro 'b', used at bad.asm:2)",
    ),
    "wrong number of parameters": (
        "%macro m 2\nnop\n%endmacro\nm 1",
        "4:1: macro 'm' takes 2 parameters, not 1",
    ),
    "parameter that is not there": (
        "%macro m 1\nmov eax, %2\n%endmacro\nm 1",
        "2:10: %2: the macro has 1 parameters (in macro 'm', used at bad.asm:4)",
    ),
    "error inside a macro": (
        "%macro m 1\n  nop\n  mov eax, %1\n%endmacro\nnop\nm nope",
        "3:12: undefined symbol 'nope' (in macro 'm', used at bad.asm:6)",
    ),
    "error after a macro": (
        "%macro m 0\nnop\nnop\n%endmacro\nm\nfrob",
        "6:1: unknown instruction 'frob' (a label needs a colon after it)",
    ),
    "the same macro twice": (
        "%macro m 1\n%endmacro\n%macro m 1\n%endmacro",
        "3:1: macro 'm' is already defined for as many parameters",
    ),
    "arguments of a %define": ("%define f(a, b) a\nmov eax, f(1)", "2:10: 'f' takes 2 arguments, not 1"),
    "include without a folder": ("%include 'x'", "1:10: this text has no folder to include from"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_source(name: str, encoder: Encoder) -> None:
    """Each mistake has its own message, at the line and column where it was made."""
    text, message = BAD[name]
    with pytest.raises(AssemblyError) as caught:
        assemble_text(text, "bad.asm", encoder=encoder)
    first = str(caught.value).split("\n")[0]
    assert first == f"bad.asm:{message}"


def test_the_line_and_a_caret_are_shown(encoder: Encoder) -> None:
    """Under the message stand the source line and a caret below the column, tabs or not."""
    with pytest.raises(AssemblyError) as caught:
        assemble_text("nop\n\tmov\teax, nope ; why\n", "bad.asm", encoder=encoder)
    _, line, caret = str(caught.value).split("\n")
    assert line == "     mov eax, nope ; why"
    assert line[caret.index("^") :].startswith("nope")


@pytest.mark.parametrize("text", ["", "\n\n", "; nothing\n", "bits 32\nx equ 5\n", "%if 0\nnop\n%endif"])
def test_a_source_of_nothing(text: str, encoder: Encoder) -> None:
    """A source without instruction or data is refused, and not run as an empty guest."""
    with pytest.raises(ImageError, match="assembles to nothing"):
        assemble_text(text, "bad.asm", encoder=encoder)


# Files


def refused(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        assemble(path)
    return str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is named."""
    assert refused(tmp_path / "no.asm") == f"{tmp_path / 'no.asm'}: cannot be read: No such file or directory"


def test_directory(tmp_path: Path) -> None:
    """A directory is no source."""
    assert refused(tmp_path) == f"{tmp_path}: is a directory, not a source file"


def test_pipe(tmp_path: Path) -> None:
    """What is no regular file is not even opened: a pipe would never end."""
    os.mkfifo(tmp_path / "pipe.asm")
    assert refused(tmp_path / "pipe.asm").endswith("is not a regular file")
    assert refused(Path("/dev/zero")).endswith("is not a regular file")


def test_empty_file(tmp_path: Path) -> None:
    """An empty file is told from one that assembles."""
    (tmp_path / "empty.asm").write_text("")
    assert "assembles to nothing" in refused(tmp_path / "empty.asm")


def test_source_that_is_not_utf8(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are refused, with the place."""
    (tmp_path / "binary.asm").write_bytes(b"nop\n\xff\xfe")
    assert refused(tmp_path / "binary.asm").endswith("is not UTF-8 text (byte 4)")


def test_source_of_100_megabytes(tmp_path: Path) -> None:
    """A source that is far too large is refused by its size, before it is read."""
    path = tmp_path / "large.asm"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    start = time.monotonic()
    assert "the source is too large: more than 4194304 bytes" in refused(path)
    assert time.monotonic() - start < 1


def including(folder: Path, name: str) -> str:
    path = folder / "guest" / "main.asm"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'nop\n%include "{name}"\n')
    return refused(path).split("\n")[0].removeprefix(f"{path}:")


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.inc", "sub/../../outside.inc"])
def test_include_outside_the_folder(name: str, tmp_path: Path) -> None:
    """%include reaches nothing that is not below the guest's own folder."""
    (tmp_path / "outside.inc").write_text("nop\n")
    expected = f"2:10: %include of '{name}': only files below the guest's folder may be included"
    assert including(tmp_path, name) == expected


def test_include_through_a_link(tmp_path: Path) -> None:
    """A symbolic link does not lead out of the folder either."""
    (tmp_path / "outside.inc").write_text("nop\n")
    (tmp_path / "guest").mkdir()
    (tmp_path / "guest" / "link.inc").symlink_to(tmp_path / "outside.inc")
    (tmp_path / "guest" / "up").symlink_to(tmp_path)
    for name in ("link.inc", "up/outside.inc"):
        assert (
            including(tmp_path, name) == f"2:10: %include of '{name}': it is a link out of the guest's folder"
        )


def test_include_of_what_is_no_source(tmp_path: Path) -> None:
    """A missing file, a directory and a file that is not text are errors of the %include's line."""
    (tmp_path / "guest" / "folder").mkdir(parents=True)
    (tmp_path / "guest" / "binary.inc").write_bytes(b"\xff")
    expected = {
        "no.inc": "No such file or directory",
        "folder": "is a directory, not a source file",
        "binary.inc": "is not UTF-8 text (byte 0)",
    }
    for name, what in expected.items():
        assert including(tmp_path, name) == f"2:10: %include of '{name}': {what}"


def test_recursive_include(tmp_path: Path) -> None:
    """A file that includes itself ends at a depth, with the line of the last %include."""
    path = tmp_path / "self.asm"
    path.write_text('nop\n%include "self.asm"\n')
    first = refused(path).split("\n")[0]
    assert first == f"{path}:2:10: %include of 'self.asm' nests deeper than 16: does it include itself?"


def test_error_inside_an_include(tmp_path: Path) -> None:
    """An error in an included file names that file and its line."""
    (tmp_path / "a.inc").write_text("nop\n\nfrob\n")
    (tmp_path / "main.asm").write_text('nop\n%include "a.inc"\n')
    assert refused(tmp_path / "main.asm").startswith(f"{tmp_path / 'a.inc'}:3:1: unknown instruction 'frob'")


def test_conditional_open_at_the_end_of_an_include(tmp_path: Path) -> None:
    """An %if and its %endif stand in the same file."""
    (tmp_path / "a.inc").write_text("%if 1\n")
    (tmp_path / "main.asm").write_text('%include "a.inc"\nnop\n%endif\n')
    assert refused(tmp_path / "main.asm").startswith(f"{tmp_path / 'a.inc'}:1:1: this %if has no %endif")


@pytest.mark.parametrize("name", ["", "5", "a b", "a\nb"])
def test_define_of_no_name(name: str, encoder: Encoder) -> None:
    """-D takes names that a source could use."""
    with pytest.raises(ImageError, match="is not a name"):
        assemble_text("nop", defines={name: "1"}, encoder=encoder)


def test_define_of_no_token(encoder: Encoder) -> None:
    """A -D value that is no assembly is refused at the -D, not where it would have been used."""
    with pytest.raises(AssemblyError, match=r"^-D X:1:3: unexpected character"):
        assemble_text("nop", defines={"X": "1 ¤"}, encoder=encoder)


# Bombs: small sources that would make much


def doubling(times: int) -> str:
    return "".join(f"%define x{n} x{n + 1} x{n + 1}\n" for n in range(times)) + "db x0\n"


def nested_macros(depth: int) -> str:
    inner = "".join(f"%macro m{n} 0\n" + f"m{n + 1}\n" * 10 + "%endmacro\n" for n in range(depth))
    return f"{inner}%macro m{depth} 0\nnop\n%endmacro\nm0\n"


BOMBS = {
    "doubling defines": (doubling(60), "words and signs, macros expanded"),
    "nested defines": (
        "".join(f"%define x{n} x{n + 1}\n" for n in range(5000)) + "db x0",
        "nest deeper than 64",
    ),
    "nested calls": ("%define f(x) x\ndb " + "f(" * 5000 + "1" + ")" * 5000, "nest deeper than 64"),
    "macros of macros": (nested_macros(9), "macros and repetitions included"),
    "long parameters": (
        "%macro m 1\ndb %1, %1, %1, %1\n%endmacro\n" + ("m {" + "1," * 9000 + "1}\n") * 40,
        "words and signs",
    ),
    "%rep of %rep": ("%rep 90000\n%rep 90000\nnop\n%endrep\n%endrep", "macros and repetitions included"),
    "%rep of nothing": (
        "%rep 90000\n%rep 90000\n%rep 90000\n%endrep\n%endrep\n%endrep",
        "repetitions included",
    ),
    "%rep too often": ("%rep 1 << 40\nnop\n%endrep", "the count must lie between 0 and 100000"),
    "parentheses": ("mov eax, " + "(" * 30000, "more than 150 operators and parentheses"),
    "signs": ("mov eax, " + "-" * 30000 + "1", "more than 150 operators and parentheses"),
    "operators": ("x: mov eax, x" + " + 1" * 9000, "more than 150 operators and parentheses"),
    "conditionals": ("%if 1\n" * 50000, "this %if has no %endif"),
    "a long line": ("db " + "1," * 60000, "a line of more than 65536 characters"),
    "many lines": ("nop\n" * 100_001, "more than 100000 lines"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb(name: str, encoder: Encoder) -> None:
    """A source cannot make the assembler work without bound: each bomb is refused in seconds."""
    text, message = BOMBS[name]
    start = time.monotonic()
    with pytest.raises(AssemblyError, match=message):
        assemble_text(text, "bad.asm", encoder=encoder)
    assert time.monotonic() - start < 30


def test_limits_hold_for_what_is_included_often(tmp_path: Path) -> None:
    """A file counts against the source's size each time that it is included."""
    (tmp_path / "big.inc").write_text("; " + "x" * 60000 + "\n")
    (tmp_path / "main.asm").write_text('nop\n%rep 100\n%include "big.inc"\n%endrep\n')
    assert "the source is too large" in refused(tmp_path / "main.asm")


def test_text_larger_than_the_limit(encoder: Encoder) -> None:
    """A text is bounded as a file is."""
    with pytest.raises(ImageError, match="the source is too large: more than 10 bytes"):
        assemble_text("nop\n" * 10, "bad.asm", encoder=encoder, limits=Limits(source_bytes=10))


# The encoder's process

BATCH_END = "import sys, time\nfor line in sys.stdin:\n    if line == '\\n':\n        "
HANG = BATCH_END + "print('=90', flush=True); time.sleep(60)"
DIE = BATCH_END + "print('=90', flush=True); sys.exit()"
NOISE = BATCH_END + "print('=90\\nwhat?', flush=True)"
SOURCE = "start:\n        nop\n        mov eax, ebx\n        mov ecx, edx\n"


@pytest.mark.parametrize(
    ("script", "what"),
    [
        (HANG, "the encoder found no end to this instruction in 0.5 seconds"),
        (DIE, "the encoder died on this instruction"),
        (NOISE, "the encoder died on this instruction"),
    ],
)
def test_an_encoder_that_hangs_or_dies(script: str, what: str) -> None:
    """A hang or crash of Keystone is an error at the very instruction that it was given, and ends there."""
    start = time.monotonic()
    with (
        Keystone(timeout=0.5, command=[sys.executable, "-I", "-S", "-c", script]) as keystone,
        pytest.raises(AssemblyError) as caught,
    ):
        assemble_text(SOURCE, "bad.asm", encoder=Encoder(keystone))
    assert str(caught.value).split("\n")[0] == f"bad.asm:3:9: {what}"
    assert time.monotonic() - start < 10


def test_an_encoder_that_lies() -> None:
    """Code that does not decode to what was written never gets into a guest."""
    answers = {
        "mov eax, ebx": ["89c8", "9090", "89", "", "6689d8", "89d890", "8b03", "b8eb000000"],
        "add dword [ebx + 4], 5": [
            "83430505",
            "83410405",
            "6683430405",
            "2683430405",
            "83430406",
        ],
        "lea ecx, [eax + edx*4]": ["8d0c50", "8d0c82", "8b0c90"],
    }
    for line, codes in answers.items():
        for code in codes:
            script = f"{BATCH_END}print('={code}', flush=True)"
            with Keystone(command=[sys.executable, "-I", "-S", "-c", script]) as keystone:
                encoder = Encoder(keystone)
                with pytest.raises(AssemblyError, match="cannot be encoded as written: it would become"):
                    assemble_text(line, encoder=encoder)


def test_the_assembler_does_not_import_keystone() -> None:
    """Keystone lives in its own process: assembling does not load it into ours."""
    assert assemble_text("mov eax, ebx").data == b"\x89\xd8"
    assert "keystone" not in sys.modules
