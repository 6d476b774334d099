"""Other real guests to boot: memtest86+ and GNU Mach of Debian 12, in the folder `real/`.

    python -m tools.real_guests [--folder DIR] [--suite NAME] [--again]

fetches their packages, unless the folder has them already, and makes `memtest.bin` and `gnumach` of them. Nothing is
installed, and nothing of it belongs into the repository.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
import tempfile
from pathlib import Path

from tools.packages import RELEASE, fetch, suite

MEMTEST, MACH = "memtest86+", "gnumach-image-1.8-486"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("real"), help="where it goes (default: real)")
    parser.add_argument("--suite", default=suite(), help=f"the release (default: {RELEASE})")
    parser.add_argument("--again", action="store_true", help="fetch the packages even if they are there")
    options = parser.parse_args()
    folder = options.folder.resolve()
    wanted = [folder / "memtest.bin", folder / "gnumach"]
    if options.again or not all(path.exists() for path in wanted):
        get(folder, options.suite)
    print(f"{options.folder}: {', '.join(f'{path.name} of {path.stat().st_size} bytes' for path in wanted)}")


def get(folder: Path, suite: str | None) -> None:
    """Get the packages and keep of each its one file."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        sys.exit("tools.real_guests: needs apt-get and dpkg: run it on Debian or a relative")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        boot = fetch(Path(temporary), "i386", suite, (MEMTEST, MACH)) / "boot"
        shutil.copyfile(boot / "memtest86+ia32.bin", folder / "memtest.bin")
        (folder / "gnumach").write_bytes(gzip.decompress(next(boot.glob("gnumach-*.gz")).read_bytes()))


if __name__ == "__main__":
    main()
