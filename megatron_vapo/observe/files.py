"""The records of a run folder: every line is valid JSON."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON text; JSON has no NaN, so non-finite numbers become the strings "nan", "inf" and "-inf"."""
    return json.dumps(_without_non_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def complete_lines(path: Path) -> list[str]:
    """Return the lines of an append-only file, without the torn last one that a killed process may have left."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]
