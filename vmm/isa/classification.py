"""The classification of x86: one row for each instruction that touches the system.

Popek and Goldberg (1974) ask two questions of every instruction. Is it *privileged*: does it trap in user
mode, and not in supervisor mode, for the same state (memory traps aside)? Is it *sensitive*: can it change
the resources that a monitor must own (control-sensitive), or does its result depend on the mode
(mode-bound) or on those resources (location-bound)? What is sensitive and not privileged is *critical*: a
monitor that only waits for traps never hears of it. What is in no row is innocuous.

The hard part is that x86 does not answer with yes and no (see `vmm.isa.row`), and that the forms of one
mnemonic differ in class. The table states the manual; `vmm.census` puts it to the processor.

Sources: Intel SDM volumes 2 (each instruction's page) and 3A; AMD APM volume 3 for AMD's own; J. S. Robin
and C. E. Irvine, "Analysis of the Intel Pentium's Ability to Support a Secure Virtual Machine Monitor",
USENIX Security 2000, for the seventeen.
"""

from __future__ import annotations

from vmm.isa.row import PAPER_PROTECTION, PAPER_REGISTERS, Row, Trap


def _row(
    name: str, forms: str, keys: str, trap: Trap, kinds: str, *texts: str, needs: str = "", entry: str = ""
) -> Row:
    """`keys` by spaces; `kinds` of c (control), m (mode), l (location); then reason, effect, source."""
    reason, effect, source = texts
    flags = ("c" in kinds, "m" in kinds, "l" in kinds)
    return Row(
        name, forms, tuple(keys.split()), trap, reason, effect, source, *flags, needs=needs, entry=entry
    )


_CHECKS = (
    "The checks and the new CPL come from the real tables and the real ring, so it goes wrong without a trap."
)
_HIDDEN = "It loads a hidden descriptor from the real table, after a check against the real CPL."

