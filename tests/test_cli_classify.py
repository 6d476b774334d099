"""`vmm classify`: listings, bytes, the census and witnesses, for people and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.guest_expectations import GUESTS
from tests.test_cli import Cli
from tests.test_cli import vmm as vmm
from vmm import census as census_module
from vmm.cli import status
from vmm.isa.classification import TABLE


def test_a_listing_marks_critical_and_privileged_instructions(vmm: Cli) -> None:
    """Each instruction has its line; POPF is marked critical, CLI privileged, MOV not, each with its reason."""
    assert vmm("classify", GUESTS / "popf.asm") == 0
    lines = vmm.out.splitlines()
    marked = {
        line.split(maxsplit=3)[3].split(";")[0].strip(): line[0] for line in lines[:-3] if line[:1] in "!*"
    }
    assert marked["popf"] == marked["pushf"] == "!"
    assert marked["cli"] == marked["sti"] == "*"
    assert any(line.startswith("  ") and line.endswith("mov esp, stack_top") for line in lines)
    assert vmm.out.count("POPF, critical: control-sensitive, mode-bound; it does not trap.") == 1
    assert "! critical" in lines[-2]


def test_a_listing_leaves_data_out(vmm: Cli) -> None:
    """What `db` and its kin define is not taken for instructions."""
    source = vmm.folder / "data.asm"
    source.write_text("start:  hlt\ntext:   db 0x9d, 0xfa\nmore:   dw 0x9d9d\n")
    vmm("classify", source, "--json")
    assert [row["source"].split()[-1] for row in json.loads(vmm.out)["instructions"]] == ["hlt"]


def test_a_listing_as_json(vmm: Cli) -> None:
    """The JSON has a row an instruction, with its class, its row's name and why, and the counts."""
    vmm("classify", GUESTS / "popf.asm", "--json")
    listing = json.loads(vmm.out)
    assert listing["guest"] == str(GUESTS / "popf.asm")
    popf = [row for row in listing["instructions"] if row["row"] == "POPF"]
    assert len(popf) == 2
    assert popf[0]["class"] == "critical" and "IF" in popf[0]["explanation"]
    assert "popf" in popf[0]["source"] and popf[0]["bytes"] == "9d"
    assert listing["critical"] == sum(row["class"] == "critical" for row in listing["instructions"])


def test_definitions_reach_the_listing(vmm: Cli) -> None:
    """-D chooses what is assembled, and so what is listed."""
    source = vmm.folder / "choice.asm"
    source.write_text("%ifdef BAD\nstart: popf\n%else\nstart: nop\n%endif\n")
    counts = []
    for words in ([], ["-D", "BAD"]):
        vmm("classify", source, "--json", *words)
        counts.append(json.loads(vmm.out)["critical"])
    assert counts == [0, 1]


def test_an_image_without_source_is_swept(vmm: Cli, tmp_path: Path) -> None:
    """A flat binary is decoded from its first byte on."""
    vmm("classify", vmm.guest(b"\x9d\xf4"), "--json")
    assert [row["row"] for row in json.loads(vmm.out)["instructions"]] == ["POPF", "HLT"]


def test_an_image_without_source_has_a_bound(vmm: Cli) -> None:
    """Megabytes without source are not listed."""
    assert vmm("classify", vmm.guest(bytes(2 << 20))) == 2
    assert "without source are too many to list" in vmm.err


@pytest.mark.parametrize("text", ["0f 01 e0 9d 90", "0f01e09d90", "0x0f,0x01,0xe0,0x9d,0x90"])
def test_bytes_are_classified(vmm: Cli, text: str) -> None:
    """Bytes in any common notation: each instruction in them, with its class."""
    assert vmm("classify", "--bytes", text, "--json") == 0
    rows = json.loads(vmm.out)["instructions"]
    assert [(row["row"], row["class"]) for row in rows] == [
        *(("SMSW", "critical"), ("POPF", "critical"), (None, "innocuous")),
    ]


def test_bytes_that_are_no_instruction_are_said_to_be_none(vmm: Cli) -> None:
    """#UD is an answer, too."""
    assert vmm("classify", "--bytes", "0f ff") == 0
    assert vmm.out.startswith("? 00000000")
    assert "it raises #UD in every ring" in vmm.out


def test_the_census_says_what_breaks_and_what_follows(vmm: Cli) -> None:
    """The census names the three sets, the theorems' verdicts, the deviations, and that nothing is unexplained."""
    assert vmm("classify", "--census") == 0
    for heading in ("Privileged: ", "Sensitive: ", "Critical: ", "theorem 1", "theorem 3"):
        assert heading in vmm.out
    assert vmm.out.rstrip().endswith("Unexplained: nothing")
    assert "  CM-  17  POPF " in vmm.out


def test_the_census_as_json(vmm: Cli) -> None:
    """The JSON has the sets by name, the rows, and an empty list of what is unexplained."""
    assert vmm("classify", "--census", "--json") == 0
    found = json.loads(vmm.out)
    assert {"privileged", "sensitive", "critical", "unexplained", "rows"} <= set(found)
    assert found["unexplained"] == []
    assert {"POPF", "PUSHF", "SGDT", "SMSW"} <= set(found["critical"]) <= set(found["sensitive"])
    assert not set(found["critical"]) & {"LGDT", "HLT", "CLI"}


def test_what_the_census_cannot_explain_fails(vmm: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that the CPU contradicts is an error with its own status, and the difference is named."""
    found = census_module.census(TABLE[:1])
    wrong = census_module.Census(found.verdicts, ("no longer so: something",), found.deviations)
    monkeypatch.setattr(census_module, "census", lambda: wrong)
    assert vmm("classify", "--census") == status.UNEXPLAINED
    assert "- no longer so: something" in vmm.out


@pytest.mark.parametrize("name", ["popf", "POPF", "mov to ss"])
def test_a_witness_shows_each_ring(vmm: Cli, name: str) -> None:
    """A witness has the instruction and what it did in rings 0, 1 and 3."""
    assert vmm("classify", "--witness", name) == 0
    assert vmm.out.upper().startswith(name.upper() + ": CRITICAL")
    assert all(f"    ring {ring}   " in vmm.out for ring in (0, 1, 3))


def test_a_witness_as_json(vmm: Cli) -> None:
    """The JSON tells the state before and after, ring by ring: POPF clears IF in ring 0 only."""
    assert vmm("classify", "--witness", "popf", "--json") == 0
    (witness,) = json.loads(vmm.out)["witnesses"]
    seen = {run["ring"]: (run["before"]["IF"], run["after"]["IF"]) for run in witness["runs"]}
    assert seen == {0: ("1", "0"), 1: ("1", "1"), 3: ("1", "1")}


def test_a_name_with_several_rows_has_several_witnesses(vmm: Cli) -> None:
    """ "mov" means each of its critical forms."""
    vmm("classify", "--witness", "mov", "--json")
    names = [witness["name"] for witness in json.loads(vmm.out)["witnesses"]]
    assert "MOV to SS" in names and "MOV from CS, SS" in names
