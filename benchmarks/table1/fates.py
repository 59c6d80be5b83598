"""Tells from a run's held-out responses what its policy came to do: how each response ends, and by which habits.

What credit was for shows here: results in the right hand, wrong ones taken back, and what was lost on the way.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.table1.credit import wrong_result
from megatron_vapo.data.long_derivation import DIGITS, LETTERS, REMARKS, TAKE_BACK
from megatron_vapo.rewards.derivation import standing
from megatron_vapo.rewards.long_derivation import EITHER, LINES_ALONE, PIECE

RIGHT, HAND, DIGIT, PLACE, FORM = "right", "wrong hand", "wrong digit", "lost its place", "not a derivation"
FATES = (RIGHT, HAND, DIGIT, PLACE, FORM)
CORRECTIONS, TAKEN_BACK, REMARKS_A_LINE = "corrections in 100 lines", "wrong results taken back", "remarks a line"
HABITS = (CORRECTIONS, TAKEN_BACK, REMARKS_A_LINE)

LINES = ((3, 3), (4, 7), (8, 15), (16, 24))
"""Classes of problems by their number of lines, the first and the last of each."""
OTHER_HAND = dict(zip(DIGITS + LETTERS, LETTERS + DIGITS, strict=True))


def fate(response: str, answer: str, finished: bool = True) -> str:
    """Return how a response ends: right, or by what its first line that is not the answer's differs from it. Lines that
    are missing or too many count as a lost place, a response that was cut off as none.

    >>> fate("a5+G", "a5+6"), fate("a5+8", "a5+6"), fate("b5+6", "a5+6"), fate("a4+F;", "a4+5")
    ('wrong hand', 'wrong digit', 'lost its place', 'right')
    """
    lines = standing(response.translate(LINES_ALONE), PIECE) if finished else None
    if lines is None:
        return FORM
    for written, due in zip(PIECE.findall(lines), PIECE.findall(answer)):
        if written[:-1] != due[:-1]:
            return PLACE
        if written[-1].translate(EITHER) != due[-1]:
            return HAND if OTHER_HAND[written[-1]] == due[-1] else DIGIT
    return RIGHT if len(lines) == len(answer) else PLACE


def habits(responses: Iterable[str]) -> dict[str, float]:
    """Return the rates of `HABITS` over all lines of some responses, standing or not."""
    lines = corrections = wrong = mended = remarks = 0
    for response in responses:
        pieces = PIECE.findall(response)
        remarks += sum(symbol in REMARKS for symbol in response)
        for piece, following in zip(pieces, [*pieces[1:], ""]):
            if piece == TAKE_BACK:
                corrections += 1
            else:
                lines, bad = lines + 1, wrong_result(piece)
                wrong, mended = wrong + bad, mended + (bad and following == TAKE_BACK)
    return {
        CORRECTIONS: 100 * corrections / max(lines, 1),
        TAKEN_BACK: mended / max(wrong, 1),
        REMARKS_A_LINE: remarks / max(lines, 1),
    }


def read_fates(samples: Path) -> dict[str, float]:
    """Return shares of `FATES`, rates of `HABITS` and the share of right responses to each class of problems that there
    are in one evaluation's file of responses."""
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    found = Counter(fate(row["response"], row["answer"], row["finish_reason"] == "stop") for row in rows)
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        right[right_of(*_class(len(PIECE.findall(row["answer"]))))].append(row["reward"] > 0)
    return (
        {name: found[name] / len(rows) for name in FATES}
        | habits(row["response"] for row in rows)
        | {name: mean(of_class) for name, of_class in right.items()}
    )


def right_of(fewest: int, most: int) -> str:
    """Return the name of the share of right responses to problems of so many lines."""
    return f"right, {fewest} lines" if fewest == most else f"right, {fewest} to {most} lines"


def mean_fates(fates: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the means over several runs, each over those that have such responses."""
    found = list(fates)
    names = (*FATES, *HABITS, *(right_of(*bounds) for bounds in LINES))
    return {name: mean(known) for name in names if (known := [rates[name] for rates in found if name in rates])}


def _class(lines: int) -> tuple[int, int]:
    return next(bounds for bounds in LINES if lines <= bounds[1])
