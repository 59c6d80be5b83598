"""The effect of FP8 on VAPO: recipes/tiny.yaml, shortened, with emulated FP8 training and FP8 rollout beside float32.

    python -m benchmarks.fp8 --folder DIR [--bases DIR ...] [--steps 14] [--write docs/benchmarks_fp8.md]

Each of `--bases` holds base/, train.jsonl and heldout.jsonl as tools/make_tiny_base.py makes them, one for each seed.
Runs that DIR holds already are not repeated. Gradients are those of one minibatch that the float32 run sampled, at the
base model's weights and at those that the run ended with.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.records import records
from megatron_vapo.config import ActorConfig, AlgorithmConfig, OptimizerConfig, PrecisionConfig
from megatron_vapo.runtime import cpu_backend
from megatron_vapo.weights.fp8 import from_blocks, goes_in_blocks, to_blocks

cpu_backend.install()  # before the first import of Megatron

from megatron_vapo.models.roles import Actor
from megatron_vapo.models.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""Each with the format that Transformer Engine has for its default."""


def _training(recipe: str) -> list[str]:
    settings = {"linear": "fp8", "emulate": "true", "recipe": recipe, "format": RECIPES[recipe]}
    return [f"{role}.precision.{key}={value}" for role in ("actor", "critic") for key, value in settings.items()]


VARIANTS = {
    "float32": ["rollout.save=true"],
    **{f"FP8 training, {recipe}": _training(recipe) for recipe in RECIPES},
    "FP8 rollout": ["rollout.quantization=fp8"],
}


