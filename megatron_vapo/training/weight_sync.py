"""Brings the actor's weights from its layout to the rollout engine, after every update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from megatron_vapo.errors import RolloutError, TrainingError, few
from megatron_vapo.models.parameters import held_tensors, reshard_plan
from megatron_vapo.models.roles import Actor
from megatron_vapo.rollout import RolloutEngine
from megatron_vapo.runtime.collectives import any_rank, raise_everywhere
from megatron_vapo.weights.checksum import digest, verify
from megatron_vapo.weights.fp8 import Form
from megatron_vapo.weights.reshard import RankPlan
from megatron_vapo.weights.transfer import stream
from megatron_vapo.weights.transport import TorchTransport


def load_everywhere(
    engine: RolloutEngine,
    tensors: Callable[[], Iterable[tuple[str, Tensor]]],
    version: int,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Start what is down and give all engines weights, again where one failed meanwhile. All ranks together.

    Args:
        tensors: begins the stream of named tensors anew.
        check: called with all engines up and loaded.

    Raises:
        RolloutError: an engine cannot be started, or failed too often.
    """
    while True:
        raise_everywhere(engine.revive(), RolloutError)
        engine.load_weights(tensors(), version)
        if not any_rank(engine.failure is not None):
            check()
            if not any_rank(engine.failure is not None):
                return


class WeightSync:
    """1. Plans are made once, from what each rank holds and what each engine wants.
    2. An engine that is down is started again.
    3. Every sync moves each number that an engine's rank lacks once, in buckets, and hands tensors over as they come,
       in the form that the engine holds them in.
    4. Every `check_every` versions what came is compared with the actor's tensors by checksums, and what the engine
       holds with the form of what came.
    5. Where an engine failed meanwhile, all begin again at 2.

    Args:
        check_every: 0 never compares.
        bucket_bytes: of each of the two buckets.
        form: what the engine holds of a parameter.
    """

    def __init__(self, actor: Actor, engine: RolloutEngine, check_every: int, bucket_bytes: int, form: Form) -> None:
        self._actor, self._engine, self._check_every, self._form = actor, engine, check_every, form
        self._transport = TorchTransport()
        self._plan = reshard_plan(actor, engine.takes(actor.architecture), bucket_bytes)
        checked = engine.checks(actor.architecture) if check_every else []
        self._checks = [reshard_plan(actor, wanted, bucket_bytes) for wanted in checked]

    def __call__(self, version: int) -> None:
        """Bring all engines to the actor's present weights. All ranks together.

        Raises:
            RolloutError: an engine cannot be started, or failed too often.
            TrainingError: an engine holds other weights than the actor (the tensors are named).
        """
        source = held_tensors(self._actor)

        def check() -> None:
            if self._check_every and version % self._check_every == 0:
                self._verify(source)

        load_everywhere(self._engine, lambda: self._formed(self._plan, source), version, check)

    def _verify(self, source: dict[str, Tensor]) -> None:
        """Check that what the plans bring is the actor's, and that the engine holds the same."""
        digests = self._engine.digests()
        problems = [self._difference(plan, source, held) for plan, held in zip(self._checks, digests, strict=True)]
        raise_everywhere(next(filter(None, problems), None), TrainingError)

    def _formed(self, plan: RankPlan, source: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        parameters = {parameter.name: parameter for parameter in plan.targets}
        for name, tensor in stream(plan, source, self._transport):
            yield from self._form(parameters[name], tensor)

    def _difference(self, plan: RankPlan, source: dict[str, Tensor], held: Mapping[str, str]) -> str | None:
        differing: list[str] = []
        parameters = {parameter.name: parameter for parameter in plan.targets}

        def compared() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in stream(plan, source, self._transport):
                formed = self._form(parameters[name], tensor) if held else ()
                differing.extend(part for part, content in formed if held.get(part) != digest(content))
                yield name, tensor

        try:
            verify(plan, source, compared(), self._transport)
        except TrainingError as error:
            return str(error)
        if differing:
            return f"weight sync: the rollout engine of rank {plan.rank} does not hold the actor's {few(differing)}"
        return None
