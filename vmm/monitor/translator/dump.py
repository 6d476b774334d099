"""Translations as a page to read: each unit's guest listing beside what became of it, and why.

The reader knows assembly, but neither the cache's addresses nor the monitor's cells. So jumps are shown with the
guest address that they stand for, cells by name, and what is always the same (stubs, exits, look-ups) is told once,
in the legend. Everything here makes text of plain values; where it goes is for others to say.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from dataclasses import dataclass

from vmm.isa import classify
from vmm.isa.disassemble import Instruction, disassemble
from vmm.monitor.translator import layout
from vmm.monitor.translator.cache import Statistics
from vmm.monitor.translator.emitter import TRAP, Context
from vmm.monitor.translator.legend import COPIED, FATES, PRIVILEGED, WIDTH, Fate, legend, note
from vmm.monitor.translator.units import Kind, Piece, Unit

_GUEST, _CACHE, _WHY = 27, 39, 42  # columns of the three texts
_REMEMBERED = 1 << 16  # units whose last translation is known, to say why there is another


_CELL_NAMES = sorted(
    (
        (offset, name)
        for name, offset in vars(layout).items()
        if name.isupper()
        and name not in ("DATA", "CONSTANTS", "CODE", "CODE_SIZE", "TABLE_SIZE", "SIZE", "FRAME")
    ),
    reverse=True,
)
_OWN = re.compile(r"cs:\[(?:(?P<index>[^]]*?) (?P<sign>[+-]) )?0x(?P<number>[0-9a-f]+)\]")


@dataclass(frozen=True, slots=True)
class Made:
    """A unit that has just been made: the guest's bytes, its own, where the slot is, flushes of the cache so far."""

    unit: Unit
    guest: bytes
    code: bytes
    slot: int
    flushes: int


@dataclass(frozen=True, slots=True)
class _Past:
    """What is remembered of a unit's last translation."""

    number: int
    guest: int  # hash
    code: int
    sources: tuple[tuple[int, int], ...]
    checked: bool
    slot: int
    flushes: int


@dataclass(frozen=True, slots=True)
class _Row:
    """One guest instruction: its texts, the translation's lines as (address, text), and the reason."""

    eip: int
    guest: str
    lines: list[tuple[int, str]]
    why: str
    again: str  # what is said instead, where the unit has had that reason before
    fate: Fate | None  # None: the monitor's own


