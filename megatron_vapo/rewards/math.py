"""The checkers of mathematical answers: DAPO's string rule, and our own reading, which ends in the math-verify library.

docs/rewards.md says which to take when. DAPO's rule is a published fact and stays to the letter: cheap, and never wrong
about a number it accepts, but it knows one way to write each answer. `math_verify_reward` reads answers as models write
them (`final_answer`), compares numbers exactly, and asks math-verify only about what is no plain number: that knows
that 68/2 is 34, costs milliseconds, and may never return from a hostile expression such as 9^9^9^9: rewards run in
processes of their own (`pool.py`).
"""

from __future__ import annotations

import logging
import re
from typing import Any

from math_verify import parse, verify

from megatron_vapo.rewards.final_answer import (
    TAIL_CHARACTERS,
    final_answer,
    is_bounded,
    is_equation,
    is_one_expression,
    number,
    result,
    undressed,
)

# It warns that somebody else must bound the time: `Pool` does.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

_SPACES = re.compile(r"\s|\\[ ;]|,\\!")
_ORNAMENTS = re.compile(
    r"\ban? |\.(?=\$)|\\\$|\"|\^\\circ|\^\{\\circ\}|\\mathrm\{th\}|\\l?dots|"
    r"square|ways|integers|dollars|mph|inches|hours|km|units|points|feet|minutes|digits|cents|degrees|cm|gm|pounds|"
    r"meters|meals|edges|students|multiples"
)
_WORDS = re.compile(r"\\(?:text|mbox|textbf|overline)\{([^{}]*)\}")


def math_dapo(response: str, answer: str) -> float:
    r"""Return +1 if the last `Answer: ...` of the final 300 characters equals `answer`, both normalised, else -1.

    The rule of DAPO's released recipe, whose normalisation is Minerva's (arXiv 2206.14858, appendix D.1). It compares
    strings, so these are wrong where the reference is 34: `**Answer:** 34`, `34.`, `34.0`, `034`; and so are
    `\dfrac{1}{2}` and `1/2` where it is `\frac{1}{2}`.
    """
    given = _last_answer(response[-TAIL_CHARACTERS:])
    return 1.0 if given is not None and _normalize(given) == _normalize(answer) else -1.0


def math_verify_reward(response: str, answer: str) -> float:
    r"""Return +1 if the response's final answer is mathematically equal to `answer`, else -1.

    Where both are plain numbers (`final_answer.number`) they are compared exactly. Else equal texts are equal, and
    math-verify compares what is there, read as a whole: `34, 35` is not 34 and `10^{20}` is not 10 (the library by
    itself takes the first number that it finds). Where the reference is a number, an answer with relations (`\leq 34`),
    subscripts (`34_{7}`), several parts or words is wrong without asking it: it would drop the ones and multiply the
    letters of the others. So is a list that is not written out (`1, 3, \ldots`), and an answer that is too large to
    compute. A reference that is an equation (`3x + 4y = 7`) is compared as a whole.

    No time limit of its own: the library's uses signals, which work in a main thread only.

    Raises:
        ValueError: the library cannot read the reference.
    """
    written = final_answer(response)
    if written is None:
        return -1.0
    given, reference = undressed(written), undressed(answer)
    if is_equation(reference) and "=" in given:
        return 1.0 if _equal(given, reference) else -1.0
    if is_equation(reference) and result(reference) == "0":
        return -1.0
    given, reference = result(given), result(reference)
    found, expected = number(given), number(reference)
    if expected is not None and found is not None:
        return 1.0 if found == expected else -1.0
    if expected is not None and not is_one_expression(given):
        return -1.0
    return 1.0 if _equal(given, reference) else -1.0


_DOTS = re.compile(r"\\[lcd]?dots|\.\.\.|…")


def _equal(given: str, reference: str) -> bool:
    """Return whether two expressions are equal: as texts, or in math-verify's reading.

    Raises:
        ValueError: the library cannot read the reference.
    """
    if re.sub(r"\s", "", given) == re.sub(r"\s", "", reference):
        return True
    if _DOTS.search(given + reference) or not is_bounded(given):
        return False
    gold, found = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, given))
    if not gold:
        raise ValueError(f"math-verify cannot read the reference answer {reference!r}")
    unread = isinstance(gold[0], str) or not found or isinstance(found[0], str)  # a text, perhaps cut off
    return not unread and verify(gold, found, timeout_seconds=None) and _agree(gold[0], found[0])


def _agree(one: Any, other: Any) -> bool:
    """Return whether two constants agree in nine digits, as others do: the library compares six decimals, which all
    small numbers share."""
    if not (getattr(one, "is_number", False) and getattr(other, "is_number", False)):
        return True
    first, second = one.evalf(30), other.evalf(30)
    if not (first.is_finite and second.is_finite):
        return True
    return bool(abs(first - second) <= abs(first) * 1e-9)


def _last_answer(tail: str) -> str | None:
    answers = _ANSWER.findall(tail)
    return answers[-1] if answers else None


def _normalize(answer: str) -> str:
    """Return one spelling of answers that differ in spaces, units, dollar signs, LaTeX or thousands separators."""
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
