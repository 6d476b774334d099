"""What the library can do, and exports, but does not offer in its interface: forgetting less than everything.

`uc_ctl` flushes the whole TLB or nothing, and drops code by a linear address only, which it looks up, so that the TLB
must be flushed before and after. After each flush the guest asks for its whole working set again, and every indirect
jump looks its target up the long way. The library's own INVLPG, and its own way to drop the code of physical memory,
are functions that it exports under their names (their signatures are those of its source, target/i386/helper.h,
exec/cpu-common.h and accel/tcg/translate-all.h). Where a name is not found, callers take the long way.

All are short and never wait, so they are called without letting another thread run Python meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from unicorn.unicorn_py3.unicorn import uclib

_U64, _VOID_P = ctypes.c_uint64, ctypes.c_void_p
_NO_NUMBER = (1 << 64) - 1


def _function(name: str, result: type[ctypes.c_uint64] | None, *arguments: type) -> Callable[..., int] | None:
    found = getattr(uclib, f"{name}_x86_64", None)
    if found is None:
        return None
    function: Callable[..., int] = ctypes.PYFUNCTYPE(result, *arguments)(ctypes.cast(found, _VOID_P).value or 0)
    return function


flush_page = _function("helper_invlpg", None, _VOID_P, _U64)
"""(address of the live register file, linear address), or None. While a VMRUN is in force, it may intercept."""

_number_of = _function("qemu_ram_addr_from_host", _U64, _VOID_P, _VOID_P)  # engine, host address
_drop = _function("tb_invalidate_phys_range", None, _VOID_P, _U64, _U64)  # engine, first number, end


_check_exit = getattr(uclib, "helper_check_exit_request_x86_64", None)
check_exit = 0 if _check_exit is None else ctypes.cast(_check_exit, _VOID_P).value or 0
"""Address of what a block calls to know whether to stop (engine, 0), or 0."""


class CodeDropper:
    """Drops the code that was translated from physical memory, wherever that is mapped.

    The library numbers the bytes of all memory that it is shown; `add` finds out how, `drop` says which.
    """

    def __init__(self, engine: int) -> None:
        self._engine = engine
        self._known: list[tuple[int, int, int]] = []  # first physical byte, end, what makes it the library's number

    def add(self, address: int, size: int, host: int) -> None:
        """`size` bytes of host memory have been mapped at physical `address`."""
        if _number_of is not None and _drop is not None:
            number = _number_of(self._engine, host)
            if number != _NO_NUMBER:
                self._known.append((address, address + size, number - address))

    def drop(self, start: int, end: int) -> bool:
        """Drop the code of physical bytes `start` to `end`; False where the long way must be taken."""
        for first, beyond, distance in self._known:
            if first <= start and end <= beyond:
                assert _drop is not None
                _drop(self._engine, start + distance, end + distance)
                return True
        return False
