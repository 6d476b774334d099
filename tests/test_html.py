"""`compare --html`: one file that stands by itself, is right in a browser, and is not the guest's to write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.browser import Browser
from tests.guest_expectations import GUESTS
from tests.test_cli import EXIT_5, HALT, Cli
from tests.test_cli import vmm as vmm
from vmm.cli import compare as command
from vmm.cli.main import main
from vmm.comparison import Comparer
from vmm.errors import Interrupted, OutputError
from vmm.vm import MODES

# Writes "<script>...</script>" to its console, and in ring 1 something else: so that it is among the differences.
HOSTILE = """\
bits 32
org 0x100000
start:  mov esp, 0x200000
        mov esi, text
        push cs                 ; <script>alert('source')</script> & "quotes"
        pop eax
        and eax, 3
        add [text], al
.next:  lodsb
        test al, al
        jz .end
        out 0xE9, al
        jmp .next
.end:   mov al, 0
        out 0xF4, al
text:   db '*<script>document.title = 1</script><img src=x onerror=alert(1)> &amp; "', 27, '[31m', 10, 0
"""


def page_of(vmm: Cli, *words: str | Path) -> str:
    path = vmm.folder / "report.html"
    assert vmm("compare", *words, "--html", path) == 0
    return path.read_text()


class Tags(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


# The file


def test_the_page_is_one_file(vmm: Cli) -> None:
    """It refers to nothing outside itself: no script, no link but an empty icon, no address to fetch from."""
    text = page_of(vmm, GUESTS / "popf.asm")
    for tag, attributes in Tags(text).found:
        assert tag not in ("script", "iframe", "img", "object", "embed", "base")
        for name in ("src", "href", "data", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
        assert not any(name.startswith("on") for name in attributes)
    assert "url(http" not in text and "@import" not in text
    assert "Content-Security-Policy" in text


def test_names_in_the_page_are_unique(vmm: Cli) -> None:
    """No two elements have the same id, in whichever chart they are, and every reference has its target."""
    text = page_of(vmm, GUESTS / "popf.asm")
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]*)', text):
        assert target in ids
    for names in re.findall(r'aria-labelledby="([^"]*)"', text):
        assert set(names.split()) <= set(ids)


def test_the_same_comparison_is_the_same_page(vmm: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for times and memory, two pages of one comparison are equal to the last byte: no date, no chance."""
    monkeypatch.setattr("time.perf_counter", iter(range(10**6)).__next__)
    monkeypatch.setattr("time.perf_counter_ns", lambda: 0)
    monkeypatch.setattr("vmm.measures.MemoryMeter.peak", lambda _self: 1 << 20)
    pages = [page_of(vmm, GUESTS / "pushcs.asm") for _ in range(2)]
    assert pages[0] == pages[1]


def test_the_guest_cannot_write_the_page(vmm: Cli) -> None:
    """Markup in a console, a source line or a file's name is shown as text."""
    path = vmm.folder / "<b>&amp;.asm"
    path.write_text(HOSTILE)
    text = page_of(vmm, path, "--modes", "native,trap,bt")
    assert not {"script", "img", "b"} & {tag for tag, _ in Tags(text).found}
    assert "&lt;script&gt;alert(&#39;source&#39;)" in text  # the source line that is blamed
    assert "&lt;script&gt;document.title" in text  # the console
    assert "&lt;b&gt;&amp;amp;.asm" in text
    assert "\x1b" not in text


def test_what_the_terminal_says_is_on_the_page(vmm: Cli) -> None:
    """The table's every cell, the facts of the divergence, the lines of the consoles, each mode's sentence."""
    text = page_of(vmm, GUESTS / "popf.asm")
    assert "IF should have become 1; it stayed 0." in text
    assert "popf                    ; IF was 1 in what PUSHF saved" in text
    assert "verdict: WRONG, POPF left the interrupt flag alone and nothing said so" in text
    assert "Robin and Irvine 2000" in text
    for mode in MODES.values():
        assert f">{mode.name}</th>" in text and mode.summary.split("'")[0] in text
    assert "402,078" in text and "python -m vmm compare" in text


