"""Exit statuses: the one table, shown by --help.

A guest that ends itself through isa-debug-exit gives an odd status (`value << 1 | 1`), so every status of ours
is even, and a script can tell the two apart. The classes in `vmm.errors` carry the statuses of errors; the
rest is here.
"""

from __future__ import annotations

from vmm.errors import (
    EngineError,
    GuestError,
    ImageError,
    Interrupted,
    OutputError,
    UsageError,
    VmmError,
)

OK, TRIPLE_FAULT, BUDGET, TIMEOUT, UNEXPLAINED, UNSEEN = 0, 8, 10, 12, 14, 16

STATUSES: tuple[tuple[int | str, str], ...] = (
    ("odd", "the guest's own: it wrote VALUE to isa-debug-exit; the status is VALUE << 1 | 1"),
    (OK, "done; for run: the guest halted for good, reset or switched off, --until was seen, or Ctrl-A x"),
    (UsageError.status, "the command line asks for something that makes no sense"),
    (ImageError.status, "bad image: the guest is missing, malformed, or does not fit"),
    (GuestError.status, "the guest did something that this machine cannot go on from"),
    (TRIPLE_FAULT, "triple fault: the processor shut down"),
    (BUDGET, "--max-instructions were executed"),
    (TIMEOUT, "--timeout seconds have passed"),
    (UNEXPLAINED, "compare or classify found what the classification does not explain"),
    (UNSEEN, "the run ended before the console showed the text of --until, or of an expect of --script"),
    (VmmError.status, "internal error: a bug of vmm's"),
    (EngineError.status, "the CPU engine is not the one that vmm was written for"),
    (
        OutputError.status,
        "an output cannot be written: standard output, the report, the trace, the translations, the page",
    ),
    (Interrupted.status, "interrupted by Ctrl-C or SIGTERM, or the terminal went away"),
)

# Of the ends of a run (`Outcome.kind`) other than `exit`, whose status is the guest's.
OF_KIND: dict[str, int] = {
    "halt": OK,
    "error": GuestError.status,
    "triple-fault": TRIPLE_FAULT,
    "budget": BUDGET,
    "timeout": TIMEOUT,
    "interrupted": Interrupted.status,
    "seen": OK,
    "unseen": UNSEEN,
    "left": OK,
}


def of_outcome(kind: str, guest_status: int) -> int:
    """The status of this process for a run that ended so."""
    return guest_status if kind == "exit" else OF_KIND[kind]


def table() -> str:
    """The table as text, for --help."""
    rows = "\n".join(f"  {status:>4}  {meaning}" for status, meaning in STATUSES)
    return f"exit status:\n{rows}"
