"""Prompts of sources: drawn in their shares, by the first process alone, from where a checkpoint left them; and what an
author's mistakes are answered with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from megatron_vapo.config import DataConfig, PromptFile
from megatron_vapo.data import source as source_module
from megatron_vapo.data.order import PromptOrder
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.data.source import PromptResult, PromptSource, SourcePrompts, make_source
from megatron_vapo.data.training_prompts import TrainingPrompts
from megatron_vapo.errors import CheckpointError, DataError, RecipeError
from tests.conftest import build_tokenizer
from tests.sampling.conftest import Meeting

TOKENIZER = build_tokenizer()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "on_first_rank", lambda action: action())


class Numbers(PromptSource):
    """The numbers from `first` on; what it is told is in its state."""

    def __init__(self, seed: int, first: int = 0) -> None:
        self.number, self.told = first, list[list[Any]]()

    def draw(self, count: int) -> Sequence[Mapping[str, object]]:
        self.number += count
        return [{"prompt": f"^{n}=", "answer": n, "n": (n,)} for n in range(self.number - count, self.number)]

    def state_dict(self) -> Mapping[str, Any]:
        return {"number": self.number, "told": self.told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.number, self.told = state["number"], state["told"]

    def update(self, results: Sequence[PromptResult]) -> None:
        self.told = [[result.row["n"], list(result.outcomes)] for result in results]

    def metrics(self) -> Mapping[str, float]:
        return {"told": len(self.told)}


def prompts_of(source: PromptSource, name: str = "numbers", **settings: Any) -> SourcePrompts:
    return SourcePrompts(name, source, TOKENIZER, DataConfig(train="", **settings), None, (1,))


def texts(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


FILE = [Prompt(f"f{n}", str(n), n, "f", dataset="file") for n in range(5)]


def mixed(*firsts: int) -> TrainingPrompts:
    """A file, and sources of equal weight, which begin at these numbers; the file has twice their weight."""
    order = PromptOrder([5, *(None for _ in firsts)], seed=0, weights=[2.0, *(1.0 for _ in firsts)])
    sources = {n: prompts_of(Numbers(0, first), f"from {first}") for n, first in enumerate(firsts, start=1)}
    return TrainingPrompts(FILE, order, sources)


def test_sources_have_their_shares_beside_files() -> None:
    taken = mixed(0, 500).take(40)
    of_set = {name: [p.text for p in taken if p.dataset == name] for name in ("file", "from 0", "from 500")}
    assert of_set["from 0"] == [f"^{n}=" for n in range(10)] and of_set["from 500"][-1] == "^509="
    plain = PromptOrder([5], seed=0).take(20)
    assert of_set["file"] == [f"f{n}" for n in plain]
    for count in range(40):  # the quota, at any time
        had = sum(prompt.dataset == "from 0" for prompt in taken[:count])
        assert abs(had - count / 4) < 1


def test_a_prompt_of_a_source_is_like_one_of_a_file() -> None:
    (prompt,) = prompts_of(Numbers(0, 12)).draw(1)
    assert (prompt.text, prompt.answer, prompt.row["n"], prompt.made) == ("^12=", "12", [12], True)
    assert prompt.source == "numbers, row 0" and len(prompt.token_ids) == 4


def test_it_goes_on_from_any_state() -> None:
    for before, after in itertools.product((0, 1, 6), (1, 5)):
        whole, first, second = mixed(0, 500), mixed(0, 500), mixed(0, 500)
        expected = whole.take(before), whole.take(after)
        for draws in (whole, first):
            taken = expected[0] if draws is whole else draws.take(before)
            draws.update((prompt, [1.0, -1.0]) for prompt in taken)
        second.load_state_dict(first.state_dict())
        assert second.take(after) == expected[1]
        assert second.metrics() == first.metrics()
        for prompt in expected[0]:  # what a checkpoint keeps of an unfinished group
            made = {"dataset": prompt.dataset, "row": prompt.row} if prompt.made else None
            assert second.find(prompt.index, made) == prompt


def test_a_source_hears_of_its_own_prompts_alone() -> None:
    draws = mixed(0, 500)
    taken = draws.take(8)
    draws.update((prompt, [1.0, -1.0, float(prompt.answer)]) for prompt in taken)
    states = draws.state_dict()["sources"]
    assert states["from 0"]["state"]["told"] == [[[0], [1.0, -1.0, 0.0]], [[1], [1.0, -1.0, 1.0]]]
    assert [row for row, _ in states["from 500"]["state"]["told"]] == [[500], [501]]
    assert draws.metrics() == {"data/from 0/told": 2.0, "data/from 500/told": 2.0}


def test_the_first_process_alone_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, meeting = texts(mixed(0).take(9)), Meeting(3)

    def on_first_rank(action: Callable[[], Any]) -> Any:
        return meeting.gather_objects(action() if meeting.rank.number == 0 else None)[0]

    monkeypatch.setattr(source_module, "on_first_rank", on_first_rank)

    def work(first: int) -> tuple[list[str], dict[str, float]]:
        source = prompts_of(Numbers(0, first), "from 0")  # others than the first one's would show
        draws = TrainingPrompts(FILE, PromptOrder([5, None], seed=0, weights=[2.0, 1.0]), {1: source})
        taken = draws.take(4) + draws.take(5)
        draws.update((prompt, [1.0]) for prompt in taken)
        return texts(taken), draws.metrics()

    results = meeting.run([lambda first=first: work(first) for first in (0, 100, 200)])
    assert [taken for taken, _ in results] == [expected] * 3
    assert [metrics for _, metrics in results] == [{"data/from 0/told": 3.0}] * 3


def test_long_prompts_are_refused_or_dropped_and_counted() -> None:
    short = prompts_of(Numbers(0, 8), max_prompt_tokens=3)
    with pytest.raises(DataError, match=r"2 of 4 prompts have more than 3 tokens, .*numbers, row 2"):
        short.draw(4)

    class Some(Numbers):
        def draw(self, count: int) -> Sequence[Mapping[str, object]]:
            return [row if row["answer"] % 3 else row | {"prompt": "^1234"} for row in super().draw(count)]

    dropping = prompts_of(Some(0, 1), max_prompt_tokens=3, long_prompts="drop")
    assert texts(dropping.draw(4)) == ["^1=", "^2=", "^4=", "^5="]
    assert (dropping.drawn, dropping.dropped) == (5, 1)
    again = prompts_of(Some(0, 1), max_prompt_tokens=3, long_prompts="drop")
    again.load_state_dict(dropping.state_dict())
    assert texts(again.draw(2)) == ["^7=", "^8="] and again.dropped == 2
    with pytest.raises(DataError, match="after 100 draws still 2 prompts short"):
        prompts_of(Numbers(0, 1000), max_prompt_tokens=3, long_prompts="drop").draw(2)


class Forgets(Numbers):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The state is lost."""


