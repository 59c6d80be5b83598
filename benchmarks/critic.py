"""The certificate of a critic that sees, before any RL: value pretraining on two toy tasks, and what came of it.

    python -m benchmarks.critic [--seeds 3] [--rollouts 24] [--no-counterexample] [--write docs/critic.md]

For each seed of derivations, and once for chained arithmetic: a base model, rollouts of that fixed policy, and the
product's own value pretraining on them (`recipes/tiny.yaml`). Derivations have errors that are tokens of their own;
chained arithmetic, the counterexample, has wrong digits. Explained variance is that of returns at lambda 1 on responses
that the critic was not trained on yet. What --out holds already is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_vapo.runtime.durable import write_text

ROOT = Path(__file__).resolve().parents[1]
TASKS = {"derivation": "derivations", "chained_arithmetic": "chained arithmetic"}
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"

Certificate = dict[str, Any]
"""What `benchmarks.critic_run` writes."""


def certify(task: str, seed: int, out: Path, rollouts: int, overrides: Sequence[str]) -> Certificate:
    """Return a critic's certificate, measured unless it is there."""
    folder = out / f"{task}_{seed}"
    result = folder / "certificate.json"
    if not result.is_file():
        base = [sys.executable, str(ROOT / "tools" / "make_tiny_base.py"), "--task", task, "--seed", str(seed)]
        subprocess.run([*base, "--out", str(folder)], check=True)
        settings = {
            "seed": seed,
            "run_dir": folder / "run",
            "model.path": folder / "base",
            "data.train": folder / "train.jsonl",
            "evaluation.data": folder / "heldout.jsonl",
            "reward.name": task,
            "value_pretraining.max_steps": rollouts,
            "value_pretraining.target_explained_variance": 1,
            "checkpoint.every": 0,
        }
        measure = [
            sys.executable,
            "-m",
            "benchmarks.critic_run",
            str(result),
            task,
            str(ROOT / "recipes" / "tiny.yaml"),
        ]
        subprocess.run([*measure, *(f"{k}={v}" for k, v in settings.items()), *overrides], check=True, cwd=ROOT)
    return json.loads(result.read_text())


def spread(numbers: Sequence[float]) -> str:
    """Return the mean over seeds, and their range."""
    low, high = min(numbers), max(numbers)
    return f"{statistics.mean(numbers):.2f} [{low:.2f}, {high:.2f}]"


def explained_table(found: dict[str, list[Certificate]]) -> str:
    """Return explained variance by part of the response, and its ceiling."""
    lines = ["| | all tokens | first fifth | second | third | fourth | last fifth | last token |", "|---" * 8 + "|"]
    for task, certificates in found.items():
        for name, key in ((TASKS[task], "explained"), (f"{TASKS[task]}, ceiling", "ceiling")):
            rows = [certificate[key] for certificate in certificates if key in certificate]
            if rows:
                parts = [[row["all"], *row["fifths"], row["last"]] for row in rows]
                lines.append(f"| {name} | " + " | ".join(spread(column) for column in zip(*parts)) + " |")
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
    for task, certificates in found.items():
        columns = [
            [certificate["jumps"][kind] for certificate in certificates if kind in certificate["jumps"]]
            for kind in ("first error", "correction", "right")
        ]
        lines.append(f"| {TASKS[task]} | " + " | ".join(spread(column) if column else "" for column in columns) + " |")
    return "\n".join(lines)


def continuation_table(certificates: list[Certificate]) -> str:
    """Return how the critic's chance of success stands to that of continuations."""

    def bias(low: float, high: float) -> Callable[[Certificate], float]:
        return lambda certificate: statistics.mean(
            row["critic"] - row["measured"] for row in certificate["continuations"] if low <= row["position"] < high
        )

    def correlation(certificate: Certificate) -> float:
        rows = certificate["continuations"]
        return statistics.correlation([row["critic"] for row in rows], [row["measured"] for row in rows])

    columns = {"correlation": correlation, "bias, first third": bias(0, 1 / 3), "second": bias(1 / 3, 2 / 3)}
    columns |= {"last": bias(2 / 3, 1)}
    cells = [spread([column(certificate) for certificate in certificates]) for column in columns.values()]
    return "\n".join(["| " + " | ".join(columns) + " |", "|---" * 4 + "|", "| " + " | ".join(cells) + " |"])


