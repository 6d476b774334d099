"""The README is true: its commands run, and what it shows is what they print."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.terminals import terminals
from vmm.cli.status import STATUSES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"`(python -m vmm [^`]*\.asm[^`]*|python -m vmm classify [^`]*)`", README)))
# `run` and `compare` of guests that go wrong on purpose.
ENDS = {"run": {0, 1, 3}, "compare": {0}, "classify": {0}, "build": {0}}


def run(command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "vmm"]
    words = [str(folder / w) if folder and w.endswith((".elf", ".txt", ".html")) else w for w in words[1:]]
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment
    )


def test_the_statuses_are_those_of_the_command() -> None:
    """The README's table of exit statuses is the one of --help."""
    for number, meaning in STATUSES:
        assert f"    {number:>4}  {meaning}\n" in README


def test_there_are_commands_to_try() -> None:
    """The README shows how to run, compare, classify and build."""
    assert {command.split()[3] for command in COMMANDS} == set(ENDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_does_what_it_is_there_for(command: str, tmp_path: Path) -> None:
    """Every command of the README runs as printed, and ends with the status it should."""
    done = run(command, tmp_path)
    assert done.returncode in ENDS[command.split()[3]], done.stderr
    assert "Traceback" not in done.stderr


def test_the_comparison_shown_is_a_real_one() -> None:
    """The run pasted into the README is, but for times and memory, what the command prints today."""
    shown = README.split("$ python -m vmm compare guests/popf.asm\n")[1].split("\n\nAfter ")[0]
    lines = [line[4:] for line in shown.splitlines()]
    printed = run("python -m vmm compare guests/popf.asm").stdout.splitlines()

    def timeless(text: list[str]) -> list[str]:
        varies = ("seconds", "ratio", "peak memory")
        return [line.rstrip() for line in text if line.strip() and not line.startswith(varies)]

    assert timeless(lines) == timeless(printed)


def block(command: str) -> list[str]:
    """What the README shows below a command."""
    _, _, after = README.partition(f"    $ {command}\n")
    assert after, f"the README does not show {command}"
    shown, _, _ = (
        after.partition("\n\nPUSHF and") if "popf" in command else after.partition("\n\nWhat a guest")
    )
    return [line[4:] for line in shown.splitlines()]


def test_the_run_shown_is_a_real_one() -> None:
    """The run pasted into the README has the console, the exits and the end that the command has today."""
    done = run("python -m vmm run guests/popf.asm")
    shown = block("python -m vmm run guests/popf.asm")
    lines = done.stdout.splitlines()
    assert shown[: len(lines)] == lines

    def timeless(text: list[str]) -> list[str]:
        counts = [re.sub(r" +\S+ (?:ns|us|ms|s) +\S+ (?:ns|us|ms|s)$", "", line).split() for line in text]
        return [" ".join(words) for words in counts[:-2]] + [text[-1].rpartition(" in ")[0]]

    # Exits that were as frequent stand in the order in which they first came, which is the same in each run.
    assert timeless(shown[len(lines) :]) == timeless(done.stderr.splitlines())


def test_the_port_shown_is_a_real_one() -> None:
    """So is each row of the comparison in docs/paravirtual-guests.md."""
    command = "python -m vmm compare guests/processes.asm --modes native,pv"
    text = (ROOT / "docs" / "paravirtual-guests.md").read_text()
    shown = text.split(f"    $ {command}\n")[1].split("\n\n")[0].splitlines()
    printed = [line.rstrip() for line in run(command).stdout.splitlines()]
    assert len(shown) == 11
    assert [line[4:] for line in shown if line[4:] not in printed] == []


def test_the_clock_reads_shown_are_real_ones() -> None:
    """And each row of the comparisons in docs/kvm-paravirt.md."""
    blocks = (ROOT / "docs" / "kvm-paravirt.md").read_text().split("    $ ")[1:]
    assert len(blocks) == 3
    for block in blocks:
        command, _, rest = block.partition("\n")
        shown = [line[4:] for line in rest.split("\n\n")[0].splitlines() if line.strip() != "..."]
        printed = [line.rstrip() for line in run(command).stdout.splitlines()]
        assert [line for line in shown if line not in printed] == []


def test_the_explanation_shown_is_a_real_one() -> None:
    """Each line explained in the README is explained so today, but for its time and its place among the ten."""
    command = "python -m vmm run guests/popf.asm --mode trap --explain"
    shown = README.split(f"    $ {command}\n")[1].split("\n\nWhat is said there")[0]
    printed = run(command).stderr

    def lines(text: str) -> dict[str, list[str]]:
        """What is said of each place."""
        blocks = [block.split() for block in re.split(r"\n+ *\d+\. |\n *\.\.\.|\n\n", text)]
        return {
            words[0]: [word for word in words if not re.fullmatch(r"[\d.]+|[num]?s:", word)]
            for words in blocks
            if words and ":" in words[0]
        }

    today, then = lines(printed), lines(shown)
    assert len(then) == 3
    assert {place for place in then if place in today} >= set(list(then)[:2])
    for place in then:
        assert place not in today or then[place] == today[place]


def test_the_translations_shown_are_real_ones(tmp_path: Path) -> None:
    """Each stretch of the page pasted into the README stands like that in the page of today."""
    command = "python -m vmm run guests/pushf.asm --dump-translations pushf.txt"
    run(command, tmp_path)
    page = (tmp_path / "pushf.txt").read_text()
    stretches = "\n".join(block(command)).split("\n...\n")
    assert len(stretches) == 3
    for stretch in stretches:
        for part in stretch.split("\n\n"):
            assert f"{part.strip()}\n" in page


def test_the_statuses_shown_are_the_real_ones() -> None:
    """Each exit status in the README's list stands, word for word, in --help."""
    printed = run("python -m vmm run --help").stdout
    shown = README.split("the even ones are ours:\n\n")[1].split("\n\n## ")[0]
    for line in shown.splitlines():
        assert line.strip() in printed


def test_the_script_shown_is_a_real_one(tmp_path: Path) -> None:
    """The script in the README does with its guest what is shown there, and tells of one that does not shout back."""
    _, found, after = README.partition("    # shout.txt: ")
    script, _, after = (found + after).partition("\n\n    $ ")
    command, _, after = after.partition("\n")
    shown, _, after = after.partition("\n\n")
    (tmp_path / "shout.txt").write_text("\n".join(line[4:] for line in script.splitlines()) + "\n")
    done = run(command, tmp_path)
    assert done.stdout.splitlines() == [line[4:] for line in shown.splitlines()]
    assert done.returncode == 0
    quiet = tmp_path / "quiet.asm"
    quiet.write_text((ROOT / "guests/echo.asm").read_text().replace("sub al, 'a' - 'A'", "nop"))
    shutil.copytree(ROOT / "guests/include", tmp_path / "include")
    done = run(command.replace("guests/echo.asm", str(quiet)), tmp_path)
    assert done.returncode == 16
    told = done.stderr.splitlines()[-1].replace(f"{tmp_path}/", "").rpartition(" in ")[0]
    assert f"    {told} in " in after


def test_the_conversation_in_python_is_a_real_one() -> None:
    """What the README shows of the interface runs as it stands, and does not only because nothing is asserted."""
    _, _, after = README.partition("From Python, with the same promises:\n\n")
    code = "".join(line[4:] + "\n" for line in after.partition("\n\n`")[0].splitlines())
    for wanted, status in (("HELLO", 0), ("WORLD", 1)):
        program = code.replace('"HELLO', f'"{wanted}')
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60)
        assert done.returncode == status and ("AssertionError" in done.stderr.decode()) == bool(status)


def test_the_prompt_shown_is_a_real_one() -> None:
    """What the README shows at the prompt of Ctrl-A c is what is there."""
    _, _, after = README.partition("    $ python -m vmm run -i guests/echo.asm\n")
    shown = [line[4:] for line in after.partition("\n\n")[0].splitlines()]
    told, ready, answer, where, *asked, cont = shown
    with terminals() as start:
        terminal = start("run", "-i", "guests/echo.asm")
        assert terminal.until(f"{ready}\r\n".encode()).decode() == f"{told}\r\n"
        terminal.type(b"hello")
        terminal.until(answer.encode())
        assert terminal.pause().decode().strip() == where
        terminal.type(asked[0].removeprefix("(vmm) ").encode() + b"\r")
        assert "(vmm) " + terminal.until(b"\r\n(vmm) ").decode() == "\r\n".join(asked)
        terminal.type(cont.removeprefix("(vmm) ").encode() + b"\r\x01x")
        assert terminal.end()[0] == 0
