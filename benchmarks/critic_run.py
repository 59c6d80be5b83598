"""One critic's certificate: value pretraining as the product does it, then what the critic says of fresh responses.

    python -m benchmarks.critic_run OUT.json TASK RECIPE key=value...

Writes explained variance by rollout; calibration, jumps of the value and its ceiling on fresh rollouts; and values
beside the success that continuations of the same prefixes had. B responses, T response tokens.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.records import records
from megatron_vapo.algorithm import statistics
from megatron_vapo.algorithm.statistics import explained_variance, relative_position_bins
from megatron_vapo.commands.train import execute
from megatron_vapo.config import SamplingConfig
from megatron_vapo.data import derivation
from megatron_vapo.data.experience import Experience
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.rewards.derivation import derivation as check_derivation
from megatron_vapo.rollout import Request, in_order
from megatron_vapo.runtime.durable import write_text

if TYPE_CHECKING:
    from megatron_vapo.training.run import Run

FRESH_ROLLOUTS = 6
PREFIXES, CONTINUATIONS = 200, 32
FIFTHS, TENTHS, CALIBRATION_BINS = 5, 10, 10
KINDS = ("first error", "correction", "right")


@dataclass(frozen=True)
class Told:
    """A fresh response and what the critic said of it."""

    prompt: str
    text: str
    """With the end token, a character a token."""
    right: bool
    values: list[float]
    """values[t] is that of the state before token t, an expected return in [-1, 1]."""


def kinds_of_derivation(response: Told) -> dict[int, str]:
    """Return which tokens are the first open line, its correction (nothing else is wrong then), and results of right
    lines before it."""
    kinds: dict[int, str] = {}
    answer = _derivation_problem(response.prompt).answer
    for piece in re.finditer(r"[a-t]\?!?|[a-t]\d[-+*~]\d", response.text):
        if "?" in piece[0]:
            kinds[piece.start() + 1] = "first error"
            if piece[0].endswith("!"):
                kinds[piece.end() - 1] = "correction"
            break
        if piece[0] in answer:
            kinds[piece.end() - 1] = "right"
    return kinds


def kinds_of_chained_arithmetic(response: Told) -> dict[int, str]:
    """Return which tokens are the first wrong result, its correction, and right results before it."""
    operations = dict(re.findall(r"([a-u])([-+*]\d)", response.prompt))
    before = after = int(response.prompt[1])
    kinds: dict[int, str] = {}
    label = ""
    for step in re.finditer(r"([a-u])(?:\d[-+*]\d)?=(\d)(!?)", response.text.partition("#")[0]):
        before, label = (before if step[1] == label else after), step[1]
        expected, after = eval(f"{before}{operations.get(label, '+0')}") % 10, int(step[2])
        if after == expected:
            kinds[step.start(2)] = "right"
        else:
            kinds[step.start(2)] = "first error"
            if step[3]:
                kinds[step.start(3)] = "correction"
            break
    return kinds


def ceiling_state(response: Told) -> list[tuple[int, bool, bool]]:
    """Return for each token of a derivation what decides how it will end: lines to come, whether a standing line is
    open, whether the last one is."""
    lines = len(_derivation_problem(response.prompt).steps)
    standing: list[bool] = []
    states, written = [], ""
    for symbol in response.text:
        states.append((lines - len(standing), any(standing), bool(standing) and standing[-1]))
        written += symbol
        if symbol == derivation.TAKE_BACK and standing:
            standing.pop()
        elif symbol == derivation.GAP or re.search(r"[a-t]\d[-+*~]\d$", written):
            standing.append(symbol == derivation.GAP)
    return states


def ceiling(told: list[Told]) -> Tensor:
    """Return the expected return [T] by `ceiling_state`, each half of the responses estimated from the other."""
    halves = (told[::2], told[1::2])
    found: dict[int, list[float]] = {}
    for mine, others in (halves, halves[::-1]):
        outcomes: dict[tuple, list[int]] = defaultdict(list)
        for response in others:
            for state in ceiling_state(response):
                outcomes[state].append(1 if response.right else -1)
        means = {state: sum(seen) / len(seen) for state, seen in outcomes.items()}
        for response in mine:
            found[id(response)] = [means.get(state, -1.0) for state in ceiling_state(response)]
    return torch.tensor([value for response in told for value in found[id(response)]])


def lengths_and_bounds(told: list[Told]) -> tuple[Tensor, Tensor]:
    """Return the responses' lengths [B] and where they begin and end [B + 1]."""
    lengths = torch.tensor([len(response.values) for response in told])
    return lengths, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def explained_by_fifth(values_T: Tensor, told: list[Told]) -> dict[str, Any]:
    """Return explained variance over all tokens, by fifth of the response, and at the last token."""
    lengths, cu_seqlens = lengths_and_bounds(told)
    returns_B = torch.tensor([1.0 if response.right else -1.0 for response in told])
    returns_T = returns_B.repeat_interleave(lengths)
    fifth_T = relative_position_bins(cu_seqlens, FIFTHS)
    last_B = cu_seqlens[1:] - 1
    return {
        "all": explained_variance(values_T, returns_T),
        "fifths": [explained_variance(values_T[fifth_T == k], returns_T[fifth_T == k]) for k in range(FIFTHS)],
        "last": explained_variance(values_T[last_B], returns_B),
    }


