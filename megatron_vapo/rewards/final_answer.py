r"""The final answer of a response, and the number that it is, as models write them in Markdown and LaTeX.

Two steps, each a function of text alone:

    response --final_answer--> "**34** eggs"  --plain--> "34 eggs" --number--> 34

Nothing here evaluates an expression, so nothing here can hang: costs are linear in the 300 characters that are read.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

TAIL_CHARACTERS = 300
"""Where an answer is looked for, as in DAPO. It bounds the cost, and what stands in the reasoning is no answer."""

_LABEL = re.compile(
    r"\banswer[*_`]{0,3}\s{0,3}(?:[:：]|(?:is|was)\b(?!\s*(?:not|n't|wrong|incorrect))\s*:?)"
    r"|^####(?=[ \t]*[-+$\\]*\d[\d.,/]*[ \t]*$)",  # as GSM8K's own solutions end; a heading has more than a number
    re.IGNORECASE | re.MULTILINE,
)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
_MARKS = re.compile(r"^[\s*_`#>:：]+|[\s*_`]+$")
_FENCES = (("$$", "$$"), (r"\[", r"\]"), ("```", "```"))


def final_answer(response: str) -> str | None:
    r"""Return what the response gives as its final answer, still as it is written; None where it gives none.

    That is what follows the last label (`Answer:`, `**Final Answer**:`, `The answer is`, GSM8K's `####`) in the final
    300 characters: the rest of its line or, where that is empty, the next line that is not, a display formula as a
    whole. A box in it (`\boxed{34}`, `\fbox{34}`, `\boxed 34`) is the answer alone. Without a label it is the last box.
    """
    tail = response[-TAIL_CHARACTERS:]
    labels = list(_LABEL.finditer(tail))
    if not labels:
        return _last_box(tail)
    block = _first_block(tail[labels[-1].end() :])
    box = _last_box(block)
    return box if box is not None else block or None


def _first_block(text: str) -> str:
    """Return the first line that says something, or the display formula that begins there."""
    text = _MARKS.sub("", text)
    for opening, closing in _FENCES:
        if text.startswith(opening):
            inside, closed, _ = text[len(opening) :].partition(closing)
            if closed:
                return inside.strip()
    return _MARKS.sub("", text.partition("\n")[0])


def _last_box(text: str) -> str | None:
    """Return what stands in the last box, braces balanced; None without a box, and for one that is not closed."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :]
    if rest.startswith("{"):
        inside = _braced(rest)
        return None if inside is None else inside.strip()
    bare = re.match(r"[^\s$\\]+", rest)
    return bare[0] if bare else None


def _braced(text: str) -> str | None:
    """Return the content of the braces with which the text begins."""
    depth = 0
    for end, character in enumerate(text):
        escaped = end > 0 and text[end - 1] == "\\"
        depth += ((character == "{") - (character == "}")) * (not escaped)
        if depth == 0:
            return text[1:end]
    return None


_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|boldsymbol|boxed|fbox)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"\\[ ,;:!]|\\q?quad\b|~|\{,\}|\\(?:displaystyle|left|right|bigl?|bigr)\b|[\u00a0\u2009\u202f]")
_SYMBOLS = (
    ("\u2212", "-"),
    ("\u2013", "-"),
    (r"\$", "$"),
    (r"\%", "%"),
    (r"\dfrac", r"\frac"),
    (r"\tfrac", r"\frac"),
    (r"^{\circ}", "°"),
    (r"^\circ", "°"),
    (r"\degree", "°"),
    (r"\cdot", r"\times"),
    ("×", r"\times"),
)
_DELIMITERS = re.compile(r"\*\*|`|\\[()\[\]]")


def plain(answer: str) -> str:
    """Return the answer `undressed`, of which a sum that ends in its result (`2 + 3 = 5`, `x = 5`) becomes the result,
    unless there are several (`x = 3, y = 5`)."""
    return result(undressed(answer))


