"""Every number of docs/table1.md, from complete runs. Legend: S seeds, A arms."""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.table1 import statistics
from benchmarks.table1.arms import ARMS
from benchmarks.table1.credit import KINDS
from benchmarks.table1.fates import mean_fates
from benchmarks.table1.results import ON_THE_WAY, Result, Results

ORDER = ("ppo", "no_value_pretraining", "no_decoupled_gae", "no_length_adaptive_gae", "no_clip_higher",
         "no_token_level_loss", "no_positive_lm_loss", "no_group_sampling", "vapo")  # fmt: skip
"""The paper's nine ablation arms, worst first."""
LOWEST, MIDDLE = ORDER[:2], ORDER[2:-1]
"""Those that are to be lowest, and those between them and VAPO."""

TENTHS = (1, 3, 5, 7, 9, 10)
"""Of a response, in which explained variance is shown."""

FIRST_STEPS = 5
"""In which the critic's sight and the credit of tokens are shown: later policies have parted."""

PAPER = {arm.name: arm.paper for arm in ARMS}
PAPER_NOISE = 4.5
"""Points between two numbers of the paper that its evaluation alone can make: avg@32 of 30 problems has a standard
error of at most sqrt(0.25 / 960) = 1.6 points, a difference 2.3, and 1.96 of that is 4.5."""


def analyse(results: Results) -> dict[str, Any]:
    """Return all that document and figures show."""
    differences = _differences(results)
    return {
        "arms": {name: _arm(runs, differences.get(name)) for name, runs in results.items() if runs},
        "order": _order(results),
        "speed": _speed(results),
        "base_fates": mean_fates(run.fates[0] for run in results.get("vapo", {}).values()),
        "counted": {
            name: _counted(results, name, seeds)
            for name in ("grpo", "dapo")
            if len(seeds := common_seeds(results, ("vapo", name))) > 1
        },
    }


def common_seeds(results: Results, names: tuple[str, ...]) -> list[int]:
    """Seeds with which all of these arms are complete."""
    return sorted(set.intersection(*(set(results.get(name, {})) for name in names)))


def finals(results: Results, names: tuple[str, ...], seeds: list[int]) -> np.ndarray:
    """[S, A]"""
    return np.array([[results[name][seed].final for name in names] for seed in seeds])


def _arm(runs: dict[int, Result], difference: dict[str, Any] | None) -> dict[str, Any]:
    every = list(runs.values())
    final = np.array([run.final for run in every])
    area = np.array([run.area for run in every])
    return {
        "seeds": sorted(runs),
        "final": float(final.mean()),
        "final_interval": asdict(statistics.mean_interval(final)),
        "area": float(area.mean()),
        "area_interval": asdict(statistics.mean_interval(area)),
        "base": _mean(run.base for run in every),
        "sampled_tokens": _mean(run.tokens[-1] for run in every),
        "pretraining_tokens": _mean(run.pretraining_tokens for run in every),
        "steps": _mean(len(run.step_tokens) for run in every),
        "evaluations": _mean(len(run.accuracy) for run in every),
        "seconds": _mean(run.origin["seconds"] for run in every),
        "on_the_way": {name: _on_the_way(every, metric) for name, metric in ON_THE_WAY.items()},
        "explained_at_the_start": [_explained(every, tenth) for tenth in TENTHS],
        "credit": {kind: _credit(every, kind) for kind in KINDS},
        "fates": mean_fates(run.fates[-1] for run in every),
        "short_of_budget": [seed for seed, run in sorted(runs.items()) if run.short_of_budget],
        "collapsed": [seed for seed, run in sorted(runs.items()) if run.collapsed],
        "vapo_minus_arm": difference,
        "by_seed": {
            seed: {"final": run.final, "area": run.area, "base": run.base, "best": run.score.max()}
            for seed, run in sorted(runs.items())
        },
        "curves": {
            seed: [[int(t), a] for t, a in zip(run.tokens, run.accuracy, strict=True)]
            for seed, run in sorted(runs.items())
        },
    }


def _on_the_way(runs: list[Result], metric: str) -> float | None:
    """Mean over runs of each run's median over its steps; None where there is no such metric."""
    medians = [np.nanmedian(run.metric(metric)) for run in runs if metric in run.steps]
    return _mean(medians) if medians else None


def _explained(runs: list[Result], tenth: int) -> float | None:
    """Mean over runs of explained variance in a tenth of responses over the first steps; None without a critic."""
    metric = f"critic/explained_variance_tenth_{tenth}"
    means = [np.nanmean(run.metric(metric)[:FIRST_STEPS]) for run in runs if metric in run.steps]
    return _mean(means) if means else None


