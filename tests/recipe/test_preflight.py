"""What can be wrong with model, tokenizer, data and layout: refused in one line, before anything is built."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_vapo.config import SGLangConfig
from megatron_vapo.errors import CheckpointError, DataError, LayoutError, MachineError, RecipeError, UserError
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.recipe.preflight import (
    Inputs,
    _check_devices,
    _check_fp8_rollout,
    _check_node,
    checked_architecture,
    end_tokens,
    load_tokenizer,
    read_evaluation_inputs,
    read_inputs,
)
from megatron_vapo.weights.architecture import read_architecture

ROPE = {"rope_type": "default", "rope_theta": 5e5}
SHAPE = Path(__file__).resolve().parents[2] / "recipes" / "shapes" / "Qwen2.5-7B"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen2")


@pytest.fixture
def base(pristine: Path, tmp_path: Path) -> Path:
    """A base model to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "base"))


@pytest.fixture
def settings(tmp_path: Path, base: Path, tiny_problems: Path) -> dict[str, object]:
    return {
        "name": "preflight",
        "run_dir": str(tmp_path / "run"),
        "minibatch_size": 4,
        "model": {"path": str(base)},
        "critic": {"init": "actor"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_response_tokens": 16},
        "data": {"train": str(tiny_problems)},
        "reward": {"name": "chained_arithmetic"},
    }


@pytest.fixture
def read(settings: dict[str, object], tmp_path: Path) -> Callable[..., Inputs]:
    """Preflight of a good recipe with overrides."""

    def read(*overrides: str) -> Inputs:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        return read_inputs(load_recipe(path, overrides))

    return read


@pytest.fixture
def refusal(read: Callable[..., Inputs], tmp_path: Path) -> Callable[..., str]:
    """The one line that a kind of mistake is answered with; nothing was started or written."""

    def refusal(kind: type[UserError], *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            read(*overrides)
        text = str(caught.value)
        assert type(caught.value) is kind, text
        assert "\n" not in text
        assert not (tmp_path / "run").exists()
        return text

    return refusal


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None deletes."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def split_in_two(base: Path) -> dict[str, object]:
    """Rewrite the weights as two files with an index, which is returned."""
    tensors = load_file(base / WEIGHTS)
    names = sorted(tensors)
    files = {"one.safetensors": names[: len(names) // 2], "two.safetensors": names[len(names) // 2 :]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, base / file)
    (base / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (base / INDEX).write_text(json.dumps(index))
    return index


def test_what_is_right_is_read(read: Callable[..., Inputs], base: Path, tiny_problems: Path, tmp_path: Path) -> None:
    inputs = read(f"evaluation.data={tiny_problems}", "evaluation.problems=7")
    assert (inputs.architecture.layers, inputs.architecture.vocab) == (4, 43)
    assert inputs.critic_architecture is not None and inputs.critic_architecture.classifier
    assert (len(inputs.prompts), len(inputs.held_out), inputs.end_ids) == (40, 7, (1,))
    split_in_two(base)
    assert read("algorithm.advantage=group").critic_architecture is None
    assert not (tmp_path / "run").exists()


def test_an_output_layer_beside_tied_embeddings_is_the_same(
    read: Callable[..., Inputs], refusal: Callable[..., str], base: Path
) -> None:
    """transformers 5 unties the two where they differ."""
    edit(base / "config.json", tie_word_embeddings=True)
    assert "lm_head.weight is not model.embed_tokens.weight" in refusal(CheckpointError)
    tensors = load_file(base / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / WEIGHTS)
    assert read().architecture.tied_embeddings


def test_kernels_need_a_gpu_and_triton(
    read: Callable[..., Inputs], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cuda, spec, words in ((False, object(), "needs a CUDA device"), (True, None, "triton is not installed")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr("megatron_vapo.recipe.preflight.find_spec", lambda _, spec=spec: spec)
        text = refusal(RecipeError, "actor.logprobs=triton")
        assert words in text and "actor.logprobs=chunked" in text
    monkeypatch.setattr("megatron_vapo.recipe.preflight.find_spec", lambda _: object())
    assert read("actor.logprobs=triton").prompts


# The model folder.


def test_a_folder_that_is_no_checkpoint(refusal: Callable[..., str], base: Path, tmp_path: Path) -> None:
    assert "nowhere: no such checkpoint folder" in refusal(CheckpointError, "model.path=nowhere")
    file = base / "config.json"
    assert f"{file}: no such checkpoint folder" in refusal(CheckpointError, f"model.path={file}")
    file.unlink()
    assert f"{base}: not a Hugging Face checkpoint, config.json is missing" in refusal(CheckpointError)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", "config.json: not valid JSON"),
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: not a JSON object"),
        ("{}", "architecture (none) is not supported"),
        ('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}', "GPT2LMHeadModel is not supported; supported"),
        ('{"architectures": "Qwen2ForCausalLM"}', "is not supported"),
        ('{"architectures": ["Qwen2ForCausalLM"]}', "model_type"),
    ],
)
def test_a_configuration_that_says_nothing(refusal: Callable[..., str], base: Path, config: str, words: str) -> None:
    (base / "config.json").write_text(config)
    assert words in refusal(CheckpointError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu, only silu"),
        ({"num_attention_heads": 5}, "5 attention heads are no multiple of 2 key-value heads"),
        ({"num_attention_heads": 0}, "num_attention_heads=0, must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0, must be at least 1"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0, must be at least 1"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type=yarn"),
        (
            {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
            "by type of layer (full_attention, sliding_attention) is not supported; where all layers have the same, "
            f"write it once, as rope_parameters={json.dumps(ROPE)}",
        ),
        ({"rope_scaling": {"full_attention": ROPE}}, "rope_scaling by type of layer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_an_option_that_is_not_supported(
    refusal: Callable[..., str], base: Path, changes: dict[str, object], words: str
) -> None:
    edit(base / "config.json", **changes)
    text = refusal(CheckpointError)
    assert words in text and f"{base}/config.json" in text


ODD = (-1, 0, 2.5, True, "x", [], {})


def test_no_value_in_config_json_gives_a_traceback(pristine: Path, base: Path) -> None:
    config = json.loads((pristine / "config.json").read_text())
    for key in config:
        for value in ODD:
            (base / "config.json").write_text(json.dumps(config | {key: value}))
            try:
                checked_architecture(str(base))
            except CheckpointError as error:
                assert "\n" not in str(error) and str(base) in str(error)


# Weights.


def test_weights_are_missing(refusal: Callable[..., str], base: Path) -> None:
    (base / WEIGHTS).unlink()
    text = refusal(CheckpointError)
    assert f"{base}: weights are missing" in text and WEIGHTS in text
    torch.save({}, base / "pytorch_model.bin")
    text = refusal(CheckpointError)
    assert "pytorch_model.bin" in text and "convert it to safetensors" in text


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_weight_file(refusal: Callable[..., str], base: Path, size: int) -> None:
    whole = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(whole[:size])
    assert f"{base / WEIGHTS}: truncated or damaged" in refusal(CheckpointError)


def test_missing_extra_and_wrong_tensors_are_named_together(refusal: Callable[..., str], base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    del tensors["model.norm.weight"], tensors["model.layers.2.self_attn.q_proj.bias"]
    tensors["model.layers.0.mlp.bias"] = torch.zeros(3)
    tensors["visual.patch"] = torch.zeros(3)
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].T.contiguous()
    save_file(tensors, base / WEIGHTS)
    text = refusal(CheckpointError)
    assert "tensors are missing: model.layers.2.self_attn.q_proj.bias, model.norm.weight;" in text
    assert "does not have: model.layers.0.mlp.bias, visual.patch;" in text
    assert "wrong shapes: model.layers.1.mlp.down_proj.weight (40, 24) instead of (24, 40)" in text


def test_a_long_list_of_tensors_is_cut_and_counted(refusal: Callable[..., str], base: Path) -> None:
    edit(base / "config.json", num_hidden_layers=6, layer_types=None)
    text = refusal(CheckpointError)
    assert "model.layers.4.input_layernorm.weight" in text and "and 16 more" in text  # 12 tensors a layer


def test_an_index_that_does_not_hold(refusal: Callable[..., str], base: Path) -> None:
    index = split_in_two(base)
    name = min(index["weight_map"])
    (base / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {name: "three.safetensors"}}))
    assert f"{base}/three.safetensors: weight file is missing" in refusal(CheckpointError)
    (base / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {name: "two.safetensors"}}))
    text = refusal(CheckpointError)
    assert INDEX in text and f"two.safetensors does not hold {name}" in text
    (base / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"extra": "two.safetensors"}}))
    assert "does not hold extra" in refusal(CheckpointError)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(refusal: Callable[..., str], base: Path, index: str) -> None:
    (base / INDEX).write_text(index)
    assert f"{base / INDEX}: not " in refusal(CheckpointError)


