"""How long a guest takes."""

from __future__ import annotations

from tools.bench import baseline
from vmm.image.image import Image, Segment
from vmm.vm import ClockName, VirtualMachine


def seconds(code: bytes, mode: str, clock: ClockName, budget: int | None = None) -> float:
    """Seconds that a guest needs in a mode."""
    image = Image("bench", (Segment(baseline.CODE, code, len(code)),), baseline.CODE)
    vm = VirtualMachine(image, mode, memory=baseline.MEMORY, clock=clock)
    vm.machine.state.esp = baseline.STACK
    result = vm.run(budget)
    if result.outcome.kind != "halt":
        raise SystemExit(f"the benchmark ended as {result.outcome}")
    return result.seconds
