"""Measures on one base what the table's task must have before any arm is worth running; docs/table1.md.

    python -m benchmarks.table1.preconditions --base OUT/bases/1000 --out FOLDER [key=value...]

`--base` holds what a sweep or its tuning makes for a seed: base, problems, reward model. Two critics look at the same
fresh responses of the base: the reward model as it is, and the same after value pretraining as the table's VAPO has it.
Shares of clipped tokens are those of runs: the document's section "On the way". T response tokens.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.critic_run import Told, explained_by_fifth, fresh_responses, value_by_tenth
from benchmarks.table1.credit import KINDS, kinds, wrong_result
from benchmarks.table1.fates import LINES
from benchmarks.table1.pieces import VAPO, overrides
from megatron_vapo.algorithm.statistics import explained_variance
from megatron_vapo.commands.train import execute
from megatron_vapo.data.long_derivation import TAKE_BACK
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.rewards.long_derivation import PIECE
from megatron_vapo.runtime.durable import write_text

if TYPE_CHECKING:
    from megatron_vapo.training.run import Run

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def lines_of(response: Told) -> int:
    """Return how many lines the whole derivation has."""
    return len(re.findall(r"[-+*~]", response.prompt))


def mean_jumps(told: list[Told]) -> dict[str, float]:
    """Return the mean change of the value that tokens of each kind make."""
    changes: dict[str, list[float]] = defaultdict(list)
    for response in told:
        for token, kind in kinds(response.text).items():
            if token + 1 < len(response.values):
                changes[kind].append(response.values[token + 1] - response.values[token])
    return {kind: mean(changes[kind]) for kind in KINDS if changes[kind]}


def by_lines(told: list[Told]) -> dict[str, list[Told]]:
    """Return the responses of each class of problems that there are."""
    classes = {f"{low} to {high}": [r for r in told if low <= lines_of(r) <= high] for low, high in LINES}
    return {name: part for name, part in classes.items() if part}


def explained_of(told: list[Told]) -> float:
    """Return explained variance of returns at lambda 1 over all tokens of some responses."""
    returns = [1.0 if r.right else -1.0 for r in told for _ in r.values]
    return explained_variance(torch.tensor([v for r in told for v in r.values]), torch.tensor(returns))


def of_the_critic(told: list[Told]) -> dict[str, Any]:
    """Return what its values say."""
    values_T = torch.tensor([value for response in told for value in response.values])
    hopeless = {prompt for prompt, group in groups(told) if not any(r.right for r in group)}
    return {
        "explained": explained_by_fifth(values_T, told),
        "explained_by_lines": {name: explained_of(part) for name, part in by_lines(told).items()},
        "value_by_tenth": value_by_tenth(values_T, told),
        "jumps": mean_jumps(told),
        "jumps_by_lines": {name: mean_jumps(part) for name, part in by_lines(told).items()},
        "jumps_where_all_are_wrong": mean_jumps([r for r in told if r.prompt in hopeless]),
    }


def groups(told: list[Told]) -> list[tuple[str, list[Told]]]:
    """Return prompts and the responses to each, as they were sampled."""
    return [(prompt, list(group)) for prompt, group in groupby(told, key=lambda response: response.prompt)]


def of_the_base(told: list[Told], limit: int) -> dict[str, Any]:
    """Return lengths, accuracy, groups and corrections."""
    lengths = torch.tensor([float(len(r.values)) for r in told])
    sampled = groups(told)
    wrong = [not any(r.right for r in group) for _, group in sampled]
    long_first = LINES[-1][0]
    pieces = [piece for response in told for piece in PIECE.findall(response.text)]
    lines = [piece for piece in pieces if piece != TAKE_BACK]
    return {
        "responses": len(told),
        "right": mean(r.right for r in told),
        "right_by_lines": {name: mean(r.right for r in part) for name, part in by_lines(told).items()},
        "tokens": lengths.mean().item(),
        "token_quantiles": lengths.quantile(torch.tensor(QUANTILES)).int().tolist(),
        "cut": (lengths >= limit).double().mean().item(),
        "groups_all_wrong": mean(wrong),
        "long_groups_all_wrong": mean(w for w, (_, g) in zip(wrong, sampled) if lines_of(g[0]) >= long_first),
        "right_results": mean(not wrong_result(line) for line in lines),
        "corrections_a_line": (len(pieces) - len(lines)) / len(lines),
    }


def measure(run: Run) -> dict[str, Any]:
    """Return what is to be known of the run's base and of the critic that it starts with."""
    from megatron_vapo.training.loop import pretrain_critic

    pretrain_critic(run)
    run.settle(wait=True)
    told = fresh_responses(run)
    return {"base": of_the_base(told, run.recipe.rollout.max_response_tokens), "critic": of_the_critic(told)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the two runs and of preconditions.json")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    base, out = args.base.resolve(), args.out.resolve()
    found: dict[str, Any] = {}
    for name, enabled in (("reward model as it is", "false"), ("after value pretraining", "true")):
        settings = [
            *overrides(VAPO, args.seed, base, out / name.replace(" ", "_")),
            f"value_pretraining.enabled={enabled}",
        ]
        recipe = load_recipe(VAPO.recipe, [*settings, "checkpoint.every=0", *args.overrides])
        execute(recipe, False, False, lambda run, name=name: found.__setitem__(name, measure(run)))
    text = json.dumps(found, indent=1) + "\n"
    write_text(out / "preconditions.json", text)
    print(text)


if __name__ == "__main__":
    main()
