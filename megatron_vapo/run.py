"""One run: its models, engine, data and records, and the verbs that the loop is written in."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vapo import checkpoint, objectives
from megatron_vapo.config import Recipe
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.prompts import PromptOrder
from megatron_vapo.errors import DataError, TrainingError
from megatron_vapo.evaluation import evaluate
from megatron_vapo.metrics import evaluation_rows, rollout_metrics, sample_rows, token_metrics
from megatron_vapo.models.checkpointing import load_trainable, save_trainable
from megatron_vapo.models.layout import ParallelLayout, init_world, layout_sizes
from megatron_vapo.models.parameters import hf_tensors, load_hf
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.models.trainable import Loss, Trainable
from megatron_vapo.observe.metrics import Kind, MetricsWriter
from megatron_vapo.observe.progress import Phase, Progress
from megatron_vapo.observe.report import write_samples
from megatron_vapo.observe.timer import PhaseTimer
from megatron_vapo.preflight import Inputs
from megatron_vapo.rewards.scorer import RewardScorer
from megatron_vapo.rollout import RolloutEngine
from megatron_vapo.rollout.transformers_engine import TransformersEngine
from megatron_vapo.sampling import Sampler, seeds
from megatron_vapo.weight_sync import WeightSync
from megatron_vapo.weights.hf_folder import torch_dtype, write_hf_folder


class Run:
    """Built once the recipe and its inputs are known to be good. All processes hold one."""

    def __init__(self, recipe: Recipe, inputs: Inputs, display: Progress) -> None:
        init_world()
        self.recipe, self.inputs, self.display = recipe, inputs, display
        self.folder = Path(recipe.run_dir)
        self.first_rank = dist.get_rank() == 0
        self.timer = PhaseTimer()
        self._skipped: Counter[str] = Counter()
        self.models = build_models(recipe, inputs)
        self.scorer = RewardScorer(
            inputs.reward, workers=recipe.reward.workers, timeout_s=recipe.reward.timeout_seconds
        )
        self.engine = build_engine(recipe, inputs, self.actor.device)
        self._sync = WeightSync(
            self.actor, self.engine, recipe.rollout.check_weights_every, recipe.rollout.bucket_mib * 2**20
        )
        self.sampler = Sampler(inputs, self.engine, self.scorer, recipe.seed, recipe.rollout, recipe.reward)
        self.order = PromptOrder(len(inputs.prompts), recipe.seed)
        self.progress = self._restore()
        self.writer = self._open_records() if self.first_rank else None
        self.phase: Phase | None = None
        self.sampler.on_tokens = lambda count: self.phase.add(count * dist.get_world_size())
        self.sync_weights()

    @property
    def actor(self) -> Actor:
        return self.models["actor"]

    @property
    def critic(self) -> Critic:
        return self.models["critic"]

    def rollout(self, purpose: Kind, step: int) -> Experience:
        """Group-sample the next prompts with the present policy and score the responses."""
        self._show("rollout (tokens)")
        name = f"{purpose}_{step:06d}.safetensors"
        if self.recipe.rollout.replay:
            return _replayed(Path(self.recipe.rollout.replay) / name)
        with self.timer("rollout"):
            batch, rows = self.sampler.experience(self.inputs.prompts, self.order, purpose, step)
        if self.first_rank and purpose == "train":
            write_samples(self.folder, step, sample_rows(rows), self.recipe.observe.samples_per_step)
        if self.first_rank and self.recipe.rollout.save:
            (self.folder / "rollouts").mkdir(exist_ok=True)
            batch.save(self.folder / "rollouts" / name)
        return batch

    def values(self, batch: Experience) -> Experience:
        """Add the critic's values."""
        self._show("values")
        with self.timer("values"):
            (values,) = self.critic.forward(batch)
        return replace(batch, values=values)

    def logprobs(self, batch: Experience) -> Experience:
        """Add the actor's log-probs and entropy."""
        self._show("log-probs")
        with self.timer("logprobs"):
            logprobs, entropy = self.actor.forward(batch)
        return replace(batch, logprobs=logprobs, entropy=entropy)

    def update_critic(self, batch: Experience, epochs: int, step: int) -> dict[str, float]:
        """Minibatch updates towards the value targets; metrics are means over them."""
        self._show("critic update")
        with self.timer("critic_update"):
            return self._update(self.critic, objectives.value_objective, batch, epochs, step)

    def update_actor(self, batch: Experience, step: int) -> dict[str, float]:
        """Minibatch updates of the policy; metrics are means over them."""
        self._show("actor update")
        with self.timer("actor_update"):
            return self._update(self.actor, objectives.policy_objective, batch, self.recipe.epochs, step)

    def sync_weights(self) -> None:
        """Give the rollout engine the actor's present weights; their version is the number of finished steps."""
        self._show("weight sync")
        with self.timer("weight_sync"):
            self._sync(version=self.progress.steps)

    def evaluate(self) -> float:
        """Held-out accuracy of the present policy, recorded."""
        settings = self.recipe.evaluation
        training_phase = self.phase
        with self.display.phase("evaluate", total=1) as self.phase:
            self._show("evaluation (tokens)")
            with self.timer("evaluation"):
                result = evaluate(self.sampler, self.inputs.held_out, settings.samples, settings.sampling)
            self._write("evaluate", self.progress.steps, result.metrics)
            self.phase.advance(result.metrics)
        self.phase = training_phase
        if self.first_rank:
            rows = evaluation_rows(self.inputs.held_out, result.responses, settings.samples)
            write_samples(self.folder / "evaluation", self.progress.steps, rows, 64)
        return result.metrics["evaluate/accuracy"]

    def finish_step(self, kind: Kind, step: int, batch: Experience, metrics: dict[str, float]) -> None:
        """Record the step."""
        tokens = int(batch.cu_seqlens[-1])
        if kind == "pretrain":
            self.progress.pretraining_tokens += tokens
        else:
            self.progress.sampled_tokens += tokens
        seconds = self.timer.step_seconds()
        spent = sum(value for name, value in seconds.items() if name.startswith("seconds/"))
        everything = (
            rollout_metrics(batch)
            | token_metrics(batch)
            | metrics
            | seconds
            | {"throughput/tokens_per_second": tokens / spent, "tokens/sampled": self.progress.sampled_tokens}
            | {"reward/failures": self.scorer.failures, "reward/timeouts": self.scorer.timeouts}
        )
        self._write(kind, step, everything)
        self.phase.advance(everything)
        self.timer.start_step()

    def save(self) -> None:
        """Checkpoint models and progress."""
        self._show("checkpoint")
        self.progress.prompt_order = self.order.state_dict()
        with self.timer("checkpoint"):
            path = checkpoint.save_checkpoint(
                self.folder / "checkpoints", self.progress, self.models, self.recipe.checkpoint.keep
            )
        self.display.note(f"checkpoint saved: {path}")

    def save_pretrained_critic(self) -> None:
        """Keep the critic that value pretraining made, so that other runs can start from it."""
        folder = self.folder / "critic_pretrained"
        if self.first_rank:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        save_trainable(self.critic, folder)

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
        dist.barrier()
        return folder

    def close(self) -> None:
        """Close records and end worker processes."""
        if self.writer is not None:
            self.writer.close()
        self.scorer.close()
        self.engine.close()

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

    def _restore(self) -> checkpoint.Progress:
        found = checkpoint.checkpoints(self.folder / "checkpoints")
        if not found:
            return checkpoint.Progress()
        progress = checkpoint.load_checkpoint(found[-1], self.models)
        self.order.load_state_dict(progress.prompt_order)
        self.display.note(f"resumed from {found[-1]}")
        return progress

    def _open_records(self) -> MetricsWriter:
        project = self.recipe.observe.wandb_project
        return MetricsWriter(
            self.folder,
            start_at={
                "pretrain": self.progress.pretraining_steps + 1,
                "train": self.progress.steps + 1,
                "evaluate": self.progress.steps + bool(self.progress.accuracy_before is not None),
            },
            wandb={"project": project, "name": self.recipe.name} if project else None,
        )

    def _write(self, kind: Kind, step: int, metrics: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(step, metrics, kind)

    def _show(self, activity: str) -> None:
        if self.phase is not None:
            self.phase.activity(activity)


def build_models(recipe: Recipe, inputs: Inputs) -> dict[str, Trainable]:
    """Actor, and critic where the algorithm has one, loaded from their Hugging Face folders."""
    dtype = torch_dtype(recipe.model.dtype)
    temperature = recipe.rollout.sampling.temperature
    layout = ParallelLayout(recipe.actor, recipe.seed)
    actor = Actor(recipe.actor, inputs.architecture, dtype, layout, temperature)
    load_hf(actor, recipe.model.path)
    models: dict[str, Trainable] = {"actor": actor}
    if inputs.critic_architecture is not None:
        if layout_sizes(recipe.critic) != layout_sizes(recipe.actor):
            layout = ParallelLayout(recipe.critic, recipe.seed)
        critic = Critic(recipe.critic, inputs.critic_architecture, dtype, layout)
        critic.set_head(recipe.critic.init == "fresh_head", recipe.seed)
        load_hf(critic, recipe.critic.reward_model or recipe.model.path)
        models["critic"] = critic
    return models


def build_engine(recipe: Recipe, inputs: Inputs, device: torch.device) -> RolloutEngine:
    """The engine that the recipe names."""
    tokenizer = inputs.tokenizer
    return TransformersEngine(
        recipe.model.path,
        end_ids=inputs.end_ids,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else inputs.end_ids[0],
        batch_size=recipe.rollout.batch_size,
        dtype=torch_dtype(recipe.model.dtype),
        device=device,
    )


def _replayed(path: Path) -> Experience:
    if not path.is_file():
        raise DataError(f"rollout.replay: {path} is missing; lower steps, or save more with rollout.save=true")
    return Experience.load(path)
