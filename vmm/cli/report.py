"""`--report`: what came of a run, as JSON."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict

from vmm.errors import OutputError
from vmm.vm import Result, VirtualMachine


def as_json(
    options: argparse.Namespace, vm: VirtualMachine, result: Result, code: int, start_seconds: float
) -> dict[str, object]:
    """The report. `status` is this process's; `start_seconds` is from its start to the guest's first instruction.

    Exits handled inside the CPU's own code (CPUID, RDTSC) count no time. Hidden faults are those that the guest
    never saw, by kind, exits or not; without a monitor there are none. Only `bt` has a `translation`.
    """
    outcome = result.outcome
    return {
        "guest": options.guest,
        "mode": result.mode,
        "clock": options.clock,
        "outcome": {"kind": outcome.kind, "status": code, "detail": outcome.detail},
        "instructions": result.instructions if result.counted else None,
        "seconds": result.seconds,
        "start_seconds": start_seconds,
        "exits": {
            reason: {"count": row.count, "seconds": row.nanoseconds / 1e9}
            for reason, row in result.exits.rows.items()
        },
        "hidden_faults": _hidden_faults(vm),
        "translation": _translation(vm),
        "console": result.console.decode(errors="replace"),
        "memory_sha256": result.memory_sha256,
        "registers": result.registers,
    }


def _hidden_faults(vm: VirtualMachine) -> dict[str, int] | None:
    hidden: dict[str, int] | None = getattr(vm.control, "hidden_faults", None)
    return None if hidden is None else dict(hidden)


def _translation(vm: VirtualMachine) -> dict[str, int] | None:
    """What translation has cost: the cache's own statistics."""
    if vm.mode.name != "bt":
        return None
    from vmm.monitor.translator.monitor import TranslatingMonitor

    return asdict(vm.control.cache.statistics) if isinstance(vm.control, TranslatingMonitor) else None


def write(
    descriptor: int,
    name: str,
    options: argparse.Namespace,
    vm: VirtualMachine,
    result: Result,
    code: int,
    start_seconds: float,
) -> None:
    """Write the report to the open file; raises `OutputError`."""
    text = json.dumps(as_json(options, vm, result, code, start_seconds), indent=2) + "\n"
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"--report {name}: {error.strerror}") from None
