"""The recipes of the paper's experiment say what the papers say, and differ only where they say they do."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vapo.checkpoint.run_folder import changed_keys
from megatron_vapo.config import Recipe
from megatron_vapo.recipe.load import load_recipe, to_yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def read(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml")


def differences(name: str, other: str) -> dict[str, object]:
    """Settings of a recipe that another has otherwise, names aside."""
    changes = changed_keys(to_yaml(read(other)), to_yaml(read(name)))
    return {key: new for key, (_, new) in changes.items() if key not in ("name", "run_dir")}


def test_vapo_32b_is_section_5_1_of_the_paper() -> None:
    recipe = read("vapo_32b")
    assert (recipe.rollout.prompts_per_step, recipe.rollout.samples_per_prompt) == (512, 16)
    assert recipe.minibatch_size == 512 and recipe.steps * 16 in range(4990, 5001)
    assert (recipe.actor.optimizer.learning_rate, recipe.critic.optimizer.learning_rate) == (1e-6, 2e-6)
    algorithm = recipe.algorithm
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.alpha, algorithm.gamma) == (0.2, 0.28, 0.05, 1.0)
    assert (algorithm.lambda_critic, algorithm.positive_lm_coefficient) == (1.0, 0.1)
    assert algorithm.decoupled_gae and algorithm.length_adaptive_gae and algorithm.loss_reduction == "token"
    assert not (algorithm.value_clip or algorithm.dual_clip or algorithm.whiten_advantages)
    assert recipe.value_pretraining.enabled and recipe.value_pretraining.max_steps == 50
    assert (recipe.critic.init, recipe.rollout.max_response_tokens) == ("reward_model", 16384 + 4096)
    assert (recipe.evaluation.samples, recipe.evaluation.sampling.top_p) == (32, 0.7)
    assert not recipe.rollout.dynamic_sampling


def test_vapo_32b_fp8_changes_how_linear_layers_compute() -> None:
    fp8 = {f"{role}.precision.linear": "fp8" for role in ("actor", "critic")}
    assert differences("vapo_32b_fp8", "vapo_32b") == fp8 | {"algorithm.importance.mode": "truncate"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("no_value_pretraining", {"value_pretraining.enabled": False}),
        ("no_decoupled_gae", {"algorithm.decoupled_gae": False}),
        (
            "no_decoupled_gae_lambda_1",
            {"algorithm.decoupled_gae": False, "algorithm.length_adaptive_gae": False, "algorithm.lambda_policy": 1.0},
        ),
        ("no_length_adaptive_gae", {"algorithm.length_adaptive_gae": False}),
        ("no_clip_higher", {"algorithm.clip_high": 0.2}),
        ("no_token_level_loss", {"algorithm.loss_reduction": "sample"}),
        ("no_positive_lm_loss", {"algorithm.positive_lm_coefficient": 0.0}),
        ("no_group_sampling", {"rollout.prompts_per_step": 8192, "rollout.samples_per_prompt": 1}),
    ],
)
def test_an_ablation_changes_one_thing(name: str, changes: dict[str, object]) -> None:
    assert differences(f"ablations/{name}", "vapo_32b") == changes


def test_every_row_of_table_1_has_an_ablation() -> None:
    assert len(list((RECIPES / "ablations").glob("*.yaml"))) == 7 + 1  # "without decoupled GAE" can be read in two ways


def test_baselines_share_batch_data_and_evaluation() -> None:
    vapo = read("vapo_32b")
    for name in ("ppo_32b", "grpo_32b", "dapo_32b"):
        recipe = read(name)
        assert (recipe.responses_per_step, recipe.minibatch_size) == (8192, 512)
        assert (recipe.data, recipe.reward, recipe.evaluation) == (vapo.data, vapo.reward, vapo.evaluation)
        assert recipe.actor == vapo.actor and recipe.steps == vapo.steps


def test_ppo_is_the_papers_vanilla_ppo() -> None:
    recipe = read("ppo_32b")
    algorithm = recipe.algorithm
    assert (recipe.rollout.prompts_per_step, recipe.rollout.samples_per_prompt) == (8192, 1)
    assert not (algorithm.decoupled_gae or algorithm.length_adaptive_gae or recipe.value_pretraining.enabled)
    assert (algorithm.lambda_policy, algorithm.clip_high, algorithm.loss_reduction) == (0.95, 0.2, "sample")
    assert recipe.critic.init == "reward_model"


def test_dapo_is_grpo_with_its_four_changes() -> None:
    changes = differences("dapo_32b", "grpo_32b")
    assert changes == {
        "algorithm.clip_high": 0.28,
        "algorithm.loss_reduction": "token",
        "algorithm.dual_clip": 10.0,
        "rollout.dynamic_sampling": True,
    }


def test_sao_is_the_papers() -> None:
    """The ratio to the rollout policy within [0.2, 4]; 10 steps with a fixed policy; one response a prompt."""
    recipe = read("sao_32b")
    algorithm = recipe.algorithm
    assert (algorithm.old_logprobs, algorithm.beyond_clip) == ("rollout", "mask")
    assert (1 - algorithm.clip_low, 1 + algorithm.clip_high) == pytest.approx((0.2, 4.0))
    assert (algorithm.lambda_critic, algorithm.positive_lm_coefficient) == (1.0, 0.0)
    assert algorithm.decoupled_gae and algorithm.length_adaptive_gae
    assert (recipe.critic.frozen, recipe.critic.epochs, recipe.epochs) == ("attention", 2, 1)
    assert (recipe.actor.optimizer.learning_rate, recipe.critic.optimizer.learning_rate) == (1e-6, 5e-6)
    assert recipe.value_pretraining.enabled and recipe.value_pretraining.max_steps == 10
    assert (recipe.rollout.samples_per_prompt, recipe.responses_per_step) == (1, 8192)


ONE_EACH = ["rollout.prompts_per_step=256", "rollout.samples_per_prompt=1"]


@pytest.mark.parametrize(
    ("algorithm", "name", "batch"),
    [
        ("grpo", "tiny_grpo", []),
        ("vapo", "tiny", []),
        ("ppo", "tiny_ppo", ONE_EACH),
        ("vc_ppo", "tiny_vc_ppo", ONE_EACH),
        ("sao", "sao_tiny", [*ONE_EACH, "actor.optimizer.learning_rate=5e-5"]),
        ("dapo", "tiny_dapo", ["rollout.dynamic_sampling_rounds=4", "reward.overlong.cache_tokens=40"]),
    ],
)
def test_an_algorithm_on_the_command_line_is_the_published_recipe(algorithm: str, name: str, batch: list[str]) -> None:
    chosen = load_recipe(RECIPES / "tiny.yaml", [f"algorithm={algorithm}", f"name={name}", *batch])
    assert chosen == read(name)


def test_folders_of_the_site_reach_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in (("VAPO_MODELS", "/models"), ("VAPO_DATA", "/data"), ("VAPO_RUNS", "/runs")):
        monkeypatch.setenv(name, folder)
    recipe = read("vapo_32b")
    assert recipe.model.path == "/models/Qwen2.5-32B" and recipe.critic.reward_model == "/models/Qwen2.5-32B-reward"
    assert recipe.data.train == "/data/dapo-math-17k.jsonl" and recipe.run_dir == "/runs/vapo_32b"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_called_as_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem
