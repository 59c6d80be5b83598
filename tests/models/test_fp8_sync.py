"""Weight syncs with FP8 rollout into the embedded engine: what it holds, and that a difference is found."""

from __future__ import annotations

import pytest
import torch

from megatron_vapo.config import ActorConfig
from megatron_vapo.errors import TrainingError
from megatron_vapo.rollout.transformers_engine import TransformersEngine
from megatron_vapo.training.weight_sync import Proofs, WeightSync
from megatron_vapo.weights import fp8
from megatron_vapo.weights.hf_folder import HFFolder

PROOFS = Proofs(every=1, handover=True, shown=fp8.rounded_in_blocks)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_the_engine_holds_rounded_linear_layers_and_all_else_exactly(make_actor, make_checkpoint, family):
    folder = make_checkpoint(family, hidden_size=136, intermediate_size=140)
    actor = make_actor(folder, ActorConfig())
    engine = TransformersEngine(folder, [1], 0, 4, torch.float32, torch.device("cpu"))
    WeightSync(actor, engine, PROOFS, bucket_bytes=2**16, form=fp8.rounded_in_blocks)(version=0)
    stored = HFFolder(folder)
    assert engine._parameters.keys() == set(stored.names)
    for name, held in engine._parameters.items():
        exact = stored.read(name)
        if name.endswith("_proj.weight"):
            codes, scales = fp8.to_blocks(exact)
            assert not torch.equal(held, exact)
            assert torch.equal(held, fp8.from_blocks(codes, scales, torch.float32)), name
        else:
            assert torch.equal(held, exact), name


def test_other_weights_than_the_quantised_ones_are_found(make_actor, make_checkpoint, monkeypatch):
    folder = make_checkpoint("qwen2")
    actor = make_actor(folder, ActorConfig())
    engine = TransformersEngine(folder, [1], 0, 4, torch.float32, torch.device("cpu"))
    sync = WeightSync(actor, engine, PROOFS, bucket_bytes=2**16, form=fp8.rounded_in_blocks)
    name = "model.layers.1.mlp.up_proj.weight"
    digests = engine.digests

    def after_a_change():
        engine._parameters[name].view(-1)[3] += 1.0
        return digests()

    monkeypatch.setattr(engine, "digests", after_a_change)
    with pytest.raises(TrainingError, match=f"does not hold the actor's {name}$"):
        sync(version=0)
