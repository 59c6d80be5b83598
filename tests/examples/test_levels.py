"""The example source makes right derivations, grows with what is answered right, and repeats itself."""

from __future__ import annotations

from examples.levels import Levels
from megatron_vapo.data.derivation import MAX_STEPS, MIN_STEPS, OPERATIONS
from megatron_vapo.data.source import PromptResult


def test_its_answers_are_right() -> None:
    for row in Levels(seed=3, first=MAX_STEPS).draw(50):
        prompt, answer = str(row["prompt"]), str(row["answer"])
        value, operations = int(prompt[1]), prompt[3:-1:2]
        assert MIN_STEPS <= len(operations) <= MAX_STEPS and len(answer) == 4 * len(operations)
        for place, operation in enumerate(operations):
            line = answer[4 * place : 4 * place + 4]
            assert line == f"{prompt[2 + 2 * place]}{value}{operation}{OPERATIONS[operation](value)}"
            value = int(line[3])


def test_the_level_rises_with_what_is_right_and_no_further_than_there_are_labels() -> None:
    source = Levels(seed=0, aim=0.5, window=2)
    right, wrong = PromptResult({}, (1.0, -1.0)), PromptResult({}, (-1.0, 0.0))
    source.update([right])
    assert source.metrics() == {"level": MIN_STEPS}  # one prompt is no window
    source.update([wrong, right])
    assert source.metrics() == {"level": MIN_STEPS}
    source.update([right])
    assert source.metrics() == {"level": MIN_STEPS + 1}
    for _ in range(2 * MAX_STEPS):
        source.update([right])
    assert source.metrics() == {"level": MAX_STEPS}


def test_seeds_differ_and_draws_do_not_depend_on_how_they_are_cut() -> None:
    whole, pieces = Levels(seed=1), Levels(seed=1)
    assert whole.draw(7) == pieces.draw(3) + pieces.draw(4) != Levels(seed=2).draw(7)
