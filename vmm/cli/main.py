"""The command line: which command, and how its errors reach the user.

The hard part is start-up time, which counts from here to the guest's first instruction: nothing is imported
but what every command needs, and each command imports the rest when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vmm.cli import status
from vmm.cli.collector import seldom
from vmm.errors import AssemblyError, Interrupted, OutputError, UsageError, VmmError

EPILOG = """\
GUEST is 32-bit assembly (.asm), a multiboot ELF, a Linux kernel (bzImage), or a flat binary. Start with

  python -m vmm run guests/hello.asm
  python -m vmm compare guests/popf.asm

"""


class Parser(argparse.ArgumentParser):
    """Errors are raised, to be told in one line as all others are."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own if None) and return the exit status."""
    if sys.stdout is None:
        return _fail(OutputError("standard output is closed: the guest's console goes there"))
    try:
        try:
            options = _parser().parse_args(argv)
            with seldom():
                code: int = options.command(options)
        finally:
            sys.stdout.flush()
    except VmmError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail(Interrupted("interrupted"))
    except BrokenPipeError:
        _abandon_output()
        return OutputError.status
    except OSError as error:
        if error.filename is None and error.errno is not None:  # ours name their file
            _abandon_output()
            return _fail(OutputError(f"standard output: {error.strerror}"))
        return _bug(error)
    except Exception as error:
        return _bug(error)
    return code


def say(text: str) -> None:
    """A line for the user on standard error, if there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # nobody listens
            print(f"vmm: {text}", file=sys.stderr, flush=True)


def _fail(error: VmmError) -> int:
    lines = isinstance(error, AssemblyError)  # with the source line and a caret below it
    text = str(error)
    say("".join(c if c.isprintable() or c == "\n" and lines else ascii(c)[1:-1] for c in text))
    return error.status


def _bug(error: Exception) -> int:
    if os.environ.get("VMM_DEBUG"):
        raise error
    what = " ".join(f"{type(error).__name__}: {error}".split())
    say(f"internal error, please report it: {what} (VMM_DEBUG=1 shows the traceback)")
    return VmmError.status


def _abandon_output() -> None:
    """What is still buffered cannot be written: let it go where nothing complains."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


# The commands, as argparse has them


def _run(options: argparse.Namespace) -> int:
    from vmm.cli.run import run

    return run(options)


def _compare(options: argparse.Namespace) -> int:
    from vmm.cli.compare import compare

    return compare(options)


def _classify(options: argparse.Namespace) -> int:
    from vmm.cli.classify import classify

    return classify(options)


def _build(options: argparse.Namespace) -> int:
    from vmm.cli.build import build

    return build(options)


