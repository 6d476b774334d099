"""What this CPU does otherwise than the manual, each with a demonstration.

The classification states the manual and the census observes the CPU; where they differ, one of these must say
why. A deviation that no longer shows itself is reported by the census, so the list cannot go stale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.vectors import Vector
from vmm.machine import probe as lab
from vmm.machine.experiments import TIGHT
from vmm.machine.probe import End, Probe, State


@dataclass(frozen=True, slots=True)
class Deviation:
    """What this CPU does otherwise than the manual: on which rows, in which respects, and a demonstration.

    `aspects` are "present", "trap", "control", "mode_bound", "location_bound"; none for a mere note.
    """

    rows: tuple[str, ...]
    aspects: frozenset[str]
    sentence: str
    shows: Callable[[Probe], bool] = field(repr=False, compare=False)


_TIGHT = State(flags=TIGHT.flags, setup=TIGHT.setup)


def _ports_open(probe: Probe) -> bool:
    return all(probe.run(bytes([opcode]), 3).ports for opcode in (0xEC, 0xEE, 0x6C, 0x6E))


def _does_nothing(*codes: str, ring: int = 0) -> Callable[[Probe], bool]:
    def shows(probe: Probe) -> bool:
        runs = [probe.run(bytes.fromhex(code), ring, _TIGHT) for code in codes]
        return all(run.end is End.DONE and not run.changed for run in runs)

    return shows


def _undefined(code: str) -> Callable[[Probe], bool]:
    return lambda probe: probe.run(bytes.fromhex(code), 0).vector == Vector.UD


def _gate_privilege_ignored(probe: Probe) -> bool:
    gate = bytes(Descriptor.gate(lab.CODE_SELECTOR[0], lab.TARGET, SystemType.INTERRUPT_GATE32, 0))
    return probe.run(b"\xcd\x30", 3, State(memory=((lab.IDT + 8 * 0x30, gate),))).vector == 0x30


def _lock_ignored(probe: Probe) -> bool:
    return all(probe.run(code, 0).end is End.DONE for code in (b"\xf0\x9c", b"\xf0\x0f\x02\xc1"))


def _unknown_msr(probe: Probe) -> bool:
    unknown = State(registers=(0, 0xDEAD, *State().registers[2:]))
    return all(probe.run(code, 0, unknown).end is End.DONE for code in (b"\x0f\x32", b"\x0f\x30"))


DEVIATIONS = (
    Deviation(
        ("IN", "OUT", "INS", "OUTS"),
        frozenset({"trap"}),
        "This CPU compares no port access with IOPL or the I/O bitmap; the machine does it for the CPU.",
        _ports_open,
    ),
    Deviation(
        ("INT n", "INT3", "INTO"),
        frozenset({"mode_bound"}),
        "This CPU does not compare a gate's DPL with CPL; the machine does when it delivers the interrupt.",
        _gate_privilege_ignored,
    ),
    Deviation(
        ("SYSENTER",),
        frozenset({"control", "location_bound"}),
        "On this CPU SYSENTER does nothing; the machine carries it out.",
        _does_nothing("0f34", ring=3),
    ),
    Deviation(
        ("SYSCALL",),
        frozenset({"present", "control", "location_bound"}),
        "On this CPU SYSCALL does nothing, even without EFER.SCE, where the manual has #UD.",
        _does_nothing("0f05", ring=3),
    ),
    Deviation(
        ("INVLPG", "INVD", "WBINVD"),
        frozenset({"control"}),
        "The TLB and the caches cannot be seen in registers or memory; this CPU has no caches.",
        _does_nothing("0f0138", "0f08", "0f09"),
    ),
    Deviation(
        ("MONITOR", "MWAIT"),
        frozenset({"control"}),
        "On this CPU MONITOR and MWAIT do nothing, as the manual allows.",
        _does_nothing("0f01c8", "0f01c9"),
    ),
    Deviation(
        ("INT1",), frozenset({"present"}), "On this CPU INT1 raises #UD in every ring.", _undefined("f1")
    ),
    Deviation(
        ("RDPMC",),
        frozenset({"present"}),
        "This CPU has no performance counters: #UD in every ring.",
        _undefined("0f33"),
    ),
    Deviation(
        ("RDMSR", "WRMSR"),
        frozenset(),
        "On this CPU unknown MSRs read as zero in ring 0 and writes vanish, where the manual has #GP.",
        _unknown_msr,
    ),
    Deviation(
        (),
        frozenset(),
        "This CPU ignores LOCK before most instructions that cannot be locked, where the manual has #UD.",
        _lock_ignored,
    ),
)
