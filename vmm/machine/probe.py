"""A laboratory: run a few instructions on the real CPU, in a ring and a state of one's choice.

The classification claims things about instructions ("traps outside ring 0", "silently does nothing"). Here
is where such claims are put to the processor. Each run starts from a complete, freshly made state: 64 KiB
of flat memory with descriptor tables for every ring, setup code that the CPU itself executes in ring 0,
and an IRET that takes it to the ring in question. What comes back is everything that an instruction can
change: registers, flags, hidden segment registers, control registers, memory, ports, and how it ended.

The hard part is that the CPU must survive anything: it never runs without a limit, its TSS is always one
that it accepts (another aborts the process), code that its translator cannot survive is refused,
hooks never raise, and a run that left breakpoints behind gets a new engine.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, lru_cache

from unicorn import (
    UC_ARCH_X86,
    UC_HOOK_CODE,
    UC_HOOK_INSN,
    UC_HOOK_INTR,
    UC_MODE_32,
    UC_PROT_ALL,
    Uc,
    UcError,
)
from unicorn import unicorn_const as const
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib

from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.vectors import Vector
from vmm.isa.words import ARITHMETIC, EFlags
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.pages import zeroed
from vmm.machine.hostile import ABORTS

# A model that knows more instructions than the machine's, which CPUID does not tell there; and one to compare with.
MODEL, OTHER_MODEL = x86.UC_CPU_X86_EPYC, x86.UC_CPU_X86_HASWELL
MEMORY = 0x10000
GDT, MOVED_GDT, SHADOW_GDT = 0x1000, 0x1200, 0x1400
IDT, MOVED_IDT = 0x2000, 0x2800
TSS, OTHER_TSS, LDT, OTHER_LDT = 0x3000, 0x3200, 0x3400, 0x3600
TRAMPOLINE, POINTERS, FRAME = 0x3800, 0x3900, 0x3A00
CODE, TARGET = 0x4000, 0x5000
STACK, DATA = 0x8000, 0xC000
INNER_STACKS = (0xA000, 0xA800, 0xB000)  # ESP0, ESP1, ESP2

# Selectors of the global descriptor table, with the RPL that their users give them.
CODE_SELECTOR = {0: 0x08, 1: 0x29, 3: 0x1B}
DATA_SELECTOR = {0: 0x10, 1: 0x31, 3: 0x23}
TSS_SELECTOR, LDT_SELECTOR, OTHER_TSS_SELECTOR, OTHER_LDT_SELECTOR = 0x38, 0x40, 0x48, 0x50
CONFORMING_SELECTOR = 0x58
GATE_SELECTOR = 0x63  # a call gate that ring 3 may use, into ring 0
ABSENT_SELECTOR = 0x68
LIMITED_SELECTOR = 0x73  # data for every ring, one page long
KERNEL_CODE_SELECTOR, KERNEL_DATA_SELECTOR = 0x78, 0x80  # ring 0's; ring 1's where shadowed
LDT_DATA_SELECTOR = 0x0F  # data for every ring, in the LDT

_GDT_ENTRIES = (
    Descriptor(0, 0),
    *(Descriptor.segment(0, 0xFFFFF, access, 0xC) for access in (0x9B, 0x93, 0xFB, 0xF3, 0xBB, 0xB3)),
    Descriptor.segment(TSS, 0x67, 0x80 | SystemType.TSS32_AVAILABLE, 0),
    Descriptor.segment(LDT, 0x1F, 0x80 | SystemType.LDT, 0),
    Descriptor.segment(OTHER_TSS, 0x67, 0x80 | SystemType.TSS32_AVAILABLE, 0),
    Descriptor.segment(OTHER_LDT, 0x1F, 0x80 | SystemType.LDT, 0),
    Descriptor.segment(0, 0xFFFFF, 0x9F, 0xC),  # conforming code, ring 0
    Descriptor.gate(CODE_SELECTOR[0], TARGET, SystemType.CALL_GATE32, 3),
    Descriptor.segment(0, 0xFFFFF, 0x13, 0xC),  # not present
    Descriptor.segment(DATA, 0xFFF, 0xF3, 0x4),
    Descriptor.segment(0, 0xFFFFF, 0x9B, 0xC),
    Descriptor.segment(0, 0xFFFFF, 0x93, 0xC),
)
_LDT_ENTRIES = (Descriptor(0, 0), Descriptor.segment(0, 0xFFFFF, 0xF3, 0xC))


def _shadow(index: int, entry: Descriptor) -> Descriptor:
    """The entry as a monitor's table shows it: ring 0's are now ring 1's, and limits end below the monitor.

    The first three stay, for without them ring 0 could not run at all.
    """
    if index < 3 or (entry.is_system and entry.type != SystemType.LDT):
        return entry
    low = entry.low - 0x10
    return Descriptor(low, entry.high).with_dpl(entry.dpl or 1 if not entry.is_conforming else 0)


_SHADOW_ENTRIES = tuple(_shadow(index, entry) for index, entry in enumerate(_GDT_ENTRIES))


def _table(entries: tuple[Descriptor, ...]) -> bytes:
    return b"".join(bytes(entry) for entry in entries)


def _pointer(slot: int) -> bytes:
    """The address of pseudo-descriptor `slot`, as an instruction's displacement."""
    return struct.pack("<I", POINTERS + 8 * slot)


