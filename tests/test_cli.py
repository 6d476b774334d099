"""The command line in this process: what each command writes where, and how each bad input is told."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path

import pytest

from tests.guest_expectations import EXPECTATIONS, GUESTS, Expectation
from vmm.cli import main as cli
from vmm.cli import status
from vmm.cli.exits import duration
from vmm.cli.main import main
from vmm.errors import OutputError, VmmError
from vmm.vm import CONSOLE_LIMIT, MODES, UNMODIFIED, Console

# Flat binaries, each the whole guest.
SPIN = bytes.fromhex("fa ebfe")  # cli; jmp $
FLOOD = bytes.fromhex("b041 66bae900 ee ebfd")  # out 0xe9, 'A' without end
WILD = bytes.fromhex("b800000040 ffe0")  # jmp 0x40000000: no memory there
HALT = bytes.fromhex("fa f4")
EXIT_5 = bytes.fromhex("b005 e6f4")
# IRET to virtual-8086 mode, which `bt` refuses: ESP, then GS, FS, DS, ES, SS, SP, EFLAGS, CS, IP, then IRET.
_FRAME = (0, 0, 0, 0, 0x1000, 0x800, 0x20002, 0x700, 0)
V86 = bytes.fromhex("bc00002000" + "".join(f"68{word.to_bytes(4, 'little').hex()}" for word in _FRAME) + "cf")
VGA = bytes.fromhex("66c70500800b00481f 66c70502800b00691e b000 e6f4")  # "Hi" on the text screen


class Cli:
    """Runs command lines; `out` and `err` hold what the last one wrote."""

    def __init__(self, capfd: pytest.CaptureFixture[str], folder: Path) -> None:
        self._capfd, self.folder = capfd, folder
        self.out = self.err = ""

    def __call__(self, *argv: str | Path) -> int:
        code = main([str(word) for word in argv])
        self.out, self.err = self._capfd.readouterr()
        assert "Traceback" not in self.err
        return code

    def guest(self, code: bytes, name: str = "guest.bin") -> Path:
        path = self.folder / name
        path.write_bytes(code)
        return path


@pytest.fixture
def vmm(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.delenv("VMM_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "100")  # the same width wherever the tests run
    return Cli(capfd, tmp_path)


# run


@pytest.mark.parametrize("expectation", EXPECTATIONS, ids=str)
@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_run_prints_and_ends_as_the_guest_says(vmm: Cli, expectation: Expectation, mode: str) -> None:
    """Standard output is exactly the guest's console, and the exit status the guest's own."""
    (vmm.folder / "input").write_bytes(expectation.input)
    defines = [word for name, value in expectation.defines.items() for word in ("-D", f"{name}={value}")]
    more = ("--machine", expectation.model, *defines)
    code = vmm("run", expectation.path, "--mode", mode, "--input", vmm.folder / "input", *more)
    _, wanted = expectation.wanted(mode)
    expectation.check(mode, vmm.out)
    assert code == (status.OF_KIND[expectation.kind] if wanted is None else wanted)


@pytest.mark.parametrize("defines", ([], ["-D", "PV"]), ids=("plain", "-D PV"))
def test_pv_runs_the_build_that_is_made_for_it(vmm: Cli, defines: list[str]) -> None:
    """Of a source, `--mode pv` takes the build with -D PV, said or not; where there is none, a line says so."""
    (wanted,) = (e for e in EXPECTATIONS if e.guest == "timer")
    assert vmm("run", wanted.path, "--mode", "pv", *defines) == 1
    wanted.check("pv", vmm.out)
    assert vmm("run", GUESTS / "popf.asm", "--mode", "pv") == 2
    why = "its source refuses -D PV: this guest has no paravirtual build"
    assert vmm.out == "" and vmm.err == f"vmm: --mode pv: cannot run {GUESTS / 'popf.asm'}: {why}\n"
    assert vmm("run", wanted.path, "-D", "PV") == 4
    assert vmm.err == "vmm: timer.asm: it is made for Xen's interface: run it with --mode pv\n"


@pytest.mark.parametrize(
    ("code", "words", "wanted", "message"),
    [
        (EXIT_5, [], 11, r"exit by isa-debug-exit; status 11; 2 instructions"),
        (HALT, [], 0, r"halted with interrupts off; status 0"),
        (WILD, [], 8, r"triple fault at EIP 0x40000000: #UD -> .*; status 8"),
        (SPIN, ["--max-instructions", "1_000"], 10, r"the budget of 1000 instructions is spent; status 10"),
        (SPIN, ["--timeout", "0.1"], 12, r"timeout; status 12"),
        (SPIN, ["--timeout", "0.1", "--clock", "host"], 12, r"timeout; status 12"),
        (V86, [], 6, r"error: .*virtual-8086.*; status 6"),
        (FLOOD, ["--max-instructions", "2000"], 10, r"the budget of 2000 .*; status 10; 2,000 instructions"),
    ],
)
def test_each_end_has_its_status_and_its_line(
    vmm: Cli, code: bytes, words: list[str], wanted: int, message: str
) -> None:
    """However a guest ends, the last line on standard error says how, and the status is the table's."""
    assert vmm("run", vmm.guest(code), *words) == wanted
    assert re.search(message, vmm.err.splitlines()[-1])


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
@pytest.mark.parametrize("code", [SPIN, WILD, FLOOD], ids=["spins", "jumps wild", "floods"])
def test_no_guest_outlives_its_budget(vmm: Cli, code: bytes, mode: str) -> None:
    """A guest that spins with interrupts off, jumps to no memory or floods the console ends, in every mode."""
    words = ("--mode", mode, "--max-instructions", "20000")
    assert vmm("run", vmm.guest(code), *words) in (status.BUDGET, status.TRIPLE_FAULT)


