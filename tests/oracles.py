"""Independent programs that tests compare against: present, or skipped with a reason, or, in CI, demanded."""

from __future__ import annotations

import os
import shutil

import pytest

PACKAGES = {"nasm": "nasm", "chromium": "chromium"}  # of Debian; every other tool is QEMU's


def require(tool: str) -> str:
    """The path of `tool` (nasm, qemu-system-i386, chromium); a missing one skips the test, and fails it in CI."""
    path = shutil.which(tool)
    if path is None:
        package = PACKAGES.get(tool, "qemu-system-x86")
        message = f"{tool} is not installed: install Debian's {package} to run this comparison"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path
