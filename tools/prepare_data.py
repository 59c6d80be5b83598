#!/usr/bin/env python
"""Make the prompt sets of the paper's experiment from the published files.

    python tools/prepare_data.py --train dapo-math-17k.parquet --evaluation aime-2024.parquet \\
        --tokenizer models/Qwen2.5-32B --out data

The public DAPO-Math-17k repeats each of its problems about 100 times, AIME-2024 each of its 30 problems 32 times. What
is dropped, and counted in OUT/report.json with examples: broken rows, repetitions (spaces aside), problems with two
different answers, control tokens of the tokenizer in the text, prompts of too many tokens, and training problems that
the evaluation holds too. Everything else is written as JSON lines of rendered prompt, answer and all other columns,
OUT/<name of the file>.jsonl, in the order of the file. Files may be of any kind that a recipe's may.
`--hold-out N` puts N of the training prompts, drawn by `--seed`, into OUT/<name>-heldout.jsonl instead.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vapo.data.files import read_rows
from megatron_vapo.data.prompts import MATH_TEMPLATE, Message, Prompt, parse_row
from megatron_vapo.data.tokens import ControlTokens
from megatron_vapo.errors import DataError, RecipeError, UserError
from megatron_vapo.runtime.durable import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 5
"""Dropped rows that the report names for each reason."""

Problem = tuple[tuple[Message, ...], str]
"""What two rows must share to be the same: messages before the question, and the question with single spaces."""


@dataclass
class Report:
    """The fate of the rows of one file."""

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def drop(self, reason: str, example: str) -> None:
        self.dropped[reason] += 1
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append(example)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        prepare(options)
    except UserError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Write the prompt sets and the report."""
    from transformers import AutoTokenizer

    if not Path(options.tokenizer).is_dir():
        raise RecipeError(f"--tokenizer {options.tokenizer}: no such folder; name the model's")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    reports: dict[str, Report] = {}
    evaluated: set[Problem] = set()
    for path in options.evaluation:
        prompts, reports[path.name] = read_distinct(path, tokenizer, options.max_prompt_tokens, set())
        evaluated |= {_problem(prompt) for prompt in prompts}
        _write(options.out / f"{_stem(path)}.jsonl", prompts)
    for path in options.train:
        prompts, reports[path.name] = read_distinct(path, tokenizer, options.max_prompt_tokens, evaluated)
        training, held_out = split(prompts, options.hold_out, options.seed)
        _write(options.out / f"{_stem(path)}.jsonl", training)
        if held_out:
            _write(options.out / f"{_stem(path)}-heldout.jsonl", held_out)
    write_text(options.out / "report.json", json.dumps({n: vars(r) for n, r in reports.items()}, indent=2) + "\n")
    for name, report in reports.items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items()) or "nothing"
        print(f"{name}: {report.rows} rows, {report.kept} kept; dropped: {dropped}")


def read_distinct(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int, evaluated: set[Problem]
) -> tuple[list[Prompt], Report]:
    """The prompts of a file that are worth training on, and what became of the others.

    Raises:
        DataError: the file cannot be read, or nothing is left.
    """
    report = Report()
    found: dict[Problem, Prompt] = {}
    answers: dict[Problem, set[str]] = defaultdict(set)
    for source, row in read_rows(path):
        report.rows += 1
        try:
            context, text, answer = parse_row(row, source, MATH_TEMPLATE)
        except DataError as error:
            report.drop("broken", str(error))
            continue
        assert isinstance(row, dict)  # `parse_row` takes nothing else
        prompt = Prompt(text, answer, len(found), source, context, row=row)
        problem = _problem(prompt)
        answers[problem].add(answer)
        if problem in found:
            report.drop("repeated", source)
        else:
            found[problem] = prompt
    kept, control = [], ControlTokens(tokenizer, end_ids=())
    lengths = _lengths(list(found.values()), tokenizer)
    for (problem, prompt), length in zip(found.items(), lengths, strict=True):
        if len(answers[problem]) > 1:
            report.drop("with several answers", f"{prompt.source}: {sorted(answers[problem])}")
        elif hits := control.find("\n".join(_contents(prompt))):
            report.drop("with control tokens", f"{prompt.source}: {hits[0][1]}")
        elif length > max_tokens:
            report.drop(f"of more than {max_tokens} tokens", f"{prompt.source}: {length} tokens")
        elif problem in evaluated:
            report.drop("in the evaluation too", prompt.source)
        else:
            kept.append(prompt)
    if not kept:
        raise DataError(f"{path}: nothing is left of {report.rows} rows; dropped: {dict(report.dropped)}")
    report.kept = len(kept)
    return kept, report


def split(prompts: list[Prompt], held_out: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, each in the order of the file.

    Raises:
        RecipeError: no training prompt would be left.
    """
    if held_out >= len(prompts):
        raise RecipeError(f"--hold-out {held_out}: must be less than the {len(prompts)} prompts")
    chosen = set(random.Random(seed).sample(range(len(prompts)), held_out))
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for i, prompt in enumerate(prompts):
        parts[i in chosen].append(prompt)
    return parts


def _problem(prompt: Prompt) -> Problem:
    return prompt.context, " ".join(prompt.text.split())


def _contents(prompt: Prompt) -> list[str]:
    return [*(message.content for message in prompt.context), prompt.text]


def _lengths(prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    texts = ["\n".join(_contents(prompt)) for prompt in prompts]
    return [len(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []


def _write(path: Path, prompts: list[Prompt]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(_row(prompt), ensure_ascii=False, default=str) + "\n" for prompt in prompts))


def _row(prompt: Prompt) -> dict[str, object]:
    messages = [message._asdict() for message in (*prompt.context, Message("user", prompt.text))]
    others = {name: value for name, value in prompt.row.items() if name != "question"}
    return others | {"prompt": messages if prompt.context else prompt.text, "answer": prompt.answer}


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).stem


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, nargs="*", default=[], help="files with training problems")
    parser.add_argument("--evaluation", type=Path, nargs="*", default=[], help="files with evaluation problems")
    parser.add_argument("--tokenizer", required=True, help="folder of the model, or of its tokenizer")
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--max-prompt-tokens", type=int, default=2048)
    parser.add_argument("--hold-out", type=int, default=0, help="training prompts to set aside")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not options.train and not options.evaluation:
        parser.error("name files with --train or --evaluation")
    return options


if __name__ == "__main__":
    sys.exit(main())
