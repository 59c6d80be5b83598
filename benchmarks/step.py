"""CPU time of a VAPO step, phase by phase, beside a plain PyTorch + transformers loop that does the same work.

    python -m benchmarks.step [--repeats 5] [--write docs/benchmarks.md]

Both sides (this package; `benchmarks.plain_loop`) start from one checkpoint, the tiny base model if it was made, else
random weights of its shape, and take the same batch in the same minibatches on one thread, turn about. Their values,
log-probs and the loss of every minibatch must agree, or nothing is printed. Rollouts draw their own tokens on each
side, so they are compared by CPU seconds per token.

Legend: B responses, T their tokens.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.plain_loop import Padded, PlainLoop
from megatron_vapo import objectives
from megatron_vapo.config import Recipe
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.prompts import read_prompts, tokenize_prompts
from megatron_vapo.models.layout import ParallelLayout, init_world
from megatron_vapo.models.parameters import hf_tensors, load_hf
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.recipe import load_recipe
from megatron_vapo.rollout import Request
from megatron_vapo.rollout.transformers_engine import TransformersEngine
from megatron_vapo.weights.architecture import read_architecture

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "artifacts" / "tiny"
RESPONSES, SHORTEST, LONGEST = 256, 4, 200
SAMPLES_PER_PROMPT = 16
SYNCS = 20
"""Weight syncs that are timed together, because one takes a millisecond."""
TOLERANCE = 1e-4
"""Largest difference of values, log-probs, entropies and losses between the two sides."""
TARGET = 1.3


@dataclass
class Phase:
    """CPU seconds and tokens of every repeat, ours and the plain loop's."""

    name: str
    ours: list[tuple[float, int]] = field(default_factory=list)
    plain: list[tuple[float, int]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over repeats of our CPU seconds per token over the plain loop's."""
        return statistics.median((a / m) / (b / n) for (a, m), (b, n) in zip(self.ours, self.plain))


class Ours:
    """This package's side, by the same calls as `megatron_vapo.run.Run`."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        init_world()
        self.recipe = recipe
        architecture = read_architecture(folder)
        layout = ParallelLayout(recipe.actor, recipe.seed)
        self.actor = Actor(recipe.actor, architecture, torch.float32, layout)
        classifier = replace(architecture, classifier=True, tied_embeddings=False)
        self.critic = Critic(recipe.critic, classifier, torch.float32, layout)
        self.critic.set_head(random=False, seed=recipe.seed)
        for model in (self.actor, self.critic):
            load_hf(model, folder)
        self.engine = TransformersEngine(folder, [2], 0, recipe.rollout.batch_size, torch.float32, torch.device("cpu"))

    def rollout(self, prompts: list[tuple[int, ...]], repeat: int) -> list[Tensor]:
        requests = [Request(prompt, seed=repeat * len(prompts) + i) for i, prompt in enumerate(prompts)]
        settings = self.recipe.rollout
        return [r.token_ids for r in self.engine.generate(requests, settings.sampling, settings.max_response_tokens)]

    def update_critic(self, batch: Experience, order: list[Tensor]) -> list[float]:
        algorithm = self.recipe.algorithm
        parts = (batch.select(rows) for rows in order)
        return [self.critic.update(part, objectives.value_objective(part, algorithm))["loss"] for part in parts]

    def update_actor(self, batch: Experience, order: list[Tensor]) -> list[float]:
        algorithm = self.recipe.algorithm
        parts = (batch.select(rows) for rows in order)
        return [self.actor.update(part, objectives.policy_objective(part, algorithm))["loss"] for part in parts]

    def sync_weights(self) -> None:
        self.engine.load_weights(hf_tensors(self.actor), version=0)


def make_batch(vocab: int, generator: torch.Generator) -> Experience:
    """B random responses, log-uniform in length, with made-up advantages and value targets."""
    prompts = torch.randint(15, 53, (RESPONSES,), generator=generator)
    u_B = torch.rand(RESPONSES, generator=generator)
    lengths = (SHORTEST * (LONGEST / SHORTEST) ** u_B).round().long()
    total = int(lengths.sum())
    outcomes = torch.where(torch.rand(RESPONSES, generator=generator) < 0.3, 1.0, -1.0)
    return Experience(
        tokens=torch.randint(3, vocab, (int(prompts.sum()) + total,), generator=generator),
        prompt_lengths=prompts,
        response_lengths=lengths,
        groups=torch.arange(RESPONSES) // SAMPLES_PER_PROMPT,
        truncated=torch.zeros(RESPONSES, dtype=torch.bool),
        rollout_logprobs=torch.zeros(total),
        outcomes=outcomes,
        rewards=outcomes,
        advantages=torch.randn(total, generator=generator),
        returns=outcomes.repeat_interleave(lengths),
    )


def pad(batch: Experience) -> Padded:
    """The same batch as rectangles."""
    lengths = batch.sequence_lengths
    rows = torch.nn.utils.rnn.pad_sequence(batch.tokens.split(lengths.tolist()), batch_first=True)
    column = torch.arange(rows.shape[1])
    predicts = (column >= batch.prompt_lengths[:, None] - 1) & (column < lengths[:, None] - 1)

    def spread(per_token: Tensor) -> Tensor:
        return torch.zeros(rows.shape).masked_scatter(predicts, per_token)[:, :-1]

    return Padded(
        tokens=rows,
        mask=(column < lengths[:, None]).long(),
        predicts=predicts[:, :-1],
        correct=batch.correct[:, None],
        advantages=spread(batch.advantages),
        returns=spread(batch.returns),
        logprobs=torch.zeros(predicts[:, :-1].shape),
    )


def random_checkpoint(folder: Path) -> None:
    """A Qwen2 of the tiny model's shape with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def rollout_prompts(folder: Path, generator: torch.Generator) -> list[tuple[int, ...]]:
    """B prompts, each repeated for its group: real ones with the real base model, else random tokens."""
    count = RESPONSES // SAMPLES_PER_PROMPT
    if folder == TINY / "base":
        from transformers import AutoTokenizer

        problems = read_prompts(TINY / "train.jsonl", limit=count)
        tokenized = tokenize_prompts(problems, AutoTokenizer.from_pretrained(folder), max_tokens=64, chat=False)
        prompts = [tuple(p.token_ids) for p in tokenized]
    else:
        lengths = torch.randint(15, 53, (count,), generator=generator).tolist()
        prompts = [tuple(torch.randint(3, 40, (n,), generator=generator).tolist()) for n in lengths]
    return [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]


class Stopwatch:
    """CPU seconds of both sides' calls by phase; keeps nothing while `warm` is False."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.warm = False

    def turn_about(self, name: str, tokens: int | None, ours: Callable, plain: Callable, calls: int = 1) -> list:
        """Time ours, then plain, on `tokens` tokens (None: the tokens of the responses they return). Both results."""
        phase = self.phases.setdefault(name, Phase(name))
        results = []
        for call, record in ((ours, phase.ours), (plain, phase.plain)):
            gc.collect()
            start = time.process_time()
            for _ in range(calls):
                result = call()
            seconds = (time.process_time() - start) / calls
            results.append(result)
            if self.warm:
                record.append((seconds, tokens or sum(map(len, result))))
        return results


def take_step(ours: Ours, plain: PlainLoop, batch: Experience, prompts: list, repeat: int, watch: Stopwatch) -> float:
    """All phases once on both sides; the largest difference between their numbers."""
    padded, total = pad(batch), int(batch.cu_seqlens[-1])
    generator = torch.Generator().manual_seed(repeat)
    order = list(torch.randperm(RESPONSES, generator=generator).split(ours.recipe.minibatch_size))
    step = 1 + repeat * len(order)

    watch.turn_about("rollout", None, lambda: ours.rollout(prompts, repeat), lambda: plain.rollout(prompts))
    (values,), expected = watch.turn_about(
        "value forward", total, lambda: ours.critic.forward(batch), lambda: plain.values(padded)
    )
    differences = [values - expected]
    (logprobs, entropy), (padded, expected) = watch.turn_about(
        "log-prob forward", total, lambda: ours.actor.forward(batch), lambda: plain.logprobs(padded)
    )
    differences += [logprobs - padded.logprobs[padded.predicts], entropy - expected]
    batch = replace(batch, values=values, logprobs=logprobs, entropy=entropy)
    for name, update, plain_update in (
        ("critic update", ours.update_critic, plain.update_critic),
        ("actor update", ours.update_actor, plain.update_actor),
    ):
        losses, expected = watch.turn_about(
            name, total, lambda: update(batch, order), lambda: plain_update(padded, order, step)
        )
        differences.append(torch.tensor(losses) - torch.tensor(expected))
    watch.turn_about("weight sync", total, ours.sync_weights, plain.sync_weights, calls=SYNCS)
    return max(float(d.abs().max()) for d in differences)


def measure(folder: Path, repeats: int) -> tuple[list[Phase], float]:
    """Every phase over the repeats, after one that warms up; the largest difference between the two sides.

    Raises:
        AssertionError: the sides do not compute the same.
    """
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", [f"model.path={folder}"])
    ours, plain = Ours(folder, recipe), PlainLoop(folder, recipe)
    generator = torch.Generator().manual_seed(0)
    batch, prompts = make_batch(40, generator), rollout_prompts(folder, generator)
    ours.sync_weights()
    watch = Stopwatch()
    difference = take_step(ours, plain, batch, prompts, 0, watch)
    if difference > TOLERANCE:
        raise AssertionError(f"the two sides differ by {difference:.1e}: they do not do the same work")
    watch.warm = True
    for repeat in range(1, repeats + 1):
        print(f"repeat {repeat} of {repeats}", end="\r", file=sys.stderr)
        take_step(ours, plain, batch, prompts, repeat, watch)
    return list(watch.phases.values()), difference


def table(phases: list[Phase]) -> str:
    """Markdown: medians over the repeats."""
    lines = [
        "| phase | ours, CPU s | plain, CPU s | ours, tokens / CPU s | plain, tokens / CPU s | ours / plain |",
        "|---|---|---|---|---|---|",
    ]
    for phase in phases:
        seconds = [statistics.median(s for s, _ in side) for side in (phase.ours, phase.plain)]
        rates = [statistics.median(n / s for s, n in side) for side in (phase.ours, phase.plain)]
        cells = [phase.name, *(f"{s:.4f}" for s in seconds), *(f"{r:,.0f}" for r in rates)]
        ratio = f"{phase.ratio:.2f}" if phase.ratio <= TARGET else f"**{phase.ratio:.2f}**"
        lines.append("| " + " | ".join([*cells, ratio]) + " |")
    return "\n".join(lines)


def where_and_when(command: str) -> str:
    """Machine, date, commit, command."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next(line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"{model}, {os.cpu_count()} cores, one thread; torch {torch.__version__}; {datetime.date.today()}; commit "
        f"{commit.stdout.strip()}; `{command}`"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = TINY / "base"
        if not folder.is_dir():
            folder = Path(scratch)
            random_checkpoint(folder)
        phases, worst = measure(folder, options.repeats)
    text = table(phases)
    print(text)
    print(f"largest difference of values, log-probs, entropies and losses: {worst:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
