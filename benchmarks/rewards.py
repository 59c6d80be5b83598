r"""Error rates of the mathematical checkers on real references, phrased as models phrase them.

    python -m benchmarks.rewards --data ../shared/data [--write docs/rewards.md]
    python -m benchmarks.rewards --fuzz 100000 [--write docs/rewards.md]

Every reference of GSM8K (8,792) and AIME 2024 (30) is stated in each phrasing, as it is (a checker that says -1 rejects
falsely) and changed in six ways (a checker that says +1 accepts falsely). The second form looks for strings that
break a built-in checker.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from random import Random
from time import process_time

from megatron_vapo.data.prompts import read_prompts
from megatron_vapo.rewards import REWARDS, get_reward
from megatron_vapo.rewards.math import math_dapo, math_verify_reward

Checker = Callable[[str, str], float]
"""(response, reference) -> +1 or -1."""

_COMMANDS = r"""
\frac \frac{ \sqrt{ \boxed{ \fbox \[ \] \text{ \mathrm{ \cdot \times \pm \infty \left( \right) \cup \in \leq \ldots \\
\begin{pmatrix} \end{pmatrix} \ln \sin \log_ \sum_{k=1}^ \int \binom{ \pi 10^ ^{ _{ e^ ** $$ ` 1,000 .5 34
"""
PIECES = [
    *"0123456789+-*/^=_{}()[]<>!.,;:|&%$ \n~'\"abxyneπ√∞−²½，：\t\\#\x00\ud800é",
    *_COMMANDS.split(),
    *("\nAnswer: ", "\n#### ", " and ", " or ", "x = "),
]
"""What fuzzed answers are made of."""

REFERENCES = ("34", r"\frac{1}{2}", "x + 1", "(1, 2)", r"\{1, 2\}", "3x + 4y = 7", r"[0, \infty)", "B", "Tuesday")
SLOW_SECONDS = 1.0

PHRASINGS: dict[str, str] = {
    "bare": "Answer: {}",
    "full stop": "Answer: {}.",
    "noun after": "Answer: {} eggs",
    "unit after": "Answer: {} dollars",
    "unit in LaTeX": r"Answer: ${} \text{{ cm}}^2$",
    "currency before": r"Answer: \${}",
    "percent sign": r"Answer: {}\%",
    "decimal": "Answer: {}.00",
    "bold label": "**Answer:** {}",
    "bold label, colon outside": "**Answer**: {}",
    "bold answer": "Answer: **{}**",
    "label, then the next line": "**Final Answer:**\n{}",
    "display formula on its own lines": "Answer:\n$$\n{}\n$$",
    "brackets": r"Answer: \[ {} \]",
    "box": r"Answer: $\boxed{{{}}}$",
    "box without label": r"So it is \boxed{{{}}}.",
    "other box, with a space": r"So it is $\fbox {{{}}}$.",
    "backticks": "Answer: `{}`",
    "full-width colon": "Answer：{}",
    "equation": "Answer: $x = {}$",
    "sum with its result": "Answer: 2 + 3 = {}",
    "sentence": "The final answer is {}.",
    "noun before": "Answer: the total is ${}$ in all",
    "explanation after": "Answer: {}\n\nThis follows from the two equations above, and 7 is prime.",
}
"""How an answer is stated; {} is the number."""

CHANGES: dict[str, Callable[[int], str]] = {
    "one more": lambda n: str(n + 1),
    "negated": lambda n: str(-n) if n else "1",
    "ten times": lambda n: str(10 * n) if n else "10",
    "a tenth": lambda n: f"{'-' * (n < 0)}{abs(n) // 10}.{abs(n) % 10}" if n % 10 else f"{n}.5",
    "decimal point before": lambda n: f".{abs(n)}" if n else ".5",
    "two answers": lambda n: f"{n} or {n + 2}",
}
"""How a number is made wrong, each of another value than the reference."""


@dataclass
class Errors:
    """The errors of one checker in one phrasing."""

    rejected: int = 0
    accepted: int = 0
    right: int = 0
    wrong: int = 0
    seconds: float = 0.0


def references(data: Path) -> list[str]:
    """The answers of GSM8K (both splits) and AIME 2024.

    Args:
        data: folder with `gsm8k/{train,test}.jsonl` and `aime-2024.parquet`.
    """
    gsm8k = [prompt.answer for split in ("train", "test") for prompt in read_prompts(data / "gsm8k" / f"{split}.jsonl")]
    return gsm8k + [prompt.answer for prompt in read_prompts(data / "aime-2024.parquet")]


def measure(reward: Checker, phrasing: str, answers: list[str]) -> tuple[Errors, list[tuple[str, str]]]:
    """Count a checker's errors in a phrasing; return them with every falsely judged (response, reference)."""
    errors, faults, begun = Errors(), [], process_time()
    for response, answer, right in _statements(phrasing, answers):
        verdict = reward(response, answer) > 0
        if right:
            errors.right += 1
            errors.rejected += not verdict
        else:
            errors.wrong += 1
            errors.accepted += verdict
        if verdict != right:
            faults.append((response, answer))
    errors.seconds = process_time() - begun
    return errors, faults


def _statements(phrasing: str, answers: list[str]) -> Iterator[tuple[str, str, bool]]:
    """(response, reference, whether it is right)."""
    for answer in answers:
        number = int(answer.replace(",", ""))
        yield f"We find 7, then 12.\n{phrasing.format(answer)}", answer, True
        for change in CHANGES.values():
            if phrasing != PHRASINGS["decimal"] or change(1).lstrip("-").isdigit():  # 1.5.00 is no number
                yield f"We find 7, then 12.\n{phrasing.format(change(number))}", answer, False


def table(answers: list[str]) -> str:
    """A row a phrasing: false rejects and accepts of both checkers in percent, microseconds a call of ours."""
    rows = [
        "| phrasing | as written | `math_verify` rejects | accepts | `math_dapo` rejects | accepts |",
        "|---|---|---|---|---|---|",
    ]
    totals = {math_verify_reward: Errors(), math_dapo: Errors()}
    for name, phrasing in PHRASINGS.items():
        cells = []
        for reward, total in totals.items():
            errors, _ = measure(reward, phrasing, answers)
            for field in vars(total):
                setattr(total, field, getattr(total, field) + getattr(errors, field))
            cells += [f"{errors.rejected / errors.right:.2%}", f"{errors.accepted / errors.wrong:.2%}"]
        rows.append(f"| {name} | `{json.dumps(phrasing.format(18), ensure_ascii=False)[1:-1]}` | {' | '.join(cells)} |")
    cells = [f"{t.rejected / t.right:.2%} | {t.accepted / t.wrong:.2%}" for t in totals.values()]
    rows.append(f"| **all** | | {' | '.join(cells)} |")
    ours = totals[math_verify_reward]
    calls = ours.right + ours.wrong
    rows.append(
        f"\n{len(answers):,} references, {calls:,} statements, {1e6 * ours.seconds / calls:.0f} microseconds of "
        f"CPU a call of `math_verify`, {platform.processor() or platform.machine()}, {date.today()}."
    )
    return "\n".join(rows) + "\n"


@dataclass
class Fuzzed:
    """The (response, reference) pairs that broke a checker, and its times."""

    exceptions: list[tuple[str, str]]
    slow: list[tuple[str, str]]
    """Longer than `SLOW_SECONDS` of CPU."""
    longest: float = 0.0
    seconds: float = 0.0


def fuzz(reward: Checker, count: int, seed: int = 0) -> Fuzzed:
    """Score `count` random strings after a label, the same ones every time."""
    found, random = Fuzzed([], []), Random(seed)
    for _ in range(count):
        pair = "Answer: " + "".join(random.choices(PIECES, k=random.randint(1, 14))), random.choice(REFERENCES)
        begun = process_time()
        try:
            reward(*pair)
        except Exception:  # noqa: BLE001  # any kind is a fault of the checker
            found.exceptions.append(pair)
        spent = process_time() - begun
        found.longest, found.seconds = max(found.longest, spent), found.seconds + spent
        if spent > SLOW_SECONDS:
            found.slow.append(pair)
    return found


def fuzz_table(count: int) -> str:
    """A row a built-in checker: exceptions, slow calls, the longest call."""
    rows = [
        f"| checker | strings | exceptions | longer than {SLOW_SECONDS:g} s | longest call | mean |",
        "|---|---|---|---|---|---|",
    ]
    for name in REWARDS:
        found = fuzz(get_reward(name).function, count)
        for pair in [*found.exceptions, *found.slow]:
            print(pair)
        rows.append(
            f"| `{name}` | {count:,} | {len(found.exceptions)} | {len(found.slow)} | {1e3 * found.longest:.1f} ms | "
            f"{1e6 * found.seconds / count:.0f} µs |"
        )
    return "\n".join(rows) + f"\n\nCPU time, {platform.processor() or platform.machine()}, {date.today()}.\n"


def main() -> None:
    """Print the table, or put it into the document between its marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gsm8k/ and aime-2024.parquet")
    parser.add_argument("--fuzz", type=int, metavar="N", help="score N random strings by every built-in checker")
    parser.add_argument("--write", type=Path, help="document that holds the table")
    options = parser.parse_args()
    if (options.data is None) == (options.fuzz is None):
        parser.error("one of --data and --fuzz is needed")
    name, text = ("fuzz", fuzz_table(options.fuzz)) if options.fuzz else ("table", table(references(options.data)))
    print(text)
    if options.write:
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        head, _, rest = options.write.read_text(encoding="utf-8").partition(begin)
        options.write.write_text(head + begin + text + end + rest.partition(end)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
