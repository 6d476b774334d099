"""Hardware assist: the guest is in a real VMRUN, exits only for what is intercepted, and cannot tell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.equivalence.run import compare
from tests.guest_expectations import EXPECTATIONS
from tests.machines import (
    CODE,
    DATA,
    FREE,
    IDT,
    KERNEL_CODE,
    KERNEL_DATA,
    PAGES,
    PAGING_ON,
    STACK,
    TSS,
    Lab,
    assemble,
    enable_paging,
    encoder,
    gate,
    lab,
)
from tests.test_equivalence import numbered
from vmm.errors import GuestError
from vmm.image.asm import assemble_text
from vmm.image.load import load_image
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.words import CR0, CR4
from vmm.machine.cpu import engine as cpu
from vmm.machine.cpu import layout as at
from vmm.machine.memory import ONES
from vmm.monitor.hardware.checks import CHECKS, check
from vmm.monitor.hardware.host import HOST_SAVE
from vmm.monitor.hardware.injection import EventInjection
from vmm.monitor.hardware.monitor import HardwareMonitor
from vmm.monitor.hardware.nested import NestedTables
from vmm.monitor.hardware.vmcb import SEGMENTS, Segment, Vmcb
from vmm.monitor.hardware.world import Guest, World
from vmm.vm import VirtualMachine, hardware

NX, RW, P = 1 << 63, 1 << 1, 1 << 0


def monitor_of(made: Lab) -> HardwareMonitor:
    assert isinstance(made.control, HardwareMonitor)
    return made.control


def nested_of(made: Lab) -> NestedTables:
    nested = monitor_of(made).nested
    assert nested is not None
    return nested


def rows(made: Lab) -> dict[str, int]:
    return {name: row.count for name, row in made.machine.exits.rows.items()}


def both(source: str, limit: int = 400, **options: object) -> Lab:
    """The same program bare and as a guest: it ends in the same way, with everything the same. The latter."""
    bare, made = (lab(source, mode, **options) for mode in ("native", "hvm"))  # type: ignore[arg-type]
    assert made.run(limit) == bare.run(limit)
    assert made.everything() == bare.everything()
    return made


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every VMRUN from now on: the EVENTINJ that it was given."""
    seen: list[int] = []
    enter = World.enter

    def counted(world: World, event: int = 0) -> bool:
        seen.append(event)
        return enter(world, event)

    monkeypatch.setattr(World, "enter", counted)
    return seen


# A real VMRUN


def test_the_guest_is_in_a_vmrun() -> None:
    """The processor says that it is a guest, of this VMCB, with these intercepts; the host's state is saved."""
    made = lab("nop\nhere:   jmp here", "hvm")
    host, state = monitor_of(made).host, made.machine.state
    for _ in range(2):
        assert state.word(at.HFLAGS) & at.HF_GUEST
        assert state.word(at.VM_VMCB) == host.vmcb_address
        assert (
            bytes(state.view[at.INTERCEPTS.start : at.INTERCEPTS.stop]) == monitor_of(made).policy.vectors()
        )
        made.run(50)
    saved = Vmcb(host.view[HOST_SAVE : HOST_SAVE + 0x1000])
    assert saved.cr0 == CR0.PE | CR0.PG | CR0.WP | CR0.NE | CR0.ET
    assert (saved.cr3, saved.cr4) == (host.root, CR4.PAE)
    assert (saved.rip, saved.rax) == (host.entry + 6, host.vmcb_address), "behind VMLOAD and VMRUN"
    assert saved.efer == 1 << 12 | 1 << 11
    assert state.cr0 & CR0.PG == 0 and state.cpl == 0 and state.eip == made.symbol("here")


