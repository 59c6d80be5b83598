"""Reading final answers: stated examples with their neighbours, numbers of every form, and text of every kind."""

from decimal import Decimal
from fractions import Fraction
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vapo.rewards.final_answer import final_answer, is_bounded, is_equation, number, plain, undressed
from megatron_vapo.rewards.math import math_verify_reward


def read(response: str) -> Fraction | None:
    answer = final_answer(response)
    return None if answer is None else number(plain(answer))


HALF, SEVERAL = Fraction(1, 2), None

NUMBERS = [
    # units, nouns, currency, percent
    ("34 dollars", 34),
    ("34 eggs", 34),
    ("60 km/h", 60),
    ("34 cm^2", 34),
    (r"$34 \text{ cm}^2$", 34),
    ("34 m²", 34),
    (r"34^\circ", 34),
    (r"\$34", 34),
    ("$1,080.50", Fraction("1080.5")),
    ("£5", 5),
    ("34%", 34),
    (r"34\%", 34),
    ("50 percent", 50),
    ("there are $34$ of them", 34),
    ("The total is $34 per day.", 34),
    ("34 (thirty-four)", 34),
    # points, signs, separators
    (".5", HALF),
    ("0.5", HALF),
    ("5.", 5),
    ("34.00", 34),
    ("034", 34),
    ("-3", -3),
    ("−7", -7),
    ("+34", 34),
    ("-$5", -5),
    ("$-5", -5),
    ("1,080", 1080),
    ("1{,}080", 1080),
    (r"1.2 \times 10^{3}", 1200),
    ("1e3", 1000),
    # fractions
    ("1/2", HALF),
    (r"\frac12", HALF),
    (r"\dfrac{1}{2}", HALF),
    (r"-\frac{1}{2}", -HALF),
    (r"\frac{-1}{2}", -HALF),
    ("2 2/3", Fraction(8, 3)),
    (r"2\frac{2}{3}", Fraction(8, 3)),
    # equations
    ("x = 34", 34),
    ("2 + 32 = 34", 34),
    # several answers are none of them
    ("5 or 7", SEVERAL),
    ("34, 35", SEVERAL),
    ("1,2,3", SEVERAL),
    ("12,34", SEVERAL),
    ("x = 3, y = 5", SEVERAL),
    ("x=34 or x=35", SEVERAL),
    ("3 feet 2 inches", SEVERAL),
    ("50 - 60", SEVERAL),
    (r"34 \pm 2", SEVERAL),
    # another number than the digits say, or none
    ("34 thousand", None),
    ("half of 34", None),
    ("minus 34", None),
    ("not 34", None),
    ("at least 34", None),
    (r"\leq 34", None),
    ("34_{7}", None),
    ("34!", None),
    ("34^2", None),
    ("10^{20}", None),
    ("3x", None),
    ("34i", None),
    ("A34", None),
    (r"\sqrt{34}", None),
    (r"34\sqrt{2}", None),
    ("4:1", None),
    ("3.14.15", None),
    ("1/0", None),
    ("1e999999999", None),
    ("--34", None),
    ("34-5", None),
    ("thirty-four", None),
    ("", None),
]


@pytest.mark.parametrize(("written", "value"), NUMBERS)
def test_numbers(written: str, value: Fraction | None) -> None:
    assert read(f"We find 7, then 12.\n\nAnswer: {written}") == value


@pytest.mark.parametrize(
    "response",
    [
        "**Answer:** 34",
        "**Answer**: 34",
        "**Answer: 34**",
        "**Answer:**\n34",
        "**Answer:**\n\n**34**",
        "### Answer: 34",
        "**Final Answer:**\n\\boxed{34}",
        "**Final Answer**\n\n\\boxed{34}",
        "Answer:\n$$\n34\n$$",
        "Answer: \\[\n34\n\\]",
        "Answer: \\(34\\)",
        "Answer: `34`",
        "Answer:\n```\n34\n```",
        "Answer：34",
        "ANSWER : 34",
        "The answer is 34.",
        "Therefore, the final answer is: $\\boxed{34}$.",
        r"\boxed{34}",
        r"\boxed {34}",
        r"\fbox{34}",
        r"\boxed 34",
        r"\boxed{\text{34}}",
        r"\boxed{\boxed{34}}",
        "Answer: 34\nThis follows from 5 + 29 = 34.",
        "Answer: 35. No!\nAnswer: 34",
        r"\boxed{35} but Answer: 34",
    ],
)
def test_where_models_write_it(response: str) -> None:
    assert read(response) == 34
    assert math_verify_reward(response, "34") == 1.0
    assert math_verify_reward(response, "43") == -1.0