_STOP = (
    b"\xeb\xfe"  # a jump to itself, after the code in question: never executed, it ends the translated block
)


def _initial_memory() -> bytes:
    memory = bytearray(MEMORY)

    def put(address: int, data: bytes) -> None:
        memory[address : address + len(data)] = data

    gates = b"".join(bytes(Descriptor.gate(0x08, TARGET, SystemType.INTERRUPT_GATE32, 3)) for _ in range(256))
    put(GDT, _table(_GDT_ENTRIES))
    put(MOVED_GDT, _table(_GDT_ENTRIES))
    put(SHADOW_GDT, _table(_SHADOW_ENTRIES))
    put(IDT, gates)
    put(MOVED_IDT, gates)
    for tss in (TSS, OTHER_TSS):
        inner = [word for ring, esp in enumerate(INNER_STACKS) for word in (esp, (0x10, 0x31, 0)[ring])]
        put(tss, struct.pack("<I6I", 0, *inner))
        put(tss + 0x66, struct.pack("<H", 0x68))
    for ldt in (LDT, OTHER_LDT):
        put(ldt, _table(_LDT_ENTRIES))
    limit = 8 * len(_GDT_ENTRIES) - 1
    for slot, base in enumerate((GDT, MOVED_GDT, SHADOW_GDT)):
        put(POINTERS + 8 * slot, struct.pack("<HI", limit, base))
    for slot, base in enumerate((IDT, MOVED_IDT), 3):
        put(POINTERS + 8 * slot, struct.pack("<HI", 0x7FF, base))
    put(TARGET, _STOP * 0x400)
    return bytes(memory)


_MEMORY = _initial_memory()

# Ring-0 code, executed before the ring is entered, that makes a resource differ from `State()`'s.
LOAD_MOVED_GDT = b"\x0f\x01\x15" + _pointer(1)
LOAD_SHADOW_GDT = b"\x0f\x01\x15" + _pointer(2)
LOAD_MOVED_IDT = b"\x0f\x01\x1d" + _pointer(4)
LOAD_OTHER_TR = b"\x66\xb8" + struct.pack("<H", OTHER_TSS_SELECTOR) + b"\x0f\x00\xd8"
LOAD_OTHER_LDT = b"\x66\xb8" + struct.pack("<H", OTHER_LDT_SELECTOR) + b"\x0f\x00\xd0"
_USUAL_SETUP = (
    *(b"\x0f\x01\x15" + _pointer(0), b"\x0f\x01\x1d" + _pointer(3)),  # LGDT, LIDT
    *(b"\x66\xb8" + struct.pack("<H", TSS_SELECTOR) + b"\x0f\x00\xd8",),  # MOV AX; LTR
    *(b"\x66\xb8" + struct.pack("<H", LDT_SELECTOR) + b"\x0f\x00\xd0",),  # MOV AX; LLDT
)


