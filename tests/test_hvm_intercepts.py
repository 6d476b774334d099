"""Intercepts that were asked for: each is seen, under its own name, and changes nothing for the guest."""

from __future__ import annotations

import pytest

from tests.guest_expectations import EXPECTATIONS, Expectation
from tests.machines import PAGES, Lab, enable_paging, lab
from vmm.image.load import load_image
from vmm.isa.vectors import Vector
from vmm.machine.clock import HostClock
from vmm.monitor.hardware.exits import ExitCode
from vmm.monitor.hardware.intercepts import MISC, NAMES
from vmm.vm import MemoryVirtualization, VirtualMachine, hardware

LIMIT = 60
SVM = {
    "vmrun": 0xD8,
    "vmmcall": 0xD9,
    "vmload": 0xDA,
    "vmsave": 0xDB,
    "stgi": 0xDC,
    "clgi": 0xDD,
    "skinit": 0xDE,
}
SVM |= {"invlpga": 0xDF}
EVERY_RING = (
    "vmmcall",
    "skinit",
)  # this CPU looks at the intercept before the ring, so a process gets here, too

# By name: what makes the exit in ring 0. What needs no privilege makes it in ring 3, too; the others are #GP there.
UNPRIVILEGED = {
    "idtr-read": "sidt [DATA]",
    "gdtr-read": "sgdt [DATA]",
    "ldtr-read": "sldt eax",
    "tr-read": "str eax",
    "rdtsc": "rdtsc",
    "rdpmc": "xor ecx, ecx\n rdpmc",
    "pushf": "stc\n pushfd\n pop eax",
    "popf": "push dword 0x8D5\n popfd",
    "cpuid": "mov eax, 1\n cpuid",
    "iret": "pushfd\n push cs\n push dword .on\n iretd\n.on:",
    "swint": "int 0x41",
    "pause": "pause",
    "rsm": "db 0x0F, 0xAA",
    "smsw": "smsw eax",
    "ioio": "in al, 0x80",
}
PRIVILEGED = {
    "idtr-write": "sidt [DATA]\n lidt [DATA]",
    "gdtr-write": "sgdt [DATA]\n lgdt [DATA]",
    "ldtr-write": "mov eax, 0x30\n lldt ax",
    "tr-write": "mov eax, 0x28\n ltr ax",
    "invd": "db 0x0F, 0x08",
    "wbinvd": "wbinvd",
    "hlt": "hlt",
    "invlpg": "invlpg [DATA]",
    "msr-read": "mov ecx, 0x175\n rdmsr",
    "msr-write": "mov ecx, 0x175\n wrmsr",
    "lmsw": "smsw eax\n lmsw ax",
    "clts": "clts",
    **{f"cr{n}-read": f"mov eax, cr{n}" for n in (0, 2, 3, 4)},
    **{f"cr{n}-write": f"mov eax, cr{n}\n mov cr{n}, eax" for n in (0, 2, 3, 4)},
    **{f"dr{n}-read": f"mov eax, dr{n}" for n in range(8)},
    **{f"dr{n}-write": f"mov eax, 0x402\n mov dr{n}, eax" for n in range(8)},
    **{name: f"db 0x0F, 0x01, {byte}" for name, byte in SVM.items()},
}
EXCEPTIONS = {
    "de": "xor ecx, ecx\n div ecx",
    "db": "pushfd\n or dword [esp], 0x100\n popfd\n nop\n nop",
    "bp": "int3",
    "of": "mov al, 0x7F\n add al, 1\n into",
    "br": "mov dword [DATA], 1\n mov dword [DATA + 4], 2\n mov eax, 5\n bound eax, [DATA]",
    "ud": "ud2",
    "nm": "mov eax, cr0\n or al, 8\n mov cr0, eax\n fninit",
    "np": "mov eax, 0x50\n mov ds, eax",
    "gp": "mov eax, 0xFF\n mov ds, eax",
    "pf": "mov eax, [0x170000]",
    "mf": (
        "mov eax, cr0\n or al, 0x20\n mov cr0, eax\n fninit\n mov dword [DATA], 0x360\n fldcw [DATA]\n fldz\n"
        " fld1\n fdiv st0, st1\n fwait\n fwait"
    ),
}
WITHOUT_RING_3 = ("nm", "mf", "np")  # they need the kernel first
# Exits that come under another name than what was asked for: the register that is touched, the event's number.
CODES = {"smsw": "CR0_READ", "lmsw": "CR0_WRITE", "clts": "CR0_WRITE", "msr-read": "MSR", "msr-write": "MSR"}
CODES |= {word: f"EXCP{vector}" for word, vector in zip(
    EXCEPTIONS, (0, 1, 3, 4, 5, 6, 7, 11, 13, 14, 16), strict=True
)}  # fmt: skip
BY_HOOK = {"bp": "VMEXIT_EXCP3 (by hook)", "of": "VMEXIT_EXCP4 (by hook)", "ioio": "VMEXIT_IOIO IN (by hook)"}
# Without paging there is no page fault.
ABSENT = enable_paging({0x170000: 0})
PAGING = f"mov eax, {PAGES}\n mov cr3, eax\n mov eax, cr0\n or eax, 0x80000000\n mov cr0, eax\n"
# Names that stand for several, and what this guest cannot bring about.
GROUPS = {
    "cr",
    "dr",
    "exceptions",
    "msr",
    "all",
    *(f"cr{n}" for n in (0, 2, 3, 4)),
    *(f"dr{n}" for n in range(8)),
}
GROUPS |= {"cr-read", "cr-write", "dr-read", "dr-write"}
SYNONYMS = {
    "sidt",
    "sgdt",
    "sldt",
    "str",
    "lidt",
    "lgdt",
    "lldt",
    "ltr",
    "rdmsr",
    "wrmsr",
    "int",
    "in",
    "out",
}
NEVER = {
    "shutdown",  # a triple fault: the machine's own deliveries see it first
    "df", "ts", "ss", "ac", "xm", "mc",  # of the machine's own deliveries and checks, or not raised by this engine
}  # fmt: skip