@pytest.mark.parametrize(
    "response", ["", "34", "The result is 34", "Answer:", r"\boxed{34", "Answer: 34\n" + "x" * 300]
)
def test_no_answer(response: str) -> None:
    assert read(response) is None
    assert math_verify_reward(response, "34") == -1.0


@given(value=st.fractions(-(10**12), 10**12, max_denominator=1000), places=st.integers(0, 3), separators=st.booleans())
def test_every_form_of_a_number_is_that_number(value: Fraction, places: int, separators: bool) -> None:
    exact = Fraction(round(value * 10**places), 10**places)
    decimal = Decimal(abs(exact.numerator) * 10**places // exact.denominator).scaleb(-places)
    digits = f"{decimal:,.{places}f}" if separators else f"{decimal:.{places}f}"
    sign = "-" if exact < 0 else ""
    assert read(f"Answer: {sign}{digits}") == exact
    assert read(f"Answer: {sign}{digits} apples") == exact
    assert read(f"Answer: {value.numerator}/{value.denominator}") == value
    fraction = rf"\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    assert read(f"The answer is ${'-' * (value < 0)}{fraction}$.") == value


@given(one=st.fractions(max_denominator=50), other=st.fractions(max_denominator=50))
def test_numbers_agree_exactly_where_they_are_equal(one: Fraction, other: Fraction) -> None:
    assert (math_verify_reward(f"Answer: {one}", str(other)) == 1.0) == (one == other)


_WORDS = str.split(r"** \frac \boxed{ \text{ \sqrt \left \right \times 10^{ e5 answer Answer: is or and x cm $$ ```")
_PIECES = st.sampled_from([*"0134.,-+/=$\\{}()[]^_!%`:\n", *_WORDS])


@pytest.mark.slow
@settings(max_examples=2000)
@given(st.one_of(st.lists(_PIECES, max_size=60).map("".join), st.lists(_PIECES, max_size=60).map(" ".join), st.text()))
def test_no_text_breaks_the_reader(text: str) -> None:
    answer = final_answer(text)
    if answer is not None:
        number(plain(answer))


@pytest.mark.parametrize(
    "unit", ["(", "{", "\\text{", "\\frac{", "1,", "1 ", "-", "a^2", "$", "answer: ", "\\boxed{", " ."]
)
def test_no_text_takes_long(unit: str) -> None:
    begun = process_time()
    for _ in range(20):
        answer = final_answer(("Answer: " + unit * 300)[:308])
        number(plain(answer or ""))
    assert process_time() - begun < 10.0


@pytest.mark.parametrize(
    "answer",
    ["10^{20}", "2^{2006}", "2006!", "n!", r"\binom{10}{3}", "e^{x^2}", r"e^{-\frac{x^2}{2}}", "2^{2^5}", "^"],
)
def test_what_can_be_computed(answer: str) -> None:
    assert is_bounded(answer)


@pytest.mark.parametrize(
    "answer",
    [
        *("9^{9^{9^9}}", "9^9^9", "((9^{99999})^{99999})", "x^{9^{9^9}}", "9^{9^{9^9}x}", "9^{" * 60, "3^{2006!}"),
        *("(10!)!", "99999!", r"\binom{999999}{5}", r"\sum_{k=1}^{99999999} k"),
    ],
)
def test_what_no_time_limit_would_stop(answer: str) -> None:
    assert not is_bounded(answer)


@pytest.mark.parametrize(
    ("answer", "equation"),
    [
        *(("3x + 4y = 7", True), ("m + n = 34", True), ("x^2 + y^2 = 25", True), (r"\frac{a}{b} = 3", True)),
        *(("x = 5", False), ("f(x) = 2x", False), ("2 + 3 = 5", False), ("P(A) = 1/2", False), ("the sum = 34", False)),
        *((r"A = \pi r^2 = 34", False), ("D = (0, 1)", False), (r"3 \times 4 = 12", False), ("34", False)),
    ],
)
def test_equations_among_names_and_sums(answer: str, equation: bool) -> None:
    assert is_equation(undressed(answer)) == equation
