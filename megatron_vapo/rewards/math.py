"""Checkers of mathematical answers: DAPO's string rule, and the symbolic comparison of the math-verify library.

Both read the last `Answer: ...` at the end of the response, where the template asks for it. DAPO's rule is cheap and
cannot be talked into a wrong number, but it knows one way to write each answer. math-verify knows that 34.0, 034 and
68/2 are 34, costs milliseconds, and may never return from a hostile expression such as 9^9^9^9: it belongs in the
workers of `RewardScorer`.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable

_TAIL_CHARACTERS = 300
"""Where an answer is looked for, as in DAPO. It bounds the cost, and what stands in the reasoning is no answer."""

_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

_SPACES = re.compile(r"\s|\\[ ;]|,\\!")
_ORNAMENTS = re.compile(
    r"\ban? |\.(?=\$)|\\\$|\"|\^\\circ|\^\{\\circ\}|\\mathrm\{th\}|\\l?dots|"
    r"square|ways|integers|dollars|mph|inches|hours|km|units|points|feet|minutes|digits|cents|degrees|cm|gm|pounds|"
    r"meters|meals|edges|students|multiples"
)
_WORDS = re.compile(r"\\(?:text|mbox|textbf|overline)\{([^{}]*)\}")


def math_dapo(response: str, answer: str) -> float:
    """+1 if the last `Answer: ...` in the final 300 characters equals `answer` once both are normalised, else -1.

    The rule of DAPO's released recipe, whose normalisation is Minerva's (arXiv 2206.14858, appendix D.1). It compares
    strings, so these are wrong where the reference is 34: `**Answer:** 34`, `34.`, `34.0`, `034`; and so are
    `\dfrac{1}{2}` and `1/2` where it is `\frac{1}{2}`.
    """
    given = _last_answer(response[-_TAIL_CHARACTERS:])
    return 1.0 if given is not None and _normalize(given) == _normalize(answer) else -1.0


def math_verify_reward(response: str, answer: str) -> float:
    """+1 if math-verify finds the final answer mathematically equal to `answer`, else -1.

    The final answer is the last `Answer: ...` in the final 300 characters or, where there is none, the last
    `\boxed{...}` there. It is read as a whole: `34, 35` is not 34 and `10^{20}` is not 10 (the library by itself picks
    the first number that it finds). Known false accept, the library's choice: `34%` for 34.

    No time limit of its own: the library's uses signals, which work in a main thread only. Raises ValueError if the
    library cannot read the reference.
    """
    parse, verify = _math_verify()
    gold = parse(f"\\boxed{{{answer}}}")
    if not gold:
        raise ValueError(f"math-verify cannot read the reference answer {answer!r}")
    given = _final_expression(response[-_TAIL_CHARACTERS:])
    return 1.0 if given is not None and verify(gold, parse(given)) else -1.0


def _last_answer(tail: str) -> str | None:
    answers = _ANSWER.findall(tail)
    return answers[-1] if answers else None


def _final_expression(tail: str) -> str | None:
    """The final answer as `\boxed{...}`, the one form that math-verify reads as a whole."""
    answer = _last_answer(tail)
    if answer is not None:
        return f"\\boxed{{{answer.strip(' *.')}}}"  # **Answer:** 34 leaves "** 34"; a sentence leaves "34."
    _, boxed, rest = tail.rpartition("\\boxed{")
    return boxed + rest if boxed else None


@functools.cache
def _math_verify() -> tuple[Callable[[str], list], Callable[[list, list], bool]]:
    from math_verify import parse, verify

    # It warns that somebody else must bound the time: RewardScorer does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return functools.partial(parse, parsing_timeout=None), functools.partial(verify, timeout_seconds=None)


def _normalize(answer: str) -> str:
    """One spelling for answers that differ in spaces, units, dollar signs, LaTeX wrappers or thousands separators."""
    answer = answer.rpartition("=")[2]
    answer = _SPACES.sub("", _ORNAMENTS.sub("", answer)).replace("{,}", "")
    if formula := re.search(r"\$(.*?)\$", answer):  # prose around one formula: "there are $34$ of them"
        answer = formula[1]
    answer = _WORDS.sub(r"\1", answer)
    answer = re.sub(r"\\boxed\{(.*)\}", r"\1", answer)
    answer = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", answer)  # \frac12
    answer = re.sub(r"sqrt([^{])", r"sqrt{\1}", answer)  # \sqrt2
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer
