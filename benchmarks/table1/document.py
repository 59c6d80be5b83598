"""Writes the results between the markers of docs/table1.md, its JSON and its figures; the prose around them stays."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table1 import tuning
from benchmarks.table1.analysis import FIRST_STEPS, LOWEST, PAPER_NOISE, TENTHS, analyse
from benchmarks.table1.arms import ARMS, Arm
from benchmarks.table1.credit import KINDS
from benchmarks.table1.fates import CORRECTIONS, REMARKS_A_LINE
from benchmarks.table1.figures import draw_all
from benchmarks.table1.results import ON_THE_WAY, RUNS, Results, rounded, write_runs
from megatron_vapo.errors import DataError

BEGIN, END = "<!-- results: written by python -m benchmarks.table1 -->", "<!-- end of results -->"
TITLES = {arm.name: arm.title for arm in ARMS}
DIGITS = 5
GROUPS = {"paper": "The paper's rows", "more": "Other rows"}


def write_document(document: Path, results: Results, arms: list[Arm], seeds: Iterable[int]) -> None:
    """Results as document, JSON beside it, and in a folder beside it figures and what is kept of each run.

    Raises:
        DataError: there are none.
    """
    seeds = list(seeds)
    if not results:
        raise DataError("no run is complete yet")
    numbers = rounded({"runs": _runs(results, arms, seeds), **analyse(results)}, DIGITS)
    figures = draw_all(results, document.with_suffix(""))
    write_runs(document.with_suffix("") / RUNS, results)
    document.with_suffix(".json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    parts = (_aims, _tables, _order, _speed, _credit, _fates, _on_the_way)
    lines = [*_runs_text(numbers), *_setting(numbers, results), *(line for part in parts for line in part(numbers))]
    text = "\n".join(lines)
    pictures = "".join(f"\n{caption}:\n\n![{caption}]({_beside(file, document)})\n" for caption, file in figures)
    _insert(document, text + "\n" + pictures)
    print(f"wrote {document}")


def _insert(document: Path, text: str) -> None:
    """Between the markers; a document that does not exist is the results alone."""
    before = document.read_text(encoding="utf-8") if document.is_file() else f"{BEGIN}\n{END}\n"
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{document}: the lines {BEGIN!r} and {END!r} are missing")
    document.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{tail}", encoding="utf-8")


def _beside(file: Path, document: Path) -> str:
    return file.relative_to(document.parent).as_posix()


def _runs(results: Results, arms: list[Arm], seeds: list[int]) -> dict[str, Any]:
    """Say what ran, when, from which sources."""
    every = [run for runs in results.values() for run in runs.values()]
    origins = [run.origin for run in every]
    missing = {arm.name: [s for s in seeds if s not in results.get(arm.name, {})] for arm in arms}
    return {
        "complete": len(every),
        "whole_seeds": [s for s in seeds if all(s in results.get(arm.name, {}) for arm in arms)],
        "missing": {name: list_ for name, list_ in missing.items() if list_},
        "commits": sorted({run.commit for run in every}),
        "first": min(o["started"] for o in origins),
        "last": max(o["finished"] for o in origins),
        "hours": sum(o["seconds"] for o in origins) / 3600,
        "learning_rates": tuning.read_found(),
    }


def _runs_text(numbers: dict[str, Any]) -> list[str]:
    runs = numbers["runs"]
    missing = [f"{TITLES[name]} with seeds {_list(seeds)}" for name, seeds in runs["missing"].items()]
    tuned = [
        f"{TITLES.get(name, name)} {family['learning_rate']:g} ({_finals(family['finals'])})"
        for name, family in runs["learning_rates"].items()
        if family["learning_rate"]
    ]
    short = [
        f"{TITLES[n]} with seeds {_list(s)}" for n, row in numbers["arms"].items() if (s := row["short_of_budget"])
    ]
    return [
        f"{runs['complete']} runs are complete; all arms with {len(runs['whole_seeds'])} seeds "
        f"({_list(runs['whole_seeds'])}). Commit {', '.join(runs['commits'])}, {runs['first']} to {runs['last']}, "
        f"{runs['hours']:.1f} hours summed over runs.",
        "",
        f"Not complete: {'; '.join(missing) or 'none'}. Ended by their number of steps, short of the budget: "
        f"{'; '.join(short) or 'none'}.",
        "",
        "Learning rates, with the mean final score of each rate over so many tuning seeds: "
        f"{'; '.join(tuned) or 'those of the recipes, not tuned'}.",
        "",
    ]


def _setting(numbers: dict[str, Any], results: Results) -> list[str]:
    """Say what VAPO's runs were told, in a sentence, and what came of it."""
    if "vapo" not in results:
        return []
    vapo = next(iter(results["vapo"].values())).settings
    row = numbers["arms"]["vapo"]
    responses = vapo["rollout.prompts_per_step"] * vapo["rollout.samples_per_prompt"]
    bases = [seed["base"] for seed in row["by_seed"].values()]
    return [
        f"Setting: a step samples {responses} responses of at most {vapo['rollout.max_response_tokens']} "
        f"tokens for {responses // vapo['minibatch_size']} updates; VAPO's alpha is {vapo['algorithm.alpha']:g}. A run "
        f"samples {vapo['limits.sampled_tokens']:,} tokens; an evaluation is {vapo['evaluation.problems']} held-out "
        f"problems x {vapo['evaluation.samples']}. The bases are right {min(bases):.1%} to {max(bases):.1%} of the "
        f"time; VAPO's value pretraining sampled {row['pretraining_tokens']:,.0f} tokens on average.",
        "",
        *_apart(numbers["arms"]),
    ]


def _apart(rows: dict[str, Any]) -> list[str]:
    """Which arms' intervals lie wholly below VAPO's."""
    highs = {name: row["final_interval"]["high"] for name, row in rows.items()}
    least = rows["vapo"]["final_interval"]["low"] if "vapo" in rows else None
    if least is None:
        return []
    below = [TITLES[name] for name, high in highs.items() if high is not None and high < least]
    return [f"Final scores whose 95 % intervals lie wholly below VAPO's: {'; '.join(below) or 'none'}.", ""]


def _finals(finals: tuning.Finals) -> str:
    means = {rate: np.mean(list(by_seed.values())) for rate, by_seed in finals.items()}
    return ", ".join(f"{rate}: {means[rate]:.3f} of {len(by_seed)}" for rate, by_seed in finals.items())


def _aims(numbers: dict[str, Any]) -> list[str]:
    """Say which of the protocol's aims are met."""
    found, order, speed = numbers["arms"], numbers["order"], numbers["speed"].get("vapo")
    if order is None or not speed:
        return []
    rows = []
    for name in ("grpo", "dapo"):
        difference, counted = found[name]["vapo_minus_arm"], numbers["counted"][name]
        final, area = (_with_interval(counted[key]["mean"], counted[key]["t"], "+") for key in ("final", "area"))
        rows.append(
            [
                f"1: VAPO above {TITLES[name]}, interval above 0",
                f"{_with_interval(difference['mean'], difference['t'], '+')}; "
                f"with its pretraining in the budget {final}; mean accuracy over the budget {area}",
                _met(difference["t"]["low"] > 0),
            ]
        )
    lowest = sorted(order["arms"], key=lambda arm: found[arm]["final"])[:2]
    share = speed["share_with_pretraining"]
    collapsed = len(found["vapo"]["collapsed"])
    rows += [
        [
            "2: vanilla PPO and without value pretraining the two lowest of nine",
            ", ".join(TITLES[name] for name in lowest),
            _met(set(lowest) == set(LOWEST)),
        ],
        ["3: tau at least 0.6", f"{order['tau']:.2f}", _met(order["tau"] >= 0.6)],
        [
            "4: DAPO's final score in at most 60 % of its tokens",
            f"{share:.0%}, pretraining counted",
            _met(share <= 0.6),
        ],
        ["5: no run of VAPO collapses", f"{collapsed} of {len(found['vapo']['seeds'])}", _met(not collapsed)],
    ]
    return ["### The aims", "", *_table(["aim", "found", ""], rows), ""]


