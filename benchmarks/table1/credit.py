"""Tells each token of a long derivation apart, and the advantage that an algorithm gave it: where credit goes.

Told from the text alone, by the first wrong result that stands: an algorithm that assigns credit blames that result,
rewards its correction, and has nothing to say of what follows an error or of remarks.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_vapo.data.derivation import OPERATIONS
from megatron_vapo.data.experience import offsets
from megatron_vapo.data.long_derivation import REMARKS, TAKE_BACK, VOCABULARY, allowed_hands
from megatron_vapo.rewards.long_derivation import PIECE
from megatron_vapo.runtime.durable import write_text
from megatron_vapo.training.token_records import TokenRecord, path_of, recorded_steps

ERROR, CORRECTION, RIGHT, REMARK, AFTER = "first error", "its correction", "right result", "remark", "after an error"
KINDS = (ERROR, CORRECTION, RIGHT, REMARK, AFTER)

FILE = "credit.json"


def wrong_result(line: str) -> bool:
    """Return whether a line's result is not what its own operation gives, or is in a hand that it may not have.

    >>> wrong_result("a5+6"), wrong_result("a5+G"), wrong_result("a5+8"), wrong_result("a2+D")
    (False, True, True, False)
    """
    _, operand, operation, result = line
    return result not in allowed_hands(OPERATIONS[operation](int(operand)))


def kinds(text: str) -> dict[int, str]:
    """Return which tokens of a response are of a kind of `KINDS`; others, such as labels before any error, are of
    none."""
    found: dict[int, str] = {}
    standing: list[bool] = []  # of each line whether it is wrong
    ends = {piece.end() - 1: piece[0] for piece in PIECE.finditer(text)}
    for at, symbol in enumerate(text):
        piece, before = ends.get(at), any(standing)
        corrected = False
        if piece == TAKE_BACK:
            corrected = bool(standing) and standing.pop()
        elif piece:
            standing.append(wrong_result(piece))
        if before and not (corrected and not any(standing)):
            found[at] = AFTER
        elif corrected:
            found[at] = CORRECTION
        elif piece and piece != TAKE_BACK:
            found[at] = ERROR if standing[-1] else RIGHT
        elif symbol in REMARKS:
            found[at] = REMARK
    return found


def credit(run: Path) -> list[dict[str, Any]]:
    """Return for each training step and kind of token that it has the number of tokens and their mean advantage, in
    units of the root mean square over all tokens of the step."""
    rows = []
    for kind_of_step, step in recorded_steps(run):
        if kind_of_step == "train":
            seen: dict[str, list[float]] = defaultdict(list)
            for kind, advantage in _advantages(TokenRecord.load(path_of(run, kind_of_step, step))):
                seen[kind].append(advantage)
            rows += [
                {"step": step, "kind": kind, "tokens": len(seen[kind]), "mean": fmean(seen[kind])}
                for kind in KINDS
                if seen[kind]
            ]
    return rows


def write_credit(run: Path) -> None:
    """Keep what `credit` finds as `FILE` in a run folder, if it has records of training steps."""
    if rows := credit(run):
        write_text(run / FILE, json.dumps(rows) + "\n")


def _advantages(record: TokenRecord) -> Iterator[tuple[str, float]]:
    """Yield the kind and the scaled advantage of each token that is of a kind."""
    batch = record.batch
    advantages_T = batch.require("advantages")
    scale = advantages_T.square().mean().sqrt().clamp(min=1e-9)
    for text, advantages in zip(responses(record), advantages_T.div(scale).split(batch.response_lengths.tolist())):
        for at, name in kinds(text).items():
            yield name, float(advantages[at])


def responses(record: TokenRecord) -> Iterator[str]:
    """Yield the text of each response, a character a token: the tokenizer's ids are the vocabulary's order."""
    batch = record.batch
    starts = offsets(batch.sequence_lengths).tolist()
    for start, prompt, length in zip(starts, batch.prompt_lengths.tolist(), batch.response_lengths.tolist()):
        ids = batch.tokens[start + prompt : start + prompt + length]
        yield "".join(VOCABULARY[i] for i in ids.tolist())