def draw(found: dict[str, list[Certificate]], path: Path) -> None:
    """Draw explained variance against responses seen, calibration, and values beside continuations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    learning, calibrated, continued = figure.subplots(1, 3)
    for task, colour in zip(found, ("#0072B2", "#D55E00")):
        for certificate in found[task]:
            seen = [certificate["responses_a_rollout"] * number for number in range(len(certificate["rollouts"]))]
            for metric, style in (("critic/explained_variance", "-"), ("critic/explained_variance_tenth_10", "--")):
                values = [max(record[metric], -0.5) for record in certificate["rollouts"]]
                learning.plot(seen, values, style, color=colour, linewidth=1)
            bins = certificate["calibration"]
            calibrated.plot([b["predicted"] for b in bins], [b["measured"] for b in bins], "o-", color=colour)
        learning.plot([], [], color=colour, label=TASKS[task])
    rows = [row for certificate in found["derivation"] for row in certificate["continuations"]]
    continued.scatter([r["critic"] for r in rows], [r["measured"] for r in rows], s=8, alpha=0.5, color="#0072B2")
    for axis in (calibrated, continued):
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        axis.set_xlabel("success that the critic expects")
    learning.set_title("Explained variance (dashed: last tenth)")
    learning.set_xlabel("responses seen")
    learning.legend(frameon=False)
    calibrated.set_title("Calibration, ten bins")
    calibrated.set_ylabel("measured success")
    continued.set_title("200 prefixes a seed, 32 continuations each")
    figure.savefig(path, dpi=110)


def report(found: dict[str, list[Certificate]], picture: str) -> str:
    """Return the section of results."""
    certificates = found["derivation"]
    bases = "; ".join(
        f"{TASKS[task]}: base accuracy {spread([c['accuracy'] for c in of])}, "
        f"{statistics.mean(c['tokens'] for c in of):.0f} tokens a response, {len(of)} seed(s), "
        f"{of[0]['responses_a_rollout'] * len(of[0]['rollouts']):,} responses seen"
        for task, of in found.items()
    )
    return f"""{datetime.date.today()}, CPU. Mean over seeds, in brackets their range. {bases}.

Explained variance on 1,536 fresh responses:

{explained_table(found)}

Explained variance of derivations while the critic learns, on each rollout before it is trained on:

{learning_table(certificates)}

Mean change of the value (between -1 and 1) that a token makes:

{jump_table(found)}

The critic's chance of success beside that of 32 continuations by the same policy, 200 random prefixes a seed:

{continuation_table(certificates)}

![Explained variance against responses seen, calibration, and continuations]({picture})

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=24, help="of 256 responses, that value pretraining sees")
    parser.add_argument("--no-counterexample", action="store_true", help="leave out chained arithmetic's five minutes")
    parser.add_argument("--out", type=Path, default=Path("artifacts/critic"))
    parser.add_argument("--write", type=Path, help="document whose results are replaced, and its picture made anew")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    out = args.out.resolve()
    seeds = {"derivation": args.seeds} | ({} if args.no_counterexample else {"chained_arithmetic": 1})
    found = {
        task: [certify(task, seed, out, args.rollouts, args.overrides) for seed in range(count)]
        for task, count in seeds.items()
    }
    text = report(found, "critic.png")
    print(text)
    if args.write:
        draw(found, args.write.with_suffix(".png"))
        before, _, rest = args.write.read_text().partition(BEGIN)
        write_text(args.write, before + BEGIN + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