def _met(aim: bool) -> str:
    return "met" if aim else "missed"


def _tables(numbers: dict[str, Any]) -> list[str]:
    lines = []
    for group, title in GROUPS.items():
        shown = [arm for arm in ARMS if arm.group == group and arm.name in numbers["arms"]]
        lines += [f"### {title}", "", *_table(HEADER, [_row(arm, numbers) for arm in shown]), ""] if shown else []
    return lines


def _on_the_way(numbers: dict[str, Any]) -> list[str]:
    """Say what training looked like in each arm."""
    rows = []
    for arm in ARMS:
        if arm.name in numbers["arms"]:
            found = numbers["arms"][arm.name]["on_the_way"].values()
            rows.append([arm.title, *("" if value is None else f"{value:.3g}" for value in found)])
    text = "Of each run the median over its steps, of these the mean over seeds; clipped: share of tokens in an update."
    return ["### On the way", "", text, "", *_table(["arm", *ON_THE_WAY], rows), ""]


def _credit(numbers: dict[str, Any]) -> list[str]:
    """Say where each arm's credit goes, and where its critic sees."""
    rows = []
    for arm in ARMS:
        if arm.name in numbers["arms"]:
            row = numbers["arms"][arm.name]
            explained = ["" if value is None else f"{value:.2f}" for value in row["explained_at_the_start"]]
            rows.append([arm.title, *explained, *(_credit_cell(found) for found in row["credit"].values())])
    text = (
        f"Means over the first {FIRST_STEPS} steps, of these over seeds: explained variance in tenths of a response, "
        "and the advantage at tokens, told apart by the first wrong result that stands, in units of its root mean "
        "square over all tokens of a step, ± half of its 95 % interval over seeds (number of tokens)."
    )
    header = ["arm", *(f"tenth {tenth}" for tenth in TENTHS), *KINDS]
    return ["### What the critic sees, and where credit goes", "", text, "", *_table(header, rows), ""]


def _credit_cell(found: dict[str, Any] | None) -> str:
    """A mean with the half of its interval, and how many tokens it is of."""
    if found is None:
        return ""
    high = found["interval"]["high"]
    half = "" if high is None else f" ± {high - found['mean']:.2f}"
    return f"{found['mean']:.2f}{half} ({found['tokens']:,})"


def _fates(numbers: dict[str, Any]) -> list[str]:
    """Say what became of the held-out responses, beside those of the base."""
    found = numbers["arms"]
    rows = [("the base", numbers["base_fates"])] if "vapo" in found else []
    rows += [(arm.title, found[arm.name]["fates"]) for arm in ARMS if arm.name in found]
    names = list(rows[0][1])
    text = (
        "Of the responses to 64 problems that are kept of a run's last held-out evaluation, means over seeds: what the "
        "first line that is not the answer's differs by, as a share of responses; rates over all lines that were "
        "written; and the share of right responses by the problem's number of lines."
    )
    table = _table(["", *names], [[title, *(_rate(name, rates.get(name)) for name in names)] for title, rates in rows])
    return ["### What became of the responses", "", text, "", *table, ""]


def _rate(name: str, rate: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate:.2f}" if name in (CORRECTIONS, REMARKS_A_LINE) else f"{rate:.1%}"


HEADER = ("arm", "paper", "seeds", "final score", "area under the curve", "VAPO minus arm", "seeds above",
          "p (Holm)", "detectable", "tokens to DAPO's final", "with pretraining", "collapsed", "steps")  # fmt: skip


