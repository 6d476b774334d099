"""The in-cache sequences: what a sensitive instruction becomes where no exit is needed.

Each emitter writes machine code for one guest instruction, under the discipline that `emitter` states. Flags are
changed only by sequences of instructions that load the flags anyway, and only after their last access that can
fault. TRAP in a sequence hands the instruction to the monitor, which emulates all of it.

The stores through CS would fault on hardware; this CPU, like the emulator it descends from, lets them pass.
VMware's first monitor reserved GS for the purpose instead.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmm.isa.decode import ESP, Instruction, Memory
from vmm.isa.forms import Form
from vmm.isa.opcodes import SEGMENT_PREFIX
from vmm.isa.words import EFlags
from vmm.monitor.translator import layout
from vmm.monitor.translator.emitter import ECX, EDX, NO_LANDING, Emitter, source_operand, split

Sequence = Callable[[Emitter, Instruction], None]
Direct = Callable[[Emitter, Form, bytes, int], None]  # with the instruction's bytes, and its EIP
_JUMP = b"\xe9"
_BRANCHES = [bytes((0x0F, 0x80 + condition)) for condition in range(16)]
_OVERRIDE = {segment: bytes([prefix]) for prefix, segment in SEGMENT_PREFIX.items()}
# What must be clear in an EFLAGS image for the CPU to load it as the kernel's: the rest is the monitor's to do.
_ODD_LOW = EFlags.TF | EFlags.IOPL | EFlags.NT
_ODD = _ODD_LOW | EFlags.RF | EFlags.VM


def _word(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


def cli(e: Emitter, _i: Instruction) -> None:
    e.emit("2ec605", e.cell(layout.FLAG), b"\x00")  # mov byte cs:[FLAG], 0


def sti(e: Emitter, _i: Instruction) -> None:
    """While an interrupt waits, this store is refused: the exit that delivers it."""
    e.emit("2ec605", e.cell(layout.RISE), b"\x01")


def pushf(e: Emitter, _i: Instruction) -> None:
    """The real flags, in which IF is always on, with the virtual IF put in."""
    e.emit("9c")  # pushfd
    e.save_ecx()
    e.emit("0fb64c2401")  # movzx ecx, byte [esp + 1]
    e.clobber(ECX)
    e.emit("2e8a2d", e.cell(layout.FLAG))  # mov ch, cs:[FLAG]
    e.emit("2e8a89", e.cell(layout.FLAGS_IMAGE))  # mov cl, cs:[FLAGS_IMAGE + ecx]
    e.emit("884c2401")  # mov [esp + 1], cl
    e.restore_ecx()
    e.clobber(0)


def popf(e: Emitter, _i: Instruction) -> None:
    e.save_ecx()
    e.emit("8b0c24")  # mov ecx, [esp]
    e.clobber(ECX)
    e.emit("f7c1", _word(_ODD_LOW))  # test ecx, TF | IOPL | NT
    e.emit("7401")
    e.trap()
    _store_interrupt_flag(e)
    e.restore_ecx()
    e.clobber(0)
    e.emit("9d")  # popfd


def _store_interrupt_flag(e: Emitter) -> None:
    """The virtual IF from the image in ECX: through RISE if it is set, else through FLAG."""
    e.emit("81e1", _word(EFlags.IF))  # and ecx, IF
    e.emit("c1e103")  # shl ecx, 3                 RISE - FLAG, or 0
    e.emit("2e0f9581", e.cell(layout.FLAG))  # setnz cs:[FLAG + ecx]


def iret(e: Emitter, _i: Instruction) -> None:
    """To a process: by the CPU's own IRET, if it starts with interrupts on. To the kernel itself: by the look-up."""
    e.save_ecx()
    e.emit("0fb74c2404")  # movzx ecx, word [esp + 4]     CS
    e.clobber(ECX)
    e.emit("8d89", _word(-e.context.selector))  # lea ecx, [ecx - kernel's]
    e.emit("e3")  # jecxz kernel
    to_kernel = len(e.code)
    e.emit(b"\x00")
    e.emit("8d89", _word(e.context.selector - e.user_code))
    e.trap_unless_ecx_is_zero()
    for offset, table in ((9, layout.USER_FLAGS), (10, layout.USER_FLAGS_HIGH)):
        e.emit("0fb64c24", bytes([offset]))  # movzx ecx, byte [esp + offset]
        e.emit("2e0fb689", e.cell(table))  # movzx ecx, byte cs:[table + ecx]
        e.trap_unless_ecx_is_zero()
    e.emit("2e8a0d", e.cell(layout.FLAG))  # mov cl, cs:[FLAG]
    e.emit("2e880d", e.cell(layout.OLD_FLAG))
    e.emit("2ec605", e.cell(layout.RISE), b"\x01")
    e.restore_ecx()
    e.clobber(0)
    e.resume = e.here
    e.emit("cf")
    e.code[to_kernel] = len(e.code) - to_kernel - 1
    e.clobber(ECX)
    _iret_to_kernel(e)


