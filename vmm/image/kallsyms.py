"""A Linux kernel's own table of symbols, found in the memory of a machine that runs it.

The file that a distribution boots holds no symbols that a reader outside could use: it is compressed and stripped,
it may be put anywhere, and its System.map is often an empty one. But a kernel that names functions in its messages
carries all names with it (`CONFIG_KALLSYMS`), at the addresses where it is once it has unpacked and relocated itself.
Symbols of modules are elsewhere.

The hard part is to find the table: nothing points at it. Names are compressed, one byte for each of 256 tokens,
and the tokens that stand for one digit each lie in a row, as text: that is the pattern. The rest follows from it, by
checks that no other data passes. The order in memory, each part aligned to a word (Linux 6.1 to 6.3,
scripts/kallsyms.c, `write_src`, a 32-bit kernel with CONFIG_KALLSYMS_BASE_RELATIVE):

    offsets        a word for each symbol, in rising order
    relative base  a word: what is added to each offset
    count          a word
    names          for each symbol its length in tokens (one byte, or two from 128 on), and the tokens
    markers        a word for each 256 symbols: where in `names` they begin
    sequence       from 6.2 on, and in Debian's 6.1: three bytes for each symbol, the order of the names
    token table    256 texts, each ended by a zero byte
    token index    256 half-words: where in the token table each begins
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_TOKENS = 256
_PER_MARKER = 256
_LONGEST_TABLE = 1 << 14  # bytes: a token is short, and the index has 16 bits
_LONG = 0x80  # of a length's first byte: there are seven more bits in a second one
_MOST_BYTES = 2 + 0x7FF  # of one name, with its length
_WORD = 4
_LONGEST_MIDDLE = 1 << 22  # bytes from the markers to the token table
_REACH = 1 << 24  # bytes from the first part to the token table


@dataclass(frozen=True)
class Symbols:
    """Names by address, both in rising order of the address. `kinds` has a letter for each, as `nm` has them."""

    addresses: tuple[int, ...]
    names: tuple[str, ...]
    kinds: str

    def name(self, address: int) -> str:
        """`symbol+0x12` for an address of the kernel's, "" for any other, such as one past its last symbol.

        Of several symbols at the same address it is the first one that the kernel lists.
        """
        at = bisect_right(self.addresses, address) - 1
        if at < 0 or at == len(self.addresses) - 1 and address > self.addresses[at]:
            return ""
        start = self.addresses[at]
        at = self.addresses.index(start, max(0, at - _TOKENS))
        return self.names[at] if address == start else f"{self.names[at]}+{address - start:#x}"

    def address(self, name: str) -> int | None:
        """Where the first symbol of this name lies."""
        return self.addresses[self.names.index(name)] if name in self.names else None


def find(memory: memoryview) -> Symbols | None:
    """The symbols of the kernel that lies in these bytes of physical memory, or None where none can be read."""
    for match in re.finditer(re.escape(_DIGITS), memory):
        start = max(0, match.start() - _REACH)
        start -= start % _WORD
        data = bytes(memory[start : match.end() + _LONGEST_TABLE])
        tokens = _token_table(data, match.start() - start)
        found = None if tokens is None else _before(data, *tokens)
        if found is not None:
            return found
    return None


def _token_table(data: bytes, digits: int) -> tuple[int, list[bytes]] | None:
    """Where the token table begins that has the digits there, and the tokens; the index behind it must agree."""
    start = digits
    for _ in range(ord("0")):
        start = data.rfind(b"\0", 0, start - 1) + 1
        if start <= 0 or digits - start > _LONGEST_TABLE:
            return None
    # What stands before the first token is the end of a marker or padding. Neither need be a zero byte.
    for first in range(start + -start % _WORD, digits, _WORD):
        tokens, at = [], first
        for _ in range(_TOKENS):
            end = data.find(b"\0", at, at + _LONGEST_TABLE)
            if end < 0:
                return None
            tokens.append(data[at:end])
            at = end + 1
        index, place = [], 0
        for token in tokens:
            index.append(place & 0xFFFF)
            place += len(token) + 1
        behind = at + -at % _WORD
        if data[behind : behind + 2 * _TOKENS] == struct.pack(f"<{_TOKENS}H", *index):
            return first, tokens
    return None


def _before(data: bytes, token_table: int, tokens: list[bytes]) -> Symbols | None:
    """The symbols, from what lies in memory before the token table."""
    at = token_table
    while (at := data.rfind(bytes(_WORD), token_table - _LONGEST_MIDDLE, at)) > 0:
        at -= at % _WORD
        markers = _markers(data, at, token_table)
        # What follows the last marker may look like one more.
        for size in range(len(markers), max(0, len(markers) - 3), -1):
            found = _names(data, at, markers[:size], tokens)
            if found is not None:
                return found
        at += _WORD - 1
    return None


def _markers(data: bytes, at: int, end: int) -> list[int]:
    """The words there as far as they can be markers: from 0 on, each some names further than the one before it."""
    markers: list[int] = []
    while at < end:
        marker = _word(data, at)
        if markers and not _PER_MARKER * 2 <= marker - markers[-1] <= _PER_MARKER * _MOST_BYTES:
            break
        if not markers and marker:
            break
        markers.append(marker)
        at += _WORD
    return markers


def _names(data: bytes, end: int, markers: list[int], tokens: list[bytes]) -> Symbols | None:
    """The symbols whose names end there and have these markers."""
    last = end - markers[-1]  # where the names begin if those after the last marker took no room
    for names in range(last - last % _WORD, max(_WORD, last - _PER_MARKER * _MOST_BYTES), -_WORD):
        count = _word(data, names - _WORD)
        if -(-count // _PER_MARKER) == len(markers):
            decoded = _decode(data, names, end, count, markers, tokens)
            if decoded is not None:
                return _place(data, names, count, decoded)
    return None


def _decode(
    data: bytes, names: int, end: int, count: int, markers: list[int], tokens: list[bytes]
) -> list[bytes] | None:
    """The names, each with the letter of its kind before it; None if they do not lie as the markers say."""
    at, decoded = names, []
    for number in range(count):
        if number % _PER_MARKER == 0 and at - names != markers[number // _PER_MARKER]:
            return None
        if at + 2 > end:
            return None
        length, at = data[at], at + 1
        if length & _LONG:
            length, at = length & _LONG - 1 | data[at] << 7, at + 1
        decoded.append(b"".join([tokens[token] for token in data[at : at + length]]))
        at += length
    return decoded if at <= end < at + _WORD else None


def _place(data: bytes, names: int, count: int, decoded: list[bytes]) -> Symbols | None:
    """The names with their addresses; None if those do not rise."""
    base_at = names - 2 * _WORD
    offsets_at = base_at - _WORD * count
    if offsets_at < 0:
        return None
    base = _word(data, base_at)
    offsets = struct.unpack_from(f"<{count}I", data, offsets_at)
    if any(a > b for a, b in pairwise(offsets)):
        return None
    texts = [name.decode("ascii", "replace") for name in decoded]
    return Symbols(
        tuple(base + offset & 0xFFFFFFFF for offset in offsets),
        tuple(text[1:] for text in texts),
        "".join(text[:1] for text in texts),
    )


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + _WORD], "little")
