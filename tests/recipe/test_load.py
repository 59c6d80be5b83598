"""What a recipe can get wrong, and how recipes build on each other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.config import ImportanceConfig, Recipe
from megatron_vapo.errors import RecipeError
from megatron_vapo.recipe.load import ALGORITHMS, MOVED, load_recipe, to_yaml, without_effect
from megatron_vapo.recipe.schema import SCHEMA, value_of
from megatron_vapo.recipe.validate import doubts

REPOSITORY = Path(__file__).resolve().parents[2]

GOOD = {
    "name": "good",
    "minibatch_size": 4,
    "model": {"path": "base"},
    "data": {"train": "train.jsonl"},
    "critic": {"init": "actor"},
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2},
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write(tmp_path / "good.yaml", GOOD)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    """The one line that a refused recipe answers with."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Composition.


def test_settings_that_a_recipe_leaves_out_keep_their_defaults(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.model.path == "base"
    assert recipe.algorithm == Recipe().algorithm
    assert recipe.run_dir == "runs/good"


@pytest.mark.parametrize(
    ("overrides", "mode"),
    [
        ([], "none"),
        (["algorithm.importance.mode=mask"], "mask"),
        (["rollout.quantization=fp8"], "truncate"),
        (["rollout.quantization=fp8", "algorithm.importance.mode=mask"], "mask"),
        (["rollout.quantization=fp8", "algorithm.importance.mode=none"], "none"),
        (["rollout.quantization=fp8", "algorithm.old_logprobs=rollout"], "none"),
        (["rollout.sglang.kv_cache=fp8", "rollout.engine=sglang"], "truncate"),
        (["rollout.sglang.kv_cache=fp8"], "none"),  # another engine's setting
    ],
)
def test_fp8_rollout_is_corrected_unless_the_recipe_says_otherwise(
    recipe_file: Path, overrides: list[str], mode: str
) -> None:
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.resolved_algorithm == replace(recipe.algorithm, importance=ImportanceConfig(mode=mode))
    assert recipe.algorithm.importance.high == 2.0


def test_fp8_rollout_that_no_engine_has_is_refused(recipe_file: Path) -> None:
    assert "set model.dtype=bfloat16" in message(recipe_file, "rollout.quantization=fp8", "rollout.engine=sglang")


def test_a_base_is_read_first_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared" / "base.yaml", GOOD | {"steps": 7, "seed": 3})
    child = write(
        tmp_path / "child.yaml", {"base": "shared/base.yaml", "name": "child", "model": {"dtype": "bfloat16"}}
    )
    recipe = load_recipe(child)
    assert (recipe.name, recipe.steps, recipe.seed) == ("child", 7, 3)
    assert (recipe.model.path, recipe.model.dtype) == ("base", "bfloat16")


def test_of_several_bases_the_later_wins_and_bases_have_bases(tmp_path: Path) -> None:
    write(tmp_path / "good.yaml", GOOD | {"steps": 1, "seed": 1, "epochs": 1})
    write(tmp_path / "first.yaml", {"base": "good.yaml", "steps": 2, "seed": 2})
    write(tmp_path / "second.yaml", {"seed": 3})
    recipe = load_recipe(write(tmp_path / "child.yaml", {"base": ["first.yaml", "second.yaml"], "epochs": 4}))
    assert (recipe.steps, recipe.seed, recipe.epochs) == (2, 3, 4)


def test_the_same_base_twice_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path / "good.yaml", GOOD)
    for name in ("left", "right"):
        write(tmp_path / f"{name}.yaml", {"base": "good.yaml"})
    assert load_recipe(write(tmp_path / "child.yaml", {"base": ["left.yaml", "right.yaml"]})).name == "good"


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"base": "b.yaml"})
    write(tmp_path / "b.yaml", {"base": "a.yaml"})
    text = message(tmp_path / "a.yaml")
    assert "circle" in text and "a.yaml" in text and "b.yaml" in text


