"""Training in one layout, real SGLang servers in another: the weights arrive, the log-probs agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.records import records
from tests.ranks import run_world

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

PIPELINES = ["ROLE.tensor_parallel=2", "ROLE.pipeline_parallel=2"]
CASES = {
    "training TP2 x PP2, two servers of TP2": (4, PIPELINES, ["sglang.tensor_parallel=2", "sglang.update=direct"]),
    "training TP2 with SP, two servers of TP1": (
        2,
        ["ROLE.tensor_parallel=2", "ROLE.sequence_parallel=true"],
        ["sglang.update=flattened_bucket"],
    ),
    "training DP2, one separate server of TP2": (
        2,
        ["ROLE.distributed_optimizer=true"],
        ["sglang.placement=separate", "sglang.tensor_parallel=2"],
    ),
}
PARAMETERS_OF_A_RANK = 3 + 4 * 7
"""Embedding, last norm, head; in each layer weights and bias of qkv, output, gate and up, down, and two norms."""


@pytest.mark.parametrize("case", CASES)
def test_servers_hold_the_actor_and_agree_with_it(
    case: str,
    forking_sglang_python: str,
    make_checkpoint: Callable[..., Path],
    tiny_problems: Path,
    tmp_path: Path,
) -> None:
    world, layout, rollout = CASES[case]
    overrides = [word.replace("ROLE", role) for word in layout for role in ("actor", "critic")]
    overrides += [f"rollout.{word}" for word in ["engine=sglang", f"sglang.python={forking_sglang_python}", *rollout]]
    overrides += [
        f"run_dir={tmp_path / 'run'}",
        f"model.path={make_checkpoint('qwen2', intermediate_size=64)}",
        f"data.train={tiny_problems}",
        "evaluation.data=null",
        "steps=2",
        "minibatch_size=8",
        "rollout.prompts_per_step=4",
        "rollout.samples_per_prompt=4",
        "rollout.max_response_tokens=24",
        "rollout.bucket_mib=1",
        "value_pretraining.max_steps=1",
        "actor.optimizer.learning_rate=1e-2",  # so that old weights would show
        "actor.optimizer.warmup_steps=0",
        "checkpoint.every=0",
    ]
    script = Path(__file__).with_name("sglang_ranks.py")
    output = run_world(world, [script, "recipes/tiny.yaml", *overrides], tmp_path / "log", seconds=500)
    server_ranks = 2 if "separate" in case or world == 2 else 4
    assert f"compared {server_ranks * PARAMETERS_OF_A_RANK} parameters" in output
    rows = records(tmp_path / "run", "train")
    differences = [row["rollout/logprob_difference_max"] for row in rows]
    assert len(differences) == 2
    assert max(differences) < 1e-4