def test_a_page_that_cannot_be_written_loses_nothing(vmm: Cli) -> None:
    """A full disk under the page is told in one line and by the status, after the comparison has been printed."""
    assert vmm("compare", vmm.guest(HALT), "--html", "/dev/full") == OutputError.status
    assert "No difference" in vmm.out
    assert vmm.err == "vmm: --html /dev/full: No space left on device\n"


def test_a_comparison_that_fails_leaves_the_last_page(vmm: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened before the run and replaced after it: an interrupted one destroys nothing."""
    path = vmm.folder / "report.html"
    path.write_text("the last page, and longer than nothing")

    def interrupted(_self: Comparer, _modes: object) -> None:
        raise Interrupted("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(Comparer, "compare", interrupted)
        assert vmm("compare", vmm.guest(HALT), "--html", path) == Interrupted.status
    assert path.read_text() == "the last page, and longer than nothing"
    path.write_text("x" * 10**6)
    assert vmm("compare", vmm.guest(HALT), "--html", path) == 0
    assert path.read_text().endswith("</html>")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("fa ebfe", ["--max-instructions", "1000", "--modes", "native"]),  # no exit at all
        ("b041 66bae900 ee ebfd", ["--max-instructions", "20000"]),  # a console without an end
        ("b800000040 ffe0", []),  # no memory there
        ("f4", ["--modes", "bt"]),
    ],
)
def test_every_guest_makes_a_page(vmm: Cli, code: str, words: list[str]) -> None:
    """However a guest ends, and whichever modes were asked for."""
    text = page_of(vmm, vmm.guest(bytes.fromhex(code)), *words)
    assert text.count("<svg") in (1, 2) and text.endswith("</html>")


def test_a_guest_of_xens_alone_makes_a_page(vmm: Cli) -> None:
    """Without a reference there are no ratios and no verdicts, but a table and charts."""
    text = page_of(vmm, GUESTS / "hello.asm", "-D", "PV")
    assert "made for Xen&#39;s interface" in text and text.count("<svg") == 2


def test_what_makes_the_page_may_be_missing(vmm: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib, `--html` is refused in one line that says what to install; nothing runs."""
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert vmm("compare", vmm.guest(EXIT_5), "--html", vmm.folder / "x") == 2
    assert vmm.err == f"vmm: --html {vmm.folder / 'x'}: needs matplotlib: install with pip install 'vmm[html]'\n"
    assert not (vmm.folder / "x").exists()


# In a browser


@dataclass(frozen=True)
class Open:
    """The page of a guest that goes wrong under trap, in a browser that starts once for all tests."""

    browser: Browser
    path: Path


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    folder = tmp_path_factory.mktemp("page")
    with Browser(folder / "profile") as browser:
        source = folder / "hostile.asm"
        source.write_text(HOSTILE)
        path = folder / "report.html"
        assert main(["compare", str(source), "--html", str(path)]) == 0
        browser.open(path)
        yield Open(browser, path)


def test_the_browser_finds_every_part(opened: Open) -> None:
    """One heading, a table with a column a mode and headers for rows and columns, charts with names, the blame."""
    value = opened.browser.value
    assert value("document.title").endswith("modes")
    assert value("document.querySelectorAll('h1').length") == 1
    assert value("document.documentElement.lang") == "en"
    heads = value("[...document.querySelectorAll('table')[0].querySelectorAll('thead th')].map(e => e.innerText)")
    assert heads == list(MODES)
    rows = value(
        "[...document.querySelectorAll('table')[0].querySelectorAll('tbody tr')]"
        ".map(r => [r.querySelector('th[scope=row]').innerText, r.querySelectorAll('td').length])"
    )
    assert {"outcome", "exits", "seconds", "peak memory"} <= {name for name, _ in rows}
    assert {count for _, count in rows} == {len(MODES)}
    names = value(
        "[...document.querySelectorAll('svg[role=img]')]"
        ".map(s => s.getAttribute('aria-labelledby').split(' ').map(i => document.getElementById(i).textContent))"
    )
    assert [title for title, _ in names] == ["Exits by reason, in each mode", "Time by mode"]
    assert all(mode in names[1][1] for mode in ("native", "trap", "bt"))
    assert value("document.querySelector('.blamed').innerText.includes('push cs')")
    assert "<script>" in value("document.querySelector('pre .wrong').innerText")


def test_the_text_of_charts_is_text(opened: Open) -> None:
    """A chart's words can be selected, searched and read aloud; and each bar names its mode."""
    texts = opened.browser.value("[...document.querySelectorAll('svg text')].map(t => t.textContent)")
    assert any(re.fullmatch(r"native \d[\d,]*", text) for text in texts)
    assert any(re.fullmatch(r"\d+\.\d{3} s, .*x", text) for text in texts)
    assert "exits, logarithmic scale" in texts


def test_nothing_is_fetched_and_nothing_complains(opened: Open) -> None:
    """The browser asks for the file alone, runs no script of the guest's, and has nothing to say."""
    assert {url.split(":")[0] for url in opened.browser.requests} <= {"file", "data"}
    assert [url for url in opened.browser.requests if url.startswith("file")] == [opened.path.as_uri()]
    assert opened.browser.complaints == []
    assert opened.browser.value("document.title") != "1"


_LUMINANCE = """
(() => {
  const parts = s => s.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = c => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)/.test(c)) return parts(c);
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll('p, th, td, dt, dd, pre span, h1, h2, li, caption, svg text')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e);
    const mine = light(parts(e.closest('svg') ? style.fill : style.color)), paper = light(behind(e));
    const contrast = (Math.max(mine, paper) + 0.05) / (Math.min(mine, paper) + 0.05);
    if (contrast < 4.5) bad.push([e.tagName, e.textContent.slice(0, 30), contrast]);
  }
  return bad;
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_word_stands_out(opened: Open, dark: bool) -> None:
    """Text has a contrast of 4.5 to 1 at least with what is behind it, in charts, too (WCAG 2.1, 1.4.3)."""
    opened.browser.look(dark=dark)
    assert opened.browser.value(_LUMINANCE) == []


def test_dark_and_light_differ(opened: Open) -> None:
    """Paper, ink, bars and words of charts follow the reader's colour scheme."""
    looks = []
    for dark in (False, True):
        opened.browser.look(dark=dark)
        looks.append(
            opened.browser.value(
                "[getComputedStyle(document.documentElement).backgroundColor,"
                " getComputedStyle(document.documentElement).color,"
                " getComputedStyle(document.querySelector('svg text')).fill,"
                " [...document.querySelectorAll('svg path')].map(p => getComputedStyle(p).fill).join()]"
            )
        )
    assert all(light != dark for light, dark in zip(*looks, strict=True))
    first = opened.browser.screenshot()
    opened.browser.look()
    assert opened.browser.screenshot() != first


def test_a_telephone_shows_it_without_scrolling_sideways(opened: Open) -> None:
    """390 pixels are enough for everything but wide tables and code, which scroll by themselves."""
    opened.browser.look(width=390)
    assert opened.browser.value("innerWidth") == 390
    assert opened.browser.value("document.documentElement.scrollWidth") <= 390
    scrolls = "[...document.querySelectorAll('.scroll, pre')].every(e => e.tabIndex === 0)"
    assert opened.browser.value(scrolls)  # by the keyboard, too
    opened.browser.look()


def test_it_prints(opened: Open) -> None:
    """On paper it is black on white even in a dark browser, cuts nothing off, and takes a few pages."""
    browser = opened.browser
    browser.look(width=700, dark=True, media="print")
    assert browser.value("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("getComputedStyle(document.documentElement).color") == "rgb(0, 0, 0)"
    assert browser.value("document.documentElement.scrollWidth") <= 700
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF-")
    assert 1 <= len(re.findall(rb"/Type */Page\b", pdf)) <= 8
    browser.look()
