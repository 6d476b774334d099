"""The page of translations: true, complete, and fit to be read."""

from __future__ import annotations

import os
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest_expectations import GUESTS
from vmm.cli.main import main
from vmm.image.load import load_image
from vmm.isa.classification import TABLE
from vmm.isa.classify import Kind as Class
from vmm.isa.classify import kind_of
from vmm.isa.disassemble import disassemble
from vmm.monitor.translator import layout
from vmm.monitor.translator.cache import Statistics
from vmm.monitor.translator.dump import Dump, Made
from vmm.monitor.translator.emitter import Context
from vmm.monitor.translator.legend import CELLS, COPIED, WIDTH, Fate
from vmm.monitor.translator.rows import ROWS
from vmm.monitor.translator.translate import Source, Surroundings, translate
from vmm.monitor.translator.units import Unit

SLOT = 0xFFC00000
USUAL = Context(8, 0, True, 0)
NAMES = ["popf", "processes", "smc"]  # few units; processes and paging; code that changes
LINE = re.compile(
    r"(?P<eip>[0-9a-f]{8}|\s{8})  (?P<guest>.{27}) \| "
    r"(?P<cache>[0-9a-f]{6}|\s{6})  (?P<text>.{39}) \|(?: (?P<why>.*))?$"
)


@cache
def page_of(name: str) -> str:
    """The page of a guest's whole run, by the command line."""
    with TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        path = Path(folder) / "page"
        with redirect_stdout(nothing):
            assert main(["run", str(GUESTS / f"{name}.asm"), "--dump-translations", str(path)]) == 1
        return path.read_text()


class Part:
    """A unit's part of the page, read back: per guest instruction its address, text, translation and reason."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.count = int(re.search(r", (\d+) instructions?: ", text)[1])  # type: ignore[index]
        self.rows: list[tuple[int, str, list[str], str]] = []
        for line in self.lines:
            match = LINE.match(line.ljust(WIDTH))
            if match is None:
                continue
            if (match["why"] or "").startswith("the unit ends here"):
                break
            if match["eip"].strip():
                self.rows.append((int(match["eip"], 16), match["guest"].strip(), [], match["why"].strip()))
            elif self.rows and match["guest"].strip():
                eip, guest, texts, why = self.rows[-1]
                self.rows[-1] = eip, f"{guest} {match['guest'].strip()}", texts, why
            if self.rows and match["cache"].strip():
                self.rows[-1][2].append(match["text"].strip())


def parts_of(page: str) -> list[Part]:
    return [Part(text) for text in re.split(r"^---- ", page, flags=re.M)[1:-1]]


def part_of(code: str, *, context: Context = USUAL, changing: bool = False) -> str:
    """The page's part for a unit of this machine code at 0x100000."""
    made = make(bytes.fromhex(code), context, changing)
    return Dump("test").unit(made)


def make(code: bytes, context: Context = USUAL, changing: bool = False, eip: int = 0x100000) -> Made:
    def absent() -> tuple[int, bytes]:
        raise AssertionError("the code runs over the page")

    source = Source(eip, eip, code + b"\xf4" * 16, absent, changing)
    unit, own = translate(source, Surroundings(context, SLOT, 0, (0x1000, 0x3F)), 0x420)
    size = sum(unit.sizes[unit.first : unit.last])
    return Made(unit, (code + b"\xf4" * 16)[:size], own, SLOT, 0)


# True


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_identical_has_its_reason(name: str) -> None:
    """Every instruction whose translation is not its own text says why, and says what became of it."""
    fates = {str(fate) for fate in Fate} | {"copied"}
    for part in parts_of(page_of(name)):
        for eip, guest, translation, why in part.rows:
            if translation != [guest] and len(guest) < 27 and len(translation[0]) < 39:
                assert why, f"{eip:#x} {guest}: {translation}"
            if why:
                assert why.split(":")[0] in fates