def _iret_to_kernel(e: Emitter) -> None:
    e.emit("8b4c2408")  # mov ecx, [esp + 8]      the last of the frame: from here on the flags are free
    e.emit("8b0c24")  # mov ecx, [esp]
    e.emit("f7442408", _word(_ODD))  # test dword [esp + 8], ODD
    e.emit("7401")
    e.trap()
    e.save_edx()
    e.clobber(ECX | EDX)
    e.emit("0fb7d1")  # movzx edx, cx
    e.emit("2e8b1495", e.cell(layout.TAGS))  # mov edx, cs:[TAGS + edx * 4]
    e.emit("01d1")  # add ecx, edx
    e.emit("7401")
    e.trap()
    e.emit("0fb7ca")  # movzx ecx, dx
    e.emit("2e8b0c8d", e.cell(layout.TRANSLATIONS))
    e.emit("2e890d", e.cell(layout.TARGET))
    e.emit("8b4c2408")  # mov ecx, [esp + 8]
    _store_interrupt_flag(e)
    e.restore_edx()
    e.restore_ecx()
    e.emit("8d642408")  # lea esp, [esp + 8]
    e.clobber(0)
    e.emit("9d")  # popfd
    e.emit("2eff25", e.cell(layout.TARGET))  # jmp cs:[TARGET]


def ret(e: Emitter, i: Instruction) -> None:
    """By the table of landings: each checks that the address just popped is its own (`check_landing`)."""
    e.save_ecx()
    e.emit("59")  # pop ecx
    e.clobber(ECX)
    if i.immediates and i.immediates[0]:
        e.emit("8da424", _word(i.immediates[0]))  # lea esp, [esp + imm]
        e.look_up_ecx()
    else:
        e.emit("0fb7c9")  # movzx ecx, cx
        e.emit("2eff248d", e.cell(layout.LANDINGS))  # jmp cs:[LANDINGS + ecx * 4]


def check_landing(e: Emitter, eip: int) -> int:
    """Where a RET to guest `eip` arrives: the address is still below ESP, where nothing has been written.

    If it is another's, on to that other's landing, or where it is found that there is none: by the displacement whose
    place in the cache is returned.
    """
    e.clobber(ECX)
    e.emit("8b4c24fc")  # mov ecx, [esp - 4]
    e.emit("8d89", _word(-eip), "e305e9")  # lea ecx, [ecx - eip]; jecxz +5; jmp
    miss = e.here
    e.emit(struct.pack("<i", NO_LANDING - (miss + 4)))
    e.restore_ecx()
    e.clobber(0)
    return miss


def call_indirect(e: Emitter, i: Instruction) -> None:
    e.save_ecx()
    e.emit(source_operand(i, "8b", 1))  # mov ecx, r/m
    e.clobber(ECX)
    e.emit("68", _word(i.next))
    e.look_up_ecx()


def jump_indirect(e: Emitter, i: Instruction) -> None:
    e.save_ecx()
    e.emit(source_operand(i, "8b", 1))
    e.clobber(ECX)
    e.look_up_ecx()


# Direct jumps and calls, which are every sixth instruction, are not decoded: bytes that have this form will do.


def branch_target(form: Form, code: bytes, eip: int) -> int:
    """Guest EIP that a relative branch with 32-bit operands, at `eip`, goes to."""
    at, width = form.immediates[0]
    return eip + form.size + int.from_bytes(code[at : at + width], "little", signed=True) & 0xFFFFFFFF


def jump(e: Emitter, form: Form, code: bytes, eip: int) -> None:
    e.link(_JUMP, branch_target(form, code, eip), certain=True)


def branch(e: Emitter, form: Form, code: bytes, eip: int) -> None:
    """Jcc, of either length."""
    e.link(_BRANCHES[form.opcode & 15], branch_target(form, code, eip))


def loop(e: Emitter, form: Form, code: bytes, eip: int) -> None:
    """LOOPcc and JECXZ have only a short form: it skips to a long jump."""
    prefix = b"\x67" if form.address_size == 2 else b""
    e.emit(prefix, bytes([form.opcode, 2]), "eb05")
    e.link(_JUMP, branch_target(form, code, eip))


def call(e: Emitter, form: Form, code: bytes, eip: int) -> None:
    """The stack holds the guest's return address, never the cache's."""
    e.emit(b"\x68", _word(eip + form.size))  # push imm32
    e.link(_JUMP, branch_target(form, code, eip), certain=True)


def sgdt(e: Emitter, i: Instruction) -> None:
    memory = i.memory
    assert memory is not None
    base, limit = e.gdtr
    e.emit("66", *_store("c7", memory, 0), struct.pack("<H", limit))
    e.emit(*_store("c7", memory, 2), _word(base))