# Sensitive, and silent outside ring 0.
_CRITICAL = (
    _row(
        "SGDT", "SGDT m", "0F01/0m", Trap.NEVER, "l",
        "It shows the real GDTR, which is the monitor's.",
        "It should have stored the guest's own GDTR; it stored the one that the monitor loaded.",
        PAPER_REGISTERS,
    ),
    _row(
        "SIDT", "SIDT m", "0F01/1m", Trap.NEVER, "l",
        "It shows the real IDTR, which is the monitor's.",
        "It should have stored the guest's own IDTR; it stored the one that the monitor loaded.",
        PAPER_REGISTERS,
    ),
    _row(
        "SLDT", "SLDT r/m", "0F00/0", Trap.NEVER, "l",
        "It shows the real LDTR, which is the monitor's.",
        "It should have stored the guest's own LDT selector; it stored the real one.",
        PAPER_REGISTERS,
    ),
    _row(
        "SMSW", "SMSW r/m", "0F01/4", Trap.NEVER, "l",
        "It shows the low bits of the real CR0, the privileged MOV from CR0 notwithstanding.",
        "It should have stored the guest's own CR0 (PE, MP, EM, TS); it stored bits of the real one.",
        PAPER_REGISTERS,
    ),
    _row(
        "PUSHF", "PUSHF, PUSHFD", "9C", Trap.NEVER, "l",
        "It shows the real IF and IOPL, which are the monitor's.",
        "It should have pushed the guest's own IF and IOPL; it pushed those of the real EFLAGS.",
        PAPER_REGISTERS,
    ),
    _row(
        "POPF", "POPF, POPFD", "9D", Trap.NEVER, "cm",
        "It changes IF and IOPL in ring 0 and quietly leaves them outside it.",
        "In ring 0 it loads IF and IOPL; in an outer ring it leaves IOPL and, with CPL > IOPL, IF"
        " unchanged, silently.",
        PAPER_REGISTERS,
    ),
    _row(
        "LAR", "LAR r, r/m", "0F02", Trap.NEVER, "ml",
        "Whether it succeeds depends on CPL, and what it reads is the real descriptor table.",
        "It should have read the access rights as ring 0 may; outside ring 0 it clears ZF for a DPL below"
        " CPL.",
        PAPER_PROTECTION,
    ),
    _row(
        "LSL", "LSL r, r/m", "0F03", Trap.NEVER, "ml",
        "Whether it succeeds depends on CPL, and what it reads is the real descriptor table.",
        "It should have read the limit as ring 0 may; outside ring 0 it clears ZF for a DPL below CPL.",
        PAPER_PROTECTION,
    ),
    _row(
        "VERR", "VERR r/m", "0F00/4", Trap.NEVER, "ml",
        "Whether a segment counts as readable depends on CPL.",
        "It should have said what ring 0 may read; outside ring 0 it clears ZF for a DPL below CPL.",
        PAPER_PROTECTION,
    ),
    _row(
        "VERW", "VERW r/m", "0F00/5", Trap.NEVER, "ml",
        "Whether a segment counts as writable depends on CPL.",
        "It should have said what ring 0 may write; outside ring 0 it clears ZF for a DPL below CPL.",
        PAPER_PROTECTION,
    ),
    _row(
        "STR", "STR r/m", "0F00/1", Trap.NEVER, "l",
        "It shows the real task register, which is the monitor's.",
        "It should have stored the guest's own TSS selector; it stored the real one.",
        PAPER_PROTECTION,
    ),
    _row(
        "PUSH CS, SS", "PUSH CS; PUSH SS", "0E 16", Trap.NEVER, "m",
        "The low two bits of CS and SS are the real CPL.",
        "It should have pushed a selector with RPL 0; it pushed one that shows the real ring.",
        PAPER_PROTECTION, entry="PUSH",
    ),
    _row(
        "MOV from CS, SS", "MOV r/m, CS; MOV r/m, SS", "8C/1 8C/2", Trap.NEVER, "m",
        "The low two bits of CS and SS are the real CPL.",
        "It should have stored a selector with RPL 0; it stored one that shows the real ring.",
        PAPER_PROTECTION, entry="MOV",
    ),
    _row(
        "MOV to SS", "MOV SS, r/m", "8E/2", Trap.NEVER, "cml",
        _HIDDEN + " SS demands that RPL and DPL equal CPL.",
        "It should have loaded a stack segment of ring 0; outside ring 0 that faults, and one of the real"
        " ring is accepted.",
        PAPER_PROTECTION, entry="MOV",
    ),
    _row(
        "MOV to DS, ES, FS, GS", "MOV Sreg, r/m", "8E/0 8E/3 8E/4 8E/5", Trap.NEVER, "cl",
        _HIDDEN,
        "It should have loaded the guest's own descriptor; it loaded the real table's, or faulted where CPL"
        " is above DPL.",
        PAPER_PROTECTION, entry="MOV",
    ),
    _row(
        "POP SS", "POP SS", "17", Trap.NEVER, "cml",
        _HIDDEN + " SS demands that RPL and DPL equal CPL.",
        "It should have loaded a stack segment of ring 0; outside ring 0 that faults, and one of the real"
        " ring is accepted.",
        PAPER_PROTECTION, entry="POP",
    ),
    _row(
        "POP DS, ES, FS, GS", "POP Sreg", "07 1F 0FA1 0FA9", Trap.NEVER, "cl",
        _HIDDEN,
        "It should have loaded the guest's own descriptor; it loaded the real table's, or faulted where CPL"
        " is above DPL.",
        PAPER_PROTECTION, entry="POP",
    ),
    _row(
        "CALL far", "CALL ptr16:32; CALL m16:32", "9A FF/3m", Trap.NEVER, "cml",
        "It changes CS, and through a gate the ring and the stack, by the real tables, and pushes CS. "
        + _CHECKS,
        "It should have gone to the guest's segment in the guest's ring and pushed a CS with RPL 0.",
        PAPER_PROTECTION, entry="CALL",
    ),
    _row(
        "JMP far", "JMP ptr16:32; JMP m16:32", "EA FF/5m", Trap.NEVER, "cml",
        "It changes CS by the real tables, with checks against the real CPL. " + _CHECKS,
        "It should have gone to the guest's segment in the guest's ring; outside ring 0 the segments of"
        " ring 0 are refused and those of the real ring accepted.",
        PAPER_PROTECTION, entry="JMP",
    ),
    _row(
        "RET far", "RETF; RETF imm16", "CA CB", Trap.NEVER, "cml",
        "It changes CS, and towards an outer ring SS too, by the real tables and the real CPL. " + _CHECKS,
        "It should have returned in the guest's ring; whether it changes stacks depends on the real CPL.",
        PAPER_PROTECTION, entry="RET",
    ),
    _row(
        "INT n", "INT imm8", "CD", Trap.NEVER, "cml",
        "It goes through the real IDT, by a gate whose DPL is compared with the real CPL.",
        "It should have gone through the guest's IDT. The real IDT is the monitor's, so the monitor gets"
        " control either way and can deliver it.",
        PAPER_PROTECTION, entry="INT",
    ),
    _row(
        "INT3", "INT3", "CC", Trap.NEVER, "cml",
        "As INT n, through the real IDT's gate 3.",
        "It should have gone through the guest's IDT. The monitor gets control and can deliver it.",
        "SDM 2A, INT n/INTO/INT3/INT1",
    ),
    _row(
        "INTO", "INTO", "CE", Trap.NEVER, "cml",
        "As INT n, through the real IDT's gate 4, when OF is set.",
        "It should have gone through the guest's IDT. The monitor gets control and can deliver it.",
        "SDM 2A, INT n/INTO/INT3/INT1",
    ),
    _row(
        "INT1", "INT1 (ICEBP)", "F1", Trap.NEVER, "cl",
        "It raises #DB through the real IDT without a check of the gate's DPL.",
        "It should have gone through the guest's IDT. The monitor gets control and can deliver it.",
        "SDM 2A, INT n/INTO/INT3/INT1",
    ),
    _row(
        "IRET", "IRET, IRETD", "CF", Trap.NEVER, "cml",
        "It loads CS, EFLAGS and, towards an outer ring, SS; IF and IOPL only as far as the real CPL"
        " allows. A return to an outer ring does not trap and does not restore IF.",
        "In ring 0 it loads IF and IOPL; in an outer ring it leaves IOPL and, with CPL > IOPL, IF"
        " unchanged, silently.",
        "SDM 2A, IRET (beside Robin and Irvine's seventeen)",
    ),
    *(
        _row(
            f"L{segment}S", f"L{segment}S r, m16:32", key, Trap.NEVER, "cml" if segment == "S" else "cl",
            _HIDDEN,
            "It should have loaded the guest's own descriptor; it loaded the real table's, or faulted where"
            " the real CPL did not allow it.",
            "SDM 2A, LDS/LES/LFS/LGS/LSS (as MOV to a segment register)",
        )
        for segment, key in (("D", "C5m"), ("E", "C4m"), ("S", "0FB2m"), ("F", "0FB4m"), ("G", "0FB5m"))
    ),
    _row(
        "SYSENTER", "SYSENTER", "0F34", Trap.NEVER, "cl",
        "It enters ring 0 by the real MSRs from any ring. A monitor that leaves IA32_SYSENTER_CS zero makes"
        " it fault, in every ring.",
        "It should have entered the guest's kernel by the guest's IA32_SYSENTER MSRs, with IF clear.",
        "SDM 2B, SYSENTER",
    ),
    _row(
        "SYSCALL", "SYSCALL", "0F05", Trap.NEVER, "cl",
        "Where EFER.SCE is set it enters ring 0 by the real STAR from any ring.",
        "It should have entered the guest's kernel by the guest's STAR, with IF clear.",
        "AMD APM 3, SYSCALL", needs="EFER.SCE",
    ),
    _row(
        "CPUID", "CPUID", "0FA2", Trap.NEVER, "l",
        "It shows the real processor.",
        "It should have shown the processor that the guest is given.",
        "SDM 2A, CPUID",
    ),
    _row(
        "XGETBV", "XGETBV", "0F01D0", Trap.NEVER, "l",
        "It shows the real XCR0, which only the privileged XSETBV may write.",
        "It should have shown the guest's own XCR0.",
        "SDM 2C, XGETBV", needs="CR4.OSXSAVE",
    ),
)  # fmt: skip


