"""What comes out: intercepts as a policy, from `--intercept cr3,cpuid,pf` to the bits of a VMCB.

A policy is `MINIMUM`, the least that keeps a guest contained, and whatever was asked for on top. One row of
`MISC` says of each instruction and event what this CPU makes of its intercept; an intercept that it would
never report is refused with the reason, rather than accepted and forgotten.

Source: AMD64 APM volume 2, 15.7 to 15.14 (intercepts), 15.11 (the MSR permission map), table B-1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from enum import Enum

from vmm.errors import UsageError
from vmm.isa.vectors import VECTORS, Vector
from vmm.monitor.hardware import exits
from vmm.monitor.hardware.exits import ExitCode
from vmm.monitor.hardware.vmcb import INTERCEPTS, Vmcb

_MISCELLANEOUS = Vmcb.ROWS["intercept_misc1"].offset
MSR_MAP_SIZE = 0x2000
IO_MAP_SIZE = 0x3000
# The three ranges of the MSR permission map, 0x2000 registers and 0x800 bytes each (15.11).
MSR_RANGES = (0x0000_0000, 0xC000_0000, 0xC001_0000)
_RANGE = 0x2000

EFER = 0xC000_0080
VM_CR = 0xC001_0114
VM_HSAVE_PA = 0xC001_0117

CONTROL_REGISTERS = (0, 2, 3, 4)
DEBUG_REGISTERS = tuple(range(8))
EXCEPTIONS = frozenset(VECTORS) - {Vector.NMI}


class By(Enum):
    """Who notices."""

    CPU = "the CPU, by the intercept's bit"
    HOOK = "the machine, by a hook that is there whatever the bit says"
    NOBODY = "nobody: refused"


@dataclass(frozen=True, slots=True)
class Row:
    """One miscellaneous intercept: who notices, why if it is special, and what the CPU reports it as."""

    code: ExitCode
    by: By = By.CPU
    reason: str = ""
    arrives_as: ExitCode | None = None

    @property
    def name(self) -> str:
        return _option(self.code)


def _option(code: ExitCode) -> str:
    return code.name.removeprefix("VMEXIT_").lower().replace("_", "-")


_E = ExitCode
_PHYSICAL = "nothing physical reaches this guest: its interrupts are virtual and come from the machine"
_NEVER = "this CPU never reports it"
_ABSENT = "this machine does not have it: the instruction is #UD, take ud"
MISC = {
    row.code: row
    for row in (
        Row(_E.VMEXIT_INTR, By.NOBODY, _PHYSICAL),
        Row(_E.VMEXIT_NMI, By.NOBODY, _PHYSICAL),
        Row(_E.VMEXIT_SMI, By.NOBODY, _PHYSICAL),
        Row(_E.VMEXIT_INIT, By.NOBODY, _PHYSICAL),
        Row(_E.VMEXIT_VINTR, By.NOBODY, "this CPU would report the same virtual interrupt without end"),
        Row(_E.VMEXIT_CR0_SEL_WRITE, By.NOBODY, f"{_NEVER}: take cr0-write"),
        Row(_E.VMEXIT_IDTR_READ),
        Row(_E.VMEXIT_GDTR_READ),
        Row(_E.VMEXIT_LDTR_READ),
        Row(_E.VMEXIT_TR_READ),
        Row(_E.VMEXIT_IDTR_WRITE),
        Row(_E.VMEXIT_GDTR_WRITE),
        Row(_E.VMEXIT_LDTR_WRITE),
        Row(_E.VMEXIT_TR_WRITE),
        Row(_E.VMEXIT_RDTSC),
        Row(_E.VMEXIT_RDPMC),
        Row(_E.VMEXIT_PUSHF),
        Row(_E.VMEXIT_POPF),
        Row(_E.VMEXIT_CPUID),
        Row(_E.VMEXIT_RSM),
        Row(_E.VMEXIT_IRET),
        Row(_E.VMEXIT_SWINT, reason="this CPU reports INT3, and INTO that traps, as INT n"),
        Row(_E.VMEXIT_INVD, reason="this CPU takes it for WBINVD", arrives_as=_E.VMEXIT_WBINVD),
        Row(_E.VMEXIT_PAUSE),
        Row(_E.VMEXIT_HLT),
        Row(_E.VMEXIT_INVLPG),
        Row(_E.VMEXIT_INVLPGA),
        Row(
            _E.VMEXIT_IOIO,
            By.HOOK,
            "this CPU does not look at the I/O permission map: every port access exits",
        ),
        Row(_E.VMEXIT_MSR),
        Row(_E.VMEXIT_TASK_SWITCH, By.NOBODY, _NEVER),
        Row(_E.VMEXIT_FERR_FREEZE, By.NOBODY, _NEVER),
        Row(_E.VMEXIT_SHUTDOWN),
        Row(_E.VMEXIT_VMRUN),
        Row(_E.VMEXIT_VMMCALL),
        Row(_E.VMEXIT_VMLOAD),
        Row(_E.VMEXIT_VMSAVE),
        Row(_E.VMEXIT_STGI),
        Row(_E.VMEXIT_CLGI),
        Row(_E.VMEXIT_SKINIT),
        Row(_E.VMEXIT_RDTSCP, By.NOBODY, _ABSENT),
        Row(_E.VMEXIT_ICEBP, By.NOBODY, f"{_NEVER}: the instruction is #UD to it, take ud"),
        Row(_E.VMEXIT_WBINVD),
        Row(_E.VMEXIT_MONITOR, By.NOBODY, _ABSENT),
        Row(_E.VMEXIT_MWAIT, By.NOBODY, _ABSENT),
        Row(_E.VMEXIT_MWAIT_CONDITIONAL, By.NOBODY, _ABSENT),
        Row(_E.VMEXIT_XSETBV, By.NOBODY, f"{_NEVER}: the instruction is #UD to it, take ud"),
        Row(_E.VMEXIT_RDPRU, By.NOBODY, f"{_NEVER}: the instruction is #UD to it, take ud"),
    )
}
# INT3 and INTO never reach the test of the exceptions' bits in this CPU; the machine sees both vectors anyway.
HOOKED_EXCEPTIONS = frozenset((Vector.BP, Vector.OF))

_NOTHING: frozenset[int] = frozenset()
EVERY_MSR = frozenset(msr for start in MSR_RANGES for msr in range(start, start + _RANGE))


def _mask(bits: Iterable[int]) -> int:
    mask = 0
    for bit in bits:
        mask |= 1 << bit
    return mask


@dataclass(frozen=True, slots=True)
class Intercepts:
    """A set of intercepts: numbers of control and debug registers, vectors, exit codes, MSRs.

    `a | b` intercepts what either does; `str` gives the names that `parse` takes.
    """

    cr_reads: frozenset[int] = _NOTHING
    cr_writes: frozenset[int] = _NOTHING
    dr_reads: frozenset[int] = _NOTHING
    dr_writes: frozenset[int] = _NOTHING
    exceptions: frozenset[int] = _NOTHING
    misc: frozenset[ExitCode] = frozenset()
    msr_reads: frozenset[int] = _NOTHING
    msr_writes: frozenset[int] = _NOTHING

    def __or__(self, other: Intercepts) -> Intercepts:
        return Intercepts(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))

    @classmethod
    def parse(cls, text: str) -> Intercepts:
        """`MINIMUM` and what `text` names, separated by commas.

        Raises `UsageError` for a name that is none, or one of an intercept that this CPU does not have.
        """
        asked = MINIMUM
        for word in text.lower().split(","):
            if word.strip():
                asked |= _named(word.strip())
        return asked

    def write(self, vmcb: Vmcb) -> None:
        """Set the intercept vectors of a VMCB to exactly this."""
        codes = set(self.misc)
        codes |= {row.arrives_as for code in self.misc if (row := MISC[code]).arrives_as is not None}
        if self.msr_reads or self.msr_writes:
            codes.add(ExitCode.VMEXIT_MSR)
        INTERCEPTS.write(
            vmcb,
            _mask(self.cr_reads),
            _mask(self.cr_writes),
            _mask(self.dr_reads),
            _mask(self.dr_writes),
            _mask(self.exceptions),
            _mask(code - exits.MISC1 for code in codes if code < exits.MISC2),
            _mask(code - exits.MISC2 for code in codes if exits.MISC2 <= code < exits.MISC3),
            0,
        )

    def vectors(self) -> bytes:
        """The vectors as this CPU keeps them while a guest is live (`layout.INTERCEPTS`): the last two first."""
        vmcb = Vmcb.new()
        self.write(vmcb)
        registers, miscellaneous = vmcb.view[:_MISCELLANEOUS], vmcb.view[_MISCELLANEOUS : _MISCELLANEOUS + 8]
        return bytes(miscellaneous) + bytes(registers)

    def msr_map(self) -> bytes:
        """The MSR permission map: 8 KiB, two bits a register, the lower for reads and the upper for writes."""
        page = bytearray(MSR_MAP_SIZE)
        for msrs, shift in ((self.msr_reads, 0), (self.msr_writes, 1)):
            for msr in msrs:
                byte, bit = msr_place(msr)
                page[byte] |= 1 << bit + shift
        return bytes(page)

    def __str__(self) -> str:
        words = [
            *_register_names("cr", self.cr_reads, self.cr_writes),
            *_register_names("dr", self.dr_reads, self.dr_writes),
        ]
        if self.exceptions >= EXCEPTIONS:
            words.append("exceptions")
        else:
            words += [_EXCEPTION_NAMES[vector] for vector in sorted(self.exceptions)]
        words += [_option(code) for code in sorted(self.misc) if code != ExitCode.VMEXIT_MSR]
        words += _msr_names(self.msr_reads, self.msr_writes)
        return ",".join(words)


def msr_place(msr: int) -> tuple[int, int]:
    """Byte of the map and the bit in it where the two bits of an MSR begin; KeyError outside the map's ranges."""
    for i, start in enumerate(MSR_RANGES):
        if start <= msr < start + _RANGE:
            index = (i * _RANGE + msr - start) * 2
            return index // 8, index % 8
    raise KeyError(msr)


