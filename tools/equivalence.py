"""Campaigns of random guests: a mode against the bare machine, and the bare machine against QEMU.

    python -m tools.equivalence --guests 10000 --seed 1              bt, or another --mode
    python -m tools.equivalence --mode hvm --intercept all           with these intercepts, too
    python -m tools.equivalence --mode hvm --memory-virtualization shadow
    python -m tools.equivalence --guests 100 --seed 1 --qemu         QEMU instead
    python -m tools.equivalence --guests 10000 --seed 1 --start 812  go on at guest 812
    python -m tools.equivalence --slices                             the bare machine, paused now and then
    python -m tools.equivalence --mutate                             break each sequence; is it noticed?

A guest's number and the seed are all that it is made from. A guest that runs differently is made smaller and
written to `tests/equivalence/found/` (or `--found`), where a test replays it; of failures whose smallest guests are
made of the same atoms one is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.equivalence import source, third
from tests.equivalence.encode import plain
from tests.equivalence.guest import Guest, random_guest
from tests.equivalence.mutants import MUTANTS, Mutant
from tests.equivalence.run import BUDGET, Attach, compare, differences, observe, slices
from tests.equivalence.shrink import shrink
from vmm.comparison import Comparer
from vmm.errors import UsageError
from vmm.vm import UNMODIFIED, hardware

Check = Callable[[Guest], list[str]]
PROGRESS_SECONDS = 10


def against(mode: str, budget: int = BUDGET, attach: Attach | None = None) -> Check:
    """In what `mode` differs from the bare machine; an exception of ours is a difference, too."""

    def check(guest: Guest) -> list[str]:
        image = guest.image()
        try:
            return compare(image, mode, budget=budget, attach=attach)
        except Exception as error:
            return [f"raised {type(error).__name__}: {error}"]

    return check


def in_slices(guest: Guest) -> list[str]:
    """In what a run that is paused now and then differs from one that is not."""
    image = guest.image()
    return differences(image, observe(image, "native"), observe(image, "native", stops=slices(hash(guest))))


def against_qemu(folder: Path) -> Check:
    def check(guest: Guest) -> list[str]:
        image = guest.image()
        mine = observe(image, "native", third.BUDGET)
        if mine.outcome[0] != "exit":
            return []
        theirs = third.on_qemu(image, folder)
        return ["QEMU: the guest does not end"] if theirs is None else third.differences(image, mine, theirs)

    return check


def guest_number(seed: str, number: int, qemu: bool = False) -> Guest:
    return random_guest(random.Random(f"{seed}/{number}"), third=qemu)


def kind(lines: list[str]) -> str:
    """What sort of failure: the shrinker must not turn one into another of quite another sort."""
    return lines[0].split(":")[0].split(" ")[0] if lines[0].startswith("raised") else "differs"


def signature(guest: Guest, lines: list[str]) -> str:
    """Failures with the same are taken for the same."""
    atoms = {step.atom for steps in guest.parts() for step in steps}
    return f"{kind(lines)}-" + "-".join(sorted(atom.replace(" ", "_") for atom in atoms))


def blame(guest: Guest, mode: str) -> str:
    """The first instruction that made a lasting difference."""
    try:
        run = Comparer(guest.image(), max_instructions=BUDGET).compare([mode]).runs[0]
    except Exception as error:  # a search in a mode that fails may fail, too
        return f"(not found: {type(error).__name__}: {error})"
    if run.divergence is None:
        return "(state and console agree at the end)"
    d = run.divergence
    return f"{d.instruction} at EIP {d.eip:#x} after {d.at}: {d.should}"


def listing(guest: Guest) -> list[str]:
    """What is random in a guest, as text."""
    pages = "no paging" if guest.pages is None else f"pages {guest.pages & 7:#x}"
    lines = [f"period {guest.period}, rounds {guest.rounds}, {pages}"]
    for title, rows in guest.listing():
        lines += [title, *(f"    {address:#x}  {plain(text)}" for address, text, _ in rows if text)]
    return lines


def fails_like(lines: list[str], check: Check) -> Callable[[Guest], bool]:
    """Whether a guest fails in the same way."""
    wanted = kind(lines)

    def fails(guest: Guest) -> bool:
        found = check(guest)
        return bool(found) and kind(found) == wanted

    return fails


def campaign(check: Check, options: argparse.Namespace) -> int:
    """Run guests; returns how many kinds of failure there were."""
    known: dict[str, int] = {}
    started = last = time.monotonic()
    failed = 0
    for done, number in enumerate(range(options.start, options.start + options.guests), 1):
        guest = guest_number(options.seed, number, options.qemu)
        lines = check(guest)
        if lines:
            failed += 1
            small = shrink(guest, fails_like(lines, check), options.shrink_seconds)
            lines = check(small) or lines
            name = signature(small, lines)
            known[name] = known.get(name, 0) + 1
            if known[name] == 1:
                report(small, lines, name, f"seed {options.seed}, guest {number}", options)
        now = time.monotonic()
        if now - last > PROGRESS_SECONDS or number == options.start + options.guests - 1:
            last = now
            rate = done / (now - started)
            print(f"{done} guests, {failed} failed, {len(known)} kinds, {rate:.1f} guests/s", flush=True)
    return len(known)


def report(guest: Guest, lines: list[str], name: str, origin: str, options: argparse.Namespace) -> None:
    """A new kind of failure: on the terminal, and as a file."""
    reasons = [origin, *lines]
    if not options.qemu and not options.slices:
        reasons.append("first: " + blame(guest, options.mode))
    print("\n".join([f"--- {name}", *reasons, *listing(guest)]), flush=True)
    if options.found:
        digest = hashlib.sha256("\n".join(listing(guest)).encode()).hexdigest()[:6]
        path = source.write(guest, f"{name[:60].replace('differs-', '')}-{digest}", reasons, options.found)
        print(f"written to {path}", flush=True)


def mutate(mode: str, seed: str, most: int) -> int:
    """Break one sequence at a time; returns how many of the broken ones nobody noticed."""
    missed = 0
    check = against(mode)
    for mutant in MUTANTS:
        number, lines = hunt(mutant, check, seed, most)
        if lines:
            print(f"{mutant.name}: found by guest {number}: {lines[0]}", flush=True)
        else:
            missed += 1
            why = "NOT FOUND" if mutant.hits else "changes nothing, so it is not found"
            print(f"{mutant.name}: {why} by {most} guests", flush=True)
    return missed


def hunt(mutant: Mutant, check: Check, seed: str, most: int) -> tuple[int, list[str]]:
    """The first guest that notices, and what; ([] after `most` guests)."""
    for number in range(most):
        guest = guest_number(seed, number)
        with mutant.applied():
            lines = check(guest)
        if lines and not check(guest):
            return number, lines
    return most, []


def variant(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Attach | None:
    """How to attach hvm, if it was asked for in its own way. Raises `UsageError` for an unknown intercept."""
    if options.intercept is None and options.memory_virtualization is None:
        return None
    if options.mode != "hvm":
        parser.error("--intercept and --memory-virtualization go with --mode hvm")
    return hardware(options.intercept or "", options.memory_virtualization or "nested")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guests", type=int, default=1000)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--start", type=int, default=0, help="the number of the first guest")
    parser.add_argument("--mode", choices=sorted(UNMODIFIED), default="bt" if "bt" in UNMODIFIED else "native")
    parser.add_argument("--intercept", metavar="NAMES", help="hvm: intercept these, too")
    parser.add_argument("--memory-virtualization", choices=("nested", "shadow"), help="hvm: page tables")
    parser.add_argument("--qemu", action="store_true", help="compare the bare machine with QEMU")
    parser.add_argument("--slices", action="store_true", help="compare it with itself, paused now and then")
    parser.add_argument(
        "--mutate", action="store_true", help="break one sequence of the translator at a time"
    )
    parser.add_argument("--shrink-seconds", type=float, default=30)
    parser.add_argument("--found", type=Path, default=source.FOUND, help="the folder for failures")
    options = parser.parse_args()
    try:
        attach = variant(parser, options)
    except UsageError as error:
        parser.error(str(error))
    if options.mutate:
        return mutate(options.mode, options.seed, options.guests) and 1
    with tempfile.TemporaryDirectory() as folder:
        check = (
            against_qemu(Path(folder))
            if options.qemu
            else in_slices
            if options.slices
            else against(options.mode, attach=attach)
        )
        return campaign(check, options) and 1


if __name__ == "__main__":
    sys.exit(main())
