"""Memory that the CPU and the host share, and that is this process's own.

A mapping that nobody else can see is copied when the process forks: so a machine can be kept as it stands, and gone
on with later (tools/lockstep). Python's own default is one that a fork goes on sharing.
"""

from __future__ import annotations

import mmap

READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def zeroed(size: int, rights: int = READ_WRITE) -> mmap.mmap:
    """`size` bytes of zeroes, at the beginning of a page; raises as `mmap.mmap`."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=rights)
