"""What each way to run a guest does with each instruction of its kernel: the classification, turned into monitors.

One row an instruction of the classification, one act a mode; what no row says follows from the class. An act claims
which exit the instruction takes, if any, and whether its result is right, so that a test can put every claim to the
machines: this is a table of facts, not of intentions. For faults and for what a monitor does on its own account
there is a second table, by the reason of the exit.

The hard part is what "the mode" does where that depends on the state: an act is what happens in the kernel, in ring 0
as it believes, with the guest's own descriptor tables in force and no interrupt waiting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vmm.isa.row import Row, Trap

NATIVE, TRAP, BT, HVM, PV = "native", "trap", "bt", "hvm", "pv"
WAYS = (NATIVE, TRAP, BT, HVM, PV)


@dataclass(frozen=True, slots=True)
class Act:
    """What a mode does: in words; the exit, by how its reason begins, "" for none; whether the result is `wrong`."""

    text: str
    exit: str = ""
    wrong: bool = False


def acts_of(row: Row | None) -> dict[str, Act]:
    """What each mode does with an instruction of this row; None: one in no row."""
    if row is None:
        return dict.fromkeys(WAYS, _EXECUTES)
    return _of_class(row) | _ROWS.get(row.name, {})


def acts_upon(reason: str) -> dict[str, Act] | None:
    """What each mode does about an exit of this reason, where that is not the instruction's own doing; else None."""
    return next((acts for start, acts in _REASONS.items() if reason.startswith(start)), None)


INTERCEPTED = Act("intercepted, since that was asked for: an exit, and then what the CPU would have done", "VMEXIT_")

_EXECUTES = Act("executes")
_NO_SUCH = Act("#UD, as in every mode: this processor does not have it", "exception #UD")
_OWN_RING = Act("executes in the guest's own ring 0, not intercepted")
_DEVICE = "reaches the device, which is in the machine: an exit in every mode"
_BY_MACHINE = "executed by the machine: the CPU engine has it wrong"


def _of_class(row: Row) -> dict[str, Act]:
    """What follows from the class alone."""
    if row.needs:
        return dict.fromkeys(WAYS, _NO_SUCH)
    if not row.sensitive:
        return dict.fromkeys(WAYS, _EXECUTES)
    if row.trap is Trap.NEVER:
        return {
            NATIVE: _EXECUTES,
            TRAP: Act("executes in ring 1, silently, on the real state: wrong", wrong=True),
            BT: Act("call-out: the translation exits, and the monitor emulates it", "call-out"),
            HVM: _OWN_RING,
            PV: Act("the source does without"),
        }
    trapped = Act("#GP in ring 1, emulated by the monitor", "emulated")
    return {
        NATIVE: _EXECUTES,
        TRAP: trapped,
        BT: replace(trapped, text="copied into the cache: #GP there, emulated"),
        HVM: _OWN_RING,
        PV: Act("#GP in ring 1, emulated by the hypervisor", "emulated"),
    }


def _everywhere(text: str, reason: str) -> dict[str, Act]:
    return dict.fromkeys(WAYS, Act(text, reason))


def _hypercall(name: str, text: str) -> Act:
    return Act(f"hypercall {name}: {text}", f"hypercall {name}")


