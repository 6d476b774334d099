"""`compare --html`: the comparison as one self-contained page, by Jinja2.

The hard part is that half of what the page shows comes from the guest: its file names, source lines and console.
Jinja escapes everything; only the charts, in which there are words of ours alone, are put in as they are.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata, resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from vmm.cli import differences, exits
from vmm.cli.html.charts import COLOURS, Bar, exits_chart, time_chart
from vmm.cli.table import knows, lines_of, listed, notes_of, times
from vmm.cli.terminal import printable
from vmm.comparison import REFERENCE, Comparison, ModeRun
from vmm.vm import MODES

SHOWN_CONSOLE = 400  # lines of a console
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def render(guest: str, command: str, comparison: Comparison, modes: Sequence[str]) -> str:
    """The page. `command` is what reproduces it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("vmm.cli.html").joinpath("page.jinja").read_text())
    return template.render(
        guest=printable(guest),
        command=printable(command),
        number=_NUMBERS.get(len(modes), str(len(modes))),
        modes=[(mode, _colour(mode), MODES[mode].summary, MODES[mode].knows) for mode in modes],
        verdict=_verdict(comparison),
        table=lines_of(comparison, list(modes)),
        notes=notes_of(comparison),
        charts=_charts(comparison, modes),
        runs=[run.result.mode for run in comparison.runs],
        reasons=_reasons(comparison),
        divergences=[_divergence(run) for run in comparison.runs if run.divergence is not None],
        consoles=[
            (run.result.mode, differences.consoles(comparison, run))
            for run in comparison.runs
            if not run.console_equal
        ],
        nothing_shown=differences.NOTHING_SHOWN,
        unexplained=differences.UNEXPLAINED,
        printed=_printed(comparison),
        versions=_versions(),
    )


def _colour(mode: str) -> int:
    """The same for a mode on every page."""
    return list(MODES).index(mode) % COLOURS


def _verdict(comparison: Comparison) -> list[str]:
    """What came of it, in a sentence or two."""
    sentences = []
    for run in comparison.runs:
        mode, found = run.result.mode, run.divergence
        if found is None:
            continue
        where = differences.place_of(found)
        place = f"{printable(found.instruction)}{f' ({where})' if where else ''}"
        sentences.append(
            f"Under {mode} the guest leaves the bare machine's way with {place}, after {found.at:,} instructions."
        )
    equal = [
        run.result.mode
        for run in comparison.runs
        if run.by_state and run.divergence is None and run.result.mode != REFERENCE
    ]
    if equal and comparison.reference is not None:
        sentences.append(
            f"Under {listed(equal)} there is no difference: every register, every byte of memory, the console"
            " and the end."
        )
    other = [run.result.mode for run in comparison.runs if not run.by_state and run.console_equal]
    if other and comparison.reference is not None:
        sentences.append(f"Under {listed(other)} another build of the guest prints the same.")
    return sentences


def _charts(comparison: Comparison, modes: Sequence[str]) -> list[tuple[str, Markup]]:
    """(caption, SVG) of each chart."""
    colour = {mode: _colour(mode) for mode in modes}
    runs = comparison.runs
    counts = [(run.result.mode, exits.grouped(run.result.exits)) for run in runs]
    groups = {
        group: [
            Bar(mode, colour[mode], count[group], f"{mode} {count[group]:,}")
            for mode, count in counts
            if group in count
        ]
        for group in exits.GROUPS
        if any(group in count for _, count in counts)
    }
    told = "; ".join(f"{group}: {', '.join(bar.label for bar in bars)}" for group, bars in groups.items())
    seconds = []
    for run in runs:
        mode, result = run.result.mode, run.result
        handling = sum(row.nanoseconds for row in result.exits.rows.values()) / 1e9
        label = f"{result.seconds:.3f} s" + (f", {times(run.ratio)}" if run.ratio is not None else "")
        seconds.append(Bar(mode, colour[mode], result.seconds, label, min(handling, result.seconds)))
    charts = [
        (
            "Time by mode",
            time_chart(seconds, "time", "Time by mode", "; ".join(f"{b.mode}: {b.label}" for b in seconds)),
        )
    ]
    if groups:
        charts.insert(
            0, ("Exits by reason", exits_chart(groups, "exits", "Exits by reason, in each mode", told))
        )
    return [(caption, Markup(svg)) for caption, svg in charts]


def _reasons(comparison: Comparison) -> list[tuple[str, str, list[str]]]:
    """(group, reason, a count for each run), in the order of the groups, the most frequent first."""
    tables = [run.result.exits.rows for run in comparison.runs]
    most = {
        reason: max(rows[reason].count for rows in tables if reason in rows)
        for reason in {reason for rows in tables for reason in rows}
    }
    order = list(exits.GROUPS)
    reasons = sorted(most, key=lambda reason: (order.index(exits.group_of(reason)), -most[reason], reason))
    return [
        (
            exits.group_of(reason),
            reason,
            [f"{rows[reason].count:,}" if reason in rows else "" for rows in tables],
        )
        for reason in reasons
    ]


def _divergence(run: ModeRun) -> dict[str, object]:
    found = run.divergence
    assert found is not None
    return {
        "mode": run.result.mode,
        "title": differences.title_of(run),
        "place": differences.place_of(found),
        "quoted": differences.quote(found),
        "facts": differences.facts_of(found),
        "explained": found.explained,
        "knows": knows(run),
    }


def _printed(comparison: Comparison) -> tuple[str, list[str], bool] | None:
    """(mode, the console's lines, whether there are more): the reference's, or the only one."""
    result = comparison.reference or (comparison.runs[0].result if comparison.runs else None)
    if result is None or not result.console:
        return None
    lines = differences.console_lines(result.console)
    more = result.console.count(b"\n") > SHOWN_CONSOLE
    return result.mode, lines[:SHOWN_CONSOLE], more


def _versions() -> str:
    """What the figures were measured with."""
    parts = [f"Python {platform.python_version()}"]
    for name in ("vmm", "unicorn"):
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([*parts, f"{platform.system()} on {platform.machine()}"])
