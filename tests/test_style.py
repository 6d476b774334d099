"""Style and types, as tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _clean(*command: str) -> None:
    done = subprocess.run((sys.executable, "-m", *command), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_is_content() -> None:
    """The linter has nothing to say about anything in the repository."""
    _clean("ruff", "check", ".")


def test_types_are_strict() -> None:
    """mypy, strict, passes over the package, the tests and the tools."""
    _clean("mypy")
