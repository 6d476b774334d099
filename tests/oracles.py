"""Independent programs that tests compare against: present, or skipped with a reason, or, in CI, demanded."""

from __future__ import annotations

import os
import shutil

import pytest


def require(tool: str) -> str:
    """The path of `tool` (nasm, qemu-system-i386); a missing one skips the test, and fails it where CI is set."""
    path = shutil.which(tool)
    if path is None:
        message = f"{tool} is not installed: install Debian's nasm and qemu-system-x86 to run this comparison"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path