def _privileged(name: str, forms: str, keys: str, kinds: str, *texts: str, needs: str = "") -> Row:
    reason, effect, source = texts
    effect += " Outside ring 0 it raises #GP(0)."
    return _row(name, forms, keys, Trap.ALWAYS, kinds, reason, effect, source, needs=needs)


_PRIVILEGED = (
    _privileged(
        "LGDT", "LGDT m", "0F01/2m", "c",
        "It replaces the GDT.", "It loads GDTR.", "SDM 2A, LGDT/LIDT",
    ),
    _privileged(
        "LIDT", "LIDT m", "0F01/3m", "c",
        "It replaces the IDT.", "It loads IDTR.", "SDM 2A, LGDT/LIDT",
    ),
    _privileged("LLDT", "LLDT r/m", "0F00/2", "cl", "It replaces the LDT.", "It loads LDTR.", "SDM 2A, LLDT"),
    _privileged("LTR", "LTR r/m", "0F00/3", "cl", "It replaces the TSS.", "It loads TR.", "SDM 2A, LTR"),
    _privileged(
        "LMSW", "LMSW r/m", "0F01/6", "c", "It changes CR0.", "It loads CR0's PE (set only), MP, EM and TS.",
        "SDM 2A, LMSW",
    ),
    _privileged("CLTS", "CLTS", "0F06", "c", "It changes CR0.", "It clears CR0.TS.", "SDM 2A, CLTS"),
    _privileged(
        "MOV CR", "MOV CR, r32; MOV r32, CR", "0F20 0F22", "cl",
        "It reads or writes a control register: modes, paging, what faults.",
        "It moves a control register.", "SDM 2B, MOV (control registers)",
    ),
    _privileged(
        "MOV DR", "MOV DR, r32; MOV r32, DR", "0F21 0F23", "cl",
        "It reads or writes a debug register.", "It moves a debug register.", "SDM 2B, MOV (debug registers)",
    ),
    _privileged(
        "INVLPG", "INVLPG m", "0F01/7m", "c", "It changes the TLB.", "It drops one page's translations.",
        "SDM 2A, INVLPG",
    ),
    _privileged(
        "INVD", "INVD", "0F08", "c", "It drops the caches, unwritten data too.", "It empties the caches.",
        "SDM 2A, INVD",
    ),
    _privileged(
        "WBINVD", "WBINVD", "0F09", "c",
        "It empties the caches.", "It writes back the caches.", "SDM 2C, WBINVD",
    ),
    _privileged(
        "HLT", "HLT", "F4", "c",
        "It stops the processor.", "It waits for an interrupt.", "SDM 2A, HLT",
    ),
    _privileged(
        "RDMSR", "RDMSR", "0F32", "l",
        "It reads an MSR.", "It reads the MSR in ECX.", "SDM 2B, RDMSR",
    ),
    _privileged(
        "WRMSR", "WRMSR", "0F30", "c",
        "It writes an MSR.", "It writes the MSR in ECX.", "SDM 2C, WRMSR",
    ),
    _privileged(
        "SYSEXIT", "SYSEXIT", "0F35", "cl", "It changes CS, SS and CPL.",
        "It goes to ring 3 by ECX and EDX.", "SDM 2B, SYSEXIT",
    ),
    _privileged(
        "SYSRET", "SYSRET", "0F07", "cl", "It changes CS, SS, CPL and IF.", "It goes to ring 3 by ECX.",
        "AMD APM 3, SYSRET",
        needs="EFER.SCE",
    ),
    _privileged(
        "XSETBV", "XSETBV", "0F01D1", "c", "It changes XCR0.", "It writes XCR0.", "SDM 2C, XSETBV",
        needs="CR4.OSXSAVE",
    ),
    _privileged(
        "XSAVES", "XSAVES m; XRSTORS m", "0FC7/3m 0FC7/5m", "l", "It reads or writes the state of IA32_XSS.",
        "It saves or restores supervisor state.", "SDM 2C, XSAVES, XRSTORS", needs="XSAVES",
    ),
    *(
        _row(
            name, name, key, Trap.ALWAYS, "c", "It stops the processor until memory changes.",
            f"It {does}. Outside ring 0 it raises #UD.", "SDM 2B, MONITOR, MWAIT", needs="MONITOR",
        )
        for name, key, does in (
            ("MONITOR", "0F01C8", "chooses an address"), ("MWAIT", "0F01C9", "waits for a store there"),
        )
    ),
    *(
        _row(
            name, name, key, Trap.ALWAYS, "c", "It opens or closes user pages to the kernel.",
            f"It {does} EFLAGS.AC. Outside ring 0 it raises #UD.", "SDM 2A, CLAC; 2B, STAC", needs="SMAP",
        )
        for name, key, does in (("CLAC", "0F01CA", "clears"), ("STAC", "0F01CB", "sets"))
    ),
    _privileged(
        "VMRUN", "VMRUN; VMLOAD; VMSAVE; CLGI; STGI; SKINIT; INVLPGA",
        "0F01D8 0F01DA 0F01DB 0F01DC 0F01DD 0F01DE 0F01DF", "c",
        "It is AMD's hardware virtualization itself.", "It runs or prepares an SVM guest.",
        "AMD APM 3, VMRUN and others",
        needs="EFER.SVME",
    ),
    _privileged(
        "VMX",
        "VMXON; VMXOFF; VMLAUNCH; VMRESUME; VMPTRLD; VMPTRST; VMCLEAR; VMREAD; VMWRITE; INVEPT; INVVPID",
        "0F01C2 0F01C3 0F01C4 0F78 0F79 0FC7/6m 0FC7/7m 0F3880 0F3881", "c",
        "It is Intel's hardware virtualization itself.", "It runs or prepares a VMX guest.",
        "SDM 3C, chapter 30",
        needs="VMX",
    ),
    _privileged(
        "INVPCID", "INVPCID r, m", "0F3882", "c", "It changes the TLB.", "It drops translations.",
        "SDM 2A, INVPCID", needs="INVPCID",
    ),
    _privileged(
        "ENCLS", "ENCLS; ENCLV; PCONFIG; SETSSBSY; CLRSSBSY; WRUSS",
        "0F01CF 0F01C0 0F01C5 0F01E8 F3.0FAE/6m 0F38F5", "c",
        "It manages enclaves, memory keys or supervisor shadow stacks.", "It does so.",
        "SDM 2 and 3D, each under its name", needs="SGX, PCONFIG or CET",
    ),
    _row(
        "CLI", "CLI", "FA", Trap.IOPL, "c", "It closes the processor to interrupts.",
        "It clears IF; with CPL > IOPL it raises #GP(0), so a monitor keeps the real IOPL 0.", "SDM 2A, CLI",
    ),
    _row(
        "STI", "STI", "FB", Trap.IOPL, "c", "It opens the processor to interrupts.",
        "It sets IF; with CPL > IOPL it raises #GP(0), so a monitor keeps the real IOPL 0.", "SDM 2B, STI",
    ),
    *(
        _row(
            name, forms, keys, Trap.IO, "c", "It reaches a device.",
            "It moves data from or to a port; with CPL > IOPL it raises #GP(0) unless the TSS's I/O bitmap"
            " allows the port.",
            source,
        )
        for name, forms, keys, source in (
            ("IN", "IN AL/eAX, imm8; IN AL/eAX, DX", "E4 E5 EC ED", "SDM 2A, IN"),
            ("OUT", "OUT imm8, AL/eAX; OUT DX, AL/eAX", "E6 E7 EE EF", "SDM 2B, OUT"),
            ("INS", "INSB, INSW, INSD, with or without REP", "6C 6D", "SDM 2A, INS"),
            ("OUTS", "OUTSB, OUTSW, OUTSD, with or without REP", "6E 6F", "SDM 2B, OUTS"),
        )
    ),
    _row(
        "RDTSC", "RDTSC", "0F31", Trap.TSD, "l", "It shows real time.",
        "It reads the time-stamp counter; outside ring 0 it raises #GP(0) when CR4.TSD is set.",
        "SDM 2B, RDTSC",
    ),
    _row(
        "RDTSCP", "RDTSCP", "0F01F9", Trap.TSD, "l", "It shows real time, and the real processor's number.",
        "It reads the time-stamp counter; outside ring 0 it raises #GP(0) when CR4.TSD is set.",
        "SDM 2B, RDTSCP",
        needs="RDTSCP",
    ),
    _row(
        "RDPMC", "RDPMC", "0F33", Trap.PCE, "l", "It shows a performance counter.",
        "It reads the counter in ECX; outside ring 0 it raises #GP(0) when CR4.PCE is clear.",
        "SDM 2B, RDPMC",
    ),
)  # fmt: skip