def test_the_vmcb_is_the_guest() -> None:
    """A guest taken off the processor is in its VMCB, field by field; the host's state is in the processor."""
    made = lab(
        f"{PAGING_ON} mov ebx, 0x1234\n mov cr2, ebx\n stc\nhere:   jmp here", "hvm", memory=enable_paging()
    )
    made.run(100)
    monitor, state = monitor_of(made), made.machine.state
    registers, segments = made.registers, [state.segment_base(n) for n in range(6)]
    guest = monitor.take()
    vmcb = Vmcb(memoryview(bytearray(guest.vmcb)))
    assert (vmcb.rip, vmcb.rflags, vmcb.rsp, vmcb.rax) == tuple(
        registers[r] for r in ("eip", "eflags", "esp", "eax")
    )
    assert (vmcb.cr0, vmcb.cr2, vmcb.cr3, vmcb.cr4) == tuple(
        registers[r] for r in ("cr0", "cr2", "cr3", "cr4")
    )
    assert [getattr(vmcb, s).selector for s in ("es", "cs", "ss", "ds", "fs", "gs")] == [
        registers[s] for s in ("es", "cs", "ss", "ds", "fs", "gs")
    ]
    assert [getattr(vmcb, s).base for s in ("es", "cs", "ss", "ds", "fs", "gs")] == segments
    assert (vmcb.idtr.base, vmcb.idtr.limit, vmcb.tr.base) == (IDT, 0x7FF, TSS)
    assert (vmcb.np_enable, vmcb.n_cr3, vmcb.guest_asid, vmcb.cpl) == (1, nested_of(made).root, 1, 0)
    assert check(vmcb) == []
    assert not state.word(at.HFLAGS) & at.HF_GUEST
    assert (state.eip, state.cr3) == (monitor.host.entry, monitor.host.root)
    monitor.put(guest)
    assert made.registers == registers
    made.run(200)
    assert made.registers == registers


def test_leaving_and_coming_back_changes_nothing() -> None:
    """A guest that is taken off and put back before each instruction comes to what it comes to undisturbed."""
    source = (
        "fld1\n mov ecx, 5\nmore:   add eax, ecx\n pushfd\n pop ebx\n fld st0\n sti\n nop\n cli\n"
        " loop more\n int 0x40"
    )
    bare = lab(source)
    bare.run(400)
    made = lab(source, "hvm")
    while made.vector is None:
        made.run(made.retired + 1)
        monitor_of(made).put(monitor_of(made).take())
    made.run(400)
    assert made.everything() == bare.everything()
    fpu = slice(at.SYSTEM_STATE.stop, 4800)
    assert bytes(made.machine.state.view[fpu]) == bytes(bare.machine.state.view[fpu])


# What exits, and what does not

NO_EXITS = f"""
        {PAGING_ON}
        mov ecx, 10
.next:  mov eax, cr3
        mov cr3, eax
        invlpg [DATA]
        mov eax, cr0
        mov edx, cr4
        mov eax, cr2
        push dword [DATA]
        pushfd
        popfd
        cli
        sti
        cli
        pushfd
        push cs
        push dword .on
        iretd
.on:    sgdt [DATA]
        str eax
        clts
        smsw eax
        add esp, 4
        dec ecx
        jnz .next
        int 0x41
"""


def test_nothing_exits_that_is_not_intercepted() -> None:
    """CR3 loads, INVLPG, IRET, INT, POPF, STI, descriptor tables: none but the first use of each page."""
    made = both(NO_EXITS, memory=enable_paging())
    # Code, handler; stack and data; the directory's and the table's frames, read; and stored to by the CPU's marks.
    assert rows(made) == {"VMEXIT_NPF": rows(made)["VMEXIT_NPF"], "instruction MOV": 1, "INT 0x41": 1}
    assert rows(made)["VMEXIT_NPF"] <= 10
    assert monitor_of(made).hidden_faults == {"nested page fault": rows(made)["VMEXIT_NPF"]}


def test_an_exception_costs_one_delivery(switches: list[int]) -> None:
    """Ten divide errors, ten page faults, ten INTs: ten deliveries each, no #VMEXIT, and no VMRUN at all."""
    returns = b"\x83\x04\x24\x02\xcf"  # add dword [esp], 2; iretd
    made = both(
        f"{PAGING_ON} xor ecx, ecx\n mov ebx, 10\nmore:   div ecx\n mov edi, 0x170000\n mov [edi], eax\n int 0x41\n"
        " dec ebx\n jnz more\n int 0x40",
        memory=[
            *enable_paging({0x170000: 0}),
            (0x6000, returns), (0x6000 + 16 * 14, b"\x83\xc4\x04" + returns), (0x6410, b"\xcf"),
        ],
    )  # fmt: skip
    counted = rows(made)
    del counted["VMEXIT_NPF"], counted["instruction MOV"]
    assert counted == {"exception #DE": 10, "exception #PF": 10, "INT 0x41": 10, "INT 0x40": 1}
    assert switches == [0], "to start"


