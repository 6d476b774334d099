"""A mistake in the engine's nested paging, mended where it can be.

When the engine's MMU walks the guest's page tables through nested ones, and a nested entry on the way has NX, it
clears a right in a place that it was not given: it stores through a null pointer, and the process dies. Any guest can
make that happen, by loading CR3 with the address of what has so far been data. There are two ways to be safe: nested
entries never have NX, which is slow, because every store then looks for code that it may change (30 ns instead of 6);
or the store is made only where there is a place for it.

The latter takes thirteen bytes of the library, in which the same five instructions and one more fit, because a jump
can be shortened by going to one of the same condition further on. They are changed only if they, and those around
them, are exactly what is expected: elsewhere (another processor, another build) it is the first way.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
from pathlib import Path

from unicorn.unicorn_py3.unicorn import uclib

# test rdi, rdi; jns +13; [cmp r14d, 2; je FAULT; and dword [rcx], -5]; and edi, 2; jne +13; cmp r14d, 1; je FAULT
_AS_IT_IS = re.compile(
    rb"\x48\x85\xff\x79\x0d\x41\x83\xfe\x02\x0f\x84(....)\x83\x21\xfb"
    rb"\x83\xe7\x02\x75\x0d\x41\x83\xfe\x01\x0f\x84(....)",
    re.DOTALL,
)
_AT = 5  # where the thirteen bytes begin
_FIRST_JUMP, _SECOND_JUMP = 15, 33  # where the two jumps end
# cmp r14d, 2; je to the second jump; jrcxz +3; and dword [rcx], -5; nop
_MENDED = bytes.fromhex("4183fe02 7410 e303 8321fb 6690")
_done: list[bool] = []  # once a process


def mend() -> bool:
    """Mend it, if that is possible here; whether it is mended."""
    if not _done:
        _done.append(_mend())
    return _done[0]


def _mend() -> bool:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    text = _text()
    if text is None:
        return False
    start, end = text
    found = list(_AS_IT_IS.finditer(ctypes.string_at(start, end - start)))
    if len(found) != 1:
        return False
    distances = [int.from_bytes(group, "little", signed=True) for group in found[0].groups()]
    if _FIRST_JUMP + distances[0] != _SECOND_JUMP + distances[1]:
        return False
    place = start + found[0].start() + _AT
    page = place & ~(mmap.PAGESIZE - 1)
    size = place + len(_MENDED) - page
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    rights = mmap.PROT_READ | mmap.PROT_EXEC
    if protect(ctypes.c_void_p(page), ctypes.c_size_t(size), rights | mmap.PROT_WRITE):
        return False
    ctypes.memmove(place, _MENDED, len(_MENDED))
    protect(ctypes.c_void_p(page), ctypes.c_size_t(size), rights)
    return True


def _text() -> tuple[int, int] | None:
    """Where the library's code lies in memory."""
    path = Path(uclib._name).name
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split()
        if path in line and words[1].startswith("r-x"):
            start, end = (int(word, 16) for word in words[0].split("-"))
            return start, end
    return None