def calibration(told: list[Told]) -> list[dict[str, float]]:
    """Return predicted and measured success of tokens, in ten bins of the prediction."""
    chances = torch.tensor([success(v) for response in told for v in response.values], dtype=torch.float64)
    rights = torch.tensor([float(response.right) for response in told for _ in response.values])
    return [
        {"predicted": predicted, "measured": measured, "tokens": int(tokens)}
        for predicted, measured, tokens in statistics.calibration(chances, rights, CALIBRATION_BINS).tolist()
        if tokens
    ]


def value_by_tenth(values_T: Tensor, told: list[Told]) -> dict[str, list[float]]:
    """Return the mean value in each tenth of right and of wrong responses."""
    lengths, cu_seqlens = lengths_and_bounds(told)
    tenth_T = relative_position_bins(cu_seqlens, TENTHS)
    right_T = torch.tensor([response.right for response in told]).repeat_interleave(lengths)
    return {
        outcome: statistics.means(statistics.moments_by_bin(values_T[of_T], tenth_T[of_T], TENTHS)).tolist()
        for outcome, of_T in (("right", right_T), ("wrong", ~right_T))
    }


def jumps(told: list[Told], kinds_of: Callable[[Told], dict[int, str]]) -> dict[str, float]:
    """Return the mean change of the value that a token of each kind makes."""
    changes: dict[str, list[float]] = defaultdict(list)
    for response in told:
        for token, kind in kinds_of(response).items():
            if token + 1 < len(response.values):
                changes[kind].append(response.values[token + 1] - response.values[token])
    return {kind: sum(changes[kind]) / len(changes[kind]) for kind in KINDS if changes[kind]}


def success(value: float) -> float:
    """Return the chance of success that a value means, cut to [0, 1]."""
    return min(max((value + 1) / 2, 0.0), 1.0)


def fresh_responses(run: Run) -> list[Told]:
    """Return responses of the fixed policy that the critic was not trained on, with its values."""
    told: list[Told] = []
    for number in range(FRESH_ROLLOUTS):
        batch = run.values(run.rollout("pretrain", run.state.pretraining_steps + 1 + number).batch)
        told += told_of(batch, run.inputs.tokenizer.decode)
    return told


def told_of(batch: Experience, decode: Callable[..., str]) -> list[Told]:
    """Return a batch's responses one by one."""
    told, start = [], 0
    values = batch.require("values").split(batch.response_lengths.tolist())
    for index, (prompt, response) in enumerate(zip(batch.prompt_lengths.tolist(), batch.response_lengths.tolist())):
        tokens = batch.tokens[start : start + prompt + response].tolist()
        start += prompt + response
        right = bool(batch.correct[index])
        told.append(Told(decode(tokens[:prompt]), decode(tokens[prompt:]), right, values[index].tolist()))
    return told


def against_continuations(run: Run, told: list[Told]) -> list[dict[str, float]]:
    """Return, for random prefixes of derivations, the critic's chance of success and that of 32 continuations."""
    rng = random.Random(0)
    encode = run.inputs.tokenizer.convert_tokens_to_ids
    chosen = []
    for response in rng.sample(told, PREFIXES):
        chosen.append((response, rng.randrange(len(response.values))))
    requests = [
        Request(tuple(encode(list(r.prompt))), rng.getrandbits(60), tuple(encode(list(r.text[:at]))))
        for r, at in chosen
        for _ in range(CONTINUATIONS)
    ]
    run.sync_weights()
    written = in_order(run.engine.generate(requests, SamplingConfig(), run.recipe.rollout.max_response_tokens))
    rows = []
    for number, (response, at) in enumerate(chosen):
        answer, right = _derivation_problem(response.prompt).answer, 0
        for continuation in written[number * CONTINUATIONS : (number + 1) * CONTINUATIONS]:
            text = response.text[:at] + run.inputs.tokenizer.decode(continuation.token_ids.tolist())
            right += text.endswith(derivation.EOS) and check_derivation(text[:-1], answer) > 0
        position = at / len(response.values)
        rows.append({"position": position, "critic": success(response.values[at]), "measured": right / CONTINUATIONS})
    return rows


def _derivation_problem(prompt: str) -> derivation.Problem:
    return derivation.Problem(int(prompt[1]), "".join(re.findall(r"[-+*~]", prompt)))


def measure(run: Run, task: str, out: Path) -> None:
    """Pretrain the critic, and write its certificate."""
    from megatron_vapo.training.loop import pretrain_critic

    pretrain_critic(run)
    run.settle(wait=True)
    told = fresh_responses(run)
    values_T = torch.tensor([value for response in told for value in response.values])
    found = {
        "accuracy": sum(response.right for response in told) / len(told),
        "tokens": len(values_T) / len(told),
        "responses_a_rollout": run.recipe.responses_per_step,
        "rollouts": [
            {name: value for name, value in record.items() if name.startswith("critic/explained")}
            for record in records(run.folder, "pretrain")
        ],
        "explained": explained_by_fifth(values_T, told),
        "value_by_tenth": value_by_tenth(values_T, told),
        "calibration": calibration(told),
        "jumps": jumps(told, kinds_of_derivation if task == "derivation" else kinds_of_chained_arithmetic),
    }
    if task == "derivation":
        found["ceiling"] = explained_by_fifth(ceiling(told), told)
        found["continuations"] = against_continuations(run, told)
    write_text(out, json.dumps(found) + "\n")


def main() -> None:
    out, task, recipe, *overrides = sys.argv[1:]
    execute(load_recipe(recipe, overrides), False, False, lambda run: measure(run, task, Path(out)))


if __name__ == "__main__":
    main()
