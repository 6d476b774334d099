"""The page walker: machine code that fills the engine's TLB from tables, as the processor's own would.

The engine asks for every translation that it does not have through a hook. In Python that hook costs some
three microseconds; after each flush of the TLB a guest asks for its whole working set again. Here it is sixty
instructions of x86-64 that walk page tables in PAE format lying in host memory; what they do not find, or find
forbidden, goes on to the Python callback, which decides, and perhaps enters it into the tables.

The format is that of SDM volume 3A, 4.4 (a table of four, tables of 512, 64-bit entries: P, RW, US, NX), with two
of the bits that it leaves to software:

    STORABLE  the frame may be stored to. Where it is set and RW is not, only a supervisor may store, and only
              while CR0.WP is clear: what one bit of a hardware table cannot say
    MIXED     the frame is code and data at once: a fetch may be given the right to store, too

Fetches outside ring 3 have a root of their own, because a translator's guest must not fetch where it may read.
The hard part is when not to answer: while the engine drops code, is sealed, or has collapsed, its look-ups are
not the guest's, so then everything goes to Python.

On a host that is not x86-64, or where the registers are seen through a copy, there is no machine code, and the
Python callback asks `Walker.look`, which is the same walk.
"""

from __future__ import annotations

import ctypes
import struct

from unicorn import unicorn_const as U

from vmm.machine.cpu.pages import zeroed
from vmm.machine.cpu.stub import Assembler

P, RW, US, A, D = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6
STORABLE, MIXED = 1 << 9, 1 << 10
NX = 1 << 63
FRAME = 0x000F_FFFF_FFFF_F000

DROPPING, SEALED, ENTERING = 1, 2, 4  # why the walker is closed

# The memory that the code and Python share.
_ROOT, _FETCH_ROOT, _DELTA, _REGISTERS, _COLLAPSED, _FRAME_MASK, _HITS = range(0, 56, 8)
_CLOSED, _SUPERVISOR_STORES, _FETCH_PERMS = 56, 60, 64
_SIZE = 128

_READ, _WRITE, _EXEC = U.UC_PROT_READ, U.UC_PROT_WRITE, U.UC_PROT_EXEC
_ALL = _READ | _WRITE | _EXEC
_USER = 3


def fill_code(miss: int) -> bytes:
    """The TLB hook. `miss` is the address of the Python callback, which gets the same arguments.

    Arguments in rdi, rsi, edx, rcx, r8: engine, linear page, access, where the answer goes, the shared memory.
    """
    a = Assembler()
    a.emit("41837838 00")  # cmp dword [r8+CLOSED], 0
    a.far(0x75, "miss")
    a.emit("498b4020 833800")  # mov rax, [r8+COLLAPSED]; cmp dword [rax], 0
    a.far(0x75, "miss")
    a.emit("498b4018 448b08 4183e103")  # mov rax, [r8+REGISTERS]; mov r9d, [rax]; and r9d, 3
    a.emit("4d8b10")  # mov r10, [r8+ROOT]
    a.emit("4183f903")  # cmp r9d, 3
    a.branch(0x74, "root")
    a.emit("83fa", bytes((U.UC_MEM_FETCH,)))  # cmp edx, FETCH
    a.branch(0x75, "root")
    a.emit("4d8b5008")  # mov r10, [r8+FETCH_ROOT]
    a.label("root")
    a.emit("4d85d2")  # test r10, r10
    a.far(0x74, "miss")
    a.emit("89f0 c1e81e 4d8b14c2")  # mov eax, esi; shr eax, 30; mov r10, [r10+rax*8]
    a.emit("41f6c201")  # test r10b, P
    a.far(0x74, "miss")
    a.emit("4d235028 4d035010")  # and r10, [r8+FRAME_MASK]; add r10, [r8+DELTA]
    a.emit("89f0 c1e815 25ff010000 4d8b14c2")  # mov eax, esi; shr eax, 21; and eax, 511; mov r10, [r10+rax*8]
    a.emit("41f6c201")  # test r10b, P
    a.far(0x74, "miss")
    a.emit("4d89d3")  # mov r11, r10
    a.emit("4d235028 4d035010")  # and r10, [r8+FRAME_MASK]; add r10, [r8+DELTA]
    a.emit("89f0 c1e80c 25ff010000 4d8b14c2")  # mov eax, esi; shr eax, 12; and eax, 511; mov r10, [r10+rax*8]
    a.emit("41f6c201")  # test r10b, P
    a.far(0x74, "miss")
    a.emit("4521d3")  # and r11d, r10d            rights of both levels
    a.emit("4183f903")  # cmp r9d, 3
    a.branch(0x75, "supervisor")
    a.emit("41f6c304")  # test r11b, US
    a.far(0x74, "miss")
    a.branch(0xEB, "rights")
    a.label("supervisor")
    a.emit("418b403c 4485d0")  # mov eax, [r8+SUPERVISOR_STORES]; test eax, r10d
    a.branch(0x74, "rights")
    a.emit("4183cb02")  # or r11d, RW
    a.label("rights")
    a.emit("83fa", bytes((U.UC_MEM_FETCH,)))  # cmp edx, FETCH
    a.branch(0x74, "fetch")
    a.emit("b8", struct.pack("<I", _READ))  # mov eax, READ
    a.emit("41f6c302")  # test r11b, RW
    a.branch(0x75, "store")
    a.emit("83fa", bytes((U.UC_MEM_WRITE,)))  # cmp edx, WRITE
    a.far(0x74, "miss")
    a.branch(0xEB, "fill")
    a.label("store")
    a.emit("83c8", bytes((_WRITE,)))  # or eax, WRITE
    a.emit("41f7c2", struct.pack("<I", MIXED))  # test r10d, MIXED
    a.branch(0x74, "fill")
    a.emit("83c8", bytes((_EXEC,)))  # or eax, EXEC            so that the engine looks at what is stored over
    a.label("fill")
    a.emit("894108 4d235028 4c8911")  # mov [rcx+8], eax; and r10, [r8+FRAME_MASK]; mov [rcx], r10
    a.emit("49ff4030")  # inc qword [r8+HITS]
    a.emit("b801000000 c3")  # mov eax, 1; ret
    a.label("fetch")
    a.emit("4d85d2")  # test r10, r10
    a.branch(0x78, "miss")
    a.emit("b8", struct.pack("<I", _READ | _EXEC))  # mov eax, READ | EXEC
    a.emit("41f7c2", struct.pack("<I", MIXED))  # test r10d, MIXED
    a.branch(0x74, "whose")
    a.emit("41f6c302")  # test r11b, RW
    a.branch(0x74, "whose")
    a.emit("83c8", bytes((_WRITE,)))  # or eax, WRITE
    a.label("whose")
    a.emit("4183f903")  # cmp r9d, 3
    a.branch(0x74, "fill")
    a.emit("41234040")  # and eax, [r8+FETCH_PERMS]
    a.branch(0xEB, "fill")
    a.label("miss")
    a.emit("48b8", struct.pack("<Q", miss), b"\xff\xe0")  # mov rax, miss; jmp rax
    return a.finish()