class Dump:
    """Makes the text, unit by unit. Each method returns whole lines, the last of them ended."""

    def __init__(self, guest: str) -> None:
        self._name = guest
        self._past: dict[tuple[Context, int], _Past] = {}
        self._fates: Counter[Fate] = Counter()
        self._replaced: Counter[str] = Counter()  # rows of what was not copied
        self._units = self._again = self._guest_bytes = self._cache_bytes = self._checks = 0

    def head(self) -> str:
        """The title and the legend."""
        return _page(legend(self._name))

    def unit(self, made: Made) -> str:
        """A unit, as it has been made."""
        self._units += 1
        unit = made.unit
        rows = _rows(made)
        fates = Counter(row.fate for row in rows if row.fate is not None)
        self._fates += fates
        self._checks += unit.first
        self._guest_bytes += len(made.guest)
        self._cache_bytes += len(made.code)
        for index in range(unit.first, unit.last):
            piece = unit.special.get(index)
            if piece is not None:
                self._replaced[f"{_name(piece)}, {_fate(piece)}"] += 1
        lines = [_rule(f"unit {self._units}"), *_summary_of(made, fates), *self._why_again(made), ""]
        said: set[str] = set()
        for row in rows:
            lines += _show(row, row.why if row.why not in said else row.again)
            said.add(row.why)
        return _page([*lines, *_stubs(unit), ""])

    def summary(self, statistics: Statistics) -> str:
        """The end of the page; `statistics` are the cache's own."""
        s, total = statistics, sum(self._fates.values())
        lines = [_rule("all in all"), ""]
        lines.append(f"{self._units:>9,}  units, of which {self._again:,} were made again")
        if self._checks:
            lines.append(
                f"{self._checks:>9,}  of the units check their source each time, because its page changes"
            )
        lines += [f"{total:>9,}  guest instructions translated, of which"]
        lines += [
            f"{count:>9,}  {100 * count / total:4.1f}%  {fate:<9}  {FATES[fate]}"
            for fate in Fate
            if (count := self._fates[fate])
        ]
        ratio = f", {self._cache_bytes / self._guest_bytes:.1f} times as many" if self._guest_bytes else ""
        lines.append(f"{self._guest_bytes:>9,}  bytes of the guest's code")
        lines.append(f"{self._cache_bytes:>9,}  bytes of the cache{ratio}")
        lines.append(f"{s.links:>9,}  jumps led straight to their target's translation")
        lines.append(f"{s.lookups:>9,}  entries made in TAGS and TRANSLATIONS")
        lines.append(f"{s.dropped:>9,}  units dropped; {s.flushes:,} times the whole cache")
        if self._replaced:
            lines += ["", "What was not copied, by the number of places:", ""]
            lines += [f"{count:>9,}  {name}" for name, count in self._replaced.most_common()]
        return _page(lines)

    def _why_again(self, made: Made) -> list[str]:
        """Why the unit is translated again, if it is."""
        unit = made.unit
        key = unit.context, unit.eip
        last = self._past.pop(key, None)
        now = _Past(
            self._units,
            hash(made.guest),
            hash(made.code),
            tuple(unit.sources),
            bool(unit.first),
            made.slot,
            made.flushes,
        )
        self._past[key] = now
        if len(self._past) > _REMEMBERED:
            del self._past[next(iter(self._past))]
        if last is None:
            return []
        self._again += 1
        return [f"Made before, as unit {last.number}; {_cause(last, now, unit)}."]


def _cause(last: _Past, now: _Past, unit: Unit) -> str:
    if now.slot != last.slot:
        return "since then the guest has mapped something where the cache was, and the cache has moved"
    if now.flushes != last.flushes:
        return "since then the cache was full, and has been emptied"
    if now.sources != last.sources and [a for a, _ in now.sources] != [a for a, _ in last.sources]:
        return "the page is mapped to another frame now"
    if now.checked and not last.checked:
        return "its page is written to often: from now on the code is checked instead of the page being protected"
    if now.guest != last.guest:
        return "its code has changed"
    if now.code != last.code:
        return (
            "SGDT has something else to show"
            if unit.uses_gdtr
            else "the CS of the guest's processes is known now"
        )
    return "its page has been written to, though not here"


# The rows


def _rows(made: Made) -> list[_Row]:
    unit = made.unit
    ends = [*unit.starts[1:], unit.origin + len(made.code)]
    names = _targets(unit)
    rows, at = [], 0
    for index, (start, end) in enumerate(zip(unit.starts, ends, strict=True)):
        piece = unit.special.get(index)
        if index > unit.last or index == unit.last and not _is_glue(unit, index):
            break  # stubs
        eip, size = unit.eips[index], unit.sizes[index]
        guest = made.guest[at : at + size]
        code = made.code[start - unit.origin : end - unit.origin]
        own = piece is not None and piece.kind in (Kind.CHECK, Kind.STUB)
        if not own:
            at += size
        lines = _translation(code, start, piece is not None, names, unit.context.base, made.slot)
        fate = None if own else _fate(piece)
        why = _reason(piece, guest, eip)
        again = why if piece is None or own else f"{fate}: {_name(piece)}, as above"
        rows.append(_Row(eip, _guest_text(piece, guest, eip, own), lines, why, again, fate))
    return rows


def _is_glue(unit: Unit, index: int) -> bool:
    """The jump that a unit without a terminator ends with, as against a stub."""
    piece = unit.special.get(index)
    return piece is not None and piece.link is not None and piece.link.site == unit.starts[index] + 1


