"""Tells each token of a long derivation apart, and the advantage that an algorithm gave it: where credit goes.

Told from the text alone, by the first error that stands: an algorithm that assigns credit blames that result, rewards
its correction, and has nothing to say of what follows an error or of remarks.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from megatron_vapo.data.experience import offsets
from megatron_vapo.data.long_derivation import REMARKS, TAKE_BACK, VOCABULARY, allowed_hands
from megatron_vapo.rewards.long_derivation import PIECE
from megatron_vapo.runtime.durable import write_text
from megatron_vapo.training.token_records import TokenRecord, path_of, recorded_steps

ERROR, CORRECTION, RIGHT, REMARK, AFTER = "first error", "its correction", "right result", "remark", "after an error"
KINDS = (ERROR, CORRECTION, RIGHT, REMARK, AFTER)

FIRST_STEPS = 20
"""The steps that are looked at: what algorithms do before their policies have parted."""

FILE = "credit.json"

ALLOWED = "".join(map(allowed_hands, range(10)))
"""All symbols that a result may be: each stands for one digit."""


def wrong_hand(line: str) -> bool:
    """Return whether a line's result is in a hand that it may not have."""
    return line[3] not in ALLOWED


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
            standing.append(wrong_hand(piece))
        if before and not (corrected and not any(standing)):
            found[at] = AFTER
        elif corrected:
            found[at] = CORRECTION
        elif piece and piece != TAKE_BACK:
            found[at] = ERROR if standing[-1] else RIGHT
        elif symbol in REMARKS:
            found[at] = REMARK
    return found


def credit(run: Path) -> dict[str, dict[str, float]]:
    """Return for each kind of token the mean advantage over the first steps, in units of the root mean square over all
    tokens of a step, the root mean square in the same units, and the number of tokens."""
    seen: dict[str, list[float]] = defaultdict(list)
    for kind, step in recorded_steps(run):
        if kind == "train" and step <= FIRST_STEPS:
            for name, advantage in _advantages(TokenRecord.load(path_of(run, kind, step))):
                seen[name].append(advantage)
    return {name: _summary(seen[name]) for name in KINDS if seen[name]}


def write_credit(run: Path) -> None:
    """Keep what `credit` finds as `FILE` in a run folder, if it has records of training steps."""
    if found := credit(run):
        write_text(run / FILE, json.dumps(found, indent=1) + "\n")


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


def _summary(advantages: Iterable[float]) -> dict[str, float]:
    values = torch.tensor(list(advantages), dtype=torch.float64)
    return {"mean": values.mean().item(), "rms": values.square().mean().sqrt().item(), "tokens": len(values)}
