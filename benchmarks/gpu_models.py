"""Models, tokenizer, prompts and responses made on the spot, so that `gpu_check` needs no network and no checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_vapo.data.experience import Experience

TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
MEDIUM = TINY | {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
QWEN_1_5B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
"""Qwen2.5-1.5B's."""

_END, _PAD = 1, 0


def make_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A Qwen2 with random weights, and a tokenizer of characters; made once."""
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(**shape, eos_token_id=_END, pad_token_id=_PAD)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<eos>", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def make_prompts(path: Path) -> Path:
    """Sums to answer; nothing here learns to."""
    rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(8) for b in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def half_right(response: str, answer: str) -> float:
    """A reward of both signs for a model that knows nothing."""
    return 1.0 if len(response) % 2 == 0 else -1.0


def responses(
    shape: dict[str, Any], count: int, prompt: int, shortest: int, longest: int, seed: int = 0, group: int = 4
) -> Experience:
    """Random responses in groups, uniform in length, under log-probs of a uniform policy."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    outcomes = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
    total = int(lengths.sum())
    return Experience(
        tokens=torch.randint(2, shape["vocab_size"], (count * prompt + total,), generator=generator),
        prompt_lengths=torch.full((count,), prompt),
        response_lengths=lengths,
        groups=torch.arange(count) // group,
        truncated=torch.zeros(count, dtype=torch.bool),
        rollout_logprobs=torch.full((total,), -torch.tensor(float(shape["vocab_size"])).log().item()),
        outcomes=outcomes,
        rewards=outcomes.clone(),
        weight_versions=torch.zeros(count, dtype=torch.int64),
    )
