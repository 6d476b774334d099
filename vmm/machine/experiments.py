"""The experiments: for each row of the classification, what to run, and in which states.

A case is an encoding with operands that make it do its work, and the cases of a row are chosen to provoke:
selectors of every ring, frames to every ring, flags that differ. A setting is a state of what a monitor
owns; the settings differ from one another in one resource each, so that whatever follows it gives itself
away. `vmm.census` runs them all; `vmm.witness` looks for the smallest that shows a violation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from vmm.isa.words import EFlags
from vmm.machine import probe as lab
from vmm.machine.probe import State

RINGS = (0, 1, 3)


@dataclass(frozen=True, slots=True)
class Setting:
    """A state of what a monitor owns: EFLAGS, and code that ring 0 executes first."""

    name: str
    flags: int = EFlags.ONE | EFlags.IF
    setup: bytes = b""


def _set_msr(number: int, value: int) -> bytes:
    return b"\xb9" + struct.pack("<I", number) + b"\xb8" + struct.pack("<I", value) + b"\x31\xd2\x0f\x30"


def _or_control(number: int, bits: int) -> bytes:
    register = bytes([0xC0 | number << 3])
    return b"\x0f\x20" + register + b"\x0d" + struct.pack("<I", bits) + b"\x0f\x22" + register


def _load(opcode: bytes, value: int) -> bytes:
    return b"\xb8" + struct.pack("<I", value) + opcode


_IOPL3 = EFlags.ONE | EFlags.IF | EFlags.IOPL
_TSD = _or_control(4, 1 << 2)
_SYSENTER = _set_msr(0x174, 0x100)
_USUAL = _TSD + _SYSENTER

# As a monitor keeps it: IOPL 0, CR4.TSD set. Rings 1 and 3 have no more rights than they must.
TIGHT = Setting("tight", setup=_USUAL)

# The same but for one resource.
VARIATIONS = (
    Setting("IF", EFlags.ONE, _USUAL),
    Setting("IOPL", _IOPL3, _USUAL),
    Setting("GDTR", setup=_USUAL + lab.LOAD_MOVED_GDT),
    Setting("shadow descriptors", setup=_USUAL + lab.LOAD_SHADOW_GDT),
    Setting("IDTR", setup=_USUAL + lab.LOAD_MOVED_IDT),
    Setting("LDTR", setup=_USUAL + lab.LOAD_OTHER_LDT),
    Setting("TR", setup=_USUAL + lab.LOAD_OTHER_TR),
    Setting("CR0", setup=_USUAL + _or_control(0, 1 << 3)),  # TS
    Setting("CR2", setup=_USUAL + _load(b"\x0f\x22\xd0", 0x1234)),
    Setting("CR3", setup=_USUAL + _load(b"\x0f\x22\xd8", 0x6000)),
    Setting("CR4", setup=_USUAL + _or_control(4, 1 << 6)),  # MCE
    Setting("DR0", setup=_USUAL + _load(b"\x0f\x23\xc0", 0x1234)),
    Setting("an MSR", setup=_USUAL + _set_msr(0x174, 0x200)),
    Setting("XCR0", setup=_USUAL + b"\x31\xc9\x31\xd2" + _load(b"\x0f\x01\xd1", 1)),
)

# What a monitor should not allow.
LOOSE = (Setting("TSD clear", setup=_SYSENTER), Setting("IOPL 3", _IOPL3, _USUAL))


@dataclass(frozen=True, slots=True)
class Case:
    """One encoding of a row, with what it works on: registers by number, and memory."""

    code: bytes
    registers: tuple[tuple[int, int], ...] = ()
    memory: tuple[tuple[int, bytes], ...] = ()
    flags: int = 0

    def state(self, setting: Setting) -> State:
        registers = list(State().registers)
        for number, value in self.registers:
            registers[number] = value
        return State(tuple(registers), setting.flags | self.flags, memory=self.memory, setup=setting.setup)


def _case(
    code: str, eax: int = 0, ecx: int = 0, edx: int = 0, stack: Iterable[int] = (), data: bytes = b""
) -> Case:
    """`code` in hexadecimal; `stack` in double words from ESP up; `data` at DATA."""
    registers = tuple((n, value) for n, value in ((0, eax), (1, ecx), (2, edx)) if value)
    memory = [(lab.STACK, b"".join(struct.pack("<I", word) for word in stack)), (lab.DATA, data)]
    return Case(bytes.fromhex(code), registers, tuple((at, content) for at, content in memory if content))


_AT_DATA = struct.pack("<I", lab.DATA).hex()
_AT_TARGET = struct.pack("<I", lab.TARGET).hex()
_RING = {ring: (lab.CODE_SELECTOR[ring], lab.DATA_SELECTOR[ring]) for ring in RINGS}
_SELECTORS = (
    0,
    *(data for _, data in _RING.values()),
    lab.KERNEL_DATA_SELECTOR,
    lab.LIMITED_SELECTOR,
    lab.LDT_DATA_SELECTOR,
)
_FAR = (
    *(code for code, _ in _RING.values()),
    lab.KERNEL_CODE_SELECTOR,
    lab.CONFORMING_SELECTOR,
    lab.GATE_SELECTOR,
)
_FLAGS = (0x002, 0x202, 0x3202, 0x244ED5)


def _pointer(selector: int) -> bytes:
    return struct.pack("<IH", lab.TARGET, selector)


def _with_selector(code: str) -> tuple[Case, ...]:
    return tuple(_case(code, eax=selector) for selector in _SELECTORS)


def _examine(code: str) -> tuple[Case, ...]:
    """LAR and its like: selectors of every ring, RPL 0, and ones that are not segments."""
    selectors = (0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x78, 0x80, lab.CONFORMING_SELECTOR, lab.TSS_SELECTOR, 0)
    return tuple(_case(code, ecx=selector) for selector in selectors)


def _returns(code: str, *flags: int) -> tuple[Case, ...]:
    """Frames for RET far (no flags) and IRET, to every ring and to another segment of ring 3."""
    targets = (*_RING.values(), (lab.CONFORMING_SELECTOR | 3, lab.DATA_SELECTOR[3]))
    frames: list[tuple[int, ...]] = [(flag,) for flag in flags] or [()]
    return tuple(
        _case(code, stack=(lab.TARGET, target, *frame, lab.STACK + 0x100, stack_segment))
        for target, stack_segment in targets
        for frame in frames
    )


CASES: dict[str, tuple[Case, ...]] = {
    "SGDT": (_case("0f0105" + _AT_DATA), _case("660f0105" + _AT_DATA)),
    "SIDT": (_case("0f010d" + _AT_DATA),),
    "SLDT": (_case("0f00c0"), _case("0f0005" + _AT_DATA)),
    "STR": (_case("0f00c8"), _case("0f000d" + _AT_DATA)),
    "SMSW": (_case("0f01e0"), _case("0f0125" + _AT_DATA)),
    "PUSHF": (_case("9c"), _case("669c")),
    "POPF": tuple(_case(code, stack=(flags,)) for code in ("9d", "669d") for flags in _FLAGS),
    "LAR": _examine("0f02c1"),
    "LSL": _examine("0f03c1"),
    "VERR": _examine("0f00e1"),
    "VERW": _examine("0f00e9"),
    "PUSH CS, SS": (_case("0e"), _case("16"), _case("660e")),
    "MOV from CS, SS": (_case("8cc8"), _case("8cd0"), _case("8c0d" + _AT_DATA)),
    "MOV to SS": _with_selector("8ed0"),
    "MOV to DS, ES, FS, GS": tuple(
        case for code in ("8ed8", "8ec0", "8ee0", "8ee8") for case in _with_selector(code)
    ),
    "POP SS": tuple(_case("17", stack=(selector,)) for selector in _SELECTORS),
    "POP DS, ES, FS, GS": tuple(
        _case(code, stack=(selector,)) for code in ("1f", "07", "0fa1", "0fa9") for selector in _SELECTORS
    ),
    "CALL far": (
        *(_case("9a" + _pointer(selector).hex()) for selector in _FAR),
        *(_case("ff1d" + _AT_DATA, data=_pointer(selector)) for selector in _FAR),
    ),
    "JMP far": (
        *(_case("ea" + _pointer(selector).hex()) for selector in _FAR),
        *(_case("ff2d" + _AT_DATA, data=_pointer(selector)) for selector in _FAR),
    ),
    "RET far": (*_returns("cb"), *_returns("ca0400")),
    "INT n": (_case("cd30"), _case("cd80"), _case("cd0d")),
    "INT3": (_case("cc"),),
    "INTO": (Case(b"\xce"), Case(b"\xce", flags=EFlags.OF)),
    "INT1": (_case("f1"),),
    "IRET": _returns("cf", *_FLAGS),
    **{
        name: tuple(_case(code + _AT_DATA, data=_pointer(selector)) for selector in _SELECTORS)
        for name, code in (
            ("LDS", "c505"),
            ("LES", "c405"),
            ("LSS", "0fb205"),
            ("LFS", "0fb405"),
            ("LGS", "0fb505"),
        )
    },
    "SYSENTER": (_case("0f34"),),
    "SYSCALL": (_case("0f05"),),
    "CPUID": (_case("0fa2"), _case("0fa2", eax=1)),
    "XGETBV": (_case("0f01d0"),),
    "LGDT": (_case("0f0115" + _AT_DATA, data=struct.pack("<HI", 0x7F, lab.MOVED_GDT)),),
    "LIDT": (_case("0f011d" + _AT_DATA, data=struct.pack("<HI", 0x7FF, lab.MOVED_IDT)),),
    "LLDT": (_case("0f00d0", eax=lab.OTHER_LDT_SELECTOR), _case("0f00d0")),
    "LTR": (_case("0f00d8", eax=lab.OTHER_TSS_SELECTOR),),
    "LMSW": (_case("0f01f0", eax=0xB), _case("0f01f0", eax=1)),
    "CLTS": (_case("0f06"),),
    "MOV CR": (
        *(_case(f"0f20{0xC0 | number << 3:02x}") for number in (0, 2, 3, 4)),
        _case("0f22c0", eax=0x19),
        _case("0f22d0", eax=0x5000),
        _case("0f22d8", eax=0x7000),
        _case("0f22e0", eax=0x200),
    ),
    "MOV DR": (
        *(_case(f"0f21{0xC0 | number << 3:02x}") for number in (0, 1, 2, 3, 6, 7)),
        *(_case(f"0f23{0xC0 | number << 3:02x}", eax=0x5000) for number in (0, 1, 2, 3)),
    ),
    "INVLPG": (_case("0f0138"),),
    "INVD": (_case("0f08"),),
    "WBINVD": (_case("0f09"),),
    "HLT": (_case("f4"),),
    "RDMSR": (_case("0f32", ecx=0x174), _case("0f32", ecx=0xC0000080)),
    "WRMSR": (_case("0f30", eax=0x300, ecx=0x174),),
    "SYSEXIT": (_case("0f35", ecx=lab.STACK, edx=lab.TARGET),),
    "SYSRET": (_case("0f07", ecx=lab.TARGET),),
    "XSETBV": (_case("0f01d1", eax=1), _case("0f01d1", eax=3)),
    "XSAVES": (_case("0fc72d" + _AT_DATA), _case("0fc71d" + _AT_DATA)),
    "MONITOR": (_case("0f01c8"),),
    "MWAIT": (_case("0f01c9"),),
    "CLAC": (_case("0f01ca"), Case(bytes.fromhex("0f01ca"), flags=EFlags.AC)),
    "STAC": (_case("0f01cb"),),
    "VMRUN": tuple(
        _case(f"0f01{code:02x}", eax=0x6000) for code in (0xD8, 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF)
    ),
    "VMX": (
        *(_case(code) for code in ("0f01c2", "0f01c3", "0f01c4", "0f78c0", "0f79c0")),
        *(_case(code + _AT_DATA) for code in ("0fc735", "0fc73d", "660f388005", "660f388105")),
    ),
    "INVPCID": (_case("660f388205" + _AT_DATA),),
    "ENCLS": (
        *(_case(code) for code in ("0f01cf", "0f01c0", "0f01c5", "f30f01e8")),
        *(_case(code + _AT_DATA) for code in ("f30fae35", "660f38f505")),
    ),
    "CLI": (_case("fa"),),
    "STI": (_case("fb"),),
    "IN": tuple(_case(code, edx=0x80) for code in ("e480", "e580", "ec", "ed", "66ed")),
    "OUT": tuple(_case(code, edx=0x80) for code in ("e680", "e780", "ee", "ef", "66ef")),
    "INS": tuple(_case(code, ecx=2, edx=0x80) for code in ("6c", "6d", "666d", "f36c")),
    "OUTS": tuple(_case(code, ecx=2, edx=0x80) for code in ("6e", "6f", "666f", "f36e")),
    "RDTSC": (_case("0f31"),),
    "RDTSCP": (_case("0f01f9"),),
    "RDPMC": (_case("0f33"),),
    "MOV from DS, ES, FS, GS": tuple(_case(code) for code in ("8cd8", "8cc0", "8ce0", "8ce8")),
    "PUSH DS, ES, FS, GS": tuple(_case(code) for code in ("1e", "06", "0fa0", "0fa8")),
    "BOUND": (
        _case("6205" + _AT_DATA, eax=5, data=struct.pack("<ii", 0, 9)),
        _case("6205" + _AT_DATA, eax=10, data=struct.pack("<ii", 0, 9)),
    ),
    "ARPL": (_case("63c8", eax=0x10, ecx=0x1B), _case("63c8", eax=0x13, ecx=0x18)),
    "UD": (_case("0f0b"), _case("0fb9c0"), _case("0fffc0")),
    "RSM": (_case("0faa"),),
    "VMCALL": (_case("0f01c1"), _case("0f01d9"), _case("0f01d4")),
    "GETSEC": (_case("0f37"),),
}
