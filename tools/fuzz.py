"""Random guests against the machine and the monitors: each must end within its budget, the process intact.

    python tools/fuzz.py --seconds 3600            an hour, both modes, all seeds
    python tools/fuzz.py --seed 1234 --count 1 -v  one case again

The cases of a batch run in a child process, so that an abort or a hang of the engine is seen and named by its
seed. A case is random code with a bias: towards privileged and system instructions, towards operands that
point at descriptor tables, TSS and code, and with a random but often valid GDT, IDT, LDT and TSS in memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import struct
import sys
import time
from multiprocessing.connection import Connection

from vmm.image.image import Image, Segment
from vmm.isa.descriptors import Descriptor
from vmm.vm import UNMODIFIED, VirtualMachine

LOAD = 0x100000
TABLES = 0x110000
GDT, IDT, LDT, TSS, STACK = TABLES, TABLES + 0x1000, TABLES + 0x2000, TABLES + 0x3000, TABLES + 0x5000
PAGES = 0x120000  # a page directory and tables, sometimes put in force
BUDGET = 20_000
CASE_SECONDS = 20.0  # a case needs milliseconds; this long is a hang

SYSTEM = [
    "0f0115{gdtr}", "0f011d{idtr}", "0f00d0", "0f00d8", "0f00c0", "0f00c8", "0f0105{mem}", "0f010d{mem}",
    "0f01e0", "0f01f0", "0f06", "0f08", "0f09", "0f20c0", "0f20d0", "0f20d8", "0f20e0", "0f22c0", "0f22d0",
    "0f22d8", "0f22e0", "0f21c0", "0f21f8", "0f23c0", "0f23f8", "0f23f0", "0f0138", "0f30", "0f32", "0f31",
    "0f33", "0f34", "0f35", "0fa2", "f4", "fa", "fb", "9c", "9d", "cf", "66cf", "cb", "ca0800", "cc", "ce",
    "cd{b}", "cd80", "f1", "62{modrm}", "9a{far}", "ea{far}", "ff18", "ff28", "8ec0", "8ed0", "8ed8", "8ee0",
    "8ee8", "8cc0", "8cd0", "0fb200", "c400", "c500", "07", "17", "1f", "0fa1", "0fa9", "06", "0e", "16", "1e",
    "0f02c1", "0f03c1", "0f00e0", "0f00e8", "ec", "ed", "ee", "ef", "e4{b}", "e6{b}", "6c", "6d", "6e", "6f",
    "f36c", "f36d", "f36e", "f36f", "f3a4", "f3a5", "f3aa", "f3ab", "f2ae", "f3a6", "0f01d8", "0f01d9",
    "0f01da", "0f01dc", "0fae00", "0fae08", "dbe3", "0f0b", "0fff", "0fb9c0", "d9{modrm}", "0f{b}{modrm}",
    "0f01{modrm}", "0fc7{modrm}", "f390", "0f05", "0f07", "0faa", "d6", "f0{b}{modrm}", "0f01f9", "0f01c8",
    "0f01c9", "0f01ca", "0f01d0", "0f01d1", "0fa3c0", "f00fabc1", "f00fbae0{b}", "0fb3{modrm}",
]  # fmt: skip
MOVES = ["b8{imm}", "b9{imm}", "ba{imm}", "bb{imm}", "be{imm}", "bf{imm}", "bc{stack}", "bd{imm}"]
PLAIN = [
    "01d8", "29c8", "31db", "f7f1", "f6f1", "a1{mem}", "a3{mem}", "8b00", "8903", "890424", "50", "58", "51", "59",
    "53", "5b", "60", "61", "c3", "e8{rel}", "eb{rel8}", "75{rel8}", "74{rel8}", "e2{rel8}", "c9", "90", "d3e0",
    "6800020000", "6802030000", "6a00", "66b8{w}", "c605{mem}{b}", "c705{mem}{imm}", "ff00", "ff10", "ff20",
]  # fmt: skip
SELECTORS = [
    0x00,
    0x08,
    0x10,
    0x18,
    0x1B,
    0x20,
    0x23,
    0x28,
    0x30,
    0x38,
    0x40,
    0x48,
    0x53,
    0x0C,
    0x0F,
    0xFFF8,
    0xFFF0,
]


def interesting(r: random.Random) -> int:
    """A 32-bit value that is likely to mean something."""
    return r.choice(
        (
            0, 1, 0xFFFFFFFF, 0x80000000, r.getrandbits(32), r.getrandbits(8), r.choice(SELECTORS), LOAD,
            LOAD + r.randrange(0x400), GDT + r.randrange(0x100), IDT + r.randrange(0x800), TSS + r.randrange(0x70),
            LDT, STACK - r.randrange(64), PAGES, PAGES + 0x1000, 0x11, 0x80000011, 0x80010011, 0x10, 0x60000010,
            0xFFC00000 + r.randrange(0x21000), 0xFFFFE000, 0xB8000, 0xA0000, 0x3F8, 0x20, 0x43, 0x40, 0x70, 0x92,
            0xF4, 0xC0000080, 0x174, 0x175, 0x176, 0x1B, 0x10, 0xC0010117, 0x400, 0x2000, 0xFFFF, r.getrandbits(16),
        )
    )  # fmt: skip


def instruction(r: random.Random) -> bytes:
    roll = r.random()
    if roll < 0.08:
        return r.randbytes(r.randrange(1, 8))
    text = r.choice(SYSTEM if roll < 0.5 else MOVES if roll < 0.75 else PLAIN)
    values = {
        "b": bytes((r.getrandbits(8),)),
        "w": struct.pack("<H", interesting(r) & 0xFFFF),
        "modrm": r.randbytes(1) + (struct.pack("<I", interesting(r)) if r.random() < 0.5 else b""),
        "imm": struct.pack("<I", interesting(r)),
        "mem": struct.pack("<I", interesting(r)),
        "stack": struct.pack("<I", r.choice((STACK, STACK - 16, interesting(r)))),
        "rel": struct.pack("<i", r.randrange(-64, 64)),
        "rel8": struct.pack("<b", r.randrange(-40, 40)),
        "far": struct.pack(
            "<IH", r.choice((LOAD, LOAD + r.randrange(0x300), interesting(r))), r.choice(SELECTORS)
        ),
        "gdtr": struct.pack("<I", TABLES + 0x4000),
        "idtr": struct.pack("<I", TABLES + 0x4008),
    }
    prefix = r.choice((b"", b"", b"", b"", b"", b"\x66", b"\x67", b"\xf0", b"\x2e", b"\x64"))
    return prefix + bytes.fromhex(text.format(**{k: v.hex() for k, v in values.items()}))


def descriptor(r: random.Random) -> bytes:
    if r.random() < 0.1:
        return r.randbytes(8)
    if r.random() < 0.35:
        kind = r.choice((1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 14, 15, r.randrange(16)))
        if kind in (4, 5, 6, 7, 12, 14, 15):
            low = (LOAD + r.randrange(0x300)) & 0xFFFF | r.choice(SELECTORS) << 16
            high = LOAD & 0xFFFF0000 | r.choice((0x80, 0x80, 0x80, 0)) << 8 | r.randrange(4) << 13 | kind << 8
            return struct.pack("<II", low, high)
        base = r.choice((TSS, LDT, interesting(r)))
        return bytes(
            Descriptor.segment(base, r.choice((0x67, 0x68, 0xFF, 3, 0)), 0x80 | r.randrange(4) << 5 | kind, 0)
        )
    access = r.choice((0x9A, 0x92, 0xFA, 0xF2, 0xBA, 0xB2, 0x9E, 0x96, 0x12, r.getrandbits(8)))
    base = r.choice((0, 0, 0, 0, interesting(r)))
    return bytes(
        Descriptor.segment(base, r.choice((0xFFFFF, 0xFFFFF, 0xFF, 0)), access, r.choice((0xC, 0xC, 4, 0, 8)))
    )


def guest(seed: int) -> Image:
    """The case with this number: always the same."""
    r = random.Random(seed)
    flat = [0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF, 0x00CFFA000000FFFF, 0x00CFF2000000FFFF]
    gdt = b"".join(struct.pack("<Q", entry) for entry in flat)
    gdt += bytes(Descriptor.segment(TSS, 0x1FF, 0x89, 0)) + bytes(Descriptor.segment(LDT, 0xFF, 0x82, 0))
    gdt += b"".join(descriptor(r) for _ in range(8))
    idt = b"".join(
        struct.pack("<HHHH", LOAD + r.randrange(0x300) & 0xFFFF, 8, r.choice((0x8E00, 0x8F00, 0xEE00, 0xEF00)), 0x10)
        if r.random() < 0.8 else descriptor(r)
        for _ in range(r.choice((256, 256, 64, 20)))
    )  # fmt: skip
    ldt = b"".join(descriptor(r) for _ in range(32))
    tss = bytearray(r.randbytes(0x200) if r.random() < 0.3 else bytes(0x200))
    struct.pack_into(
        "<IIII", tss, 4, STACK - 0x400, 0x10, r.choice((STACK, interesting(r))), r.choice(SELECTORS)
    )
    struct.pack_into("<H", tss, 0x66, r.choice((0x68, 0x1FF, 0xFFFF, r.getrandbits(16))))
    pointers = struct.pack("<HI2xHI", len(gdt) - 1, GDT, len(idt) - 1, IDT)
    directory = [PAGES + 0x1000 | 7] + [r.choice((0, 0, 0x87, r.getrandbits(32))) for _ in range(1023)]
    table = [(i << 12) | r.choice((7, 7, 7, 7, 7, 5, 3, 1, 0)) for i in range(1024)]
    code = bytearray()
    if r.random() < 0.85:
        code += bytes.fromhex("0f0115") + struct.pack("<I", TABLES + 0x4000)
        code += bytes.fromhex("0f011d") + struct.pack("<I", TABLES + 0x4008)
        code += b"\xbc" + struct.pack("<I", STACK)
        if r.random() < 0.7:
            code += bytes.fromhex("66b82800 0f00d8")  # ltr 0x28
        if r.random() < 0.3:
            code += bytes.fromhex("66b83000 0f00d0")  # lldt 0x30
        if r.random() < 0.25:
            code += b"\xb8" + struct.pack("<I", PAGES) + bytes.fromhex("0f22d8 b811000180 0f22c0")
        if r.random() < 0.4:
            there = LOAD + len(code) + 20
            code += bytes.fromhex("6a23 68") + struct.pack("<I", STACK - 0x800)
            code += bytes.fromhex("68") + struct.pack("<I", r.choice((0x202, 0x3202, 0x302, 0x0)))
            code += bytes.fromhex("6a1b 68") + struct.pack("<I", there) + b"\xcf"
    while len(code) < 0x300:
        code += instruction(r)
    tables = [(GDT, gdt), (IDT, idt), (LDT, ldt), (TSS, bytes(tss)), (TABLES + 0x4000, pointers)]
    tables += [(PAGES, struct.pack("<1024I", *directory)), (PAGES + 0x1000, struct.pack("<1024I", *table))]
    segments = [Segment(LOAD, bytes(code), len(code))] + [Segment(a, d, len(d)) for a, d in tables]
    return Image(f"fuzz {seed}", tuple(segments), LOAD, registers={"eax": 0x2BADB002, "ebx": 0x9000})


def run_case(seed: int, mode: str, verbose: bool = False) -> str:
    """Run it; returns the kind of its outcome. Anything but an outcome is a bug of ours and raises."""
    vm = VirtualMachine(guest(seed), mode, memory=4 << 20)
    result = vm.run(BUDGET, timeout=CASE_SECONDS / 2)
    if result.instructions > BUDGET:
        raise AssertionError(f"{result.instructions} instructions retired with a budget of {BUDGET}")
    if result.outcome.kind == "timeout":
        raise AssertionError(f"{result.instructions} instructions took {result.seconds:.1f} s")
    if verbose:
        print(seed, mode, result.outcome, result.instructions, f"{result.seconds:.3f} s")
    return result.outcome.kind


def run_opcodes(second: int, mode: str) -> str:
    """Execute the two-byte opcode 0F `second` with every ModRM digit, in register and memory form.

    Every vector leads to the next of the sixteen. Returns the kind of the outcome.
    """
    next_test, handler = TABLES + 0x800, LOAD
    code = bytearray(b"\xbc" + struct.pack("<I", STACK) + b"\xff\x25" + struct.pack("<I", next_test))
    entry = LOAD + len(code)
    code += bytes.fromhex("0f011d") + struct.pack("<I", TABLES + 0x4008) + code[:5]
    for modrm in [digit << 3 for digit in range(8)] + [0xC3 | digit << 3 for digit in range(8)]:
        test = b"\xb8" + struct.pack("<I", TABLES + 0x4008) + bytes((0x0F, second, modrm)) + bytes(12)
        following = LOAD + len(code) + 10 + len(test)
        code += bytes.fromhex("c705") + struct.pack("<II", next_test, following) + test
    code += b"\xfa\xf4"
    gate = struct.pack("<HHHH", handler & 0xFFFF, 8, 0x8E00, handler >> 16)
    pieces = [(LOAD, bytes(code)), (IDT, gate * 256), (TABLES + 0x4008, struct.pack("<HI", 0x7FF, IDT))]
    image = Image(f"opcode 0f {second:02x}", tuple(Segment(a, d, len(d)) for a, d in pieces), entry)
    return VirtualMachine(image, mode, memory=4 << 20).run(BUDGET, timeout=CASE_SECONDS / 2).outcome.kind


def _batch(seeds: range, modes: list[str], verbose: bool, pipe: Connection) -> None:
    """In a child: announce each case, so that the parent knows which one killed it."""
    for seed in seeds:
        for mode in modes:
            pipe.send(("start", seed, mode))
            try:
                pipe.send(("end", run_case(seed, mode, verbose), mode))
            except Exception as error:
                import traceback

                where = traceback.extract_tb(error.__traceback__)[-1]
                pipe.send(("bug", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})", mode))
    pipe.send(("done", "", ""))


def campaign(
    first: int, count: int | None, seconds: float, modes: list[str], verbose: bool = False
) -> list[str]:
    """Run cases until `count` or `seconds` are reached; returns one line for each bug."""
    bugs: list[str] = []
    kinds: dict[str, int] = {}
    context = multiprocessing.get_context("fork")
    started, seed, cases = time.monotonic(), first, 0
    while time.monotonic() - started < seconds and (count is None or seed < first + count):
        size = 50 if count is None else min(50, first + count - seed)
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_batch, args=(range(seed, seed + size), modes, verbose, theirs))
        child.start()
        theirs.close()
        current, finished = (seed, modes[0]), False
        while not finished:
            try:
                if not ours.poll(CASE_SECONDS):
                    bugs.append(f"seed {current[0]} {current[1]}: hangs")
                    child.kill()
                    break
                kind, what, mode = ours.recv()
            except EOFError:
                child.join()
                bugs.append(f"seed {current[0]} {current[1]}: the process died with {child.exitcode}")
                break
            if kind == "start":
                current = (what, mode)
            elif kind == "end":
                cases += 1
                kinds[f"{mode} {what}"] = kinds.get(f"{mode} {what}", 0) + 1
            elif kind == "bug":
                bugs.append(f"seed {current[0]} {mode}: {what}")
            else:
                finished = True
        child.join()
        seed = seed + size if finished else current[0] + 1
    if bugs or verbose or seconds > 60:
        print(f"{cases} cases in {time.monotonic() - started:.0f} s: {dict(sorted(kinds.items()))}")
    return bugs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--mode", choices=sorted(UNMODIFIED), action="append")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    bugs = campaign(
        options.seed, options.count, options.seconds, options.mode or sorted(UNMODIFIED), options.verbose
    )
    for bug in bugs:
        print(bug)
    return 1 if bugs else 0


if __name__ == "__main__":
    sys.exit(main())
