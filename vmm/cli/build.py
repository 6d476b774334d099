"""`build`: a guest as a multiboot ELF."""

from __future__ import annotations

import argparse
from pathlib import Path

from vmm.cli.guest import check_distinct, image_of
from vmm.errors import UsageError
from vmm.image.build import build_elf


def build(options: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    if not options.output:
        raise UsageError("-o: the name is empty: name the ELF to write")
    check_distinct(options.guest, {"-o": options.output})
    build_elf(image_of(options), Path(options.output))
    return 0
