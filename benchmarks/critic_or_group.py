"""VAPO against SAO, GRPO and DAPO on derivations, at equal sampled tokens, paired by seed.

    python -m benchmarks.critic_or_group [--seeds 10] [--tokens 350000] [--out FOLDER] [key=value...]

Each seed has a base model and problems of its own, which its runs share. Held-out accuracy every two steps; tokens
of value pretraining are not in the budget. Runs that --out holds are not repeated. Learning rates are those of
`recipes/tiny.yaml`, not tuned for each; SAO's actor has a quarter (`recipes/sao_tiny.yaml` says why).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.records import Record, records
from benchmarks.table1.statistics import paired

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"VAPO": "tiny.yaml", "SAO": "sao_tiny.yaml", "GRPO": "tiny_grpo.yaml", "DAPO": "tiny_dapo.yaml"}
ENOUGH = 0.7


def train(algorithm: str, seed: int, tokens: int, out: Path, overrides: list[str]) -> Path:
    """Return the folder of a run, which is trained unless it is there."""
    base, run_dir = out / f"base_{seed}", out / f"{algorithm.lower()}_{seed}"
    if not (run_dir / "summary.json").is_file():
        tool = str(ROOT / "tools" / "make_tiny_base.py")
        subprocess.run([sys.executable, tool, "--out", str(base), "--seed", str(seed)], check=True)
        settings = {
            "seed": seed,
            "run_dir": run_dir,
            "model.path": base / "base",
            "data.train": base / "train.jsonl",
            "evaluation.data": base / "heldout.jsonl",
            "evaluation.every": 2,
            "evaluation.samples": 1,
            "steps": 1000,
            "limits.sampled_tokens": tokens,
            "checkpoint.every": 0,
        }
        command = [sys.executable, "-m", "megatron_vapo", "train", str(ROOT / "recipes" / RECIPES[algorithm])]
        subprocess.run([*command, *(f"{k}={v}" for k, v in settings.items()), *overrides], check=True, cwd=ROOT)
    return run_dir


def accuracy_curve(run_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return sampled tokens and held-out accuracy [N] of the run's evaluations."""
    steps: list[Record] = records(run_dir, "train")
    tokens = {0: 0.0} | {record["step"]: record["tokens/sampled"] for record in steps}
    found = records(run_dir, "evaluate")
    return (
        np.array([tokens[record["step"]] for record in found]),
        np.array([record["evaluate/accuracy"] for record in found]),
    )


def area(tokens_N: np.ndarray, accuracy_N: np.ndarray, budget: int) -> float:
    """Return the mean accuracy over the budget: the area under the curve as a share."""
    grid = np.linspace(0, budget, 1001)
    return float(np.interp(grid, tokens_N, accuracy_N).mean())


def tokens_until(tokens_N: np.ndarray, accuracy_N: np.ndarray, enough: float, budget: int) -> float:
    """Return the tokens after which accuracy is first `enough`, between evaluations by a line; the budget if never."""
    reached = np.flatnonzero(accuracy_N >= enough)
    if not len(reached):
        return float(budget)
    last = int(reached[0])
    if last == 0:
        return 0.0
    return float(np.interp(enough, accuracy_N[last - 1 : last + 1], tokens_N[last - 1 : last + 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="at least 2")
    parser.add_argument("--tokens", type=int, default=350_000)
    parser.add_argument("--out", type=Path, default=Path("artifacts/critic_or_group"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    out, budget = args.out.resolve(), args.tokens
    curves = {
        (name, seed): accuracy_curve(train(name, seed, budget, out, args.overrides))
        for seed in range(args.seeds)
        for name in RECIPES
    }
    print(table(curves, args.seeds, budget))


def table(curves: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]], seeds: int, budget: int) -> str:
    """Return means over seeds, and VAPO's paired differences with 95 % t intervals, as Markdown."""
    measures = {
        "mean accuracy over the budget": lambda curve: area(*curve, budget),
        "accuracy at the end (three evaluations)": lambda curve: float(curve[1][-3:].mean()),
        f"thousand tokens to {ENOUGH:.0%}": lambda curve: tokens_until(*curve, ENOUGH, budget) / 1000,
    }
    others = [name for name in RECIPES if name != "VAPO"]
    heads = [*RECIPES, *(f"VAPO - {other}" for other in others)]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for title, measure in measures.items():
        found = {name: np.array([measure(curves[name, seed]) for seed in range(seeds)]) for name in RECIPES}
        cells = [f"{values.mean():.3g}" for values in found.values()]
        for other in others:
            compared = paired(found["VAPO"] - found[other])
            cells.append(f"{compared.mean:.2g} [{compared.t.low:.2g}, {compared.t.high:.2g}]")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