def test_a_missing_base_names_the_recipe_that_wants_it(tmp_path: Path) -> None:
    text = message(write(tmp_path / "child.yaml", {"base": "nowhere.yaml"}))
    assert "nowhere.yaml: no such recipe" in text and "child.yaml" in text


@pytest.mark.parametrize("base", [5, {"path": "x.yaml"}, [3], True])
def test_a_base_is_a_path_or_a_list_of_paths(tmp_path: Path, base: object) -> None:
    assert "base=" in message(write(tmp_path / "child.yaml", {"base": base}))


def test_overrides_win_and_of_two_the_later(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["name=other", "steps=3", "rollout.sampling.top_p=0.5", "steps=4"])
    assert (recipe.name, recipe.steps, recipe.rollout.sampling.top_p) == ("other", 4, 0.5)
    assert recipe.run_dir == "runs/other"
    assert load_recipe(recipe_file, ["actor.virtual_pipeline=null"]).actor.virtual_pipeline is None


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path, recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["actor.optimizer.learning_rate=3e-7", "algorithm.dual_clip=10", "seed=5"])
    assert load_recipe(write(tmp_path / "resolved.yaml", to_yaml(recipe))) == recipe


PUBLISHED = sorted(path for path in (REPOSITORY / "recipes").rglob("*.yaml") if path.parent.name != "parts")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_recipes_are_valid(path: Path) -> None:
    load_recipe(path)


# Files and words that are no recipe.


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    assert "no such recipe" in message(tmp_path / "nowhere.yaml")
    assert "no such recipe" in message(tmp_path)
    assert "line 2, column 1" in message(write(tmp_path / "broken.yaml", "steps: 1\n\tname: x\n"))
    assert "duplicate" in message(write(tmp_path / "twice.yaml", "steps: 1\nsteps: 2\n"))
    assert "mapping" in message(write(tmp_path / "list.yaml", "- steps\n"))
    (tmp_path / "latin.yaml").write_bytes("name: Käse\n".encode("latin-1"))
    assert "latin.yaml" in message(tmp_path / "latin.yaml")


