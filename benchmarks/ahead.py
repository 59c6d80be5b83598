"""Rollouts ahead of training: what staleness does to learning, and what time it saves.

    python -m benchmarks.ahead --out FOLDER [--seeds 5] [--lags 0 1 2 4] [--tokens 300000] [--table]
    python -m benchmarks.ahead --out FOLDER --sglang .venv-sglang/bin/python [--steps 10]

Learning: each seed has a base model and problems of its own (tools/make_tiny_base.py), which its runs share; those of
VAPO share the critic that lag 0 pretrained. Runs that --out holds are not repeated; a table shows those that are there.

Time: a trainer and a separate SGLang server, which have a core each of two.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from benchmarks.records import Record, records

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"VAPO": "tiny.yaml", "GRPO": "tiny_grpo.yaml"}
LAST = 3
"""Evaluations that the accuracy after training is the mean of."""


class Case(NamedTuple):
    """What a run is trained with, beside its seed."""

    algorithm: str
    lag: int
    corrected: bool

    @property
    def name(self) -> str:
        return f"{self.algorithm.lower()}_lag{self.lag}{'' if self.corrected else '_uncorrected'}"


def cases(lags: list[int]) -> Iterator[Case]:
    """Yield lag 0 once, for which a correction has nothing to correct, and the others with it and without."""
    for corrected in (True, False):
        for lag in lags:
            if lag or corrected:
                yield from (Case(algorithm, lag, corrected) for algorithm in RECIPES)


def train(case: Case, seed: int, tokens: int, out: Path, overrides: list[str]) -> None:
    """Train a run to its end, unless it has come there."""
    base, run_dir = out / f"base_{seed}", out / f"{case.name}_{seed}"
    if (run_dir / "summary.json").is_file():
        return
    if not (base / "base").is_dir():
        tool = str(ROOT / "tools" / "make_tiny_base.py")
        subprocess.run([sys.executable, tool, "--out", str(base), "--seed", str(seed)], check=True)
    settings: dict[str, object] = {
        "seed": seed,
        "run_dir": run_dir,
        "model.path": base / "base",
        "data.train": base / "train.jsonl",
        "evaluation.data": base / "heldout.jsonl",
        "evaluation.every": 3,
        "evaluation.samples": 1,
        "steps": 1000,
        "limits.sampled_tokens": tokens,
        "checkpoint.every": 0,
        "observe.tensorboard": "false",
        "rollout.lag": case.lag,
        "algorithm.importance.mode": "truncate" if case.lag and case.corrected else "none",
    }
    if case.algorithm == "VAPO" and case.lag:
        settings["value_pretraining.checkpoint"] = out / f"vapo_lag0_{seed}" / "critic_pretrained"
    command = [sys.executable, "-m", "megatron_vapo", "train", str(ROOT / "recipes" / RECIPES[case.algorithm])]
    subprocess.run([*command, *(f"{k}={v}" for k, v in settings.items()), *overrides], check=True, cwd=ROOT)


def row(case: Case, out: Path, seeds: int) -> str | None:
    """Return the table's row of a case: means over the seeds that are there; None where there are none."""
    runs = [out / f"{case.name}_{seed}" for seed in range(seeds)]
    runs = [run for run in runs if (run / "summary.json").is_file()]
    if not runs:
        return None
    after = [fmean(r["evaluate/accuracy"] for r in records(run, "evaluate")[-LAST:]) for run in runs]
    steps: list[Record] = [record for run in runs for record in records(run, "train")]

    def mean(key: str) -> str:
        values = [record[key] for record in steps if key in record]
        return f"{fmean(values):.3g}" if values else "-"

    spread = f" ± {stdev(after):.3f}" if len(after) > 1 else ""
    numbers = [mean(key) for key in METRICS]
    corrected = "-" if not case.lag else "yes" if case.corrected else "no"
    words = [case.algorithm, str(case.lag), corrected, str(len(runs)), f"{fmean(after):.3f}{spread}", *numbers]
    return f"| {' | '.join(words)} |"


METRICS = {
    "rollout/age_mean": "age",
    "critic/explained_variance": "explained variance",
    "actor/effective_sample_size": "effective sample size",
    "rollout/logprob_difference_mean": "log-prob difference",
    "actor/clip_fraction_high": "clipped above",
    "actor/grad_norm": "gradient norm",
}
"""Means over all steps."""


def table(lags: list[int], out: Path, seeds: int) -> str:
    """Return the table in Markdown, by algorithm and correction."""
    heads = ["algorithm", "lag", "corrected", "seeds", "accuracy after", *METRICS.values()]
    ordered = sorted(cases(lags), key=lambda case: (case.algorithm != "VAPO", not case.corrected, case.lag))
    rows = [found for case in ordered if (found := row(case, out, seeds))]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows])


def time_with_server(python: str, lag: int, steps: int, out: Path, overrides: list[str]) -> str:
    """Return the table's row of a run of VAPO with a separate server: means over its steps but the first two, of which
    the first samples lag + 1 batches, and the last, after which nothing is sampled."""
    base, run_dir = out / "base_0", out / f"sglang_lag{lag}"
    if not (run_dir / "summary.json").is_file():
        settings: dict[str, object] = {
            "run_dir": run_dir,
            "model.path": base / "base",
            "data.train": base / "train.jsonl",
            "evaluation.data": "null",
            "value_pretraining.enabled": "false",
            "steps": steps,
            "checkpoint.every": 0,
            "rollout.engine": "sglang",
            "rollout.sglang.python": python,
            "rollout.sglang.placement": "separate",
            "rollout.lag": lag,
        }
        command = [sys.executable, "-m", "megatron_vapo", "train", str(ROOT / "recipes" / "tiny.yaml")]
        subprocess.run([*command, *(f"{k}={v}" for k, v in settings.items()), *overrides], check=True, cwd=ROOT)
    found = records(run_dir, "train")[2:-1]
    step = fmean(record["seconds/step"] for record in found)
    waits = fmean(record["seconds/rollout"] for record in found) / step
    idle = f"{fmean(r['seconds/engine_idle'] for r in found) / step:.0%}" if lag else f"{1 - waits:.0%}"
    tokens = fmean(record["throughput/tokens_per_second"] for record in found)
    return f"| {lag} | {60 / step:.1f} | {step:.2f} | {waits:.0%} | {idle} | {tokens:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--tokens", type=int, default=300_000, help="sampled tokens that each run trains on")
    parser.add_argument(
        "--sglang", metavar="PYTHON", help="measure time: the interpreter of an environment with SGLang"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--table", action="store_true", help="train nothing; show what is there")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    out = options.out.absolute()
    if options.sglang:
        print("| lag | steps a minute | seconds a step | trainer waits | server waits | tokens a second |")
        print("|---" * 6 + "|")
        for lag in options.lags:
            print(time_with_server(options.sglang, lag, options.steps, out, options.overrides), flush=True)
        return
    for seed in range(0 if options.table else options.seeds):
        for case in cases(options.lags):
            train(case, seed, options.tokens, out, options.overrides)
    print(table(options.lags, out, options.seeds))


if __name__ == "__main__":
    main()