def undressed(answer: str) -> str:
    r"""Return the answer without what only dresses it: Markdown, LaTeX delimiters, spaces, `\text{}`, a full stop."""
    for old, new in _SYMBOLS:
        answer = answer.replace(old, new)
    answer = _DELIMITERS.sub("", answer).replace("{,}", ",")
    before = None
    while before != answer:
        before, answer = answer, _WRAPPER.sub(r" \1 ", answer)
    answer = _SPACES.sub(" ", answer)
    answer = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", answer)
    answer = re.sub(r"(?<=\{)\s+|\s+(?=\})", "", answer)  # math-verify cannot read `{ e }`
    answer = re.sub(r"\s+", " ", answer).strip().rstrip(".,;").strip()
    if re.fullmatch(r"\([^(),\[\]]*\)", answer):
        answer = answer[1:-1].strip()
    return answer


def result(answer: str) -> str:
    """Return what stands behind the last `=` of an answer (`undressed`); all of it where it has several parts."""
    head, equals, last = answer.rpartition("=")
    if equals and not _SEVERAL.search(head) and not re.search(r"[<>!:]$", head):
        return last.strip()
    return answer


def is_equation(answer: str) -> bool:
    """Return whether an answer (`undressed`) states an equation (`3x + 4y = 7`), rather than what a name stands for
    (`x = 5`) or a sum with its result (`2 + 3 = 5`)."""
    left, equals, right = answer.partition("=")
    return bool(equals) and "=" not in right and bool(_UNKNOWNS.search(left))


_UNKNOWNS = re.compile(r"[A-Za-z)}]\s*[-+*/^]|[-+*/]\s*[\dA-Za-z\\({]*[A-Za-z]|\d\s*[A-Za-z]|\\[df]?frac.*[A-Za-z]")
"""A letter beside an operator or a number."""


