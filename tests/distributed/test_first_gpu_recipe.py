"""The recipe of the first run on a GPU takes a step on a CPU: every line of it but CUDA runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from tests.conftest import build_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SMALLER = {"num_hidden_layers": 2, "vocab_size": 4096}
"""Of 24 layers and 151,936 tokens, which take 130 CPU seconds and 14 GB; every other size is the model's."""


@pytest.mark.sglang
@pytest.mark.slow
def test_a_step_of_the_first_gpu_recipe(tmp_path: Path, forking_sglang_python: str) -> None:
    published = json.loads((REPOSITORY / "recipes" / "shapes" / "Qwen2.5-0.5B" / "config.json").read_text())
    shape = Qwen2Config(**published | SMALLER)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(tmp_path / "models" / "Qwen2.5-0.5B")
    build_tokenizer().save_pretrained(tmp_path / "models" / "Qwen2.5-0.5B")
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"question": f"How much is {n} + {n}?", "answer": f"Twice.\n#### {2 * n}"} for n in range(1, 9)]
        (tmp_path / "data" / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "rollout.sglang.python": forking_sglang_python,
        # Sizes alone.
        "steps": 1,
        "minibatch_size": 4,
        "value_pretraining.max_steps": 1,
        "rollout.prompts_per_step": 4,
        "rollout.samples_per_prompt": 2,
        "rollout.max_response_tokens": 8,
        "data.max_prompt_tokens": 1024,  # of one character each
        "evaluation.problems": 2,
        "reward.workers": 1,
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    folders = {f"VAPO_{kind.upper()}": str(tmp_path / kind) for kind in ("models", "data", "runs")}
    command = [sys.executable, "-m", "megatron_vapo", "train", "recipes/gsm8k_0.5b.yaml", *overrides]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | folders | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (tmp_path / "runs" / "gsm8k_0.5b" / "metrics.jsonl").read_text().splitlines()
    kinds = [json.loads(line) for line in lines]
    (trained,) = [row for row in kinds if row["kind"] == "train"]
    assert math.isfinite(trained["actor/grad_norm"]) and trained["actor/grad_norm"] > 0
    assert trained["critic/grad_norm"] > 0
    assert trained["rollout/logprob_difference_mean"] < 0.05
