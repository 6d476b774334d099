"""`classify`: the classification at work on a guest, on bytes, on the CPU itself (census), on one state (witness).

The classification, the census and the witnesses are elsewhere; here they are shown.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING

from vmm.cli import status
from vmm.cli.guest import image_of
from vmm.cli.rows import class_text
from vmm.cli.terminal import page, printable
from vmm.errors import UsageError
from vmm.image.image import Image
from vmm.isa.classify import Annotation, Kind, annotate

if TYPE_CHECKING:
    from rich.console import Console

    from vmm.census import Census, Theorem

STYLES = {Kind.CRITICAL: "bold red", Kind.PRIVILEGED: "yellow", Kind.INNOCUOUS: "", Kind.UNDEFINED: "magenta"}
LEGEND = "! critical: sensitive, and does not trap   * privileged: traps   ? no instruction"
LARGEST_SWEEP = 1 << 20  # bytes of an image without source that are swept
SHOWN_BYTES = 8


def classify(options: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    wanted = {
        "a guest": options.guest,
        "--census": options.census or None,
        "--witness": options.witness,
        "--bytes": options.bytes,
    }
    given = [name for name, value in wanted.items() if value is not None]
    if len(given) != 1:
        what = " and ".join(given) + " exclude each other" if given else "nothing to classify"
        raise UsageError(f"{what}: name a guest, or give --census, --witness NAME or --bytes HEX")
    if options.defines and options.guest is None:
        raise UsageError(f"-D {options.defines[0]}: only a guest's source takes definitions")
    if options.census:
        return _census(options.json)
    if options.witness is not None:
        return _witness(options.witness, options.json)
    if options.bytes is not None:
        return _listing({"bytes": options.bytes}, annotate([(0, _hex(options.bytes), "")]), options.json)
    return _listing({"guest": options.guest}, _annotations(image_of(options)), options.json)


# A guest, or bytes


def _hex(text: str) -> bytes:
    digits = text.replace(",", " ").replace("0x", " ").replace("\\x", " ")
    try:
        code = bytes.fromhex(digits)
    except ValueError:
        code = b""
    if not code:
        raise UsageError(f'--bytes {text!r}: not bytes: give pairs of hexadecimal digits, such as "0f 01 c8"')
    return code


def _annotations(image: Image) -> list[Annotation]:
    """Of each source line; without a source, a linear sweep over all that is loaded, data included."""
    own = [s for s in image.segments if s.data and s.address != image.registers.get("ebx")]
    if not image.lines:
        size = sum(len(segment.data) for segment in own)
        if size > LARGEST_SWEEP:
            raise UsageError(f"{image.name}: {size} bytes without source are too many to list: give a .asm")
        return annotate([(segment.address, segment.data, "") for segment in own])
    rows = []
    for line in image.lines:
        for segment in own:
            offset = line.address - segment.address
            if 0 <= offset < len(segment.data):
                rows.append((line.address, segment.data[offset : offset + line.size], line.text))
                break
    return annotate(rows)


def _listing(what: dict[str, str], found: list[Annotation], as_json: bool) -> int:
    counts = {str(kind): sum(one.kind is kind for one in found) for kind in Kind}
    if as_json:
        print(json.dumps({**what, **counts, "instructions": [one.as_json() for one in found]}, indent=2))
        return status.OK
    with page() as out:
        _show_listing(out, found)
        out.print()
        out.print(LEGEND, style="dim")
        out.print(", ".join(f"{count} {kind}" for kind, count in counts.items() if count))
    return status.OK


def _show_listing(out: Console, found: list[Annotation]) -> None:
    """Each instruction on a line; what is to know about a marked one below its first appearance."""
    from rich.text import Text

    explained: set[str] = set()
    for one in found:
        style = STYLES[one.kind]
        code = one.code.hex() if len(one.code) <= SHOWN_BYTES else one.code[: SHOWN_BYTES - 1].hex() + ".."
        source = printable(one.source.expandtabs(4)).rstrip() if one.source else f"        {one.text}"
        line = Text.assemble(
            (f"{one.mark} ", style),
            (f"{one.address:08x}  {code:<{2 * SHOWN_BYTES}}  ", "dim"),
            (source, style),
        )
        out.print(line, soft_wrap=True)
        name = one.row.name if one.row else str(one.kind)
        if not one.explanation or name in explained:
            continue
        explained.add(name)
        indent = " " * 12
        label = f"{name}, {class_text(one.row)}. " if one.row else ""
        for text in textwrap.wrap(label + one.explanation, max(out.width - len(indent), 40)):
            out.print(Text(indent + text, style="cyan"), soft_wrap=True)


# The census


def _census(as_json: bool) -> int:
    from vmm.census import census

    found = census()
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        with page() as out:
            _show_census(out, found)
    return status.UNEXPLAINED if found.unexplained else status.OK


def _show_census(out: Console, found: Census) -> None:
    from rich.text import Text

    def paragraph(text: str, style: str = "", indent: str = "  ") -> None:
        for line in textwrap.wrap(
            text, max(out.width - 2, 40), initial_indent=indent, subsequent_indent="  "
        ):
            out.print(Text(line, style), soft_wrap=True)

    def heading(text: str) -> None:
        out.print()
        out.print(Text(text, "bold"), soft_wrap=True)

    rows = len(found.verdicts)
    out.print(Text(f"Every instruction that touches the system, on this CPU: {rows} rows, rings 0, 1 and 3"))
    heading(f"Privileged: {len(found.privileged)}, trap outside ring 0")
    paragraph(", ".join(found.privileged), "yellow")
    heading(f"Sensitive: {len(found.sensitive)}, touch what a monitor must own, or show it")
    paragraph(", ".join(found.sensitive))
    heading(f"Critical: {len(found.critical)}, sensitive and not privileged: nothing tells a monitor")
    paragraph(", ".join(found.critical), "bold red")
    heading("Critical, form by form: control-sensitive, mode-bound, location-bound, as observed")
    for verdict in found.verdicts:
        row = verdict.standing
        if verdict.present and row.critical:
            marks = "".join(
                letter if here else "-"
                for letter, here in (("C", row.control), ("M", row.mode_bound), ("L", row.location_bound))
            )
            paper = "17" if row.among_seventeen else "  "
            out.print(
                Text.assemble(f"  {marks}  {paper}  ", (f"{row.name:<24}", "red"), f" {row.reason}"),
                no_wrap=True,
                overflow="ellipsis",
            )
    out.print(Text("  17: in Robin and Irvine's list of seventeen", "dim"))
    for theorem in (found.theorem1, found.theorem3):
        heading(f"{theorem.name}: {theorem.condition}")
        paragraph(theorem.verdict, _verdict_style(theorem))
    if found.absent:
        heading("Not on this CPU: an exception in every ring")
        paragraph(", ".join(found.absent), "dim")
    if found.deviations:
        heading("Where this CPU differs from the table, and why")
        for deviation in found.deviations:
            rows_named = f"{', '.join(deviation.rows)}: " if deviation.rows else ""
            paragraph(rows_named + deviation.sentence, indent="- ")
    heading(f"Unexplained: {len(found.unexplained) or 'nothing'}")
    for text in found.unexplained:
        paragraph(text, "bold red", indent="- ")


def _verdict_style(theorem: Theorem) -> str:
    return "green" if theorem.holds else "bold red"


# Witnesses


def _witness(name: str, as_json: bool) -> int:
    from vmm.witness import witnesses

    found = witnesses(name)
    if as_json:
        print(json.dumps({"name": name, "witnesses": [one.as_json() for one in found]}, indent=2))
        return status.OK
    from rich.text import Text

    with page() as out:
        for number, one in enumerate(found):
            if number:
                out.print()
            title, *body = one.as_text().splitlines()
            out.print(Text(title, style="bold red"), soft_wrap=True)
            for line in body:
                out.print(Text(line), soft_wrap=True)
    return status.OK