def _fate(piece: Piece | None) -> Fate:
    if piece is None:
        return Fate.IDENTICAL
    if piece.kind is Kind.SEQUENCE:
        if piece.prediction is not None or piece.row is not None and piece.row.sequence == "RET":
            return Fate.LOOKED_UP
        return Fate.IN_CACHE if piece.link is None else Fate.CHAINED
    return Fate.CALL_OUT if piece.kind is Kind.CALL_OUT else Fate.UNDEFINED


def _name(piece: Piece) -> str:
    """What kind of instruction was replaced."""
    if piece.row is None or piece.instruction is None:
        return "no instruction"
    return piece.row.sequence or piece.instruction.mnemonic


def _guest_text(piece: Piece | None, code: bytes, eip: int, own: bool) -> str:
    if own:
        return ""
    found = disassemble(code, eip, 1)
    if found and found[0].size == len(code):
        return _plain(found[0])
    if piece is not None and piece.instruction is not None:
        return piece.instruction.text
    return "db " + ", ".join(f"0x{byte:02x}" for byte in code) if code else "(no instruction)"


def _reason(piece: Piece | None, code: bytes, eip: int) -> str:
    """Why the translation is what it is; "" where nothing is to be said."""
    if piece is None:
        found = classify.classify(code, eip)
        if found.kind is classify.Kind.PRIVILEGED:
            return PRIVILEGED
        return COPIED.get(found.name, "") if found.kind is classify.Kind.CRITICAL else ""
    if piece.kind is Kind.CHECK:
        return "The page of this code changes: are the bytes still those that were translated?"
    if piece.kind is Kind.STUB:
        return "the unit ends here, and the guest's code goes on"
    if piece.row is None:
        return f"{_fate(piece)}: not an instruction: the guest gets #UD"
    if piece.kind is Kind.CALL_OUT and piece.row.sequence is not None:
        return f"{_fate(piece)}: {piece.row.reason}. The sequence for it does not hold for this form, or here"
    return f"{_fate(piece)}: {piece.row.reason}"


# The translation


def _targets(unit: Unit) -> dict[int, str]:
    """By offset in the cache of a displacement or constant: what to write for the operands."""
    names = {link.site: f"-> {link.target:08x}" for link in unit.links}
    for landing in unit.landings:
        names[landing.miss] = "-> (next landing)"
    for piece in unit.special.values():
        prediction = piece.prediction
        if prediction is not None:
            names[prediction.expected] = "ecx, [ecx - (predicted)]"
            names[prediction.back] = "ecx, [ecx + (predicted)]"
            names[prediction.link.site] = "-> (predicted)"
    return names


def _translation(
    code: bytes, start: int, own: bool, names: dict[int, str], base: int, slot: int
) -> list[tuple[int, str]]:
    """(offset in the cache, text) of each instruction; `own` code is the monitor's."""
    lines, at = [], 0
    while at < len(code):
        found = disassemble(code[at:], start + at, 1)
        if not found:
            lines.append((start + at, "db " + ", ".join(f"0x{byte:02x}" for byte in code[at:])))
            break
        one = found[0]
        lines.append((one.address, _own_text(one, names, base, slot) if own else _plain(one)))
        at += one.size
    return lines


def _plain(one: Instruction) -> str:
    return str(one).replace(" ptr ", " ")


def _own_text(one: Instruction, names: dict[int, str], base: int, slot: int) -> str:
    if one.bytes == TRAP:
        return "trap"
    operands = names.get(one.address + one.size - 4)
    if operands is not None and one.size >= 5:
        return f"{one.mnemonic} {operands}"
    if one.mnemonic[0] == "j" and one.operands.startswith("0x"):
        return f"{one.mnemonic} {int(one.operands, 16):06x}"
    text = _OWN.sub(lambda match: _cell(match, base, slot), _plain(one))
    return re.sub(r"(?:dword |word |byte )?(cs:\[[A-Z])", r"\1", text) if _names_size(text) else text


