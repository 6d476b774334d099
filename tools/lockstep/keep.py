"""Machines kept as they stand, to go on from there later, for the price of a fork.

A fork of this process has a copy of everything: the machines, their memory, what the CPU has made of their code, the
devices, the monitors' tables. It waits until it is told that nobody needs it any more, or to do its task with what it
has and send back what came of it. Memory that neither of the two changes meanwhile is not even copied.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Generic, NoReturn, TypeVar

from vmm.errors import VmmError

T = TypeVar("T")
_GO = b"g"


class Kept(Generic[T]):
    """A copy of this process, made by `keep`, that waits. Both methods end it; one of them must be called."""

    def __init__(self, pid: int, orders: int, results: int) -> None:
        self._pid, self._orders, self._results = pid, orders, results

    def drop(self) -> None:
        """Nobody needs it."""
        os.close(self._orders)
        os.close(self._results)
        os.waitpid(self._pid, 0)

    def resume(self) -> T:
        """Have it do what it was kept for, and wait for what comes of it; raises what that raises."""
        os.write(self._orders, _GO)
        os.close(self._orders)
        with os.fdopen(self._results, "rb") as pipe:
            data = pipe.read()
        os.waitpid(self._pid, 0)
        if not data:
            raise VmmError("the process that kept the machines has died: a bug of vmm's, or no memory was left")
        good, result = pickle.loads(data)
        if not good:
            raise result
        return result  # type: ignore[no-any-return]


def keep(task: Callable[[], T]) -> Kept[T]:
    """A copy of everything as it stands, ready to do `task`, whose result must be one that can be pickled."""
    sys.stdout.flush()
    sys.stderr.flush()
    orders_out, orders_in = os.pipe()
    results_out, results_in = os.pipe()
    pid = os.fork()
    if pid:
        os.close(orders_out)
        os.close(results_in)
        return Kept(pid, orders_in, results_out)
    try:
        os.close(orders_in)
        os.close(results_out)
        _wait(task, orders_out, results_in)
    finally:
        os._exit(1)


def _wait(task: Callable[[], object], orders: int, results: int) -> NoReturn:
    if os.read(orders, 1) != _GO:
        os._exit(0)
    try:
        answer: tuple[bool, object] = True, task()
    except BaseException as error:
        answer = False, error
    with os.fdopen(results, "wb") as pipe:
        pipe.write(pickle.dumps(answer))
    os._exit(0)
