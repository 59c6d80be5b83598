"""Holds a run's models, engine and records, and gives the loop its verbs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vapo.checkpoint.snapshot import RunState, Snapshot, StepKind
from megatron_vapo.config import Recipe
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.rollout import Rollout
from megatron_vapo.errors import RewardError, RolloutError, TrainingError
from megatron_vapo.models import generators
from megatron_vapo.models.layout import ParallelLayout, init_world
from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.observe.progress import ProgressDisplay
from megatron_vapo.observe.timer import PhaseTimer
from megatron_vapo.recipe.preflight import Inputs
from megatron_vapo.runtime.collectives import on_first_rank
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.runtime.signals import Interrupt, StopRequested
from megatron_vapo.runtime.watchdog import Watchdog
from megatron_vapo.sampling.background import InBackground, Sampling, here
from megatron_vapo.sampling.evaluation import evaluate
from megatron_vapo.training import build, objectives, step_metrics
from megatron_vapo.training.phase_memory import PhaseMemory
from megatron_vapo.training.records import Records
from megatron_vapo.training.rollouts import Rollouts
from megatron_vapo.training.step_metrics import evaluation_rows, sample_rows
from megatron_vapo.training.token_records import Kept
from megatron_vapo.training.updates import MinibatchUpdates, SeenOutputs


class Run:
    """A run, built once the recipe and its inputs are known to be good. All processes hold one.

    snapshot: what a checkpoint would hold besides the models, as of the end of the last finished step or evaluation,
        whatever has begun since.
    """

    def __init__(
        self, recipe: Recipe, inputs: Inputs, display: ProgressDisplay, interrupt: Interrupt, watchdog: Watchdog
    ) -> None:
        init_world()
        self.recipe, self.inputs, self.display = recipe, inputs, display
        self.interrupt, self._watchdog = interrupt, watchdog
        self.folder, self.first_rank = Path(recipe.run_dir), dist.get_rank() == 0
        self.timer = PhaseTimer()
        with ExitStack() as opened:  # closed where something else cannot be built
            self._build(opened)
            self._opened = opened.pop_all()

    def _build(self, opened: ExitStack) -> None:
        recipe, inputs, display = self.recipe, self.inputs, self.display
        for choice in build.backend_choices(recipe):
            display.note(choice)
        if inputs.dropped:
            display.note(f"data: {inputs.dropped} training prompts are dropped, of more than data.max_prompt_tokens")
        self.trainers = build.build_trainers(recipe, inputs)
        models: dict[str, ParallelModel] = {role: trainer.model for role, trainer in self.trainers.items()}
        self._layouts = _layouts_of(models)
        if recipe.uses_reference:
            self.reference = build.build_reference(recipe, inputs, models.values())
            models[self.reference.name] = self.reference
        self._all_layouts = _layouts_of(models)
        self._memory, self._updates = PhaseMemory(models), MinibatchUpdates(recipe)
        self.engine = build.build_engine(recipe, inputs, self.actor.device, self.folder / "logs")
        opened.callback(self.engine.close)
        self._sync = build.build_weight_sync(recipe, self.actor, self.engine)
        self.sampler = build.build_sampler(recipe, inputs, self.engine, self.sync_weights, self.interrupt.overdue)
        opened.callback(self.sampler.close)
        self.sampler.on_tokens = self._show_tokens
        self.interrupt.on_overdue = self.engine.abort
        self._rollouts = Rollouts(recipe, inputs, self.sampler, self._layouts, self._sleep)
        self.checkpoints = build.build_checkpoints(recipe, inputs, self.trainers, display.note)
        self.snapshot = self._restore()
        self._records = Records(recipe, inputs.prompts, self.state) if self.first_rank else None
        if self._records is not None:
            opened.callback(self._records.close)
        self._stopped_by: str | None = None
        self._updated_in = 0
        """The step that has updated the actor last, finished or not."""
        self._under_way: deque[tuple[int, InBackground[Rollout]]] = deque()
        """The rollouts that are sampled beside training, and their steps, in their order; several only where weights
        are updated in flight."""
        self._idle = 0.0
        """Seconds of this step in which the engine beside training had nothing to write."""
        self._busy_until: float | None = None
        self.sync_weights()
        self._advance(self.state)

    @property
    def actor(self) -> Actor:
        """Return the policy that is trained."""
        model = self.trainers["actor"].model
        assert isinstance(model, Actor)
        return model

    @property
    def critic(self) -> Critic:
        """Return the critic; only where `recipe.uses_critic`."""
        model = self.trainers["critic"].model
        assert isinstance(model, Critic)
        return model

    @property
    def state(self) -> RunState:
        """Return how far the run has come."""
        return self.snapshot.state

    @property
    def over(self) -> bool:
        """Return whether the last training step is done."""
        return self.recipe.ends_at(self.state.steps, self.state.sampled_tokens)

    def rollout(self, purpose: StepKind, step: int) -> Rollout:
        """Return the rollout of a step. Group-sample with the present policy what is missing until that of the step
        `rollout.lag` steps later, and score the responses."""
        replayed = self._rollouts.replayed(purpose, step)
        if replayed is not None:
            return replayed
        for missing in self._rollouts.missing(purpose, step):
            if not self.recipe.rollout.updates_in_flight:
                self._collect()
            self._begin(purpose, missing)
        if not self._rollouts.ahead:
            self._collect_first()
        self._sleep()
        return self._rollouts.ahead.popleft()

    def values(self, batch: Experience) -> Experience:
        """Add the critic's values."""
        with self._phase(Phase.VALUES):
            (values,) = self.critic.forward(batch)
        return replace(batch, values=values)

    def logprobs(self, batch: Experience) -> Experience:
        """Add the actor's log-probs and entropy, of the tokens that it is trained on."""
        with self._phase(Phase.LOGPROBS):
            logprobs, entropy = self.actor.forward(batch.for_policy)
        batch = replace(batch, logprobs=logprobs, entropy=entropy)
        step_metrics.check_logprobs(batch, self.recipe.rollout.max_logprob_difference)
        return batch

    def reference_logprobs(self, batch: Experience) -> Experience:
        """Add the reference policy's log-probs; only where `recipe.uses_reference`."""
        with self._phase(Phase.REFERENCE):
            logprobs, _ = self.reference.forward(batch.for_policy)
        return replace(batch, reference_logprobs=logprobs)

    def update_critic(self, batch: Experience, epochs: int, step: int) -> dict[str, float]:
        """Train the critic towards the value targets of responses that have ended; return means of its metrics over
        minibatches, none where none has."""
        if not len(batch.ended.whole):
            return {}
        with self._phase(Phase.CRITIC_UPDATE):
            objective = objectives.critic_objective(self.recipe.resolved_algorithm, self.recipe.critic.head)
            return self._updates(self.trainers["critic"], objective, batch.ended, epochs, step)

    def update_actor(self, batch: Experience, step: int) -> tuple[Experience, dict[str, float]]:
        """Train the policy; return the batch, with the log-probs that the updates saw where tokens are recorded
        (observe.tokens_mib), and means of metrics over minibatches."""
        seen = SeenOutputs() if self.recipe.observe.tokens_mib else None
        trainer, epochs = self.trainers["actor"], self.recipe.epochs
        objective = objectives.actor_objective(self.recipe.resolved_algorithm, self.actor.sum_over_sequence_ranks)
        with self._phase(Phase.ACTOR_UPDATE):
            metrics = self._updates(trainer, objective, batch.for_policy, epochs, step, seen)
            self._updated_in = step
            if seen is not None:
                logprobs, _ = seen.gather(self.actor, batch.for_policy)
                batch = replace(batch, update_logprobs=logprobs)
        return batch, metrics

    def sync_weights(self) -> None:
        """Give the rollout engine the actor's present weights; their version is the number of steps behind them."""
        with self._phase(Phase.WEIGHT_SYNC):
            torch.cuda.empty_cache()  # for engines in other processes
            self._sync(version=max(self.state.steps, self._updated_in))

    def evaluate(self) -> None:
        """Measure and record held-out accuracy of the present policy."""
        settings, step = self.recipe.evaluation, self.state.steps
        self._collect()
        with self.display.bar("evaluate", total=1):
            with self._phase(Phase.EVALUATION):
                found = evaluate(self.sampler, self.inputs.held_out, settings.samples, settings.sampling)
            self.display.advance(found.metrics)
        rows = evaluation_rows(self.inputs.held_out, found.responses, settings.samples)
        if self._records is not None:
            self._records.metrics("evaluate", step, found.metrics)
            self._records.evaluation(step, rows)
        self._advance(self.state.after_evaluation(found.metrics["evaluate/accuracy"], self.sampler.new_failures()))

    def finish_step(
        self, kind: StepKind, step: int, rollout: Rollout, batch: Experience, metrics: dict[str, float]
    ) -> None:
        """Record the step, which is now finished.

        Args:
            batch: the rollout's, with all that was computed for it.
            metrics: of the updates.
        """
        if self.recipe.rollout.updates_in_flight:
            self._collect_finished()
        else:
            self._collect()  # before there are other weights
        seconds = self.timer.end_step()
        version, state = self.state.steps, self.state.after_step(kind, step, rollout.sampled_tokens, rollout.failures)
        everything = step_metrics.of_step(batch, metrics, seconds, state, self.recipe.algorithm.gamma)
        everything |= step_metrics.ages(batch, version)
        if kind == "train" and self.recipe.rollout.window_tokens is not None:
            everything |= step_metrics.windows(batch.whole, self.recipe.rollout.window_tokens)
        if kind == "pretrain":
            explained = [*state.explained_variances, everything["critic/explained_variance"]]
            state = replace(state, explained_variances=explained)
        self._advance(state)
        if self.recipe.rollout.runs_beside:
            everything["seconds/engine_idle"], self._idle = self._idle, 0.0
        everything |= rollout.metrics | self._rollouts.metrics() | self._memory.metrics()
        kept = Kept.of(batch, self.recipe.observe.tokens_mib * 2**20)
        warnings = {} if self._records is None else self._records.step(kind, step, kept, everything)
        self.display.advance(everything)
        self._warn(warnings)

    def end_pretraining(self) -> None:
        """Go on to training."""
        self.snapshot = replace(self.snapshot, state=replace(self.state, pretraining_done=True))

    def save(self, ending: bool = False) -> None:
        """Start a checkpoint of models and snapshot; `settle` completes it.

        Args:
            ending: the run ends within a step: of the rollouts under way, those that are written in time are kept.
        """
        self.settle(wait=True)  # the one before
        if ending:
            with suppress(StopRequested, RolloutError, RewardError):
                self._collect()
        with self._phase(Phase.CHECKPOINT):
            if self._memory.moves:
                self._sleep()  # what comes back to be saved takes the engine's room
            position = self._rollouts.whole(self.snapshot.position)
            self.checkpoints.save(replace(self.snapshot, position=position))

    def settle(self, wait: bool = False) -> None:
        """Complete the checkpoint under way, if all ranks have written their part of it or `wait` says so."""
        if not self.checkpoints.pending:
            return
        with self._phase(Phase.CHECKPOINT):
            covered = self.checkpoints.settle(wait)
        if covered is not None:
            self._rollouts.forget(covered)

    def raise_alarm(self) -> None:
        """Refuse to go on, on all ranks, where an alarm of `alarms.stop` has stopped the run.

        Raises:
            TrainingError: its warning.
        """
        text = on_first_rank(lambda: self._stopped_by)
        if text is not None:
            raise TrainingError(
                f"{text} It is among alarms.stop: the run has stopped, with a checkpoint. The same command goes on "
                "from there, and stops again only when an alarm is raised anew"
            )

    def close(self) -> None:
        """Close records and end worker processes; all of them, whatever one of them meets."""
        self._opened.close()

    def leave_groups(self) -> None:
        """Give the models' process groups back; nothing can be trained any more."""
        for layout in self._all_layouts:
            layout.close()

    def _begin(self, purpose: StepKind, step: int) -> None:
        """Get a step's rollout, or have it sampled beside training, where the recipe does that."""
        with self._phase(Phase.ROLLOUT):
            rollout = self._rollouts.stored(purpose, step)
            if rollout is not None:
                self.display.note(f"{purpose} step {step}: the rollout stored by the run before")
            elif purpose == "train" and self.recipe.rollout.runs_beside:
                self._under_way.append((step, InBackground(self._sampled(purpose, step))))
                return
            else:
                rollout = here(self._sampled(purpose, step))
        self._collect()  # those of the steps before
        self._rollouts.keep(purpose, step, rollout)

    def _show_tokens(self, count: int) -> None:
        """Show the tokens of rollouts that the training thread waits for; no phase beside them has any."""
        if not self._under_way:
            self.display.add(count * dist.get_world_size())

    def _collect(self) -> None:
        """Wait for the rollouts that are sampled beside training, if there are any."""
        while self._under_way:
            self._collect_first()

    def _collect_finished(self) -> None:
        """Take what is finished of the rollouts that are sampled beside training, in their order."""
        with self._phase(Phase.ROLLOUT):
            while self._under_way and self._under_way[0][1].poll():
                self._collect_first()

    def _collect_first(self) -> None:
        """Wait for the first of the rollouts that are sampled beside training."""
        step, sampling = self._under_way.popleft()
        with self._phase(Phase.ROLLOUT):
            rollout = sampling.result()
        self._rollouts.keep("train", step, rollout)
        for began, ended in sampling.busy:
            self._idle += 0.0 if self._busy_until is None else max(0.0, began - self._busy_until)
            self._busy_until = max(ended, self._busy_until or ended)

    def _sampled(self, purpose: StepKind, step: int) -> Sampling[Rollout]:
        if self.engine.asleep:
            self.sync_weights()
        rollout, rows = yield from self._rollouts.sampled(purpose, step)
        samples = sample_rows(rows, self.recipe.observe.samples_per_step) if purpose == "train" else []
        if self._records is not None and purpose == "train":
            self._records.samples(step, samples)
        return rollout

    def _sleep(self) -> None:
        with self.timer(Phase.SLEEP):
            self.engine.sleep()

    def _restore(self) -> Snapshot:
        """Go on from the newest checkpoint, else begin."""
        found = self.checkpoints.load()
        if found is None:
            generators.seed_generators(self.recipe.seed, dist.get_rank())
            return Snapshot(RunState(), self._rollouts.position, generators.read_generators(self._layouts))
        if found.generators is not None:
            generators.write_generators(found.generators, self._layouts)
        self._rollouts.resume(found)
        return found

    def _advance(self, state: RunState) -> None:
        """Take the snapshot that belongs to a new state."""
        generators_now = generators.read_generators(self._layouts)
        self.snapshot = Snapshot(state, self._rollouts.position, generators_now, tuple(self._rollouts.ahead))

    def _warn(self, warnings: dict[str, str]) -> None:
        """Show the alarms of a step; ask the run to stop where one of them is to. They are known on the first rank."""
        for name, text in warnings.items():
            self.display.note(text)
            if name in self.recipe.alarms.stop:
                self._stopped_by = text
                self.interrupt.ask(f"alarm {name} (alarms.stop)")

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        """Time a phase, show it, name it to the watchdog, and have on the device what it needs."""
        self.display.activity(phase.shown)
        self._watchdog.phase = phase
        with self.timer(phase), self._memory(phase):
            yield


def _layouts_of(models: Mapping[str, ParallelModel]) -> list[ParallelLayout]:
    return list({id(model.layout): model.layout for model in models.values()}.values())
