"""The example reward says what its docstring says, and a recipe takes it by name."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from examples import my_reward
from megatron_vapo.cli import main
from megatron_vapo.config import RewardConfig
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.rewards import RewardInput, get_reward, get_rewards
from megatron_vapo.rewards.scorer import RewardScorer
from tests.conftest import REPOSITORY

NAME = "examples.my_reward:last_number"


def test_it_is_found_by_its_name():
    assert get_reward(NAME).function is my_reward.last_number


def test_what_its_docstring_shows():
    failed, tried = doctest.testmod(my_reward)
    assert tried == 2 and failed == 0


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [("-3", "-3", 1.0), ("12", "2", -1.0), ("1, then 2", "1", -1.0), ("", "0", -1.0), ("7.50", "7.5", 1.0)],
)
def test_other_responses(response, answer, score):
    assert my_reward.last_number(response, answer) == score


def test_a_recipe_names_it(
    make_checkpoint: Callable[..., Path], tiny_problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The line that the example's docstring shows, on a recipe whose model and data exist here."""
    recipe = {
        "name": "own_reward",
        "minibatch_size": 8,
        "model": {"path": str(make_checkpoint("qwen2"))},
        "critic": {"init": "actor"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 16},
        "data": {"train": str(tiny_problems)},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    words = ["train", str(path), f"reward.name={NAME}", "--dry-run"]
    assert f"reward.name={NAME}" in my_reward.__doc__
    assert main(words) == 0
    assert "ready to run" in capsys.readouterr().out
    assert main([*words[:2], "reward.name=examples.my_reward:last_numbre", "--dry-run"]) == 2
    assert "no function 'last_numbre'" in capsys.readouterr().err


def sample(response: str, tokens: int = 10, reason: str = "stop", **row: object) -> RewardInput:
    return RewardInput("", response, "", row, 1, tokens, reason)


def test_the_budget_of_a_row():
    judged = [my_reward.within_budget(sample("", *rest, budget=20)) for rest in [(20,), (21,), (5, "length")]]
    assert [one["score"] for one in judged] == [0.0, -1.0, -1.0]
    assert [one["used"] for one in judged] == [1.0, 21 / 20, 0.25]


def test_programs_run_side_by_side_and_within_their_time():
    """As a run calls it; the third program never ends, and its process does."""
    settings = RewardConfig("examples.my_reward:passes_its_tests", timeout_seconds=1.5)
    programs = ["def f(x): return x + 1", "def f(x): return x", "while True: pass"]
    with RewardScorer(get_rewards(settings), settings) as scorer:
        begun = [scorer.begin(sample(program, tests="assert f(1) == 2")) for program in programs]
        scorer.wait(begun)
        assert [score.outcome for score in scorer.finish(begun)] == [1.0, -1.0, -1.0]
        assert scorer.failures["passes_its_tests"].timed_out == 1


def test_the_recipe_with_several_rewards(tmp_path: Path):
    document = (REPOSITORY / "docs" / "add_a_reward.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: {REPOSITORY / 'recipes' / 'tiny.yaml'}\n{block}")
    settings = load_recipe(path).reward
    assert [reward.name for reward in get_rewards(settings)] == ["math_verify", "within_budget", "helpful"]
    assert list(settings.add.values()) == [0.1, 0.5]
    again = load_recipe(path, ["reward.name=https://judge/score?key={JUDGE_KEY}", 'reward.add={"math_dapo": 0}']).reward
    assert again.name == "https://judge/score?key={JUDGE_KEY}" and again.add == settings.add | {"math_dapo": 0.0}