TIMER = """
        mov al, 0x34
        out 0x43, al
        mov al, {count}
        out 0x40, al
        mov al, 0
        out 0x40, al
        mov al, 0xFE
        out 0x21, al
"""
TICK = (
    0x6000 + 16 * 8,
    assemble("        push eax\n mov al, 0x20\n out 0x20, al\n inc dword [DATA]\n pop eax\n iretd").data,
)


def test_interrupts_are_injected(switches: list[int]) -> None:
    """Each external interrupt is one VMRUN with its vector in EVENTINJ, and the only kind of VMRUN there is."""
    loop = " sti\nmore:   inc ebx\n cmp dword [DATA], 7\n jb more\n cli\n int 0x40"
    made = both(TIMER.format(count=50) + loop, 60_000, memory=[TICK])
    assert made.read(DATA) == rows(made)["external interrupt"] == 7
    first, *others = switches
    assert first == 0
    assert [str(EventInjection(event)) for event in others] == ["external interrupt 0x8"] * 7


@pytest.mark.parametrize("phase", range(0, 84, 3))
def test_an_interrupt_comes_at_the_same_instruction(phase: int) -> None:
    """At whatever instruction the timer goes off, shadows, stores, calls and HLT included, it is the bare one's."""
    both(
        TIMER.format(count=3)
        + f" times {phase} nop\n sti\n mov esi, 30\nmore:   push esi\n call sub\n pop esi\n"
        " mov [DATA + 8 + esi * 4], esp\n"
        " pushfd\n cli\n inc edi\n popfd\n mov ax, ss\n mov ss, ax\n inc edi\n mov eax, cr3\n mov cr3, eax\n"
        " rdtsc\n add ebp, eax\n sti\n hlt\n dec esi\n jnz more\n cli\n int 0x40\nsub:    inc ebx\n ret",
        20_000,
        memory=[TICK],
    )


def test_hlt_exits_and_sleeps() -> None:
    """HLT is intercepted: one exit, one sleep each; with interrupts off it is the end."""
    made = both(TIMER.format(count=200) + " sti\n hlt\n hlt\n hlt\n cli\n hlt", 200_000, memory=[TICK])
    assert rows(made)["VMEXIT_HLT"] == rows(made)["hlt"] == 4


# Injections that meet something on their way

FIRES = TIMER.format(count=2) + " {ring}\n mov ecx, 3000\n{sti}\nmore:   loop more\n int 0x40"
KERNEL = FIRES.format(ring="", sti="sti")
USER = FIRES.format(ring="to_ring USER_CODE, USER_DATA, 0x3202", sti="")
SMALL_STACK = Descriptor.segment(0, 0xFF, 0x93, 0x4)
DOWN_STACK = Descriptor.segment(0, 0x8FFFF, 0x97, 0x4)


def bad_gates() -> Iterator[tuple[str, dict[int, Descriptor | bytes]]]:
    for kind in range(16):
        yield f"type {kind}", {8: gate(0x6080, kind=SystemType(kind) if kind in {*SystemType} else kind)}  # type: ignore[arg-type]
    yield "not present", {8: gate(0x6080, present=False)}
    for selector in (0, 3, KERNEL_DATA, FREE + 0x80, 0x50, 0x48, 0x1B, 0x3B, 0x28, 0x33, 0x60, 0x1000):
        yield f"selector {selector:#x}", {8: gate(0x6080, selector=selector)}
    yield "offset past the limit", {8: gate(0x20000, selector=0x60)}
    yield "zero", {8: bytes(8)}


@pytest.mark.parametrize("source", (KERNEL, USER), ids=("kernel", "user"))
@pytest.mark.parametrize("entry", list(bad_gates()), ids=lambda entry: entry[0])
def test_an_injection_through_a_bad_gate(
    entry: tuple[str, dict[int, Descriptor | bytes]], source: str
) -> None:
    """Whatever the gate is, the fault that comes of it is the bare machine's, with its error code."""
    both(source, 8000, idt=entry[1], memory=[TICK])


