"""The certificate of a critic that sees, before any RL, beside one that is biased and one that is dead.

    python -m benchmarks.critic [--seeds 3] [--rollouts 24] [--no-counterexamples] [--write docs/critic.md]

For each seed of derivations, and once for each counterexample: a base model, rollouts of that fixed policy, and the
product's own value pretraining on them (`recipes/tiny.yaml`). Derivations have errors that are tokens of their own. The
counterexamples: a reward model, taught by finished responses, taken as critic without value pretraining; and
chained arithmetic, whose errors are wrong digits. Explained variance is that of returns at lambda 1 on responses that
the critic was not trained on yet. What --out holds already is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vapo.runtime.durable import write_text

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"


@dataclass(frozen=True)
class Critic:
    """One of those that are compared."""

    title: str
    task: str
    colour: str
    from_reward_model: bool = False
    """It is a reward model, and value pretraining is left out."""


CRITICS = {
    "good": Critic("derivations", "derivation", "#0072B2"),
    "biased": Critic("derivations, a reward model as it is", "derivation", "#D55E00", from_reward_model=True),
    "dead": Critic("chained arithmetic", "chained_arithmetic", "#009E73"),
}

Certificate = dict[str, Any]
"""What `benchmarks.critic_run` writes."""


def certify(name: str, seed: int, out: Path, rollouts: int, overrides: Sequence[str]) -> Certificate:
    """Return a critic's certificate, measured unless it is there."""
    critic, folder = CRITICS[name], out / f"{name}_{seed}"
    result, task = folder / "certificate.json", out / f"{CRITICS[name].task}_{seed}"
    if not result.is_file():
        run_tool("make_tiny_base.py", "--task", critic.task, "--seed", seed, "--out", task)
        settings = {
            "seed": seed,
            "run_dir": folder / "run",
            "model.path": task / "base",
            "data.train": task / "train.jsonl",
            "evaluation.data": task / "heldout.jsonl",
            "reward.name": critic.task,
            "value_pretraining.max_steps": rollouts,
            "value_pretraining.target_explained_variance": 1,
            "checkpoint.every": 0,
        }
        if critic.from_reward_model:
            reward_model = folder / "reward_model"
            run_tool("make_tiny_reward_model.py", task / "base", reward_model, "--data", task / "train.jsonl")
            settings |= {"critic.init": "reward_model", "critic.reward_model": reward_model}
            settings |= {"value_pretraining.enabled": "false"}
        recipe = ROOT / "recipes" / "tiny.yaml"
        measure = [sys.executable, "-m", "benchmarks.critic_run", str(result), critic.task, str(recipe)]
        subprocess.run([*measure, *(f"{k}={v}" for k, v in settings.items()), *overrides], check=True, cwd=ROOT)
    return json.loads(result.read_text())


def run_tool(name: str, *arguments: object) -> None:
    """Run a tool of the repository."""
    subprocess.run([sys.executable, str(ROOT / "tools" / name), *map(str, arguments)], check=True)


def spread(numbers: Sequence[float]) -> str:
    """Return the mean over seeds, and their range."""
    low, high = min(numbers), max(numbers)
    return f"{statistics.mean(numbers):.2f} [{low:.2f}, {high:.2f}]"


def explained_table(found: dict[str, list[Certificate]]) -> str:
    """Return explained variance by part of the response, and its ceiling."""
    lines = ["| | all tokens | first fifth | second | third | fourth | last fifth | last token |", "|---" * 8 + "|"]
    for name, certificates in found.items():
        keys = {"explained": CRITICS[name].title} | ({"ceiling": "derivations, ceiling"} if name == "good" else {})
        for key, title in keys.items():
            parts = [[row["all"], *row["fifths"], row["last"]] for row in (of[key] for of in certificates)]
            lines.append(f"| {title} | " + " | ".join(spread(column) for column in zip(*parts)) + " |")
    return "\n".join(lines)