@pytest.mark.parametrize("word", ["steps", "--steps=3", "=3", "-x", "steps:3", ""])
def test_words_that_are_no_override(recipe_file: Path, word: str) -> None:
    text = message(recipe_file, word)
    assert repr(word) in text and "key=value" in text


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("stepz=3", "did you mean steps?"),
        ("rollout.temprature=1", "did you mean rollout.sampling.temperature?"),
        ("rollout.sampling.temperatur=1", "did you mean rollout.sampling.temperature?"),
        ("critic.optimizer.lr=1", "learning_rate"),
        ("learning_rate=1", "did you mean actor.optimizer.learning_rate?"),
        ("actor.reward_model=x", "did you mean critic.reward_model?"),
        ("critic.logprobs=chunked", "did you mean actor.logprobs?"),
        ("actor.optimizer.beta3=0.9", "did you mean actor.optimizer.beta"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(recipe_file: Path, override: str, nearest: str) -> None:
    text = message(recipe_file, override)
    assert f"unknown key {override.partition('=')[0]}" in text and nearest in text
    assert override in text  # where it comes from


def test_an_unknown_key_in_a_base_names_that_file(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", {"rollout": {"sampling": {"topp": 1}}})
    text = message(write(tmp_path / "child.yaml", GOOD | {"base": "base.yaml"}))
    assert "base.yaml: unknown key rollout.sampling.topp (did you mean rollout.sampling.top_p?)" in text


def test_where_nothing_is_near_the_keys_of_the_group_are_listed(recipe_file: Path) -> None:
    text = message(recipe_file, "qqqq=1")
    assert "known here: name, run_dir" in text and "actor.optimizer" not in text


@pytest.mark.parametrize(
    "override",
    [
        "steps=soon",
        "steps=1.5",
        "steps=true",
        "steps=null",
        "steps=[1]",
        "steps={a: 1}",
        "algorithm.gamma=high",
        "algorithm.gamma=true",
        "rollout.dynamic_sampling=maybe",
        "model.dtype=float16",
        "critic.init=random",
        "rollout.engine=vllm",
        "data.template=Math",
        "model.path=null",
        "name=[a]",
    ],
)
def test_a_value_of_the_wrong_type_names_key_and_source(recipe_file: Path, override: str) -> None:
    text = message(recipe_file, override)
    assert override.partition("=")[0] in text and text.startswith(override)


@pytest.mark.parametrize("content", [{"actor": 3}, {"actor": None}, {"actor": {"optimizer": "adam"}}, {"data": ["x"]}])
def test_a_group_is_not_a_value(tmp_path: Path, content: dict[str, object]) -> None:
    assert "is a group of settings" in message(write(tmp_path / "group.yaml", GOOD | content))


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    text = message(write(tmp_path / "empty.yaml", ""))
    assert all(key in text for key in ("name", "model.path", "data.train"))


def test_references_to_other_keys(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["minibatch_size=${rollout.prompts_per_step}"]).minibatch_size == 4
    assert "nothing" in message(recipe_file, "name=${nothing}")
    assert "name" in message(recipe_file, "name=${name}")
    assert "name" in message(recipe_file, "name=${")


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_spelling_is_refused_with_the_new_one(recipe_file: Path, tmp_path: Path, old: str, new: str) -> None:
    assert message(recipe_file, f"{old}=1") == f"{old}=1: {old} is called {new} now"
    group, _, name = old.partition(".")
    assert f"{old} is called {new} now" in message(write(tmp_path / "old.yaml", GOOD | {group: {name: 1}}))
    assert old not in SCHEMA and new in SCHEMA


# Settings that are named in vain.


def vain(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    return without_effect(load_recipe(path, overrides), path, overrides)


def test_settings_without_effect_are_named_with_what_they_need(recipe_file: Path, tmp_path: Path) -> None:
    assert vain(recipe_file) == []
    assert vain(recipe_file, ["algorithm.lambda_policy=0.9", "steps=3", "algorithm.alpha=0.1"]) == [
        "algorithm.lambda_policy=0.9: algorithm.lambda_policy has no effect: it acts where "
        "algorithm.length_adaptive_gae=false"
    ]
    overrides = ["algorithm.length_adaptive_gae=false", "algorithm.lambda_policy=0.9"]
    assert vain(recipe_file, overrides) == []
    own = write(tmp_path / "own.yaml", GOOD | {"algorithm": {"preset": "grpo", "gamma": 0.9}, "critic": {"epochs": 2}})
    of_file = vain(own)
    assert len(of_file) == 2
    assert all(str(own) in sentence and "algorithm.advantage=gae" in sentence for sentence in of_file)


def test_a_reduction_that_a_loss_of_ones_own_does_without(recipe_file: Path) -> None:
    reduction, summed = "algorithm.loss_reduction=sample", "algorithm.loss=examples.dr_grpo:summed"
    dr_grpo = [summed, "algorithm.options.max_tokens=128", "algorithm.positive_lm_coefficient=0"]
    assert vain(recipe_file, [reduction]) == vain(recipe_file, dr_grpo) == []
    assert vain(recipe_file, [*dr_grpo, reduction]) == [
        f"{reduction}: algorithm.loss_reduction has no effect: it acts where algorithm.loss takes means by part.mean, "
        "or algorithm.kl_coefficient is above 0"
    ]
    assert vain(recipe_file, [*dr_grpo, reduction, "algorithm.kl_coefficient=0.1"]) == []
    assert vain(recipe_file, ["algorithm.loss=examples.gspo:gspo", reduction]) == []


def test_a_file_does_not_answer_for_what_an_override_did_to_it(recipe_file: Path, tmp_path: Path) -> None:
    """It names settings of a critic, which `algorithm=grpo` leaves without one; nor for its bases and algorithms."""
    assert "critic" in GOOD and vain(recipe_file, ["algorithm=grpo"]) == []
    (child := tmp_path / "child.yaml").write_text(f"base: {recipe_file}\nalgorithm: dapo\n")
    assert vain(child) == []


# Algorithms.

NAMES = ("dapo", "grpo", "ppo", "sao", "vapo", "vc_ppo")


def differences(one: Recipe, other: Recipe) -> set[str]:
    return {key for key in SCHEMA if not SCHEMA[key].is_group and value_of(one, key) != value_of(other, key)}


def test_every_algorithm_is_a_file_of_the_package() -> None:
    assert tuple(sorted(path.stem for path in ALGORITHMS.iterdir())) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", NAMES)
def test_an_algorithm_on_the_command_line_wins_over_the_recipes(recipe_file: Path, before: str, name: str) -> None:
    """Whatever algorithm the recipe has: all that tells algorithms apart is chosen."""
    plain = load_recipe(recipe_file, [f"algorithm={name}"])
    (child := recipe_file.with_name("child.yaml")).write_text(f"base: good.yaml\nalgorithm: {before}\n")
    changed = load_recipe(child, [f"algorithm={name}"])
    silent = {key for key in SCHEMA if not all(condition.holds(plain) for condition in SCHEMA[key].acts)}
    assert differences(plain, changed) <= silent
    assert (before == name) or differences(load_recipe(child), changed)


def test_algorithms_are_what_their_names_say(recipe_file: Path) -> None:
    dapo, grpo, ppo, sao, vapo, vc_ppo = (load_recipe(recipe_file, [f"algorithm={name}"]) for name in NAMES)
    assert differences(vapo, Recipe()) <= {"name", "run_dir", "minibatch_size", "model.path", "data.train"} | {
        "critic.init",
        "rollout.prompts_per_step",
        "rollout.samples_per_prompt",
    }
    assert differences(grpo, dapo) == {"algorithm.clip_high", "algorithm.loss_reduction", "rollout.dynamic_sampling"}
    assert differences(sao, vapo) == {"critic.frozen", "critic.epochs"} | {
        f"algorithm.{key}"
        for key in ("old_logprobs", "beyond_clip", "clip_low", "clip_high", "positive_lm_coefficient")
    }
    assert differences(ppo, vc_ppo) == {"algorithm.decoupled_gae", "value_pretraining.enabled"}
    assert not grpo.uses_critic and not dapo.uses_critic and ppo.uses_critic
    assert grpo.algorithm.clip_high == grpo.algorithm.clip_low and grpo.algorithm.loss_reduction == "sample"
    assert grpo.algorithm.positive_lm_coefficient == ppo.algorithm.positive_lm_coefficient == 0


def test_single_settings_win_over_an_algorithm(tmp_path: Path, recipe_file: Path) -> None:
    for overrides in (["algorithm.clip_high=0.3", "algorithm=grpo"], ["algorithm=grpo", "algorithm.clip_high=0.3"]):
        algorithm = load_recipe(recipe_file, overrides).algorithm
        assert (algorithm.advantage, algorithm.clip_high) == ("group", 0.3)
    own = GOOD | {"algorithm": {"preset": "dapo", "dual_clip": 10}, "rollout": {"dynamic_sampling": False}}
    recipe = load_recipe(write(tmp_path / "own.yaml", own), ["minibatch_size=8192"])
    assert (recipe.algorithm.dual_clip, recipe.algorithm.loss_reduction) == (10, "token")
    assert not recipe.uses_critic and not recipe.rollout.dynamic_sampling
    assert load_recipe(recipe_file, ["algorithm=dapo", "algorithm=ppo"]).uses_critic


@pytest.mark.parametrize("override", ["algorithm=gpro", "algorithm.preset=x", "algorithm.preset=[grpo]"])
def test_an_unknown_algorithm_is_refused_with_the_known_ones(recipe_file: Path, override: str) -> None:
    text = message(recipe_file, override)
    assert text.startswith(f"{override}: no algorithm is called") and "dapo, grpo, ppo, sao, vapo, vc_ppo" in text


# Values that cannot work.


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize(
    "key", ["algorithm.gamma", "actor.optimizer.learning_rate", "value_pretraining.target_explained_variance"]
)
def test_numbers_are_finite(recipe_file: Path, key: str, value: str) -> None:
    assert message(recipe_file, f"{key}={value}").startswith(f"{key}={value.replace('.', '')}: must be a finite number")


OUT_OF_BOUNDS = {
    "at least 1": (
        *("minibatch_size", "epochs", "max_skipped_updates", "rollout.prompts_per_step", "rollout.samples_per_prompt"),
        *("rollout.max_response_tokens", "rollout.transformers.batch_size", "rollout.dynamic_sampling_rounds"),
        *("value_pretraining.epochs", "value_pretraining.judged_rollouts", "value_pretraining.max_steps"),
        *("data.max_prompt_tokens", "evaluation.samples", "rollout.window_tokens"),
        *("evaluation.problems", "checkpoint.keep", "actor.tensor_parallel", "actor.pipeline_parallel"),
        *("actor.virtual_pipeline", "actor.context_parallel", "actor.expert_parallel", "actor.expert_tensor_parallel"),
        *("actor.first_stage_layers", "actor.last_stage_layers", "actor.micro_batch_tokens", "critic.tensor_parallel"),
        *("critic.micro_batch_tokens", "rollout.sglang.tensor_parallel", "rollout.sglang.servers", "critic.epochs"),
        *("rollout.sglang.max_cache_tokens", "rollout.over_sampling", "rollout.bucket_mib", "limits.sampled_tokens"),
        *("algorithm.importance.high", "rollout.sglang.concurrency", "reward.workers", "reward.concurrency"),
        *("alarms.steps", "environment.max_turns", "environment.workers", "environment.concurrency"),
    ),
    "above 0": (
        *("algorithm.alpha", "reward.timeout_seconds", "rollout.sampling.top_p", "evaluation.sampling.top_p"),
        *("rollout.step_seconds", "alarms.value_scale", "alarms.logprob_drift"),
        *("rollout.sglang.request_seconds", "rollout.max_logprob_difference", "rollout.sglang.start_seconds"),
        "critic.head.sigma",
        *("rollout.sglang.stall_seconds", "rollout.sglang.memory_fraction", "limits.wall_clock_minutes"),
        "environment.timeout_seconds",
    ),
    "at least 0": (
        *("steps", "seed", "evaluation.every", "checkpoint.every", "reward.overlong.cache_tokens"),
        *("observe.samples_per_step", "algorithm.clip_low", "algorithm.clip_high", "algorithm.value_clip"),
        *("algorithm.positive_lm_coefficient", "algorithm.kl_coefficient"),
        *("actor.moe_aux_loss", "actor.optimizer.learning_rate"),
        *("actor.optimizer.warmup_steps", "actor.optimizer.weight_decay", "actor.optimizer.epsilon"),
        *("actor.optimizer.decay_steps", "actor.optimizer.final_learning_rate"),
        *("actor.optimizer.clip_grad", "actor.optimizer.beta1", "critic.optimizer.learning_rate"),
        *("critic.optimizer.beta2", "rollout.lag", "rollout.max_version_lag"),
        *("rollout.sglang.retries", "rollout.sglang.max_restarts"),
        *("rollout.check_weights_every", "actor.precision.first_layers", "actor.precision.last_layers"),
        *("checkpoint.keep_every", "limits.grace_seconds", "rollout.sampling.temperature"),
        *("evaluation.sampling.temperature", "observe.tokens_mib", "alarms.flat_values", "alarms.entropy_collapse"),
    ),
    "between 0 and 1": (
        *("algorithm.gamma", "algorithm.lambda_policy", "algorithm.lambda_critic", "reward.failing_share"),
        *("alarms.critic_collapse", "alarms.truncation", "algorithm.importance.low"),
    ),
}


def test_every_bound_of_a_setting_is_tested() -> None:
    """Those that roles have, with one of them."""
    tested = {key for keys in OUT_OF_BOUNDS.values() for key in keys}
    tested |= {"limits.silent_seconds", "algorithm.dual_clip", "alarms.critic_gradient", "critic.head.bins"}
    tested |= {k.replace("critic.", "actor.") for k in tested} | {key.replace("actor.", "critic.") for key in tested}
    tested |= {key.replace("actor.", "reference.") for key in tested}
    assert {key for key, setting in SCHEMA.items() if setting.bounds is not None} <= tested


@pytest.mark.parametrize(("bound", "key"), [(bound, key) for bound, keys in OUT_OF_BOUNDS.items() for key in keys])
def test_lower_bounds(recipe_file: Path, bound: str, key: str) -> None:
    for value in {"at least 1": (0, -3), "above 0": (0, -1), "at least 0": (-1,), "between 0 and 1": (-1,)}[bound]:
        text = message(recipe_file, f"{key}={value}")
        assert text.startswith(f"{key}={value}") and f"must be {bound}" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.gamma=1.5", "between 0 and 1"),
        ("algorithm.lambda_policy=1.01", "between 0 and 1"),
        ("algorithm.lambda_critic=2", "between 0 and 1"),
        ("rollout.sampling.top_p=1.1", "at most 1"),
        ("evaluation.sampling.top_p=2", "at most 1"),
        ("rollout.sglang.memory_fraction=1.01", "at most 1"),
        ("algorithm.clip_low=1", "below 1"),
        ("actor.optimizer.beta1=1", "below 1"),  # Adam divides by 1 - beta
        ("critic.optimizer.beta2=1", "below 1"),
        ("algorithm.dual_clip=1", "above 1, or null"),
        ("alarms.critic_gradient=1", "above 1, or null"),
        ("alarms.critic_collapse=1.1", "between 0 and 1"),
        ("alarms.truncation=1.1", "between 0 and 1"),
        ("limits.silent_seconds=1.5", "at least 2, or 0"),
        ("critic.head.bins=1", "at least 2"),
        (f"seed={2**63}", "below 2**63"),
    ],
)
def test_upper_bounds(recipe_file: Path, override: str, words: str) -> None:
    text = message(recipe_file, override)
    assert text.startswith(override.partition("=")[0]) and words in text


IN_FLIGHT = ["rollout.in_flight_weight_updates=true", "rollout.lag=1", "rollout.engine=sglang"]
IN_FLIGHT += ["rollout.sglang.placement=separate"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["minibatch_size=3"], ["minibatch_size=3", "the 8 responses", "rollout.prompts_per_step"]),
        (["minibatch_size=16"], ["minibatch_size=16", "8 responses"]),
        (
            ["reward.overlong.cache_tokens=30", "rollout.max_response_tokens=20"],
            ["reward.overlong.cache_tokens=30", "rollout.max_response_tokens=20"],
        ),
        (
            ["algorithm.advantage=group", "rollout.samples_per_prompt=1"],
            ["algorithm.advantage=group", "rollout.samples_per_prompt", "2 or more"],
        ),
        (
            ["rollout.dynamic_sampling=true", "rollout.samples_per_prompt=1"],
            ["rollout.dynamic_sampling", "rollout.samples_per_prompt", "2 or more"],
        ),
        (
            ["rollout.partial=true", "rollout.max_version_lag=1"],
            ["rollout.partial", "rollout.over_sampling", "above 1"],
        ),
        (
            ["rollout.partial=true", "rollout.over_sampling=1.5"],
            ["rollout.partial", "rollout.max_version_lag to 1 or more"],
        ),
        (
            ["rollout.partial=true", "rollout.over_sampling=1.5", "rollout.lag=2", "rollout.max_version_lag=2"],
            ["rollout.partial", "rollout.max_version_lag to 3 or more"],
        ),
        ([*IN_FLIGHT, "rollout.dynamic_sampling=true"], ["rollout.dynamic_sampling=true", "leave one"]),
        ([*IN_FLIGHT, "rollout.window_tokens=9"], ["rollout.window_tokens=9"]),
        ([*IN_FLIGHT, "data.train=examples.my_source:Mine"], ["data.train=examples.my_source:Mine", "learns from"]),
        ([*IN_FLIGHT, "rollout.over_sampling=1.5"], ["rollout.over_sampling=1.5"]),
        ([*IN_FLIGHT, "rollout.step_seconds=9"], ["rollout.step_seconds=9.0", "rollout.sglang.request_seconds"]),
        (
            ["rollout.window_tokens=8", "algorithm.advantage=group"],
            ["rollout.window_tokens=8", "algorithm.advantage=group", "advantage=gae, or window_tokens to null"],
        ),
        *(
            (["rollout.window_tokens=8", *more], ["rollout.window_tokens=8", more[0], "leave one of them out"])
            for more in (
                ["rollout.partial=true", "rollout.over_sampling=1.5", "rollout.max_version_lag=1"],
                ["rollout.over_sampling=1.5"],
                ["rollout.dynamic_sampling=true"],
                ["rollout.step_seconds=60.0"],
                ["algorithm.mask_truncated=true"],
                ["environment.name=examples.calculator:Calculator"],
            )
        ),
        (
            ["algorithm.importance.mode=mask", "algorithm.old_logprobs=rollout"],
            ["algorithm.importance.mode=mask", "algorithm.old_logprobs=rollout", "turn one of them off"],
        ),
        (
            ["algorithm.importance.low=0.5", "algorithm.importance.mode=truncate"],
            ["algorithm.importance.low=0.5", "algorithm.importance.mode=truncate", "mode=mask"],
        ),
        (["algorithm.importance.low=0.5"], ["algorithm.importance.low=0.5", "algorithm.importance.mode=auto"]),
        (
            ["critic.head.kind=hl_gauss", "critic.head.low=1.2"],
            ["critic.head.low=1.2", "below critic.head.high=1.2"],
        ),
        (
            ["critic.head.kind=hl_gauss", "critic.init=reward_model", "critic.reward_model=x"],
            ["critic.head.kind=hl_gauss", "critic.init to actor or fresh_head"],
        ),
        (
            ["critic.head.kind=hl_gauss", "algorithm.value_clip=0.2"],
            ["algorithm.value_clip=0.2", "critic.head.kind=hl_gauss", "null"],
        ),
        (
            ["algorithm.beyond_clip=mask", "algorithm.dual_clip=3"],
            ["algorithm.dual_clip=3", "algorithm.beyond_clip=mask", "null"],
        ),
        (
            ["rollout.sampling.temperature=0"],
            ["rollout.sampling.temperature=0", "above 0", "evaluation.sampling.temperature=0"],
        ),
        (["critic.init=reward_model"], ["critic.reward_model", "critic.init to actor or fresh_head"]),
        (["critic.reward_model=rm"], ["critic.reward_model", "critic.init=actor", "critic.init=reward_model"]),
        (
            ["value_pretraining.checkpoint=x", "value_pretraining.enabled=false"],
            ["value_pretraining.checkpoint", "value_pretraining.enabled=false"],
        ),
        (
            ["alarms.stop=[truncation, flat_values]", "algorithm.advantage=group"],
            ["alarms.stop names flat_values,", "algorithm.advantage=group has none"],
        ),
        (["actor.optimizer.final_learning_rate=1e-7"], ["actor.optimizer.final_learning_rate", "decay_steps"]),
        (
            ["critic.optimizer.warmup_steps=9", "critic.optimizer.decay_steps=9"],
            ["critic.optimizer.decay_steps=9", "above critic.optimizer.warmup_steps=9"],
        ),
        (["actor.sequence_parallel=true"], ["actor.sequence_parallel", "actor.tensor_parallel above 1"]),
        (["critic.sequence_parallel=true"], ["critic.sequence_parallel", "critic.tensor_parallel above 1"]),
        (["actor.virtual_pipeline=2"], ["actor.virtual_pipeline=2", "actor.pipeline_parallel above 1"]),
        (["actor.virtual_pipeline=1", "actor.pipeline_parallel=2"], ["actor.virtual_pipeline=1", "null"]),
        (["critic.first_stage_layers=2"], ["critic.first_stage_layers", "critic.pipeline_parallel above 1"]),
        (["actor.last_stage_layers=2"], ["actor.last_stage_layers", "actor.pipeline_parallel above 1"]),
        (
            [
                *("actor.virtual_pipeline=2", "actor.pipeline_parallel=2", "actor.context_parallel=2"),
                *("actor.tensor_parallel=2", "actor.sequence_parallel=true", "actor.micro_batch_tokens=1004"),
            ],
            ["actor.micro_batch_tokens=1004", "multiple of 8"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_settings_that_contradict_each_other(recipe_file: Path, overrides: list[str], words: list[str]) -> None:
    text = message(recipe_file, *overrides)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "rollout.engine=sglang",
            "rollout.sglang.tensor_parallel=2",
            "rollout.sglang.placement=separate",
            "rollout.sglang.servers=2",
        ],
        ["rollout.partial=true", "rollout.over_sampling=1.5", "rollout.max_version_lag=1"],
        ["rollout.over_sampling=1.5", "rollout.step_seconds=60", "rollout.sglang.request_seconds=30"],
        ["rollout.window_tokens=8", "rollout.lag=1", "rollout.sglang.request_seconds=30"],
        ["algorithm.importance.mode=truncate", "algorithm.importance.high=1"],
        ["algorithm.importance={mode: mask, level: geometric, low: 0.5, high: 5}"],
        ["algorithm.old_logprobs=rollout", "algorithm.beyond_clip=mask", "algorithm={clip_low: 0.8, clip_high: 3}"],
        ["alarms.stop=[truncation, entropy_collapse, logprob_drift]", "algorithm.advantage=group"],
        ["evaluation.sampling.temperature=0", "evaluation.samples=1"],
        ["algorithm.old_logprobs=rollout", "rollout.max_logprob_difference=0.05", "rollout.check_weights_every=0"],
    ],
)
def test_rollout_settings_that_go_together(recipe_file: Path, overrides: list[str]) -> None:
    load_recipe(recipe_file, overrides)


