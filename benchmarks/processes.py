"""recipes/tiny.yaml on 1, 2 and 4 processes, each in another layout: the same curve.

    python -m benchmarks.processes --folder DIR [--steps 10] [--write docs/processes.md] [key=value...]

One process samples and keeps its rollouts; the others train on the same ones (rollout.replay), so nothing but
arithmetic differs. After every step each evaluates with its own layout's weights. Runs that DIR holds already are not
repeated. `key=value` names another base model or data, as for `megatron-vapo train`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.records import records

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {
    1: ["rollout.save=true"],
    2: ["actor.tensor_parallel=2", "actor.sequence_parallel=true", "critic.distributed_optimizer=true"],
    4: [
        "actor.tensor_parallel=2",
        "actor.pipeline_parallel=2",
        "actor.first_stage_layers=2",
        "critic.context_parallel=2",
    ],
}
NUMBERS = ("actor/policy_loss", "actor/lm_loss", "actor/entropy", "actor/grad_norm", "critic/loss", "critic/grad_norm")
SMALLEST = 1e-3
"""Differences of smaller numbers are relative to this."""


def run(world: int, folder: Path, steps: int, overrides: list[str]) -> list[dict]:
    """The metrics of a run, which is trained unless it is there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    replay = [] if world == 1 else [f"rollout.replay={folder / '1' / 'rollouts'}"]
    evaluation = ["evaluation.every=1", "evaluation.problems=128", "evaluation.samples=2", "checkpoint.every=0"]
    settings = [f"run_dir={folder / str(world)}", f"steps={steps}", *evaluation, *replay, *LAYOUTS[world], *overrides]
    train = ["-m", "megatron_vapo", "train", str(ROOT / "recipes" / "tiny.yaml"), *settings]
    subprocess.run([*command, *train], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return records(folder / str(world))


def differences(alone: list[dict], together: list[dict], step: int) -> dict[str, tuple[float, float]]:
    """For each number of one training step, how far it is off, absolutely and relatively."""

    def row(rows: list[dict]) -> dict:
        return next(row for row in rows if row["kind"] == "train" and row["step"] == step)

    one, several = row(alone), row(together)
    absolute = {key: abs(one[key] - several[key]) for key in NUMBERS}
    return {key: (off, off / max(abs(one[key]), SMALLEST)) for key, off in absolute.items()}


def accuracies(rows: list[dict]) -> list[float]:
    return [row["evaluate/accuracy"] for row in rows if row["kind"] == "evaluate"]


def report(metrics: dict[int, list[dict]], steps: int) -> str:
    lines = [
        "| step | updates so far | 2 processes | 4 processes | accuracy after it: 1, 2, 4 processes |",
        "|---" * 5 + "|",
    ]
    held_out = {world: accuracies(rows) for world, rows in metrics.items()}
    furthest = dict.fromkeys(NUMBERS, 0.0)
    for step in range(1, steps + 1):
        relative = []
        for world in (2, 4):
            off = differences(metrics[1], metrics[world], step)
            relative.append(f"{max(relatively for _, relatively in off.values()):.1e}")
            furthest = {key: max(furthest[key], off[key][0]) for key in NUMBERS}
        shown = ", ".join(f"{held_out[world][step]:.4f}" for world in LAYOUTS)
        lines.append(f"| {step} | {8 * (step - 1)} | {' | '.join(relative)} | {shown} |")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return f"""# One run on 1, 2 and 4 processes

`recipes/tiny.yaml`: one process; two (actor TP2 with sequence parallelism, critic with ZeRO-1 over two data-parallel
ranks); four (actor TP2 x PP2 in uneven stages, critic CP2 x DP2). The second and third train on the rollouts that the
first one sampled and saved. Largest relative difference from one process over policy loss, language-model loss,
entropy, value loss and both gradient norms of a step (means over its 8 updates; below {SMALLEST:g}, relative to
{SMALLEST:g}), and held-out accuracy after the step (avg@2 on 128 problems).

{chr(10).join(lines)}

In absolute numbers: {", ".join(f"{key} {off:.0e}" for key, off in furthest.items())} at most.

float32 rounds differently in every layout, and each update starts from the weights that the ones before left: the
difference within one update is that of [layouts.md](layouts.md), and it grows with the updates that lie behind.

2 CPU cores, gloo; {datetime.date.today()}; commit {commit.stdout.strip()};
`python -m benchmarks.processes --folder DIR --steps {steps}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    metrics = {world: run(world, options.folder.absolute(), options.steps, options.overrides) for world in LAYOUTS}
    text = report(metrics, options.steps)
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
