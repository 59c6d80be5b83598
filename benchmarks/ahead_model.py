"""Time of a step of a recipe by lag and split of its GPUs: a discrete-event simulation with the plan's assumptions.

    python -m benchmarks.ahead_model [--recipe recipes/vapo_32b.yaml] [--gpu h100-80] [--nodes 16] [--steps 200]

Every engine decodes its share of a step's responses, whose lengths are drawn from a log-normal distribution cut off at
the limit (`--sigma`, mean as the plan assumes): all at once that fit into its cache, each token in the time that the
plan's roofline gives for so many at a time. Training takes what the plan says for the mean length, in proportion to
its GPUs, plus a weight sync. "In flight" is an upper bound of what overlapping rollouts gain: engines never wait, and
keys and values that are computed anew at a sync cost nothing. Nothing here was measured.
"""

from __future__ import annotations

import argparse
import heapq
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_vapo.config import Recipe
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.runtime import cpu_backend
from megatron_vapo.weights.architecture import read_architecture

cpu_backend.install()  # before the first import of Megatron

from megatron_vapo.plan.hardware import GPUS, Assumptions
from megatron_vapo.plan.memory import Cluster, Model, roles_of
from megatron_vapo.plan.work import batch_of, epochs_of, forward_flops, training_flops

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ROOT / "recipes" / "shapes" / "Qwen2.5-32B"
SPLITS = ((1, 1), (2, 2), (4, 4), (6, 2))
"""GPUs of a node's eight that engines have, and devices of an engine."""


@dataclass(frozen=True)
class Engine:
    """An engine's decoding."""

    weights: float
    """Bytes on each of its devices."""
    per_token: float
    """Bytes of keys and values of a token on each."""
    room: float
    """Bytes for keys and values on each."""
    bandwidth: float
    overhead: float

    def seconds(self, lengths: np.ndarray, prompt: float) -> float:
        """Return how long responses of these lengths take: from end to end of one, all at hand go on at one pace."""
        at_once = max(1, int(self.room / (self.per_token * (prompt + lengths.mean()))))
        waiting = list(lengths[::-1])
        ends: list[float] = []
        now = tokens = 0.0
        while ends or waiting:
            while waiting and len(ends) < at_once:
                heapq.heappush(ends, tokens + waiting.pop())
            end = heapq.heappop(ends)
            alive = len(ends) + 1
            read = self.weights + alive * (prompt + lengths.mean() / 2) * self.per_token
            now += (end - tokens) * (read / self.bandwidth + self.overhead)
            tokens = end
        return now


