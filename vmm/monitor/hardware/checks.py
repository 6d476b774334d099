"""What VMRUN refuses: the manual's entry checks, none of which this CPU makes, and a few that it needs itself.

One row a check: the field, the rule that it must keep, where the manual says so, and the test. The rows of
`MANUAL` are the processor's own; a guest that fails one gets VMEXIT_INVALID. The rows of `ENGINE` are about this
CPU: states that the manual allows (or leaves open) and in which it would abort the process, run wild or quietly
do something else. Each says why.

Not here: the page-directory pointers of a guest with PAE, which lie in the guest's memory and not in the VMCB
(and this machine's guests have no PAE); control-flow enforcement, whose bit in CR4 must be zero here.

Source: AMD64 APM volume 2, 15.5.1 (canonicalization and consistency checks), 15.20 (event injection), 15.25.3 and
15.25.4 (nested paging).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter, or_

from vmm.isa.descriptors import SystemType
from vmm.isa.vectors import VECTORS, Vector
from vmm.isa.words import CR0, CR4, EFlags, Word
from vmm.monitor.hardware.exits import MISC1, MISC2, ExitCode
from vmm.monitor.hardware.injection import EventInjection, EventType
from vmm.monitor.hardware.intercepts import IO_MAP_SIZE, MSR_MAP_SIZE
from vmm.monitor.hardware.vmcb import Attributes, Bits, Vmcb

PAGE = 0x1000
_PARTS = {"": 0, "selector": 0, "attrib": 2, "limit": 4, "base": 8}  # of a segment register: byte offsets


class EFER(Word):
    """The extended feature enable register (APM 2, 3.1.7): the bits that an early SVM processor has."""

    SCE = 1 << 0
    LME = 1 << 8
    LMA = 1 << 10
    NXE = 1 << 11
    SVME = 1 << 12
    FFXSR = 1 << 14


def _defined(word: type[Word]) -> int:
    """All bits that a word names."""
    mask = 0
    for bits in word.FIELDS.values():
        mask |= bits
    return mask


@dataclass(frozen=True, slots=True)
class Host:
    """What the checks depend on of the processor that executes VMRUN: its features, and its state then."""

    maximum_physical: int = 1 << 32  # the first physical address that it does not have
    long_mode: bool = False
    cr4: int = _defined(CR4)  # the bits that exist
    efer: int = _defined(EFER)
    paging: bool = True  # CR0.PG now


@dataclass(frozen=True, slots=True)
class Failure:
    """A check that a VMCB did not pass. `source` is a section of the manual, or what this CPU would do."""

    field: str
    value: int
    rule: str
    source: str

    @property
    def is_manual(self) -> bool:
        """Whether any processor refuses; if not, this one needs it."""
        return self.source.startswith("APM")

    def __str__(self) -> str:
        return f"{self.field} = {self.value:#x}: {self.rule} ({self.source})"


Holds = Callable[[Vmcb, Host], bool]


@dataclass(frozen=True, slots=True)
class Check:
    """One row: `holds` says whether `field` of a VMCB keeps `rule`.

    `zero` is what must be zero, as bits of the page, where that is all there is to the rule.
    """

    field: str
    rule: str
    source: str
    holds: Holds
    zero: int = 0

    def failure(self, vmcb: Vmcb) -> Failure:
        return Failure(self.field, attrgetter(self.field)(vmcb), self.rule, self.source)


def _clear(field: str, mask: int, rule: str, source: str) -> Check:
    """A row whose rule is that these bits of the field are zero."""
    name, _, part = field.partition(".")
    row = Vmcb.ROWS[name]
    low = 8 * (row.offset + _PARTS[part]) + (row.low if isinstance(row, Bits) else 0)
    value: Callable[[Vmcb], int] = attrgetter(field)
    return Check(field, rule, source, lambda v, h: not value(v) & mask, mask << low)


def _long(v: Vmcb, host: Host) -> bool:
    """LME and paging are both on; without long mode in the processor, LME alone is what is wrong."""
    return host.long_mode and bool(v.efer & EFER.LME and v.cr0 & CR0.PG)


def _fits(base: int, size: int, host: Host) -> bool:
    """Whether a table lies in physical memory; the low twelve bits of its address do not count."""
    return base - base % PAGE + size <= host.maximum_physical


def _event_exists(v: Vmcb, _: Host) -> bool:
    value = v.eventinj
    return not value & EventInjection.V or value >> 8 & 7 in _TYPES


def _injected_exception(v: Vmcb) -> int | None:
    value = v.eventinj
    return value & 0xFF if value & _EXCEPTION_MASK == _EXCEPTION else None


def _exception_exists(v: Vmcb, _: Host) -> bool:
    vector = _injected_exception(v)
    return vector is None or vector in VECTORS and vector != Vector.NMI


def _exception_happens(v: Vmcb, host: Host) -> bool:
    """INTO and BOUND do not exist in 64-bit mode, so neither do their exceptions."""
    if _injected_exception(v) not in (Vector.OF, Vector.BR):
        return True
    return not (_long(v, host) and v.cs.attrib & Attributes.L)


def _pat_exists(v: Vmcb, _: Host) -> bool:
    """Each byte one of UC, WC, WT, WP, WB, UC-."""
    return not v.np_enable or all(byte in (0, 1, 4, 5, 6, 7) for byte in v.g_pat.to_bytes(8, "little"))


_TYPES = frozenset(EventType)
_EXCEPTION_MASK = EventInjection.V | EventInjection.TYPE
_EXCEPTION = EventInjection.V | EventType.EXCEPTION << 8
_HIGH = 0xFFFFFFFF << 32
_STATE = "APM 2, 15.5.1"
_INJECTION = "APM 2, 15.20"
_NESTED = "APM 2, 15.25.3"
_NESTED_STATE = "APM 2, 15.25.4"
MANUAL = (
    Check("efer", "SVME must be set", _STATE, lambda v, h: bool(v.efer & EFER.SVME)),
    Check("efer", "a bit that must be zero is set", _STATE, lambda v, h: not v.efer & ~h.efer),
    Check(
        "efer",
        "LME and LMA need a processor with long mode",
        _STATE,
        lambda v, h: h.long_mode or not v.efer & (EFER.LME | EFER.LMA),
    ),
    Check("cr0", "NW must not be set without CD", _STATE, lambda v, h: v.cr0 & (CR0.CD | CR0.NW) != CR0.NW),
    _clear("cr0", _HIGH, "bits 63 to 32 must be zero", _STATE),
    Check(
        "cr3",
        "bits above the physical address must be zero",
        _STATE,
        lambda v, h: v.cr3 < (h.maximum_physical if _long(v, h) else 1 << 32),
    ),
    Check("cr4", "a bit that must be zero is set", _STATE, lambda v, h: not v.cr4 & ~h.cr4),
    Check("cr4", "long mode needs PAE", _STATE, lambda v, h: not _long(v, h) or bool(v.cr4 & CR4.PAE)),
    Check("cr0", "long mode needs PE", _STATE, lambda v, h: not _long(v, h) or bool(v.cr0 & CR0.PE)),
    Check(
        "cs.attrib",
        "L and D must not both be set in long mode",
        _STATE,
        lambda v, h: (
            not (
                _long(v, h) and v.cr4 & CR4.PAE and v.cs.attrib & Attributes.L and v.cs.attrib & Attributes.DB
            )
        ),
    ),
    _clear("dr6", _HIGH, "bits 63 to 32 must be zero", _STATE),
    _clear("dr7", _HIGH, "bits 63 to 32 must be zero", _STATE),
    Check(
        "intercept_misc2",
        "VMRUN must be intercepted",
        _STATE,
        lambda v, h: bool(v.intercept_misc2 & 1 << ExitCode.VMEXIT_VMRUN - MISC2),
    ),
    Check(
        "msrpm_base_pa",
        "the MSR permission map must lie in physical memory",
        _STATE,
        lambda v, h: _fits(v.msrpm_base_pa, MSR_MAP_SIZE, h),
    ),
    Check(
        "iopm_base_pa",
        "the I/O permission map must lie in physical memory",
        _STATE,
        lambda v, h: _fits(v.iopm_base_pa, IO_MAP_SIZE, h),
    ),
    Check("guest_asid", "ASID 0 is the host's", _STATE, lambda v, h: bool(v.guest_asid)),
    Check("eventinj", "the type is reserved", _INJECTION, _event_exists),
    Check("eventinj", "the vector is no exception's", _INJECTION, _exception_exists),
    Check(
        "eventinj",
        "the exception cannot happen in 64-bit mode",
        _INJECTION,
        _exception_happens,
    ),
    Check(
        "np_enable",
        "nested paging needs a host with paging",
        _NESTED,
        lambda v, h: h.paging or not v.np_enable,
    ),
    Check(
        "n_cr3",
        "bits that must be zero are set",
        _NESTED_STATE,
        lambda v, h: not v.np_enable or v.n_cr3 < h.maximum_physical,
    ),
    Check("g_pat", "a memory type is reserved", _NESTED_STATE, _pat_exists),
)


def _task_is_available(v: Vmcb, _: Host) -> bool:
    attrib = v.tr.attrib
    available = SystemType.TSS16_AVAILABLE, SystemType.TSS32_AVAILABLE
    return bool(attrib & Attributes.P) and attrib & (Attributes.S | Attributes.TYPE) in available


def _cpl(v: Vmcb) -> int:
    """The privilege that the mode gives: real mode 0, virtual-8086 mode 3, else that of the stack."""
    if not v.cr0 & CR0.PE:
        return 0
    return 3 if v.rflags & EFlags.VM else v.ss.attrib >> 5 & 3


_KEEPS = "this CPU keeps the half that the manual has it clear"
_NARROW = "this CPU's guests here have 32 bits"
_LACKS = "this CPU does not have it"
ENGINE = (
    _clear(
        "intercept_misc1",
        1 << ExitCode.VMEXIT_VINTR - MISC1,
        "VINTR must not be intercepted",
        "this CPU would report the same virtual interrupt without end",
    ),
    Check(
        "eventinj",
        "only external interrupts can be injected",
        "this CPU delivers no other type",
        lambda v, h: not v.eventinj & EventInjection.V or not v.eventinj & EventInjection.TYPE,
    ),
    _clear("eventinj", EventInjection.RESERVED, "a reserved bit is set", "this CPU would not notice"),
    Check(
        "tr.attrib",
        "TR must hold a present, available TSS",
        "this CPU aborts over any other on a change of ring",
        _task_is_available,
    ),
    Check(
        "cpl",
        "CPL must be the privilege of SS (0 in real mode, 3 in virtual-8086 mode)",
        "this CPU takes it from SS",
        lambda v, h: v.cpl == _cpl(v),
    ),
    _clear(
        "msrpm_base_pa", PAGE - 1, "the MSR permission map must begin a page", "this CPU keeps the low bits"
    ),
    _clear("tlb_control", 0xFE, "must be 0 or 1", "this CPU cannot flush a single ASID"),
    *(
        _clear(f"{name}.base", _HIGH, "bits 63 to 32 must be zero", _KEEPS)
        for name in ("es", "cs", "ss", "ds")
    ),
    *(
        _clear(f"{name}.base", _HIGH, "bits 63 to 32 must be zero", _NARROW)
        for name in ("fs", "gs", "gdtr", "ldtr", "idtr", "tr")
    ),
    *(
        _clear(f"{name}.limit", 0xFFFF0000, "bits 31 to 16 must be zero", "this CPU would not ignore them")
        for name in ("gdtr", "idtr")
    ),
    *(
        _clear(name, _HIGH, "bits 63 to 32 must be zero", _NARROW)
        for name in ("rip", "rsp", "rax", "rflags", "cr2", "sysenter_cs", "sysenter_esp", "sysenter_eip")
    ),
    _clear("intercept_misc3", (1 << 32) - 1, "must be zero", _LACKS),
    _clear("nested_control", (1 << 64) - 2, "only NP_ENABLE may be set", _LACKS),
    _clear("virtualization_extensions", (1 << 64) - 1, "must be zero", _LACKS),
    _clear("pause_filter_count", 0xFFFF, "must be zero", _LACKS),
    *(
        _clear(name, 1, "must be zero", _LACKS)
        for name in ("vgif_enable", "v_nmi_enable", "x2avic_enable", "avic_enable")
    ),
)

CHECKS = MANUAL + ENGINE
# Most rows are one bitwise AND over the page: a VMRUN that passes pays for the others only.
_ZERO = reduce(or_, (row.zero for row in CHECKS))
_ZERO_BYTES = -(-_ZERO.bit_length() // 8)
_OTHERS = tuple(row for row in CHECKS if not row.zero)
_HOST = Host()


def check(vmcb: Vmcb, host: Host = _HOST) -> list[Failure]:
    """Every check that the VMCB fails, in the order of the tables; none if the guest may enter."""
    some = int.from_bytes(vmcb.view[:_ZERO_BYTES], "little") & _ZERO
    return [row.failure(vmcb) for row in (CHECKS if some else _OTHERS) if not row.holds(vmcb, host)]
