"""The verb `view` of the command line: what a run's critic and policy made of each token, as one HTML file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor

from megatron_vapo.checkpoint.snapshot import StepKind
from megatron_vapo.config import Recipe
from megatron_vapo.data.experience import offsets
from megatron_vapo.data.token_text import token_texts
from megatron_vapo.errors import CheckpointError, DataError, RecipeError
from megatron_vapo.observe import alarms
from megatron_vapo.observe.alarms import Raised
from megatron_vapo.observe.metrics import read_metrics
from megatron_vapo.observe.page import base64_floats, render
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.recipe.preflight import load_tokenizer
from megatron_vapo.runtime.durable import write_text
from megatron_vapo.training.objectives import CLIPPED_BY
from megatron_vapo.training.step_metrics import POSITION_BINS
from megatron_vapo.training.token_records import TokenRecord, load_calibration, path_of, recorded_steps
from megatron_vapo.weights.architecture import read_architecture

Step = tuple[StepKind, int]

STEPS = 8
"""Steps whose responses a page holds, spread evenly; the critic's charts show all."""

CURVES = ("critic/explained_variance_tenth", "critic/value_right_tenth", "critic/value_wrong_tenth")
"""Metrics by tenth of the response, _1 to _10 (`training.step_metrics`)."""


def view(run: Path, step: int | None, out: Path) -> Path:
    """Write a page that shows a run's responses token by token, and return its path.

    Args:
        step: training step that the page opens with; None: the last.

    Raises:
        UserError: the folder holds no run, or no tokens of the step; its tokenizer is missing.
    """
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{run}: no run folder, it has no recipe.yaml: give the folder that a run wrote into")
    recipe = load_recipe(run / "recipe.yaml", [])
    kept = recorded_steps(run)
    if not kept:
        raise DataError(f"{run}/tokens: no tokens are kept: set observe.tokens_mib above 0, the run may go on with it")
    opened: Step = kept[-1] if step is None else ("train", step)
    if opened not in kept:
        steps = ", ".join(str(number) for kind, number in kept if kind == "train") or "none"
        raise DataError(f"{run}/tokens: step {step} is not kept, these are: {steps}")
    write_text(out, render(f"{recipe.name}: tokens", _page(recipe, run, kept, opened)))
    return out


def _shown(kept: Sequence[Step], opened: Step) -> list[Step]:
    """Return the steps whose responses a page holds: some of training, the last of value pretraining, and `opened`."""
    of_kind = [step for step in kept if step[0] == kept[-1][0]]
    spread = np.linspace(0, len(of_kind) - 1, min(STEPS, len(of_kind))).round().astype(int)
    last_of_kinds = dict(kept).items()
    chosen = {of_kind[place] for place in spread} | set(last_of_kinds) | {opened}
    return [step for step in kept if step in chosen]


def _page(recipe: Recipe, run: Path, kept: Sequence[Step], opened: Step) -> dict[str, Any]:
    decode, shown = _decoder(recipe, run), _shown(kept, opened)
    return {
        "run": {"name": recipe.name, "about": _about(recipe)},
        "clipped_by": CLIPPED_BY,
        "alarms": [_alarm(raised) for raised in alarms.raised(alarms.read_history(run))],
        "critic": list(_critic(run, kept)),
        "open": shown.index(opened),
        "steps": [_step(TokenRecord.load(path_of(run, *step)), decode) for step in shown],
    }


def _about(recipe: Recipe) -> str:
    algorithm = recipe.resolved_algorithm
    critic = f"gamma {algorithm.gamma:g}" if recipe.uses_critic else "no critic"
    verb = "clipped at" if algorithm.beyond_clip == "clip" else "masked beyond"
    clip = f"ratio {verb} {1 - algorithm.clip_low:g} and {1 + algorithm.clip_high:g}"
    clip = clip if algorithm.loss == "clip" else f"loss {algorithm.loss}"
    return f"model {Path(recipe.model.path).name} of {Path(recipe.model.path).parent.name}; {critic}; {clip}"


def _decoder(recipe: Recipe, run: Path) -> Callable[[list[int]], str]:
    """Return what decodes tokens, special ones included, by the tokenizer of the run's export, else of its base."""
    folders = [folder for folder in (run / "export", Path(recipe.model.path)) if (folder / "config.json").is_file()]
    if not folders:
        raise CheckpointError(f"no tokenizer in {run}/export nor model.path={recipe.model.path}: view it where one is")
    tokenizer = load_tokenizer(str(folders[0]), read_architecture(str(folders[0])))

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


def _alarm(raised: Raised) -> dict[str, str]:
    return {"name": raised.alarm.name, "when": _when(raised), "advice": raised.alarm.advice}


def _when(raised: Raised) -> str:
    _, kind, since, until, until_kind = raised
    if until is None:
        return f"since {kind} step {since}"
    if kind == until_kind:
        return f"{kind} steps {since} to {until}"
    return f"{kind} step {since} to {until_kind} step {until}"


def _critic(run: Path, kept: Sequence[Step]) -> Iterator[dict[str, Any]]:
    """Yield what the charts show of each step: curves by position from the metrics, calibration where it is kept."""
    for kind in get_args(StepKind):
        for record in read_metrics(run, kind):
            step = (kind, record["step"])
            found = load_calibration(path_of(run, *step)) if step in kept else None
            if f"{CURVES[0]}_1" in record:
                curves = {name.rpartition("/")[2]: _curve(record, name) for name in CURVES}
                calibration = None if found is None else base64_floats(found.numpy())
                yield {"kind": kind, "step": record["step"], "calibration": calibration} | curves


def _curve(record: dict[str, Any], name: str) -> str:
    """Return a metric by tenth of the response; NaN where there was none."""
    return base64_floats(np.array([record.get(f"{name}_{k + 1}", math.nan) for k in range(POSITION_BINS)]))


def _step(record: TokenRecord, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    batch = record.batch
    starts, ends = offsets(batch.sequence_lengths)[:-1], offsets(batch.sequence_lengths)[1:]
    prompts: dict[str, int] = {}
    rows = []
    for index, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
        middle = start + int(batch.prompt_lengths[index])
        prompt = decode(batch.tokens[start:middle].tolist())
        rows.append(
            {
                "prompt": prompts.setdefault(prompt, len(prompts)),
                "tokens": token_texts(batch.tokens[middle:end].tolist(), decode),
                "answer": record.answers[index],
                "group": int(batch.groups[index]),
                "outcome": float(batch.outcomes[index]),
                "reward": float(batch.rewards[index]),
                "truncated": bool(batch.truncated[index]),
                "version": None if batch.weight_versions is None else int(batch.weight_versions[index]),
            }
        )
    tensors = {name: base64_floats(tensor.numpy()) for name, tensor in _tensors(record).items() if tensor is not None}
    return {
        "kind": record.kind,
        "step": record.step,
        "responses": record.responses,
        "prompts": list(prompts),
        "rows": rows,
        "tensors": tensors,
    }


def _tensors(record: TokenRecord) -> dict[str, Tensor | None]:
    """Return what the page shows of a token, [T] each, by the page's names."""
    batch = record.batch
    return {
        "value": batch.values,
        "advantage": batch.advantages,
        "return": batch.returns,
        "logprob": batch.logprobs,
        "rollout_logprob": batch.rollout_logprobs,
        "entropy": batch.entropy,
        "ratio": record.ratios,
        "clipped": record.clipped,
        "trained": batch.trained,
        "reward": batch.token_rewards,
    }
