"""What `test_paging` promises of the bare machine's paging, held for a guest under a monitor.

The same tests, with another `run`: error codes, CR2, A and D, WP, large pages, what a flush means, the processor's
own accesses; against the engine's own MMU and the manual's rules.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import machines, test_paging
from tests.machines import Lab
from vmm.monitor.trap.monitor import TrapMonitor


@pytest.fixture(autouse=True, scope="module")
def under_a_monitor() -> Iterator[None]:
    """Every lab of those tests is one of trap mode."""

    def lab(source: str | bytes, mode: str = "trap", **options: object) -> Lab:
        return machines.lab(source, mode, **options)  # type: ignore[arg-type]

    def run(source: str | bytes, mode: str = "trap", *, limit: int = 10_000, **options: object) -> Lab:
        made = lab(source, mode, **options)
        made.run(limit)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_paging, "lab", lab)
        patch.setattr(test_paging, "run", run)
        yield


for _name, _value in vars(test_paging).items():
    if _name.startswith("test_"):
        globals()[_name] = _value


def test_they_run_under_the_monitor() -> None:
    """The machines of these tests are made in trap mode."""
    assert isinstance(vars(test_paging)["run"]("hlt", limit=5).control, TrapMonitor)