def _row(arm: Arm, numbers: dict[str, Any]) -> list[str]:
    row, speed = numbers["arms"][arm.name], numbers["speed"].get(arm.name)
    difference = row["vapo_minus_arm"]
    never = f", {len(speed['never'])} never" if speed and speed["never"] else ""
    bound = "at least " if never else ""
    return [
        arm.title,
        "" if arm.paper is None else f"{arm.paper:g}",
        str(len(row["seeds"])),
        _with_interval(row["final"], row["final_interval"]),
        _with_interval(row["area"], row["area_interval"]),
        _with_interval(difference["mean"], difference["t"], "+") if difference else "",
        f"{difference['won']} of {difference['seeds']}" if difference else "",
        f"{difference['p_holm']:.3g}" if difference else "",
        f"{difference['detectable']:.3f}" if difference else "",
        f"{bound}{speed['share']:.0%}{never}" if speed else "",
        f"{bound}{speed['share_with_pretraining']:.0%}" if speed else "",
        f"{len(row['collapsed'])} of {len(row['seeds'])}",
        f"{row['steps']:.0f}",
    ]


def _order(numbers: dict[str, Any]) -> list[str]:
    order = numbers["order"]
    if order is None:
        return []
    ours = sorted(order["arms"], key=lambda arm: -numbers["arms"][arm]["final"])
    keys = ("tau", "tau_of_middle", "tau_of_tiers")
    tau, of_middle, of_tiers = (_with_interval(order[key], order[f"{key}_interval"]) for key in keys)
    return [
        "### Order of the nine arms",
        "",
        f"{len(order['seeds'])} seeds. Kendall's tau-b with the paper's numbers {tau}; of the six between VAPO and the "
        f"paper's two lowest alone {of_middle}; of all with the paper's tiers (ties within {PAPER_NOISE:g} points) "
        f"{of_tiers}.",
        "",
        f"Ours, best first: {', '.join(TITLES[arm] for arm in ours)}.",
        "",
        *_reversals(order["reversals"]),
        "",
    ]


def _reversals(reversals: list[dict[str, Any]]) -> list[str]:
    if not reversals:
        return ["No pair of the paper's tiers is reversed."]
    header = ("better here", "better in the paper", "difference here", "p (uncorrected)")
    rows = []
    for pair in reversals:
        titles = [TITLES[pair[key]] for key in ("better_here", "better_in_the_paper")]
        rows.append([*titles, _with_interval(pair["mean"], pair["t"], "+"), f"{pair['p']:.2g}"])
    return ["Reversals, every pair of tiers whose means stand the other way round:", "", *_table(header, rows)]


def _speed(numbers: dict[str, Any]) -> list[str]:
    speed = numbers["speed"].get("vapo")
    if not speed:
        return []
    share, counted = (
        _with_interval(speed[key], speed[f"{key}_interval"], ".0%") for key in ("share", "share_with_pretraining")
    )
    bound = "at least " if speed["never"] else ""
    return [
        "### VAPO against DAPO",
        "",
        f"VAPO has DAPO's final score after {bound}{share} of DAPO's sampled tokens, {counted} with those of value "
        f"pretraining; it never has it with {len(speed['never'])} of {len(speed['seeds'])} seeds (counted as all of "
        "DAPO's tokens). "
        f"DAPO itself first had it after {np.mean(speed['dapos_own_tokens']):,.0f} tokens, VAPO after "
        f"{np.mean(speed['tokens']):,.0f}.",
        "",
    ]


def _table(header: Sequence[str], rows: list[list[str]]) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _with_interval(value: float, interval: dict[str, float | None], form: str = "") -> str:
    """A number with its 95 % interval, where there is one."""
    form = form if form.endswith("%") else f"{form}.3f"
    low, high = interval["low"], interval["high"]
    between = "" if low is None or high is None else f" [{format(low, form)}, {format(high, form)}]"
    return format(value, form) + between


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "none"
