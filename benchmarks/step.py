"""CPU time of a VAPO step, phase by phase, beside a plain PyTorch + transformers loop that does the same work.

    python -m benchmarks.step [--repeats 5] [--write docs/benchmarks.md]

Both sides (this package; `benchmarks.plain_loop`) start from one checkpoint, the tiny base model if it was made, else
random weights of its shape, and take the same batches in the same minibatches on one thread, turn about. Their values,
log-probs, entropies and the loss of every minibatch must agree, or nothing is printed. Rollouts draw their own tokens
on each side, so ratios are of CPU seconds per token.
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
from megatron_vapo.config import DataConfig, Recipe
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.prompts import read_prompts
from megatron_vapo.data.tokens import tokenize_prompts
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.rollout import Request, in_order
from megatron_vapo.rollout.transformers_engine import TransformersEngine
from megatron_vapo.runtime import cpu_backend
from megatron_vapo.training import objectives
from megatron_vapo.weights.architecture import read_architecture

cpu_backend.install()  # before the first import of Megatron

from megatron_vapo.models.layout import ParallelLayout, init_world
from megatron_vapo.models.parameters import hf_tensors
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.models.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "artifacts" / "tiny"
VOCAB, END, PAD = 40, 2, 0
"""Of the tiny model."""
RESPONSES, SAMPLES_PER_PROMPT = 256, 16
BATCHES = {"4 to 200 tokens": (4, 200), "all of 100 tokens": (100, 100)}
"""Shortest and longest response: log-uniform between them, as real ones; equal, where padding costs nothing."""
SYNCS = 20
"""Weight syncs that are timed together, because one takes a millisecond."""
TOLERANCE = 1e-4
"""Largest difference of values, log-probs, entropies and losses between the two sides, in the step that warms up. Later
steps start from weights that rounding has driven apart."""
TARGET = 1.3
OPERATORS = 6
"""Operators that the profile names in each phase."""


class Ours:
    """This package's side, by the same calls as `megatron_vapo.training.run.Run`."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        init_world()
        self.recipe = recipe
        architecture = read_architecture(folder)
        layout = ParallelLayout(recipe.actor, recipe.seed)
        critic = Critic(recipe.critic, architecture.as_critic(), torch.float32, layout)
        critic.set_head(random=False, seed=recipe.seed)
        self.actor, self.critic = Trainer(Actor(recipe.actor, architecture, torch.float32, layout)), Trainer(critic)
        for trainer in (self.actor, self.critic):
            trainer.load_hf(folder)
        batch_size = recipe.rollout.transformers.batch_size
        self.engine = TransformersEngine(folder, [END], PAD, batch_size, torch.float32, torch.device("cpu"))
        self.sync_weights()

    def rollout(self, prompts: list[tuple[int, ...]], repeat: int) -> list[Tensor]:
        requests = [Request(prompt, seed=repeat * len(prompts) + i) for i, prompt in enumerate(prompts)]
        settings = self.recipe.rollout
        return [
            r.token_ids
            for r in in_order(self.engine.generate(requests, settings.sampling, settings.max_response_tokens))
        ]

    def update_critic(self, batch: Experience, order: list[Tensor]) -> list[float]:
        algorithm = self.recipe.algorithm
        parts = (batch.select(rows) for rows in order)
        return [self.critic.update(part, objectives.value_objective(part, algorithm))["loss"] for part in parts]

    def update_actor(self, batch: Experience, order: list[Tensor]) -> list[float]:
        algorithm = self.recipe.algorithm
        parts = (batch.select(rows) for rows in order)
        return [self.actor.update(part, objectives.policy_objective(part, algorithm))["loss"] for part in parts]

    def sync_weights(self) -> None:
        self.engine.load_weights(hf_tensors(self.actor.model), version=0)


