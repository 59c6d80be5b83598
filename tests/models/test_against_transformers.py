"""The Megatron models against transformers on the same checkpoint: log-probs, entropy, values and gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vapo.config import ActorConfig, OptimizerConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.models.parameters import hf_tensors, load_hf
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.weights.architecture import read_architecture
from megatron_vapo.weights.hf_folder import HFFolder

FAMILIES = {
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "llama 3.1": (
        "llama",
        {
            "max_position_embeddings": 16384,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "mistral": ("mistral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, weights not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
}
PROMPTS, RESPONSES = [3, 1, 5, 2, 4, 2], [6, 9, 1, 14, 2, 40]
ROLE = ActorConfig(micro_batch_tokens=50, optimizer=OptimizerConfig(learning_rate=0.0, clip_grad=0.0))
"""Three micro-batches, updates that leave parameters and gradients as they are."""


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[str, dict]:
    return FAMILIES[request.param]


@pytest.fixture
def batch(make_experience) -> Experience:
    return make_experience(PROMPTS, RESPONSES)


def sequences(batch: Experience) -> list[tuple[Tensor, int]]:
    """Tokens and prompt length of each response."""
    return list(zip(batch.tokens.split(batch.sequence_lengths.tolist()), batch.prompt_lengths.tolist()))


def policy_by_transformers(model: torch.nn.Module, batch: Experience, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs, entropies = [], []
    for tokens, prompt in sequences(batch):
        log_p = (model(tokens[None]).logits[0, prompt - 1 : -1] / temperature).log_softmax(-1)
        logprobs.append(log_p.gather(1, tokens[prompt:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


@torch.no_grad()
def values_by_transformers(model: torch.nn.Module, batch: Experience) -> Tensor:
    """A sequence classifier scores the last token of what it is given: one call for each response token."""
    return torch.stack(
        [
            model(tokens[None, : prompt + k]).logits[0, 0]
            for tokens, prompt in sequences(batch)
            for k in range(len(tokens) - prompt)
        ]
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropy(make_checkpoint, make_model, make_actor, batch, family, temperature):
    folder = make_checkpoint(family[0], **family[1])
    logprobs, entropy = make_actor(folder, ROLE, temperature=temperature).forward(batch)
    with torch.no_grad():
        expected = policy_by_transformers(make_model(family[0], **family[1]), batch, temperature)
    torch.testing.assert_close((logprobs, entropy), expected, rtol=1e-5, atol=2e-5)


def test_values(make_checkpoint, make_model, make_critic, make_experience, family):
    batch = make_experience([3, 1, 4], [5, 8, 1])
    folder = make_checkpoint(family[0], classifier=True, **family[1])
    (values,) = make_critic(folder, ROLE).forward(batch)
    model = make_model(family[0], classifier=True, **family[1])
    torch.testing.assert_close(values, values_by_transformers(model, batch), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("logprobs", ["whole", "chunked"])
def test_gradients(make_checkpoint, make_model, train_actor, batch, family, logprobs, tmp_path):
    """Of a random sum over log-probs and entropies, for every tensor of the checkpoint."""
    folder = make_checkpoint(family[0], **family[1])
    weights = torch.randn(2, sum(RESPONSES), generator=torch.Generator().manual_seed(1))
    trainer = train_actor(folder, replace(ROLE, logprobs=logprobs))

    def loss(outputs: tuple[Tensor, ...], token_index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        share = (weights[:, token_index] * torch.stack(outputs)).sum()
        return share, {"loss": share}

    statistics = trainer.update(batch, loss)
    for parameter in trainer.model.modules[0].parameters():
        parameter.data.copy_(parameter.main_grad)
    ours = dict(hf_tensors(trainer.model))

    model = make_model(family[0], **family[1])
    expected_loss = (weights * torch.stack(policy_by_transformers(model, batch, 1.0))).sum()
    expected_loss.backward()
    expected = saved_gradients(model, tmp_path)
    assert statistics["loss"] == pytest.approx(expected_loss.item(), rel=1e-5)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert statistics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert ours.keys() == expected.keys()
    for name in expected:
        tolerance = 2e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(
            ours[name], expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def saved_gradients(model: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """Under the names of a checkpoint, which transformers finds itself when it saves."""
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(folder)
    saved = HFFolder(folder)
    return {name: saved.read(name) for name in saved.names}


@pytest.mark.parametrize("classifier", [False, True])
def test_loading_fills_every_parameter_and_gives_every_tensor_back(make_checkpoint, layout, family, classifier):
    folder = make_checkpoint(family[0], classifier=classifier, **family[1])
    model = (Critic if classifier else Actor)(ROLE, read_architecture(folder), torch.float32, layout)
    for parameter in model.modules[0].parameters():
        parameter.data.fill_(float("nan"))
    load_hf(model, folder)
    assert all(parameter.isfinite().all() for parameter in model.modules[0].parameters())
    saved = HFFolder(folder)
    returned = dict(hf_tensors(model))
    assert returned.keys() == saved.names
    assert all(torch.equal(tensor, saved.read(name)) for name, tensor in returned.items())


def test_a_critic_from_a_language_model_keeps_its_own_head(make_checkpoint, layout):
    folder = make_checkpoint("qwen2")
    critic = Critic(ROLE, replace(read_architecture(folder), classifier=True), torch.float32, layout)
    critic.set_head(random=True, seed=3)
    head = critic.modules[0].output_layer.weight.clone()
    load_hf(critic, folder)
    saved = HFFolder(folder)
    for name, tensor in hf_tensors(critic):
        assert torch.equal(tensor, head if name == "score.weight" else saved.read(name)), name


def test_transformers_loads_models_correctly_in_the_same_process(make_checkpoint, make_model):
    """It builds them under `with torch.device("meta")`, which must act on the CPU backend's functions too."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(make_checkpoint("qwen2"))
    torch.testing.assert_close(dict(loaded.named_buffers()), dict(make_model("qwen2").named_buffers()))