def test_the_guest_column_is_the_guests_own_code() -> None:
    """Addresses and texts on the left are a disassembly of the image, where the guest does not write code."""
    image = load_image(GUESTS / "popf.asm", memory=16 << 20)
    (segment,) = (s for s in image.segments if s.address <= image.entry < s.address + len(s.data))
    seen = 0
    for part in parts_of(page_of("popf")):
        assert len(part.rows) == part.count
        for eip, guest, _, _ in part.rows:
            at = eip - segment.address
            (one,) = disassemble(segment.data[at : at + 15], eip, 1)
            assert guest.replace(" ", "") == str(one).replace(" ptr ", " ").replace(" ", "")
            seen += 1
    assert seen > 100


@pytest.mark.parametrize("name", NAMES)
def test_the_page_counts_what_it_shows(name: str) -> None:
    """The summary's counts are those of the parts, and add up."""
    page = page_of(name)
    parts = parts_of(page)

    def number(pattern: str) -> int:
        match = re.search(rf"^ *([\d,]+)  {pattern}", page, re.M)
        return int(match[1].replace(",", "")) if match else 0

    instructions = number("guest instructions translated")
    assert number("units, of which") == len(parts)
    assert instructions == sum(part.count for part in parts)
    assert instructions == sum(number(rf" ?\d+\.\d%  {fate} ") for fate in Fate)
    for fate in Fate:
        headers = sum(int(n) for n in re.findall(rf"^guest .*?(\d+) {fate}\b", page, re.M))
        assert headers == number(rf" ?\d+\.\d%  {fate} ")


def test_cells_have_names_and_jumps_their_targets() -> None:
    """No address of the monitor's is shown as a number, and a jump says which guest address it stands for."""
    text = part_of("fa fb 9c 9d 0f20c0 7405 e8fb000000 ff10 c3")
    assert "cs:[0x" not in text
    for shown in (
        "cs:[FLAG]",
        "cs:[FLAGS_IMAGE + ecx]",
        "cs:[TAGS + edx*4]",
        "mov eax, cs:[CONTROL_REGISTERS]",
    ):
        assert shown in text
    assert "je -> 0010000e" in text and "jmp -> 00100109" in text and "jmp -> (predicted)" in text
    assert re.search(r"stubs: [0-9a-f]{6} -> 0010000e, [0-9a-f]{6} -> 00100109", text)


def test_cells_have_names_whatever_the_base_of_cs() -> None:
    """Displacements are the base's complement there, and the names are the same."""
    odd = part_of("fa 9c c3", context=Context(0x10, 0x12345000, True, 0))
    assert "only while CS is 0x10 with CS base 0x12345000" in odd
    assert re.findall(r"cs:\[[A-Z]\w*", odd) == re.findall(r"cs:\[[A-Z]\w*", part_of("fa 9c c3"))


@pytest.mark.parametrize(
    ("code", "changing", "said"),
    [
        ("90 c3", False, "looked up: an indirect target"),
        ("ffe0", False, "looked up: an indirect target"),
        ("ff10", False, "looked up: an indirect target"),
        ("fa f4 ebfd", False, "in cache: control-sensitive"),
        ("0f02c8 c3", False, "call-out: behaviour-sensitive"),
        ("ea000010000800", False, "call-out: loads CS"),
        ("0f04", False, "undefined: not an instruction"),
        ("40 c3", True, "The page of this code changes"),
        ("669d c3", False, "The sequence for it does not hold"),
        ("cd80 c3", False, "copied: always an exit"),
        ("0f01e0 c3", False, "copied: shows the guest's own value"),
        ("f4 c3", False, "copied: privileged"),
    ],
)
def test_each_fate_is_told(code: str, changing: bool, said: str) -> None:
    """For each way to translate, the page has the reason beside it."""
    words = " ".join(
        line.split("|")[-1].strip() for line in part_of(code, changing=changing).splitlines() if "|" in line
    )
    assert said in " ".join(words.split())


@dataclass(frozen=True)
class Variant:
    """A way in which the same unit can be made once more."""

    code: str = "40 c3"
    changing: bool = False
    frame: int = 0x100000
    slot: int = SLOT
    flushes: int = 0

    def make(self) -> Made:
        one = make(bytes.fromhex(self.code), changing=self.changing)
        one.unit.sources = [(self.frame, size) for _, size in one.unit.sources]
        return Made(one.unit, one.guest, one.code, self.slot, self.flushes)


