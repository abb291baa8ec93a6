"""Checks that built wheels contain the C libraries: `python check_wheels.py FOLDER`.

setup.py treats the libraries as optional, so a build without a compiler succeeds without them.
"""

import sys
import zipfile
from pathlib import Path

JPEG, KERNELS = "megabatch/data/jpeg/_native", "megabatch/kernels/cpu/_native"


def missing_libraries(wheel: Path) -> list[str]:
    """Libraries that `wheel` should contain and does not; the CPU kernels are built on Linux only."""
    names = zipfile.ZipFile(wheel).namelist()
    wanted = [JPEG, KERNELS] if "linux" in wheel.name else [JPEG]
    return [library for library in wanted if not any(name.startswith(library) for name in names)]


def main() -> None:
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    if not wheels:
        sys.exit(f"no wheel in {sys.argv[1]}")
    for wheel in wheels:
        if missing := missing_libraries(wheel):
            sys.exit(f"{wheel.name} lacks {', '.join(missing)}")
        sys.stdout.write(f"{wheel.name} holds its libraries\n")


if __name__ == "__main__":
    main()
