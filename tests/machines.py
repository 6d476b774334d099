"""Small guests for tests: a board with descriptor tables in place, a program on it, a run, a look.

`Lab` is a machine that stands where a kernel has loaded its tables: a GDT with the usual segments, an IDT whose
256 gates each lead to a loop of their own (so that EIP tells the vector, and the stack still holds the frame),
a TSS with stacks for the inner rings. A test changes what it is about, gives a few lines of assembly, runs,
and reads registers and memory. Everything works in every mode, because the monitor takes over after the setup.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vmm.image.asm import Assembly, Encoder, Keystone, assemble_text
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.words import EFlags
from vmm.machine.boot import boot
from vmm.machine.clock import Clock
from vmm.machine.control import Control
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.engine import Engine
from vmm.machine.cpu.state import GENERAL, SEGMENT_NAMES
from vmm.machine.machine import Machine, Outcome
from vmm.machine.pc import Model
from vmm.vm import MODES

MEMORY = 2 << 20
GDT, LDT, IDT, TSS, POINTERS = 0x2000, 0x2800, 0x3000, 0x4000, 0x4800
HANDLERS = 0x6000  # vector n's handler is at HANDLERS + 16 n
STACK, USER_STACK = 0x90000, 0x98000  # tops
INNER_STACKS = (0x8C000, 0x8D000, 0x8E000)  # ESP0, ESP1, ESP2 of the TSS
CODE, DATA = 0x100000, 0x110000
PAGES = 0x120000  # a page directory, and tables behind it

KERNEL_CODE, KERNEL_DATA, USER_CODE, USER_DATA = 0x08, 0x10, 0x1B, 0x23
TSS_SELECTOR, LDT_SELECTOR = 0x28, 0x30
RING1_CODE, RING1_DATA = 0x39, 0x41
CONFORMING, ABSENT_DATA = 0x48, 0x50
FREE = 0x58  # selectors from here to 0xF8 are the test's own
CODE16, DATA16 = 0x60, 0x68  # of those, if the test does not need them: 64 KiB segments at 0

GDT_ENTRIES: Mapping[int, Descriptor] = {
    KERNEL_CODE: Descriptor.segment(0, 0xFFFFF, 0x9B, 0xC),
    KERNEL_DATA: Descriptor.segment(0, 0xFFFFF, 0x93, 0xC),
    USER_CODE & ~3: Descriptor.segment(0, 0xFFFFF, 0xFB, 0xC),
    USER_DATA & ~3: Descriptor.segment(0, 0xFFFFF, 0xF3, 0xC),
    TSS_SELECTOR: Descriptor.segment(TSS, 0x67, 0x80 | SystemType.TSS32_AVAILABLE, 0),
    LDT_SELECTOR: Descriptor.segment(LDT, 0x7F, 0x80 | SystemType.LDT, 0),
    RING1_CODE & ~3: Descriptor.segment(0, 0xFFFFF, 0xBB, 0xC),
    RING1_DATA & ~3: Descriptor.segment(0, 0xFFFFF, 0xB3, 0xC),
    CONFORMING: Descriptor.segment(0, 0xFFFFF, 0x9F, 0xC),
    ABSENT_DATA: Descriptor.segment(0, 0xFFFFF, 0x13, 0xC),
    CODE16: Descriptor.segment(0, 0xFFFF, 0x9B, 0x0),
    DATA16: Descriptor.segment(0, 0xFFFF, 0x93, 0x0),
}
TABLE_LIMIT = 0xFF  # of the GDT

# What every lab program may use.
PRELUDE = f"""\
%define KERNEL_CODE {KERNEL_CODE}
%define KERNEL_DATA {KERNEL_DATA}
%define USER_CODE {USER_CODE}
%define USER_DATA {USER_DATA}
%define STACK {STACK:#x}
%define USER_STACK {USER_STACK:#x}
%define DATA {DATA:#x}
%define IDT {IDT:#x}
%define GDT {GDT:#x}
%define TSS {TSS:#x}
; to_ring code selector, stack selector, flags: goes on after it
%macro to_ring 3
        push dword %2
        push dword USER_STACK
        push dword %3
        push dword %1
        push dword %%there
        iretd
%%there:
%endmacro
%macro to_user 0
        to_ring USER_CODE, USER_DATA, 2
%endmacro
bits 32
org {CODE:#x}
start:
"""


@functools.cache
def encoder() -> Encoder:
    """One assembler for the whole session: it answers what it has been asked before from memory."""
    return Encoder(Keystone())


@functools.lru_cache(maxsize=1024)
def assemble(source: str) -> Assembly:
    """`source` after `PRELUDE`, at `CODE`."""
    return assemble_text(PRELUDE + source + "\n", encoder=encoder())


def gate(
    offset: int,
    *,
    selector: int = KERNEL_CODE,
    kind: SystemType = SystemType.INTERRUPT_GATE32,
    dpl: int = 3,
    present: bool = True,
) -> Descriptor:
    """An IDT gate; by default one that every ring may name."""
    return Descriptor.gate(selector, offset, kind, dpl, present)


def handler(vector: int) -> int:
    """Where vector n's gate leads unless the test says otherwise: a loop that changes nothing."""
    return HANDLERS + 16 * vector


def tables(
    gdt: Mapping[int, Descriptor | bytes] = {}, idt: Mapping[int, Descriptor | bytes] = {}
) -> list[tuple[int, bytes]]:
    """(address, bytes) of descriptor tables, handlers and TSS, with a test's own entries put over them."""
    entries = {**GDT_ENTRIES, **gdt}
    table = bytearray(TABLE_LIMIT + 1)
    for selector, entry in entries.items():
        table[selector & ~7 : (selector & ~7) + 8] = bytes(entry)
    gates = bytearray()
    loops = bytearray()
    for vector in range(256):
        gates += bytes(idt.get(vector, gate(handler(vector))))
        loops += b"\xeb\xfe".ljust(16, b"\x90")
    task = bytearray(0x68)
    for ring, esp in enumerate(INNER_STACKS):
        task[4 + 8 * ring : 8 + 8 * ring] = esp.to_bytes(4, "little")
        selector = (KERNEL_DATA, RING1_DATA, 0)[ring]
        task[8 + 8 * ring : 12 + 8 * ring] = selector.to_bytes(4, "little")
    task[0x66:0x68] = (0x68).to_bytes(2, "little")  # the I/O bitmap lies past the limit
    return [(GDT, bytes(table)), (IDT, bytes(gates)), (HANDLERS, bytes(loops)), (TSS, bytes(task))]


@dataclass
class Lab:
    """A machine with a program on it, and what it wrote to its console."""

    machine: Machine
    control: Control
    assembly: Assembly
    console: bytearray = field(default_factory=bytearray)

    def run(self, limit: int = 10_000) -> Outcome:
        """Run until the guest ends or `limit` instructions have retired in all."""
        return self.machine.run(limit)

    def run_to(self, label: str, limit: int = 10_000) -> None:
        """Step until EIP is at `label`; fails if the guest ends or `limit` instructions were not enough."""
        target = self.symbol(label)
        while self.control.where() != target:
            outcome = self.machine.run(self.retired + 1)
            assert outcome.kind == "budget", outcome
            assert self.retired < limit, f"EIP is {self.control.where():#x}, not {label}"

    def symbol(self, name: str) -> int:
        return self.assembly.symbols[name]

    @property
    def retired(self) -> int:
        return self.machine.retired()

    @property
    def registers(self) -> dict[str, int]:
        """As the guest has them: under a monitor, the virtual ones."""
        return self.control.registers()

    def reg(self, name: str) -> int:
        return self.registers[name]

    @property
    def vector(self) -> int | None:
        """The vector whose handler the processor is in, None if it is in none."""
        offset = self.control.where() - HANDLERS
        return offset >> 4 if 0 <= offset < 0x1000 and not offset & 15 else None

    def read(self, address: int, size: int = 4) -> int:
        return self.machine.memory.read(address, size)

    def data(self, address: int, size: int) -> bytes:
        return bytes(self.machine.memory.bytes[address : address + size])

    def stack(self, count: int, size: int = 4) -> list[int]:
        """So many slots from the top of the stack, through physical memory (paging off, flat SS)."""
        esp = self.machine.state.esp
        return [self.read(esp + size * i, size) for i in range(count)]

    @property
    def memory(self) -> bytes:
        """All of RAM."""
        return bytes(self.machine.memory.bytes)

    def everything(self) -> dict[str, object]:
        """What two runs that ought to be equal are compared by, but for the time that they took."""
        return {
            "registers": self.registers,
            "memory": _digest(self.memory),
            "retired": self.retired,
            "console": bytes(self.console),
        }


def _digest(memory: bytes) -> tuple[int, tuple[tuple[int, bytes], ...]]:
    """Only pages that are not all zeroes: a failed comparison shows them."""
    zero = bytes(4096)
    pages = ((at, memory[at : at + 4096]) for at in range(0, len(memory), 4096))
    return len(memory), tuple((at, page) for at, page in pages if page != zero)


def lab(
    source: str | bytes,
    mode: str = "native",
    *,
    gdt: Mapping[int, Descriptor | bytes] = {},
    idt: Mapping[int, Descriptor | bytes] = {},
    memory: Sequence[tuple[int, bytes]] = (),
    registers: Mapping[str, int] = {},
    eflags: int = EFlags.ONE,
    size: int = MEMORY,
    engine: Engine | None = None,
    clock: Clock | None = None,
    task: tuple[int, int] = (0x67, SystemType.TSS32_AVAILABLE),
    attach: Callable[[Machine], Control] | None = None,
    model: Model = "isapc",
) -> Lab:
    """A machine in ring 0 at the first instruction of `source` (assembly text after `PRELUDE`, or raw bytes).

    `gdt` and `idt` replace entries, `memory` is laid over everything, `task` is (limit, type) of the TSS in TR.
    `attach` takes the place of the mode's own.
    All interrupt lines are masked at the PICs; paging and interrupts are off.
    """
    if isinstance(source, bytes):
        source = "        db " + ", ".join(str(byte) for byte in source)
    assembly = assemble(source)
    console = bytearray()
    machine = Machine(size, engine=engine, clock=clock, console=console.extend, model=model)
    boot(machine, assembly.entry)
    for address, data in (*tables(gdt, idt), (assembly.origin, assembly.data), *memory):
        machine.memory.load(address, data)
    for port in (0x21, 0xA1):
        machine.bus.write(port, 1, 0xFF)
    state = machine.state
    state.load()
    state.set_table(at.GDT, GDT, TABLE_LIMIT)
    state.set_table(at.IDT, IDT, 0x7FF)
    limit, kind = task
    state.load_segment(at.TR, TSS_SELECTOR, TSS, limit, 0x8000 | int(kind) << 8)
    state.eflags = eflags
    state.esp = STACK
    for name, value in registers.items():
        if name in GENERAL:
            state.set(GENERAL.index(name), value)
        else:
            state.load_descriptor(SEGMENT_NAMES.index(name), value, {**GDT_ENTRIES, **gdt}[value & ~7])  # type: ignore[arg-type]
    state.store()
    control = (attach or MODES[mode].attach)(machine)
    machine.attach(control)
    return Lab(machine, control, assembly, console)


def run(source: str | bytes, mode: str = "native", *, limit: int = 10_000, **options: object) -> Lab:
    """`lab` and a run to its end or `limit`."""
    made = lab(source, mode, **options)  # type: ignore[arg-type]
    made.run(limit)
    return made


def enable_paging(
    changes: Mapping[int, int] = {}, *, directory: Mapping[int, int] = {}, size: int = MEMORY
) -> list[tuple[int, bytes]]:
    """Page tables at `PAGES` that map all of RAM to itself, everything allowed, as `memory` for `lab`.

    `changes` replaces table entries by linear page address, `directory` replaces directory entries by number.
    """
    tables_needed = -(-size // 0x400000)
    entries = [(n << 12) | 7 for n in range(tables_needed * 1024)]
    for address, entry in changes.items():
        entries[address >> 12] = entry
    top = [0] * 1024
    for n in range(tables_needed):
        top[n] = PAGES + 0x1000 * (n + 1) | 7
    for number, entry in directory.items():
        top[number] = entry
    return [(PAGES, b"".join(entry.to_bytes(4, "little") for entry in (*top, *entries)))]


PAGING_ON = f"""\
        mov eax, {PAGES:#x}
        mov cr3, eax
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
"""
