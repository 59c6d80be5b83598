"""tools/pieces.py: files go through trips of a limited size and come out the same, or not at all."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_files_go_through_small_trips_and_come_out_the_same(tmp_path: Path, run_tool: Run) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    sizes = {"a.whl": 5 * 2**20 + 7, "b.whl": 2**20, "c.whl": 1, "d.whl": 3 * 2**20}
    files = {name: random.Random(name).randbytes(size) for name, size in sizes.items()}
    for name, content in files.items():
        (wheels / name).write_bytes(content)
    pieces = tmp_path / "pieces"
    assert run_tool("pieces.py", "split", wheels, pieces, "--mib", 2).returncode == 0
    trips = list(pieces.iterdir())
    carried = [sum(p.stat().st_size for p in trip.iterdir() if p.name != "pieces.json") for trip in trips]
    assert len(trips) >= 5 and max(carried) <= 2 * 2**20
    assert run_tool("pieces.py", "join", pieces, tmp_path / "there").returncode == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == files

    damaged = next(trips[-1].glob("*.whl.*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    refused = run_tool("pieces.py", "join", pieces, tmp_path / "again")
    assert refused.returncode == 1 and f"{damaged}: missing or damaged" in refused.stderr
    assert not (tmp_path / "again").exists()