_SEVERAL = re.compile(r"(?<!\d),|,(?!\d{3}(?!\d))|;|\b(?:and|or)\b", re.IGNORECASE)
"""Commas that part answers rather than thousands, and words that do."""

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_FRACTION = re.compile(r"\\frac\s*(?:\{\s*([^{}]+?)\s*\}|(\d))\s*(?:\{\s*([^{}]+?)\s*\}|(\d))")
_NUMBER = re.compile(
    rf"""(?<![\w.,/^])(?P<sign>[-+]?)\s*\$?\s*(?P<late_sign>[-+]?)
    (?:(?P<whole>\d+)\s+(?P<over>\d+)/(?P<under>\d+)
      |(?P<top>{_DECIMAL})\s*/\s*(?P<bottom>{_DECIMAL})
      |(?P<decimal>{_DECIMAL})(?:\s*(?:\\times)\s*10\s*\^\s*(?:\{{\s*(?P<power>[-+]?\d+)\s*\}}|(?P<digit>\d))|e(?P<e>[-+]?\d+))?
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_POWER_OF_UNIT = re.compile(r"(?<=[A-Za-z])\s*\^\s*(?:\{[23]\}|[23](?!\d))|[²³]")
_UNIT = re.compile(r"(?:[A-Za-z°%µμ\u20ac\u00a3\u00a5'’\-.,;:()$\s]|/(?=\s*[A-Za-z]))*")
"""What may follow or precede a number without changing it: words and units."""

_CHANGES = re.compile(
    r"\b(?:minus|negative|plus|not|no|less|more|least|most|over|under|above|below|about|around|approximately|roughly|almost|"
    r"nearly|between|up|to|per\s*cent\s*of|hundred|thousand|million|billion|trillion|dozens?|half|halves|thirds?|"
    r"quarters?|fourths?|fifths?|tenths?|hundredths?|squared|cubed|times|twice|double|factorial|mod|modulo|base|and|or|"
    r"either|neither|point|sqrt|root|pi|log|ln|sin|cos|tan|i|e|x|y|z|n|k)\b",
    re.IGNORECASE,
)
"""Words after which a number is another one, or no certain one, and letters that may be variables."""

_LARGEST_POWER = 400
"""The exponent of ten in scientific notation: beyond it nobody meant a number, and the integer would be long."""


def number(answer: str) -> Fraction | None:
    r"""Return the one number that an answer (`plain`) is, exactly; None where it is something else or not certain.

    Units, nouns and currency around it are passed over (`34 eggs`, `$18`, `34 cm^2`, `the total is 34`); so is a
    percent sign: `34%` is 34 and never 0.34. Thousands separators, `.5`, `5.`, `-3`, `2/3`, `\frac{2}{3}`, `2 2/3` and
    `1.2 \times 10^{3}` are read. Two numbers, relations, words that change a number (`34 thousand`, `half of 34`) and
    letters that could be variables are not one number.
    """
    text = _POWER_OF_UNIT.sub("", _FRACTION.sub(_as_quotient, answer))
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    match = found[0]
    before, after = text[: match.start()], text[match.end() :]
    if not (_UNIT.fullmatch(before) and _UNIT.fullmatch(after)) or _CHANGES.search(f"{before} | {after}"):
        return None
    if re.search(r"[-+(]\s*$", before) or after.startswith("("):
        return None
    return _value(match)


_LARGEST_EXPONENT = 1_000_000
_LARGEST_FACTORIAL = 5_000


def is_bounded(answer: str) -> bool:
    r"""Return whether an expression (`undressed`) can be computed: no towers of powers, no large factorials.

    Python would begin to compute `9^{9^{9^9}}`, and no signal interrupts that. What remains is for a time limit.
    """
    factorials = re.findall(r"(\d+|[!)}\]])\s*!", answer) + re.findall(r"\\binom\s*\{\s*(\d+)", answer)
    large = any(not of.isdigit() or int(of) > _LARGEST_FACTORIAL for of in factorials)
    return not large and _size(answer, with_bases=False) <= _LARGEST_EXPONENT


def _size(text: str, with_bases: bool = True) -> float:
    """Return a bound on the product of all integers in a text, powers of them included, or of the exponents alone."""
    product = 1.0
    while found := re.search(r"(?P<base>\d*)\s*\^\s*|\d+", text):
        text = text[found.end() :]
        if found["base"] is None:
            product *= max(1, int(found[0])) if with_bases else 1
            continue
        exponent, text = _exponent(text)
        size = math.inf if "!" in exponent else _size(exponent)
        product *= _power(int(found["base"] or 1), size) if with_bases else size
        if size > _LARGEST_EXPONENT:
            return math.inf
    return product


def _exponent(text: str) -> tuple[str, str]:
    """Split what follows a `^` into the exponent, with its own (`9^9^9`), and the rest."""
    digits = re.match(r"\d+", text)
    end = digits.end() if digits else min(1, len(text))
    if text.startswith("{"):
        inside = _braced(text)
        if inside is None:
            return text[1:], ""
        end = len(inside) + 2
    tower = re.match(r"\s*\^\s*", text[end:])
    if not tower:
        return text[:end], text[end:]
    own, rest = _exponent(text[end + tower.end() :])
    return f"{text[:end]}^{{{own}}}", rest


def _power(base: int, exponent: float) -> float:
    return math.inf if exponent * math.log10(max(1, base)) > 300 else float(base) ** exponent


_COMMAND = re.compile(r"\\[A-Za-z]+")
_RELATION = re.compile(r"[<>=≤≥≠≈_±!]|\\(?:leq?|geq?|neq?|lt|gt|approx|sim|pm|in|to|equiv)(?![A-Za-z])")


def is_one_expression(answer: str) -> bool:
    r"""Return whether an answer (`plain`) may be a single value: no relation, subscript, list or word in it."""
    words = re.search(r"[A-Za-z]{2,}", _COMMAND.sub(" ", answer))
    return bool(answer) and not (_RELATION.search(answer) or _SEVERAL.search(answer) or words)


def _as_quotient(match: re.Match[str]) -> str:
    r"""`2\frac{2}{3}` -> `2 2/3`."""
    over, under = match[1] or match[2], match[3] or match[4]
    return f" {over}/{under}"


def _value(match: re.Match[str]) -> Fraction | None:
    part = match.groupdict()
    if part["sign"] and part["late_sign"]:
        return None
    sign = -1 if "-" in (part["sign"], part["late_sign"]) else 1
    try:
        if part["whole"] is not None:
            value = int(part["whole"]) + Fraction(int(part["over"]), int(part["under"]))
        elif part["top"] is not None:
            value = _decimal(part["top"]) / _decimal(part["bottom"])
        else:
            power = int(part["power"] or part["digit"] or part["e"] or 0)
            if abs(power) > _LARGEST_POWER:
                return None
            value = _decimal(part["decimal"]) * Fraction(10) ** power
    except ZeroDivisionError:
        return None
    return sign * value


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
