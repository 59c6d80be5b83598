"""The records that runs of benchmarks and tests have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]
CLOCK = ("seconds/", "cpu_seconds/", "throughput/", "time")


def records(run_dir: Path, kind: str | None = None) -> list[Record]:
    """Return the records of a run so far, whole lines of its metrics.jsonl; of one kind if asked."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if kind is None or record["kind"] == kind]


def timeless(run_dir: Path, kind: str | None = None, *, but: tuple[str, ...] = ()) -> list[Record]:
    """Return the same without what depends on the clock, nor what begins with one of `but`."""
    apart = (*CLOCK, *but)
    return [{k: v for k, v in record.items() if not k.startswith(apart)} for record in records(run_dir, kind)]