def test_a_classifier_is_no_policy(refusal: Callable[..., str], make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("qwen2", classifier=True)
    text = refusal(CheckpointError, f"model.path={folder}")
    assert str(folder) in text and "model.path must be a language model" in text


# The tokenizer.


def test_a_tokenizer_is_missing_or_damaged(refusal: Callable[..., str], base: Path) -> None:
    whole = (base / "tokenizer.json").read_text()
    (base / "tokenizer.json").write_text(whole[: len(whole) // 2])
    assert f"{base / 'tokenizer.json'}: not valid JSON" in refusal(CheckpointError)
    (base / "tokenizer.json").unlink()
    text = refusal(CheckpointError)
    assert f"{base}: no tokenizer" in text and "tokenizer.json" in text
    (base / "tokenizer.json").write_text(whole)
    (base / "tokenizer_config.json").write_text("")
    assert f"{base / 'tokenizer_config.json'}: not valid JSON" in refusal(CheckpointError)


@pytest.mark.parametrize("ends", ["[[]]", "1.5", '"2"', "true", "[-1]", "{}"])
def test_end_tokens_that_are_none(refusal: Callable[..., str], base: Path, ends: str) -> None:
    (base / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    assert f"{base / 'generation_config.json'}: eos_token_id=" in refusal(CheckpointError)


def test_a_tokenizer_that_fails_in_use(refusal: Callable[..., str], base: Path) -> None:
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": []}))
    assert f"{base}: not a tokenizer that transformers can load" in refusal(CheckpointError)


@pytest.mark.parametrize("content", ["{}", '{"model": null}', '{"model": {"type": "WordLevel", "vocab": 3}}'])
def test_valid_json_that_is_no_tokenizer(refusal: Callable[..., str], base: Path, content: str) -> None:
    (base / "tokenizer.json").write_text(content)
    assert f"{base}: not a tokenizer that transformers can load" in refusal(CheckpointError)


def test_a_tokenizer_of_a_larger_model(refusal: Callable[..., str], base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(base)
    text = refusal(CheckpointError)
    assert "knows 45 tokens" in text and "has only 43" in text and str(base) in text


def test_end_tokens(read: Callable[..., Inputs], refusal: Callable[..., str], base: Path) -> None:
    edit(base / "generation_config.json", eos_token_id=[1, 5])
    assert read().end_ids == (1, 5)
    (base / "generation_config.json").write_text("{")
    assert "generation_config.json: not valid JSON" in refusal(CheckpointError)
    (base / "generation_config.json").unlink()
    assert read().end_ids == (1,)
    edit(base / "config.json", eos_token_id=[1, 2])
    assert read().end_ids == (1, 2)
    edit(base / "config.json", eos_token_id="2")
    assert "config.json: " in refusal(CheckpointError)
    edit(base / "config.json", eos_token_id=None)
    tokenizer = load_tokenizer(str(base), read_architecture(base))
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="names an end token"):
        end_tokens(str(base), tokenizer)


# Data.


def test_a_prompt_file_is_missing_or_empty(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere.jsonl does not exist" in refusal(DataError, "data.train=nowhere.jsonl")
    assert "nowhere.jsonl does not exist" in refusal(DataError, "evaluation.data=nowhere.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl holds no prompts" in refusal(DataError, f"data.train={tmp_path / 'empty.jsonl'}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "^1a+2=|"', "not valid JSON"),
        ('{"prompt": "^1a+2=|"}', "answer is missing"),
        ('{"answer": "12"}', "prompt is missing"),
        ('{"prompt": "", "answer": "12"}', "prompt is empty"),
        ('{"prompt": "^1a+2=|", "answer": NaN}', "a value is missing"),
        ('{"prompt": ["^1a+2=|"], "answer": "12"}', "prompt[0] is not a message"),
        ('["^1a+2=|", "12"]', "expected an object"),
        ("", "is empty"),
    ],
)
@pytest.mark.parametrize("key", ["data.train", "evaluation.data"])
def test_a_malformed_row_is_named_by_file_and_line(
    refusal: Callable[..., str], tmp_path: Path, line: str, words: str, key: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "^3a+4=|", "answer": "37"}}\n{line}\n')
    text = refusal(DataError, f"{key}={path}")
    assert f"{path}, line 2" in text and words in text


def test_a_prompt_is_longer_than_the_limit(refusal: Callable[..., str], tiny_problems: Path) -> None:
    text = refusal(DataError, "data.max_prompt_tokens=5")
    assert "40 of 40 prompts have more than 5 tokens" in text and f"{tiny_problems}, line 1" in text


def written(path: Path, *prompts: str, answer: str = "12") -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt in prompts))
    return path


def test_long_training_prompts_are_dropped_and_counted(
    read: Callable[..., Inputs], refusal: Callable[..., str], tmp_path: Path
) -> None:
    path = written(tmp_path / "mixed.jsonl", "^1a+2=|", "^" + "1" * 20, "^2a+2=|")
    drop = (f"data.train={path}", "data.max_prompt_tokens=9", "data.long_prompts=drop")
    inputs = read(*drop)
    assert ([prompt.index for prompt in inputs.prompts], inputs.dropped) == ([0, 1], 1)
    long = written(tmp_path / "long.jsonl", "^" + "1" * 20)
    assert "1 of 1 prompts have more than 9 tokens" in refusal(DataError, *drop, f"evaluation.data={long}")
    text = refusal(DataError, f"data.train=[{path},{long}]", *drop[1:])
    assert f"{long}: all its prompts have more than data.max_prompt_tokens=9" in text


def test_several_files_lie_one_after_another(read: Callable[..., Inputs], tmp_path: Path) -> None:
    one, two = written(tmp_path / "one.jsonl", "^1", "^2"), written(tmp_path / "two.jsonl", "^2", "^3", "^4")
    files = f"[{one},{{path: {two}, weight: 3, name: second}}]"
    inputs = read(f"data.train={files}", f"evaluation.data=[{two},{one}]", "evaluation.problems=1")
    assert [(p.index, p.dataset, p.text) for p in inputs.prompts] == [
        (0, "one", "^1"), (1, "one", "^2"), (2, "second", "^2"), (3, "second", "^3"), (4, "second", "^4")
    ]  # fmt: skip
    assert [(p.index, p.dataset, p.text) for p in inputs.held_out] == [(0, "two", "^2"), (1, "one", "^1")]


def test_a_source_is_asked_for_its_first_prompts(
    read: Callable[..., Inputs], refusal: Callable[..., str], tiny_problems: Path
) -> None:
    source = "{path: examples.levels:Levels, options: {first: 5}, weight: 2}"
    inputs = read(f"data.train=[{source},{tiny_problems}]", "data.max_prompt_tokens=32")
    assert (len(inputs.prompts), len(inputs.first_made), list(inputs.sources)) == (40, 32, ["Levels"])
    assert [prompt.index for prompt in inputs.prompts] == list(range(40))
    assert all(prompt.made and 8 < len(prompt.text) < 15 for prompt in inputs.first_made)
    short = "data.max_prompt_tokens=32"
    others = read(f"data.train=[{source},{tiny_problems}]", "seed=1", short)
    assert others.fingerprint["data.train"].keys() == inputs.fingerprint["data.train"].keys()
    assert others.digest != inputs.digest == read(f"data.train=[{source},{tiny_problems}]", short).digest
    # What it will make is not known: room is needed for the longest prompt that may come.
    text = refusal(RecipeError, f"data.train=[{source}]", "actor.micro_batch_tokens=40", short)
    assert "actor.micro_batch_tokens=40: smaller than the longest sequence" in text
    assert "does not take seed and its options" in refusal(
        RecipeError, "data.train={path: examples.levels:Levels, options: {level: 5}}"
    )


def test_one_prompt_with_two_answers_in_two_files(refusal: Callable[..., str], tmp_path: Path) -> None:
    one, two = written(tmp_path / "one.jsonl", "^1"), written(tmp_path / "two.jsonl", "^1", answer="13")
    assert f"{two}, line 1: answer '13', but the same prompt has answer '12' at {one}, line 1" in refusal(
        DataError, f"data.train=[{one},{two}]"
    )


def test_control_tokens_in_a_prompt(read: Callable[..., Inputs], refusal: Callable[..., str], tmp_path: Path) -> None:
    path = written(tmp_path / "forged.jsonl", "^1a+2=|", "^1<eos>2")
    for key in ("data.train", "evaluation.data"):
        text = refusal(DataError, f"{key}={path}")
        assert "1 of 2 prompts hold control tokens" in text and f"{path}, line 2" in text and "'<eos>'" in text
    assert read(f"data.train={path}", "data.control_tokens=allow").prompts[1].token_ids.count(1) == 1


def test_a_chat_without_a_template(refusal: Callable[..., str]) -> None:
    assert "no chat template" in refusal(RecipeError, "data.chat=true")


def test_an_unknown_reward(refusal: Callable[..., str]) -> None:
    assert "did you mean chained_arithmetic" in refusal(RecipeError, "reward.name=chained_arithmetics")
    assert "nowhere" in refusal(RecipeError, "reward.name=nowhere:reward")


# Lengths. The longest prompt has 7 tokens.


def test_sequences_must_fit_the_positions_of_the_model(
    read: Callable[..., Inputs], refusal: Callable[..., str]
) -> None:
    read("rollout.max_response_tokens=121")
    text = refusal(RecipeError, "rollout.max_response_tokens=122")
    assert text.startswith("rollout.max_response_tokens=122") and "129 tokens" in text and "actor" in text
    assert "128 positions" in text


def test_sequences_must_fit_the_positions_of_the_critic(
    read: Callable[..., Inputs], refusal: Callable[..., str], make_checkpoint: Callable[..., Path]
) -> None:
    reward_model = make_checkpoint("qwen2", classifier=True, max_position_embeddings=64)
    critic = ("critic.init=reward_model", f"critic.reward_model={reward_model}")
    read(*critic, "rollout.max_response_tokens=57")
    text = refusal(RecipeError, *critic, "rollout.max_response_tokens=58")
    assert "65 tokens" in text and "the critic's model has only 64 positions" in text


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_micro_batch_must_hold_the_longest_sequence(
    read: Callable[..., Inputs], refusal: Callable[..., str], role: str
) -> None:
    read(f"{role}.micro_batch_tokens=23")
    text = refusal(RecipeError, f"{role}.micro_batch_tokens=22")
    assert text.startswith(f"{role}.micro_batch_tokens=22") and "23 tokens" in text


def test_long_problems_that_are_only_evaluated_count_too(refusal: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "^" + "1a+1" * 30, "answer": "1"}))
    assert "137 tokens" in refusal(RecipeError, f"evaluation.data={path}")