SNIPPETS = {**UNPRIVILEGED, **PRIVILEGED, **EXCEPTIONS}


def run(code: str, ring: int, asked: str | None, how: MemoryVirtualization = "nested") -> Lab:
    """`code` in `ring`, bare if nothing is asked."""
    source = (
        f"{PAGING if 'x170000' in code else ''}{'to_user' if ring else ''}\n{code}\n nop\n inc ebx\n int 0x40"
    )
    attach = None if asked is None else hardware(asked, how)
    made = lab(source, "native" if asked is None else "hvm", attach=attach, memory=ABSENT)
    made.run(LIMIT)
    return made


def counts(made: Lab) -> dict[str, int]:
    """Exits, but for those of memory."""
    ours = ("VMEXIT_NPF", "hidden fault")
    return {name: row.count for name, row in made.machine.exits.rows.items() if not name.startswith(ours)}


def exit_of(name: str) -> str:
    """The row that this intercept has to bring."""
    return BY_HOOK.get(name) or f"VMEXIT_{CODES.get(name, name.upper().replace('-', '_'))}"


def test_every_name_is_tried() -> None:
    """What can be asked for is below, stands for what is, or is said never to come."""
    assert SNIPPETS.keys() | GROUPS | SYNONYMS | NEVER == NAMES.keys()


@pytest.mark.parametrize("how", ("nested", "shadow"))
@pytest.mark.parametrize("ring", (0, 3))
@pytest.mark.parametrize("name", SNIPPETS)
def test_an_intercept_is_seen_and_changes_nothing(name: str, ring: int, how: MemoryVirtualization) -> None:
    """Registers, memory and time are the bare machine's, and the exit is counted under its name where it is due."""
    code = SNIPPETS[name]
    if ring and name in WITHOUT_RING_3:
        code = EXCEPTIONS["gp"]
    bare, made = run(code, ring, None), run(code, ring, name, how)
    assert made.everything() == bare.everything()
    rows = counts(made)
    due = name in UNPRIVILEGED or name in EXCEPTIONS or not ring or name in EVERY_RING
    if ring and name == "ioio":
        assert made.vector == Vector.GP, "IOPL is 0"
    if ring and name in WITHOUT_RING_3:
        due = False
    expected = {"iret": 2 if ring else 1}.get(name, 1)
    exit_name = exit_of(name) + (" (by hook)" if name == "pf" and how == "shadow" else "")
    assert rows.get(exit_name, 0) == (expected if due else 0), rows
    if not due and ring:
        assert made.vector == (Vector.UD if name in SVM else Vector.GP)