@pytest.mark.parametrize("source", (KERNEL, USER), ids=("kernel", "user"))
@pytest.mark.parametrize(
    "absent",
    [(STACK - 0x1000,), (0x8B000,), (IDT,), (0x6000,), (0x2000,), (TSS,), (IDT, TSS), (0x2000, 0x6000)],
)
def test_an_injection_that_meets_a_page_fault(absent: tuple[int, ...], source: str) -> None:
    """The guest's own page fault in its delivery (stack, IDT, handler, GDT, TSS) is the bare machine's."""
    unmap = "".join(f" mov dword [{PAGES + 0x1000 + (page >> 10):#x}], 0\n" for page in absent)
    flush = " mov eax, cr3\n mov cr3, eax\n"
    body = (
        source.replace(" mov ecx, 3000", f"{unmap}{flush} mov ecx, 3000")
        if source is KERNEL
        else unmap + source
    )
    both(PAGING_ON + body, 8000, memory=[*enable_paging(), TICK])


@pytest.mark.parametrize("esp", (0, 4, 19, 20, 24, 0x8C000, 0xFFFFFFFE))
@pytest.mark.parametrize("stack", (KERNEL_DATA, FREE, FREE + 8, 0x50, 0x23, 0, KERNEL_CODE))
def test_an_injection_onto_an_inner_stack_without_room(stack: int, esp: int) -> None:
    """ESP0 and SS0 of the TSS may be anything: where there is no room, or no stack, the fault is the bare one."""
    task = TSS + 4, esp.to_bytes(4, "little") + stack.to_bytes(2, "little")
    both(USER, 8000, gdt={FREE: SMALL_STACK, FREE + 8: DOWN_STACK}, memory=[task, TICK])


@pytest.mark.parametrize("esp", (0, 4, 12, 0x100, 0x90000, 0x90010, 0x150002))
@pytest.mark.parametrize("stack", (FREE, FREE + 8, 0x68))
def test_an_injection_onto_a_kernel_stack_with_a_limit(stack: int, esp: int) -> None:
    """The same for the stack in use, with a limit, one that expands down, or 16 bits wide."""
    both(KERNEL.replace("sti", f"mov eax, {stack}\n mov ss, ax\n mov esp, {esp}\n sti"), 8000,
         gdt={FREE: SMALL_STACK, FREE + 8: DOWN_STACK}, memory=[TICK])  # fmt: skip


def test_an_injection_that_meets_nested_page_faults(switches: list[int]) -> None:
    """Stack and handler in pages that no entry of the nested tables has: VMRUN is done over until it is delivered."""
    made = both(KERNEL.replace("sti", "mov esp, 0x151008\n sti"), 8000, idt={8: gate(0x180000)},
                memory=[(0x180000, TICK[1])])  # fmt: skip
    assert made.read(DATA) >= 1
    assert all(event == 0 or event & 0xFF == 8 for event in switches)


# Steps and shadows


@pytest.mark.parametrize(
    "code",
    (
        "nop\n inc ebx\n mov [DATA], ebx",
        "mov ax, ss\n mov ss, ax\n inc ebx",
        "sti\n inc ebx\n cli",
        "mov eax, [0xE0000000]\n mov [0xE0000000], eax\n inc ebx",
        "mov esi, DATA\n mov edi, 0xE0000000\n mov ecx, 3\n rep movsd\n inc ebx",
        "cpuid\n rdtsc\n inc ebx",
        "mov edi, 0x160000\n mov ecx, 3\n rep stosd\n inc ebx",
        "int 0x42\n inc ebx",
        "pushfd\n popfd\n inc ebx",
    ),
)
@pytest.mark.parametrize("asked", ("", "all"))
def test_single_steps_come_after_each_instruction(code: str, asked: str) -> None:
    """With TF set each instruction traps once, whether it exits, is let through, or is executed apart."""
    source = f"pushfd\n or dword [esp], 0x100\n popfd\n {code}\n int 0x40"
    handlers = [
        (0x6010, bytes.fromhex("ff0580001100 cf")),
        (0x6420, b"\xcf"),
    ]  # inc dword [DATA + 0x80]; iretd
    bare, made = (
        lab(source, mode, memory=handlers, attach=attach)
        for mode, attach in (("native", None), ("hvm", hardware(asked)))
    )
    assert made.run(300) == bare.run(300)
    assert made.everything() == bare.everything()
    assert made.read(DATA + 0x80) >= 1