_EXCEPTION_NAMES = {vector: VECTORS[vector].mnemonic.lstrip("#").lower() for vector in sorted(EXCEPTIONS)}


def _register_names(kind: str, reads: frozenset[int], writes: frozenset[int]) -> list[str]:
    return [
        f"{kind}{n}" + ("" if n in reads and n in writes else "-read" if n in reads else "-write")
        for n in sorted(reads | writes)
    ]


def _msr_names(reads: frozenset[int], writes: frozenset[int]) -> list[str]:
    words = [f"msr-{way}" for way, msrs in (("read", reads), ("write", writes)) if msrs >= EVERY_MSR]
    if len(words) == 2:
        return ["msr"]
    reads, writes = (_NOTHING if msrs >= EVERY_MSR else msrs for msrs in (reads, writes))
    for msr in sorted(reads | writes):
        way = "" if msr in reads and msr in writes else "-read" if msr in reads else "-write"
        words.append(f"msr:{msr:#x}{way}")
    return words


def _one(code: ExitCode) -> Intercepts:
    return Intercepts(misc=frozenset((code,)))


def _names() -> dict[str, Intercepts]:
    """Every word of `--intercept` but `msr:N`, with what it asks for."""
    table: dict[str, Intercepts] = {}
    for kind, numbers in (("cr", CONTROL_REGISTERS), ("dr", DEBUG_REGISTERS)):
        for word, some in [(kind, numbers), *((f"{kind}{n}", (n,)) for n in numbers)]:
            read = Intercepts(**{f"{kind}_reads": frozenset(some)})  # type: ignore[arg-type]
            write = Intercepts(**{f"{kind}_writes": frozenset(some)})  # type: ignore[arg-type]
            table |= {f"{word}-read": read, f"{word}-write": write, word: read | write}
    table |= {word: Intercepts(exceptions=frozenset((v,))) for v, word in _EXCEPTION_NAMES.items()}
    table["exceptions"] = Intercepts(exceptions=EXCEPTIONS)
    table |= {row.name: _one(code) for code, row in MISC.items() if row.by is not By.NOBODY}
    table["msr-read"] = Intercepts(msr_reads=EVERY_MSR, misc=frozenset((ExitCode.VMEXIT_MSR,)))
    table["msr-write"] = Intercepts(msr_writes=EVERY_MSR, misc=frozenset((ExitCode.VMEXIT_MSR,)))
    table["msr"] = table["msr-read"] | table["msr-write"]
    everything = Intercepts()
    for one in table.values():
        everything |= one
    # Instructions by their own names, where the manual's name is that of what they touch.
    for word, meaning in {
        "sidt": "idtr-read",
        "sgdt": "gdtr-read",
        "sldt": "ldtr-read",
        "str": "tr-read",
        "lidt": "idtr-write",
        "lgdt": "gdtr-write",
        "lldt": "ldtr-write",
        "ltr": "tr-write",
        "smsw": "cr0-read",
        "lmsw": "cr0-write",
        "clts": "cr0-write",
        "rdmsr": "msr-read",
        "wrmsr": "msr-write",
        "int": "swint",
        "in": "ioio",
        "out": "ioio",
    }.items():
        table[word] = table[meaning]
    table["all"] = everything
    return table


