"""Python's cycle collector, while a command runs: seldom.

A run under binary translation makes some million objects that stay, and a few hundred that are in cycles. The
collector goes through all of them again whenever their number has grown by a quarter: a twelfth of a boot of Linux,
for nothing. The process is the command line's own, so it may say so; `vmm` as a library leaves the collector as the
program has it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG = 5_000_000  # objects made, and not freed, between two looks at the young ones: five times in a boot of Linux
OLDER = 1_000  # looks at the young ones before all are looked at


@contextmanager
def seldom() -> Iterator[None]:
    """Within this, collections are rare; afterwards they are as often as they were."""
    was = gc.get_threshold()
    gc.set_threshold(YOUNG, was[1], OLDER)
    try:
        yield
    finally:
        gc.set_threshold(*was)