def test_the_collector_is_left_as_it_was(vmm: Cli) -> None:
    """The command line has cycles collected seldom while it runs a command, and afterwards as before."""
    before = gc.get_threshold()
    vmm("run", GUESTS / "hello.asm")
    assert vmm("run", "no such guest") != status.OK
    assert gc.get_threshold() == before


def test_the_statuses_are_distinct_and_even() -> None:
    """A status of ours is never another's, nor one that a guest can give."""
    numbers = [number for number, _ in status.STATUSES if isinstance(number, int)]
    assert len(set(numbers)) == len(numbers)
    assert all(number % 2 == 0 and number < 256 for number in numbers)
    assert set(status.OF_KIND.values()) <= set(numbers)


def test_the_console_kept_is_bounded() -> None:
    """A flood is passed on, counted, and kept only up to the limit."""
    shown = []
    console = Console(lambda data: shown.append(len(data)))
    for _ in range(5):
        console.write(b"x" * (CONSOLE_LIMIT // 4))
    assert len(console.kept) == CONSOLE_LIMIT
    assert sum(shown) == console.total == 5 * (CONSOLE_LIMIT // 4)


def test_the_exit_table_counts_every_exit(vmm: Cli) -> None:
    """The table has reason, count, share, mean and total, the most frequent reason first, and a sum."""
    vmm("run", GUESTS / "popf.asm", "--mode", "trap")
    head, *rows = [line.split() for line in vmm.err.splitlines()[:-2]]
    assert head == ["exit", "count", "share", "mean", "total"]
    count_at = -6
    counts = [int(row[count_at].replace(",", "")) for row in rows]
    assert rows[-1][0] == "all" and counts[-1] == sum(counts[:-1])
    assert counts[:-1] == sorted(counts[:-1], reverse=True)
    assert sum(float(row[count_at + 1].rstrip("%")) for row in rows[:-1]) == pytest.approx(100, abs=1)
    assert {"POPF", "PUSHF"}.isdisjoint(word for row in rows for word in row)
    assert ["emulated", "CLI"] in [row[:2] for row in rows]


@pytest.mark.parametrize(
    ("nanoseconds", "text"), [(950, "950 ns"), (2300, "2.3 us"), (1.2e6, "1.20 ms"), (3.41e9, "3.41 s")]
)
def test_durations_are_for_people(nanoseconds: float, text: str) -> None:
    """A time is shown in the unit that leaves one to three digits before the point."""
    assert duration(nanoseconds) == text


def test_who_speaks_on_the_screen_alone_is_quoted(vmm: Cli) -> None:
    """Without --vga a line tells that there is a screen to be seen; what came by the serial port needs none."""
    assert vmm("run", vmm.guest(VGA)) == 1
    assert vmm.err.splitlines()[-1] == (
        "vmm: it said nothing on its serial port; its screen, which --vga shows, ends with: Hi"
    )
    assert vmm("run", vmm.guest(VGA), "--vga") == 1
    assert "--vga" not in vmm.err
    assert vmm("run", vmm.guest(bytes.fromhex("b041 66baf803 ee") + VGA)) == 1
    assert "--vga" not in vmm.err
    assert vmm("run", vmm.guest(HALT)) == 0
    assert "--vga" not in vmm.err


def test_the_text_screen_is_shown_with_vga(vmm: Cli) -> None:
    """--vga shows the text screen after the console, without the blank rows below."""
    assert vmm("run", vmm.guest(VGA), "--vga") == 1
    assert vmm.out == "Hi\n"


def test_a_timer_ends_with_its_guest(vmm: Cli) -> None:
    """A --timeout that has not passed changes nothing."""
    assert vmm("run", vmm.guest(EXIT_5), "--timeout", "60") == 11


# --report and --trace


def report_of(vmm: Cli, *words: str | Path) -> dict[str, object]:
    path = vmm.folder / "report.json"
    vmm("run", *words, "--report", path)
    report = json.loads(path.read_text())
    assert isinstance(report, dict)
    return report


def test_the_report_has_everything(vmm: Cli) -> None:
    """The report's keys, and what they say of a run, are as documented."""
    report = report_of(vmm, GUESTS / "popf.asm", "--mode", "trap")
    assert list(report) == [
        *("guest", "mode", "clock", "outcome", "instructions", "seconds", "start_seconds", "exits"),
        *("hidden_faults", "translation", "console", "memory_sha256", "registers"),
    ]
    assert report["outcome"] == {"kind": "exit", "status": 3, "detail": "isa-debug-exit"}
    assert report["console"] == vmm.out
    assert report["mode"] == "trap" and report["clock"] == "instructions"
    exits = report["exits"]
    assert isinstance(exits, dict) and exits["emulated LGDT"]["count"] == 1
    assert all(row["seconds"] >= 0 for row in exits.values())
    assert re.fullmatch("[0-9a-f]{64}", str(report["memory_sha256"]))
    registers = report["registers"]
    assert isinstance(registers, dict) and registers["cs"] == 8
    assert isinstance(report["start_seconds"], float) and report["start_seconds"] > 0


@pytest.mark.parametrize("mode", sorted(UNMODIFIED))
def test_the_report_says_what_virtualizing_cost(vmm: Cli, mode: str) -> None:
    """Hidden faults by kind where there is a monitor, and the translator's work where there is one."""
    report = report_of(vmm, GUESTS / "user.asm", "--mode", mode)
    hidden, translation = report["hidden_faults"], report["translation"]
    assert (hidden is None) == (mode == "native") and (translation is None) == (mode != "bt")
    if mode != "native":
        assert isinstance(hidden, dict) and hidden and all(count > 0 for count in hidden.values())
    if mode == "bt":
        assert isinstance(translation, dict)
        keys = ["units", "instructions", "again", "links", "lookups", "dropped", "flushes"]
        assert list(translation) == keys
        assert 0 < translation["units"] <= translation["instructions"] and translation["links"] > 0


def test_two_runs_report_the_same(vmm: Cli) -> None:
    """With the instruction clock a run is repeatable to the last byte."""
    first, second = (report_of(vmm, GUESTS / "timer.asm") for _ in range(2))
    for key in ("outcome", "instructions", "console", "memory_sha256", "registers"):
        assert first[key] == second[key]


@pytest.mark.parametrize(
    ("code", "words", "kind", "number"),
    [
        (SPIN, ("--timeout", "0.05"), "timeout", 12),
        (SPIN, ("--max-instructions", "9"), "budget", 10),
        (WILD, (), "triple-fault", 8),
        (V86, (), "error", 6),
        (HALT, (), "halt", 0),
    ],
)
def test_the_report_is_written_however_the_run_ended(
    vmm: Cli, code: bytes, words: tuple[str, ...], kind: str, number: int
) -> None:
    """A run that failed has a report, too, with the kind of its end and the status of the process."""
    outcome = report_of(vmm, vmm.guest(code), *words)["outcome"]
    assert isinstance(outcome, dict)
    assert (outcome["kind"], outcome["status"]) == (kind, number)


def test_console_bytes_that_are_no_text_do_not_hurt_the_report(vmm: Cli) -> None:
    """Whatever the guest writes, standard output gets those bytes and the report stays JSON."""
    code = bytes.fromhex("b0ff e6e9 b041 e6e9 b000 e6f4")
    assert report_of(vmm, vmm.guest(code))["console"] == "\N{REPLACEMENT CHARACTER}A"


def test_the_trace_tells_every_event(vmm: Cli) -> None:
    """The trace opens with what was run, has a line for each event in order, and closes with the end."""
    path = vmm.folder / "trace"
    assert vmm("run", GUESTS / "hello.asm", "--trace", path) == 1
    head, *events, end = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["guest"] == str(GUESTS / "hello.asm") and head["mode"] == "bt"
    data = bytes(event["value"] for event in events if event["kind"] == "out" and event["port"] == 0x3F8)
    assert b"Hello from the guest." in data
    moments = [event["at"] for event in events]
    assert moments == sorted(moments) and moments[-1] <= end["at"]
    assert (end["kind"], end["outcome"], end["status"]) == ("end", "exit", 1)


# --dump-translations


def test_translations_are_dumped_as_they_are_made(vmm: Cli) -> None:
    """The page has its legend, a part for each unit that the report counts, and a summary; the run is as without."""
    page = vmm.folder / "page"
    words = (GUESTS / "user.asm", "--dump-translations", page)
    translation = report_of(vmm, *words)["translation"]
    assert isinstance(translation, dict)
    assert vmm.out == next(e.console for e in EXPECTATIONS if e.guest == "user")
    text = page.read_text()
    assert text.startswith(f"Translations of {GUESTS / 'user.asm'}\n")
    assert re.findall(r"^---- unit (\d+) -", text, re.M) == [
        str(number + 1) for number in range(translation["units"])
    ]
    assert text.count("---- all in all -") == 1
    assert f"{translation['instructions']:>9,}  guest instructions translated" in text


def test_a_page_of_translations_that_cannot_be_written_is_told(vmm: Cli) -> None:
    """A full disk under the page ends the guest, with one line and a status."""
    assert vmm("run", GUESTS / "hello.asm", "--dump-translations", "/dev/full") == OutputError.status
    assert vmm.err == "vmm: --dump-translations /dev/full: No space left on device\n"


# Bad input


@pytest.mark.parametrize(
    ("words", "wanted", "message"),
    [
        (["nonsense"], 2, "invalid choice: 'nonsense'"),
        (["run"], 2, "the following arguments are required: GUEST"),
        (["run", "{guest}", "--no-such-option"], 2, "unrecognized arguments: --no-such-option"),
        (["run", "{folder}/absent.asm"], 4, "absent.asm: cannot be read: No such file or directory"),
        (["run", "{folder}/empty.asm"], 4, "empty.asm: is empty"),
        (["run", "{folder}"], 4, "is a directory"),
        (["run", ""], 2, "the guest's name is empty"),
        (["run", "a\nb.asm"], 4, r"a\nb.asm: cannot be read"),
        (["run", "{guest}", "-m", "0"], 2, "-m 0: a machine has between 2M and 3G of memory"),
        (["run", "{guest}", "-m", "10T"], 2, "-m 10T: a machine has between 2M and 3G of memory"),
        (["run", "{guest}", "-m", "abc"], 2, "-m abc: not a size"),
        (["run", "{guest}", "-m", "-1"], 2, "-m -1: not a size"),
        (["run", "{guest}", "-m", "3000001"], 2, "-m 3000001: not a multiple of 4096 bytes: try 2932K"),
        (["run", "{guest}", "--mode", "xen"], 2, "mode 'xen' does not exist: choose native or trap or bt or pv"),
        (["run", "{guest}", "--clock", "moon"], 2, "clock 'moon' does not exist"),
        (["run", "{guest}", "--max-instructions", "0"], 2, "--max-instructions 0: not a number"),
        (["run", "{guest}", "--timeout", "nan"], 2, "--timeout nan: not a time"),
        (["run", "{guest}", "--timeout", "-3"], 2, "--timeout -3: not a time"),
        (["run", "{guest}", "--load", "here"], 2, "--load here: not an address"),
        (["run", "{guest}", "--entry", "0x5"], 4, "the entry point 0x5 lies in no loaded segment"),
        (["run", "{guest}", "-D", "X=1"], 2, "only a .asm takes definitions"),
        (["run", "{source}", "-D", "1=2"], 2, "-D 1=2: not a definition"),
        (["run", "{source}", "-D", "=2"], 2, "-D =2: not a definition"),
        (["run", "{source}", "--load", "0x200000"], 2, "a source says itself where it goes"),
        (["run", "{guest}", "--input", "{folder}/absent"], 2, "absent: cannot be read: No such file"),
        (["run", "{guest}", "--input", "{folder}"], 2, "cannot be read: Is a directory"),
        (["run", "{guest}", "--report", "{folder}/no/report"], 74, "report: cannot be written: No such file"),
        (["run", "{guest}", "--report", "{folder}"], 74, "cannot be written: Is a directory"),
        (["run", "{guest}", "--report", "{guest}"], 2, "that is the guest"),
        (["run", "{guest}", "--input", "{source}", "--report", "{source}"], 2, "the file of --input"),
        (["run", "{guest}", "--script", "{source}", "--trace", "{source}"], 2, "the file of --script"),
        (["run", "{guest}", "--initrd", "{source}", "--report", "{source}"], 2, "the file of --initrd"),
        (["run", "{guest}", "--module", "{source},a b", "--report", "{source}"], 2, "the file of --module"),
        (["compare", "{guest}", "--input", "{source}", "--html", "{source}"], 2, "the file of --input"),
        (["run", "{guest}", "--trace", "{folder}/no/trace"], 74, "trace: cannot be written: No such file"),
        (["run", "{guest}", "--trace", "{folder}/x", "--report", "{folder}/x"], 2, "the file of --report"),
        (["run", "{guest}", "--dump-translations", "{guest}"], 2, "that is the guest"),
        (["run", "{guest}", "--mode", "trap", "--dump-translations", "{folder}/x"], 2, "use --mode bt"),
        (
            ["run", "{guest}", "--dump-translations", "{folder}/no/x"],
            74,
            "x: cannot be written: No such file",
        ),
        (
            ["run", "{guest}", "--dump-translations", "{folder}/x", "--trace", "{folder}/x"],
            2,
            "the file of --trace",
        ),
        (["compare", "{guest}", "--modes", "native,xen"], 2, "mode 'xen' does not exist"),
        (["compare", "{guest}", "--modes", ""], 2, "mode '' does not exist"),
        (["compare", "{folder}/absent.asm"], 4, "cannot be read"),
        (["compare", "{guest}", "--html", "{folder}/no/x"], 74, "x: cannot be written: No such file"),
        (["compare", "{guest}", "--html", "{folder}"], 74, "cannot be written: Is a directory"),
        (["compare", "{guest}", "--html", "{guest}"], 2, "that is the guest"),
        (["compare", "{guest}", "--max-instructions", "many"], 2, "--max-instructions many: not a number"),
        (["classify"], 2, "nothing to classify"),
        (["classify", "--census", "--bytes", "90"], 2, "--census and --bytes exclude each other"),
        (["classify", "--bytes", "xyz"], 2, "--bytes 'xyz': not bytes"),
        (["classify", "--bytes", ""], 2, "--bytes '': not bytes"),
        (["classify", "--witness", "nop"], 2, "nop: no row has that name"),
        (["classify", "--bytes", "90", "-D", "X"], 2, "only a guest's source takes definitions"),
        (["classify", "{folder}/absent.asm"], 4, "cannot be read"),
        (["build", "{source}"], 2, "the following arguments are required: -o"),
        (["build", "{source}", "-o", "{source}"], 2, "that is the guest"),
        (["build", "{source}", "-o", ""], 2, "-o: the name is empty"),
        (["build", "{source}", "-o", "{folder}/no/x.elf"], 74, "cannot be written: No such file"),
    ],
)
def test_each_bad_input_is_one_line_and_a_status(
    vmm: Cli, words: list[str], wanted: int, message: str
) -> None:
    """What a user gets wrong is told in one line that says what and where; nothing runs."""
    guest = vmm.guest(EXIT_5)
    (vmm.folder / "empty.asm").touch()
    source = vmm.folder / "source.asm"
    source.write_text("start: hlt\n")
    places = {"{guest}": str(guest), "{source}": str(source), "{folder}": str(vmm.folder)}
    for mark, place in places.items():
        words = [word.replace(mark, place) for word in words]
    assert vmm(*words) == wanted
    assert vmm.out == ""
    assert vmm.err.count("\n") == 1
    assert vmm.err.startswith("vmm: ") and message in vmm.err
    assert guest.read_bytes() == EXIT_5 and source.read_text() == "start: hlt\n"


def test_an_error_in_a_source_shows_the_line_and_a_caret(vmm: Cli) -> None:
    """A source's error names file, line and column, and points at the place."""
    source = vmm.folder / "bad.asm"
    source.write_text("start:\n        mov eax, nowhere\n")
    assert vmm("run", source) == 4
    first, line, caret = vmm.err.splitlines()
    assert first.startswith(f"vmm: {source}:2:18: ")
    assert line.index("nowhere") == caret.index("^")


def test_a_bug_of_ours_is_one_line_and_a_status(vmm: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unforeseen exception shows no traceback, asks to be reported, and has its status."""

    def broken(_options: object) -> int:
        raise ZeroDivisionError("by\nnobody")

    monkeypatch.setattr(cli, "_run", broken)
    assert vmm("run", "x") == VmmError.status
    assert vmm.err.startswith("vmm: internal error, please report it: ZeroDivisionError: by nobody")
    assert vmm.err.count("\n") == 1


def test_with_vmm_debug_a_bug_shows_its_traceback(vmm: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Developers get the exception itself."""

    def broken(_options: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_run", broken)
    monkeypatch.setenv("VMM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["run", "x"])


def test_without_arguments_help_and_the_statuses_are_shown(vmm: Cli) -> None:
    """`vmm` alone says what there is; each documented status is in --help."""
    assert vmm() == 0
    assert all(command in vmm.out for command in ("run", "compare", "classify", "build"))
    for number, meaning in status.STATUSES:
        assert f"{number:>4}  {meaning}" in vmm.out


def test_the_options_of_run_reach_the_guest(vmm: Cli) -> None:
    """--load, --entry, --append and -m are what the guest finds."""
    # At 0x200001: the exit status tells character 6 of the command line, which begins with the file's name.
    code = bytes.fromhex("f4 8b4310 8a4006 e6f4")
    words = ("--load", "0x200000", "--entry", "0x200001", "--append", "ab 7", "-m", "4M")
    assert vmm("run", vmm.guest(code, "x.b"), *words) == (ord("x.b ab 7"[6]) << 1 | 1)


# build


def test_what_build_writes_runs_as_its_source_does(vmm: Cli) -> None:
    """The ELF of a guest prints and ends as the guest."""
    elf = vmm.folder / "hello.elf"
    assert vmm("build", GUESTS / "shutdown.asm", "-o", elf, "-D", "VALUE=9") == 0
    assert vmm("run", elf) == 19
    assert vmm.out == "shutdown: by isa-debug-exit with 9\n"


def test_help_names_every_mode(capfd: pytest.CaptureFixture[str]) -> None:
    """`run --help` tells of each mode that there is."""
    with pytest.raises(SystemExit) as left:
        main(["run", "--help"])
    assert left.value.code == 0
    words = re.findall(r"\w+", capfd.readouterr().out)
    assert set(MODES) <= set(words)


def test_version_is_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the name and a number."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"vmm \S.*\n", capfd.readouterr().out)