def _names_size(text: str) -> bool:
    """Whether a register says how large the operand is."""
    return re.search(
        r"(?:^mov|[ ,])\b(?:e?[abcd]x|[abcd][lh]|e?[sd]i|e?[sb]p)\b(?![^\[]*\])", text
    ) is not None and (not text.startswith("movzx"))


def _cell(match: re.Match[str], base: int, slot: int) -> str:
    """A cell of the monitor's by name; anything else as it is."""
    number = int(match["number"], 16)
    if match["sign"] == "-":
        number = -number
    offset = number + base - slot & 0xFFFFFFFF
    if offset >= layout.CODE:
        return match[0]
    start, name = next((cell for cell in _CELL_NAMES if cell[0] <= offset), (0, ""))
    if not name:
        return match[0]
    inside = f" + {offset - start}" if offset > start else ""
    index = f" + {match['index']}" if match["index"] else ""
    return f"cs:[{name}{inside}{index}]"


# The page


def _page(lines: list[str]) -> str:
    return "".join(line.rstrip() + "\n" for line in lines)


def _rule(title: str) -> str:
    return f"---- {title} ".ljust(WIDTH, "-")


def _summary_of(made: Made, fates: Counter[Fate]) -> list[str]:
    unit = made.unit
    count = unit.last - unit.first
    own, bytes_ = len(made.code), len(made.guest)
    end = unit.eip + max(1, bytes_) - 1 & 0xFFFFFFFF
    parts = [f"{number} {fate}" for fate in Fate if (number := fates[fate])]
    lines = [
        f"guest {unit.eip:08x}-{end:08x}, {count} instruction{'s' if count != 1 else ''}: {', '.join(parts)}",
        f"{_bytes(bytes_)} of the guest's -> {own} at {unit.origin:06x}-{unit.origin + own - 1:06x} in the cache,"
        f" {own / max(1, bytes_):.1f} times as many",
    ]
    c = unit.context
    unusual = [
        text
        for text, here in (
            (f"CS base {c.base:#x}", c.base),
            ("16-bit stack", not c.wide_stack),
            (f"IOPL {c.iopl}", c.iopl),
        )
        if here
    ]
    if unusual:
        lines.append(f"only while CS is {c.selector:#x} with {', '.join(unusual)}")
    return lines


def _bytes(count: int) -> str:
    return f"{count} byte{'s' if count != 1 else ''}"


def _show(row: _Row, reason: str) -> list[str]:
    """The three columns. A reason takes as many lines as it needs; notes stand where there is room."""
    guest = _wrapped(row.guest, _GUEST)
    cache = [(f"{address:06x}", text) for address, text in row.lines]
    translated: list[tuple[str, str, str]] = []
    for address, text in cache:
        first, *rest = _wrapped(text, _CACHE)
        translated += [(address, first, text), *(("", part, "") for part in rest)]
    why = _wrapped(reason, _WHY) if reason else []
    lines = []
    for number in range(max(len(guest), len(translated), len(why))):
        address, shown, text = translated[number] if number < len(translated) else ("", "", "")
        left = guest[number] if number < len(guest) else ""
        eip = f"{row.eip:08x}" if number == 0 and row.guest else ""
        last = why[number] if number < len(why) else note(text) if reason else ""
        lines.append(f"{eip:8}  {left:<{_GUEST}} | {address:6}  {shown:<{_CACHE}} | {last}")
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ") or [""]


def _stubs(unit: Unit) -> list[str]:
    shown = [
        f"{unit.starts[index]:06x} -> {unit.eips[index]:08x}"
        for index in range(unit.last, len(unit.starts))
        if not _is_glue(unit, index)
    ]
    if not shown:
        return []
    return textwrap.wrap(
        "stubs: " + ", ".join(shown), WIDTH, initial_indent=" " * 40, subsequent_indent=" " * 47
    )
