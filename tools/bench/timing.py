"""How long a guest takes, and a switch of guests."""

from __future__ import annotations

import time
from collections.abc import Callable

from tools.bench import baseline, guests
from vmm.image.image import Image, Segment
from vmm.image.xen import XenGuest
from vmm.machine.control import Control
from vmm.machine.machine import Machine
from vmm.monitor.hardware.monitor import HardwareMonitor
from vmm.vm import ClockName, VirtualMachine

Attach = Callable[[Machine], Control]


def _machine(code: bytes, mode: str, clock: ClockName, attach: Attach | None = None) -> VirtualMachine:
    xen = XenGuest(baseline.CODE, virt_base=0, hypercall_page=None) if mode == "pv" else None
    image = Image("bench", (Segment(baseline.CODE, code, len(code)),), baseline.CODE, xen=xen)
    return VirtualMachine(image, mode, memory=baseline.MEMORY, clock=clock, attach=attach)


def seconds(
    code: bytes, mode: str, clock: ClockName, budget: int | None = None, attach: Attach | None = None
) -> float:
    """Seconds of processor time that a guest needs in a mode; `attach` as for `VirtualMachine`."""
    vm = _machine(code, mode, clock, attach)
    if mode != "pv":
        vm.machine.state.esp = baseline.STACK
    started = time.process_time()
    result = vm.run(budget)
    taken = time.process_time() - started
    if result.outcome.kind != "halt":
        raise SystemExit(f"the benchmark ended as {result.outcome}")
    return taken


def switch(count: int, *, whole: bool) -> float:
    """Seconds for a guest of hvm to leave the processor and come back by VMRUN.

    `whole`: with the registers that VMRUN does not load, and all checks, as for another guest's turn.
    """
    vm = _machine(guests.compute(1), "hvm", "host")
    monitor = vm.control
    assert isinstance(monitor, HardwareMonitor)
    started = time.process_time()
    for _ in range(count):
        if whole:
            monitor.put(monitor.take())
        else:
            monitor.world.leave()
            monitor.world.enter()
    return (time.process_time() - started) / count
