"""The mathematical checkers, on real reference solutions and on the ways to write an answer that they (do not) know."""

import json
from pathlib import Path

import pytest

from benchmarks.rewards import PHRASINGS, Checker, fuzz, measure, references
from megatron_vapo.data.prompts import MATH_TEMPLATE, read_prompts
from megatron_vapo.errors import RecipeError
from megatron_vapo.rewards import REWARDS, get_reward
from megatron_vapo.rewards.math import math_dapo, math_verify_reward

Sample = tuple[str, str]
"""(response, reference answer)"""


def gsm8k(data: Path, split: str) -> tuple[list[Sample], list[Sample]]:
    """GSM8K's reference solutions as responses to the template: as they are, and with one added to the answer."""
    path = data / "gsm8k" / f"{split}.jsonl"
    solutions = [json.loads(line)["answer"] for line in path.open()]
    right, wrong = [], []
    for prompt, solution in zip(read_prompts(path, template=MATH_TEMPLATE), solutions, strict=True):
        reasoning, _, answer = solution.rpartition("####")
        changed = int(answer.replace(",", "")) + 1
        right.append((f"{reasoning}Answer: {answer.strip()}", prompt.answer))
        wrong.append((f"{reasoning}Answer: {changed}", prompt.answer))
    return right, wrong


def without_separators(samples: list[Sample]) -> list[Sample]:
    return [(response.replace(",", ""), answer) for response, answer in samples]


@pytest.mark.parametrize("split", ["train", "test"])
def test_math_dapo_on_all_of_gsm8k(shared_data: Path, split: str) -> None:
    right, wrong = gsm8k(shared_data, split)
    assert [sample for sample in right + without_separators(right) if math_dapo(*sample) != 1.0] == []
    assert [sample for sample in wrong if math_dapo(*sample) != -1.0] == []


def test_math_verify_on_part_of_gsm8k(shared_data: Path) -> None:
    right, wrong = (samples[:200] for samples in gsm8k(shared_data, "test"))
    assert [sample for sample in right if math_verify_reward(*sample) != 1.0] == []
    assert [sample for sample in wrong if math_verify_reward(*sample) != -1.0] == []


@pytest.mark.parametrize("phrasing", sorted(PHRASINGS))
def test_every_reference_in_every_phrasing(shared_data: Path, phrasing: str) -> None:
    errors, faults = measure(math_verify_reward, PHRASINGS[phrasing], references(shared_data)[::7])
    assert faults == []
    assert (errors.rejected, errors.accepted) == (0, 0) and errors.wrong >= 3 * errors.right > 3000


@pytest.mark.parametrize("reward", [math_dapo, math_verify_reward])
def test_every_aime_answer_is_told_from_every_other(shared_data: Path, reward: Checker) -> None:
    answers = sorted({prompt.answer for prompt in read_prompts(shared_data / "aime-2024.parquet")})
    for given in answers:
        right = [answer for answer in answers if reward(f"So it is.\nAnswer: {given}", answer) == 1.0]
        assert right == [given]


HALF = r"\frac{1}{2}"

# Stated behaviour: (what stands after "Answer:", reference, does math_dapo take it, does math_verify)
SPELLINGS = [
    ("34", "34", True, True),
    ("  34  ", "34", True, True),
    ("$34$", "34", True, True),
    (r"\$34", "34", True, True),
    ("x = 34", "34", True, True),
    (r"\boxed{34}", "34", True, True),
    (r"$\boxed{34}$", "34", True, True),
    (r"\text{34}", "34", True, True),
    (r"34^\circ", "34", True, True),
    ("34 cm", "34", True, True),
    ("1,080", "1080", True, True),
    ("1080", "1,080", True, True),
    (r"1{,}080", "1080", True, True),
    ("-3", "-3", True, True),
    (r"\frac12", HALF, True, True),
    (r"$\sqrt2$", r"\sqrt{2}", True, True),
    ("there are $34$ of them", "34", True, True),
    ("34 dollars", "34", True, True),
    ("$34.$", "34", True, True),
    # DAPO's rule compares strings:
    ("34.", "34", False, True),
    ("34.0", "34", False, True),
    ("034", "34", False, True),
    (r"\dfrac{1}{2}", HALF, False, True),
    ("1/2", HALF, False, True),
    ("0.5", HALF, False, True),
    ("34 apples", "34", False, True),
    ("34%", "34", False, True),  # the rule: a percent sign is a unit
    (".5", "5", False, False),
    (".5", "0.5", False, True),
    ("68/2", "34", False, True),
    (r"2\sqrt{289}", "34", False, True),
    (r"\{2, 1\}", r"\{1, 2\}", False, True),
    ("(1, 2]", "(1,2]", True, True),
    ("(1, 2)", "(1,2]", False, False),
    ("5 or 7", "5", False, False),
    (r"\leq 34", "34", False, False),
    ("34_{7}", "34", False, False),
    # What others' users met (docs/known_faults.md):
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}", False, False),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}", False, False),
    (r"\frac{2}{2^{100}}", r"\frac{1}{2^{99}}", False, True),
    (r"2^{-99}", r"\frac{1}{2^{99}}", False, True),
    (r"\frac{1}{3 \cdot 2^{2006}}", r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", False, False),
    (r"1.414214", r"\sqrt{2}", False, False),
    (r"\sqrt{8}/2", r"\sqrt{2}", False, True),
    (r"1, 3, 5, \ldots, 2n-1", r"1, 2, \ldots, n", False, False),
    (r"1,2,\ldots,n", r"1, 2, \ldots, n", True, True),
    (r"D = (0, 1.5)", "D = (0, 1)", False, False),
    ("21, 36, and 82", r"19, 46, \text{ and } 82", False, False),
    (r"1 + \frac{1}{\mathrm{e}}", r"1 - \frac{1}{\mathrm{e}}", False, False),
    (r"1 - \frac{1}{5}", r"1 - \frac{1}{\mathrm{e}}", False, False),
    (r"1 - \frac{1}{e}", r"1 - \frac{1}{\mathrm{e}}", False, True),
    ("2021", r"\pm 2021", False, False),
    ("1:00", "12:00", False, False),
    ("1:4:9", "1:2:3", False, False),
    (r"4\sqrt(2)", "4", False, False),
    (r"4\sqrt(2)", r"4\sqrt{2}", False, True),
    ("3*x-1*y+13=0", "3x + 4y + 14=0", True, False),
    ("0", "3x + 4y + 14=0", True, False),
    ("x = 0", "3x + 4y + 14=0", True, False),
    ("6x + 8y + 28 = 0", "3x + 4y + 14=0", True, True),
    (r"y = -\frac{1}{2}x + \frac{3}{4}", "2x+4y-3=0", False, True),
    (r"y = -\frac{1}{2}x + \frac{1}{4}", "2x+4y-3=0", False, False),
    ("x + y = 25", "x^2 + y^2 = 25", True, False),
    ("m + n = 34", "34", True, True),
    ("34", "m + n = 34", True, True),
    ("(1,4.5)", r"(1,\frac{9}{2})", False, True),
    ("(1,4.5)", r"(1,\frac{7}{2})", False, False),
    ("[0, 1]", "(0, 1)", False, False),
    ("016", "16", False, True),
    ("0.0833333333333333", r"\frac{1}{12}", False, False),  # the rule: a rounded number is another one
    (r"m \geq \sqrt{2}", r"[\sqrt{2}, \infty)", False, False),  # the library's: a set is not asked for as a relation
    ("9^{9^{9^9}}", "34", False, False),
    ("10^{10^{10}}", "34", False, False),
    ("((9^{99999})^{99999})^{99999}", "34", False, False),
    ("(10!)!", "34", False, False),
    (r"\sum_{k=1}^{99999999} k^k", "34", False, False),
    # Wrong for both:
    ("35", "34", False, False),
    ("-34", "34", False, False),
    ("3", "34", False, False),
    ("134", "34", False, False),
    ("34, 35", "34", False, False),
    ("34 or 35", "34", False, False),
    ("2 2/3", "2", False, False),
    ("10^{20}", "10", False, False),
    ("thirty-four", "34", False, False),
    ("", "34", False, False),
]


