"""The few bytes of machine code that run at every basic block: they count instructions and stop the CPU.

Nothing may stop this engine from outside: a stop that lands inside an instruction repeats its memory
access (measured; the guest is silently corrupted). So the CPU is stopped at block boundaries, by a hook
that runs before each block. In Python that hook would cost a microsecond a block; here it is thirty
instructions of x86-64 and costs about a nanosecond.

How it knows the number of instructions of a block, which the hook is not told: the engine's translation of the
block passes the block's size as a constant, of which sixteen bits are never used. On the first visit a Python
callback works the number out and writes it into that constant, in the translation itself (`Meter.patch`).

The *meter* is the memory that the code and Python share:

    0   i64  budget        instructions that may still be started; a block that does not fit stops the CPU
    8   u32  poll          stop where EFLAGS has one of these bits: IF for "an interrupt is pending",
                           bit 1 (always one) for "stop now"; not in an interrupt shadow, unless bit 31
                           (HALTED) is there, too: somebody has asked the engine to stop. RF is always
                           among them: it is not a reason to stop, but over with the next instruction, and
                           the engine would leave it set for the rest of the block, for PUSHF to see
    12  u32  stopped       set by the code when it stops the CPU
    16  u64  address       of the block charged last
    24  u32  packed        its size, and KNOWN | its instructions << 16; 0 when it is over
    32  u64  registers     address of the CPU's register file (written by `capture`)
    40  u64  foreign       linear address of code that stands for the guest's: a translation cache
    48  u64  length        its size in bytes, 0 if there is none
    56  u64  marks         host address of a byte for each of its bytes: BEGINS where an instruction of the guest's
                           begins, LOOK where Python must look at the block
    64  u32  epoch         changes when the budget is granted anew, with each translation, and whenever else an answer
                           to RDTSC that was remembered holds no longer (see `counter`)

In such code the number of CPU instructions says nothing, and new blocks are many: so the machine code counts marks
and writes the number into the translation itself. Python is asked only where the translation is not what it expects.

The engine asks whether to stop after the hook, and again after each access to memory, for the sake of hooks that
this machine does not have: a call and two loads each time, a fifth of the time of a guest that loads and stores.
Whoever stops the engine says so in the meter, too, so the hook can ask instead, and those calls are taken out of a
translation on its first visit (`skip_checks`). Where the hook stops the CPU, it makes the call itself.

On a host that is not x86-64 there is no such code and the Python callback runs for every block.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import struct

from vmm.isa.words import EFlags
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.pages import READ_WRITE, zeroed

BUDGET, POLL, STOPPED, ADDRESS, PACKED, REGISTERS = 0, 8, 12, 16, 24, 32
FOREIGN, LENGTH, MARKS, EPOCH = 40, 48, 56, 64
METER_SIZE = 72
BEGINS, LOOK = 1, 2
STOP_NOW = 1 << 1
HALTED = 1 << 31
RESUMED = int(EFlags.RF)
KNOWN = (
    1 << 15
)  # with the count, in the constant of a translation: it has been here before; the count may be 0
CHECK = re.compile(rb"\x48\xbf.{8}\x33\xf6(?:\xff\x15(.{4})|\xe8(.{4}))", re.DOTALL)  # see `Meter.skip_checks`
LONGEST = 1 << 16  # bytes of a translation that are looked through
BLOCK_REACH = 512  # bytes before the hook's return within which the engine describes the block
PATCH_REACH = 32  # bytes before the call within which the translation loads the hook's arguments


def supported() -> bool:
    """Whether this host runs the machine code below (x86-64 with the System V calling convention)."""
    return platform.machine() in ("x86_64", "AMD64") and platform.system() != "Windows"


class Assembler:
    """Just enough to place branches."""

    def __init__(self) -> None:
        self.code = bytearray()
        self.fixups: list[tuple[int, str]] = []
        self._far: list[tuple[int, str]] = []
        self.labels: dict[str, int] = {}

    def emit(self, *parts: str | bytes) -> None:
        for part in parts:
            self.code += bytes.fromhex(part) if isinstance(part, str) else part

    def branch(self, opcode: int, label: str) -> None:
        self.code += bytes((opcode, 0))
        self.fixups.append((len(self.code) - 1, label))

    def far(self, opcode: int, label: str) -> None:
        """A conditional branch (the short form's opcode) with a distance of 32 bits."""
        self.code += bytes((0x0F, opcode + 0x10, 0, 0, 0, 0))
        self._far.append((len(self.code), label))

    def jump(self, label: str) -> None:
        """A jump with a distance of 32 bits."""
        self.code += bytes((0xE9, 0, 0, 0, 0))
        self._far.append((len(self.code), label))

    def label(self, name: str) -> None:
        self.labels[name] = len(self.code)

    def finish(self) -> bytes:
        for at_byte, name in self.fixups:
            distance = self.labels[name] - (at_byte + 1)
            assert -128 <= distance < 128, name
            self.code[at_byte] = distance & 0xFF
        for end, name in self._far:
            self.code[end - 4 : end] = _displacement(self.labels[name] - end)
        return bytes(self.code)


def _displacement(value: int) -> bytes:
    return struct.pack("<i", value)


def _quad(value: int) -> bytes:
    return struct.pack("<Q", value)


def block_code(stop: int, miss: int, check: int) -> bytes:
    """The block hook. `stop` and `miss` are the addresses of `uc_emu_stop` and of the Python callback.

    `check` is that of the engine's own question whether to stop, or 0, and then nothing is taken out.

    Arguments in rdi, rsi, edx, rcx: engine, guest address, size, meter; rbp holds the CPU's registers,
    as in all code that the engine generates. The callback gets the return address as a fifth argument.
    """
    a = Assembler()
    a.emit("89d0")  # mov eax, edx
    a.emit("c1e810")  # shr eax, 16               KNOWN | instructions, if it has been here before
    a.branch(0x74, "miss")
    a.emit("25ff7f0000")  # and eax, 0x7fff
    a.emit("448b4108")  # mov r8d, [rcx+POLL]
    a.emit("448585", _displacement(at.EFLAGS))  # test [rbp+EFLAGS], r8d
    a.branch(0x75, "poll")
    a.emit("482901")  # sub [rcx], rax
    a.branch(0x78, "exhausted")
    a.emit("48897110")  # mov [rcx+ADDRESS], rsi
    a.emit("895118")  # mov [rcx+PACKED], edx
    a.emit("c3")
    a.label("poll")
    a.emit("4585c0")  # test r8d, r8d
    a.branch(0x78, "stop")
    a.emit("f685", _displacement(at.HFLAGS), bytes([at.HF_INHIBIT_IRQ]))  # test byte [rbp+HFLAGS], shadow
    a.branch(0x75, "charge")
    a.emit("4181e0", struct.pack("<I", 0xFFFFFFFF & ~RESUMED))  # and r8d, ~RF
    a.emit("448585", _displacement(at.EFLAGS))  # test [rbp+EFLAGS], r8d
    a.branch(0x75, "stop")
    a.label("charge")
    a.emit("482901")  # sub [rcx], rax
    a.branch(0x78, "exhausted")
    a.emit("48897110")  # mov [rcx+ADDRESS], rsi
    a.emit("895118")  # mov [rcx+PACKED], edx
    a.emit(
        "81a5", _displacement(at.EFLAGS), struct.pack("<I", 0xFFFFFFFF & ~RESUMED)
    )  # and dword [rbp+EFLAGS], ~RF
    a.emit("c3")
    a.label("exhausted")
    a.emit("480101")  # add [rcx], rax
    a.label("stop")
    a.emit("c7410c01000000")  # mov dword [rcx+STOPPED], 1
    a.emit("57 48b8", _quad(stop), "ffd0 5f")  # push rdi; mov rax, stop; call rax; pop rdi
    a.label("check")
    if check:
        a.emit("31f6 48b8", _quad(check), "ffe0")  # xor esi, esi; mov rax, check; jmp rax
    else:
        a.emit("c3")
    a.label("miss")
    _count_marks(a)
    a.label("python")
    a.emit("4c8b0424")  # mov r8, [rsp]             the call to be patched ends there
    a.emit("57 48b8", _quad(miss), "ffd0 5f")  # push rdi; mov rax, miss; call rax; pop rdi
    a.branch(0xEB, "check")
    _patch_count(a)
    _skip_check(a, check)
    a.emit("482901")  # sub [rcx], rax
    a.far(0x78, "exhausted")
    a.emit("48897110 895118")  # mov [rcx+ADDRESS], rsi; mov [rcx+PACKED], edx
    a.jump("check")
    return a.finish()


def _count_marks(a: Assembler) -> None:
    """The first visit of a block of foreign code: its count to r9d, or on to `python`."""
    a.emit("4889f0 482b41", bytes([FOREIGN]))  # mov rax, rsi; sub rax, [rcx+FOREIGN]
    a.emit("483b41", bytes([LENGTH]))  # cmp rax, [rcx+LENGTH]
    a.branch(0x73, "python")
    a.emit("85d2")  # test edx, edx
    a.branch(0x74, "python")
    a.emit("f685", _displacement(at.HFLAGS), bytes([at.HF_INHIBIT_IRQ]))  # test byte [rbp+HFLAGS], shadow
    a.branch(0x75, "python")
    a.emit("448b4108 448585", _displacement(at.EFLAGS))  # mov r8d, [rcx+POLL]; test [rbp+EFLAGS], r8d
    a.branch(0x75, "python")
    a.emit("480341", bytes([MARKS]))  # add rax, [rcx+MARKS]
    a.emit("4531c9 4189d0")  # xor r9d, r9d; mov r8d, edx
    a.label("next")
    a.emit("440fb610 4183e201 4501d1")  # movzx r10d, byte [rax]; and r10d, BEGINS; add r9d, r10d
    a.emit("48ffc0 41ffc8")  # inc rax; dec r8d
    a.branch(0x75, "next")
    a.emit("4c8b1424 4983ea20")  # mov r10, [rsp]; sub r10, PATCH_REACH
    a.branch(0xEB, "scan")


def _patch_count(a: Assembler) -> None:
    """What `Meter.patch` does, for the two forms of load that there are where the meter lies; size in edx."""
    a.label("scan")
    a.emit("41803aba")  # cmp byte [r10], 0xba          mov edx, imm32
    a.branch(0x75, "skip")
    a.emit("41395201")  # cmp [r10+1], edx
    a.branch(0x75, "skip")
    a.emit("6641817a0548b9")  # cmp word [r10+5], 0xb948      movabs rcx
    a.branch(0x75, "relative")
    a.emit("49394a07")  # cmp [r10+7], rcx
    a.branch(0x74, "found")
    a.label("relative")
    a.emit("418b4205 25ffffff00 3d488d0d00")  # eax = [r10+5] & 0xffffff; cmp eax, 0x0d8d48      lea rcx, [rip+...]
    a.branch(0x75, "skip")
    a.emit("49634208 498d44020c 4839c8")  # movsxd rax, [r10+8]; lea rax, [r10+rax+12]; cmp rax, rcx
    a.branch(0x74, "found")
    a.label("skip")
    a.emit("49ffc2 4c3b1424")  # inc r10; cmp r10, [rsp]
    a.branch(0x72, "scan")
    a.branch(0xEB, "python")
    a.label("found")
    a.emit("4489c8")  # mov eax, r9d
    a.emit("4181c9", struct.pack("<I", KNOWN), "41c1e110 4409ca")  # r9d = (r9d | KNOWN) << 16; or edx, r9d
    a.emit("41895201")  # mov [r10+1], edx


def _skip_check(a: Assembler, check: int) -> None:
    """What `Meter.skip_checks` does: r8 runs over the translation, which ends at r9."""
    if not check:
        return
    a.emit("4c8b0424")  # mov r8, [rsp]
    a.emit("4d89c1 4983e1f8 41bb", struct.pack("<I", BLOCK_REACH // 8))  # mov r9, r8; and r9, -8; mov r11d, ...
    a.label("back")
    a.emit("41ffcb")  # dec r11d
    a.far(0x74, "all")
    a.emit("4983e908 493971e0")  # sub r9, 8; cmp [r9-32], rsi           the block's address
    a.branch(0x75, "back")
    a.emit("4d8b11 4d39ca")  # mov r10, [r9]; cmp r10, r9              where its code begins
    a.branch(0x76, "back")
    a.emit("4d39c2")  # cmp r10, r8
    a.branch(0x77, "back")
    a.emit("4d8b4908 4d01d1")  # mov r9, [r9+8]; add r9, r10            and its size
    a.emit("4d89ca 4d29c2 4981fa", struct.pack("<I", LONGEST))  # mov r10, r9; sub r10, r8; cmp r10, LONGEST
    a.far(0x73, "all")
    a.emit("49bb", _quad(check))  # mov r11, check
    a.branch(0xEB, "first")
    a.label("another")
    a.emit("66418178fa ff15")  # cmp word [r8-6], 0x15ff           behind another hook
    a.branch(0x74, "none")
    a.emit("418078fbe8")  # cmp byte [r8-5], 0xe8
    a.branch(0x74, "none")
    a.label("first")
    a.emit("66418138 48bf")  # cmp word [r8], 0xbf48             movabs rdi
    a.branch(0x75, "none")
    a.emit("49397802")  # cmp [r8+2], rdi
    a.branch(0x75, "none")
    a.emit("664181780a 33f6")  # cmp word [r8+10], 0xf633           xor esi, esi
    a.branch(0x75, "none")
    a.emit("4180780ce8")  # cmp byte [r8+12], 0xe8             call
    a.branch(0x75, "cell")
    a.emit("4d63500d 4f8d541011 4d39da")  # movsxd r10, [r8+13]; lea r10, [r8+r10+17]; cmp r10, r11
    a.branch(0x75, "none")
    a.emit("6641c700 eb0f")  # mov word [r8], jump over it
    a.branch(0xEB, "none")
    a.label("cell")
    a.emit("664181780c ff15")  # cmp word [r8+12], 0x15ff           call [rip+...]
    a.branch(0x75, "none")
    a.emit("4d63500e 4f395c1012")  # movsxd r10, [r8+14]; cmp [r8+r10+18], r11
    a.branch(0x75, "none")
    a.emit("6641c700 eb10")  # mov word [r8], jump over it
    a.label("none")
    a.emit("49ffc0 4d8d5012 4d39ca")  # inc r8; lea r10, [r8+18]; cmp r10, r9
    a.branch(0x76, "another")
    a.label("all")


def translated_code(miss: int) -> bytes:
    """The hook on each new translation: what is foreign and has no mark LOOK is done; `miss` is the Python callback.

    Arguments in rdi, rsi, rdx, rcx: engine, the block (u64 address, u16 instructions, u16 size), another, meter.
    """
    a = Assembler()
    a.emit("ff41", bytes([EPOCH]))  # inc dword [rcx+EPOCH]
    a.emit("488b06 482b41", bytes([FOREIGN]))  # mov rax, [rsi]; sub rax, [rcx+FOREIGN]
    a.emit("483b41", bytes([LENGTH]))  # cmp rax, [rcx+LENGTH]
    a.branch(0x73, "miss")
    a.emit("440fb7460a 4585c0")  # movzx r8d, word [rsi+10]; test r8d, r8d
    a.branch(0x74, "miss")
    a.emit("480341", bytes([MARKS]))  # add rax, [rcx+MARKS]
    a.label("next")
    a.emit("f600", bytes([LOOK]))  # test byte [rax], LOOK
    a.branch(0x75, "miss")
    a.emit("48ffc0 41ffc8")  # inc rax; dec r8d
    a.branch(0x75, "next")
    a.emit("c3")
    a.label("miss")
    a.emit("48b8", _quad(miss), b"\xff\xe0")  # mov rax, miss; jmp rax
    return a.finish()


# mov [rcx+REGISTERS], rbp; ret
CAPTURE_CODE = bytes.fromhex("488969") + bytes([REGISTERS]) + b"\xc3"


def _loads_rcx(code: bytes, address: int) -> int | None:
    """The constant that the instruction at the start of `code`, which lies at `address`, puts into RCX."""
    if code[:2] == b"\x48\xb9" and len(code) >= 10:  # movabs
        return int.from_bytes(code[2:10], "little")
    if code[:3] == b"\x48\x8d\x0d":  # lea rcx, [rip + distance]
        return address + 7 + int.from_bytes(code[3:7], "little", signed=True)
    if code[:3] == b"\x48\xc7\xc1":  # mov, sign-extended
        return int.from_bytes(code[3:7], "little", signed=True)
    if code[:1] == b"\xb9":  # mov ecx
        return int.from_bytes(code[1:5], "little")
    return None


def _end_of_code(inside: int, address: int) -> int | None:
    """Where the host's code of the block at a guest's `address` ends; `inside` is an address in its beginning."""
    aligned = inside & ~7
    for place in range(aligned - 8, aligned - BLOCK_REACH, -8):
        if ctypes.c_uint64.from_address(place - 32).value != address:
            continue
        start, size = (ctypes.c_uint64 * 2).from_address(place)
        if place < start <= inside:
            return start + size if inside < start + size < inside + LONGEST else None
    return None


class CodePage:
    """Executable host memory, kept alive as long as the engine that calls it."""

    def __init__(self) -> None:
        self._map = zeroed(mmap.PAGESIZE, READ_WRITE | mmap.PROT_EXEC)
        self._used = 0

    def add(self, code: bytes) -> int:
        """Place `code`; return its address."""
        start = self._used
        self._map[start : start + len(code)] = code
        self._used = start + (len(code) + 15 & ~15)
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + start


class Meter:
    """The shared memory, seen from Python."""

    def __init__(self) -> None:
        self._map = zeroed(METER_SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        view = memoryview(self._map)
        self.quads = view.cast("q")
        self.words = view.cast("I")
        self._before_halt = 0
        self.poll = 0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """What was remembered about the counter holds no longer."""
        self.words[EPOCH // 4] = self.words[EPOCH // 4] + 1 & 0xFFFFFFFF

    @property
    def budget(self) -> int:
        return self.quads[BUDGET // 8]

    @budget.setter
    def budget(self, value: int) -> None:
        self.quads[BUDGET // 8] = value

    @property
    def poll(self) -> int:
        """The flags to stop at."""
        return self.words[POLL // 4] & ~RESUMED

    @poll.setter
    def poll(self, value: int) -> None:
        self.words[POLL // 4] = value | RESUMED

    def show_foreign(self, address: int, length: int, marks: int) -> None:
        """Foreign code at a linear address, and the host address of its marks."""
        self.quads[FOREIGN // 8], self.quads[LENGTH // 8], self.quads[MARKS // 8] = address, length, marks

    def take_stopped(self) -> bool:
        """Whether the code stopped the CPU since the last call."""
        stopped = self.words[STOPPED // 4]
        self.words[STOPPED // 4] = 0
        return bool(stopped)

    def last_block(self) -> tuple[int, int, int]:
        """(guest linear address, size in bytes, instructions) of the block charged last; zeroes if none."""
        packed = self.words[PACKED // 4]
        return (self.words[ADDRESS // 4], packed & 0xFFFF, packed >> 16 & KNOWN - 1) if packed else (0, 0, 0)

    def patch(self, return_address: int, size: int, instructions: int) -> bool:
        """Write the number of instructions into the constant that a translation passes; whether it was found.

        The translation loads it right before the address of this meter: mov edx, size; mov rcx, meter, the latter
        in one of the forms that `_loads_rcx` knows. Where that is not what lies before the call, nothing is
        written, and every visit comes to Python: slow, but right.
        """
        start = return_address - PATCH_REACH
        before = ctypes.string_at(start, PATCH_REACH)
        load = b"\xba" + struct.pack("<I", size)
        found = before.find(load)
        while found >= 0:
            after = found + len(load)
            if _loads_rcx(before[after:], start + after) == self.address:
                ctypes.c_uint32.from_address(start + found + 1).value = size | (instructions | KNOWN) << 16
                return True
            found = before.find(load, found + 1)
        return False

    def remember(self, return_address: int, address: int, size: int, instructions: int, check: int) -> None:
        """A translation has been visited: next time all is done by the code."""
        if self.patch(return_address, size, instructions) and check:
            self.skip_checks(return_address, address, check)

    def skip_checks(self, return_address: int, address: int, check: int) -> int:
        """Take the engine's questions whether to stop out of the translation of `address`; how many there were.

        They are movabs rdi, engine; xor esi, esi; call `check`, directly or through a cell: one right behind the
        hook, one behind each access to memory. What is asked behind a call is asked for a hook on an instruction
        (`site_hooks`), which may stop there, and stays. How long the translation is says what the engine keeps
        right before it: the block's address, 24 bytes of something else, where its code begins, and its size.
        """
        end = _end_of_code(return_address, address)
        if end is None:
            return 0
        code, found = ctypes.string_at(return_address, end - return_address), 0
        for match in CHECK.finditer(code):
            at_byte, after = match.start(), return_address + match.end()
            if match[2] is not None:
                called = after + int.from_bytes(match[2], "little", signed=True)
            else:
                cell = after + int.from_bytes(match[1], "little", signed=True)
                called = ctypes.c_uint64.from_address(cell).value if return_address < cell < end else 0
            of_a_hook = code[at_byte - 6 : at_byte - 4] == b"\xff\x15" or code[at_byte - 5 : at_byte - 4] == b"\xe8"
            if called == check and (not at_byte or not of_a_hook):
                ctypes.memmove(return_address + at_byte, bytes((0xEB, match.end() - at_byte - 2)), 2)
                found += 1
        return found

    def halt(self) -> None:
        """The engine has been asked to stop: no further block is begun until `resume`."""
        poll = self.words[POLL // 4]
        if not poll & HALTED:
            self._before_halt = poll
            self.words[POLL // 4] = poll | HALTED | STOP_NOW

    def resume(self) -> None:
        if self.words[POLL // 4] & HALTED:
            self.words[POLL // 4] = self._before_halt

    def charge(self, address: int, size: int, instructions: int) -> bool:
        """What the code does, done by Python: charge a block; False (nothing charged) if it does not fit."""
        if self.budget < instructions:
            self.words[STOPPED // 4] = 1
            return False
        self.words[ADDRESS // 4], self.words[PACKED // 4] = address, size | (instructions | KNOWN) << 16
        self.budget -= instructions
        return True

    def forget_last(self) -> None:
        """The block charged last is over: what follows is at a boundary."""
        self.words[PACKED // 4] = 0
