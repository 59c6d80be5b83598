"""One run: its models, engine, data and records, and the verbs that the loop is written in."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vapo.algorithm.types import Loss
from megatron_vapo.checkpoint.checkpoints import Checkpoints, RunState
from megatron_vapo.config import Recipe
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.prompts import PromptOrder
from megatron_vapo.errors import DataError, TrainingError
from megatron_vapo.models.checkpointing import load_trainable, save_trainable
from megatron_vapo.models.generators import read_generators, seed_generators, write_generators
from megatron_vapo.models.layout import init_world
from megatron_vapo.models.parameters import hf_tensors
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.models.trainable import Trainable
from megatron_vapo.observe.metrics import Kind, MetricsWriter
from megatron_vapo.observe.progress import PhaseBar, ProgressDisplay
from megatron_vapo.observe.report import write_samples
from megatron_vapo.observe.timer import PhaseTimer
from megatron_vapo.recipe.load import to_yaml
from megatron_vapo.recipe.preflight import Inputs
from megatron_vapo.rewards.scorer import RewardScorer
from megatron_vapo.runtime.collectives import barrier, gather_objects
from megatron_vapo.runtime.kernels import linear_layers, machine_backend
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.runtime.signals import Interrupt
from megatron_vapo.runtime.watchdog import Watchdog
from megatron_vapo.sampling.evaluation import evaluate
from megatron_vapo.sampling.rollout_store import KeptRollouts, Notes
from megatron_vapo.sampling.sampler import Sampler
from megatron_vapo.sampling.seeds import seeds
from megatron_vapo.sampling.trajectory import Group
from megatron_vapo.training import objectives
from megatron_vapo.training.build import build_engine, build_models, engine_form
from megatron_vapo.training.phase_memory import PhaseMemory
from megatron_vapo.training.step_metrics import (
    check_logprobs,
    evaluation_rows,
    rollout_metrics,
    sample_rows,
    token_metrics,
)
from megatron_vapo.training.weight_sync import WeightSync
from megatron_vapo.weights.hf_folder import torch_dtype, write_hf_folder


class Run:
    """Built once the recipe and its inputs are known to be good. All processes hold one.

    `state` is as of the end of the last finished step or evaluation, with what else a checkpoint holds besides the
    models (`_mark`), whatever has begun since.
    """

    def __init__(
        self, recipe: Recipe, inputs: Inputs, display: ProgressDisplay, interrupt: Interrupt, watchdog: Watchdog
    ) -> None:
        init_world()
        self.recipe, self.inputs, self.display = recipe, inputs, display
        self.interrupt, self._watchdog = interrupt, watchdog
        self.folder = Path(recipe.run_dir)
        self.first_rank = dist.get_rank() == 0
        self.timer = PhaseTimer()
        self._skipped: Counter[str] = Counter()
        self._failures_before = 0
        self._step_failures = (0, 0)
        self._rollout_metrics: dict[str, float] = {}
        self._tell_backend()
        self.models = build_models(recipe, inputs)
        self._memory = PhaseMemory(self.models)
        self.scorer = RewardScorer(
            inputs.reward, workers=recipe.reward.workers, timeout_s=recipe.reward.timeout_seconds
        )
        self.engine = build_engine(recipe, inputs, self.actor.device, self.folder / "logs")
        self._sync = WeightSync(
            self.actor,
            self.engine,
            recipe.rollout.check_weights_every,
            recipe.rollout.bucket_mib * 2**20,
            engine_form(recipe),
        )
        self.sampler = Sampler(
            inputs,
            self.engine,
            self.scorer,
            recipe.seed,
            recipe.rollout,
            recipe.reward,
            self.sync_weights,
            interrupt.overdue,
        )
        interrupt.on_overdue = self.engine.abort
        self.order = PromptOrder(len(inputs.prompts), recipe.seed)
        self._layouts = list({id(model.layout): model.layout for model in self.models.values()}.values())
        self.kept = KeptRollouts(self.folder / "kept_rollouts")
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", recipe.checkpoint, self.models, to_yaml(recipe), display.note
        )
        self.state = self._restore()
        self.writer = self._open_records() if self.first_rank else None
        self.bar: PhaseBar | None = None
        self.sampler.on_tokens = lambda count: self.bar.add(count * dist.get_world_size())
        self.sync_weights()
        self._mark()

    @property
    def actor(self) -> Actor:
        return self.models["actor"]

    @property
    def critic(self) -> Critic:
        return self.models["critic"]

    @property
    def over(self) -> bool:
        """Whether the last training step is done."""
        return self.recipe.ends_at(self.state.steps, self.state.sampled_tokens)

    def rollout(self, purpose: Kind, step: int) -> Experience:
        """Group-sample the next prompts with the present policy and score the responses."""
        name = f"{purpose}_{step:06d}"
        if self.recipe.rollout.replay:
            return _replayed(Path(self.recipe.rollout.replay) / f"{name}.safetensors")
        with self._phase(Phase.ROLLOUT):
            batch = self._kept_rollout(name) or self._sampled_rollout(name, purpose, step)
        if self.first_rank and self.recipe.rollout.save:
            (self.folder / "rollouts").mkdir(exist_ok=True)
            batch.save(self.folder / "rollouts" / f"{name}.safetensors")
        self._sleep()
        return batch

    def values(self, batch: Experience) -> Experience:
        """Add the critic's values."""
        with self._phase(Phase.VALUES):
            (values,) = self.critic.forward(batch)
        return replace(batch, values=values)

    def logprobs(self, batch: Experience) -> Experience:
        """Add the actor's log-probs and entropy."""
        with self._phase(Phase.LOGPROBS):
            logprobs, entropy = self.actor.forward(batch)
        batch = replace(batch, logprobs=logprobs, entropy=entropy)
        check_logprobs(batch, self.recipe.rollout.max_logprob_difference)
        return batch

    def update_critic(self, batch: Experience, epochs: int, step: int) -> dict[str, float]:
        """Minibatch updates towards the value targets; metrics are means over them."""
        with self._phase(Phase.CRITIC_UPDATE):
            return self._update(self.critic, objectives.value_objective, batch, epochs, step)

    def update_actor(self, batch: Experience, step: int) -> dict[str, float]:
        """Minibatch updates of the policy; metrics are means over them."""
        with self._phase(Phase.ACTOR_UPDATE):
            return self._update(self.actor, objectives.policy_objective, batch, self.recipe.epochs, step)

    def sync_weights(self) -> None:
        """Give the rollout engine the actor's present weights; their version is the number of finished steps."""
        with self._phase(Phase.WEIGHT_SYNC):
            torch.cuda.empty_cache()  # for engines in other processes
            self._sync(version=self.state.steps)

    def evaluate(self) -> None:
        """Held-out accuracy of the present policy, recorded."""
        settings, step = self.recipe.evaluation, self.state.steps
        training_bar = self.bar
        with self.display.bar("evaluate", total=1) as self.bar:
            with self._phase(Phase.EVALUATION):
                result = evaluate(self.sampler, self.inputs.held_out, settings.samples, settings.sampling)
            self._write("evaluate", step, result.metrics)
            self.bar.advance(result.metrics)
        self.bar = training_bar
        if self.first_rank:
            rows = evaluation_rows(self.inputs.held_out, result.responses, settings.samples)
            write_samples(self.folder / "evaluation", step, rows, 64)
        when = "accuracy_before" if step == 0 else "accuracy_after"
        setattr(self.state, when, result.metrics["evaluate/accuracy"])
        failures, timeouts = self._new_failures()
        self.state.reward_failures += failures
        self.state.reward_timeouts += timeouts
        self.state.evaluated_at = step
        self._mark()

    def finish_step(self, kind: Kind, step: int, batch: Experience, metrics: dict[str, float]) -> None:
        """Record the step, which is now finished."""
        tokens = int(batch.cu_seqlens[-1])
        sampled = int(self._rollout_metrics.get("rollout/sampled_tokens", tokens))  # a replayed batch counts as sampled
        if kind == "pretrain":
            self.state.pretraining_steps = step
            self.state.pretraining_tokens += sampled
        else:
            self.state.steps = step
            self.state.sampled_tokens += sampled
        self.state.reward_failures += self._step_failures[0]
        self.state.reward_timeouts += self._step_failures[1]
        self._mark()
        seconds = self.timer.step_seconds()
        spent = sum(value for name, value in seconds.items() if name.startswith("seconds/"))
        everything = (
            rollout_metrics(batch)
            | token_metrics(batch)
            | metrics
            | seconds
            | {"throughput/tokens_per_second": tokens / spent, "tokens/sampled": self.state.sampled_tokens}
            | {"reward/failures": self.state.reward_failures, "reward/timeouts": self.state.reward_timeouts}
            | self._rollout_metrics
            | self._memory.metrics()
        )
        self._write(kind, step, everything)
        self.bar.advance(everything)
        self.timer.start_step()

    def save(self) -> None:
        """Start a checkpoint of models and state; `settle` completes it."""
        with self._phase(Phase.CHECKPOINT):
            if self._memory.moves:
                self._sleep()  # what comes back to be saved takes the engine's room
            self.checkpoints.save(self.state, self._unfinished, self._generators)

    def settle(self, wait: bool = False) -> None:
        """Complete the checkpoint under way, if all ranks have written their part of it or `wait` says so."""
        if not self.checkpoints.pending:
            return
        with self._phase(Phase.CHECKPOINT):
            covered = self.checkpoints.settle(wait)
        if covered is not None and self.first_rank:
            self.kept.drop(covered.pretraining_steps, covered.steps)

    def save_pretrained_critic(self) -> None:
        """Keep the critic that value pretraining made, so that other runs can start from it."""
        folder, part = self.folder / "critic_pretrained", self.folder / "critic_pretrained.part"
        if self.first_rank:
            for old in (folder, part):
                shutil.rmtree(old, ignore_errors=True)
            part.mkdir(parents=True)
        barrier()
        save_trainable(self.critic, part)
        if self.first_rank:
            part.rename(folder)
        barrier()

    def load_pretrained_critic(self, folder: str) -> None:
        """Start from a critic that an earlier run pretrained."""
        load_trainable(self.critic, Path(folder), with_optimizer=not self.recipe.value_pretraining.reset_optimizer)

    def export(self) -> Path:
        """Write the actor as a Hugging Face checkpoint."""
        folder = self.folder / "export"
        if self.first_rank:
            shutil.rmtree(folder, ignore_errors=True)
            write_hf_folder(folder, hf_tensors(self.actor), self.recipe.model.path)
        else:
            for _ in hf_tensors(self.actor):
                pass
        barrier()
        return folder

    def close(self) -> None:
        """Close records and end worker processes."""
        if self.writer is not None:
            self.writer.close()
        self.scorer.close()
        self.engine.close()

    def leave_groups(self) -> None:
        """Give the models' process groups back; nothing can be trained any more."""
        for layout in self._layouts:
            layout.close()

    def _sampled_rollout(self, name: str, purpose: Kind, step: int) -> Experience:
        if self.engine.asleep:
            self.sync_weights()
        before = self._position()
        batch, rows = self.sampler.experience(self.inputs.prompts, self.order, purpose, step)
        self._sleep()  # before its metrics are read
        self._step_failures, self._rollout_metrics = self._new_failures(), self.sampler.metrics()
        if self.first_rank and purpose == "train":
            write_samples(self.folder, step, sample_rows(rows), self.recipe.observe.samples_per_step)
        if self.recipe.checkpoint.rollouts:
            generators = gather_objects(read_generators(self._layouts))
            if self.first_rank:
                notes = Notes(before, self._position(), self._step_failures, self._rollout_metrics, generators)
                self.kept.save(name, batch, notes)
        return batch

    def _sleep(self) -> None:
        with self.timer(Phase.SLEEP):
            self.engine.sleep()

    def _new_failures(self) -> tuple[int, int]:
        """Rewards of all ranks that raised, and that timed out, since this was last asked."""
        now = torch.tensor([self.scorer.failures, self.scorer.timeouts], device=self.actor.device)
        new = now - self._failures_before
        self._failures_before = now
        dist.all_reduce(new)
        return tuple(new.tolist())

    def _kept_rollout(self, name: str) -> Experience | None:
        """What a run that died had sampled for this step, and everything as it was after that."""
        found = self.kept.load(name, self._position(), dist.get_world_size())
        if found is None:
            return None
        batch, notes = found
        self._go_to(notes.after)
        self._step_failures, self._rollout_metrics = notes.failures, notes.metrics
        write_generators(notes.generators[dist.get_rank()], self._layouts)
        self.display.note(f"{name}: rollouts kept by the run before")
        return batch

    def _update(
        self, model: Trainable, objective: Callable[..., Loss], batch: Experience, epochs: int, step: int
    ) -> dict[str, float]:
        updates = []
        for minibatch in self._minibatches(batch, epochs, step):
            update = model.update(minibatch, objective(minibatch, self.recipe.algorithm))
            self._count_skipped(model.name, bool(update["skipped"]))
            updates.append({f"{model.name}/{key}": value for key, value in update.items()})
        return {key: sum(u[key] for u in updates) / len(updates) for key in updates[0]}

    def _count_skipped(self, name: str, skipped: bool) -> None:
        self._skipped[name] = self._skipped[name] + 1 if skipped else 0
        if self._skipped[name] >= self.recipe.max_skipped_updates:
            raise TrainingError(
                f"the {name}'s loss or gradient was not finite in {self._skipped[name]} updates in a row "
                f"(max_skipped_updates): the run stops; its last checkpoint is in {self.folder / 'checkpoints'}. Lower "
                f"{name}.optimizer.learning_rate or look at the last metrics"
            )

    def _minibatches(self, batch: Experience, epochs: int, step: int) -> Iterator[Experience]:
        """Each epoch visits every response once, in an order drawn for (step, epoch)."""
        for seed in seeds(self.recipe.seed, "minibatches", step, epochs):
            order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
            for indices in order.split(self.recipe.minibatch_size):
                yield batch.select(indices)

    def _restore(self) -> RunState:
        found = self.checkpoints.load()
        if found is None:
            seed_generators(self.recipe.seed, dist.get_rank())
            return RunState()
        state, unfinished, generators = found
        if generators is not None:
            write_generators(generators, self._layouts)
        self._go_to({"order": state.prompt_order, "unfinished": unfinished})
        if self.first_rank:
            self.kept.drop(state.pretraining_steps, state.steps)
        return state

    def _tell_backend(self) -> None:
        for name, role in self.recipe.roles.items():
            backend = machine_backend(torch_dtype(self.recipe.model.dtype), role.precision)
            self.display.note("; ".join([f"{name}: {linear_layers(role.precision)}", *map(str, backend.choices())]))

    def _mark(self) -> None:
        """What a checkpoint would hold besides the models."""
        self.state.prompt_order, self._unfinished = self._position().values()
        self._generators = read_generators(self._layouts)

    def _position(self) -> dict[str, Any]:
        """Where sampling is: the place in the order of prompts, and the groups that were begun."""
        return {"order": self.order.state_dict(), "unfinished": [group.state() for group in self.sampler.unfinished]}

    def _go_to(self, position: dict[str, Any]) -> None:
        self.order.load_state_dict(position["order"])
        self.sampler.unfinished = [Group.of(state, self.inputs.prompts) for state in position["unfinished"]]

    def _open_records(self) -> MetricsWriter:
        project = self.recipe.observe.wandb_project
        return MetricsWriter(
            self.folder,
            start_at={
                "pretrain": self.state.pretraining_steps + 1,
                "train": self.state.steps + 1,
                "evaluate": 0 if self.state.evaluated_at is None else self.state.evaluated_at + 1,
            },
            tensorboard=self.recipe.observe.tensorboard,
            wandb={"project": project, "name": self.recipe.name} if project else None,
        )

    def _write(self, kind: Kind, step: int, metrics: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(step, metrics, kind)

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        """Times a part of a step, shows it, tells the watchdog, and has on the device what it needs."""
        if self.bar is not None:
            self.bar.activity(phase.shown)
        self._watchdog.phase = phase
        with self.timer(phase), self._memory(phase):
            yield


def _replayed(path: Path) -> Experience:
    if not path.is_file():
        raise DataError(f"rollout.replay: {path} is missing; lower steps, or save more with rollout.save=true")
    return Experience.load(path)
