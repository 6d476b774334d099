"""Independent programs that tests compare against: present, or skipped with a reason, or, in CI, demanded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

LINUX = Path(__file__).parent.parent / "linux"
REAL = Path(__file__).parent.parent / "real"

PACKAGES = {"nasm": "nasm", "chromium": "chromium"}  # of Debian; every other tool is QEMU's


def require(tool: str) -> str:
    """The path of `tool` (nasm, qemu-system-i386, chromium); a missing one skips the test, and fails it in CI."""
    path = shutil.which(tool)
    if path is None:
        package = PACKAGES.get(tool, "qemu-system-x86")
        _absent(f"{tool} is not installed: install Debian's {package} to run this comparison")
    assert path is not None
    return path


def require_linux() -> tuple[Path, Path]:
    """The paths of a real kernel and its initrd; where they are missing the test is skipped, and fails in CI."""
    kernel, initrd = LINUX / "vmlinuz", LINUX / "initrd.gz"
    if not (kernel.exists() and initrd.exists()):
        _absent("there is no Linux to boot: fetch one with `make linux`")
    return kernel, initrd


def require_real(name: str) -> Path:
    """The path of another real guest, `memtest.bin` or `gnumach`; where it is missing as for `require_linux`."""
    path = REAL / name
    if not path.exists():
        _absent(f"there is no {name} to boot: fetch it with `make real`")
    return path


def _absent(message: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
