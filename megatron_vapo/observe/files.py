"""How a run folder is written: every line valid JSON, every replaced file whole."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text of `value`; JSON has no NaN, so non-finite numbers become the strings "nan", "inf" and "-inf"."""
    return json.dumps(_without_non_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def replace_text(path: Path, text: str) -> None:
    """Replaces the file at once: a reader, or a process killed half-way, sees the old text or the new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def complete_lines(path: Path) -> list[str]:
    """Lines of an append-only file, without the torn last one that a killed process may have left."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]