NAMES = _names()
_REFUSED = {row.name: row.reason for row in MISC.values() if row.by is By.NOBODY}


def _named(word: str) -> Intercepts:
    if word in NAMES:
        return NAMES[word]
    if word.startswith("msr:"):
        return _msr(word)
    if word in _REFUSED:
        raise UsageError(f"--intercept {word}: {_REFUSED[word]}")
    near = get_close_matches(word, [*NAMES, "msr:0x174"], n=4, cutoff=0.6)
    hint = (
        f"did you mean {', '.join(near)}?" if near else "give names such as cr3, cpuid, pf, msr:0x174 or all"
    )
    raise UsageError(f"--intercept {_shown(word)}: no such intercept; {hint}")


def _msr(word: str) -> Intercepts:
    """`msr:0x174`, `msr:0x174-read`, `msr:0x174-write`."""
    number, _, way = word.removeprefix("msr:").partition("-")
    try:
        msr = int(number, 0)
    except ValueError:
        msr = -1
    if msr < 0 or msr >> 32 or way not in ("", "read", "write") or word.endswith("-"):
        raise UsageError(
            f"--intercept {_shown(word)}: give a register's number, such as msr:0x174 or msr:0x174-read"
        )
    if msr not in EVERY_MSR:
        raise UsageError(f"--intercept {word}: no bit of the MSR permission map is for it: it always exits")
    one = frozenset((msr,))
    return Intercepts(
        misc=frozenset((ExitCode.VMEXIT_MSR,)),
        msr_reads=_NOTHING if way == "write" else one,
        msr_writes=_NOTHING if way == "read" else one,
    )


def _shown(word: str) -> str:
    """A word from the user, on one line and of a length that a line can hold."""
    printable = word if word.isprintable() else ascii(word)
    return printable if len(printable) <= 40 else f"{printable[:40]}..."


# Without these a guest reaches past its monitor: VMSAVE and VMLOAD write and read any physical address, the
# others change whether the CPU listens to the monitor at all, and the three MSRs hold what VMRUN needs.
MINIMUM = Intercepts(
    misc=frozenset(
        (
            _E.VMEXIT_VMRUN,
            _E.VMEXIT_VMLOAD,
            _E.VMEXIT_VMSAVE,
            _E.VMEXIT_STGI,
            _E.VMEXIT_CLGI,
            _E.VMEXIT_SKINIT,
            _E.VMEXIT_INVLPGA,
            _E.VMEXIT_HLT,
            _E.VMEXIT_SHUTDOWN,
            _E.VMEXIT_IOIO,
            _E.VMEXIT_MSR,
        )
    ),
    msr_reads=frozenset((EFER, VM_CR, VM_HSAVE_PA)),
    msr_writes=frozenset((EFER, VM_CR, VM_HSAVE_PA)),
)
