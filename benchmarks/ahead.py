"""Rollouts ahead of training: what staleness does to learning, and what time it saves.

    python -m benchmarks.ahead --out FOLDER [--seeds 5] [--lags 0 1 2 4 8] [--tokens 150000] [--table] [--json FILE]
    python -m benchmarks.ahead --out FOLDER --sglang .venv-sglang/bin/python [--arms "lag 0" "lag 1"] [--rounds 2]

Learning: each seed has a base model, problems (tools/make_tiny_base.py) and a pretrained critic of its own, which its
runs share. Runs that --out holds are not repeated; a table shows those that are there, up to the budget of tokens.

Time: a trainer and a separate SGLang server, which have a core each of two; the arms of a round one after another.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from benchmarks.critic_or_group import accuracy_curve, area
from benchmarks.records import Record, records
from benchmarks.table1.statistics import mean_interval

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"VAPO": "tiny.yaml", "GRPO": "tiny_grpo.yaml"}
OVER, AT = "mean accuracy over the budget", "accuracy at its end"
METRICS = {
    "rollout/age_mean": "age",
    "critic/explained_variance": "explained variance",
    "actor/effective_sample_size": "effective sample size",
    "rollout/logprob_difference_mean": "log-prob difference",
    "actor/clip_fraction_high": "clipped above",
    "actor/grad_norm": "gradient norm",
}
"""Means over all steps."""
ARMS = {
    "lag 0": ["rollout.lag=0"],
    "lag 1": ["rollout.lag=1"],
    "lag 2": ["rollout.lag=2"],
    "lag 2 in flight": ["rollout.lag=2", "rollout.in_flight_weight_updates=true"],
}
"""The settings whose time is measured."""


class Case(NamedTuple):
    """The settings that runs are compared by; each has a seed too."""

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
    run_dir = out / f"{case.name}_{seed}"
    if (run_dir / "summary.json").is_file():
        return
    settings: dict[str, object] = {
        "evaluation.every": 2,
        "evaluation.samples": 1,
        "steps": 1000,
        "limits.sampled_tokens": tokens,
        "rollout.lag": case.lag,
        "algorithm.importance.mode": "truncate" if case.lag and case.corrected else "none",
    }
    if case.algorithm == "VAPO":
        settings["value_pretraining.checkpoint"] = pretrained_critic(seed, out, overrides)
    start(RECIPES[case.algorithm], seed, run_dir, settings, overrides)


def pretrained_critic(seed: int, out: Path, overrides: list[str]) -> Path:
    """Return the critic of a seed, whose policy stands still and so has no lag, trained unless it is there."""
    run_dir = out / f"critic_{seed}"
    if not (run_dir / "critic_pretrained").is_dir():
        start(RECIPES["VAPO"], seed, run_dir, {"steps": 0, "evaluation.data": "null"}, overrides)
    return run_dir / "critic_pretrained"


def start(recipe: str, seed: int, run_dir: Path, settings: dict[str, object], overrides: list[str]) -> None:
    """Run a recipe with the seed's base model and problems, which are made unless they are there."""
    base = run_dir.parent / f"base_{seed}"
    if not (base / "base").is_dir():
        tool = str(ROOT / "tools" / "make_tiny_base.py")
        subprocess.run([sys.executable, tool, "--out", str(base), "--seed", str(seed)], check=True)
    common = {
        "seed": seed,
        "run_dir": run_dir,
        "model.path": base / "base",
        "data.train": base / "train.jsonl",
        "evaluation.data": base / "heldout.jsonl",
        "checkpoint.every": 0,
        "observe.tensorboard": "false",
    }
    command = [sys.executable, "-m", "megatron_vapo", "train", str(ROOT / "recipes" / recipe)]
    written = [f"{key}={value}" for key, value in (common | settings).items()]
    subprocess.run([*command, *written, *overrides], check=True, cwd=ROOT)


def measured(run_dir: Path, tokens: int) -> Record:
    """Return the numbers of a run up to so many sampled tokens: accuracies between evaluations are on a line."""
    curve = accuracy_curve(run_dir)
    steps = records(run_dir, "train")
    until = next((n for n, record in enumerate(steps, 1) if record["tokens/sampled"] >= tokens), len(steps))
    found = {OVER: area(*curve, tokens), AT: float(np.interp(tokens, *curve))}
    for key, name in METRICS.items():
        if values := [record[key] for record in steps[:until] if key in record]:
            found[name] = fmean(values)
    return found