_RIGHT = Act("executes in ring 1, on the guest's own value: right")
_SHADOWED = "executes; the first use of a descriptor faults, and the shadow table gets it"
_LOADS = {
    TRAP: Act(_SHADOWED, "hidden fault"),
    BT: Act("in the cache: " + _SHADOWED, "hidden fault"),
    PV: Act("executes: the guest's descriptor tables are the real ones"),
}
_FAR_POINTER = {TRAP: Act(_SHADOWED, "hidden fault"), PV: Act("executes: the tables are the real ones")}
_STACK_LOAD = {
    TRAP: Act("RPL 0 faults in ring 1: #GP, emulated", "emulated"),
    PV: Act("executes, with the flat selectors of ring 1"),
}
_IN_CACHE = "in the cache: a few instructions on virtual state, no exit"
_KEEPS = "copied: the register holds the guest's own value, for the monitor has no use for it"
_LOOKED_UP = {TRAP: Act("executes on the shadow table: right, while that is up to date"), PV: _EXECUTES}
_INT = {
    NATIVE: Act("through the guest's IDT, delivered by the machine", "INT"),
    TRAP: Act("through the monitor's IDT: an exit, and delivered through the guest's", "INT"),
    BT: Act("through the monitor's IDT: an exit, and delivered through the guest's", "INT"),
    HVM: Act("through the guest's own IDT, not intercepted; delivered by the machine", "INT"),
    PV: Act("through the table of set_trap_table", "INT"),
}
_STRING = _everywhere("executed by the machine, port by port", "instruction")
_BY_ENGINE = {NATIVE: Act(_BY_MACHINE, "instruction"), HVM: Act(_BY_MACHINE + "; not intercepted", "instruction")}
_FLAG = Act("a store to evtchn_upcall_mask, no exit")
_BY_HOOK = Act(_DEVICE + "; here by a hook, for the I/O permission map does nothing", "VMEXIT_IOIO")
_NO_DEVICES = Act("no devices, but for ports passed through: the console is a ring or console_io, time an event")
_NOT_EMULATED = Act("#GP, which the guest gets: Xen emulates no such thing", "exception #GP")
_EMULATED = Act("emulated by the hypervisor, after #GP", "emulated")

_ROWS: dict[str, dict[str, Act]] = {
    "SGDT": {BT: Act(_IN_CACHE)},
    **{name: {BT: Act(_KEEPS)} for name in ("SIDT", "SLDT", "STR", "SMSW")},
    "PUSHF": {BT: Act("in the cache: pushes the flags with the virtual IF"), PV: Act("reads evtchn_upcall_mask")},
    "POPF": {BT: Act("in the cache: sets the virtual IF; exits only if an interrupt waits"), PV: _FLAG},
    "LAR": {PV: _EXECUTES},
    "LSL": {PV: _EXECUTES},
    "VERR": _LOOKED_UP,
    "VERW": _LOOKED_UP,
    "PUSH CS, SS": {BT: Act(_IN_CACHE), PV: Act("executes, and the kernel knows that it is in ring 1")},
    "MOV from CS, SS": {BT: Act(_IN_CACHE), PV: Act("executes, and the kernel knows that it is in ring 1")},
    "MOV to SS": _STACK_LOAD,
    "POP SS": _STACK_LOAD,
    "LSS": _STACK_LOAD,
    "MOV to DS, ES, FS, GS": _LOADS,
    "POP DS, ES, FS, GS": _LOADS,
    **dict.fromkeys(("LDS", "LES", "LFS", "LGS"), _FAR_POINTER),
    "CALL far": {
        TRAP: Act("executes, and pushes a CS with RPL 1: wrong", "hidden fault", wrong=True), PV: _EXECUTES,
    },
    "JMP far": {TRAP: Act(_SHADOWED, "hidden fault"), PV: _EXECUTES},
    "RET far": {TRAP: Act("RPL 0 faults in ring 1: #GP, emulated", "emulated"), PV: _EXECUTES},
    "IRET": {
        TRAP: Act(
            "to the kernel: #GP, emulated; to a process: executes, and IF stays as it is: wrong", "emulated"
        ),
        BT: Act("call-out at first, then in the cache", "call-out"),
        PV: Act("hypercall iret, or none, where the mask need not change", "hypercall iret"),
    },
    "INT n": _INT,
    "INT3": _INT,
    "INTO": _INT,
    "INT1": _everywhere("raises #DB, by the machine: the CPU engine does not know it", "instruction"),
    "SYSENTER": {
        **_everywhere("by the guest's MSRs, in a hook of the CPU engine", "SYSENTER"),
        PV: Act("not used: a process enters the kernel by INT"),
    },
    "CPUID": {
        **_everywhere("shows the machine's processor, in a hook of the CPU engine", "CPUID"),
        PV: Act("behind Xen's forced emulation prefix: #UD, emulated", "emulated"),
    },
    "RDTSC": _everywhere("reads guest time, in a hook of the CPU engine", "RDTSC"),
    "IN": {**_everywhere(_DEVICE, "IN"), HVM: _BY_HOOK, PV: _NO_DEVICES},
    "OUT": {**_everywhere(_DEVICE, "OUT"), HVM: _BY_HOOK, PV: _NO_DEVICES},
    "INS": _STRING,
    "OUTS": _STRING,
    "CLI": {BT: Act("in the cache: a store to the virtual IF, no exit"), PV: _FLAG},
    "STI": {
        BT: Act("in the cache: a store to the virtual IF; exits if an interrupt may be waiting", "call-out"),
        PV: Act("a store to evtchn_upcall_mask; a hypercall if an event waits"),
    },
    "HLT": {
        NATIVE: Act("sleeps until a device interrupts", "hlt"),
        HVM: Act("intercepted: the guest sleeps", "VMEXIT_HLT"),
        PV: _hypercall("sched_op", "block"),
    },
    "LGDT": {PV: _hypercall("set_gdt", "the frames of the table, which become read-only")},
    "LIDT": {PV: _hypercall("set_trap_table", "a list of handlers")},
    "LLDT": {PV: _hypercall("mmuext_op", "SET_LDT")},
    "LTR": {**_BY_ENGINE, PV: _hypercall("stack_switch", "where the kernel's stack is")},
    "CLTS": {PV: _hypercall("fpu_taskswitch", "TS as told")},
    "MOV CR": {
        NATIVE: Act("executes; to CR0 and CR4 by the machine: the CPU engine takes any value"),
        BT: Act("reads: in the cache; writes: #GP there, emulated", "emulated"),
        HVM: Act("executes: the CPU's own registers, and nested page tables below the guest's"),
        PV: _hypercall("mmuext_op", "NEW_BASEPTR for CR3; CR0.TS by fpu_taskswitch"),
    },
    "MOV DR": {**_BY_ENGINE, PV: _hypercall("set_debugreg", "checked")},
    "INVLPG": {
        HVM: Act("executes: it is the guest's own TLB"),
        PV: _hypercall("mmuext_op", "INVLPG, or a flag of update_va_mapping"),
    },
    **{name: {PV: _NOT_EMULATED} for name in ("LMSW", "INVD", "SYSEXIT")},
    "RDPMC": dict.fromkeys(WAYS, _NO_SUCH),
    "RDMSR": {**_BY_ENGINE, PV: _EMULATED},
    "WRMSR": {**_BY_ENGINE, PV: _EMULATED},
    "VMRUN": {HVM: Act("intercepted, and #UD: no nested virtualization", "VMEXIT_")},
    "UD": _everywhere("#UD, delivered to the guest", "exception #UD"),
}  # fmt: skip

