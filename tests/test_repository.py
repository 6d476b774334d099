"""What the repository holds: what was written for it, and nothing that was fetched or built."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _listed(*options: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("this is a copy without its history: git cannot say what belongs to it")
    done = subprocess.run(("git", "ls-files", "-z", *options), cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name]


def test_nothing_that_is_to_be_ignored_is_committed() -> None:
    """Kernels, packages and environments are fetched by scripts: the folders they go to are not the repository's."""
    assert _listed("--cached", "--ignored", "--exclude-standard") == []


def test_every_file_is_text() -> None:
    """Somebody wrote each, so anybody can read it."""
    for name in _listed():
        path = ROOT / name
        if path.is_file():  # one may have been removed, and that not been committed yet
            assert b"\0" not in path.read_bytes(), name
            path.read_text(encoding="utf-8")
