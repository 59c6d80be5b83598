"""Compare a Hugging Face folder and a Megatron checkpoint: the same tokens through both."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_vapo.weights.architecture import Architecture, read_architecture, read_json
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.hf_writer import TensorSpec, write_hf_folder

LENGTH = 64


def largest_difference(folder: str | Path, checkpoint: str | Path, seed: int = 0) -> tuple[float, float]:
    """Return the largest difference of logits over random tokens, both models in float32, and the largest logit.

    Reward models and critics have values in place of logits. Both models are held in memory, one after the other.
    """
    architecture = read_architecture(folder)
    tokens = torch.randint(architecture.vocab, (LENGTH,), generator=torch.Generator().manual_seed(seed))
    # First: once Megatron's CPU backend is in place, transformers no longer builds its models correctly.
    expected = hf_logits(folder, architecture, tokens)
    ours = megatron_logits(checkpoint, architecture, tokens)
    return float((ours - expected).abs().max()), float(expected.abs().max())


@torch.no_grad()
def hf_logits(folder: str | Path, architecture: Architecture, tokens: Tensor) -> Tensor:
    """Return logits [S, V], or values [S, 1], of tokens [S] by transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if architecture.classifier else AutoModelForCausalLM
    with _plain(folder) as plain:
        model = auto.from_pretrained(plain, dtype=torch.float32).eval()
    if architecture.classifier:
        return model.score(model.model(tokens[None]).last_hidden_state[0])
    return model(tokens[None]).logits[0]


@torch.no_grad()
def megatron_logits(checkpoint: str | Path, architecture: Architecture, tokens: Tensor) -> Tensor:
    """Return logits [S, V], or values [S, 1], of tokens [S] by the checkpoint's actor or critic."""
    from megatron.core.models.gpt import GPTModel

    from megatron_vapo.config import PrecisionConfig, RoleConfig
    from megatron_vapo.models.attention import pack_sequences
    from megatron_vapo.models.build import build_chunks
    from megatron_vapo.models.checkpointing import load_module, readable
    from megatron_vapo.models.layout import ParallelLayout, init_world
    from megatron_vapo.models.megatron_versions import load_checkpoint
    from megatron_vapo.models.roles import ValueModel
    from megatron_vapo.models.transformer_config import transformer_config
    from megatron_vapo.runtime.kernels import Backend

    init_world()
    device = torch.device(torch.cuda.current_device())
    config = transformer_config(architecture, RoleConfig(), torch.float32, Backend(on_gpu=device.type == "cuda"))
    with ParallelLayout(RoleConfig(), seed=0).active():
        kind = partial(ValueModel, outputs=architecture.labels) if architecture.classifier else GPTModel
        (model,) = build_chunks(config, architecture, kind, device, PrecisionConfig())
        wanted = {"model": readable(model.sharded_state_dict(), present=set())}
        load_module(model, load_checkpoint(wanted, Path(checkpoint))["model"])
        output = model.eval()(
            input_ids=tokens[None].to(device),
            position_ids=torch.arange(len(tokens))[None].to(device),
            attention_mask=None,
            packed_seq_params=pack_sequences(torch.tensor([0, len(tokens)]), 0, 1, device),
        )
    return output[0].float().cpu()


@contextmanager
def _plain(folder: str | Path) -> Iterator[Path]:
    """Yield the folder itself, or a passing copy with FP8 weights as ordinary numbers: FP8 computes on a GPU only."""
    if "quantization_config" not in read_json(Path(folder) / "config.json"):
        yield Path(folder)
        return
    source = HFFolder(folder)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "plain"
        names = sorted(source.names)
        specs = [TensorSpec(name, source.shape(name), source.dtype(name)) for name in names]
        write_hf_folder(copy, specs, ((name, source.read(name)) for name in names), folder)
        yield copy