def from_control_register(e: Emitter, i: Instruction) -> None:
    e.emit("2e8b", bytes([5 | i.rm << 3]), e.cell(layout.CONTROL_REGISTERS + 4 * i.reg))


def from_cs(e: Emitter, i: Instruction) -> None:
    selector = struct.pack("<H", e.context.selector)
    if i.memory is not None:
        prefixes, body = split(i.bytes)
        keep = bytes(b for b in prefixes if b != 0x66)
        e.emit("66", keep, b"\xc7", bytes([body[1] & 0xC7]), body[2:], selector)
    elif i.operand_size == 2:
        e.emit("66", bytes([0xB8 + i.rm]), selector)
    else:
        e.emit(bytes([0xB8 + i.rm]), selector, bytes(2))


def from_ss(e: Emitter, i: Instruction) -> None:
    """The real selector is the guest's with RPL 1."""
    prefix = b"\x66" if i.operand_size == 2 else b""
    e.emit(prefix, "8c", bytes([0xD0 | i.rm]))  # mov r, ss
    e.emit(prefix, "8d", bytes([0x40 | i.rm << 3 | i.rm]), "ff")  # lea r, [r - 1]


def push_cs(e: Emitter, i: Instruction) -> None:
    if i.operand_size == 2:
        e.emit("6668", struct.pack("<H", e.context.selector))
    else:
        e.emit("68", _word(e.context.selector))


def push_ss(e: Emitter, _i: Instruction) -> None:
    """The slot just pushed is scratch until it holds what it should: nothing below ESP is touched."""
    e.emit("16")  # push ss
    e.emit("870424")  # xchg eax, [esp]
    e.emit("8d40ff")  # lea eax, [eax - 1]
    e.emit("870424")  # xchg eax, [esp]


def load_data_segment(e: Emitter, i: Instruction) -> None:
    """MOV or POP to DS, ES, FS, GS: the CPU's own, unless RPL is 1, which ring 1 may load and ring 0 may not."""
    _trap_if_ring_one(e, b"\x0f\xb6\x0c\x24" if i.modrm is None or i.opcode > 0xFF else source_operand(i, "0fb7", 1))
    e.emit(i.bytes)


def verify(e: Emitter, i: Instruction) -> None:
    """VERR and VERW: where the shadow says yes, so do the guest's tables; but for RPL 1, as above.

    A no may be a copy's that is not good any more, whose entries look like none, or the monitor's own entry.
    """
    _trap_if_ring_one(e, source_operand(i, "0fb7", 1))
    e.emit(i.bytes, "7401")
    e.trap()


def _trap_if_ring_one(e: Emitter, load: bytes) -> None:
    """`load` puts the selector, or its low byte, into ECX."""
    e.save_ecx()
    e.emit(load)
    e.clobber(ECX)
    e.emit("0fb6c9")  # movzx ecx, cl
    e.emit("2e0fb689", e.cell(layout.RING_ONE))  # movzx ecx, byte cs:[RING_ONE + ecx]
    e.trap_unless_ecx_is_zero()
    e.restore_ecx()
    e.clobber(0)


def encode_memory(memory: Memory, reg: int, displacement: int) -> bytes:
    """ModRM, SIB and 32-bit displacement of a memory operand with 32-bit addressing, `displacement` added."""
    offset = _word(memory.displacement + displacement)
    scale = {1: 0, 2: 0x40, 4: 0x80, 8: 0xC0}[memory.scale]
    index = 4 if memory.index is None else memory.index
    if memory.base is None and memory.index is None:
        return bytes([5 | reg << 3]) + offset
    if memory.base is None:
        return bytes([4 | reg << 3, scale | index << 3 | 5]) + offset
    if memory.index is None and memory.base != ESP:
        return bytes([0x80 | reg << 3 | memory.base]) + offset
    return bytes([0x84 | reg << 3, scale | index << 3 | memory.base]) + offset


def _store(opcode: str, memory: Memory, displacement: int) -> tuple[bytes, ...]:
    return _OVERRIDE[memory.segment], bytes.fromhex(opcode), encode_memory(memory, 0, displacement)


SEQUENCES: dict[str, Sequence] = {
    "CLI": cli,
    "STI": sti,
    "PUSHF": pushf,
    "POPF": popf,
    "IRET": iret,
    "RET": ret,
    "CALL indirect": call_indirect,
    "JMP indirect": jump_indirect,
    "SGDT": sgdt,
    "MOV from CR": from_control_register,
    "MOV from CS": from_cs,
    "MOV from SS": from_ss,
    "PUSH CS": push_cs,
    "PUSH SS": push_ss,
    "load of a data segment": load_data_segment,
    "VERR or VERW": verify,
}

DIRECT: dict[str | None, Direct] = {"CALL": call, "JMP": jump, "Jcc": branch, "LOOP": loop}
