"""What SGLang's own model holds, by its own loaders: after reading an FP8 checkpoint, and after a weight
sync's tensors were written over dummy weights. Run by SGLang's interpreter; no server and no kernel of it is needed.

    python sglang_holds.py CHECKPOINT TRANSFER [TRANSFER ...]

TRANSFER: files of tensors, handed over as its name's start says: direct or load (whole tensors). Prints the names of
parameters that differ for each, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors.torch import load_file
from sglang.srt import distributed
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
from sglang.srt.model_executor.model_runner_components.weight_updater import _model_load_weights_direct
from sglang.srt.model_loader.weight_utils import initialize_dummy_weights
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from transformers import AutoConfig

MODELS = {"Qwen2ForCausalLM": Qwen2ForCausalLM, "Qwen3ForCausalLM": Qwen3ForCausalLM}


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's bytes, after the one step of SGLang's that follows loading for caches."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, BaseKVCacheMethod):
            method.process_weights_after_loading(module)
    return {name: p.detach().contiguous().reshape(-1).view(torch.uint8).clone() for name, p in model.named_parameters()}


def main() -> None:
    folder = Path(sys.argv[1])
    common = {"device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch"}
    set_global_server_args_for_scheduler(ServerArgs(model_path=str(folder), disable_cuda_graph=True, **common))
    meeting = f"file://{tempfile.mkdtemp()}/meeting"
    distributed.init_distributed_environment(
        backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=meeting
    )
    distributed.initialize_model_parallel()
    config = AutoConfig.from_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16)
    alone = {f"{group}_{what}": size for group in ("tp", "attn_tp", "pp") for what, size in (("rank", 0), ("size", 1))}
    with get_parallel().override(**alone):

        def build() -> torch.nn.Module:
            return MODELS[config.architectures[0]](
                config, quant_config=Fp8Config.from_config(config.quantization_config)
            )

        read = build()
        read.load_weights(iter(load_file(folder / "model.safetensors").items()))
        expected = bits(read)
        differing = {}
        for transfer in map(Path, sys.argv[2:]):
            synced = build()
            initialize_dummy_weights(synced)
            assert not any(torch.equal(p, expected[n]) for n, p in bits(synced).items() if n.endswith("weight"))
            tensors = list(load_file(transfer).items())
            if transfer.name.startswith("direct"):
                _model_load_weights_direct(synced, tensors)
            else:
                synced.load_weights(iter(tensors))
            held = bits(synced)
            differing[transfer.name] = [name for name in expected if not torch.equal(held[name], expected[name])]
    print(json.dumps({"parameters": sorted(expected), "differing": differing}))


if __name__ == "__main__":
    main()
