"""Bar charts of a comparison as inline SVG, by matplotlib.

The hard part is that the same drawing has to do on a white page, on a dark one, and on paper. So it has no colours of
its own: what is drawn in a placeholder's colour gets a variable of the page's style sheet instead. Text stays
text, and the same comparison gives the same SVG, byte for byte.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 6  # --mode-0 and so on, in the page's style sheet
_INK, _RULE = "#010101", "#010102"
_MODE = "#0101{:02x}"
_FIRST_MODE = 0x10
_WIDTH = 5.6  # inches of 72 units: on a telephone the text is still legible
_BAR = 0.2  # inches
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vmm",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _RULE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _RULE,
    "hatch.color": _INK,
}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Bar:
    """One mode's bar: the part `of` it that exits took is shown apart."""

    mode: str
    colour: int  # 0 to COLOURS - 1
    value: float
    label: str
    of: float = 0.0


def exits_chart(groups: Mapping[str, Sequence[Bar]], name: str, title: str, description: str) -> str:
    """Bars by group of exits, a bar a mode, on a logarithmic scale: a handful must be seen beside thousands."""
    rows = sum(len(bars) for bars in groups.values())
    with _axes(rows + 0.8 * len(groups)) as (axes, done):
        position, names = 0.0, []
        for group, bars in groups.items():
            middle = position + (len(bars) - 1) / 2
            names.append((middle, group))
            for bar in bars:
                _draw(axes, position, bar)
                position += 1
            position += 0.8
        most = max((bar.value for bars in groups.values() for bar in bars), default=1)
        axes.set_xscale("log")
        axes.set_xlim(0.7, most**1.45 * 3 + 10)
        axes.set_ylim(position - 1.3, -0.7)
        axes.set_yticks([at for at, _ in names], [text for _, text in names])
        axes.set_xlabel("exits, logarithmic scale")
        done()
        return _inline(axes, name, title, description)


def time_chart(bars: Sequence[Bar], name: str, title: str, description: str) -> str:
    """A bar a mode: seconds, and how much of them was spent in handling exits."""
    with _axes(len(bars) * 1.5) as (axes, done):
        for position, bar in enumerate(bars):
            _draw(axes, position, bar, 0.62)
        axes.set_xlim(0, max((bar.value for bar in bars), default=1.0) * 1.45 or 1.0)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_yticks(range(len(bars)), [bar.mode for bar in bars])
        axes.set_xlabel("seconds; hatched: in handling exits")
        done()
        return _inline(axes, name, title, description)


@contextmanager
def _axes(rows: float) -> Iterator[tuple[Axes, type]]:
    """Axes for so many bars, in our style; what is drawn is finished by calling the second."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):  # type: ignore[arg-type]  # its stubs know only literal keys
        figure = Figure(figsize=(_WIDTH, rows * _BAR + 0.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()

        def done() -> None:
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", linewidth=0.5)
            axes.set_axisbelow(True)
            figure.patch.set_visible(False)
            axes.patch.set_visible(False)

        yield axes, done  # type: ignore[misc]


def _draw(axes: Axes, position: float, bar: Bar, height: float = 0.82) -> None:
    colour = _MODE.format(_FIRST_MODE + bar.colour)
    axes.barh(position, bar.value, height, color=colour, linewidth=0)
    if bar.of:
        axes.barh(position, bar.of, height, color="none", hatch="////", edgecolor=_INK, linewidth=0)
    axes.annotate(
        bar.label, (bar.value, position), (4, 0), textcoords="offset points", va="center", fontsize=8.5
    )


def _inline(axes: Axes, name: str, title: str, description: str) -> str:
    """The figure as an SVG element: named, described, without metadata, in the page's colours, ids its own."""
    held = io.StringIO()
    figure = axes.get_figure()
    assert figure is not None
    figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})  # type: ignore[union-attr]
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(held.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{_SVG}metadata":
                parent.remove(child)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == _LINK:
                element.attrib.pop(key)
                element.set("href", value.replace("#", f"#{name}-"))
            else:
                element.set(key, _coloured(value.replace("url(#", f"url(#{name}-")))
    for tag, text, place in (("title", title, 0), ("desc", description, 1)):
        child = ElementTree.Element(f"{_SVG}{tag}", {"id": f"{name}-{tag}"})
        child.text = text
        root.insert(place, child)
    for key in ("width", "height"):
        root.attrib.pop(key)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    return ElementTree.tostring(root, encoding="unicode")


def _coloured(text: str) -> str:
    """Placeholders as variables of the style sheet."""
    text = text.replace(_INK, "var(--ink)").replace(_RULE, "var(--rule)")
    return re.sub(
        "#0101([0-9a-f]{2})", lambda match: f"var(--mode-{int(match[1], 16) - _FIRST_MODE})", text
    )