class Walker:
    """What the code walks, seen from Python. Closed to the guest until `use` gives it tables."""

    def __init__(self) -> None:
        self._map = zeroed(_SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._view = memoryview(self._map)
        self._quads = self._view.cast("Q")
        self._words = self._view.cast("I")
        self._quads[_FRAME_MASK // 8] = FRAME
        self._tables: memoryview | None = None
        self._host = self._base = 0
        self.native = False  # whether the machine code is in force

    def connect(self, registers: int, collapsed: int) -> None:
        """Before the code runs: addresses of the word that holds the CPL, and of the one that forbids."""
        self._quads[_REGISTERS // 8], self._quads[_COLLAPSED // 8] = registers, collapsed
        self.native = True

    def use(self, tables: memoryview, host: int, base: int) -> None:
        """The memory that holds the tables: as 64-bit entries, its host address, and what entries call it."""
        self._tables, self._host, self._base = tables, host, base
        self._quads[_DELTA // 8] = host - base & (1 << 64) - 1

    def close(self, why: int) -> None:
        """Answer nothing from now on."""
        self._words[_CLOSED // 4] |= why

    def open(self, why: int) -> None:
        """Take back one reason for being closed."""
        self._words[_CLOSED // 4] &= ~why & 0xFFFFFFFF

    def set_roots(self, root: int, fetch_root: int) -> None:
        """Index of the first of the four top entries, for data and for fetches outside ring 3.

        -1 for none: every such look-up goes to Python.
        """
        self._quads[_ROOT // 8] = self._host + 8 * root if root >= 0 else 0
        self._quads[_FETCH_ROOT // 8] = self._host + 8 * fetch_root if fetch_root >= 0 else 0
        own = fetch_root != root
        self._words[_FETCH_PERMS // 4] = _EXEC if own else _ALL

    def let_supervisor_store(self, everywhere: bool) -> None:
        """Whether CR0.WP is clear: RW does not bind a supervisor."""
        self._words[_SUPERVISOR_STORES // 4] = STORABLE if everywhere else 0

    @property
    def hits(self) -> int:
        """How many look-ups the code has answered."""
        return self._quads[_HITS // 8]

    def look(self, address: int, access: int, user: bool) -> tuple[int, int] | None:
        """The same walk in Python: (physical page, PROT_* bits), or None where the tables do not allow it."""
        tables = self._tables
        fetch = access == U.UC_MEM_FETCH
        root = self._quads[(_FETCH_ROOT if fetch and not user else _ROOT) // 8]
        if self._words[_CLOSED // 4] or not root or tables is None:
            return None
        entry = tables[(root - self._host >> 3) + (address >> 30)]
        if not entry & P:
            return None
        upper = tables[((entry & FRAME) - self._base >> 3) + (address >> 21 & 511)]
        if not upper & P:
            return None
        leaf = tables[((upper & FRAME) - self._base >> 3) + (address >> 12 & 511)]
        if not leaf & P:
            return None
        rights = upper & leaf
        if user and not rights & US:
            return None
        may_store = rights & RW or not user and leaf & self._words[_SUPERVISOR_STORES // 4]
        if fetch:
            if leaf & NX:
                return None
            perms = _READ | _EXEC | (_WRITE if leaf & MIXED and may_store else 0)
            if not user:
                perms &= self._words[_FETCH_PERMS // 4]
        elif access == U.UC_MEM_WRITE and not may_store:
            return None
        else:
            perms = _READ | _WRITE if may_store else _READ
            perms |= _EXEC if leaf & MIXED and may_store else 0
        return leaf & FRAME, perms
