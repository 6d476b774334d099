"""Making a failing guest smaller, without Hypothesis: delta-debugging over its parts.

First whole chunks and handlers go, then atoms, then what surrounds them: rounds, timer, paging, the numbers. Each
step is kept if the guest still fails; and so on until nothing more goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.equivalence.guest import ATOMS, Chunk, Guest, Handler
from tests.program_atoms import Salt, Step

Fails = Callable[[Guest], bool]
T = TypeVar("T")


def shrink(guest: Guest, fails: Fails, seconds: float = 60) -> Guest:
    """The smallest guest found that still fails; `guest` must."""
    deadline = time.monotonic() + seconds
    progress = True
    while progress:
        progress = False
        for candidate in _smaller(guest):
            if time.monotonic() > deadline:
                return guest
            if fails(candidate):
                guest, progress = candidate, True
                break
    return guest


def _smaller(guest: Guest) -> Iterator[Guest]:
    """Guests with something less, the boldest first."""
    for chunks in _without(guest.chunks):
        if chunks:
            yield replace(guest, chunks=chunks)
    for services in _without(guest.services):
        yield replace(guest, services=services)
    if guest.timer is not None:
        yield replace(guest, timer=None)
    if guest.period:
        yield replace(guest, period=0, timer=None)
    if guest.rounds > 1:
        yield replace(guest, rounds=1)
        yield replace(guest, rounds=guest.rounds - 1)
    if guest.pages is not None:
        yield replace(guest, pages=None)
        yield from (replace(guest, pages=pages) for pages in _numbers(guest.pages))
    if guest.period:
        yield from _waiting(guest)
    for i, chunk in enumerate(guest.chunks):
        for smaller in _smaller_chunk(chunk):
            yield replace(guest, chunks=_with(guest.chunks, i, smaller))
    for i, handler in enumerate(guest.services):
        for less in _smaller_handler(handler):
            yield replace(guest, services=_with(guest.services, i, less))
    if guest.timer is not None:
        for less in _smaller_handler(guest.timer):
            yield replace(guest, timer=less)
    if guest.origin:
        yield replace(guest, origin=0)


def _waiting(guest: Guest) -> Iterator[Guest]:
    """With nothing done for as long as an atom takes, so that the timer comes at the same moment after it."""
    for i, chunk in enumerate(guest.chunks):
        for j, step in enumerate(chunk.steps):
            if step.atom != "delay":
                wait = Step("delay", ATOMS[step.atom](Salt(step.salt)).count(";"))
                yield replace(
                    guest, chunks=_with(guest.chunks, i, replace(chunk, steps=_with(chunk.steps, j, wait)))
                )


def _smaller_chunk(chunk: Chunk) -> Iterator[Chunk]:
    for steps in _without(chunk.steps):
        yield replace(chunk, steps=steps)
    if chunk.user:
        yield replace(chunk, user=False)
    for salt in _numbers(chunk.salt):
        yield replace(chunk, salt=salt)
    for steps in _simpler(chunk.steps):
        yield replace(chunk, steps=steps)


def _smaller_handler(handler: Handler) -> Iterator[Handler]:
    for steps in _without(handler.steps):
        yield replace(handler, steps=steps)
    if handler.open:
        yield replace(handler, open=False)
    for salt in _numbers(handler.salt):
        yield replace(handler, salt=salt)
    for steps in _simpler(handler.steps):
        yield replace(handler, steps=steps)


def _without(items: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
    """Without a half, a quarter, ... an eighth, one."""
    size = len(items)
    while size:
        for start in range(0, len(items), size):
            yield items[:start] + items[start + size :]
        size //= 2


def _with(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return (*items[:index], item, *items[index + 1 :])


def _simpler(steps: Sequence[Step]) -> Iterator[tuple[Step, ...]]:
    for i, step in enumerate(steps):
        for salt in _numbers(step.salt):
            yield (*steps[:i], replace(step, salt=salt), *steps[i + 1 :])


def _numbers(value: int) -> Iterator[int]:
    """Smaller numbers: zero, and without the upper half of the bits."""
    if value:
        yield 0
        bits = value.bit_length()
        for keep in (bits // 4, bits // 2, bits * 3 // 4, bits - 4):
            if 0 < keep < bits and value & (1 << keep) - 1 < value:
                yield value & (1 << keep) - 1
