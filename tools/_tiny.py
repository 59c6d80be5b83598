"""The common part of the two tools that make the tiny models: optimiser steps, batches, sampling, progress."""

import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from megatron_vapo.data import chained_arithmetic, derivation, long_derivation, products
from megatron_vapo.rewards.chained_arithmetic import chained_arithmetic as check_chained_arithmetic
from megatron_vapo.rewards.derivation import derivation as check_derivation
from megatron_vapo.rewards.long_derivation import long_derivation as check_long_derivation

MAX_RESPONSE = 280
"""Tokens, the end token included; a longer response is cut and counts as wrong."""

BATCH_SIZE = 64
MICRO_BATCH_SIZE = 16
WARMUP_STEPS = 50
DECAY_SHARE = 0.3
MAX_GRAD_NORM = 1.0
LINE_EVERY_SECONDS = 5.0

Checker = Callable[[str, str], float]


class Task(NamedTuple):
    """A toy task: the module of its problems and demonstrations, and its checker, of a response and its answer."""

    problems: ModuleType
    checker: Checker | None
    """None: what an environment answers is part of a response, and a run's evaluation judges it."""


TASKS = {
    "derivation": Task(derivation, check_derivation),
    "long_derivation": Task(long_derivation, check_long_derivation),
    "chained_arithmetic": Task(chained_arithmetic, check_chained_arithmetic),
    "products": Task(products, None),
}

Report = Callable[[int, str], None]
"""`report(done, note)`"""
Label = TypeVar("Label")


@dataclass(frozen=True)
class Sample:
    """Token ids of a prompt and of a response to it (ended by the end token or cut), and whether it is right."""

    prompt: list[int]
    response: list[int]
    right: bool


def prepare(seed: int) -> None:
    """One thread, seeded: the same machine makes the same model again. The library's own bars and hints are off.

    SIGTERM ends the program like Ctrl-C, so that temporary folders are removed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def make_optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    """AdamW; `optimizer_step` sets its learning rate."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def optimizer_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Clip, step, zero the gradients."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then `peak`, then linear decay over the last `DECAY_SHARE`; `step` counts from 0."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def micro_batches(batch: Sequence[tuple[list[int], Label]]) -> Iterator[list[tuple[list[int], Label]]]:
    """Split a batch of (tokens, label) into parts of about equal lengths, so that little is padded."""
    ordered = sorted(batch, key=lambda example: len(example[0]))
    for start in range(0, len(ordered), MICRO_BATCH_SIZE):
        yield ordered[start : start + MICRO_BATCH_SIZE]


def pad(sequences: Sequence[list[int]], value: int) -> torch.Tensor:
    """Right-pad to int64 `[B, S]`, S = the longest."""
    longest = max(map(len, sequences))
    return torch.tensor([sequence + [value] * (longest - len(sequence)) for sequence in sequences])


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, str]],
    checker: Checker,
    report: Report | None = None,
) -> list[Sample]:
    """One checked response at temperature 1 to the "prompt" of each row; a cut one is wrong.

    Prompts of equal length go together, so nothing is padded. Draws come from torch's global generator.
    """
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    responses: list[list[int]] = [[] for _ in rows]
    groups: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt)].append(index)
    done = 0
    for group in groups.values():
        _sample_group(model, prompts, group, responses)
        done += len(group)
        if report:
            report(done, "")
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [
        Sample(prompt, response, response[-1] == tokenizer.eos_token_id and checker(text, row["answer"]) > 0)
        for prompt, response, text, row in zip(prompts, responses, texts, rows)
    ]


def _sample_group(
    model: PreTrainedModel, prompts: Sequence[list[int]], group: list[int], responses: list[list[int]]
) -> None:
    """Extend `responses` at the indices `group`; a finished one leaves the batch and the cache."""
    cache = DynamicCache()
    tokens = torch.tensor([prompts[index] for index in group])
    for _ in range(MAX_RESPONSE):
        logits = model(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        tokens = torch.multinomial(logits.softmax(-1), num_samples=1)
        for index, token in zip(group, tokens[:, 0].tolist()):
            responses[index].append(token)
        unfinished = (tokens[:, 0] != model.config.eos_token_id).nonzero()[:, 0]
        if len(unfinished) == 0:
            return
        if len(unfinished) < len(group):
            cache.batch_select_indices(unfinished)
            tokens = tokens[unfinished]
            group = [group[position] for position in unfinished.tolist()]


@contextmanager
def progress(title: str, total: int) -> Iterator[Report]:
    """A bar on a terminal, otherwise a line every few seconds."""
    if not sys.stdout.isatty():
        yield _line_report(title, total)
        return
    from rich.progress import Progress, TextColumn

    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}", markup=False)) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


def _line_report(title: str, total: int) -> Report:
    last = time.monotonic()

    def report(done: int, note: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= LINE_EVERY_SECONDS:
            last = time.monotonic()
            print(f"{title} {done}/{total} {note}".rstrip(), flush=True)

    return report