@pytest.mark.parametrize("name", sorted(SNIPPETS))
def test_what_is_not_asked_for_does_not_come(name: str) -> None:
    """With the least of intercepts an instruction makes no exit of this kind, unless it is among the least."""
    rows = counts(run(SNIPPETS[name], 0, ""))
    contains = name in (*SVM, "hlt", "ioio") and name != "vmmcall"
    assert (exit_of(name) in rows) == contains, rows


@pytest.mark.parametrize(("name", "code"), [("invd", "wbinvd"), ("swint", "int3")])
def test_what_this_cpu_cannot_tell_apart(name: str, code: str) -> None:
    """WBINVD exits with INVD, and INT3 with INT n; each is counted as what the CPU says, and still done."""
    bare, made = run(code, 0, None), run(code, 0, name)
    assert made.everything() == bare.everything()
    assert {"wbinvd": "VMEXIT_WBINVD", "int3": "VMEXIT_SWINT"}[code] in counts(made)


def test_int_3_is_no_breakpoint() -> None:
    """An intercept of #BP is for INT3 and not for INT 3, of #OF for INTO and not for INT 4."""
    for code in ("db 0xCD, 3", "db 0xCD, 4"):
        assert not [row for row in counts(run(code, 0, "bp,of")) if row.startswith("VMEXIT")]


def test_no_row_promises_what_nobody_does() -> None:
    """Every miscellaneous intercept that can be asked for has a snippet, or never comes."""
    for code, row in MISC.items():
        if row.name in NAMES:
            assert row.name in SNIPPETS or row.name in NEVER or code == ExitCode.VMEXIT_MSR


# One instruction without intercepts


@pytest.mark.parametrize("name", ("pushf", "sgdt", "pause"))
def test_an_intercept_holds_with_the_cpu_running_uncounted(name: str) -> None:
    """With the host's clock and interrupts off no block is counted; the second exit comes all the same."""
    code = {"pushf": "pushfd\n pop eax", "sgdt": "sgdt [DATA]", "pause": "pause"}[name]
    made = lab(f"{code}\n nop\n {code}\n mov ecx, 100\nmore:   loop more\n {code}\n hlt", "hvm",
               attach=hardware(name), clock=HostClock())  # fmt: skip
    made.machine.run(free=True)
    assert counts(made)[exit_of({"sgdt": "gdtr-read"}.get(name, name))] == 3


def test_a_store_to_nowhere_with_the_cpu_running_uncounted() -> None:
    """What one instruction is executed apart for is over after it, uncounted or not."""
    made = lab("mov dword [0xE0000000], 1\n inc ebx\n mov eax, [0xE0000000]\n hlt", "hvm", clock=HostClock())
    outcome = made.machine.run(free=True)
    assert (outcome.kind, made.reg("eax"), made.reg("ebx")) == ("halt", 0xFFFFFFFF, 1)


@pytest.mark.parametrize("asked", ("pushf", "all"))
def test_letting_one_instruction_through_lets_no_other_through(asked: str) -> None:
    """While an intercept is lifted for one instruction, those that contain the guest stay in force."""
    made = lab(
        "pushfd\n pop eax\n mov eax, 0x110000\n db 0x0F, 0x01, 0xDB\n nop", "hvm", attach=hardware(asked)
    )
    before = made.data(0x110000, 0x1000)
    made.run(20)
    assert made.vector == Vector.UD
    assert made.data(0x110000, 0x1000) == before


# Whole guests

SHORT = {"processes", "user", "faults", "paging", "smc", "threads", "pushf", "redpill", "apic"}


@pytest.mark.parametrize("how", ("all", "shadow", "all, shadow"))
@pytest.mark.parametrize("expectation", [e for e in EXPECTATIONS if e.guest in SHORT], ids=str)
def test_whole_guests_do_not_notice(expectation: Expectation, how: str) -> None:
    """With every intercept, with shadow page tables, and with both, a guest ends as on the bare machine."""
    image = load_image(expectation.path, memory=16 << 20, defines=expectation.defines)
    attach = hardware("all" if "all" in how else "", "shadow" if "shadow" in how else "nested")
    results = [
        VirtualMachine(
            image, mode, attach=way, console_input=expectation.input, model=expectation.model
        ).run(50_000_000)
        for mode, way in (("native", None), ("hvm", attach))
    ]
    for name in ("outcome", "instructions", "console", "memory_sha256", "registers"):
        assert getattr(results[0], name) == getattr(results[1], name), name
