"""The benchmarks' guests as images: assembled once, then given a number of iterations without being assembled again.

The generated code of the translation benchmark is made here, too. Its hard part is to be like a kernel's in what a
translator minds: short blocks, memory operands, stack traffic, and yet every instruction executed exactly once,
whatever the flags are, so that their number is known.
"""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from functools import cache
from pathlib import Path

from tools.bench.nano.catalogue import FOLDER, TRANSLATED, Benchmark
from vmm.image.asm import assemble_text
from vmm.image.image import Image, Segment
from vmm.image.load import from_assembly, with_information

ROOT = FOLDER.parents[2]
MEMORY = 16 << 20


@cache
def generated(instructions: int, seed: int = 1) -> bytes:
    """So many instructions of 32-bit kernel code, in blocks of about six; ESI points at a page of data.

    Branches, taken or not, go to the next instruction. ESP and ESI are preserved, and what is pushed is popped
    by the next instruction.
    """
    chance = random.Random(seed)
    free = (0, 1, 2, 3, 7)  # EAX, ECX, EDX, EBX, EDI
    code, made, since = bytearray(), 0, 0
    while made < instructions:
        a, b = chance.choice(free), chance.choice(free)
        offset = chance.randrange(0, 1024) * 4
        if since > 3 and chance.random() < 0.4 or since > 10:
            branch = (
                bytes((0x70 + chance.randrange(16), 0)),
                b"\xeb\0",
                b"\xe8\0\0\0\0" + bytes((0x58 + a,)),
            )
            which = chance.choices(range(3), (12, 2, 3))[0]
            pieces, size = [branch[which]], 2 if which == 2 else 1
            since = 0
        else:
            register = bytes((0xC0 | a << 3 | b,))
            memory = bytes((0x86 | a << 3,)) + struct.pack("<I", offset)
            pieces, size = chance.choice((
                ([b"\x01" + register], 1),  # add
                ([b"\x31" + register], 1),  # xor
                ([b"\x89" + register], 1),  # mov
                ([b"\x39" + register], 1),  # cmp
                ([b"\x85" + register], 1),  # test
                ([bytes((0xB8 + a,)), struct.pack("<I", chance.getrandbits(32))], 1),  # mov r, imm
                ([b"\x83", bytes((0xC0 | b, chance.randrange(128)))], 1),  # add r, imm8
                ([b"\xc1", bytes((0xE0 | b, chance.randrange(1, 31)))], 1),  # shl
                ([b"\x8b" + memory], 1),  # mov r, [esi + n]
                ([b"\x89" + memory], 1),  # mov [esi + n], r
                ([b"\x03" + memory], 1),  # add r, [esi + n]
                ([b"\x8d" + memory], 1),  # lea
                ([b"\x0f\xb6" + memory], 1),  # movzx
                ([bytes((0x50 + a,)), bytes((0x58 + b,))], 2),  # push, pop
            ))  # fmt: skip
            since += size
        if made + size > instructions:
            continue
        code += b"".join(pieces)
        made += size
    return bytes(code)


@cache
def image_of(benchmark: Benchmark, code: bytes = b"", pv: bool = False) -> Image:
    """The guest, loaded as multiboot has it, or for Xen's interface, if it has such a build.

    `code` is what the translation benchmark executes.
    """
    defines = dict(benchmark.defines)
    if pv:
        assert benchmark.pv, f"{benchmark.name} has no build for Xen's interface"
        defines["PV"] = ""
    if benchmark.once:
        code = code or generated(TRANSLATED)
        defines["SIZE"] = str(len(code) + 5)
    text = benchmark.path.read_text()
    image = from_assembly(str(benchmark.path), assemble_text(text, benchmark.path.name, defines, folder=ROOT))
    if benchmark.once:
        image = patched(image, image.symbols["code"], code + b"\xe9\0\0\0\0")
    image = replace(image, name=benchmark.name)
    return image if pv else with_information(image, "", MEMORY)


def patched(image: Image, address: int, data: bytes) -> Image:
    """The image with other bytes at a physical address inside a segment's data."""
    segments = []
    for s in image.segments:
        if s.address <= address and address + len(data) <= s.address + len(s.data):
            at = address - s.address
            s = Segment(s.address, s.data[:at] + data + s.data[at + len(data) :], s.size)
        segments.append(s)
    return replace(image, segments=tuple(segments))


def with_iterations(image: Image, count: int) -> Image:
    """The image with another number of iterations, which must be at least 0 and less than 2**32."""
    return patched(image, image.symbols["iterations"], struct.pack("<I", count))


def write(image: Image, path: Path) -> None:
    """As an ELF that `python -m vmm run` and `qemu-system-i386 -kernel` take."""
    from vmm.image.build import build_elf

    build_elf(image, path)