_DELIVERED = "an exit, and delivered through the guest's IDT"


def _upon(native: str, monitor: str, hvm: str, pv: str) -> dict[str, Act]:
    texts = (native, monitor, monitor, hvm, pv)
    return {way: Act(text) for way, text in zip(WAYS, texts, strict=True)}


_TRANSLATORS = {way: Act("executes") for way in WAYS} | {
    BT: Act("the translator's own, once for each way: finds or makes the target's translation")
}
# By how the reason of an exit begins, the first that fits.
_REASONS: dict[str, dict[str, Act]] = {
    "exception": _upon(
        "a fault of the guest's own: delivered through its IDT",
        "a fault of the guest's own: " + _DELIVERED,
        "a fault of the guest's own: not intercepted, delivered through its IDT",
        "a fault of the guest's own: handed to the handler of set_trap_table",
    ),
    "hidden fault": _upon(
        "no fault: the page tables and descriptors are the real ones",
        "a fault that the guest never sees: the monitor's shadow of its tables has to follow",
        "no fault: the CPU walks the guest's own tables",
        "no fault: a hypercall has changed the real tables before",
    ),
    "VMEXIT_NPF": _upon(
        "no fault: there is one set of page tables",
        "the shadow tables are filled, with or without an exit",
        "a nested page fault: the first use of a frame, or its other use as code or data",
        "no fault: the page tables are the real ones",
    ),
    "hypercall": _upon(
        "there is nobody to ask: the build for the machine does it by instructions of its own",
        "as on the machine; what is privileged of it exits",
        "as on the machine; what is intercepted of it exits",
        "asks the hypervisor, which checks and does it: one exit",
    ),
    "link followed": _TRANSLATORS,
    "look-up missed": _TRANSLATORS,
    "return missed": _TRANSLATORS,
    "changed code": _TRANSLATORS,
    "kernel code not translated": _TRANSLATORS,
}
