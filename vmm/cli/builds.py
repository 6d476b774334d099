"""Which builds of a guest there are: the one for the machine, and the one for Xen's interface.

A source has the second if with `-D PV` it assembles to a guest with Xen notes; an ELF is the one or the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Literal

from vmm.cli import values
from vmm.cli.guest import image_of
from vmm.errors import AssemblyError, ImageError, UsageError
from vmm.image.image import Image
from vmm.image.load import is_source
from vmm.vm import MODES

PV = "PV"  # the name that a source looks at


@dataclass(frozen=True)
class Builds:
    """The images by `Mode.image`; where there is none, `missing` says why in a few words."""

    same: Image | None
    pv: Image | None
    missing: dict[Literal["same", "pv"], str]

    def absent(self, modes: Iterable[str]) -> dict[str, str]:
        """Those of `modes` that cannot run this guest, and why."""
        return {mode: self.missing[kind] for mode in modes if (kind := MODES[mode].image) in self.missing}


def builds_of(options: argparse.Namespace, memory: int, modes: Iterable[str]) -> Builds:
    """What the guest that `options` name can be for `modes`; raises as `image_of`."""
    image = image_of(options, memory)
    if image.xen is not None:
        return Builds(None, image, {"same": "it is made for Xen's interface"})
    if all(MODES[mode].image == "same" for mode in modes):
        return Builds(image, None, {})
    if not is_source(values.path(options.guest)):
        why = "it is made for the machine, and there is no source to make another of"
        return Builds(image, None, {"pv": why})
    wanted = copy(options)
    wanted.defines = [*options.defines, PV]
    try:
        pv = image_of(wanted, memory)
    except AssemblyError as error:
        what = error.what.removeprefix("%error: ").removeprefix(f"{PV} : ")
        return Builds(image, None, {"pv": f"its source refuses -D {PV}: {what}"})
    except ImageError as error:
        return Builds(image, None, {"pv": f"its source makes no Xen guest of -D {PV}: {error}"})
    if pv.xen is None:
        return Builds(image, None, {"pv": f"its source makes no Xen guest of -D {PV}"})
    return Builds(image, pv, {})


def image_for(options: argparse.Namespace, memory: int, mode: str) -> Image:
    """The build that `mode` runs: for pv a source's with -D PV, whether that was said or not.

    Raises as `image_of`, and `UsageError` where there is no such build.
    """
    if MODES[mode].image == "same":
        return image_of(options, memory)
    builds = builds_of(options, memory, [mode])
    if builds.pv is None:
        raise UsageError(f"--mode {mode}: cannot run {options.guest}: {builds.missing['pv']}")
    return builds.pv


def refuse(guest: str, builds: Builds, asked: Iterable[str]) -> None:
    """Raise `UsageError` if one of the modes that were asked for by name cannot run the guest."""
    for mode, why in builds.absent(asked).items():
        raise UsageError(f"--modes {mode}: cannot run {guest}: {why}")