@pytest.mark.parametrize(
    ("again", "said"),
    [
        (Variant(code="42 c3"), "its code has changed"),
        (Variant(changing=True), "its page is written to often"),
        (Variant(), "its page has been written to, though not here"),
        (Variant(slot=0xFF800000), "since then the guest has mapped something where the cache was"),
        (Variant(flushes=1), "since then the cache was full"),
        (Variant(frame=0x200000), "the page is mapped to another frame"),
    ],
)
def test_a_unit_that_is_made_again_says_why(again: Variant, said: str) -> None:
    """Each cause of a second translation is told apart, with the number of the first."""
    dump = Dump("test")
    assert "Made before" not in dump.unit(Variant().make())
    assert f"Made before, as unit 1; {said}" in dump.unit(again.make())
    assert "2  units, of which 1 were made again" in dump.summary(Statistics())


# Complete


def test_nothing_is_lost_when_the_cache_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache that is full again and again, the page has every unit that was made, and says so."""
    monkeypatch.setattr(layout, "CODE_SIZE", 0x2000)
    page, report = tmp_path / "page", tmp_path / "report"
    words = ["run", str(GUESTS / "processes.asm"), "--dump-translations", str(page), "--report", str(report)]
    assert main(words) == 1
    text = page.read_text()
    units = len(re.findall(r"^---- unit ", text, re.M))
    flushes = int(re.search(r"units dropped; (\d+) times the whole cache", text)[1])  # type: ignore[index]
    assert flushes > 0 and f'"units": {units},' in report.read_text()
    assert f'"flushes": {flushes}' in report.read_text()
    assert "since then the cache was full, and has been emptied" in text


def test_every_cell_is_in_the_legend() -> None:
    """What translations may name is explained, and nothing that there is not."""
    legend = Dump("test").head()
    parts = {"DATA", "CONSTANTS", "CODE", "CODE_SIZE", "TABLE_SIZE", "SIZE", "FRAME"}
    cells = {name for name in vars(layout) if name.isupper()} - parts
    assert cells == set(CELLS)
    assert all(re.search(rf"^  {name} ", legend, re.M) for name in cells)
    for name in NAMES:
        assert set(re.findall(r"cs:\[([A-Z]\w*)", page_of(name))) <= cells | {"NAME"}


def test_every_critical_instruction_is_replaced_or_has_a_reason_to_be_copied() -> None:
    """Of the classification's critical rows none is copied in silence."""
    for row in TABLE:
        if kind_of(row) is Class.CRITICAL and not all(key.rstrip("mr") in ROWS for key in row.keys):
            assert row.name in COPIED, row.name


# Fit to be read


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_short_and_plain(name: str) -> None:
    """No line is longer than 132 columns, ends with a space or has anything but ASCII."""
    for line in page_of(name).splitlines():
        assert len(line) <= WIDTH and line == line.rstrip() and line.isascii()


@settings(max_examples=300, deadline=None)
@given(
    code=st.binary(min_size=1, max_size=40),
    changing=st.booleans(),
    wide=st.booleans(),
    iopl=st.integers(0, 3),
)
def test_any_code_makes_a_page(code: bytes, changing: bool, wide: bool, iopl: int) -> None:
    """Whatever the bytes and the context, the part has a row for each instruction and keeps its width."""
    made = make(code, Context(8, 0, wide, iopl), changing)
    text = Dump("test").unit(made)
    assert all(len(line) <= WIDTH for line in text.splitlines())
    part = Part(text)
    unit: Unit = made.unit
    assert [row[0] for row in part.rows] == unit.eips[unit.first : unit.last]


def test_a_reason_is_given_in_full_once_in_a_unit() -> None:
    """The second CLI of a unit refers to the first."""
    text = part_of("fa fa c3")
    assert text.count("in cache: control-sensitive") == 1 and text.count("in cache: CLI, as above") == 1
