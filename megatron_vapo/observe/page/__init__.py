"""Puts a run's data and the viewer's style and script into one HTML file, which needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vapo.observe.files import to_json

_FOLDER = Path(__file__).parent
_SCRIPTS = ("data.js", "colours.js", "rows.js", "tokens.js", "strip.js", "charts.js", "pane.js", "list.js", "page.js")


def render(title: str, data: Mapping[str, Any]) -> str:
    """Return the page as HTML.

    Text of prompts and responses is hostile until proven otherwise. It stands in the page once, as JSON without `<`,
    so that no tag can begin in it; the script puts it into the document as text. The page's policy allows its own
    script and style by their hashes, and nothing from elsewhere: no request leaves the browser.

    Args:
        data: what page.js reads; numbers as `base64_floats`.
    """
    style = _read("page.css")
    script = "\n".join(map(_read, _SCRIPTS))
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'"
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(title),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": to_json(data).replace("<", "\\u003c"),
    }
    before, *rest = _read("page.html").split("@")
    # Every second piece is a name: what is put in is never searched for names again.
    return before + "".join(parts[piece] if index % 2 == 0 else piece for index, piece in enumerate(rest))


def base64_floats(numbers: np.ndarray) -> str:
    """Return numbers as base64 of little-endian float32, bit for bit those that are given as float32."""
    return base64.b64encode(np.ascontiguousarray(numbers, dtype="<f4").tobytes()).decode()


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