def test_a_critic_that_is_not_used_may_be_too_small(read: Callable[..., Inputs]) -> None:
    assert read("algorithm.advantage=group", "critic.micro_batch_tokens=1").critic_architecture is None


# Parallel layouts of a model with 4 layers, 4 heads, 2 key-value heads and a feed-forward size of 40.


@pytest.mark.parametrize(
    ("processes", "layout", "words"),
    [
        (1, "tensor_parallel=2", ["tensor_parallel 2", "does not divide the 1 processes", "multiple of 2"]),
        (6, "tensor_parallel=2 pipeline_parallel=2", ["= 4 does not divide the 6 processes"]),
        (2, "context_parallel=4", ["context_parallel 4", "the 2 processes"]),
        (4, "tensor_parallel=4", ["tensor_parallel=4", "2 key-value heads"]),
        (3, "tensor_parallel=3", ["tensor_parallel=3", "4 attention heads"]),
        (8, "pipeline_parallel=8", ["pipeline_parallel", "8 stages", "4 layers"]),
        (3, "pipeline_parallel=3", ["4 layers do not spread evenly over 3 stages", "first_stage_layers"]),
        (4, "pipeline_parallel=4 virtual_pipeline=2", ["8 stages", "4 layers"]),
        (2, "pipeline_parallel=2 first_stage_layers=5", ["first_stage_layers", "exceed", "4 layers"]),
        (2, "pipeline_parallel=2 first_stage_layers=4", ["0 layers do not spread"]),
        (3, "pipeline_parallel=3 first_stage_layers=1 last_stage_layers=3", ["0 layers do not spread"]),
        (2, "pipeline_parallel=2 first_stage_layers=1 last_stage_layers=1", ["2 of the model's 4 layers"]),
        (2, "pipeline_parallel=2 virtual_pipeline=2 first_stage_layers=1", ["virtual_pipeline needs even stages"]),
        (2, "expert_parallel=2", ["expert_parallel", "no experts"]),
        (2, "expert_tensor_parallel=2", ["no experts"]),
    ],
)
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_layouts_that_processes_or_model_cannot_take(
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
    role: str,
    processes: int,
    layout: str,
    words: list[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    text = refusal(LayoutError, *(f"{role}.{setting}" for setting in layout.split()))
    assert text.startswith(role) and all(word in text for word in words), text


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, "tensor_parallel=2"),
        (8, "tensor_parallel=2 pipeline_parallel=2"),
        (3, "pipeline_parallel=3 first_stage_layers=2"),
        (3, "pipeline_parallel=3 last_stage_layers=2"),
        (2, "pipeline_parallel=2 first_stage_layers=1"),
        (2, "pipeline_parallel=2 first_stage_layers=1 last_stage_layers=3"),
        (2, "pipeline_parallel=2 virtual_pipeline=2"),
        (4, "context_parallel=4"),
    ],
)
def test_layouts_that_fit(
    monkeypatch: pytest.MonkeyPatch, read: Callable[..., Inputs], processes: int, layout: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    read(*(f"{role}.{setting}" for setting in layout.split() for role in ("actor", "critic")))


def test_the_feed_forward_size_must_divide(
    monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str], make_checkpoint: Callable[..., Path]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = make_checkpoint("qwen2", intermediate_size=41)
    text = refusal(LayoutError, f"model.path={folder}", "actor.tensor_parallel=2")
    assert "tensor_parallel=2 does not divide the model's 41 feed-forward size" in text


def test_expert_layouts(
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[..., Inputs],
    refusal: Callable[..., str],
    make_checkpoint: Callable[..., Path],
) -> None:
    model = f"model.path={make_checkpoint('qwen3_moe')}"  # 4 experts of size 16
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "expert_parallel=3 does not divide the model's 4 experts" in refusal(
        LayoutError, model, "actor.expert_parallel=3"
    )
    assert "expert_tensor_parallel=3 does not divide the model's 16 expert" in refusal(
        LayoutError, model, "actor.expert_tensor_parallel=3"
    )
    assert "expert_parallel 2" in refusal(LayoutError, model, "actor.expert_parallel=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    read(model, "actor.expert_parallel=2")
    text = refusal(LayoutError, model, "actor.tensor_parallel=2")
    assert "actor.sequence_parallel=true" in text
    read(model, "actor.tensor_parallel=2", "actor.sequence_parallel=true")


# The critic.


def test_the_critic_s_own_model_decides_its_layout(
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[..., Inputs],
    refusal: Callable[..., str],
    make_checkpoint: Callable[..., Path],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    reward_model = make_checkpoint("qwen2", classifier=True, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    critic = ("critic.init=reward_model", f"critic.reward_model={reward_model}")
    read(*critic, "critic.pipeline_parallel=3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = refusal(LayoutError, *critic, "critic.pipeline_parallel=4")
    assert text.startswith("critic.pipeline_parallel") and "3 layers" in text


def test_a_reward_model_is_a_classifier_with_one_label_and_the_actor_s_vocabulary(
    refusal: Callable[..., str], make_checkpoint: Callable[..., Path], base: Path
) -> None:
    def text_of(folder: Path | str) -> str:
        return refusal(CheckpointError, "critic.init=reward_model", f"critic.reward_model={folder}")

    assert "nowhere: no such checkpoint folder" in text_of("nowhere")
    text = text_of(base)
    assert f"{base}: critic.init=reward_model needs a sequence-classification checkpoint" in text
    assert "critic.init=actor or fresh_head" in text
    larger = make_checkpoint("qwen2", classifier=True, vocab_size=50)
    assert f"{larger}: vocabulary of 50, the actor's has 43" in text_of(larger)
    two_labels = make_checkpoint("qwen2", classifier=True)
    edit(two_labels / "config.json", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    assert f"{two_labels}/config.json: a reward model has one label, this one 2" in text_of(two_labels)


def test_a_pretrained_critic_is_looked_for_before_training(refusal: Callable[..., str], tmp_path: Path) -> None:
    text = refusal(CheckpointError, f"value_pretraining.checkpoint={tmp_path}")
    assert f"value_pretraining.checkpoint={tmp_path}" in text and "critic_pretrained" in text


# Evaluation.


def test_evaluation_needs_no_training_data_no_critic_and_no_layout(
    settings: dict[str, object], tmp_path: Path, tiny_problems: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    gone = ["data.train=gone", "critic.init=reward_model", "critic.reward_model=gone", "actor.tensor_parallel=8"]
    inputs = read_evaluation_inputs(load_recipe(path, [*gone, f"evaluation.data={tiny_problems}"]))
    assert len(inputs.held_out) == 40 and inputs.critic_architecture is None


# The rollout engine.


@pytest.fixture
def with_sglang(tmp_path: Path) -> str:
    """An interpreter that finds a module named sglang."""
    folder = tmp_path / "packages" / "sglang"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{folder.parent}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return f"rollout.sglang.python={script}"


@pytest.fixture
def wide(make_checkpoint: Callable[..., Path]) -> str:
    """A model whose feed-forward size SGLang takes on CPU, by 2 ranks too; 4 heads, 2 key-value heads."""
    return f"model.path={make_checkpoint('qwen2', intermediate_size=64)}"


SGLANG = "rollout.engine=sglang"


def test_an_interpreter_without_sglang(
    monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str], tmp_path: Path, wide: str, with_sglang: str
) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    bare.chmod(0o755)
    for python in (bare, tmp_path / "nowhere", "no-such-program"):
        text = refusal(RecipeError, wide, SGLANG, f"rollout.sglang.python={python}")
        assert text.startswith(f"rollout.sglang.python={python}") and f"{python} has no SGLang" in text
        assert "make sglang-cpu" in text and ".venv-sglang/bin/python" in text


def test_an_engine_that_is_there(
    monkeypatch: pytest.MonkeyPatch, read: Callable[..., Inputs], wide: str, with_sglang: str
) -> None:
    read(wide, SGLANG, with_sglang)
    monkeypatch.setenv("WORLD_SIZE", "4")
    read(wide, SGLANG, with_sglang, "rollout.sglang.tensor_parallel=2")
    settings = ("tensor_parallel=2", "placement=separate", "servers=4")
    read(wide, SGLANG, with_sglang, *(f"rollout.sglang.{setting}" for setting in settings))


def test_the_embedded_engine_needs_no_sglang(read: Callable[..., Inputs]) -> None:
    read("rollout.sglang.python=nowhere")


@pytest.mark.parametrize(
    ("processes", "overrides", "words"),
    [
        (1, "tensor_parallel=2", ["parallelism of 2", "the 1 ranks that host engines"]),
        (3, "tensor_parallel=2", ["parallelism of 2", "the 3 ranks that host engines"]),
        (3, "tensor_parallel=3", ["parallelism of 3 does not divide", "4 attention heads"]),
        (1, "placement=separate tensor_parallel=3", ["parallelism of 3", "4 attention heads"]),
        (4, "placement=separate servers=3", ["rollout.sglang.servers=3 must divide the 4 processes"]),
        (2, "placement=separate servers=4", ["rollout.sglang.servers=4 must divide the 2 processes"]),
    ],
)
def test_rollout_layouts_that_processes_or_model_cannot_take(
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
    wide: str,
    with_sglang: str,
    processes: int,
    overrides: str,
    words: list[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    settings = [f"rollout.sglang.{setting}" for setting in overrides.split()]
    text = refusal(LayoutError, wide, SGLANG, with_sglang, *settings)
    assert all(word in text for word in words), text


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`gpus(8, (9, 0))`: a node of eight Hoppers, as torch would report it."""

    def found(count: int, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return found


@pytest.mark.parametrize(
    ("world", "local", "servers", "fits"),
    [(8, 8, 1, False), (6, 6, 1, True), (12, 6, 2, True), (12, 6, 4, False), (12, 6, 1, True), (7, 7, 1, False)],
)
def test_separate_servers_need_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
    gpus: Callable[..., None],
    world: int,
    local: int,
    servers: int,
    fits: bool,
) -> None:
    """Nodes of 8 GPUs, servers of 2."""
    gpus(8)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    settings = SGLangConfig(placement="separate", servers=servers, tensor_parallel=2)
    with nullcontext() if fits else pytest.raises(LayoutError, match="on a node of 8 GPUs; start fewer processes"):
        _check_devices(settings)


@pytest.mark.parametrize(("local", "fits"), [("8", True), ("4", True), ("6", False), (None, True)])
def test_the_ranks_of_a_server_lie_on_one_node(monkeypatch: pytest.MonkeyPatch, local: str | None, fits: bool) -> None:
    """Servers of 4 on 24 processes, as many a node as the launcher says."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    for placement in ("colocated", "separate"):
        refused = not fits and placement == "colocated"
        with pytest.raises(LayoutError, match="does not divide the 6 processes") if refused else nullcontext():
            _check_node(SGLangConfig(placement=placement, tensor_parallel=4), world=24)


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_beside_a_colocated_server(
    monkeypatch: pytest.MonkeyPatch, gpus: Callable[..., None], variable: str
) -> None:
    gpus(8)
    monkeypatch.setenv(variable, "max_split_size_mb:64, expandable_segments:True")
    with pytest.raises(MachineError, match=f"^{variable}=max.*colocated SGLang"):
        _check_devices(SGLangConfig())
    monkeypatch.setenv(variable, "expandable_segments:False")
    _check_devices(SGLangConfig())
    monkeypatch.setenv(variable, "expandable_segments:True")
    _check_devices(SGLangConfig(placement="separate"))  # weights travel by NCCL


def test_fp8_rollouts_on_blackwell(gpus: Callable[..., None]) -> None:
    gpus(8, (10, 0))
    with pytest.raises(RecipeError, match="Blackwell"):
        _check_fp8_rollout(read_architecture(SHAPE), [])
    gpus(8, (9, 0))
    _check_fp8_rollout(read_architecture(SHAPE), [])


def test_a_reference_policy_is_of_the_actors_architecture(
    refusal: Callable[..., str], read: Callable[..., Inputs], make_checkpoint: Callable[..., Path]
) -> None:
    other = make_checkpoint("qwen2", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    path, kl = f"reference.path={other}", "algorithm.kl_coefficient=0.1"
    text = refusal(CheckpointError, path, kl)
    assert f"{path}: must be of the actor's architecture; it has layers 3 instead of 4" in text
    read(path)  # none is read
    read(kl)
    read(kl, f"reference.path={make_checkpoint('qwen2', seed=5)}")
