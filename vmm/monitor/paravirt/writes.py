"""Stores of a guest's kernel to its own page tables, which it maps read-only: emulated, as checked updates.

A kernel need not ask for each change of an L1 table: it may store to the entry, the store faults, and the hypervisor
makes the update that it asks for. It costs an exit where a batch of updates would share one. Emulated are the
instructions that kernels use for it: MOV, XCHG, CMPXCHG, CMPXCHG8B, AND, OR, XOR, BTS and BTR. After any other, and
for a store that makes no good entry, the fault is the guest's.

Sources: Xen's behaviour (writable page tables); SDM volume 2, each instruction's operation.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import and_, or_, xor

from vmm.isa.decode import Instruction, signed8
from vmm.isa.words import ARITHMETIC, EFlags
from vmm.machine.cpu.state import EAX, EBX, ECX, EDX, CpuState
from vmm.monitor.paravirt.machinery import Domain

_LOGIC: dict[str, Callable[[int, int], int]] = {
    "20": and_, "21": and_, "08": or_, "09": or_, "30": xor, "31": xor,
    "80/4": and_, "81/4": and_, "83/4": and_, "80/1": or_, "81/1": or_, "83/1": or_,
    "80/6": xor, "81/6": xor, "83/6": xor,
}  # fmt: skip
_BITS = {"0FAB": True, "0FBA/5": True, "0FB3": False, "0FBA/6": False}  # whether the bit is set
_WIDE = 1  # the low bit of an opcode: not of bytes


class _Store:
    """One such instruction, its memory operand at linear `address`."""

    def __init__(self, d: Domain, instruction: Instruction, address: int) -> None:
        self.paging, self.state, self.i, self.address = d.paging, d.machine.state, instruction, address
        two_bytes = instruction.opcode > 0xFF
        bytes_only = not instruction.opcode & _WIDE and not (two_bytes and instruction.key in _BITS)
        self.size = 1 if bytes_only else instruction.operand_size
        self.linear = d.machine.linear

    @property
    def mask(self) -> int:
        return (1 << 8 * self.size) - 1

    def there(self) -> int:
        return self.linear.read(self.address, self.size)

    def register(self) -> int:
        """The register operand."""
        return _part(self.state, self.i.reg, self.size)

    def immediate(self) -> int:
        value = self.i.immediates[0]
        return (signed8(value & 0xFF) if self.i.opcode == 0x83 else value) & self.mask

    def put(self, value: int) -> bool:
        return self.paging.emulate_store(self.address, (value & self.mask).to_bytes(self.size, "little"))

    def move(self) -> bool:
        return self.put(
            self.immediate() if self.i.immediates and self.i.opcode in (0xC6, 0xC7) else self.register()
        )

    def exchange(self) -> bool:
        old = self.there()
        if not self.put(self.register()):
            return False
        _put_part(self.state, self.i.reg, self.size, old)
        return True

    def compare_exchange(self) -> bool:
        expected = self.state.get(EAX) & self.mask
        old, new = (value.to_bytes(self.size, "little") for value in (expected, self.register()))
        found = self.paging.compare_exchange(self.address, old, new)
        if found is None:
            return False
        value = int.from_bytes(found, "little")
        if value != expected:
            _put_part(self.state, EAX, self.size, value)
        self._flags_of_difference(expected, value)
        return True

    def compare_exchange8(self) -> bool:
        state = self.state
        expected = state.get(EAX) | state.get(EDX) << 32
        new = state.get(EBX) | state.get(ECX) << 32
        found = self.paging.compare_exchange(
            self.address, expected.to_bytes(8, "little"), new.to_bytes(8, "little")
        )
        if found is None:
            return False
        value = int.from_bytes(found, "little")
        if value != expected:
            state.set(EAX, value)
            state.set(EDX, value >> 32)
        state.eflags = state.eflags & ~EFlags.ZF | (EFlags.ZF if value == expected else 0)
        return True

    def logic(self) -> bool:
        operand = self.immediate() if "/" in self.i.key else self.register()
        result = _LOGIC[self.i.key](self.there(), operand) & self.mask
        if not self.put(result):
            return False
        self.state.eflags = self.state.eflags & ~ARITHMETIC | self._flags_of(result)
        return True

    def bit(self) -> bool:
        bits = 8 * self.size
        if "/" not in self.i.key and self.register() >= bits:
            return False  # a register may name a bit of another word
        number = (self.i.immediates[0] if "/" in self.i.key else self.register()) % bits
        old = self.there()
        if not self.put(old | 1 << number if _BITS[self.i.key] else old & ~(1 << number)):
            return False
        carry = EFlags.CF if old >> number & 1 else 0
        self.state.eflags = self.state.eflags & ~EFlags.CF | carry
        return True

    def _flags_of(self, value: int) -> int:
        flags = 0 if value else EFlags.ZF
        flags |= EFlags.SF if value >> 8 * self.size - 1 else 0
        return flags | (EFlags.PF if (value & 0xFF).bit_count() % 2 == 0 else 0)

    def _flags_of_difference(self, a: int, b: int) -> None:
        result, sign = a - b & self.mask, 8 * self.size - 1
        flags = self._flags_of(result)
        flags |= EFlags.CF if a < b else 0
        flags |= EFlags.AF if a & 0xF < b & 0xF else 0
        flags |= EFlags.OF if (a ^ b) & (a ^ result) & 1 << sign else 0
        self.state.eflags = self.state.eflags & ~ARITHMETIC | flags


def _part(state: CpuState, register: int, size: int) -> int:
    """A register operand of so many bytes."""
    if size == 1:
        return state.get(register & 3) >> (8 if register & 4 else 0) & 0xFF
    return state.get(register) & (1 << 8 * size) - 1


def _put_part(state: CpuState, register: int, size: int, value: int) -> None:
    shift = 8 if size == 1 and register & 4 else 0
    register = register & 3 if size == 1 else register
    mask = (1 << 8 * size) - 1 << shift
    state.set(register, state.get(register) & ~mask | value << shift & mask)


_ROWS: dict[str, Callable[[_Store], bool]] = {
    **dict.fromkeys(("88", "89", "A2", "A3", "C6/0", "C7/0"), _Store.move),
    **dict.fromkeys(("86", "87"), _Store.exchange),
    **dict.fromkeys(("0FB0", "0FB1"), _Store.compare_exchange),
    "0FC7/1": _Store.compare_exchange8,
    **dict.fromkeys(_LOGIC, _Store.logic),
    **dict.fromkeys(_BITS, _Store.bit),
}


def emulate(d: Domain, instruction: Instruction, address: int) -> bool:
    """Do the store of the guest's kernel at EIP that has faulted at `address`, EIP and the count included.

    False where it is none that is emulated; raises `PageFault` where the operand cannot be read.
    """
    row, state = _ROWS.get(instruction.key), d.machine.state
    if row is None or instruction.memory is None:
        return False
    registers = [state.get(i) for i in range(8)]
    operand = (
        instruction.memory.offset(registers) + state.segment_base(instruction.memory.segment) & 0xFFFFFFFF
    )
    if operand & ~0xFFF != address & ~0xFFF:
        return False
    store = _Store(d, instruction, operand)
    if instruction.key == "0FC7/1":
        store.size = 8
    if not row(store):
        return False
    state.eip += instruction.size
    d.machine.retire()
    return True
