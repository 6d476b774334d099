"""A kernel's symbols, read out of memory as they lie there, whatever lies around them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.image.kallsyms import find

CHARACTERS = (
    bytes(range(ord("0"), ord("9") + 1))
    + bytes(range(ord("A"), ord("Z") + 1))
    + b"_.abcdefghijklmnopqrstuvwxyz"
)
PAIRS = [bytes((a, b)) for a in b"abcdefghijk_" for b in b"rstuvwxyz_abcdefghij"]
BASE = 0xC1000000

names = st.text(alphabet=CHARACTERS.decode(), min_size=1, max_size=40)


def tokens() -> list[bytes]:
    """256 of them: each character stands for itself, the others for pairs."""
    pairs = iter(PAIRS)
    return [bytes((code,)) if code in CHARACTERS else next(pairs) for code in range(256)]


def compress(text: bytes, table: list[bytes]) -> bytes:
    """The tokens of a text, pairs first."""
    codes, at = bytearray(), 0
    while at < len(text):
        pair = text[at : at + 2]
        known = table.index(pair) if len(pair) == 2 and pair in table else table.index(text[at : at + 1])
        codes.append(known)
        at += len(table[known])
    return bytes(codes)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def table(symbols: list[tuple[int, str, str]], sequence: bool = False) -> bytes:
    """The parts as Linux 6.1's build writes them, each aligned to a word."""
    known = tokens()
    packed, markers = b"", []
    for number, (_, kind, name) in enumerate(symbols):
        if number % 256 == 0:
            markers.append(len(packed))
        codes = compress(f"{kind}{name}".encode(), known)
        size = len(codes)
        packed += (bytes((size,)) if size < 0x80 else bytes((size & 0x7F | 0x80, size >> 7))) + codes
    texts, index = b"", []
    for token in known:
        index.append(len(texts))
        texts += token + b"\0"
    order = b"".join(number.to_bytes(3, "big") for number in range(len(symbols)))
    parts = (
        struct.pack(f"<{len(symbols)}I", *(address - BASE for address, _, _ in symbols)),
        struct.pack("<II", BASE, len(symbols)),
        packed,
        struct.pack(f"<{len(markers)}I", *markers),
        order if sequence else b"",
        texts,
        struct.pack("<256H", *index),
    )
    return b"".join(map(padded, parts))


def many(count: int) -> list[tuple[int, str, str]]:
    return [(BASE + 16 * number, "tTdDb"[number % 5], f"symbol_{number}") for number in range(count)]


@pytest.mark.parametrize("sequence", (False, True), ids=("6.1", "6.2"))
@pytest.mark.parametrize("count", (1, 255, 256, 257, 5000))
def test_all_symbols_come_out_as_they_went_in(count: int, sequence: bool) -> None:
    """Address, kind and name of each, however many there are, with the table of their order or without it."""
    symbols = many(count)
    memory = b"\x5a" * 4096 + table(symbols, sequence) + b"\xa5" * 4096
    found = find(memoryview(memory))
    assert found is not None
    assert list(zip(found.addresses, found.kinds, found.names, strict=True)) == symbols


@given(
    st.lists(names, min_size=1, max_size=60), st.binary(max_size=64), st.binary(max_size=64), st.booleans()
)
def test_any_names_are_found_between_any_bytes(
    texts: list[str], before: bytes, after: bytes, sequence: bool
) -> None:
    """What lies before and after the table, and what is in the names, hides none of them."""
    symbols = [(BASE + number, "t", name) for number, name in enumerate(texts)]
    found = find(memoryview(padded(before) + table(symbols, sequence) + after))
    assert found is not None and list(found.names) == texts


def test_a_long_name_has_a_length_of_two_bytes() -> None:
    """From 128 tokens on; up to 6.0 there were none."""
    symbols = [(BASE, "T", "q" * 300), (BASE + 4, "t", "Z" * 127)]
    found = find(memoryview(table(symbols)))
    assert found is not None and found.names == ("q" * 300, "Z" * 127)


def test_an_address_is_named_by_the_symbol_below_it() -> None:
    """The first of several at one address; nothing below the first and past the last."""
    symbols = [
        (BASE, "T", "_stext"),
        (BASE, "T", "startup"),
        (BASE + 0x40, "t", "next"),
        (BASE + 0x80, "B", "_end"),
    ]
    found = find(memoryview(table(symbols)))
    assert found is not None
    assert [found.name(BASE + at) for at in (-1, 0, 0x3F, 0x47, 0x80, 0x81)] == [
        "", "_stext", "_stext+0x3f", "next+0x7", "_end", "",
    ]  # fmt: skip
    assert (found.address("next"), found.address("nothing")) == (BASE + 0x40, None)


@pytest.mark.parametrize("part", ("offsets", "count", "names", "markers", "index"))
def test_a_table_that_is_damaged_is_no_table(part: str) -> None:
    """Rather none than a wrong one."""
    symbols = many(600)
    data = bytearray(table(symbols))
    count_at = 4 * 600 + 4
    tokens_at = data.index(b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00")
    at = {"offsets": 40, "count": count_at, "names": count_at + 4, "index": len(data) - 100}.get(part)
    if at is None:
        marker = struct.pack("<I", struct.unpack_from("<I", data, data.rindex(bytes(4), 0, tokens_at) + 4)[0])
        at = data.rindex(marker, 0, tokens_at)
    data[at] ^= 0x55
    data[at + 1] ^= 0x55
    assert find(memoryview(bytes(data))) is None


def test_memory_without_a_kernel_has_no_symbols() -> None:
    """Zeroes, digits in a row that are no tokens, and nothing at all."""
    digits = b"".join(b"%d\0" % digit for digit in range(10))
    for memory in (b"", bytes(65536), digits, bytes(5000) + digits * 3 + bytes(70000)):
        assert find(memoryview(memory)) is None
