"""A prompt source of one's own, derivations that grow as the policy learns: docs/add_a_prompt_source.md explains it.

PYTHONPATH=. megatron-vapo train recipes/tiny.yaml name=levels data.train=examples.levels:Levels
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vapo.data.derivation import MAX_STEPS, MIN_STEPS, OPERATIONS, Problem
from megatron_vapo.data.source import PromptResult, PromptSource


class Levels(PromptSource):
    """Makes derivations of at most `level` lines, and of one more once enough responses are right.

    first: the level that it begins with.
    aim: the share of right responses to the newest prompts.
    window: how many prompts those are.
    """

    def __init__(self, seed: int, first: int = MIN_STEPS, aim: float = 0.3, window: int = 16) -> None:
        self.seed, self.aim, self.window = seed, aim, window
        self.level, self.drawn, self.rates = first, 0, list[float]()

    def draw(self, count: int) -> list[dict[str, object]]:
        numbers = range(self.drawn, self.drawn + count)
        self.drawn += count
        return [self.row(number) for number in numbers]

    def row(self, number: int) -> dict[str, object]:
        rng = random.Random(f"{self.seed} {number}")
        steps = rng.choices(list(OPERATIONS), k=rng.randint(MIN_STEPS, self.level))
        problem = Problem(rng.randrange(10), "".join(steps))
        return {"prompt": problem.prompt, "answer": problem.answer}

    def update(self, results: Sequence[PromptResult]) -> None:
        self.rates += [sum(outcome > 0 for outcome in r.outcomes) / len(r.outcomes) for r in results]
        self.rates = self.rates[-self.window :]
        if len(self.rates) == self.window and sum(self.rates) >= self.aim * self.window:
            self.level, self.rates = min(self.level + 1, MAX_STEPS), []

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "drawn": self.drawn, "rates": self.rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.level, self.drawn, self.rates = state["level"], state["drawn"], list(state["rates"])

    def metrics(self) -> dict[str, float]:
        return {"level": self.level}
