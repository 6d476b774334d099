"""The monitor of trap mode: what traps is emulated, and nothing else is done.

Nothing is done about the critical instructions: POPF, PUSHF, SGDT, SMSW and their kind run silently in ring
1, see or change the real processor instead of the virtual one, and the guest goes wrong. That is what this
monitor is for showing.

What it can infer, and what it cannot: at an exit from ring 3 it knows that the guest's kernel has executed
IRET or RETF, because the real CPL says so; it does not know the EFLAGS that IRET popped, because the CPU
ignored their IF and IOPL without a trap. So virtual IF stays what it was in the kernel, mostly off, and a
process is not preempted until it enters the kernel and the kernel executes STI.
"""

from __future__ import annotations

from vmm.monitor.deprivileged.monitor import DeprivilegedMonitor


class TrapMonitor(DeprivilegedMonitor):
    """`Control` for a guest under classical trap-and-emulate."""