@dataclass
class Phase:
    """(CPU seconds, tokens) of every repeat, ours and the plain loop's."""

    ours: list[tuple[float, int]] = field(default_factory=list)
    plain: list[tuple[float, int]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over repeats of our CPU seconds per token over the plain loop's."""
        return statistics.median((a / m) / (b / n) for (a, m), (b, n) in zip(self.ours, self.plain))


class Stopwatch:
    """CPU time of both sides by phase; keeps nothing until `warm`."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.warm = False

    def turn_about(self, name: str, ours: Callable, plain: Callable, tokens: int | None = None, calls: int = 1) -> list:
        """Time ours, then plain, on so many tokens (None: those of the responses they return). Both results."""
        phase = self.phases.setdefault(name, Phase())
        results = []
        for call, record in ((ours, phase.ours), (plain, phase.plain)):
            gc.collect()
            start = time.process_time()
            for _ in range(calls):
                result = call()
            seconds = (time.process_time() - start) / calls
            if self.warm:
                record.append((seconds, tokens or sum(map(len, result))))
            results.append(result)
        return results


def train(ours: Ours, plain: PlainLoop, batch: Experience, name: str, repeat: int, watch: Stopwatch) -> float:
    """Forwards and updates on one batch; the largest difference between the two sides' numbers."""
    padded, tokens = pad(batch), int(batch.cu_seqlens[-1])
    order = torch.randperm(RESPONSES, generator=torch.Generator().manual_seed(repeat)).split(plain.minibatch_size)

    def time_both(phase: str, our_call: Callable, plain_call: Callable) -> list:
        return watch.turn_about(f"{phase}, {name}", our_call, plain_call, tokens)

    (values,), plain_values = time_both(
        "value forward", lambda: ours.critic.model.forward(batch), lambda: plain.values(padded)
    )
    (logprobs, entropy), (padded, plain_entropy) = time_both(
        "log-prob forward", lambda: ours.actor.model.forward(batch), lambda: plain.logprobs(padded)
    )
    batch = replace(batch, values=values, logprobs=logprobs, entropy=entropy)
    value_losses, plain_value_losses = time_both(
        "critic update", lambda: ours.update_critic(batch, order), lambda: plain.update_critic(padded, order)
    )
    losses, plain_losses = time_both(
        "actor update", lambda: ours.update_actor(batch, order), lambda: plain.update_actor(padded, order)
    )
    pairs = [
        (values, plain_values),
        (logprobs, padded.logprobs[padded.predicts]),
        (entropy, plain_entropy),
        (torch.tensor(value_losses), torch.tensor(plain_value_losses)),
        (torch.tensor(losses), torch.tensor(plain_losses)),
    ]
    return max(float((a - b).abs().max()) for a, b in pairs)


def profile(ours: Ours, batch: Experience, prompts: list[tuple[int, ...]]) -> dict[str, dict[str, float]]:
    """Share of each phase's time that torch's operators spend in themselves, by operator, largest first; what no
    operator accounts for (Python, Megatron's and transformers' machinery) as `rest`."""
    (values,), (logprobs, entropy) = (trainer.model.forward(batch) for trainer in (ours.critic, ours.actor))
    whole = replace(batch, values=values, logprobs=logprobs, entropy=entropy)
    order = torch.arange(RESPONSES).split(ours.recipe.minibatch_size)
    calls = {
        "rollout": lambda: ours.rollout(prompts, 0),
        "log-prob forward": lambda: ours.actor.model.forward(batch),
        "critic update": lambda: ours.update_critic(whole, order),
    }
    return {name: _shares(call) for name, call in calls.items()}


def _shares(call: Callable) -> dict[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        start = time.process_time()
        call()
        seconds = time.process_time() - start
    totals = {event.key: event.self_cpu_time_total / 1e6 / seconds for event in profiler.key_averages()}
    operators = {name: share for name, share in totals.items() if name.startswith("aten::")}
    largest = sorted(operators.items(), key=lambda item: -item[1])
    return dict(largest[:OPERATORS]) | {
        "other operators": sum(share for _, share in largest[OPERATORS:]),
        "rest": 1 - sum(operators.values()),
    }


def measure(folder: Path, repeats: int) -> tuple[dict[str, Phase], float, dict[str, dict[str, float]]]:
    """Every phase over the repeats, after one that warms up; the largest difference between the two sides; our profile.

    Raises:
        AssertionError: the sides do not compute the same.
    """
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", [f"model.path={folder}"])
    ours, plain = Ours(folder, recipe), PlainLoop(folder, recipe)
    generator = torch.Generator().manual_seed(0)
    batches = {name: make_batch(shortest, longest, generator) for name, (shortest, longest) in BATCHES.items()}
    prompts = rollout_prompts(folder, generator)
    watch, worst = Stopwatch(), 0.0
    for repeat in range(repeats + 1):
        print(f"repeat {repeat} of {repeats}", file=sys.stderr)
        watch.turn_about("rollout", lambda n=repeat: ours.rollout(prompts, n), lambda: plain.rollout(prompts))
        for name, batch in batches.items():
            difference = train(ours, plain, batch, name, repeat, watch)
            worst = max(worst, difference if repeat == 0 else 0.0)
        if worst > TOLERANCE:
            raise AssertionError(f"the two sides differ by {worst:.1e}: they do not do the same work")
        watch.turn_about("weight sync", ours.sync_weights, plain.sync_weights, tokens=1, calls=SYNCS)
        watch.warm = True
    return watch.phases, worst, profile(ours, batches["4 to 200 tokens"], prompts)


def whole_step(phases: dict[str, Phase], name: str) -> Phase:
    """Add up the phases of a step on one batch, CPU seconds per response token times the batch's tokens."""
    parts = [phases["rollout"], *(phase for key, phase in phases.items() if key.endswith(f", {name}"))]
    tokens = parts[-1].ours[0][1]

    def total(sides: list[list[tuple[float, int]]]) -> list[tuple[float, int]]:
        return [(tokens * sum(seconds / count for seconds, count in repeat), tokens) for repeat in zip(*sides)]

    return Phase(total([part.ours for part in parts]), total([part.plain for part in parts]))


def make_batch(shortest: int, longest: int, generator: torch.Generator) -> Experience:
    """Random responses, log-uniform in length, with made-up advantages and value targets."""
    prompts = torch.randint(15, 53, (RESPONSES,), generator=generator)
    lengths = (shortest * (longest / shortest) ** torch.rand(RESPONSES, generator=generator)).round().long()
    total = int(lengths.sum())
    outcomes = torch.where(torch.rand(RESPONSES, generator=generator) < 0.3, 1.0, -1.0)
    return Experience(
        tokens=torch.randint(3, VOCAB, (int(prompts.sum()) + total,), generator=generator),
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
    predicts = ((column >= batch.prompt_lengths[:, None] - 1) & (column < lengths[:, None] - 1))[:, :-1]
    nothing = torch.zeros(predicts.shape)
    return Padded(
        tokens=rows,
        mask=(column < lengths[:, None]).long(),
        predicts=predicts,
        correct=batch.correct[:, None],
        advantages=nothing.masked_scatter(predicts, batch.advantages),
        returns=nothing.masked_scatter(predicts, batch.returns),
        logprobs=nothing,
    )


def rollout_prompts(folder: Path, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Prompts, each repeated for its group: real ones with the real base model, else random tokens."""
    count = RESPONSES // SAMPLES_PER_PROMPT
    if folder == TINY / "base":
        from transformers import AutoTokenizer

        problems = read_prompts(TINY / "train.jsonl", limit=count)
        tokenized = tokenize_prompts(problems, AutoTokenizer.from_pretrained(folder), DataConfig())
        prompts = [prompt.token_ids for prompt in tokenized]
    else:
        lengths = torch.randint(15, 53, (count,), generator=generator).tolist()
        prompts = [tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist()) for n in lengths]
    return [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]


def random_checkpoint(folder: Path) -> None:
    """A Qwen2 of the tiny model's shape with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def table(phases: dict[str, Phase]) -> str:
    """Markdown: medians over the repeats."""
    lines = [
        "| phase | ours, CPU s | plain, CPU s | ours, tokens / CPU s | plain, tokens / CPU s | ours / plain |",
        "|---|---|---|---|---|---|",
    ]
    whole = {f"**whole step**, {name}": whole_step(phases, name) for name in BATCHES}
    for name, phase in (phases | whole).items():
        sides = (phase.ours, phase.plain)
        cells = [name, *(f"{statistics.median(s for s, _ in side):.4f}" for side in sides)]
        cells += [
            "" if name == "weight sync" else f"{statistics.median(n / s for s, n in side):,.0f}" for side in sides
        ]
        ratio = f"{phase.ratio:.2f}" if phase.ratio <= TARGET else f"**{phase.ratio:.2f}**"
        lines.append("| " + " | ".join([*cells, ratio]) + " |")
    return "\n".join(lines)


def profile_table(shares: dict[str, dict[str, float]]) -> str:
    """Markdown: the largest operators of each phase."""
    lines = ["| phase | share of its time, by operator of torch |", "|---|---|"]
    for phase, operators in shares.items():
        cells = (f"{name.removeprefix('aten::').strip('_')} {share:.0%}" for name, share in operators.items())
        lines.append(f"| {phase} | {', '.join(cells)} |")
    return "\n".join(lines)


def document(rows: str, difference: float, folder: Path, repeats: int, shares: str) -> str:
    """The table with what it compares, where and when."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    cpu = next(line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name"))
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    model = "the tiny base model" if folder == TINY / "base" else "random weights of the tiny model's shape"
    return f"""# CPU time of a training step

Each phase of a VAPO step by this package and by `benchmarks/plain_loop.py`, the same work in plain PyTorch and
transformers: minibatches padded to their longest, attention mask, scaled_dot_product_attention, fused AdamW, rollouts
by `generate`, weights copied by `load_state_dict`. {RESPONSES} responses in minibatches of 32, float32, one thread,
{model}. CPU time of the process, median of {repeats} repeats, turn about; tokens are
those of responses. The aim is at most {TARGET} times the plain loop's time; what misses it is bold.

{rows}

Values, log-probs, entropies and the losses of all minibatches of the two sides differ by at most {difference:.1e}
(required: {TOLERANCE:.0e}). Rollouts draw their own tokens on each side: their ratio is of CPU seconds per token. Where
responses differ in length the package wins by packing: nothing is padded. Where all are equal nothing can be won, and
the ratio shows what Megatron's machinery costs. Rollouts win because a group's prompt is read once and finished
responses leave the batch. Weight sync here also finds every tensor's owner, layout and name, a cost per tensor and not
per byte; it is about a thousandth of the step. The whole step is its phases per response token, added up.

## Where our time goes

{shares}

Training is products of matrices, attention, and elementwise work on activations. What no operator accounts for is
Python, Megatron's machinery and the profiler itself; nothing of this package's own stands out. In rollouts
transformers' machinery around operators of microseconds is a good part. Its cache copied all keys and values with every
token, its attention repeated them for every query head, and its mask was made anew;
`megatron_vapo/rollout/decoding.py` does none of these: 0.49 CPU seconds instead of 0.69 for 9,000 tokens, turn about
in one process, with the same bits as result.
Micro-batches of 16,384 tokens spend a quarter of a forward pass on memory pages, because the C library gives
blocks of that size back to the kernel; `recipes/tiny.yaml` takes 8,192, with the same bits as result.

{cpu}, {os.cpu_count()} cores; torch {torch.__version__}; {datetime.date.today()}; commit {commit};
`python -m benchmarks.step --repeats {repeats}`.
"""


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
        phases, difference, shares = measure(folder, options.repeats)
    rows, profiled = table(phases), profile_table(shares)
    print(f"{rows}\n\n{profiled}")
    print(f"largest difference of values, log-probs, entropies and losses: {difference:.1e}")
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(document(rows, difference, folder, options.repeats, profiled), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