@dataclass(frozen=True, slots=True)
class State:
    """Where a run starts: what software in the ring sees, and `setup`, executed in ring 0 before it.

    `registers` are the eight general registers in encoding order; `data` is the selector in DS, ES, FS
    and GS (one that every ring may use); `memory` is (address, bytes) pairs laid over the initial memory.
    """

    registers: tuple[int, ...] = (0, 0, 0, 0, STACK, 0, DATA, DATA + 0x800)
    flags: int = EFlags.ONE
    data: int = DATA_SELECTOR[3]
    memory: tuple[tuple[int, bytes], ...] = ()
    setup: bytes = b""


class End(StrEnum):
    """How a run ended."""

    DONE = "done"
    FAULT = "fault"
    SOFTWARE_INTERRUPT = "software interrupt"  # INT n, INT3, INTO: EIP is past the instruction
    HALT = "halt"
    MEMORY = "no memory there"
    LIMIT = "limit"


_SEGMENT_NAMES = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR", "GDTR", "IDTR")
_MSRS = slice(at.SYSENTER_CS, at.ERROR_CODE)


@dataclass(frozen=True)
class Outcome:
    """What a run did. `before` and `after` are the CPU's state (see `layout`): read the properties."""

    ring: int
    end: End
    vector: int | None
    error_code: int
    before: bytes = field(repr=False)
    after: bytes = field(repr=False)
    flags: int
    flags_before: int
    ports: tuple[tuple[str, int, int, int], ...]  # ("in" or "out", port, size, value)
    memory: tuple[tuple[int, bytes, bytes], ...]  # (address, before, after) of changed double words

    @property
    def trapped(self) -> bool:
        """The instruction gave control away instead of doing its work."""
        return self.end in (End.FAULT, End.MEMORY)

    @cached_property
    def registers(self) -> tuple[int, ...]:
        """The eight general registers, in encoding order."""
        return _registers(self.after)

    @cached_property
    def registers_before(self) -> tuple[int, ...]:
        return _registers(self.before)

    @property
    def eip(self) -> int:
        return _word(self.after, at.EIP)

    @property
    def cpl(self) -> int:
        return _word(self.after, at.HFLAGS) & at.HF_CPL

    @cached_property
    def resources(self) -> dict[str, tuple[int, ...]]:
        """What a monitor must own, after the run: by name, each a tuple of numbers."""
        return _resources(self.after, self.flags)

    @cached_property
    def resources_before(self) -> dict[str, tuple[int, ...]]:
        return _resources(self.before, self.flags_before)

    @cached_property
    def changed(self) -> frozenset[str]:
        """The names of the resources that the run changed."""
        before = self.resources_before
        names = {name for name, value in self.resources.items() if value != before[name]}
        if self.ports:
            names.add("ports")
        if self.end is End.HALT:
            names.add("halted")
        if self.end is End.SOFTWARE_INTERRUPT:
            names.add("control, through the IDT")
        return frozenset(names)


def _registers(context: bytes) -> tuple[int, ...]:
    return struct.unpack_from("<" + "I4x" * 8, context, at.REGS)


