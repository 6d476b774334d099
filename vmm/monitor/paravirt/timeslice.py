"""How long one hypercall may go on before it makes way.

A guest can ask for more in one instruction than anybody waits for: a batch of a hundred million updates, two
gigabytes for the console. So a long call stops after so much work, or as soon as somebody outside wants the
processor, and the guest makes it again for what is left: each time is an instruction of its own, which time and the
budget of a run know of. How much work is the same every time, so that a run can be repeated.

Source: Xen's behaviour (hypercall_preempt_check, hypercall continuations).
"""

from __future__ import annotations

from collections.abc import Callable

SLICE = 1 << 12  # units: items of a batch, frames of an extent, bytes for the console
PER_PAGE = 64  # units that it takes to check a page of entries or descriptors, or to let go of one


class TimeSlice:
    """`poked` says whether somebody wants the processor now, `checked` how many pages have been checked so far."""

    def __init__(self, poked: Callable[[], bool], checked: Callable[[], int]) -> None:
        self._poked, self._checked = poked, checked
        self._done, self._checked_before = 0, 0

    def begin(self) -> None:
        """A hypercall begins."""
        self._done, self._checked_before = 0, self._checked()

    def over(self, units: int = 1) -> bool:
        """So much more is about to be done: whether it is to wait."""
        self._done += units
        checked = self._checked() - self._checked_before
        return self._done + PER_PAGE * checked > SLICE or self._poked()
