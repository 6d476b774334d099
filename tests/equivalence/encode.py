"""From an atom's text to its bytes at some address, fast: each text is assembled once.

A guest has a hundred atoms and a campaign ten thousand guests, so an atom is not assembled anew for each number
in it. A number is written `@xxxxxxxx`, eight hexadecimal digits; the text is assembled with a marker in its
place, and the number is put where the marker came out. What depends on the atom's own address is found by
assembling at two addresses.
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass

from tests.equivalence import layout
from tests.equivalence.kernel import skeleton
from tests.machines import encoder
from vmm.image.asm import assemble_text

_NUMBER = re.compile(r"@([0-9A-F]{8})")
_MARKER, _MARKER_STEP = 0x61A5C0E1, 0x01030507
_HERE, _THERE = 0x130000, 0x130000 + 0x21436587  # their difference has no byte that is zero


def number(value: int) -> str:
    """A 32-bit number in an atom's text. It always takes four bytes."""
    return f"@{value & 0xFFFFFFFF:08X}"


@dataclass(frozen=True)
class _Form:
    code: bytes  # assembled for `_HERE`
    addresses: tuple[int, ...]  # offsets of words that are addresses within the atom
    numbers: tuple[int, ...]  # offsets of the numbers, in the order in which they are written


@functools.cache
def _names() -> tuple[re.Pattern[str], dict[str, str]]:
    names = {name: hex(v) for name, v in vars(layout).items() if name.isupper() and isinstance(v, int)}
    names |= {name: hex(value) for name, value in layout.VARIABLE.items()}
    names |= {name: hex(skeleton().symbols[name]) for name in POINTERS}
    return re.compile(r"\b(" + "|".join(names) + r")\b"), names


POINTERS = (
    "log_pointer",
    "leave_pointer",
    "abandon_pointer",
    "gdtr",
    "idtr",
)  # of the kernel, for atoms to use


def plain(text: str) -> str:
    """The text with its numbers and the kernel's names as an assembler takes them."""
    pattern, names = _names()
    text = pattern.sub(lambda match: names[match[1]], text)
    return _NUMBER.sub(lambda match: "0x" + match[1].lower(), text)


@functools.lru_cache(maxsize=1 << 16)
def _form(text: str, count: int) -> _Form:
    """What `text` assembles to, where `count` markers `@n` stand for numbers."""
    pattern, names = _names()
    source = pattern.sub(lambda match: names[match[1]], text)
    markers = [_MARKER + _MARKER_STEP * i for i in range(count)]
    for i, marker in enumerate(markers):
        source = source.replace(f"@{i}@", hex(marker))
    codes = [
        assemble_text(f"bits 32\norg {org:#x}\natom:\n{source}\n", text, encoder=encoder()).data
        for org in (_HERE, _THERE)
    ]
    here, there = codes
    assert len(here) == len(there), text
    addresses = []
    i = 0
    while i < len(here):
        if here[i] != there[i]:
            low, high = (struct.unpack_from("<I", code, i)[0] for code in codes)
            assert high - low & 0xFFFFFFFF == _THERE - _HERE, f"{text}: what is at offset {i}?"
            addresses.append(i)
            i += 4
        else:
            i += 1
    places = []
    for marker in markers:
        bytes_ = struct.pack("<I", marker)
        assert here.count(bytes_) == 1, f"{text}: {marker:#x} stands in {here.hex()}"
        places.append(here.index(bytes_))
    return _Form(here, tuple(addresses), tuple(places))


def encode(text: str, address: int) -> bytes:
    """The bytes of an atom at `address`. Statements are separated by semicolons."""
    values = [int(digits, 16) for digits in _NUMBER.findall(text)]
    count = iter(range(len(values)))
    form = _form(_NUMBER.sub(lambda _: f"@{next(count)}@", text).replace(";", "\n"), len(values))
    code = bytearray(form.code)
    for place in form.addresses:
        old = struct.unpack_from("<I", code, place)[0]
        struct.pack_into("<I", code, place, old - _HERE + address & 0xFFFFFFFF)
    for place, value in zip(form.numbers, values, strict=True):
        struct.pack_into("<I", code, place, value)
    return bytes(code)
