"""A model family is one entry of a registry and nothing else: docs/add_a_model.md, followed for Seed-OSS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vapo.config import ActorConfig
from megatron_vapo.errors import CheckpointError
from megatron_vapo.rollout.sglang.engine import cache_scales
from megatron_vapo.weights.architecture import read_architecture
from megatron_vapo.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_vapo.weights.engine_layout import sglang_shards
from megatron_vapo.weights.families import BODY, DENSE_MLP, FAMILIES, QKV_BIAS, Family
from megatron_vapo.weights.reshard import make_plan
from megatron_vapo.weights.training_layout import TrainingLayout, training_ranks

ROLE = ActorConfig(micro_batch_tokens=50)
SEED_OSS = Family(
    ("SeedOssForCausalLM", "SeedOssForSequenceClassification"),
    BODY + QKV_BIAS + DENSE_MLP,
    refusal=lambda config: "attention_out_bias is not supported" if config.attention_out_bias else None,
    sglang_cache_scales=True,
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "seed_oss", SEED_OSS)


def test_before_it_is_added_it_is_refused_with_where_to_add_it(make_checkpoint, monkeypatch):
    folder = make_checkpoint("seed_oss")
    monkeypatch.delitem(FAMILIES, "seed_oss")
    with pytest.raises(CheckpointError, match=r"SeedOssForCausalLM is not supported.*docs/add_a_model\.md"):
        read_architecture(folder)


def test_what_megatron_is_not_told_to_compute_is_refused(make_checkpoint):
    with pytest.raises(CheckpointError, match="attention_out_bias is not supported"):
        read_architecture(make_checkpoint("seed_oss", attention_out_bias=True))


def test_logits_are_those_of_transformers(make_checkpoint, make_model, make_actor, make_experience):
    batch = make_experience([3, 1, 5], [6, 9, 14])
    logprobs, _ = make_actor(make_checkpoint("seed_oss"), ROLE).forward(batch)
    model, expected = make_model("seed_oss"), []
    for tokens, prompt in zip(batch.tokens.split(batch.sequence_lengths.tolist()), batch.prompt_lengths.tolist()):
        with torch.no_grad():
            log_p = model(tokens[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        expected.append(log_p.gather(1, tokens[prompt:, None])[:, 0])
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=1e-5, atol=2e-5)


def test_values_are_those_of_a_sequence_classifier(make_checkpoint, make_model, make_critic, make_experience):
    batch = make_experience([4], [6], samples=1)
    (values,) = make_critic(make_checkpoint("seed_oss", classifier=True), ROLE).forward(batch)
    model = make_model("seed_oss", classifier=True)
    with torch.no_grad():
        expected = torch.stack([model(batch.tokens[None, :end]).logits[0, 0] for end in range(4, 10)])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("classifier", [False, True])
def test_conversion_there_and_back_is_bitwise(make_checkpoint, tmp_path: Path, classifier):
    folder = make_checkpoint("seed_oss", classifier=classifier)
    hf_to_megatron(folder, tmp_path / "megatron", lambda done, total: None)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", folder, lambda done, total: None)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_weight_sync_hands_every_number_of_the_checkpoint_to_the_engine(make_checkpoint):
    """Trained on two pipeline stages, served by two tensor-parallel ranks; sizes are those that transformers wrote."""
    folder = make_checkpoint("seed_oss")
    written = load_file(folder / "model.safetensors")
    a = read_architecture(folder)
    plan = make_plan(a, training_ranks(a, TrainingLayout(world=2, pp=2)), sglang_shards(a, 2, [0, 1]), itemsize=4)
    seen = {name: torch.zeros(tensor.shape).reshape(len(tensor), -1) for name, tensor in written.items()}
    for piece in [*plan.local, *(piece for pieces in plan.rounds for piece in pieces)]:
        box = piece.box
        seen[box.tensor][box.top : box.bottom, box.left : box.right] += 1
    for name, times in seen.items():
        cut = name.split(".")[-2] not in ("input_layernorm", "post_attention_layernorm", "norm")
        assert (times == (1 if cut else 2)).all(), name  # norms are on both ranks of the engine
    names = {parameter.name: parameter.shape for parameter in plan.of(0).targets}
    rows = sum(len(written[f"model.layers.0.self_attn.{x}_proj.bias"]) for x in "qkv")
    assert names["model.layers.0.self_attn.qkv_proj.bias"] == (rows // 2,)


def test_sglangs_scales_of_its_cache_come_with_the_family(make_checkpoint):
    names = [name for name, _ in cache_scales(read_architecture(make_checkpoint("seed_oss")), torch.device("cpu"))]
    assert names[:2] == ["model.layers.0.self_attn.attn.k_scale", "model.layers.0.self_attn.attn.v_scale"]
    assert len(names) == 2 * 4