@pytest.mark.parametrize(
    ("overrides", "doubted"),
    [
        (["rollout.lag=2", "algorithm.importance.mode=none"], True),
        (["algorithm.importance.mode=none"], False),
        (["rollout.lag=2"], False),
        (["rollout.lag=2", "algorithm.old_logprobs=rollout", "algorithm.importance.mode=none"], False),
    ],
)
def test_a_lag_without_a_correction_is_doubted(recipe_file: Path, overrides: list[str], doubted: bool) -> None:
    found = doubts(load_recipe(recipe_file, overrides))
    assert len(found) == doubted
    assert all("rollout.lag=2" in text and "algorithm.importance.mode=none" in text for text in found)


def test_a_critic_that_is_not_used_is_not_judged(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["algorithm.advantage=group", "critic.init=reward_model"])
    assert not recipe.uses_critic


# Anything at all.

KEYS = st.sampled_from(
    ["steps", "name", "actor", "actor.optimizer.beta1", "critic.init", "run_dir", "rollout.sampling"]
)
VALUES = (
    st.text(max_size=12)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["null", "true", "~", "???", "[]", "{}"])
)
OVERRIDES = st.text(max_size=20) | st.builds("{}={}".format, KEYS | st.text("ab.[]$", max_size=6), VALUES)


@pytest.mark.slow
@given(st.lists(OVERRIDES, max_size=3))
def test_any_overrides_give_a_recipe_or_one_line_that_says_why_not(overrides: list[str]) -> None:
    path = REPOSITORY / "recipes" / "tiny.yaml"
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        assert "\n" not in str(error) or any("\n" in override for override in overrides)
    else:
        assert isinstance(recipe, Recipe)


@pytest.mark.slow
@given(st.recursive(VALUES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3)))
def test_any_yaml_gives_a_recipe_or_a_recipe_error(content: object) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "any.yaml", content if isinstance(content, str) else yaml.safe_dump(content))
        with pytest.raises(RecipeError):
            load_recipe(path)


def test_a_wrong_recipe_is_refused_before_any_slow_import() -> None:
    code = (
        "import sys; from megatron_vapo.cli import main; code = main(['train', 'recipes/tiny.yaml', 'steps=soon']); "
        "slow = {'torch', 'megatron', 'transformers'} & set(sys.modules); print(code, sorted(slow))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "2 []"
