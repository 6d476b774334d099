"""Witnesses: each critical row shown on the real CPU."""

from __future__ import annotations

import json

import pytest

from vmm.errors import UsageError
from vmm.isa.classification import TABLE
from vmm.witness import witness, witnesses

# Critical by the manual; not on this CPU (see vmm.machine.deviations).
ABSENT = {"INT1", "SYSCALL"}


@pytest.mark.parametrize("name", [row.name for row in TABLE if row.critical and row.name not in ABSENT])
def test_each_critical_row_has_a_witness(name: str) -> None:
    """Each critical row is shown by a run outside ring 0 that does not trap and that tells."""
    (shown,) = witnesses(name)
    outside = [run for run in shown.runs if run.ring and not run.trapped]
    assert outside
    assert {run.ring for run in shown.runs} <= {0, 1, 3}
    if shown.kind == "mode-bound":
        inner = next(run for run in shown.runs if run.ring == 0)
        assert any(run.after != inner.after or run.trapped != inner.trapped for run in outside)
    elif shown.kind == "location-bound":
        one_ring = [run for run in shown.runs if run.ring == outside[0].ring]
        assert len({(run.ending, *run.after.values()) for run in one_ring}) == 2
    else:
        assert name == "SYSENTER"
    json.dumps(shown.as_json())
    assert shown.text in shown.as_text() and shown.row.effect.split()[0] in shown.as_text()


def test_the_popf_witness() -> None:
    """POPF with IF clear on the stack: ring 0 clears IF; rings 1 and 3 do not, and do not trap."""
    shown = witness("popf")
    assert shown.kind == "mode-bound" and shown.text == "popfd"
    assert [(run.ring, run.before, run.after, run.trapped) for run in shown.runs] == [
        (0, {"IF": "1"}, {"IF": "0"}, False),
        (1, {"IF": "1"}, {"IF": "1"}, False),
        (3, {"IF": "1"}, {"IF": "1"}, False),
    ]
    assert "ring 0   IF 1 -> 0   no trap" in shown.as_text()


def test_the_iret_witness() -> None:
    """IRET to ring 3 restores IF from ring 0; from ring 1 it does not, and does not trap."""
    shown = witness("iret")
    inner, middle, _ = shown.runs
    assert (inner.after["IF"], middle.after["IF"], middle.trapped) == ("0", "1", False)


def test_a_name_may_mean_several_rows() -> None:
    """`mov` gives a witness for each critical form of MOV."""
    assert [shown.row.name for shown in witnesses("mov")] == [
        "MOV from CS, SS",
        "MOV to SS",
        "MOV to DS, ES, FS, GS",
    ]


@pytest.mark.parametrize("name", ["hlt", "add", "", "INT1"])
def test_names_without_a_witness(name: str) -> None:
    """What is not critical, unknown, or not on this CPU is a usage error in one line."""
    with pytest.raises(UsageError) as caught:
        witness(name)
    assert "\n" not in str(caught.value)
