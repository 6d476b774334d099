"""The assembler against the real NASM: the same bytes, or bytes that decode to the same instructions."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.asm_corpus import Corpus, jumps
from tests.guest_expectations import EXPECTATIONS
from tests.oracles import require
from vmm.image.asm import Assembly, Encoder, Keystone, assemble, assemble_text
from vmm.isa.disassemble import disassemble

GUESTS = Path(__file__).parent.parent / "guests"


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    with Keystone() as keystone:
        yield Encoder(keystone)


def nasm(source: Path, folder: Path, *defines: str) -> bytes:
    """What `nasm -f bin` makes of a source whose includes lie beside it."""
    tool = require("nasm")
    output = folder / "nasm.bin"
    names = [f"-D{name}" for name in defines]
    command = [tool, "-f", "bin", "-w-all", *names, "-o", str(output), str(source)]
    done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return output.read_bytes()


def nasm_text(text: str, folder: Path) -> bytes:
    source = folder / "source.asm"
    source.write_text(text)
    return nasm(source, folder)


def differences(ours: Assembly, theirs: bytes) -> list[str]:
    """Every line of the listing where the two disagree in more than the choice of an encoding."""
    if ours.data == theirs:
        return []
    found = [] if len(ours.data) == len(theirs) else [f"{len(ours.data)} bytes, NASM has {len(theirs)}"]
    for line in ours.lines:
        at = line.address - ours.origin
        mine, its = ours.data[at : at + line.size], theirs[at : at + line.size]
        if mine == its:
            continue
        decoded = [[str(i) for i in disassemble(code, line.address)] for code in (mine, its)]
        if decoded[0] != decoded[1]:
            found.append(f"line {line.line}: {line.text.strip()}: {mine.hex()} is not {its.hex()}: {decoded}")
    return found[:20]


@pytest.mark.parametrize("seed", range(4))
def test_a_corpus_of_instructions_directives_and_macros(seed: int, tmp_path: Path, encoder: Encoder) -> None:
    """Some thousand lines, over every family, size and addressing mode, assemble as NASM assembles them."""
    text = Corpus(seed, 2500).text
    assert not differences(assemble_text(text, encoder=encoder), nasm_text(text, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 130))
def test_a_long_campaign_of_corpora(seed: int, tmp_path: Path, encoder: Encoder) -> None:
    """So do a hundred thousand lines."""
    text = Corpus(seed, 4000).text
    assert not differences(assemble_text(text, encoder=encoder), nasm_text(text, tmp_path))


@pytest.mark.parametrize("seed", range(24))
def test_jumps_settle_as_in_nasm(seed: int, tmp_path: Path, encoder: Encoder) -> None:
    """Which jumps are short, where hundreds of them decide it for one another, is what NASM decides."""
    text = jumps(seed)
    assert not differences(assemble_text(text, encoder=encoder), nasm_text(text, tmp_path))


@pytest.mark.parametrize("path", sorted(GUESTS.glob("*.asm")), ids=lambda path: path.stem)
def test_each_guest(path: Path, tmp_path: Path) -> None:
    """Every guest of the project is a NASM program: `nasm -f bin` gives its very bytes."""
    assert assemble(path).data == nasm(path, tmp_path)


@pytest.mark.parametrize("name", [e.guest for e in EXPECTATIONS if e.pv])
def test_each_paravirtual_guest(name: str, tmp_path: Path) -> None:
    """So is its build for Xen's interface."""
    path = GUESTS / f"{name}.asm"
    assert assemble(path, defines={"PV": ""}).data == nasm(path, tmp_path, "PV")


@pytest.mark.parametrize(
    "line",
    [
        "mov eax, [eax*1 + ebx]",  # NASM takes `*1` as a wish for the index
        "movsx eax, word [bp + di]",  # Keystone adds a displacement of zero
    ],
)
def test_encodings_that_differ_mean_the_same(line: str, tmp_path: Path, encoder: Encoder) -> None:
    """The few forms that are known to be encoded in other bytes than NASM's address the same memory."""
    text = f"bits 32\norg 0x100000\n{line}\n"
    ours, theirs = assemble_text(text, encoder=encoder).data, nasm_text(text, tmp_path)
    assert ours != theirs
    shown = [str(disassemble(code, 0x100000)[0]) for code in (ours, theirs)]
    assert sorted(shown[0]) == sorted(shown[1])


LAYOUTS = {
    "sections in any order": "section .data\nd: db 1\nsection .text\nnop\nmov eax, d\nsection .data\ndd d, b\n"
    "section .bss\nb: resb 3\nsection .text\nmov ebx, b",
    "aligned sections": "nop\nsection .data align=32\ndd 1\nsection .rodata align=8\ndb 2\nsection .bss align=64\n"
    "b: resd 1\nsection .text\nmov eax, b",
    "only data": "section .data\ndb 1, 2, 3",
    "align in data": "section .data\ndb 1\nalign 8, db 0\ndd 1\nalign 16\ndb 2\nsection .text\nret",
    "room in text": "nop\nresb 5\nret",
    "a boot sector": "mov ax, 1\ntimes 510-($-$$) db 0\ndw 0xAA55",
    "alignb": "section .bss\na: resb 1\nalignb 16\nb: resb 1\nsection .text\nmov eax, b - a\nmov ecx, b",
    "equ of an address": "nop\nhere equ $\nsize equ here - $$\nmov eax, here\nmov ecx, size\n"
    "mov edx, later\nlater equ 7",
    "rodata before data": "section .rodata\nr: db 1\nsection .data\nd: dd r, d\nsection .text\nmov eax, r",
    "negative displacements": "a: mov eax, [ebx + a - b]\nb: mov eax, [ebx - (b - a)]\npush b - a",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_sections_lie_where_nasm_puts_them(name: str, tmp_path: Path, encoder: Encoder) -> None:
    """The image of .text, .data and .rodata, and every address in it, is that of `nasm -f bin`."""
    text = f"bits 32\norg 0x100000\n{LAYOUTS[name]}\n"
    assert assemble_text(text, encoder=encoder).data == nasm_text(text, tmp_path)
