"""The slow and obviously correct way to an engine's shards: gather everything, then slice."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vapo.weights.architecture import Architecture


def golden(a: Architecture, tensors: dict[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """What SGLang's weight loaders make of whole Hugging Face tensors on one rank, tensor by tensor."""
    out = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            rows = -(-a.vocab // 64) * 64
            padded = torch.zeros(rows, a.hidden, dtype=tensors[name].dtype)
            padded[: a.vocab] = tensors[name]
            out[name] = padded.chunk(size)[rank]
    out["model.norm.weight"] = tensors["model.norm.weight"]
    for i in range(a.layers):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            if f"{layer}{norm}.weight" in tensors:
                out[f"{layer}{norm}.weight"] = tensors[f"{layer}{norm}.weight"]
        attention = layer + "self_attn."
        for kind in ("weight", "bias"):
            if attention + "q_proj." + kind in tensors:
                q, k, v = (tensors[f"{attention}{x}_proj.{kind}"] for x in "qkv")
                copies = max(1, size // a.kv_heads)
                heads = [t.unflatten(0, (a.kv_heads, a.head_dim)).repeat_interleave(copies, 0) for t in (k, v)]
                parts = [q.chunk(size)[rank], *(t.chunk(size)[rank].flatten(0, 1) for t in heads)]
                out[f"{attention}qkv_proj.{kind}"] = torch.cat(parts)
        out[attention + "o_proj.weight"] = tensors[attention + "o_proj.weight"].chunk(size, 1)[rank]
        mlp = layer + "mlp."
        if a.experts:
            out[mlp + "gate.weight"] = tensors[mlp + "gate.weight"]
            of = {x: [tensors[f"{mlp}experts.{e}.{x}_proj.weight"] for e in range(4)] for x in ("gate", "up", "down")}
            w1, w3 = (torch.stack(of[x]).chunk(size, 1)[rank] for x in ("gate", "up"))
            out[mlp + "experts.w13_weight"] = torch.cat([w1, w3], dim=1)
            out[mlp + "experts.w2_weight"] = torch.stack(of["down"]).chunk(size, 2)[rank]
        else:
            gate, up = (tensors[f"{mlp}{x}_proj.weight"].chunk(size)[rank] for x in ("gate", "up"))
            out[mlp + "gate_up_proj.weight"] = torch.cat([gate, up])
            out[mlp + "down_proj.weight"] = tensors[mlp + "down_proj.weight"].chunk(size, 1)[rank]
    return out
