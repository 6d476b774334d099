"""The guest's memory as KVM shares it: records at physical addresses that the guest names.

A record lies in one page of RAM. Where it does not, whoever shares it decides: the clock's MSRs are taken and
nothing is written, a hypercall fails. The A20 gate has no part in it: the processor puts none of these addresses on
its bus.
"""

from __future__ import annotations

from vmm.machine.memory import PAGE, Memory


def lies_in_ram(memory: Memory, address: int, size: int) -> bool:
    """Whether so many bytes are there, all in one page. `address` may be of 64 bits."""
    if address % PAGE + size > PAGE:
        return False
    return memory.is_ram(address) and memory.is_ram(address + size - 1)
