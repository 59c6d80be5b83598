"""The data path of one whole training step of 32B at full size: 8,192 responses, 49 million tokens, four ranks.

    python -m benchmarks.data_rehearsal [--scale 1.0]   # two minutes of two cores, 10 GB of memory, 1.5 GB of disk

The loop, the run and everything that holds or moves a step's data are the product's own, of recipes/vapo_32b.yaml;
the actor is laid out tensor parallel 2 x data parallel 2, the critic data parallel 4. What computes is replaced by
recordings, each a function of a token, so that it can be seen in the end that every number is at its token:

* RecordedEngine, RecordedTokenizer, RecordedScorer: responses of known length, no text, scores.
* RecordedActor, RecordedCritic, RecordedTrainer: outputs; the losses are computed, nothing is trained.

Printed is a table: for each part of the step CPU seconds of a rank, and its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.runtime import cpu_backend

cpu_backend.install()

from megatron_vapo.algorithm.types import Loss, Outputs
from megatron_vapo.config import OffloadConfig, Recipe, RoleConfig, SamplingConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.packing import MicroBatches
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.models.layout import ParallelLayout, init_world
from megatron_vapo.models.offload import Offloader
from megatron_vapo.models.parallel_model import Finish, ParallelModel
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.observe.progress import ProgressDisplay
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.recipe.preflight import Inputs
from megatron_vapo.rewards import RewardInput
from megatron_vapo.rewards.scorer import Begun, Failures, Score
from megatron_vapo.rollout import EngineIndex, Follow, Request, Response, nothing
from megatron_vapo.runtime.signals import Interrupt
from megatron_vapo.runtime.watchdog import Watchdog
from megatron_vapo.sampling.sampler import Sampler
from megatron_vapo.training import build, loop
from megatron_vapo.training.run import Run
from megatron_vapo.weights.architecture import read_architecture

RANKS = 4
LAYOUT = ["actor.tensor_parallel=2", "critic.tensor_parallel=1", "critic.sequence_parallel=false"]
LAYOUT += [f"{role}.pipeline_parallel=1" for role in ("actor", "critic")]
MEDIAN, SIGMA, SHORTEST = 4300, 0.9, 64
"""Of the lengths, a log-normal distribution cut off at the recipe's longest response: 6,000 tokens on average."""
VOCABULARY = 30_000
SHAPE = "recipes/shapes/Qwen2.5-32B"
PARTS = ("rollout", "values", "logprobs", "update_critic", "update_actor", "finish_step")
"""The verbs of the loop that are measured; advantages are computed between them."""


def token_ids(seed: int, count: int) -> Tensor:
    return (torch.arange(count) * 31 + seed % VOCABULARY).remainder_(VOCABULARY)


def outputs_of(tokens: Tensor, role: str) -> Outputs:
    """Values between -1 and 1; log-probs between -2 and 0, and entropies."""
    share = tokens.float() / VOCABULARY
    return (share * 2 - 1,) if role == "critic" else (share * -2, share)


