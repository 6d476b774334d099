"""Bare Unicorn, as a user without this project would use it: what everything is compared with."""

from __future__ import annotations

import ctypes
import struct
import time

from unicorn import UC_ARCH_X86, UC_HOOK_INTR, UC_MODE_32, Uc
from unicorn import x86_const as X
from unicorn.unicorn_py3.unicorn import uclib

from vmm.image.image import Image

CODE, STACK, DATA = 0x100000, 0x200000, 0x300000
MEMORY = 16 << 20


def bare(code: bytes) -> Uc:
    """Memory that is readable, writable and executable, flat segments, `code` at 1 MiB."""
    uc = Uc(UC_ARCH_X86, UC_MODE_32)
    uc.ctl_exits_enabled(True)
    uc.ctl_set_exits([])
    uc.mem_map(0, MEMORY)
    uc.mem_write(CODE, code)
    uc.reg_write(X.UC_X86_REG_ESP, STACK)
    return uc


def run(code: bytes) -> float:
    """Seconds of processor time that bare Unicorn needs for `code`, which ends in HLT."""
    uc = bare(code)
    started = time.process_time()
    uc.emu_start(CODE, 0)
    return time.process_time() - started


def raw_exit(count: int) -> float:
    """Seconds for one exit handled inside the hook, its state read and written through the CPU context.

    The least that a monitor can do, in the documented way: save the context, step over the instruction, clear
    the exception, restore the context.
    """
    uc = bare(b"\xb9" + struct.pack("<I", count) + bytes.fromhex("fa 49 75fc f4"))
    uc.mem_map(0xF0000000, 0x1000)
    flat = [0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF]
    uc.mem_write(0xF0000000, struct.pack("<5Q", *flat))
    uc.reg_write(X.UC_X86_REG_GDTR, (0, 0xF0000000, 39, 0))
    uc.reg_write(X.UC_X86_REG_CR0, 0x11)
    uc.reg_write(X.UC_X86_REG_CS, 0x08)
    uc.reg_write(X.UC_X86_REG_SS, 0x10)
    uc.mem_write(0xF0000800, struct.pack("<5I", CODE, 0x1B, 2, STACK, 0x23))
    uc.mem_write(0xF0000900, b"\xcf")  # IRET into ring 3, where CLI traps
    uc.reg_write(X.UC_X86_REG_ESP, 0xF0000800)
    context = uc.context_save()
    pointer = context.context
    size = uclib.uc_context_size(uc._uch)
    words = memoryview((ctypes.c_uint8 * size).from_address(pointer.value)).cast("B").cast("I")
    eip, old_exception = 168 // 4, 5536 // 4
    first: list[float] = []

    def on_interrupt(_uc: Uc, _vector: int, _data: object) -> None:
        if not first:
            first.append(time.process_time())
        uclib.uc_context_save(uc._uch, pointer)
        words[eip] += 1
        words[old_exception] = 0xFFFFFFFF
        uclib.uc_context_restore(uc._uch, pointer)

    uc.hook_add(UC_HOOK_INTR, on_interrupt)
    uc.ctl_set_exits([CODE + 9])
    uc.emu_start(0xF0000900, 0)
    return (time.process_time() - first[0]) / count


def paged(image: Image, executable: bool = False) -> Uc:
    """The image in bare Unicorn, in ring 0, behind PAE tables with NX: code to execute, the rest to write.

    That is how the monitors lay memory out, because stores into a page that may be executed are slow. `measure` to
    `finish` (symbols) is code; so is everything before `iterations`, on whose page the data begins. Like that it
    is what a monitor could at best reach, and what nobody gets who maps memory in the usual way: that is
    `executable`, the same tables without NX.
    """
    uc = bare(b"")
    for segment in image.segments:
        uc.mem_write(segment.address, segment.data)
    first, last = min(image.entry, image.symbols["measure"]) & ~0xFFF, image.symbols["iterations"]
    entries = [
        page | (_PRESENT if first <= page < last else _PRESENT | _WRITABLE | (0 if executable else _NX))
        for page in range(0, MEMORY, 0x1000)
    ]
    tables = MEMORY - (MEMORY >> 12) * 8
    directory, pointers = tables - 0x1000, tables - 0x2000
    uc.mem_write(tables, struct.pack(f"<{len(entries)}Q", *entries))
    used = range(tables, MEMORY, 0x1000)
    uc.mem_write(directory, struct.pack(f"<{len(used)}Q", *(table | _PRESENT | _WRITABLE for table in used)))
    uc.mem_write(pointers, struct.pack("<Q", directory | _PRESENT))
    uc.reg_write(X.UC_X86_REG_CR4, _CR4_PAE)
    uc.msr_write(_EFER, _EFER_NXE)
    uc.reg_write(X.UC_X86_REG_CR3, pointers)
    uc.reg_write(X.UC_X86_REG_CR0, _CR0_PE_WP_PG)
    uc.reg_write(X.UC_X86_REG_ESP, image.symbols["stack_top"])
    uc.ctl_set_exits([image.symbols["finish"]])
    return uc


def run_loop(image: Image, executable: bool = False) -> float:
    """Seconds of processor time that `paged` needs from `measure` to `finish`."""
    uc = paged(image, executable)
    started = time.process_time()
    uc.emu_start(image.symbols["measure"], 0)
    return time.process_time() - started


_PRESENT, _WRITABLE, _NX = 1, 2, 1 << 63
_CR4_PAE, _CR0_PE_WP_PG = 0x20, 0x80010011
_EFER, _EFER_NXE = 0xC0000080, 0x800
