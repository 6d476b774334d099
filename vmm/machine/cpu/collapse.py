"""When the engine's translator gives up, only the guest may notice.

Unicorn's code generator checks itself with `abort()`, and a guest can make such a check fail: LOCK before the
register form of BT, which hardware answers with #UD, ends the process while it is being translated, before
any hook is called. No scan of the code can rule that out, because a guest writes code as it goes.

So the library's own call of `abort` is led to a few bytes of machine code here, which ask the library, through
its public interface, to look up an address whose translation the engine's TLB hook then refuses; and refusing
an access is what the library knows how to leave any translation by. `Engine.run` returns, and says why.

This is for x86-64 Linux, where the address of `abort` that the library calls lies in a table. Elsewhere
`install` does nothing, and such a guest still ends the process. The sources are the ELF gABI (dynamic section)
and the System V x86-64 psABI (R_X86_64_JUMP_SLOT).
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import threading
from pathlib import Path

from unicorn import unicorn_const as U
from unicorn.unicorn_py3.unicorn import uclib

from vmm.machine.cpu.pages import zeroed
from vmm.machine.cpu.stub import Assembler, CodePage

SLOTS = 64  # engines that may run at once, each in its own thread
_SLOT = struct.Struct("<QQQ")  # thread, engine, address of its `collapsed` word
_FLUSH_TLB = U.UC_CTL_TLB_FLUSH | 1 << 30
_REQUEST_BLOCK = U.UC_CTL_TB_REQUEST_CACHE | 2 << 26 | 3 << 30
TLB_MODE = U.UC_CTL_TLB_TYPE | 1 << 26 | 1 << 30
PROBE = 0xFFFFD000  # the linear address that is looked up; its translation is refused while collapsing

_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_JMPREL = 2, 5, 6, 23
_PT_DYNAMIC = 2
_JUMP_SLOT = 7


class _Guard:
    """The machine code and its table, made once a process."""

    def __init__(self) -> None:
        self._table = zeroed(SLOTS * _SLOT.size + 64)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._table))
        self.quads = memoryview(self._table).cast("Q")
        self.page = CodePage()
        self._lock = threading.Lock()
        self._slots: dict[int, int] = {}

    def slot_of_this_thread(self) -> int | None:
        """Index into `quads` of this thread's slot; None when all are taken by others."""
        thread = threading.get_ident()  # on Linux the value at fs:[0x10]
        slot = self._slots.get(thread)
        if slot is None:
            with self._lock:
                if len(self._slots) == SLOTS:
                    return None
                slot = self._slots[thread] = 3 * len(self._slots)
                self.quads[slot] = thread
        return slot


_guards: list[_Guard | None] = []  # none yet, or the one; None where there is no way


def install() -> None:
    """Lead the library's `abort` here, once a process, where that is possible."""
    if not _guards:
        _guards.append(_installed())


def _installed() -> _Guard | None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None
    place = _abort_slot()
    if place is None:
        return None
    guard = _Guard()
    abort = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value or 0
    control = ctypes.cast(uclib.uc_ctl, ctypes.c_void_p).value or 0
    entry = guard.page.add(_code(guard.address, abort, control))
    page = place & ~(mmap.PAGESIZE - 1)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    if protect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE):
        return None
    ctypes.c_uint64.from_address(place).value = entry
    return guard


