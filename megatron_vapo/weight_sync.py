"""From the actor's layout to the rollout engine, after every update."""

from __future__ import annotations

import torch.distributed as dist

from megatron_vapo.models.parameters import gather_training_ranks, held_tensors
from megatron_vapo.models.roles import Actor
from megatron_vapo.rollout import RolloutEngine
from megatron_vapo.weights.checksum import verify
from megatron_vapo.weights.engine_layout import whole_model
from megatron_vapo.weights.reshard import make_plan
from megatron_vapo.weights.transfer import stream
from megatron_vapo.weights.transport import TorchTransport


class WeightSync:
    """1. The plan is made once, from what each rank holds and what each engine wants.
    2. Every sync moves each number that an engine's rank lacks once, in buckets, and hands tensors over as they come.
    3. Every `check_every` versions the engine's tensors are compared with the actor's by checksums.

    Args:
        engine: one on every rank, which takes whole Hugging Face tensors.
        check_every: 0 never compares.
        bucket_bytes: of each of the two buckets.
    """

    def __init__(self, actor: Actor, engine: RolloutEngine, check_every: int, bucket_bytes: int) -> None:
        self._actor, self._engine, self._check_every = actor, engine, check_every
        self._transport = TorchTransport()
        wanted = whole_model(actor.architecture, list(range(dist.get_world_size())))
        itemsize = actor.config.params_dtype.itemsize
        plan = make_plan(actor.architecture, gather_training_ranks(actor), wanted, itemsize, bucket_bytes)
        self._plan = plan.of(dist.get_rank())

    def __call__(self, version: int) -> None:
        """Bring all engines to the actor's present weights. All ranks together.

        Raises:
            TrainingError: an engine holds other weights than the actor (the tensors are named).
        """
        source = held_tensors(self._actor)
        self._engine.load_weights(stream(self._plan, source, self._transport), version)
        if self._check_every and version % self._check_every == 0:
            verify(self._plan, source, self._engine.held_weights(), self._transport)
