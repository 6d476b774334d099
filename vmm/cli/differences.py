"""How a mode's way differed from the reference's, in words and lines: for a terminal and for a page alike.

Everything that the guest had a hand in comes out `printable`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmm.blame import Divergence
from vmm.cli.rows import class_text
from vmm.cli.table import Tone
from vmm.cli.terminal import printable
from vmm.comparison import REFERENCE, Comparison, ModeRun

TAB = 4
MOST_LINES, LONGEST_LINE = 2000, 400  # of a console, that are looked at to show differences
UNEXPLAINED = "This is not explained by the classification: a bug of vmm's. Please report it."
NOTHING_SHOWN = f"past the first {MOST_LINES} lines, or only in white space"


@dataclass(frozen=True)
class ConsoleLine:
    """A line that only one of two consoles has there."""

    mode: str
    text: str
    tone: Tone


def console_lines(data: bytes) -> list[str]:
    """A console as lines that can be shown, the first `MOST_LINES`."""
    return [
        printable(line[:LONGEST_LINE].expandtabs(TAB))
        for line in data.decode(errors="replace").splitlines()[:MOST_LINES]
    ]


def consoles(comparison: Comparison, run: ModeRun) -> list[ConsoleLine]:
    """The lines in which a mode's console differs from the reference's, each below the other."""
    assert comparison.reference is not None
    right, wrong = console_lines(comparison.reference.console), console_lines(run.result.console)
    tones: tuple[Tone, Tone] = "right", "wrong"
    return [
        ConsoleLine(name, line, tone)
        for pair in _differing(right, wrong)
        for name, tone, lines in zip((REFERENCE, run.result.mode), tones, pair, strict=True)
        for line in lines
    ]


def _differing(right: list[str], wrong: list[str]) -> list[tuple[list[str], list[str]]]:
    """Pairs of stretches that differ; texts of the same length are taken to correspond line by line."""
    if len(right) == len(wrong):
        return [([a], [b]) for a, b in zip(right, wrong, strict=True) if a != b]
    import difflib

    matcher = difflib.SequenceMatcher(None, right, wrong, autojunk=False)
    codes = matcher.get_opcodes()
    return [(right[i1:i2], wrong[j1:j2]) for tag, i1, i2, j1, j2 in codes if tag != "equal"]


@dataclass(frozen=True)
class Quoted:
    """A source line as it is quoted; `blamed` is the one that made the difference, `number` 0 that of no source."""

    number: int
    text: str
    blamed: bool


def title_of(run: ModeRun) -> str:
    """What the instruction to blame did, as a heading."""
    what = "broke it"
    if run.console_equal and run.result.outcome.kind != "error":
        what = "made a difference that the console does not show"
    return f"Under {run.result.mode}, this instruction {what}"


def place_of(found: Divergence) -> str:
    """`file:line`, or "" where there is no source."""
    return f"{printable(found.source.file)}:{found.source.line}" if found.source else ""


def quote(found: Divergence) -> list[Quoted]:
    """The line to blame and what stands before it, without their common margin; or the instruction."""
    source = found.source
    if source is None:
        return [Quoted(0, printable(found.instruction), True)]
    lines = (*(line for line in found.context if line.file == source.file), source)
    texts = [line.text.expandtabs(TAB).rstrip() for line in lines]
    margin = min(len(text) - len(text.lstrip()) for text in texts)
    return [
        Quoted(line.line, printable(text[margin:]), line is source)
        for line, text in zip(lines, texts, strict=True)
    ]


def facts_of(found: Divergence) -> list[tuple[str, str]]:
    """What is known of a divergence, by name."""
    where = f" in {printable(found.symbol)}," if found.symbol and found.source is None else ""
    what = f"{printable(found.instruction)}{where} at EIP {found.eip:#x}, after {found.at:,} instructions"
    facts = [
        ("what", what),
        ("wrong", printable(found.should)),
    ]
    row = found.row
    if row is None:
        return [*facts, ("class", str(found.classified.kind))]
    named = [("why", row.reason), ("rule", row.effect), ("source", row.source)]
    return [*facts, ("class", f"{row.name}, {class_text(row)}"), *named]
