"""A unit from the guest's code: decode until a terminator, copy what is innocuous, replace what is not.

The form of an instruction says whether it has a row; only what has one is decoded fully. A unit goes on
past conditional branches and calls, because both leave it by links, and ends with an unconditional transfer, at the
end of its page, or after `LONGEST` instructions. An instruction that runs over the end of the page is in, if
it can be fetched.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vmm.isa.decode import MAX_LENGTH, Instruction, decode
from vmm.isa.forms import Form, form_at
from vmm.machine.sites import SITES
from vmm.monitor.translator.emitter import ECX, Context, Emitter
from vmm.monitor.translator.rows import ROWS, Row, may_store
from vmm.monitor.translator.sequences import SEQUENCES, check_landing, landing
from vmm.monitor.translator.units import Kind, Piece, Unit

LONGEST = 48  # instructions in a unit
LARGEST = 4096  # bytes that a unit may take, stubs included
RETURNS = frozenset((0xCA, 0xCB, 0xCF))  # to a process these are the CPU's own
REPEATED = re.compile(rb"[\x26\x2e\x36\x3e\x64-\x67\xf0]*[\xf2\xf3]")
_STI = 0xFB


@dataclass(frozen=True, slots=True)
class Source:
    """Where code comes from: `code` are the bytes from EIP to the end of the page, at physical `address`.

    `following` gives the physical address and the bytes of the next page, or raises `PageFault`. On a page whose
    bytes change under the monitor's eyes (`changing`), units are checked each time they are entered.
    """

    eip: int
    address: int
    code: bytes
    following: Callable[[], tuple[int, bytes]]
    changing: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a translation depends on beside the code."""

    context: Context
    slot: int
    user_code: int
    gdtr: tuple[int, int]


def translate(source: Source, around: Surroundings, origin: int) -> tuple[Unit, bytes]:
    """The unit for the code at `source`, to lie at `origin` in the cache. May raise `PageFault`."""
    return _Translation(source, around, origin).run()


def translate_landing(around: Surroundings, eip: int, origin: int) -> tuple[Unit, bytes]:
    """The unit through which a RET gets to guest `eip`; without a link yet."""
    e = Emitter(around.context, around.slot, origin, 0, around.gdtr)
    unit = Unit(around.context, eip, origin, transit=True)
    landing(e, eip)
    link = e.links[0]
    link.glue = True
    unit.starts, unit.eips, unit.sizes = [origin, e.here], [eip, eip], [0, 0]
    unit.special[0] = Piece(Kind.LANDING, clobbered=e.clobbered)
    unit.special[1] = Piece(Kind.STUB, link=link)
    unit.links = e.links
    at = link.site - origin
    e.code[at : at + 4] = struct.pack("<i", e.here - (link.site + 4))
    e.trap()
    return unit, bytes(e.code)


