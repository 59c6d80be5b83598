"""A loss or an advantage that cannot work is refused before a model is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_vapo.errors import RecipeError
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.recipe.plugins import check_plugins

HERE = __name__
TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"


def fine(part, logprobs, *, scale: float = 1.0):
    return part.mean(-scale * logprobs), {"scale": torch.tensor(scale)}


def reads_values(part, logprobs, values):
    return part.mean(values * logprobs), {}


def share_alone(part, logprobs):
    return part.mean(logprobs)


def per_token(part, logprobs):
    return logprobs, {}


def plain_number(part, logprobs):
    return part.mean(logprobs), {"half": 0.5}


def without_gradient(part, advantages):
    return part.mean(advantages), {}


def taken_name(part, logprobs):
    return part.mean(logprobs), {"entropy": part.mean(logprobs)}


def advantage(batch, *, floor: float = 0.0):
    return batch.per_token(batch.rewards)


def advantage_of_values(batch, values):
    return values, values


def check(*overrides: str) -> None:
    check_plugins(load_recipe(TINY, overrides))


@pytest.fixture
def refusal() -> Callable[..., str]:
    def refusal(*overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            check(*overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refusal


def test_what_can_work_passes() -> None:
    check()
    check(f"algorithm.loss={HERE}:fine", "algorithm.options={scale: 2}")
    check(f"algorithm.loss={HERE}:reads_values")
    check(f"algorithm.advantage={HERE}:advantage", "rollout.samples_per_prompt=1", "minibatch_size=16")
    check(f"algorithm.advantage={HERE}:advantage_of_values", "algorithm.critic=true")
    both = f"algorithm.loss={HERE}:fine", f"algorithm.advantage={HERE}:advantage"
    check(*both, "algorithm.options={scale: 2, floor: -1}")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("share_alone", "return a pair"),
        ("per_token", "the share must be a scalar tensor"),
        ("plain_number", "half must be a scalar tensor"),
        ("without_gradient", "has no gradient"),
        ("taken_name", "another metric is called actor/entropy"),
        ("nowhere", "has no function 'nowhere'"),
    ],
)
def test_a_loss_is_tried(refusal: Callable[..., str], function: str, message: str) -> None:
    text = refusal(f"algorithm.loss={HERE}:{function}")
    assert message in text and f"{HERE}:{function}" in text


def test_options_belong_to_a_function(refusal: Callable[..., str]) -> None:
    assert "no setting scale of no loss and no advantage of one's own" in refusal("algorithm.options.scale=1")
    own = f"algorithm.loss={HERE}:fine"
    assert "no setting scal of loss" in (text := refusal(own, "algorithm.options.scal=1")) and "known are scale" in text
    assert "algorithm.options.scale: Value 'much'" in refusal(own, "algorithm.options.scale=much")


def test_a_critic_is_there_where_values_are_read(refusal: Callable[..., str]) -> None:
    reads, does_not = f"algorithm.advantage={HERE}:advantage_of_values", f"algorithm.advantage={HERE}:advantage"
    assert "reads the critic's values: set algorithm.critic=true" in refusal(reads)
    assert "does not read the critic's values: set algorithm.critic=false" in refusal(does_not, "algorithm.critic=true")
    text = refusal(does_not, f"algorithm.loss={HERE}:reads_values")
    assert "reads values, which only a critic gives" in text
    for advantage_name in ("gae", "group"):
        assert "set it to null" in refusal(f"algorithm.advantage={advantage_name}", "algorithm.critic=true")


def test_a_correction_that_a_loss_does_not_read_is_refused(refusal: Callable[..., str]) -> None:
    overrides = f"algorithm.loss={HERE}:fine", "algorithm.importance.mode=truncate"
    assert "does not read importance" in refusal(*overrides)
    check("algorithm.importance.mode=truncate")


@pytest.mark.parametrize(
    ("override", "hint"), [("loss=clib", "clip"), ("advantage=gea", "gae"), ("loss=x", "are clip")]
)
def test_unknown_names(refusal: Callable[..., str], override: str, hint: str) -> None:
    assert hint in refusal(f"algorithm.{override}")