def _code(table: int, abort: int, control: int) -> bytes:
    """Find this thread's engine in the table and make it leave; without one, abort as ever."""
    quad = struct.Struct("<Q").pack
    end = table + SLOTS * _SLOT.size
    a = Assembler()
    a.emit("53")  # push rbx                      which also aligns the stack
    a.emit("64488b042510000000")  # mov rax, fs:[0x10]      the thread
    a.emit("48bb", quad(table))  # mov rbx, table
    a.emit("48b9", quad(end))  # mov rcx, end            also room for an answer
    a.label("next")
    a.emit("483903")  # cmp [rbx], rax
    a.branch(0x74, "found")
    a.emit("4883c318")  # add rbx, 24
    a.emit("4839cb")  # cmp rbx, rcx
    a.branch(0x72, "next")
    a.label("abort")
    a.emit("5b 48b8", quad(abort), b"\xff\xe0")  # pop rbx; mov rax, abort; jmp rax
    a.label("found")
    a.emit("488b7b08 4885ff")  # mov rdi, [rbx+8]; test rdi, rdi
    a.branch(0x74, "abort")
    a.emit("488b4310 c70001000000")  # mov rax, [rbx+16]; mov dword [rax], 1
    a.emit("be", struct.pack("<I", TLB_MODE), b"\xba", struct.pack("<I", U.UC_TLB_VIRTUAL))  # mov esi, mode; mov edx
    a.emit("31c0 49bb", quad(control), b"\x41\xff\xd3")  # so that the hook is asked, whoever was before
    a.emit("488b7b08 be", struct.pack("<I", _FLUSH_TLB))  # mov rdi, [rbx+8]; mov esi, flush
    a.emit("31c0 49bb", quad(control), b"\x41\xff\xd3")  # xor eax, eax; mov r11, uc_ctl; call r11
    a.emit("488b7b08 be", struct.pack("<I", _REQUEST_BLOCK))  # mov rdi, [rbx+8]; mov esi, request
    a.emit("ba", struct.pack("<I", PROBE))  # mov edx, PROBE
    a.emit("48b9", quad(end))  # mov rcx, room for the answer
    a.emit("31c0 49bb", quad(control), b"\x41\xff\xd3")  # which does not return
    a.branch(0xEB, "abort")
    return a.finish()


def _abort_slot() -> int | None:
    """The address of the library's pointer to `abort`."""
    path = Path(uclib._name).name
    base = None
    for line in Path("/proc/self/maps").read_text().splitlines():
        if path in line:
            base = int(line.split("-")[0], 16)
            break
    if base is None:
        return None
    header = ctypes.string_at(base, 64)
    if header[:5] != b"\x7fELF\x02":
        return None
    (offset,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    values: dict[int, int] = {}
    for i in range(count):
        kind, _flags, _file, address, _physical, _filesize, length = struct.unpack(
            "<IIQQQQQ", ctypes.string_at(base + offset + i * size, 48)
        )
        if kind == _PT_DYNAMIC:
            raw = ctypes.string_at(base + address, length)
            values = dict(struct.iter_unpack("<QQ", raw[: length // 16 * 16]))
    if not all(tag in values for tag in (_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_JMPREL)):
        return None
    strings, symbols, relocations = (values[tag] for tag in (_DT_STRTAB, _DT_SYMTAB, _DT_JMPREL))
    if symbols > strings:
        return None
    names = ctypes.string_at(strings, 1 << 16)
    name = names.find(b"\0abort\0") + 1
    if not name:
        return None
    table = ctypes.string_at(symbols, strings - symbols)
    pattern, at = struct.pack("<I", name), -1
    while (at := table.find(pattern, at + 1)) >= 0 and at % 24:
        pass
    if at < 0:
        return None
    slots = ctypes.string_at(relocations, values[_DT_PLTRELSZ])
    where = slots.find(struct.pack("<Q", at // 24 << 32 | _JUMP_SLOT))
    if where < 8 or where % 24 != 8:
        return None
    (place,) = struct.unpack_from("<Q", slots, where - 8)
    return base + int(place)


class Watch:
    """Says, for one engine, whether its current run has collapsed. Used around `uc_emu_start`."""

    def __init__(self, engine: int) -> None:
        install()
        self._guard = _guards[0]
        self._engine = engine
        self._word = ctypes.c_uint32(0)
        self.address = ctypes.addressof(self._word)  # not zero there while collapsing

    @property
    def collapsing(self) -> bool:
        return self._word.value != 0

    def enter(self) -> None:
        """Before the engine runs, in the thread that runs it."""
        guard = self._guard
        if guard is not None:
            slot = guard.slot_of_this_thread()
            if slot is not None:
                guard.quads[slot + 1], guard.quads[slot + 2] = self._engine, self.address

    def leave(self) -> bool:
        """After it; whether it collapsed."""
        guard = self._guard
        if guard is None:
            return False
        slot = guard.slot_of_this_thread()
        if slot is not None:
            guard.quads[slot + 1] = 0
        if not self._word.value:
            return False
        self._word.value = 0
        return True