def learning_table(certificates: list[Certificate]) -> str:
    """Return explained variance against responses seen."""
    names = [f"critic/explained_variance{part}" for part in ("", "_tenth_1", "_tenth_5", "_tenth_10")]
    lines = ["| responses seen | all tokens | first tenth | fifth tenth | last tenth |", "|---" * 5 + "|"]
    rollouts = min(len(certificate["rollouts"]) for certificate in certificates)
    for rollout in [r for r in (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 39) if r < rollouts]:
        cells = [spread([certificate["rollouts"][rollout][name] for certificate in certificates]) for name in names]
        lines.append(f"| {rollout * certificates[0]['responses_a_rollout']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def jump_table(found: dict[str, list[Certificate]]) -> str:
    """Return the mean change of the value at tokens of each kind."""
    lines = ["| | first error | its correction | result of a right line before it |", "|---" * 4 + "|"]
    for name, certificates in found.items():
        columns = [
            [certificate["jumps"][kind] for certificate in certificates if kind in certificate["jumps"]]
            for kind in ("first error", "correction", "right")
        ]
        cells = " | ".join(spread(column) if column else "" for column in columns)
        lines.append(f"| {CRITICS[name].title} | {cells} |")
    return "\n".join(lines)


def continuation_table(found: dict[str, list[Certificate]]) -> str:
    """Return how the critics' chance of success stands to that of continuations."""

    def bias(low: float, high: float) -> Callable[[Certificate], float]:
        return lambda certificate: statistics.mean(
            row["critic"] - row["measured"] for row in certificate["continuations"] if low <= row["position"] < high
        )

    def correlation(certificate: Certificate) -> float:
        rows = certificate["continuations"]
        return statistics.correlation([row["critic"] for row in rows], [row["measured"] for row in rows])

    columns = {"correlation": correlation, "bias, first third": bias(0, 1 / 3), "second": bias(1 / 3, 2 / 3)}
    columns |= {"last": bias(2 / 3, 1)}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * 5 + "|"]
    for name, certificates in found.items():
        if "continuations" in certificates[0]:
            cells = [spread([column(certificate) for certificate in certificates]) for column in columns.values()]
            lines.append(f"| {CRITICS[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[str, list[Certificate]], path: Path) -> None:
    """Draw explained variance against responses seen, calibration, values beside continuations; and below, for each
    critic, the mean value by position of right and of wrong responses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    (learning, calibrated, continued), by_position = figure.subplots(2, 3)
    for name, certificates in found.items():
        critic = CRITICS[name]
        for certificate in certificates:
            seen = [certificate["responses_a_rollout"] * number for number in range(len(certificate["rollouts"]))]
            for metric, style in (("critic/explained_variance", "-"), ("critic/explained_variance_tenth_10", "--")):
                values = [max(record[metric], -0.5) for record in certificate["rollouts"]]
                learning.plot(seen, values, style, color=critic.colour, linewidth=1)
            bins = certificate["calibration"]
            calibrated.plot([b["predicted"] for b in bins], [b["measured"] for b in bins], "o-", color=critic.colour)
            rows = certificate.get("continuations", [])
            continued.scatter([r["critic"] for r in rows], [r["measured"] for r in rows], s=8, color=critic.colour)
        calibrated.plot([], [], color=critic.colour, label=critic.title)
    for axis in (calibrated, continued):
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        axis.set_xlabel("success that the critic expects")
    learning.set_title("Explained variance (dashed: last tenth)")
    learning.set_xlabel("responses seen")
    calibrated.set_title("Calibration, ten bins")
    calibrated.set_ylabel("measured success")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(found))
    continued.set_title("200 prefixes a seed, 32 continuations each")
    for axis, (name, certificates) in zip(by_position, found.items()):
        for certificate in certificates:
            for outcome, style in (("right", "-"), ("wrong", "--")):
                tenths = certificate["value_by_tenth"][outcome]
                axis.plot(range(1, len(tenths) + 1), tenths, style, color=CRITICS[name].colour)
        axis.set_title(f"{CRITICS[name].title} ({name})")
        axis.set_xlabel("tenth of the response")
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, -1), max(high, 0.4))  # a dead critic's noise is not to look like a difference
    by_position[0].set_ylabel("mean value (dashed: of wrong responses)")
    for axis in by_position[len(found) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110)


def report(found: dict[str, list[Certificate]], picture: str) -> str:
    """Return the section of results."""
    bases = "; ".join(
        f"{CRITICS[name].title}: base accuracy {spread([c['accuracy'] for c in of])}, "
        f"{statistics.mean(c['tokens'] for c in of):.0f} tokens a response, {len(of)} seed(s), "
        f"{of[0]['responses_a_rollout'] * len(of[0]['rollouts']):,} responses seen"
        for name, of in found.items()
    )
    return f"""{datetime.date.today()}, CPU. Mean over seeds, in brackets their range. {bases}.

Explained variance on 1,536 fresh responses:

{explained_table(found)}

Explained variance of derivations while the critic learns, on each rollout before it is trained on:

{learning_table(found["good"])}

Mean change of the value (between -1 and 1) that a token makes:

{jump_table(found)}

The critic's chance of success beside that of 32 continuations by the same policy, 200 random prefixes a seed:

{continuation_table(found)}

![Learning, calibration, continuations; and values by position, right and wrong, of three critics]({picture})

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=24, help="of 256 responses, that value pretraining sees")
    parser.add_argument("--no-counterexamples", action="store_true", help="the critic that sees alone")
    parser.add_argument("--out", type=Path, default=Path("artifacts/critic"))
    parser.add_argument("--write", type=Path, help="document whose results are replaced, and its picture made anew")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    out = args.out.resolve()
    seeds = {"good": args.seeds} | ({} if args.no_counterexamples else {"biased": 1, "dead": 1})
    found = {
        name: [certify(name, seed, out, args.rollouts, args.overrides) for seed in range(count)]
        for name, count in seeds.items()
    }
    text = report(found, "critic.png")
    print(text)
    if args.write:
        draw(found, args.write.with_suffix(".png"))
        before, _, rest = args.write.read_text().partition(BEGIN)
        write_text(args.write, before + BEGIN + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
