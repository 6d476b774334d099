"""Small Xen guests for tests: a few lines of kernel in a domain of its own, a run, a look."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from tests.machines import encoder
from vmm.image.asm import Assembly, assemble_text
from vmm.image.load import from_assembly
from vmm.machine.clock import Clock
from vmm.machine.machine import Machine, Outcome
from vmm.monitor.paravirt.builder import Builder, Kernel, KernelSegment
from vmm.monitor.paravirt.machinery import Domain
from vmm.monitor.paravirt.monitor import ParavirtMonitor

MEMORY = 8 << 20
BASE = 0x100000

PRELUDE = f"""\
bits 32
org {BASE:#x}
%define KERNEL_CS 0xE019
%define KERNEL_DS 0xE021
%define USER_CS 0xE02B
%define USER_DS 0xE033
xen_elfnote_entry equ start
xen_elfnote_hypercall_page equ hypercall_page
xen_elfnote_virt_base equ 0
; hypercall number: arguments are in the registers
%macro hypercall 1
        mov eax, %1
        int 0x82
%endmacro
; trap vector, flags, handler: a row of a trap table
%macro trap 3
        db %1, %2
        dw KERNEL_CS
        dd %3
%endmacro
; to_user label: go on there in ring 3, events as they are
%macro to_user 1
        push dword USER_DS
        push dword user_stack
        push dword 0x202
        push dword USER_CS
        push dword %1
        iret
%endmacro
section .data
xen_elfnote_xen_version: db 'xen-3.0', 0
xen_elfnote_guest_os: db 'test', 0
xen_elfnote_loader: db 'generic', 0
xen_elfnote_pae_mode: db 'yes', 0
no_traps: dd 0, 0
seen: times 16 dd 0
room: times 64 dd 0
section .bss
        alignb 4096
hypercall_page: resb 4096
kernel_stack_bottom: resb 4096
kernel_stack:
user_stack_bottom: resb 4096
user_stack:
section .text
start:
        mov [start_info], esi
"""
TAIL = """
section .data
start_info: dd 0
"""


@functools.lru_cache(maxsize=1024)
def assemble(source: str) -> Assembly:
    """`source` after `PRELUDE`."""
    return assemble_text(PRELUDE + source + TAIL, encoder=encoder())


@dataclass
class Guest:
    """A domain with a program in it, and what it wrote to its console."""

    machine: Machine
    monitor: ParavirtMonitor
    assembly: Assembly
    console: bytearray = field(default_factory=bytearray)

    @property
    def domain(self) -> Domain:
        return self.monitor.domain

    def run(self, limit: int = 100_000) -> Outcome:
        """Run until the guest ends or `limit` instructions have retired in all."""
        return self.machine.run(limit)

    def run_to(self, label: str, limit: int = 10_000) -> None:
        """Step until EIP is at `label`; fails if the guest ends or `limit` instructions were not enough."""
        target = self.symbol(label)
        while self.machine.state.eip != target:
            outcome = self.machine.run(self.machine.retired() + 1)
            assert outcome.kind == "budget", outcome
            assert self.machine.retired() < limit, f"EIP is {self.machine.state.eip:#x}, not {label}"

    def symbol(self, name: str) -> int:
        return self.assembly.symbols[name]

    def read(self, address: int | str, size: int = 4) -> int:
        """From the guest's kernel's memory, at an address or a label."""
        where = self.symbol(address) if isinstance(address, str) else address
        return self.machine.linear.read(where, size, mark=False)

    def words(self, address: int | str, count: int) -> list[int]:
        where = self.symbol(address) if isinstance(address, str) else address
        return [self.read(where + 4 * i) for i in range(count)]

    def reg(self, name: str) -> int:
        return self.monitor.registers()[name]

    def count(self, reason: str) -> int:
        """How many exits of a kind there were."""
        row = self.machine.exits.rows.get(reason)
        return row.count if row else 0


def build(
    source: str, *, memory: int = MEMORY, command_line: str = "", clock: Clock | None = None
) -> Guest:
    """A domain at the first instruction of `source` (after the prelude's own, which saves ESI)."""
    assembly = assemble(source)
    image = from_assembly("test.asm", assembly)
    assert image.xen is not None
    kernel = Kernel(
        "test.asm",
        tuple(KernelSegment(s.address, s.data, s.size) for s in image.segments),
        image.entry,
        image.xen.virt_base,
        image.xen.hypercall_page,
        command_line=command_line,
    )
    console = bytearray()
    machine = Machine(memory, clock=clock, console=console.extend)
    monitor = Builder(machine, kernel).build()
    machine.attach(monitor)
    return Guest(machine, monitor, assembly, console)


def run(source: str, limit: int = 100_000) -> Guest:
    """`build` and a run to its end or `limit`; a program that ends in `stop: jmp stop` is stopped by the limit."""
    guest = build(source)
    guest.run(limit)
    return guest
