"""The table of what each mode does with each instruction is true: each claim is put to the mode."""

from __future__ import annotations

import pytest

from tests.mode_snippets import LIMIT, MEMORY, PV_SNIPPETS, SNIPPETS, added, image_of, pv_image_of
from vmm.comparison import Comparer
from vmm.isa.classification import TABLE
from vmm.isa.modes import PV, WAYS, acts_of, acts_upon
from vmm.vm import MODES, VirtualMachine

COMPARED = [mode for mode in MODES if mode in WAYS and MODES[mode].image == "same"]
# Exits that say nothing of an instruction: a translator's of its own, and the first use of a page.
BESIDES = ("link", "look-up", "return missed", "VMEXIT_NPF", "hidden fault: store", "hidden fault: accessed")
# What a row's snippet cannot do without, and what that costs: a handler's IRET, the kernel's CLI, a second read.
ALONGSIDE = {
    "INT n": "IRET", "INT3": "IRET", "INTO": "IRET", "INT1": "IRET", "HLT": "CLI", "LMSW": "SMSW",
}  # fmt: skip


@pytest.mark.parametrize("name", SNIPPETS)
def test_each_mode_does_what_the_table_says(name: str) -> None:
    """An instruction takes the exit that its row claims, no other, and comes out right where that is claimed."""
    row = next(row for row in TABLE if row.name == name)
    code, before = SNIPPETS[name]
    run, plain = (
        Comparer(image_of(text, before), max_instructions=LIMIT).compare(COMPARED) for text in (code, "nop")
    )
    acts = acts_of(row)
    for mode, with_it, without in zip(COMPARED, run.runs, plain.runs, strict=True):
        act = acts[mode]
        seen = [
            reason
            for reason in added(with_it.result.exits, without.result.exits)
            if not reason.startswith(BESIDES)
        ]
        if name == "HLT":
            seen = [reason for reason in seen if reason != "hlt" or act.exit == "hlt"]
        if name in ALONGSIDE:
            seen = [reason for reason in seen if reason.split()[-1] != ALONGSIDE[name]]
        assert all(act.exit and reason.startswith(act.exit) for reason in seen), (mode, act, seen)
        assert bool(seen) == bool(act.exit), (mode, act, seen)
        if name not in ALONGSIDE:
            assert (with_it.divergence is not None) == act.wrong, (mode, act, with_it.divergence)


@pytest.mark.parametrize("name", PV_SNIPPETS)
def test_a_paravirtual_guest_takes_the_exit_that_the_table_says(name: str) -> None:
    """What its source has in the instruction's place, a hypercall or itself, costs what is claimed."""
    code, before = PV_SNIPPETS[name]
    with_it, without = (
        VirtualMachine(pv_image_of(text, before), PV, memory=MEMORY).run(LIMIT) for text in (code, "nop")
    )
    assert without.outcome.kind == "exit"
    act = acts_of(next(row for row in TABLE if row.name == name))[PV]
    seen = [reason for reason in added(with_it.exits, without.exits) if reason != "hlt"]
    assert bool(seen) == bool(act.exit), (act, seen)
    assert all(reason.startswith(act.exit) for reason in seen), (act, seen)


def test_every_row_has_an_act_in_every_mode() -> None:
    """Of every instruction the table says something for every way to run a guest, and knows every mode."""
    assert set(MODES) <= set(WAYS)
    for row in (*TABLE, None):
        acts = acts_of(row)
        assert list(acts) == list(WAYS)
        assert all(act.text for act in acts.values())


def test_every_row_that_this_processor_has_is_tried() -> None:
    """Rows without a snippet are of instructions that the processor lacks: #UD in every mode."""
    for row in TABLE:
        if row.name not in SNIPPETS:
            assert row.needs
            assert {act.exit for act in acts_of(row).values()} == {"exception #UD"}


def test_only_trap_and_emulate_is_wrong() -> None:
    """Where the critical instructions are, trap is wrong, and nothing else ever is; privileged ones are right."""
    for row in TABLE:
        for mode, act in acts_of(row).items():
            assert not act.wrong or mode == "trap" and row.critical


@pytest.mark.parametrize(
    "reason", ["exception #PF", "hidden fault: store noticed", "link followed", "VMEXIT_NPF", "hypercall iret"]
)
def test_a_fault_is_told_by_its_reason(reason: str) -> None:
    """What is not the instruction's own doing has acts, too, in every mode."""
    acts = acts_upon(reason)
    assert acts is not None and list(acts) == list(WAYS) and PV in acts
    assert acts_upon("OUT") is None and acts_upon("emulated CLI") is None