class _Version(argparse.Action):
    """`--version`; the number is looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib import metadata

        try:
            number = metadata.version("vmm")
        except metadata.PackageNotFoundError:
            number = "(not installed)"
        print(f"vmm {number}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="vmm",
        description="An x86 machine, and monitors that virtualize it.",
        epilog=EPILOG + status.table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")

    def show_help(_options: argparse.Namespace) -> int:
        parser.print_help()
        return status.OK

    parser.set_defaults(command=show_help)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    _add_run(commands)
    _add_compare(commands)
    _add_classify(commands)
    _add_build(commands)
    return parser


Commands = argparse._SubParsersAction  # argparse has no public name for it


def _command(commands: Commands[Parser], name: str, summary: str) -> Parser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=status.table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def guest_options(parser: Parser) -> None:
    """What names a guest and what it is given; see `guest.image_of`."""
    add = parser.add_argument
    add("guest", metavar="GUEST", help="a .asm, a multiboot ELF, a Linux kernel or a flat binary")
    add("-m", metavar="SIZE", dest="memory", help="memory: 1G, 4096K, ... (default: 16M; for Linux 128M)")
    add("-D", metavar="NAME=VALUE", action="append", default=[], dest="defines", help="define for a .asm")
    add("--load", metavar="ADDR", help="where a flat binary goes (default 0x100000)")
    add("--entry", metavar="ADDR", help="where a flat binary starts (default: its first byte)")
    add("--append", metavar="TEXT", default="", help="the command line that the guest gets")
    add("--initrd", metavar="FILE", help="Linux's initial RAM disk; for another guest, its first module")
    add("--module", metavar="FILE[,TEXT]", action="append", default=[], dest="modules", help="a multiboot module")
    add("--input", metavar="FILE", help="what the guest can read from its serial port; - is standard input")
    add("--machine", metavar="NAME", default="isapc", help="isapc (the default): a PC/AT; pc: with APIC, PCI, ACPI")
    add("--paravirt", metavar="NAME", help="offer the guest a paravirtual interface: kvm")


def hardware_options(parser: Parser) -> None:
    """How hvm is to do it; see `run.attach_of`."""
    add = parser.add_argument
    add("--intercept", metavar="NAMES", help="hvm: intercept these, too, by commas: cr3,cpuid,pf,msr:0x174, all")
    add("--memory-virtualization", metavar="HOW", help="hvm: nested (the default) or shadow page tables")


def _add_run(commands: Commands[Parser]) -> None:
    parser = _command(commands, "run", "run a guest; its console goes to standard output")
    guest_options(parser)
    add = parser.add_argument
    add(
        "--mode",
        default="bt",
        help="bt (the default): binary translation; trap: trap-and-emulate; native: the bare machine; "
        "pv: a guest made for Xen's interface (a source's build with -D PV); hvm: AMD-V",
    )
    hardware_options(parser)
    add(
        "--clock",
        help="instructions (the default): repeatable; host (the default at a terminal, see -i): wall time",
    )
    add(
        "-i",
        "--interactive",
        action=argparse.BooleanOptionalAction,
        help="the terminal is the guest's serial port: keys go to it as they are typed, Ctrl-C too; Ctrl-A h helps "
        "(the default for Linux at a terminal)",
    )
    add("--until", metavar="TEXT", help="end the run as soon as the console has shown TEXT, after any --script")
    add("--script", metavar="FILE", help='expect "TEXT", send "TEXT" and the like, a line each')
    add("--max-instructions", metavar="N", help="stop after so many")
    add("--timeout", metavar="S", help="stop after so many seconds")
    add(
        "--disk",
        metavar="FILE",
        help="an ATA disk; FILE,snapshot forgets what the guest writes, FILE,readonly refuses it",
    )
    add("--report", metavar="FILE", help="write what came of the run as JSON")
    add("--trace", metavar="FILE", help="write every exit as a line of JSON")
    add("--dump-translations", metavar="FILE", help="write each translation beside its source (bt only)")
    add("--explain", action="store_true", help="tell the costliest source lines, and why each exits")
    add("--vga", action="store_true", help="show the text screen at the end")
    parser.set_defaults(command=_run)


def _add_compare(commands: Commands[Parser]) -> None:
    parser = _command(commands, "compare", "run a guest in several modes and find where they part")
    guest_options(parser)
    add = parser.add_argument
    add("--modes", help="by commas (default: all that can run the guest)")
    add("--max-instructions", metavar="N", help="stop each run after so many (default 100 million)")
    add("--json", action="store_true", help="print JSON")
    add("--html", metavar="FILE", help="write one page with the table, charts and what made the difference")
    parser.set_defaults(command=_compare)


def _add_classify(commands: Commands[Parser]) -> None:
    parser = _command(commands, "classify", "show which instructions a monitor must care about, and why")
    add = parser.add_argument
    add("guest", metavar="GUEST", nargs="?", help="list this guest, each such instruction marked")
    add("--census", action="store_true", help="put every row of the classification to the CPU")
    add("--witness", metavar="NAME", help="the smallest state that shows why NAME is critical")
    add("--bytes", metavar="HEX", help='classify machine code, such as "0f 01 c8"')
    add("-D", metavar="NAME=VALUE", action="append", default=[], dest="defines", help="define for a .asm")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_classify)


def _add_build(commands: Commands[Parser]) -> None:
    parser = _command(commands, "build", "make a guest a multiboot ELF, which QEMU and GRUB boot, too")
    add = parser.add_argument
    add("guest", metavar="GUEST", help="a .asm, or a flat binary")
    add("-o", metavar="FILE", required=True, dest="output", help="the ELF to write")
    add("-D", metavar="NAME=VALUE", action="append", default=[], dest="defines", help="define for a .asm")
    add("--load", metavar="ADDR", help="where a flat binary goes (default 0x100000)")
    add("--entry", metavar="ADDR", help="where a flat binary starts (default: its first byte)")
    parser.set_defaults(command=_build)