def _credit(runs: list[Result], kind: str) -> dict[str, Any] | None:
    """Tokens of a kind in the first steps, and the mean over runs of their mean advantage; None where there are no such
    tokens."""
    found = [[row[1:] for row in run.credit.get(kind, []) if row[0] <= FIRST_STEPS] for run in runs]
    found = [rows for rows in found if rows]
    if not found:
        return None
    means = np.array([np.average([mean for _, mean in rows], weights=[tokens for tokens, _ in rows]) for rows in found])
    tokens = sum(tokens for rows in found for tokens, _ in rows)
    return {"tokens": tokens, "mean": float(means.mean()), "interval": asdict(statistics.mean_interval(means))}


def _differences(results: Results) -> dict[str, dict[str, Any]]:
    """VAPO minus each arm, on the seeds that both have; Holm's correction over all of them."""
    found: dict[str, dict[str, Any]] = {}
    for name in results:
        seeds = common_seeds(results, ("vapo", name)) if name != "vapo" else []
        if len(seeds) > 1:
            vapo, other = finals(results, ("vapo", name), seeds).T
            difference = vapo - other
            found[name] = {
                "seeds": len(seeds),
                "won": int((difference > 0).sum()),
                **asdict(statistics.paired(difference)),
            }
    for difference, adjusted in zip(found.values(), statistics.holm([d["p"] for d in found.values()]), strict=True):
        difference["p_holm"] = adjusted
    return found


def _counted(results: Results, name: str, seeds: list[int]) -> dict[str, Any]:
    """VAPO minus an arm: final scores with VAPO's value pretraining in its budget, and mean accuracies over the budget
    without it."""
    runs = [(results["vapo"][seed], results[name][seed]) for seed in seeds]
    return {
        "final": asdict(statistics.paired(np.array([vapo.final_with_pretraining - arm.final for vapo, arm in runs]))),
        "area": asdict(statistics.paired(np.array([vapo.area - arm.area for vapo, arm in runs]))),
    }


def _order(results: Results) -> dict[str, Any] | None:
    """Return how the order of the nine arms agrees with the paper's; None where all are complete with fewer than two
    seeds."""
    names = ORDER
    seeds = common_seeds(results, names)
    if len(seeds) < 2:
        return None
    scores, paper = finals(results, names, seeds), np.array([PAPER[name] for name in names])
    tier = statistics.tiers({name: PAPER[name] for name in names}, PAPER_NOISE)
    tier_A = np.array([tier[name] for name in names])
    middle = [names.index(name) for name in MIDDLE]
    return {
        "arms": names,
        "seeds": seeds,
        "tau": float(statistics.tau_b(scores.mean(0), paper)),
        "tau_interval": asdict(statistics.tau_interval(scores, paper)),
        "tau_of_tiers": float(statistics.tau_b(scores.mean(0), tier_A)),
        "tau_of_tiers_interval": asdict(statistics.tau_interval(scores, tier_A)),
        "tau_of_middle": float(statistics.tau_b(scores[:, middle].mean(0), paper[middle])),
        "tau_of_middle_interval": asdict(statistics.tau_interval(scores[:, middle], paper[middle])),
        "tiers": tier,
        "reversals": _reversals(names, scores, tier),
    }


def _reversals(names: tuple[str, ...], scores_SA: np.ndarray, tier: dict[str, int]) -> list[dict[str, Any]]:
    """Pairs that the paper puts in different tiers, in one order, and our means in the other."""
    found = []
    for low, high in combinations(range(len(names)), 2):
        difference = scores_SA[:, low] - scores_SA[:, high]
        if tier[names[low]] < tier[names[high]] and difference.mean() > 0:
            pair = {"better_here": names[low], "better_in_the_paper": names[high]}
            found.append(pair | asdict(statistics.paired(difference)))
    return found


def _speed(results: Results) -> dict[str, Any]:
    """Sampled tokens to DAPO's final score of the same seed, as a share of all that DAPO sampled; all of it where
    a run never reached it (censored: the truth is more)."""
    return {
        name: _speed_of(results, name, seeds)
        for name in results
        if name != "dapo" and "dapo" in results and (seeds := common_seeds(results, ("dapo", name)))
    }


def _speed_of(results: Results, name: str, seeds: list[int]) -> dict[str, Any]:
    runs, dapos = ([results[arm][seed] for seed in seeds] for arm in (name, "dapo"))
    reached = [run.tokens_to(dapo.final) for run, dapo in zip(runs, dapos, strict=True)]
    everything = np.array([dapo.tokens[-1] for dapo in dapos])
    spent = np.array([all_ if tokens is None else tokens for all_, tokens in zip(everything, reached, strict=True)])
    counted = spent + [run.pretraining_tokens for run in runs]
    return {
        "seeds": seeds,
        "never": [seed for seed, tokens in zip(seeds, reached, strict=True) if tokens is None],
        "tokens": spent,
        "share": _mean(spent / everything),
        "share_interval": asdict(statistics.mean_interval(spent / everything)),
        "share_with_pretraining": _mean(counted / everything),
        "share_with_pretraining_interval": asdict(statistics.mean_interval(counted / everything)),
        # Stricter: DAPO may have had its final score before its end.
        "dapos_own_tokens": [dapo.tokens_to(dapo.final) for dapo in dapos],
    }


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