# W^X by nested tables


def test_data_is_not_executable_and_code_not_writable() -> None:
    """A page that is stored to has NX in the nested tables, an executed one is read-only, one of both is neither."""
    made = both(
        "mov edi, 0x150000\n mov ecx, 100\n rep stosd\n inc dword [mixed]\n call 0x160000\n int 0x40\nmixed:  dd 0",
        memory=[(0x160000, b"\xc3")],
    )
    entries = nested_of(made).entries
    assert entries[0x150] & (NX | RW | P) == NX | RW | P
    assert entries[0x160] & (NX | RW | P) == P
    assert entries[CODE >> 12] & (NX | RW | P) == RW | P
    assert [entry for entry in entries if entry & (NX | RW | P) == RW | P] == [entries[CODE >> 12]]


@pytest.mark.parametrize("how", ("nx", "without nx"))
def test_changed_code_is_noticed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that becomes code, code that is stored to, again and again: what is executed is what is there."""
    if how == "without nx":
        monkeypatch.setattr(cpu, "mend", lambda: False)
    made = both(
        """
        mov ecx, 20
.next:  mov dword [0x150000], 0xC3404040
        mov dword [0x151000], 0xC3434343
        call 0x150000
        call 0x151000
        mov byte [0x150000], 0x90
        call 0x150000
        dec ecx
        jnz .next
        int 0x40
        """
    )
    assert (made.reg("eax"), made.reg("ebx")) == (20 * 5, 20 * 3)
    has_nx = any(entry & NX for entry in nested_of(made).entries)
    assert has_nx == (how == "nx")


def test_without_nx_everything_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engine cannot be mended the nested tables have no NX: slow, and still equal."""
    monkeypatch.setattr(cpu, "mend", lambda: False)
    for number in range(25):
        assert not compare(numbered("no nx", number).image(), "hvm"), number
    expectation = next(e for e in EXPECTATIONS if e.guest == "smc")
    results = [
        VirtualMachine(load_image(expectation.path, memory=16 << 20), m).run() for m in ("native", "hvm")
    ]
    assert results[0].memory_sha256 == results[1].memory_sha256
    assert results[0].registers == results[1].registers


# Memory that is not there, A20, time


@pytest.mark.parametrize(
    "address", (0xA0000, 0xC0000, 0x200000, 0x1FFFFE, 0xE0000000, 0xF1000000, 0xF2005000, ONES)
)
def test_stores_to_where_there_is_no_memory(address: int) -> None:
    """They are lost, and reads are ones: by one instruction executed apart, its neighbours not."""
    made = both(
        f"mov dword [{address:#x}], 0x11223344\n mov eax, [{address:#x}]\n mov edi, {address:#x}\n mov ecx, 5\n"
        f" cld\n rep stosb\n add dword [{address:#x}], 1\n push dword [{address:#x}]\n pop dword [{address:#x}]\n"
        f" mov [DATA], eax\n mov esp, {address + 8:#x}\n push eax\n mov esp, STACK\n int 0x40"
    )
    assert made.vector == 0x40
    if address != 0x1FFFFE:
        assert made.read(DATA) == 0xFFFFFFFF


@pytest.mark.parametrize(
    "address", (0xB8000, 0x100000, 0x1A0000, 0x200000, 0xE0000000, 0xE0100000, 0xF2105000)
)
def test_a20_off(address: int) -> None:
    """With A20 off addresses wrap at each odd megabyte, through nested tables as bare."""
    program = f"""
        bits 32
        org 0x8000
        mov dword [0xA0000 - 4], 0xAAAAAAAA
        in al, 0x92
        and al, 0xFD
        out 0x92, al
        mov ebx, [{address:#x}]
        mov dword [{address:#x} + 4], 0x12345678
        mov ecx, [{address:#x} + 4]
        mov edx, [{address:#x} + 0x100004]
        in al, 0x92
        or al, 2
        out 0x92, al
        mov esi, [{address:#x} + 4]
        int 0x40
"""
    made = both("jmp 0x8000", memory=[(0x8000, assemble_text(program, encoder=encoder()).data)])
    assert made.vector == 0x40


