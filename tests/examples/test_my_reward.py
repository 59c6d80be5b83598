"""The example reward says what its docstring says, and a recipe takes it by name."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from examples import my_reward
from megatron_vapo.cli import main
from megatron_vapo.rewards import get_reward

NAME = "examples.my_reward:last_number"


def test_it_is_found_by_its_name():
    assert get_reward(NAME) is my_reward.last_number


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
    words = ["train", str(path), f"reward.name={NAME}", "reward.workers=2", "--dry-run"]
    assert f"reward.name={NAME} reward.workers=2" in my_reward.__doc__
    assert main(words) == 0
    assert "ready to run" in capsys.readouterr().out
    assert main([*words[:2], "reward.name=examples.my_reward:last_numbre", "--dry-run"]) == 2
    assert "no function 'last_numbre'" in capsys.readouterr().err
