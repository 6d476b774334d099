"""The same guest in two modes, instruction for instruction, until they differ: where, in what, and what came before.

    python -m tools.lockstep guests/popf.asm --modes native,trap
    python -m tools.lockstep linux/vmlinuz --initrd linux/initrd.gz --append "..." -m 64M --modes native,bt

The first mode is taken to be right. Time is that of `--clock instructions`. Of a Linux kernel the symbols are those
that it carries in its memory, once it has unpacked itself. The status is 0 if there is no difference, else 14.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import TYPE_CHECKING

from tools.lockstep.search import LARGEST_STEP, Equal, Found, Search, Trace
from vmm.cli import status, values
from vmm.cli.differences import UNEXPLAINED, facts_of, quote
from vmm.cli.guest import image_of, memory_of
from vmm.cli.main import Parser, guest_options, hardware_options, say
from vmm.cli.run import attach_of
from vmm.cli.terminal import page, printable
from vmm.errors import UsageError, VmmError
from vmm.machine.devices.disk import FileDisk
from vmm.vm import PARAVIRT, UNMODIFIED, VirtualMachine

if TYPE_CHECKING:
    from rich.console import Console

DIFFERENT = status.UNEXPLAINED


def main() -> int:
    try:
        return lockstep(_parser().parse_args())
    except VmmError as error:
        say(printable(str(error)))
        return error.status


def _parser() -> Parser:
    parser = Parser(
        prog="tools.lockstep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    guest_options(parser)
    hardware_options(parser)
    add = parser.add_argument
    add(
        "--disk",
        metavar="FILE[,readonly]",
        help="an ATA disk for each; what a guest writes to it is forgotten",
    )
    add("--modes", default="native,bt", help="two, by a comma (default: native,bt)")
    add("--max-instructions", metavar="N", help="look no further")
    add(
        "--step",
        metavar="N",
        default=str(LARGEST_STEP),
        help=f"compare at least every N instructions (default: {LARGEST_STEP:,})",
    )
    return parser


def lockstep(options: argparse.Namespace) -> int:
    """Compare as `options` say; returns the exit status. Raises `VmmError`."""
    modes = values.modes(options.modes, UNMODIFIED)
    if len(modes) != 2:
        raise UsageError(f"--modes {options.modes}: give two, such as native,bt")
    limit = options.max_instructions and values.count("--max-instructions", options.max_instructions)
    step = values.count("--step", options.step)
    hardware = {mode: attach_of(options, mode) for mode in modes if mode == "hvm" or "hvm" not in modes}
    paravirt = None if options.paravirt is None else values.paravirt(options.paravirt, PARAVIRT)
    model = values.model(options.machine)
    memory, console_input = memory_of(options), values.input_bytes(options.input)
    image = image_of(options, memory)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs need not be left whole
    machines = (
        VirtualMachine(
            image,
            mode,
            memory=memory,
            console_input=console_input,
            attach=hardware.get(mode),
            disk=_disk(options.disk),
            paravirt=paravirt,
            model=model,
        )
        for mode in modes
    )
    found = Search(*machines, limit=limit, largest=step, told=_tell).run()
    with page() as out:
        if isinstance(found, Equal):
            ends = found.endings[0] or "stopped there"
            out.print(
                f"No difference between {' and '.join(modes)} in {found.instructions:,} instructions: {ends}."
            )
            return status.OK
        _show(out, found)
    return DIFFERENT


def _disk(text: str | None) -> FileDisk | None:
    """The disk of one of the machines, which never changes the file: the other one and the copies have it, too."""
    if text is None:
        return None
    path, access = values.disk(text)
    return FileDisk(path, "read" if access == "read" else "snapshot")


def _tell(at: int, equal: bool) -> None:
    print(
        f"after {at:>14,} instructions: {'the same' if equal else 'different'}", file=sys.stderr, flush=True
    )


def _show(out: Console, found: Found) -> None:
    from rich.text import Text

    for line in quote(found.divergence):
        out.print(Text(f"{'>' if line.blamed else ' '} {line.text}"), no_wrap=True, overflow="ellipsis")
    for name, text in facts_of(found.divergence):
        out.print(Text(f"{name:<7} {text}"))
    modes = [trace.mode for trace in found.traces]
    for store in found.stores:
        values = ", ".join(f"{mode} {value:#x}" for mode, value in zip(modes, store.after, strict=True))
        out.print(Text(f"memory  {store.address:#x} (physical) held {store.before:#x}; now {values}"))
    before = ", ".join(f"{name} {value:#x}" for name, value in found.before.items())
    out.print(Text(f"before  {before}"))
    if not found.divergence.explained:
        out.print(Text(UNEXPLAINED))
    for trace in found.traces:
        _show_trace(out, trace)


def _show_trace(out: Console, trace: Trace) -> None:
    from rich.text import Text

    out.print(Text(f"\nThe last {len(trace.exits)} exits in {trace.mode}"))
    for exit, name in trace.exits:
        where = "" if exit.eip is None else f"{exit.eip:#010x} ring {exit.ring}  {printable(name)}"
        out.print(Text(f"{exit.at:>14,}  {exit.reason:<26}  {where}"), no_wrap=True, overflow="ellipsis")


if __name__ == "__main__":
    sys.exit(main())