def test_time_is_the_bare_machines() -> None:
    """RDTSC, and RDMSR and WRMSR of the counter, give what they give without a hypervisor."""
    made = both(
        "rdtsc\n mov esi, eax\n mov ecx, 0x10\n mov eax, 0x1000\n mov edx, 5\n wrmsr\n rdtsc\n mov edi, eax\n"
        " mov ebp, edx\n rdmsr\n int 0x40"
    )
    assert made.reg("ebp") == 5 and made.reg("edi") > 0x1000 and made.vector == 0x40


# A VMCB that is wrong

WRONG = {
    "cr0": ("cr0", 1 << 29), "cr3": ("cr3", 1 << 32), "cr4": ("cr4", 1 << 13), "efer": ("efer", 0),
    "dr6": ("dr6", 1 << 32), "dr7": ("dr7", 1 << 32), "guest_asid": ("guest_asid", 0),
    "intercept_misc2": ("intercept_misc2", 0), "intercept_misc1": ("intercept_misc1", 1 << 4),
    "intercept_misc3": ("intercept_misc3", 1), "n_cr3": ("n_cr3", 1 << 32),
    "eventinj": ("eventinj", 1 << 31 | 2 << 8),
    "cpl": ("cpl", 3), "msrpm_base_pa": ("msrpm_base_pa", 0xFFFF_F000), "iopm_base_pa": ("iopm_base_pa", 1 << 40),
    "tlb_control": ("tlb_control", 7), "rip": ("rip", 1 << 32), "rsp": ("rsp", 1 << 63), "rax": ("rax", 1 << 40),
    "rflags": ("rflags", 1 << 32), "cr2": ("cr2", 1 << 32), "sysenter_cs": ("sysenter_cs", 1 << 32),
    "nested_control": ("nested_control", 3), "g_pat": ("g_pat", 2),
    "virtualization_extensions": ("virtualization_extensions", 1), "pause_filter_count": ("pause_filter_count", 9),
    "avic_enable": ("avic_enable", 1),
}  # fmt: skip
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")
WRONG_SEGMENTS = {
    **{f"{name}.base": (name, Segment(0, 0x89, 0x67, 1 << 32)) for name in SEGMENT_NAMES},
    "tr.attrib": ("tr", Segment(0x28, 0x8B, 0x67, TSS)),
    "gdtr.limit": ("gdtr", Segment(0, 0, 1 << 16, 0)),
    "idtr.limit": ("idtr", Segment(0, 0, 1 << 16, 0)),
}


def corrupted(guest: Guest, name: str, value: object) -> Guest:
    page = bytearray(guest.vmcb)
    setattr(Vmcb(memoryview(page)), name, value)
    return Guest(bytes(page), guest.registers)


@pytest.mark.parametrize("field", [*WRONG, *WRONG_SEGMENTS])
def test_a_wrong_field_is_refused_by_name(field: str) -> None:
    """A guest with this field out of range is not put on the processor: one line says which field, and why."""
    made = lab("nop\nhere:   jmp here", "hvm")
    made.run(5)
    monitor = monitor_of(made)
    good = monitor.take()
    name, value = {**WRONG, **WRONG_SEGMENTS}[field]
    with pytest.raises(GuestError) as refused:
        monitor.put(corrupted(good, name, value))
    line = str(refused.value)
    assert line.startswith("VMRUN refuses the guest (VMEXIT_INVALID): ") and "\n" not in line
    assert (
        f" {field} = " in line
        or field in ("nested_control", "cr0", "tlb_control", "ss.base", "cs.base")
        and "=" in line
    )
    monitor.put(good)
    made.run(50)
    assert made.reg("eip") == made.symbol("here"), "the machine is none the worse"


@pytest.mark.parametrize("fill", (0x00, 0xFF, 0x55, 0xA5))
def test_a_page_of_noise_is_no_guest(fill: int) -> None:
    """A VMCB full of anything is refused in one line."""
    made = lab("jmp $", "hvm")
    guest = monitor_of(made).take()
    with pytest.raises(GuestError, match="VMRUN refuses the guest"):
        monitor_of(made).put(Guest(bytes((fill,)) * 0x1000, guest.registers))


def test_every_rule_names_a_field() -> None:
    """The rules' fields are the VMCB's own, so that what is refused can be found."""
    for row in CHECKS:
        assert row.field.partition(".")[0] in Vmcb.ROWS
    assert SEGMENTS.names == SEGMENT_NAMES