class _Translation:
    def __init__(self, source: Source, around: Surroundings, origin: int) -> None:
        self.source = source
        context = around.context
        self.unit = Unit(context, source.eip, origin)
        self.emitter = Emitter(context, around.slot, origin, around.user_code, around.gdtr)
        self.code = source.code
        self.address = source.address
        self.crossed = 0  # bytes of the next page that the last instruction has

    def run(self) -> tuple[Unit, bytes]:
        unit, e = self.unit, self.emitter
        run: Iterable[Form | None] = self._forms(LONGEST)
        if self.source.changing:
            run = self._steady(run)
            self._check_first(sum(form.size for form in run if form is not None))
        at = 0
        after_sti = ended = False
        eip, origin, source, code = self.source.eip, e.origin, self.code, e.code
        starts, eips, lengths = unit.starts, unit.eips, unit.sizes
        for form in run:
            if after_sti:
                unit.after_sti.add(len(starts))
                after_sti = False
            starts.append(origin + len(code))
            eips.append(eip)
            if form is None:
                lengths.append(0)
                self._special(Piece(Kind.UNDEFINED))
                e.trap()
                ended = True
                break
            size = form.size
            lengths.append(size)
            if at + size > len(source):
                source = self.code  # which the last instruction has made longer
            raw = source[at : at + size]
            at += size
            if form.key in SITES:
                unit.sites.append(starts[-1])
            row = ROWS.get(form.key)
            if row is None or form.lock:
                code += raw
            else:
                last = self.source.changing or at >= len(source) or len(starts) >= LONGEST
                ended, after_sti = self._consider(raw, eip, row, last or REPEATED.match(source, at) is not None)
                if ended:
                    break
            eip = eip + size & 0xFFFFFFFF
        unit.last = len(unit.starts)
        if not ended:
            self._glue(at)
        unit.sources.append((self.address, max(1, at - self.crossed)))
        self._stubs()
        return unit, bytes(e.code)

    def _forms(self, limit: int) -> Iterator[Form | None]:
        """The instructions ahead; the last may reach into the next page; None is what is none."""
        at, code = 0, self.code
        for found in range(limit):
            form = form_at(code, at)
            if form is None or at + form.size > len(code):
                yield from self._last(code[at:], found)
                return
            yield form
            at += form.size

    def _last(self, rest: bytes, found: int) -> Iterator[Form | None]:
        """What is not an instruction, or what runs over the end of the page."""
        if len(rest) >= MAX_LENGTH:
            yield None
        elif not found:  # else it begins a unit of its own
            address, following = self.source.following()
            form = form_at(rest + following[:MAX_LENGTH])
            if form is not None:
                self.crossed = form.size - len(rest)
                self.code = rest + following[: self.crossed]
                self.unit.sources.append((address, self.crossed))
            yield form

    def _steady(self, run: Iterable[Form | None]) -> list[Form | None]:
        """On a page that changes: no further than the first instruction that may store, or is not copied."""
        taken: list[Form | None] = []
        for form in run:
            taken.append(form)
            if form is None or form.key in ROWS or may_store(form):
                break
        return taken

    def _begin(self, eip: int, size: int) -> None:
        unit = self.unit
        unit.starts.append(self.emitter.here)
        unit.eips.append(eip)
        unit.sizes.append(size)

    def _special(self, piece: Piece) -> Piece:
        self.unit.special[len(self.unit.starts) - 1] = piece
        return piece

    def _consider(self, code: bytes, eip: int, row: Row, no_shadow: bool) -> tuple[bool, bool]:
        """An instruction that has a row; whether it ends the unit, and whether it casts STI's shadow.

        `no_shadow`: what follows STI is not in this unit, or is repeated, and in a shadow a pass of it counts
        otherwise; then STI is a call-out.
        """
        e = self.emitter
        instruction = decode(code, eip)
        assert instruction is not None  # it has a form
        e.clobbered, e.resume, e.prediction = [], None, None
        shadowed = instruction.opcode == _STI and no_shadow
        if row.sequence is not None and row.holds(instruction, e.context) and not shadowed:
            piece = self._special(Piece(Kind.SEQUENCE, instruction, row))
            first_link = len(e.links)
            SEQUENCES[row.sequence](e, instruction)
            piece.resume, piece.prediction = e.resume, e.prediction
            if len(e.links) > first_link:
                piece.link = e.links[-1]
            if row.sequence in ("CALL", "CALL indirect"):
                piece.landing = e.here
                check_landing(e, instruction.next)
            piece.clobbered = e.clobbered
            self.unit.uses_gdtr |= row.sequence == "SGDT"
            in_shadow = len(self.unit.starts) - 1 in self.unit.after_sti
            return row.ends, instruction.opcode == _STI and not in_shadow  # one in a shadow casts none
        self._call_out(instruction, row)
        return row.ends, False

    def _call_out(self, instruction: Instruction, row: Row) -> None:
        e = self.emitter
        piece = self._special(Piece(Kind.CALL_OUT, instruction, row))
        e.trap()
        if instruction.opcode in RETURNS:
            piece.resume = e.here
            e.code += instruction.bytes

    def _glue(self, at: int) -> None:
        """The unit ends without a terminator: on to the next instruction."""
        eip = self.source.eip + at & 0xFFFFFFFF
        self._begin(eip, 0)
        e = self.emitter
        e.link("e9", eip, certain=True)
        e.links[-1].glue = True
        self._special(Piece(Kind.STUB, link=e.links[-1]))

    def _stubs(self) -> None:
        """Where each link leads as long as its target has no translation: a trap of its own."""
        unit, e = self.unit, self.emitter
        for link in e.links:
            self._begin(link.target, 0)
            self._special(Piece(Kind.STUB, link=link))
            at = link.site - e.origin
            e.code[at : at + 4] = struct.pack("<i", e.here - (link.site + 4))
            e.trap()
        unit.links = e.links

    # Units on changing pages

    def _check_first(self, size: int) -> None:
        """Compare the source with what is translated, four, two and one bytes at a time; ECX is the difference."""
        e = self.emitter
        self._begin(self.source.eip, 0)
        self.unit.first = 1
        piece = self._special(Piece(Kind.CHECK))
        code = self.code[: max(1, size)]
        e.clobbered = []
        e.save_ecx()
        e.clobber(ECX)
        at = 0
        while at < len(code):
            width = 4 if len(code) - at >= 4 else 2 if len(code) - at >= 2 else 1
            eip = self.source.eip + at & 0xFFFFFFFF
            e.emit({4: "2e8b0d", 2: "2e0fb70d", 1: "2e0fb60d"}[width], struct.pack("<I", eip))
            difference = -int.from_bytes(code[at : at + width], "little") & 0xFFFFFFFF
            e.emit("8d89", struct.pack("<I", difference))
            e.trap_unless_ecx_is_zero()
            at += width
        e.restore_ecx()
        piece.clobbered = [*e.clobbered, (e.here, 0)]
