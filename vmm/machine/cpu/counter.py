"""RDTSC in machine code: a guest that waits by reading its counter does so a million times.

The engine's own RDTSC reads the host's counter, so a hook answers it. In Python that costs more than a microsecond.
With the instruction clock the answer is a sum: what has retired, which is some constant less the meter's budget, less
what the block in which RDTSC stands has been charged for and not yet executed. So what Python has answered once is
remembered, by where RDTSC stands in which block; the next time there it is four comparisons and a subtraction.

The hard part is when that is no longer so. The meter's *epoch* (`stub`) changes when the budget is granted anew, when
the guest's counter is set, and with each translation, without which no block can become another. In another epoch
than that of the memory Python is asked again. With the host's clock nothing is remembered.

The memory that the code and Python share begins with the address of the CPU's registers, of the meter, and how many
answers were given here; then follow `PLACES`, by EIP.
"""

from __future__ import annotations

import ctypes
import struct

from vmm.machine.cpu import layout as at
from vmm.machine.cpu import stub
from vmm.machine.cpu.pages import zeroed
from vmm.machine.cpu.state import CpuState

_REGISTERS, _METER, _ANSWERED, _PLACES = 0, 8, 16, 64
PLACES = 16
_PLACE = struct.Struct("<IIIIIIq")  # epoch, EIP, base of CS, the block's address and `packed`, -, constant
_SIZE = _PLACES + PLACES * _PLACE.size
_CS_BASE = at.SEGMENTS + at.CS * at.SEGMENT_STRIDE + at.BASE
_EAX, _EDX = at.REGS, at.REGS + 2 * 8


def rdtsc_code(miss: int) -> bytes:
    """The hook. `miss` is the address of the Python callback. Arguments in rdi, rsi: engine, the shared memory."""
    a = stub.Assembler()

    def displaced(opcode: str, offset: int) -> None:
        a.emit(opcode, struct.pack("<i", offset))

    a.emit("4c8b06 488b4e08")  # mov r8, [rsi+REGISTERS]; mov rcx, [rsi+METER]
    displaced("458b88", at.EIP)  # mov r9d, [r8+EIP]
    a.emit("4489c8 83e00f c1e005")  # mov eax, r9d; and eax, PLACES - 1; shl eax, 5
    a.emit("488d540640")  # lea rdx, [rsi+rax+PLACES]
    a.emit("8b41", bytes((stub.EPOCH,)), "3b02")  # mov eax, [rcx+EPOCH]; cmp eax, [rdx]
    a.branch(0x75, "miss")
    a.emit("443b4a04")  # cmp r9d, [rdx+4]                EIP
    a.branch(0x75, "miss")
    displaced("418b80", _CS_BASE)  # mov eax, [r8+CS_BASE]
    a.emit("3b4208")  # cmp eax, [rdx+8]
    a.branch(0x75, "miss")
    a.emit("8b41", bytes((stub.ADDRESS,)), "3b420c")  # mov eax, [rcx+ADDRESS]; cmp eax, [rdx+12]
    a.branch(0x75, "miss")
    a.emit("8b41", bytes((stub.PACKED,)), "3b4210")  # mov eax, [rcx+PACKED]; cmp eax, [rdx+16]
    a.branch(0x75, "miss")
    a.emit("488b4218 482b01")  # mov rax, [rdx+24]; sub rax, [rcx]
    displaced("418980", _EAX)  # mov [r8+EAX], eax
    a.emit("48c1e820")  # shr rax, 32
    displaced("418980", _EDX)  # mov [r8+EDX], eax
    a.emit("48ff4610")  # inc qword [rsi+ANSWERED]
    a.emit("b801000000 c3")  # mov eax, 1; ret
    a.label("miss")
    a.emit("48b8", struct.pack("<Q", miss), "ffe0")  # mov rax, miss; jmp rax
    return a.finish()


class Counter:
    """The memory, seen from Python. Nothing is remembered until it is `connect`ed, and after `close`."""

    def __init__(self, meter: stub.Meter) -> None:
        self._meter, self._open = meter, False
        self._map = zeroed(_SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._quads = memoryview(self._map).cast("Q")

    def connect(self) -> None:
        """The meter knows the address of the CPU's registers."""
        self._quads[_REGISTERS // 8] = self._meter.quads[stub.REGISTERS // 8]
        self._quads[_METER // 8] = self._meter.address
        self._open = True

    def close(self) -> None:
        """From now on every RDTSC comes to Python."""
        self._open = False
        self._meter.begin_epoch()

    def remember(self, state: CpuState, value: int) -> None:
        """RDTSC at EIP, in the block charged last, was answered with `value`, which grows with each instruction."""
        words = self._meter.words
        packed = words[stub.PACKED // 4]
        if not packed or not self._open:
            return
        eip = state.eip
        constant = value + self._meter.budget
        signed = (constant + (1 << 63) & (1 << 64) - 1) - (1 << 63)
        base, block = state.segment_base(at.CS), words[stub.ADDRESS // 4]
        place = _PLACES + eip % PLACES * _PLACE.size
        _PLACE.pack_into(self._map, place, words[stub.EPOCH // 4], eip, base, block, packed, 0, signed)

    def take_answered(self) -> int:
        """How many were answered here since the last call."""
        answered = self._quads[_ANSWERED // 8]
        if answered:
            self._quads[_ANSWERED // 8] = 0
        return answered
