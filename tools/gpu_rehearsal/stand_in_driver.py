"""A libcuda.so.1 that answers every call with "no device": for libraries that cannot be loaded where no driver is.

    python tools/gpu_rehearsal/stand_in_driver.py SITE_PACKAGES FOLDER

exports what the libraries below SITE_PACKAGES that are linked with libcuda ask of it. Of no other use.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NAME = "libcuda.so.1"
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def linked_with_driver(packages: Path) -> Iterator[Path]:
    """Yield the libraries that the loader would refuse without a driver."""
    for library in sorted(packages.rglob("*.so*")):
        if library.is_file() and f"[{NAME}]" in _told("readelf", "--dynamic", library):
            yield library


def wanted(library: Path) -> set[str]:
    """Return the driver's functions that a library looks up when it is loaded."""
    names = (line.split()[-1].partition("@")[0] for line in _told("nm", "-D", "--undefined-only", library).splitlines())
    return {name for name in names if name.startswith("cu") and name[2:3].isupper()}


def build(names: set[str], folder: Path) -> Path:
    """Compile the library; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "stand_in_driver.c"
    source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in sorted(names)))
    command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{NAME}", "-o", folder / NAME, source]
    subprocess.run(command, check=True)
    return folder / NAME


def _told(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True).stdout


def main(packages: Path, folder: Path) -> None:
    libraries = list(linked_with_driver(packages))
    names = set().union({"cuInit"}, *map(wanted, libraries))
    build(names, folder)
    print(f"{folder / NAME}: {len(names)} functions for {len(libraries)} libraries")
    for library in libraries:
        print(f"  {library.relative_to(packages)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