Runs = dict[Case, dict[int, Record]]
"""Numbers of the runs that are there, by seed."""


def runs_of(lags: list[int], seeds: int, tokens: int, out: Path) -> Runs:
    """Return what is there, in the table's order."""
    ordered = sorted(cases(lags), key=lambda case: (case.algorithm != "VAPO", not case.corrected, case.lag))
    folders = {case: {seed: out / f"{case.name}_{seed}" for seed in range(seeds)} for case in ordered}
    return {
        case: {seed: measured(run, tokens) for seed, run in runs.items() if (run / "summary.json").is_file()}
        for case, runs in folders.items()
    }


def table(runs: Runs) -> str:
    """Return the table in Markdown: means over seeds and their standard deviations; of the accuracy over the budget
    also the difference to lag 0 of the same seeds, with its 95 % t interval."""
    heads = ["algorithm", "lag", "corrected", "seeds", OVER, "difference to lag 0", AT, *METRICS.values()]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case, found in runs.items():
        if not found:
            continue
        corrected = "-" if not case.lag else "yes" if case.corrected else "no"
        over, at = (spread([record[name] for record in found.values()]) for name in (OVER, AT))
        fresh = runs.get(Case(case.algorithm, 0, True), {})
        differences = np.array([found[seed][OVER] - fresh[seed][OVER] for seed in found.keys() & fresh.keys()])
        words = [case.algorithm, str(case.lag), corrected, str(len(found)), over]
        words += ["-" if not case.lag or len(differences) < 2 else difference(differences), at]
        for name in METRICS.values():
            values = [record[name] for record in found.values() if name in record]
            words.append(f"{fmean(values):.3g}" if values else "-")
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def difference(values_S: np.ndarray) -> str:
    """Return mean and interval."""
    interval = mean_interval(values_S)
    return f"{values_S.mean():+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def time_with_server(python: str, arm: str, number: int, steps: int, out: Path, overrides: list[str]) -> list[Record]:
    """Return the steps of a run of VAPO with a separate server but the first two, of which the first samples the whole
    queue, and the last two, after which less is sampled."""
    run_dir = out / f"sglang_{arm.replace(' ', '_')}_{number}"
    if not (run_dir / "summary.json").is_file():
        settings: dict[str, object] = {
            "evaluation.data": "null",
            "value_pretraining.enabled": "false",
            "steps": steps,
            "rollout.engine": "sglang",
            "rollout.sglang.python": python,
            "rollout.sglang.placement": "separate",
        }
        start(RECIPES["VAPO"], 0, run_dir, settings, [*ARMS[arm], *overrides])
    return records(run_dir, "train")[2:-2]


def time_row(arm: str, steps: list[Record]) -> str:
    """Return the row of an arm in the table of times."""
    step = fmean(record["seconds/step"] for record in steps)
    waits = fmean(record.get("seconds/rollout", 0.0) for record in steps) / step
    idle = [record["seconds/engine_idle"] for record in steps if "seconds/engine_idle" in record]
    idles = fmean(idle) / step if idle else 1 - waits
    tokens = fmean(record["throughput/tokens_per_second"] for record in steps)
    return f"| {arm} | {60 / step:.1f} | {step:.2f} | {waits:.0%} | {idles:.0%} | {tokens:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=150_000, help="sampled tokens that each run trains on")
    parser.add_argument("--table", action="store_true", help="train nothing; show what is there")
    parser.add_argument("--json", type=Path, help="write the numbers of each run there")
    parser.add_argument(
        "--sglang", metavar="PYTHON", help="measure time: the interpreter of an environment with SGLang"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each arm")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    out = options.out.absolute()
    if options.sglang:
        times: dict[str, list[Record]] = {arm: [] for arm in options.arms}
        for number in range(options.rounds):
            for arm, found in times.items():
                found += time_with_server(options.sglang, arm, number, options.steps, out, options.overrides)
        print(
            "| | steps a minute | seconds a step | trainer waits | server waits | tokens a second |\n"
            + "|---" * 6
            + "|"
        )
        print("\n".join(time_row(arm, found) for arm, found in times.items()))
        return
    for seed in range(0 if options.table else options.seeds):
        for case in cases(options.lags):
            train(case, seed, options.tokens, out, options.overrides)
    runs = runs_of(options.lags, options.seeds, options.tokens, out)
    print(table(runs))
    if options.json:
        content = {f"{case.name}_{seed}": numbers for case, found in runs.items() for seed, numbers in found.items()}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
