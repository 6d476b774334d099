"""A unit from the guest's code: decode until a terminator, copy what is innocuous, replace what is not.

The form of an instruction says whether it has a row; only what has one is decoded fully. A unit goes on
past conditional branches and calls, because both leave it by links, and ends with an unconditional transfer, at the
end of its page, or after `LONGEST` instructions. An instruction that runs over the end of the page is in, if
it can be fetched.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from vmm.isa.decode import MAX_LENGTH, decode
from vmm.isa.forms import Form, form_at
from vmm.machine.sites import SITES
from vmm.monitor.translator.emitter import ECX, TRAP, Context, Emitter
from vmm.monitor.translator.rows import ROWS, Row, may_store
from vmm.monitor.translator.sequences import DIRECT, SEQUENCES, check_landing
from vmm.monitor.translator.units import Kind, Landing, Piece, Unit

LONGEST = 48  # instructions in a unit
LARGEST = 4096  # bytes that a unit may take, stubs included
RETURNS = frozenset((0xCA, 0xCB, 0xCF))  # to a process these are the CPU's own
REPEATED = re.compile(rb"[\x26\x2e\x36\x3e\x64-\x67\xf0]*[\xf2\xf3]")
_STI = 0xFB
_DISTANCE = struct.Struct("<i")


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
    """The unit through which a RET gets to guest `eip`, with no call before it in the cache; without a link yet."""
    e = Emitter(around.context, around.slot, origin, 0, around.gdtr)
    unit = Unit(around.context, eip, origin, transit=True)
    unit.landings = [Landing(eip, origin, check_landing(e, eip))]
    e.link(b"\xe9", eip)
    link = e.links[0]
    link.glue = True
    unit.starts, unit.eips, unit.sizes = [origin, e.here], [eip, eip], [0, 0]
    unit.special[0] = Piece(Kind.LANDING, clobbered=e.clobbered)
    unit.special[1] = Piece(Kind.STUB, link=link)
    unit.links = e.links
    _DISTANCE.pack_into(e.code, link.site - origin, e.here - (link.site + 4))
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
        limit = LONGEST
        if self.source.changing:
            taken = self._steady()
            self._check_first(sum(form.size for form in taken if form is not None))
            limit = len(taken)
        at = 0
        after_sti = ended = False
        eip, origin, code, source = self.source.eip, e.origin, e.code, self.code
        starts, eips, lengths = unit.starts, unit.eips, unit.sizes
        for done in range(limit):
            form = form_at(source, at)
            if form is None or at + form.size > len(source):
                if done and len(source) - at < MAX_LENGTH:
                    break  # over the end of the page: it begins a unit of its own
                form = self._last()
                source = self.code
            index = len(starts)
            starts.append(origin + len(code))
            eips.append(eip)
            if form is None:
                lengths.append(0)
                unit.special[index] = Piece(Kind.UNDEFINED)
                e.trap()
                ended = True
                break
            size = form.size
            lengths.append(size)
            raw = source[at : at + size]
            at += size
            if after_sti:
                unit.after_sti.add(index)
                after_sti = False
            key = form.key
            if key in SITES:
                unit.sites.append(starts[-1])
            row = ROWS.get(key)
            if row is None or form.lock or (row.prepared and not row.holds(form, e.context)):
                code += raw
            elif (direct := DIRECT.get(row.sequence)) is not None and row.holds(form, e.context):
                unit.special[index] = piece = Piece(Kind.SEQUENCE, row, raw, eip)
                direct(e, form, raw, eip)
                piece.link = e.links[-1]
                if row.sequence == "CALL":
                    self._land(piece, eip + size)
                elif row.ends:
                    ended = True
                    break
            else:
                shadow = form.opcode != _STI or not (
                    self.source.changing or at >= len(source) or done >= limit - 1 or REPEATED.match(source, at)
                )
                ended, after_sti = self._consider(raw, eip, row, shadow)
                if ended:
                    break
            eip = eip + size & 0xFFFFFFFF
        unit.last = len(unit.starts)
        if not ended:
            self._glue(at)
        unit.sources.append((self.address, max(1, at - self.crossed)))
        self._stubs()
        return unit, bytes(e.code)

    def _last(self) -> Form | None:
        """What is not an instruction, or what begins the unit and runs over the end of the page."""
        rest = self.code
        if len(rest) >= MAX_LENGTH:
            return None
        address, following = self.source.following()
        form = form_at(rest + following[:MAX_LENGTH])
        if form is not None:
            self.crossed = form.size - len(rest)
            self.code = rest + following[: self.crossed]
            self.unit.sources.append((address, self.crossed))
        return form

    def _steady(self) -> list[Form | None]:
        """On a page that changes: no further than the first instruction that may store, or is not copied."""
        taken: list[Form | None] = []
        at = 0
        while len(taken) < LONGEST:
            form = form_at(self.code, at)
            if form is None or at + form.size > len(self.code):
                if taken and len(self.code) - at < MAX_LENGTH:
                    break
                form = self._last() if not taken else None
            taken.append(form)
            if form is None or form.key in ROWS or may_store(form):
                break
            at += form.size
        return taken

    def _begin(self, eip: int, size: int) -> None:
        unit = self.unit
        unit.starts.append(self.emitter.here)
        unit.eips.append(eip)
        unit.sizes.append(size)

    def _consider(self, code: bytes, eip: int, row: Row, shadow: bool) -> tuple[bool, bool]:
        """An instruction that has a row; whether it ends the unit, and whether it casts STI's shadow.

        `shadow` is not set where what follows STI is not in this unit, or is repeated, and in a shadow a pass of it
        counts otherwise; then STI is a call-out.
        """
        e, unit = self.emitter, self.unit
        index = len(unit.starts) - 1
        instruction = decode(code, eip)
        assert instruction is not None  # it has a form
        if row.sequence is None or not row.holds(instruction, e.context) or not shadow:
            unit.special[index] = piece = Piece(Kind.CALL_OUT, row, code, eip)
            e.trap()
            if instruction.opcode in RETURNS or row.prepared:
                piece.resume = e.here
                e.code += code
            return row.ends, False
        unit.special[index] = piece = Piece(Kind.SEQUENCE, row, code, eip)
        e.clobbered, e.resume, e.prediction = [], None, None
        SEQUENCES[row.sequence](e, instruction)
        piece.resume, piece.prediction, piece.clobbered = e.resume, e.prediction, e.clobbered
        if row.sequence == "CALL indirect":
            self._land(piece, instruction.next)
        unit.uses_gdtr |= row.sequence == "SGDT"
        return row.ends, instruction.opcode == _STI and index not in unit.after_sti  # one in a shadow casts none

    def _land(self, piece: Piece, after: int) -> None:
        """After a call: where its RET arrives."""
        e, unit = self.emitter, self.unit
        e.clobbered = list(piece.clobbered)
        piece.landing = e.here
        unit.landings.append(Landing(after & 0xFFFFFFFF, e.here, check_landing(e, after)))
        piece.clobbered = e.clobbered

    def _glue(self, at: int) -> None:
        """The unit ends without a terminator: on to the next instruction."""
        eip = self.source.eip + at & 0xFFFFFFFF
        self._begin(eip, 0)
        e = self.emitter
        e.link(b"\xe9", eip, certain=True)
        e.links[-1].glue = True
        self.unit.special[self.unit.last] = Piece(Kind.STUB, link=e.links[-1])

    def _stubs(self) -> None:
        """Where each link leads as long as its target has no translation: a trap of its own."""
        unit, e = self.unit, self.emitter
        code, here, index = e.code, e.here, len(unit.starts)
        for link in e.links:
            unit.starts.append(here)
            unit.eips.append(link.target)
            unit.special[index] = Piece(Kind.STUB, link=link)
            _DISTANCE.pack_into(code, link.site - e.origin, here - (link.site + 4))
            code += TRAP
            here += 1
            index += 1
        unit.sizes += [0] * len(e.links)
        unit.links = e.links

    # Units on changing pages

    def _check_first(self, size: int) -> None:
        """Compare the source with what is translated, four, two and one bytes at a time; ECX is the difference."""
        e = self.emitter
        self._begin(self.source.eip, 0)
        self.unit.first = 1
        self.unit.special[0] = piece = Piece(Kind.CHECK)
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