# In the table because one asks; not sensitive.
_INNOCUOUS = (
    _row(
        "MOV from DS, ES, FS, GS", "MOV r/m, Sreg", "8C/0 8C/3 8C/4 8C/5", Trap.NEVER, "",
        "It gives back the selector that was loaded; unlike CS and SS these hold no CPL.",
        "It stores the selector, the same in every ring.", "SDM 2B, MOV", entry="MOV",
    ),
    _row(
        "PUSH DS, ES, FS, GS", "PUSH Sreg", "06 1E 0FA0 0FA8", Trap.NEVER, "",
        "It gives back the selector that was loaded; unlike CS and SS these hold no CPL.",
        "It pushes the selector, the same in every ring.", "SDM 2B, PUSH", entry="PUSH",
    ),
    _row(
        "BOUND", "BOUND r, m", "62m", Trap.NEVER, "",
        "Its #BR is a fault like a division by zero's: the same in every ring.",
        "It raises #BR outside the bounds.",
        "SDM 2A, BOUND",
    ),
    _row(
        "ARPL", "ARPL r/m, r", "63", Trap.NEVER, "", "It compares the RPL of its operands, not CPL.",
        "It raises the RPL of its operand, the same in every ring.", "SDM 2A, ARPL",
    ),
    _row(
        "UD", "UD0; UD1; UD2", "0FFF 0FB9 0F0B", Trap.NEVER, "", "It raises #UD in every ring.",
        "It raises #UD.", "SDM 2B, UD",
        needs="nothing: it is #UD by definition",
    ),
    _row(
        "RSM", "RSM", "0FAA", Trap.NEVER, "", "Outside system management mode it raises #UD in every ring.",
        "It leaves system management mode.", "SDM 2B, RSM", needs="system management mode",
    ),
    _row(
        "VMCALL", "VMCALL; VMMCALL; VMFUNC", "0F01C1 0F01D9 0F01D4", Trap.NEVER, "",
        "Outside a hardware guest it raises #UD in every ring.",
        "It calls the hypervisor of a hardware guest.",
        "SDM 3C, chapter 30; AMD APM 3, VMMCALL", needs="a hardware guest",
    ),
    _row(
        "GETSEC", "GETSEC", "0F37", Trap.NEVER, "", "Without CR4.SMXE it raises #UD in every ring.",
        "It measures and launches software.", "SDM 2D, chapter 7", needs="CR4.SMXE",
    ),
)  # fmt: skip

TABLE: tuple[Row, ...] = (*_CRITICAL, *_PRIVILEGED, *_INNOCUOUS)

# Robin and Irvine's seventeen, as they count them: VERR and VERW are one.
SEVENTEEN: tuple[str, ...] = (
    *("SGDT", "SIDT", "SLDT", "SMSW", "PUSHF", "POPF"),
    *("LAR", "LSL", "VERR/VERW", "POP", "PUSH", "CALL", "JMP", "INT", "RET", "STR", "MOV"),
)
