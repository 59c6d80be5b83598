"""The metrics that docs/metrics.md describes."""

from __future__ import annotations

import re
from functools import cache

from tests.conftest import REPOSITORY

PLACEHOLDERS = {"NAME": r"[^/]+", "METRIC": r"[^/]+", "KEY": r"[^/]+", "PHASE": r"[a-z_]+", "KIND": r"[a-z_]+"}


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = {name for name in re.findall(r"`([^`\s]+(?:/|_tenth_)[^`\s]+)`", page) if not name.endswith(".jsonl")}
    return tuple(re.compile(_pattern(name)) for name in names)


def _pattern(name: str) -> str:
    parts = re.split(r"(NAME|METRIC|KEY|PHASE|KIND|_tenth_K|\.\.\.)", name)
    meant = PLACEHOLDERS | {"_tenth_K": r"_tenth_(?:\d+|K)", "...": ".+"}
    return "".join(meant.get(part, re.escape(part)) for part in parts)


def undescribed(names: set[str]) -> list[str]:
    """The metrics that the page does not describe."""
    return sorted(name for name in names if not any(pattern.fullmatch(name) for pattern in _patterns()))
