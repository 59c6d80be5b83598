#!/usr/bin/env python
"""Carry large files, such as wheels, to a machine that takes small ones only and has no network.

    pip wheel --no-deps --no-build-isolation --wheel-dir wheels 'transformer-engine-torch==2.20.2'   # docs/install.md
    pip download --no-deps --dest wheels transformer-engine==2.20.2 transformer-engine-cu13==2.20.2
    tools/pieces.py split wheels pieces            # pieces/00, 01, ...: folders of at most 60 MiB, one a trip

and there, once all have arrived in one folder:

    tools/pieces.py join pieces wheels             # compares SHA-256 of every piece and of every file
    pip install --no-index --no-deps wheels/*.whl

Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

MIB = 2**20


def split(source: Path, target: Path, size: int) -> None:
    """Write the files of a folder as folders of at most `size` bytes each, every one with its part of the list."""
    trip, room = -1, 0
    listed: list[dict[str, object]] = []
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        whole = hashlib.sha256(path.read_bytes()).hexdigest()
        with path.open("rb") as file:
            number = 0
            while piece := file.read(size if room < MIB else room):
                if room < len(piece):
                    trip, room = trip + 1, size
                    (target / f"{trip:02}").mkdir(parents=True)
                name = f"{trip:02}/{path.name}.{number:03}"
                (target / name).write_bytes(piece)
                digest = hashlib.sha256(piece).hexdigest()
                listed.append({"file": path.name, "sha256": whole, "piece": name, "piece_sha256": digest})
                room, number = room - len(piece), number + 1
    for folder in target.iterdir():
        (folder / "pieces.json").write_text(json.dumps(listed))


def join(source: Path, target: Path) -> str | None:
    """Put the files together again; return what is missing or damaged, of which nothing is written."""
    lists = sorted(source.glob("*/pieces.json"))
    if not lists:
        return f"{source}: no */pieces.json there"
    listed = json.loads(lists[0].read_text())
    for entry in listed:
        piece = source / entry["piece"]
        if not piece.is_file() or hashlib.sha256(piece.read_bytes()).hexdigest() != entry["piece_sha256"]:
            return f"{piece}: missing or damaged; bring it again"
    target.mkdir(parents=True, exist_ok=True)
    for name, whole in {entry["file"]: entry["sha256"] for entry in listed}.items():
        content = b"".join((source / entry["piece"]).read_bytes() for entry in listed if entry["file"] == name)
        if hashlib.sha256(content).hexdigest() != whole:
            return f"{name}: its pieces are not those of one file"
        (target / name).write_bytes(content)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("split", "join"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--mib", type=float, default=60, help="of a trip")
    options = parser.parse_args()
    if options.command == "split":
        split(options.source, options.target, int(options.mib * MIB))
        return 0
    problem = join(options.source, options.target)
    if problem:
        print(f"pieces: {problem}", file=sys.stderr)
    return int(problem is not None)


if __name__ == "__main__":
    sys.exit(main())