@pytest.mark.parametrize(("given", "reference", "dapo", "verify"), SPELLINGS)
def test_spellings(given: str, reference: str, dapo: bool, verify: bool) -> None:
    response = f"We find 7 and then 12.\n\nAnswer: {given}"
    assert math_dapo(response, reference) == (1.0 if dapo else -1.0)
    assert math_verify_reward(response, reference) == (1.0 if verify else -1.0)


@pytest.mark.parametrize(
    ("response", "dapo", "verify"),
    [
        ("Answer: 34", True, True),
        ("ANSWER : 34", True, True),
        ("Final answer:\n34", True, True),
        ("**Final Answer:**\n\\boxed{34}", False, True),
        ("Answer: 35. No!\nAnswer: 34", True, True),
        ("Answer: 34\nAnswer: 35", False, False),
        ("**Answer:** 34", False, True),
        ("Answer: **34**", False, True),
        ("The result is 34", False, False),
        (r"so \boxed{34}", False, True),
        (r"so \boxed{34}, or rather \boxed{35}", False, False),
        (r"\boxed{34} but Answer: 35", False, False),
        ("16 + 18 = 34\n#### 34", False, True),
        ("16 + 18 = 34\n#### $34\nThis follows from the above.", False, True),
        ("#### 3. Add them up\nso \\boxed{34}", False, True),
        ("Answer:", False, False),
        ("", False, False),
        ("Answer: 34\n" + "x" * 280, True, True),
        ("Answer: 34\n" + "x" * 300, False, False),
        ("Answer: " + "(" * 250 + "34", False, False),
        ("Answer: \\frac{{{", False, False),
    ],
)
@pytest.mark.filterwarnings("error")
def test_where_the_answer_is_looked_for(response: str, dapo: bool, verify: bool) -> None:
    assert math_dapo(response, "34") == (1.0 if dapo else -1.0)
    assert math_verify_reward(response, "34") == (1.0 if verify else -1.0)


@pytest.mark.parametrize("name", REWARDS)
def test_no_text_breaks_a_checker(name: str) -> None:
    found = fuzz(get_reward(name).function, 400)
    assert (found.exceptions, found.slow) == ([], [])


def test_a_reference_that_math_verify_cannot_read_is_not_the_responses_fault() -> None:
    with pytest.raises(ValueError, match="cannot read the reference"):
        math_verify_reward("Answer: 34", "")


# The table of names


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_known_names(name: str) -> None:
    assert get_reward(name).function("no answer here", "34") == -1.0


def test_the_users_own_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_user.py").write_text("def length(response, answer):\n    return len(response)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert get_reward("rewards_of_a_user:length").function("four", "") == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math_verfy", "did you mean math_verify"),
        ("mathdapo", "did you mean math_dapo"),
        ("zzz", "known are chained_arithmetic, derivation, long_derivation, math_dapo, math_verify"),
        ("no_such_package_here:reward", "is it on PYTHONPATH"),
        (":reward", "cannot import"),
        ("json:no_such_function", "has no function 'no_such_function'"),
        ("math:pi", "has no function 'pi'"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        get_reward(name)
