"""`build`: a guest as a multiboot ELF."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vmm.cli.guest import check_distinct, image_of, open_output
from vmm.errors import UsageError
from vmm.image.build import build_elf


def build(options: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    if not options.output:
        raise UsageError("-o: the name is empty: name the ELF to write")
    check_distinct(options, {"-o": options.output})
    image = image_of(options)
    os.close(open_output("-o", options.output))
    build_elf(image, Path(options.output))
    return 0