class Fails(Numbers):
    def draw(self, count: int) -> Sequence[Mapping[str, object]]:
        raise KeyError("table")


class Stops(Numbers):
    def draw(self, count: int) -> Sequence[Mapping[str, object]]:
        return super().draw(count)[:3]


class Unanswered(Numbers):
    def draw(self, count: int) -> Sequence[Mapping[str, object]]:
        return [{"prompt": "^1="}] * count


class HoldsASet(Numbers):
    def state_dict(self) -> Mapping[str, Any]:
        return {"seen": {1, 2}}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Forgets, "numbers: row 0 is .* and, drawn again after load_state_dict"),
        (Fails, "numbers: draw failed: KeyError"),
        (Stops, r"numbers: draw\(32\) returned 3 rows"),
        (Unanswered, "numbers, row 0: answer is missing"),
        (HoldsASet, "numbers: state_dict returned what JSON cannot hold"),
    ],
)
def test_mistakes_are_found_before_the_run(source: type[Numbers], words: str) -> None:
    with pytest.raises(DataError, match=words):
        prompts_of(source(0)).first_prompts()


def test_looking_at_its_first_prompts_changes_nothing() -> None:
    numbers = prompts_of(Numbers(0))
    assert texts(numbers.first_prompts()) == [f"^{n}=" for n in range(32)]
    assert texts(numbers.draw(1)) == ["^0="] and numbers.drawn == 1


def test_a_state_that_the_source_refuses() -> None:
    class Guarded(Numbers):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            raise ValueError("the table has changed")

    with pytest.raises(CheckpointError, match="numbers: load_state_dict failed: ValueError: the table has changed"):
        prompts_of(Guarded(0)).load_state_dict({"drawn": 0, "dropped": 0, "state": {}})


class Abstract(PromptSource):
    def draw(self, count: int) -> Sequence[Mapping[str, object]]:
        return []


class Broken(Numbers):
    def __init__(self, seed: int) -> None:
        raise OSError("no table")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("TOKENIZER", {}, "has no function 'TOKENIZER'|must be a class derived from"),
        ("texts", {}, "must be a class derived from megatron_vapo.data.source.PromptSource"),
        ("Abstract", {}, "has no load_state_dict and no state_dict"),
        ("Numbers", {"start": 3}, "does not take seed and its options: got an unexpected keyword argument 'start'"),
        ("Broken", {}, "OSError: no table"),
    ],
)
def test_classes_that_are_no_source(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_source(PromptFile(f"{__name__}:{name}", options=options), seed=0)


def test_a_class_is_called_with_seed_and_options() -> None:
    made = make_source(PromptFile(f"{__name__}:Numbers", options={"first": 7}), seed=0)
    assert made.state_dict() == {"number": 7, "told": []}