def run(variant: str, seed: int, base: Path, folder: Path, steps: int) -> list[dict]:
    """The metrics of a run, which is trained unless it is there."""
    run_dir = folder / f"{variant} {seed}"
    if not (run_dir / "export").exists():
        data = [f"model.path={base}/base", f"data.train={base}/train.jsonl", f"evaluation.data={base}/heldout.jsonl"]
        evaluation = ["evaluation.every=0", "evaluation.problems=256", "evaluation.samples=2"]
        shorter = [f"steps={steps}", f"seed={seed}", "checkpoint.every=0", *evaluation]
        command = [sys.executable, "-m", "megatron_vapo", "train", str(ROOT / "recipes" / "tiny.yaml")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        settings = [f"run_dir={run_dir}", *data, *shorter, *VARIANTS[variant]]
        subprocess.run([*command, *settings], check=True, env=environment, stdout=subprocess.DEVNULL)
    return records(run_dir)


def make_trainer(recipe: str | None, weights: Path) -> Trainer:
    """With a learning rate of 0."""
    from megatron_vapo.models.layout import ParallelLayout, init_world
    from megatron_vapo.weights.architecture import read_architecture

    init_world()
    role = ActorConfig(optimizer=OptimizerConfig(learning_rate=0.0, weight_decay=0.0, clip_grad=0.0))
    if recipe is not None:
        fp8 = PrecisionConfig(linear="fp8", emulate=True, recipe=recipe, format=RECIPES[recipe])
        role = replace(role, precision=fp8)
    trainer = Trainer(Actor(role, read_architecture(weights), torch.float32, ParallelLayout(role, 0)))
    trainer.load_hf(weights)
    return trainer


def update(trainer: Trainer, rollouts: Path, signed: bool = True) -> None:
    """An update that changes no weight, on the rollouts' first 64 responses.

    Args:
        signed: the policy loss, with advantages of both signs; else minus the mean log-prob.
    """
    from megatron_vapo.data.experience import Experience
    from megatron_vapo.training.objectives import policy_objective

    batch = Experience.load(rollouts).select(torch.arange(64))
    centred = batch.outcomes - batch.outcomes.mean()
    advantages = batch.per_token(centred if signed else torch.ones_like(centred))
    for _ in range(4 if trainer.model.role.precision.recipe == "delayed" else 1):  # its scales come from updates before
        logprobs, entropy = trainer.model.forward(batch)
        batch = replace(batch, logprobs=logprobs, entropy=entropy, advantages=advantages)
        trainer.update(batch, policy_objective(batch, AlgorithmConfig(positive_lm_coefficient=0.0)))


def gradients(recipe: str | None, weights: Path, rollouts: Path, signed: bool) -> dict[str, Tensor]:
    """The gradient of each parameter."""
    trainer = make_trainer(recipe, weights)
    update(trainer, rollouts, signed)
    return {name: p.main_grad.double().clone() for name, p in trainer.model.modules[0].named_parameters()}


def logprob_differences(weights: Path, rollouts: Path) -> dict[str, tuple[float, float]]:
    """Mean and largest |FP8 - float32| of the log-probs of all sampled tokens, in nats."""
    from megatron_vapo.data.experience import Experience

    batch = Experience.load(rollouts)
    (exact, _) = make_trainer(None, weights).model.forward(batch)
    found = {}
    for recipe in RECIPES:
        trainer = make_trainer(recipe, weights)
        update(trainer, rollouts)
        found[f"FP8 training, {recipe}"] = trainer.model.forward(batch)[0]
    with tempfile.TemporaryDirectory() as folder:
        found["FP8 rollout"] = make_trainer(None, _rounded(weights, Path(folder) / "rounded")).model.forward(batch)[0]
    differences = {name: (logprobs - exact).abs() for name, logprobs in found.items()}
    return {name: (float(d.mean()), float(d.max())) for name, d in differences.items()}


def _rounded(weights: Path, folder: Path) -> Path:
    """The model whose weights the embedded engine holds under FP8 rollout."""
    shutil.copytree(weights, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in filter(goes_in_blocks, tensors):
        tensors[name] = from_blocks(*to_blocks(tensors[name]), dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gradient_errors(weights: Path, rollouts: Path, signed: bool) -> dict[str, dict[str, float]]:
    """|quantised - exact| / |exact| over all parameters of a kind, for each recipe."""
    exact = gradients(None, weights, rollouts, signed)
    errors = {}
    for recipe in RECIPES:
        squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, gradient in gradients(recipe, weights, rollouts, signed).items():
            for kind in (_kind(name), "all"):
                squares[kind][0] += float((gradient - exact[name]).square().sum())
                squares[kind][1] += float(exact[name].square().sum())
        errors[recipe] = {kind: (error / size) ** 0.5 for kind, (error, size) in squares.items()}
    return errors


def _kind(name: str) -> str:
    return name.split(".")[-2] if "linear_" in name else "norms" if "layernorm" in name else name.split(".")[0]


def curve(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows if row["kind"] == "train"]


def draw(runs: dict[str, list[list[dict]]], path: Path) -> None:
    """Accuracy of sampled responses, and log-prob difference of actor and engine, over steps."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for number, (variant, seeds) in enumerate(runs.items()):
        for seed, rows in enumerate(seeds):
            style = {"color": f"C{number}", "alpha": 0.85, "label": None if seed else variant}
            left.plot(curve(rows, "reward/accuracy"), **style)
            right.semilogy(curve(rows, "rollout/logprob_difference_mean"), **style)
    left.set(xlabel="step", ylabel="accuracy of sampled responses")
    right.set(xlabel="step", ylabel="mean |actor's - engine's log-prob|, nats")
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def run_table(runs: dict[str, list[list[dict]]]) -> str:
    titles = [
        "run",
        "accuracy, last 5 steps",
        "mean reward, same",
        "held-out, after",
        "mean log-prob difference",
        "largest",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for variant, seeds in runs.items():

        def each(numbers: list[float], form: str) -> str:
            return " / ".join(format(number, form) for number in numbers)

        accuracy = [statistics.mean(curve(rows, "reward/accuracy")[-5:]) for rows in seeds]
        reward = [statistics.mean(curve(rows, "reward/mean")[-5:]) for rows in seeds]
        held_out = [[r for r in rows if r["kind"] == "evaluate"][-1]["evaluate/accuracy"] for rows in seeds]
        mean = [statistics.mean(curve(rows, "rollout/logprob_difference_mean")) for rows in seeds]
        largest = [max(curve(rows, "rollout/logprob_difference_max")) for rows in seeds]
        cells = [each(accuracy, ".3f"), each(reward, "+.3f"), each(held_out, ".3f"), each(mean, ".1e")]
        lines.append(f"| {variant} | " + " | ".join([*cells, each(largest, ".2g")]) + " |")
    return "\n".join(lines)


def gradient_table(errors: dict[str, dict[str, dict[str, float]]]) -> str:
    kinds = list(next(iter(next(iter(errors.values())).values())))
    kinds = [*[kind for kind in kinds if kind != "all"], "all"]
    lines = ["| weights, loss | recipe | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 2) + "|"]
    for weights, by_recipe in errors.items():
        for recipe, error in by_recipe.items():
            row = [f"{recipe} ({RECIPES[recipe]})", *[f"{100 * error[kind]:.1f} %" for kind in kinds]]
            lines.append(f"| {weights} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def logprob_table(differences: dict[str, dict[str, tuple[float, float]]]) -> str:
    lines = ["| weights | numbers | mean, nats | largest |", "|---|---|---|---|"]
    for weights, by_variant in differences.items():
        lines += [f"| {weights} | {name} | {mean:.4f} | {most:.2f} |" for name, (mean, most) in by_variant.items()]
    return "\n".join(lines)


def batch_report(weights: dict[str, Path], rollouts: Path) -> str:
    """Return what one batch shows, without training."""
    errors = {
        f"{name}, {loss}": gradient_errors(folder, rollouts, signed)
        for loss, signed in (("policy loss", True), ("mean log-prob", False))
        for name, folder in weights.items()
    }
    differences = {name: logprob_differences(folder, rollouts) for name, folder in weights.items()}
    return f"""Log-probs of all tokens of one rollout batch of the float32 run (its last), FP8 against float32:

{logprob_table(differences)}

Relative error of gradients, |FP8 - float32| / |float32|, over all parameters of a kind, on 64 of these responses. The
gradient of sampled tokens' log-probs is zero in expectation, and advantages of both signs cancel further: what is left
is small, and errors, which do not cancel with it, are large beside it. 64 responses of a model this small are few.

{gradient_table(errors)}
"""


def run_report(runs: dict[str, list[list[dict]]], steps: int, picture: str) -> str:
    return f"""`recipes/tiny.yaml`, {steps} steps. Numbers in a cell are those of seeds 0, 1, ..., each with a base
model of its own. Runs differ from the first step on, because other numbers sample other tokens. The embedded engine
computes in float32, with FP8 rollout on weights rounded in blocks of 128 x 128. FP8 rollout is corrected by truncated
importance sampling (`algorithm.importance.mode=auto`).

{run_table(runs)}

![curves]({picture})
"""


def report(parts: list[str], steps: int) -> str:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    body = "\n".join(parts)
    return f"""# What FP8 does to a tiny VAPO run

Hidden size 64; actor and critic both with the named precision, in float32 otherwise; emulated, so nothing here tells of
speed.

{body}
2 CPU cores; torch {torch.__version__}; {datetime.date.today()}; commit {commit.stdout.strip()};
`python -m benchmarks.fp8 --folder DIR --bases BASE... --steps {steps}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--bases", type=Path, nargs="+", default=[ROOT / "artifacts" / "tiny"])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="float32 among them")
    parser.add_argument("--write", type=Path, help="Markdown file to write, with a picture beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[list[dict]]] = {}
    for seed, base in enumerate(options.bases):
        for variant in options.variants:
            runs.setdefault(variant, []).append(run(variant, seed, base, options.folder, options.steps))
    plain = options.folder / "float32 0"
    rollouts = plain / "rollouts" / f"train_{options.steps:06d}" / "experience_00000.safetensors"
    weights = {"base": options.bases[0] / "base", "trained": plain / "export"}
    picture = "fp8_curves.png"
    text = report([run_report(runs, options.steps, picture), batch_report(weights, rollouts)], options.steps)
    print(text)
    if options.write:
        options.write.write_text(text)
        draw(runs, options.write.parent / picture)


if __name__ == "__main__":
    main()
