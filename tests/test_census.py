"""The census: the classes that follow from what the real CPU does."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from vmm.census import Census, census
from vmm.isa.classification import SEVENTEEN, TABLE
from vmm.isa.row import Row, Trap


@pytest.fixture(scope="module")
def counted() -> Census:
    return census()


def test_nothing_is_unexplained(counted: Census) -> None:
    """Table and CPU agree on every row, but for deviations that are demonstrated."""
    assert counted.unexplained == ()


def test_the_seventeen_come_out_of_the_observation(counted: Census) -> None:
    """Robin and Irvine's seventeen are among the critical instructions, by observation alone."""
    observed = {
        verdict.row.summary
        for verdict in counted.verdicts
        if verdict.observation.trap is Trap.NEVER
        and (
            verdict.observation.control
            or verdict.observation.mode_bound
            or verdict.observation.location_bound
        )
    }
    expected = {name for entry in SEVENTEEN for name in entry.split("/")}
    assert expected <= observed
    assert expected <= set(counted.critical)


def test_what_else_is_critical(counted: Census) -> None:
    """Beside the seventeen: IRET, the other loads of segments, INT3 and INTO, SYSENTER, CPUID, XGETBV."""
    seventeen = {name for entry in SEVENTEEN for name in entry.split("/")}
    assert set(counted.critical) - seventeen == {
        *("IRET", "LDS", "LES", "LSS", "LFS", "LGS", "INT3", "INTO", "SYSENTER", "CPUID", "XGETBV"),
    }


def test_sets_are_disjoint_and_complete(counted: Census) -> None:
    """Sensitive is critical and privileged together; nothing is both."""
    assert not set(counted.privileged) & set(counted.critical)
    assert set(counted.sensitive) == set(counted.privileged) | set(counted.critical)


def test_traps_by_setting_are_observed(counted: Census) -> None:
    """CLI and STI trap by IOPL, RDTSC and RDTSCP by CR4.TSD, HLT always, POPF never: as seen, not as told."""
    traps = {verdict.row.name: verdict.observation.trap for verdict in counted.verdicts}
    assert traps["CLI"] is traps["STI"] is Trap.IOPL
    assert traps["RDTSC"] is traps["RDTSCP"] is Trap.TSD
    assert traps["HLT"] is traps["LGDT"] is traps["MOV CR"] is Trap.ALWAYS
    assert traps["POPF"] is traps["IRET"] is traps["MOV to SS"] is Trap.NEVER


def test_theorems(counted: Census) -> None:
    """Theorem 1's condition fails, and is called sufficient; theorem 3's fails by what user code can see."""
    first, third = counted.theorem1, counted.theorem3
    assert not first.holds and first.counterexamples == counted.critical and "sufficient" in first.verdict
    assert not third.holds and "SGDT" in third.counterexamples
    assert "POPF" not in third.counterexamples  # in user mode it does what user mode should
    assert set(third.counterexamples) <= set(first.counterexamples)


def test_the_census_survives_json(counted: Census) -> None:
    """The JSON form has the promised keys and one row for each row of the table."""
    data = json.loads(json.dumps(counted.as_json()))
    assert {"privileged", "sensitive", "critical", "unexplained", "rows"} <= data.keys()
    assert [row["name"] for row in data["rows"]] == [row.name for row in TABLE]
    popf = next(row for row in data["rows"] if row["name"] == "POPF")
    assert popf["critical"] and not popf["privileged"] and popf["mode_bound"] == ["ring 1", "ring 3"]


def _row(name: str) -> Row:
    return next(row for row in TABLE if row.name == name)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (replace(_row("POPF"), trap=Trap.ALWAYS), "POPF: trap"),
        (replace(_row("HLT"), trap=Trap.NEVER), "HLT: trap"),
        (replace(_row("CLI"), trap=Trap.ALWAYS), "CLI: trap"),
        (replace(_row("SGDT"), location_bound=False), "SGDT: location-bound"),
        (replace(_row("PUSH CS, SS"), mode_bound=False), "PUSH CS, SS: mode-bound"),
        (replace(_row("ARPL"), control=True), "ARPL: control"),
        (replace(_row("UD"), needs=""), "UD: it raises"),
        (replace(_row("BOUND"), needs="something"), "BOUND: it runs"),
    ],
    ids=lambda value: value.name if isinstance(value, Row) else "",
)
def test_a_wrong_row_is_noticed(wrong: Row, complaint: str) -> None:
    """A row that says something else than the CPU does is reported as unexplained."""
    unexplained = census((wrong,)).unexplained
    assert len(unexplained) == 1 and unexplained[0].startswith(complaint), unexplained


def test_the_census_takes_seconds() -> None:
    """The whole census fits into a few seconds, so that people run it."""
    start = time.process_time()
    census()
    assert time.process_time() - start < 15
