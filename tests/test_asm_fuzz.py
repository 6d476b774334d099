"""Whatever the text, the assembler answers: with an assembly or with an error for people, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.asm_corpus import Corpus
from vmm.errors import AssemblyError, ImageError
from vmm.image.asm import Encoder, Keystone, Limits, assemble_text
from vmm.isa.disassemble import disassemble


def _words(text: str) -> list[str]:
    return text.split(" ")


# Small enough that the worst text within them takes seconds, so that the time below can be demanded.
LIMITS = Limits(lines=2000, tokens=20_000, image_bytes=1 << 20)
SECONDS = 20

WORDS = _words(
    "mov add jmp call push pop lgdt lea imul shl test xchg movsd fadd ret int rep lock times db dw dd dq resb resd "
    "equ align section .text .data .bss org bits 32 16 eax ebx esp cx al ds st0 xmm1 cr0 byte word dword qword "
    "short near far strict to nosplit start loop foo .x ..@y _z a b 0 1 -1 5 0x80 0xFFFFFFFF 1.5 'a' \"str\" `\\n` "
    "[ ] ( ) { } + - * / % // %% & | ^ ~ ! << >> , : ? = == < $ $$ ; \\ %define %undef %if %ifdef %elif %else "
    "%endif %macro %endmacro %rep %endrep %assign %include %error %1 %0 %%l %{1} %foo o16 a16 es: global extern "
    "incbin repne in out 0b12 99999999999999999999 @ # \x00 \t \ufffd"
)

words = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
sources = st.lists(words, max_size=12).map("\n".join)


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    with Keystone() as keystone:
        yield Encoder(keystone)


def answered(text: str, encoder: Encoder) -> None:
    """Assemble `text`, and check what every answer promises."""
    start = time.monotonic()
    try:
        made = assemble_text(text, "fuzz.asm", encoder=encoder, limits=LIMITS)
    except AssemblyError as error:
        count = text.count("\n") + 1
        assert 1 <= error.line <= count
        assert error.column >= 1
        assert "\n" not in error.what
    except ImageError as error:
        assert str(error).startswith("fuzz.asm: ")
    else:
        assert len(made.data) <= LIMITS.image_bytes
        for line in made.lines:
            assert made.origin <= line.address <= line.address + line.size <= made.origin + len(made.data)
    assert time.monotonic() - start < SECONDS


fuzz = settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fuzz
@given(text=st.text(max_size=300))
def test_any_text(text: str, encoder: Encoder) -> None:
    """No text at all gives anything but an Assembly, an AssemblyError or an ImageError."""
    answered(text, encoder)


@fuzz
@given(text=sources)
def test_any_words(text: str, encoder: Encoder) -> None:
    """Nor do the words of the dialect in any order."""
    answered(text, encoder)


@pytest.mark.long
@settings(fuzz, max_examples=20_000)
@given(text=sources)
def test_any_words_for_long(text: str, encoder: Encoder) -> None:
    """Nor in very many orders."""
    answered(text, encoder)


def mutated(text: str, random: Random) -> str:
    """`text` with a few of its words dropped, doubled, swapped or replaced."""
    lines = text.split("\n")
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(len(lines))
        parts = lines[at].split(" ")
        where = random.randrange(len(parts))
        act = random.randrange(4)
        if act == 0:
            del parts[where]
        elif act == 1:
            parts.insert(where, parts[where])
        elif act == 2:
            parts[where] = random.choice(WORDS)
        else:
            lines[at], lines[at - 1] = lines[at - 1], lines[at]
            continue
        lines[at] = " ".join(parts)
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_programs(seed: int, encoder: Encoder) -> None:
    """A good program with a few words changed is assembled or refused, and nothing else."""
    random = Random(seed)
    answered(mutated(Corpus(seed % 5, 150).text, random), encoder)


REGISTERS = st.sampled_from(
    _words("eax ecx edx ebx esp ebp esi edi ax cx bx al ah cl ds es cr0 dr7 st1 mm0 xmm0")
)
NUMBERS = st.sampled_from(_words("0 1 -1 5 127 128 -128 255 256 0x7FFF 0xFFFF 0x10000 0x7FFFFFFF 0xFFFFFFFF"))
SIZES = st.sampled_from(["", "byte ", "word ", "dword ", "qword ", "oword "])
ADDRESSES = st.builds(
    "{}[{}{}{} + {}]".format,
    SIZES,
    st.sampled_from(["", "es:", "ss:"]),
    st.sampled_from(["eax", "ebp", "esp", "bx", "bp + si"]),
    st.sampled_from(["", " + ecx*4", " + edi*2", " + eax"]),
    NUMBERS,
)
OPERANDS = st.lists(REGISTERS | NUMBERS | ADDRESSES, max_size=3).map(", ".join)
MNEMONICS = st.sampled_from(
    _words(
        "mov add sub cmp test xchg lea imul inc not shl rcr bt shld movzx movsx push pop in out int ret enter lar "
        "lsl sldt str ltr lldt lmsw smsw lgdt sidt invlpg bound arpl les cmpxchg xadd bswap setz cmovc fld fstp "
        "fild fadd fsubp fxch fnstsw movd movq movss movaps paddd pshufd cvtsi2sd nop aam jmp call loop jecxz"
    )
)


@settings(fuzz, max_examples=1500)
@given(mnemonic=MNEMONICS, operands=OPERANDS)
def test_what_is_accepted_is_one_instruction(mnemonic: str, operands: str, encoder: Encoder) -> None:
    """Any mnemonic with any operands is refused, or becomes one instruction, all of whose bytes decode."""
    try:
        made = assemble_text(f"org 0\n{mnemonic} {operands}", "fuzz.asm", encoder=encoder)
    except AssemblyError:
        return
    (decoded,) = disassemble(made.data, 0)
    assert decoded.size == len(made.data)
