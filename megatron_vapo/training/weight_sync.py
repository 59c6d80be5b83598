"""Brings the actor's weights from its layout to the rollout engine, after every update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_vapo.errors import RecipeError, RolloutError, TrainingError, few
from megatron_vapo.models.parameters import held_tensors, reshard_plan
from megatron_vapo.models.roles import Actor
from megatron_vapo.rollout import RolloutEngine
from megatron_vapo.runtime.collectives import any_rank, raise_everywhere
from megatron_vapo.weights.checksum import digest, verify
from megatron_vapo.weights.fp8 import Form
from megatron_vapo.weights.reshard import RankPlan
from megatron_vapo.weights.slices import Parameter
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


@dataclass(frozen=True)
class Proofs:
    """When and how it is proven that an engine holds the actor's weights.

    Args:
        every: versions between two proofs by an independent way; the first sync is always proven. 0 proves nothing.
        handover: compare after all other syncs what was handed over with what the engine holds.
        shown: what the engine's checksum of a parameter is of.
    """

    every: int
    handover: bool
    shown: Form


class WeightSync:
    """1. Plans are made once, from what each rank holds and what each engine wants.
    2. An engine that is down is started again.
    3. Every sync moves each number that an engine's rank lacks once, in buckets, and hands tensors over as they come,
       in the form that the engine holds them in.
    4. The first time and every few versions what came is compared with the actor's tensors by checksums, and what the
       engine holds with the form of what came; else what the engine holds with what was just handed over.
    5. Where an engine failed meanwhile, all begin again at 2.

    Args:
        bucket_bytes: of each of the two buckets.
        form: what the engine is given of a parameter.

    Raises:
        RecipeError: proofs are wanted of an engine that has nothing to compare.
    """

    def __init__(self, actor: Actor, engine: RolloutEngine, proofs: Proofs, bucket_bytes: int, form: Form) -> None:
        self._actor, self._engine, self._proofs, self._form = actor, engine, proofs, form
        self._transport = TorchTransport()
        wanted = engine.takes(actor.architecture)
        self._plan = reshard_plan(actor, wanted, bucket_bytes)
        checked = engine.checks(actor.architecture) if proofs.every else []
        if proofs.every and not checked:
            raise RecipeError(
                f"rollout.check_weights_every={proofs.every}: the engine lists no parameters; set it to 0"
            )
        self._checks = [reshard_plan(actor, shards, bucket_bytes) for shards in checked]
        self._notes = proofs.handover and checked == [wanted]  # the engine is given its own parameters
        self._handed: dict[str, str] = {}
        self._proven = False

    def __call__(self, version: int) -> None:
        """Bring all engines to the actor's present weights. All ranks together.

        Raises:
            RolloutError: an engine cannot be started, or failed too often.
            TrainingError: an engine holds other weights than the actor (the tensors are named).
        """
        source = held_tensors(self._actor)

        def check() -> None:
            if self._proofs.every and (not self._proven or version % self._proofs.every == 0):
                self._verify(source)
            elif self._notes:
                self._verify_handover()

        load_everywhere(self._engine, lambda: self._formed(source), version, check)

    def _verify(self, source: dict[str, Tensor]) -> None:
        """Check that what the plans bring is the actor's, and that the engine holds the same."""
        digests = self._digests()
        problems = [self._difference(plan, source, held) for plan, held in zip(self._checks, digests, strict=True)]
        raise_everywhere(next(filter(None, problems), None), TrainingError)
        self._proven = not any_rank(self._engine.failure is not None)

    def _verify_handover(self) -> None:
        """Check that the engine holds what it was given."""
        (held,) = self._digests()
        differing = _differing(self._handed, held) if held else []
        raise_everywhere(self._not_held(differing), TrainingError)

    def _digests(self) -> list[Mapping[str, str | None]]:
        """Return the engine's; that no process can read any is an engine's failure, or a check that checks nothing."""
        digests = self._engine.digests()
        if not any_rank(any(digests)) and not any_rank(self._engine.failure is not None):
            raise TrainingError(
                "weight sync: the engine gives no checksums; rollout.check_weights_every=0 asks for none"
            )
        return digests

    def _formed(self, source: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        parameters = {parameter.name: parameter for parameter in self._plan.targets}
        self._handed = {}
        for name, tensor in stream(self._plan, source, self._transport):
            if self._notes:
                self._handed |= self._shown(parameters[name], tensor)
            yield from self._form(parameters[name], tensor)

    def _shown(self, parameter: Parameter, tensor: Tensor) -> dict[str, str]:
        return {name: digest(content) for name, content in self._proofs.shown(parameter, tensor)}

    def _difference(self, plan: RankPlan, source: dict[str, Tensor], held: Mapping[str, str | None]) -> str | None:
        differing: list[str] = []
        parameters = {parameter.name: parameter for parameter in plan.targets}

        def compared() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in stream(plan, source, self._transport):
                if held:
                    differing.extend(_differing(self._shown(parameters[name], tensor), held))
                yield name, tensor

        try:
            verify(plan, source, compared(), self._transport)
        except TrainingError as error:
            return str(error)
        return self._not_held(differing)

    def _not_held(self, differing: list[str]) -> str | None:
        if not differing:
            return None
        return f"weight sync: the rollout engine of rank {self._plan.rank} does not hold the actor's {few(differing)}"


def _differing(given: Mapping[str, str], held: Mapping[str, str | None]) -> list[str]:
    """Return the parameters of which the engine holds others, by checksums; it may show none of some (None)."""
    return [name for name, checksum in given.items() if held.get(name, "") not in (checksum, None)]