def _word(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")


def _resources(context: bytes, flags: int) -> dict[str, tuple[int, ...]]:
    resources: dict[str, tuple[int, ...]] = {}
    for index, name in enumerate(_SEGMENT_NAMES):
        offset = at.SEGMENTS + index * at.SEGMENT_STRIDE
        selector, base, limit, attributes = struct.unpack_from("<I4xQII", context, offset)
        resources[name] = (base, limit) if name in ("GDTR", "IDTR") else (selector, base, limit, attributes)
    for number in (0, 2, 3, 4):
        resources[f"CR{number}"] = (_word(context, at.CR0 + 8 * number),)
    for number in (0, 1, 2, 3, 6, 7):
        resources[f"DR{number}"] = (_word(context, at.DR0 + 8 * number),)
    resources["MSRs"] = (_word(context, at.EFER), int.from_bytes(context[_MSRS], "little"))
    resources["CPL"] = (_word(context, at.HFLAGS) & at.HF_CPL,)
    user = resources["CPL"] == (3,)
    resources["AC"] = (0 if user else flags & EFlags.AC,)  # under SMAP, the kernel's access to user pages
    resources["IF"] = (flags & EFlags.IF,)
    resources["IOPL"] = (flags & EFlags.IOPL,)
    return resources


class Probe:
    """One CPU for many runs; each run is independent of the ones before. Not for guests."""

    def __init__(self, model: int = MODEL) -> None:
        self._model = model
        self._ram = zeroed(MEMORY)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._ram))
        self._low = self._high = self._limit = self._fetches = 0
        self._end: End | None = None
        self._vector: int | None = None
        self._ports: list[tuple[str, int, int, int]] = []
        self._start = lru_cache(maxsize=1024)(self._prepare)
        self._power_on()

    def _power_on(self) -> None:
        uc = Uc(UC_ARCH_X86, UC_MODE_32)
        uc.ctl_set_cpu_model(self._model)
        uc.mem_map_ptr(0, MEMORY, UC_PROT_ALL, self._address)
        uc.ctl_exits_enabled(True)
        uc.ctl_set_exits([])
        uc.hook_add(UC_HOOK_CODE, self._on_code)
        uc.hook_add(UC_HOOK_INTR, self._on_interrupt)
        uc.hook_add(UC_HOOK_INSN, self._on_in, aux1=x86.UC_X86_INS_IN)
        uc.hook_add(UC_HOOK_INSN, self._on_out, aux1=x86.UC_X86_INS_OUT)
        self._uc = uc
        self._saved = uc.context_save()
        size = uclib.uc_context_size(uc._uch)
        buffer = (ctypes.c_uint8 * size).from_address(self._saved.context.value)
        self._context = memoryview(buffer).cast("B")
        self._reset = bytes(self._context)
        self._start.cache_clear()

    # Hooks: they record and stop; they never raise.

    def _on_code(self, uc: Uc, address: int, size: int, _: object) -> None:
        self._fetches += 1
        if not self._low <= address < self._high:
            self._end = End.DONE
            uc.emu_stop()
        elif self._fetches > self._limit:
            self._end = End.LIMIT
            uc.emu_stop()

    def _on_interrupt(self, uc: Uc, vector: int, _: object) -> None:
        if self._vector is None:
            self._vector = vector
        uc.emu_stop()

    def _on_in(self, uc: Uc, port: int, size: int, _: object) -> int:
        self._ports.append(("in", port, size, 0))
        return 0

    def _on_out(self, uc: Uc, port: int, size: int, value: int, _: object) -> None:
        self._ports.append(("out", port, size, value))

    # Running

    def _execute(self, start: int, low: int, high: int, limit: int) -> None:
        """Run from `start` until EIP leaves [low, high), something happens, or `limit` fetches are done."""
        self._low, self._high, self._limit = low, high, limit
        self._fetches = 0
        self._end = None
        self._vector = None
        self._ports = []
        self._uc.ctl_remove_cache(0, MEMORY)
        for _ in range(limit):
            try:
                self._uc.emu_start(start, 0)
            except UcError as error:
                if error.errno == const.UC_ERR_INSN_INVALID:
                    self._vector = Vector.UD
                else:
                    self._end = End.MEMORY
            if self._end or self._vector is not None:
                return
            # PAUSE leaves the engine as HLT does, to let another processor run; there is none: go on.
            start = self._uc.reg_read(x86.UC_X86_REG_EIP)
            if bytes(self._ram[start - 1 : start]) != b"\x90":
                self._end = End.HALT
                return

    def _prepare(self, ring: int, flags: int, data: int, setup: bytes) -> bytes:
        """The CPU's state at the start of a run, reached by executing `setup` and an IRET."""
        uc = self._uc
        self._context[:] = self._reset
        uclib.uc_context_restore(uc._uch, self._saved.context)
        self._ram[:] = _MEMORY
        uc.reg_write(x86.UC_X86_REG_GDTR, (0, GDT, 8 * len(_GDT_ENTRIES) - 1, 0))
        uc.reg_write(x86.UC_X86_REG_CS, CODE_SELECTOR[0])
        for register in (x86.UC_X86_REG_SS, x86.UC_X86_REG_DS, x86.UC_X86_REG_ES):
            uc.reg_write(register, DATA_SELECTOR[0])
        frame = struct.pack("<5I", CODE, CODE_SELECTOR[ring], flags, STACK, DATA_SELECTOR[ring])
        self._ram[FRAME : FRAME + len(frame)] = frame
        code = b"".join(_USUAL_SETUP) + setup + b"\xbc" + struct.pack("<I", FRAME) + b"\xcf"
        self._ram[TRAMPOLINE : TRAMPOLINE + len(code)] = code
        self._ram[CODE : CODE + len(_STOP)] = _STOP
        self._execute(TRAMPOLINE, TRAMPOLINE, TRAMPOLINE + len(code), 100)
        if self._end is not End.DONE:
            raise AssertionError(f"setup {setup.hex()} failed: {self._end}, vector {self._vector}")
        for register in (x86.UC_X86_REG_DS, x86.UC_X86_REG_ES, x86.UC_X86_REG_FS, x86.UC_X86_REG_GS):
            uc.reg_write(register, data)
        uclib.uc_context_save(uc._uch, self._saved.context)
        return bytes(self._context)

    def run(self, code: bytes, ring: int, state: State | None = None, limit: int = 1000) -> Outcome:
        """Execute `code` at `CODE` in `ring` until control leaves it, it traps, or `limit` fetches are done.

        A REP counts one fetch an iteration. `code` runs to its end, so give one instruction to see one.
        Raises ValueError for code that matches `ABORTS`.
        """
        if ABORTS.search(code):
            raise ValueError(f"{code.hex()} would abort the process")
        state = state or State()
        system = state.flags & ~ARITHMETIC
        start = bytearray(self._start(ring, system, state.data, state.setup))
        for number, value in enumerate(state.registers):
            struct.pack_into("<I", start, at.HEADER + at.REGS + 8 * number, value & 0xFFFFFFFF)
        struct.pack_into("<I", start, at.HEADER + at.EIP, CODE)
        # Between runs the engine keeps all of EFLAGS in one place; only within a run are they lazy.
        struct.pack_into("<I", start, at.HEADER + at.EFLAGS, state.flags | EFlags.ONE)
        uc = self._uc
        self._context[:] = start
        uclib.uc_context_restore(uc._uch, self._saved.context)
        uclib.uc_ctl(uc._uch, const.UC_CTL_TLB_FLUSH | const.UC_CTL_IO_WRITE << 30)
        memory = bytearray(_MEMORY)
        for address, data in (*state.memory, (CODE, code + _STOP)):
            memory[address : address + len(data)] = data
        self._ram[:] = bytes(memory)
        self._execute(CODE, CODE, CODE + len(code), limit)
        return self._outcome(ring, bytes(start), state.flags | EFlags.ONE, bytes(memory))

    def _outcome(self, ring: int, start: bytes, flags: int, memory: bytes) -> Outcome:
        uc = self._uc
        uclib.uc_context_save(uc._uch, self._saved.context)
        after = bytes(self._context)
        vector, end = self._vector, self._end or End.FAULT
        if vector is not None:
            software = vector != Vector.UD and _word(after, at.HEADER + at.EXCEPTION_IS_INT)
            end = End.SOFTWARE_INTERRUPT if software else End.FAULT
        outcome = Outcome(
            ring=ring,
            end=end,
            vector=vector,
            error_code=_word(after, at.HEADER + at.ERROR_CODE) if vector is not None else 0,
            before=start[at.HEADER :],
            after=after[at.HEADER :],
            flags=uc.reg_read(x86.UC_X86_REG_EFLAGS),
            flags_before=flags,
            ports=tuple(self._ports),
            memory=_differences(memory, bytes(self._ram)),
        )
        if "DR7" in outcome.changed:
            self._power_on()  # breakpoints stay behind in the engine
        return outcome


def _differences(before: bytes, after: bytes) -> tuple[tuple[int, bytes, bytes], ...]:
    """The runs of double words that differ: (address, before, after)."""
    runs: list[tuple[int, int]] = []
    for page in range(0, len(before), 256):
        if before[page : page + 256] == after[page : page + 256]:
            continue
        for address in range(page, page + 256, 4):
            if before[address : address + 4] != after[address : address + 4]:
                if runs and runs[-1][1] == address:
                    runs[-1] = (runs[-1][0], address + 4)
                else:
                    runs.append((address, address + 4))
    return tuple((low, before[low:high], after[low:high]) for low, high in runs)
