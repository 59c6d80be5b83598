"""The fingerprint of the prompts that a run reads: other rows under the same names are noticed, and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import zip_longest

from megatron_vapo.data.prompts import Prompt

_BYTES = 4
"""The length of a row's digest: one changed row stays unnoticed with probability 2^-32."""
_DIGITS = 2 * _BYTES


def fingerprint(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Return by data set the digests of its prompts, one after another, 8 hexadecimal digits each.

    They cover what was read: all columns, and the rendered text; not the tokens, which the model's folder decides.
    """
    digests: dict[str, list[str]] = {}
    for prompt in prompts:
        content = repr((prompt.context, prompt.text, prompt.answer, prompt.row))
        digests.setdefault(prompt.dataset, []).append(blake2b(content.encode(), digest_size=_BYTES).hexdigest())
    return {name: "".join(rows) for name, rows in digests.items()}


def changes(before: Mapping[str, str], prompts: Sequence[Prompt]) -> list[str]:
    """Return, for each data set that differs from `before`, how many prompts, and where the first one differs."""
    now = fingerprint(prompts)
    rows = {name: [prompt for prompt in prompts if prompt.dataset == name] for name in now}
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [_change(name, before.get(name, ""), now.get(name, ""), rows.get(name, [])) for name in changed]


def _change(name: str, before: str, now: str, rows: Sequence[Prompt]) -> str:
    pairs = enumerate(zip_longest(_split(before), _split(now)))
    first = next(number for number, (old, new) in pairs if old != new)
    where = f"the first that differs is at {rows[first].source}" if first < len(rows) else "the last ones are missing"
    return f"{name}: {len(_split(before))} prompts then, {len(rows)} now; {where}"


def _split(digests: str) -> list[str]:
    return [digests[start : start + _DIGITS] for start in range(0, len(digests), _DIGITS)]
