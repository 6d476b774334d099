"""`--report`: what came of a run, as JSON."""

from __future__ import annotations

import argparse
import json
import os

from vmm.errors import OutputError
from vmm.vm import Result


def as_json(
    options: argparse.Namespace, result: Result, code: int, start_seconds: float
) -> dict[str, object]:
    """The report. `status` is this process's; `start_seconds` is from its start to the guest's first instruction.

    Exits handled inside the CPU's own code (CPUID, RDTSC) count no time.
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
        "console": result.console.decode(errors="replace"),
        "memory_sha256": result.memory_sha256,
        "registers": result.registers,
    }


def write(
    descriptor: int,
    name: str,
    options: argparse.Namespace,
    result: Result,
    code: int,
    start_seconds: float,
) -> None:
    """Write the report to the open file; raises `OutputError`."""
    text = json.dumps(as_json(options, result, code, start_seconds), indent=2) + "\n"
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"--report {name}: {error.strerror}") from None
