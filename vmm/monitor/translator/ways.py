"""How a jump that had to exit finds its way by itself the next time.

An exit of this kind knows where it comes from, and the monitor then finds out where it goes; between the two lies
the translation of the target, perhaps with a fault. What was learned is kept here until then.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.monitor.translator.cache import TranslationCache
from vmm.monitor.translator.emitter import Context, Link, Prediction
from vmm.monitor.translator.units import Unit


class Ways:
    """What the jump was that led out of the cache, at most one."""

    def __init__(self, cache: TranslationCache) -> None:
        self._cache = cache
        self.wanted: int | None = None  # guest EIP of an indirect jump that was not found
        self.predicting: tuple[Unit, Prediction] | None = None  # the same, if it may learn its target
        self.following: tuple[Unit, Link, int] | None = None  # a link without a target yet, and its stub
        self.returned: int | None = None  # guest EIP of a RET that found no landing

    @property
    def open(self) -> bool:
        return self.wanted is not None or self.following is not None or self.returned is not None

    def forget(self) -> None:
        self.wanted = self.predicting = self.following = self.returned = None

    def connect(
        self, context: Context, eip: int, offset: int, address: int, land: Callable[[Context, int, int], None]
    ) -> None:
        """The translation of guest `eip` is at `offset`, `address` as an EIP; `land` makes a landing for it."""
        if self.wanted == eip:
            self._cache.look_up(context, eip, offset, address)
            if self.predicting is not None:
                unit, prediction = self.predicting
                if not unit.dead and unit.context == context:
                    self._cache.predict(unit, prediction, eip, offset)
        if self.following is not None:
            unit, link, stub = self.following
            if not unit.dead and link.target == eip and unit.context == context:
                self._cache.link(unit, link, stub, offset)
        if self.returned == eip:
            land(context, eip, offset)
        self.forget()
