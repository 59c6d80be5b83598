"""A run folder with token records of hostile text and a long response, and the page that `view` makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megatron_vapo.checkpoint.snapshot import RunState
from megatron_vapo.config import AlgorithmConfig
from megatron_vapo.data.experience import Experience, whole_batch
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.training.token_records import Kept, TokenRecords
from tests.conftest import VOCAB

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>",
    "<!--",
    "-->",
    "]]>",
    "\u202eevil",
    "\u2028",
    "\n",
    "\t",
    "é日",
    "@DATA@",
    "&lt;",
    "\\u003c/script>",
    "`${document.title='owned'}`",
]
"""What a model may write to get out of the page's data, or to make text look like another."""

LONG = 20_000
"""Tokens of the longest response."""


def hostile_tokenizer():
    """Every word of `HOSTILE` is a token; the others are those of the tiny tokenizer."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = [*HOSTILE, "<pad>", "<eos>", *(f" word{i}" for i in range(VOCAB - len(HOSTILE) - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


@dataclass(frozen=True)
class ViewedRun:
    """A run folder, and the batches that its steps ended with."""

    folder: Path
    batches: dict[int, Experience]


@pytest.fixture(scope="session")
def viewed_run(
    tmp_path_factory: pytest.TempPathFactory,
    make_checkpoint: Callable[..., Path],
    make_experience: Callable[..., Experience],
    world: None,
) -> ViewedRun:
    """Steps 1 and 2, each four groups of four; in step 2 one response of 20,000 tokens; two alarms. Of the responses of
    step 1 the policy has not written every fifth token."""
    folder = tmp_path_factory.mktemp("viewed")
    model = make_checkpoint("llama")
    hostile_tokenizer().save_pretrained(model)
    settings = {
        "name": "viewed </title>",
        "model": {"path": str(model)},
        "critic": {"init": "actor"},
        "data": {"train": "none.jsonl"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    _write_metrics(folder)
    batches = {step: _batch(make_experience, step, LONG if step == 2 else 90) for step in (1, 2)}
    prompt = Prompt("", "<b>4</b>", 0, "", token_ids=tuple(batches[1].tokens[:3].tolist()))
    records = TokenRecords(folder, AlgorithmConfig(), [prompt], RunState())
    for step, batch in batches.items():
        records.write("train", step, Kept.of(batch, 2**30))
    return ViewedRun(folder, batches)


def _batch(make: Callable[..., Experience], step: int, longest: int) -> Experience:
    lengths = [longest, *range(8, 23)]
    outcomes = torch.tensor([1.0, -1.0, -1.0, 1.0] * 4)
    made = make([3] * 16, lengths, seed=step, samples=4, outcomes=outcomes, rewards=outcomes.clone())
    noise = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(step))
    batch = replace(made, update_logprobs=made.logprobs + 0.3 * noise, tokens=made.tokens - 1)
    if step > 1:
        return batch
    trained = torch.arange(sum(lengths)) % 5 != 2
    return whole_batch(batch.tensors() | {"trained": trained, "token_rewards": 0.5 * trained * (noise > 1)})


def _write_metrics(folder: Path) -> None:
    """Three steps with curves of the critic, the wrong responses' not everywhere; one alarm."""
    records = [
        {"kind": kind, "step": step, "time": 0.0}
        | {f"critic/explained_variance_tenth_{k}": k / 10 - 0.3 for k in range(1, 11)}
        | {f"critic/value_right_tenth_{k}": k / 10 for k in range(1, 11)}
        | ({f"critic/value_wrong_tenth_{k}": -k / 10 for k in range(1, 11)} if step == 2 else {})
        for kind, step in (("pretrain", 1), ("train", 1), ("train", 2))
    ]
    records[2] |= {"alarms/flat_values": 1.0, "alarms/truncation": 0.0}
    records.append({"kind": "evaluate", "step": 2, "time": 0.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
