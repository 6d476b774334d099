"""Files of Debian's packages, without installing them: what the oracles and the real guests are made of.

The system's own package manager fetches, with lists and a cache of its own, so that for another architecture than the
system's nothing has to be added to it. Needs apt-get and dpkg, and the network.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RELEASE = "bookworm"  # Debian 12, the last one with a kernel for i386


def suite() -> str | None:
    """The release that real guests come from; None where the system's own lists have it."""
    try:
        own = f"VERSION_CODENAME={RELEASE}\n" in Path("/etc/os-release").read_text()
    except OSError:
        own = False
    return None if own else RELEASE


def apt(folder: Path, architecture: str, suite: str | None, tool: str, *words: str) -> str:
    """The output of apt-get, or of another `tool` of its family, with lists and cache of its own in `folder`."""
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
    }
    if suite is not None:
        source = folder / "sources.list"
        source.write_text(f"deb {_site()} {suite} main\n")
        options |= {"Dir::Etc::sourcelist": source, "Dir::Etc::sourceparts": Path("/dev/null")}
    command = [tool, "-q", *(f"-o{name}={value}" for name, value in options.items()), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode and words[0] != "update":  # an index that is missing shows when a package is
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _site() -> str:
    """Where the system gets its packages from."""
    done = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
    )
    sites = done.stdout.split()
    if not sites:
        sys.exit("the system has no package lists: run apt-get update")
    return sites[0]


def fetch(folder: Path, architecture: str, suite: str | None, packages: tuple[str, ...]) -> Path:
    """The root under which the files of `packages` lie, without being installed."""
    folder.mkdir(parents=True, exist_ok=True)
    apt(folder, architecture, suite, "apt-get", "update")
    return unpack(folder, architecture, suite, packages)


def unpack(folder: Path, architecture: str, suite: str | None, packages: tuple[str, ...]) -> Path:
    """The same where the lists have been fetched already."""
    apt(folder, architecture, suite, "apt-get", "download", *packages)
    root = folder / "root"
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    return root


def dependencies(folder: Path, architecture: str, suite: str | None, package: str) -> list[str]:
    """The names of the packages that `package` depends on, in its order."""
    text = apt(folder, architecture, suite, "apt-cache", "depends", package)
    return [
        line.split(":", 1)[1].strip() for line in text.splitlines() if line.strip().startswith("Depends:")
    ]