def engine(recipe: Recipe, actor: Model, cluster: Cluster, devices: int, alone: bool) -> Engine:
    """Return an engine of so many devices, which holds nothing else where it is alone."""
    a, gpu = actor.architecture, cluster.gpu
    weights = forward_flops(a, 0) / 2 * actor.itemsize / devices
    per_token = 2 * a.layers * max(a.kv_heads // devices, 1) * a.head_dim * actor.itemsize
    room = (recipe.rollout.sglang.memory_fraction if alone else 0.75) * gpu.memory - weights
    bandwidth = gpu.bandwidth * cluster.assumptions.decode_efficiency
    return Engine(weights, per_token, room, bandwidth, cluster.assumptions.decode_overhead_seconds)


def training_seconds(recipe: Recipe, models: dict[str, Model], cluster: Cluster) -> float:
    """Return seconds of values, log-probs and updates on all GPUs of the cluster, without bubbles and communication."""
    batch, assumed = batch_of(recipe, cluster), cluster.assumptions
    device = cluster.gpus * cluster.gpu.flops
    total = 0.0
    for name, model in models.items():
        total += batch.tokens * forward_flops(model.architecture, batch.sequence) / assumed.forward_efficiency
        passes = epochs_of(recipe, name)
        total += passes * batch.tokens * training_flops(model, batch.sequence) / assumed.training_efficiency
    return total / device


def lengths_of(recipe: Recipe, mean: float, sigma: float, dice: np.random.Generator) -> np.ndarray:
    """Draw a step's response lengths."""
    longest = recipe.rollout.max_response_tokens
    low, high = 1.0, 100.0 * mean
    drawn = dice.lognormal(0, sigma, recipe.responses_per_step)
    for _ in range(60):  # the scale whose mean, cut off at the limit, is the plan's
        scale = (low * high) ** 0.5
        low, high = (scale, high) if np.minimum(scale * drawn, longest).mean() < mean else (low, scale)
    return np.minimum(scale * drawn, longest)


def rollouts(
    recipe: Recipe, one: Engine, engines: int, cluster: Cluster, sigma: float, steps: int
) -> tuple[np.ndarray, float]:
    """Return seconds of each step's rollout, those of its slowest engine; and of one where the next steps' are written
    beside its last responses (rollout.in_flight_weight_updates), however many steps they take."""
    batch, dice = batch_of(recipe, cluster), np.random.default_rng(0)
    lengths = [lengths_of(recipe, batch.response_tokens, sigma, dice) for _ in range(steps)]
    shares = [np.array_split(of_step, engines) for of_step in lengths]
    each = np.array([max(one.seconds(share, batch.prompt_tokens) for share in of_step) for of_step in shares])
    together = max(one.seconds(np.concatenate(of_engine), batch.prompt_tokens) for of_engine in zip(*shares))
    return each, together / steps


def rows(recipe: Recipe, cluster: Cluster, sigma: float, steps: int, sync: float) -> list[str]:
    """Return the table's rows: seconds a step, and what each side waits."""
    architecture = read_architecture(recipe.model.path)
    models = roles_of(recipe, architecture, architecture.as_critic() if recipe.uses_critic else None)
    training = training_seconds(recipe, models, cluster)
    size = recipe.rollout.sglang.tensor_parallel
    together = engine(recipe, models["actor"], cluster, size, alone=False)
    rollout = rollouts(recipe, together, cluster.gpus // size, cluster, sigma, steps)[0].mean()
    base = rollout + training + sync
    found = [f"| colocated, TP{size} | 0 | {rollout:.0f} | {training:.0f} | {base:.0f} | 1.00 | - | - |"]
    for gpus, size in SPLITS:
        apart = engine(recipe, models["actor"], cluster, size, alone=True)
        if apart.room < 0.05 * cluster.gpu.memory:
            continue
        engines = cluster.nodes * gpus // size
        each, overlapping = rollouts(recipe, apart, engines, cluster, sigma, steps)
        trained = training * 8 / (8 - gpus)
        cases = {
            "0": (each, each + trained),
            "1": (each, np.maximum(each, trained)),
            "in flight": (np.array(overlapping), np.maximum(overlapping, trained)),
        }
        for lag, (written, step) in cases.items():
            total = step.mean() + sync
            trainer, server = 1 - trained / total, 1 - written.mean() / total
            name = f"{gpus} of 8 GPUs to engines, TP{size}"
            times = f"{written.mean():.0f} | {trained:.0f} | {total:.0f} | {base / total:.2f}"
            found.append(f"| {name} | {lag} | {times} | {trainer:.0%} | {server:.0%} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "vapo_32b.yaml")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100-80")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument(
        "--share", type=float, default=Assumptions().mean_response_share, help="mean length, of the limit"
    )
    parser.add_argument("--sync", type=float, default=10.0, help="seconds of a weight sync, stated")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, [f"model.path={SHAPE}"])
    assumed = replace(Assumptions(), mean_response_share=options.share)
    cluster = Cluster(GPUS[options.gpu], options.nodes, assumed)
    for sigma in options.sigma:
        print(f"\nsigma {sigma:g}\n")
        print("| engines | lag | rollout, s | training, s | step, s | speed-up | trainer idle | engines idle |")
        print("|---" * 8 + "|")
        print("\n".join(rows(recipe, cluster, sigma, options.steps, options.sync)), flush=True)


if __name__ == "__main__":
    main()