class RecordedEngine:
    failure, asleep, version = None, False, 0

    def __init__(self) -> None:
        self.index = EngineIndex(dist.get_rank(), dist.get_world_size())

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        max_tokens: int,
        on_tokens: Callable[[int], None] = lambda count: None,
        follow: Follow = nothing,
    ) -> Iterator[tuple[int, Response]]:
        for number, request in enumerate(requests):
            drawn = int(Random(request.seed).lognormvariate(0, SIGMA) * MEDIAN)
            length = max(min(drawn, max_tokens), SHORTEST)
            tokens = token_ids(request.seed, length)
            (logprobs, _), reason = outputs_of(tokens, "actor"), "length" if length == max_tokens else "stop"
            yield number, Response(tokens, logprobs, reason, self.version)

    def abort(self) -> None: ...

    def sleep(self) -> None: ...

    def close(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


class RecordedTokenizer:
    def decode(self, written: Tensor, skip_special_tokens: bool) -> str:
        return "Answer: 7"


class RecordedScorer:
    def begin(self, sample: RewardInput) -> Begun:
        return Begun(sample)

    def wait(self, begun: Sequence[Begun], give_up: Callable[[], bool]) -> None: ...

    def finish(self, begun: Sequence[Begun]) -> list[Score]:
        right = [one.sample.response_tokens % 2 * 2.0 - 1 for one in begun]
        return [Score(outcome, 0.0, {"math_dapo": outcome}) for outcome in right]

    def take_failures(self) -> dict[str, Failures]:
        return {}

    def close(self) -> None: ...


class Recorded(ParallelModel):
    """A model whose outputs are those that are recorded for the tokens which it is given."""

    def __init__(self, role: RoleConfig, layout: ParallelLayout, meter: Meter) -> None:
        self.role, self.layout, self.device = role, layout, torch.device("cpu")
        self.architecture = read_architecture(SHAPE)
        self.modules, self.offloader, self._meter = [], Offloader(OffloadConfig()), meter

    def run_schedule(
        self, chunks: Sequence[torch.nn.Module], micros: MicroBatches, finish: Finish, forward_only: bool
    ) -> list[dict[str, Any]]:
        parts = []
        for micro in micros:
            began = process_time()
            outputs = outputs_of(micro.targets, self.name)
            self._meter.recorded += process_time() - began
            parts.append(finish(outputs, micro.token_index)[1])
        return parts


class RecordedActor(Recorded, Actor): ...


class RecordedCritic(Recorded, Critic): ...


class RecordedTrainer(Trainer):
    def __init__(self, model: ParallelModel) -> None:
        self.model = model

    def update(self, minibatch: Experience, loss: Loss) -> dict[str, float]:
        micros = self.model.micro_batches(minibatch)
        totals = self._total(self.model.run_schedule([], micros, loss, forward_only=False))
        return totals | dict.fromkeys(("grad_norm", "learning_rate", "skipped"), 0.0)


class NoCheckpoints:
    pending = False

    def load(self) -> None: ...

    def save(self, snapshot: object) -> None: ...

    def settle(self, wait: bool) -> None: ...


class Meter:
    """CPU seconds of this rank and the most memory that it had, by part; what is recorded costs nothing."""

    def __init__(self) -> None:
        self.recorded = 0.0
        self.seconds: dict[str, float] = {}
        self.mib: dict[str, float] = {}

    def measured(self, name: str, function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
            began, recorded = process_time(), self.recorded
            result = function(*arguments, **options)
            spent = process_time() - began - (self.recorded - recorded)
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.mib[name] = max(self.mib.get(name, 0.0), peak_mib())
            return result

        return call


def peak_mib() -> float:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def rehearse(recipe: Recipe) -> dict[str, Any]:
    """Take the step, look whether every number is at its token, and return what it cost this rank."""
    meter, seen = Meter(), []
    architecture = read_architecture(SHAPE)
    prompts = [
        Prompt("", "7", i, "", token_ids=tuple(token_ids(i, 150 + i % 100).tolist()), dataset="dapo-math-17k")
        for i in range(17_000)
    ]
    inputs = Inputs(architecture, architecture, RecordedTokenizer(), (0,), prompts, [], [])  # type: ignore[arg-type]

    def trainers(recipe: Recipe, inputs: Inputs) -> dict[str, Trainer]:
        classes = {"actor": RecordedActor, "critic": RecordedCritic}
        return {
            name: RecordedTrainer(classes[name](role, ParallelLayout(role, recipe.seed), meter))
            for name, role in recipe.roles.items()
        }

    def sampler(recipe: Recipe, inputs: Inputs, engine: Any, *rest: Callable) -> Sampler:
        scorer: Any = RecordedScorer()
        return Sampler(inputs.tokenizer, engine, scorer, recipe.seed, recipe.rollout, recipe.reward, *rest)

    replaced = {
        "backend_choices": lambda recipe: [],
        "build_trainers": trainers,
        "build_engine": lambda *_: RecordedEngine(),
        "build_weight_sync": lambda *_: lambda version: None,
        "build_sampler": sampler,
        "build_checkpoints": lambda *_: NoCheckpoints(),
    }
    interrupt = Interrupt(recipe.limits)
    display = ProgressDisplay(quiet=True)
    with patch.multiple(build, **replaced), Watchdog(recipe.limits, interrupt, recipe.run_dir) as watchdog:
        run = Run(recipe, inputs, display, interrupt, watchdog)
        for name in PARTS:
            setattr(run, name, meter.measured(name, getattr(run, name)))
        finish = run.finish_step
        run.finish_step = lambda *step: (seen.append(step[3]), finish(*step))[1]  # type: ignore[method-assign]
        advantages = meter.measured("advantages", loop.with_advantages)
        with patch.object(loop, "with_advantages", advantages):
            began = process_time()
            loop.train(run)
            total = process_time() - began - meter.recorded
        run.close()
    check(seen[0])
    return {"seconds": meter.seconds | {"in all": total}, "MiB": meter.mib, "responses": len(seen[0].whole),
            "tokens": seen[0].whole.response_tokens}  # fmt: skip


def check(batch: Experience) -> None:
    """Every number is at its token."""
    sequence = torch.arange(len(batch)).repeat_interleave(batch.sequence_lengths)
    starts = batch.sequence_lengths.cumsum(0) - batch.sequence_lengths
    within = torch.arange(len(batch.tokens)) - starts[sequence]
    of_response = within >= batch.prompt_lengths[sequence]
    tokens = batch.tokens[of_response]
    first = tokens[(batch.response_lengths.cumsum(0) - batch.response_lengths)]
    place = (within - batch.prompt_lengths[sequence])[of_response]
    assert torch.equal(tokens, (batch.per_token(first) + 31 * place).remainder(VOCABULARY))
    (values,), (logprobs, entropy) = outputs_of(tokens, "critic"), outputs_of(tokens, "actor")
    numbers = {"values": values, "logprobs": logprobs, "entropy": entropy, "rollout_logprobs": logprobs}
    for name, expected in (numbers | {"update_logprobs": logprobs}).items():
        assert torch.equal(getattr(batch, name), expected), name


def rank_main(folder: Path, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe("recipes/vapo_32b.yaml", [f"run_dir={folder / 'run'}", *overrides])
    init_world()
    (folder / "run").mkdir(exist_ok=True)
    before = peak_mib()
    found = rehearse(recipe)
    found["before"] = before
    (folder / f"found_{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()


def settings(prompts: int) -> list[str]:
    """Return the settings of a step of so many prompts, 16 responses each, with 16 minibatches."""
    sizes = [f"rollout.prompts_per_step={prompts}", f"minibatch_size={prompts}", "steps=1"]
    without = ["evaluation.data=null", "value_pretraining.enabled=false", "observe.tensorboard=false"]
    return [*LAYOUT, *sizes, *without, "rollout.save=true"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the 512 prompts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        ranks = [*launcher, "-m", "benchmarks.data_rehearsal", "--rank", folder, *settings(round(512 * options.scale))]
        subprocess.run(ranks, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        found = [json.loads(Path(folder, f"found_{rank}.json").read_text()) for rank in range(RANKS)]
    print(table(found))


def table(found: list[dict[str, Any]]) -> str:
    one = found[0]
    lines = [f"{one['responses']:,} responses, {one['tokens']:,} response tokens, {RANKS} ranks", ""]
    lines += ["| part | CPU seconds a rank | the most | memory of a rank at most, MiB |", "|---|---|---|---|"]
    lines += [f"| before the step | | | {max(rank['before'] for rank in found):,.0f} |"]
    for name in one["seconds"]:
        seconds = [rank["seconds"][name] for rank in found]
        mib = [max(rank["MiB"].values()) if name == "in all" else rank["MiB"][name] for rank in found]
        lines.append(f"| {name} | {sum(seconds) / RANKS:.2f} | {max(seconds):.2f} | {max(mib):,.0f} |")
    lines.append(f"\nAll ranks together, each at its most: {sum(max(r['MiB'].values()) for r in found) / 1024:.1f} GiB")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
