"""What the command line's verbs do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from megatron_vapo.config import Recipe
from megatron_vapo.errors import CheckpointError, RecipeError, UserError
from megatron_vapo.layout_checks import check_model, check_world
from megatron_vapo.observe.progress import Progress
from megatron_vapo.observe.report import plot_curves, write_summary
from megatron_vapo.preflight import Inputs, read_evaluation_inputs, read_inputs, world_size
from megatron_vapo.recipe import load_recipe
from megatron_vapo.run_folder import open_run_folder
from megatron_vapo.weights.hf_folder import HFFolder


def run_recipe(recipe: Recipe, restart: bool, dry_run: bool) -> bool:
    """`megatron-vapo train`: True once the run is finished, False where a signal stopped it."""
    return _execute(recipe, restart, dry_run, _train)


def pretrain(recipe: Recipe, restart: bool, dry_run: bool) -> bool:
    """`megatron-vapo pretrain-critic`: value pretraining alone."""
    if not recipe.uses_critic or not recipe.value_pretraining.enabled or recipe.value_pretraining.checkpoint:
        raise RecipeError(
            "pretrain-critic needs algorithm.advantage=gae, value_pretraining.enabled=true and no "
            "value_pretraining.checkpoint"
        )
    return _execute(recipe, restart, dry_run, _pretrain)


def _execute(recipe: Recipe, restart: bool, dry_run: bool, body: Callable) -> bool:
    inputs = read_inputs(recipe)
    console = Console(quiet=not _first_process())
    if dry_run:
        console.print(_description(recipe, inputs), highlight=False)
        return True
    return _work(recipe, inputs, restart, console, body)


@record  # leaves the first failure of any process where torchrun reports it
def _work(recipe: Recipe, inputs: Inputs, restart: bool, console: Console, body: Callable) -> bool:
    from megatron_vapo.interrupt import Interrupt
    from megatron_vapo.models.layout import init_world
    from megatron_vapo.run import Run

    init_world()
    summary = _open_together(recipe, restart)
    if summary is not None:
        console.print(f"{recipe.run_dir} is finished; --restart trains anew", highlight=False)
        _print_accuracy(console, summary["accuracy_before"], summary["accuracy_after"])
        return True
    with Progress(console, quiet=not _first_process()) as display, Interrupt() as interrupt:
        run = Run(recipe, inputs, display)
        try:
            finished = body(run, interrupt)
        finally:
            run.close()
    if finished:
        _print_accuracy(console, run.progress.accuracy_before, run.progress.accuracy_after)
    return finished


def _open_together(recipe: Recipe, restart: bool) -> dict[str, Any] | None:
    """The first process opens the run folder; all learn what it found."""
    outcome: list[Any] = [None]
    if _first_process():
        try:
            outcome = [open_run_folder(recipe, restart)]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def _train(run, interrupt) -> bool:
    from megatron_vapo.loop import train

    if not train(run, interrupt):
        return False
    export = run.export()
    if run.first_rank:
        write_summary(
            run.folder,
            **asdict(run.progress),
            export=str(export),
            seconds={k.split("/")[1]: v for k, v in run.timer.run_seconds().items() if k.startswith("seconds/")},
        )
        run.display.note(f"export: {export}   curves: {plot_curves(run.folder)}")
    return True


def _pretrain(run, interrupt) -> bool:
    from megatron_vapo.loop import pretrain_critic

    finished = run.progress.pretraining_done or pretrain_critic(run, interrupt)
    if finished:
        run.display.note(f"critic: {run.folder / 'critic_pretrained'}")
    return finished


def evaluate_checkpoint(
    path: str, recipe_path: str | None, overrides: Iterable[str], data: str | None, samples: int | None
) -> None:
    """`megatron-vapo evaluate`: print avg@k and pass@k of a Hugging Face folder or a run's checkpoint."""
    checkpoint = Path(path)
    is_hf = (checkpoint / "config.json").is_file()
    if not is_hf and not (checkpoint / "state.json").is_file():
        raise CheckpointError(
            f"{path}: no checkpoint; name a Hugging Face folder (RUN/export) or RUN/checkpoints/step_..."
        )
    recipe_path = recipe_path or _recipe_of(checkpoint, is_hf)
    given = {"evaluation.data": data, "evaluation.samples": samples, "model.path": path if is_hf else None}
    overrides = [*overrides, *(f"{key}={value}" for key, value in given.items() if value is not None)]
    recipe = load_recipe(recipe_path, overrides)
    if recipe.evaluation.data is None:
        raise RecipeError("evaluation.data is not set: name a prompt set with --data")
    inputs = read_evaluation_inputs(recipe)
    if not is_hf:
        check_world("actor", recipe.actor, world_size())
        check_model("actor", recipe.actor, inputs.architecture)

    import torch

    from megatron_vapo.evaluation import evaluate
    from megatron_vapo.models.layout import init_world
    from megatron_vapo.rewards.scorer import RewardScorer
    from megatron_vapo.run import build_engine
    from megatron_vapo.sampling import Sampler

    init_world()
    engine = build_engine(recipe, inputs, torch.device(torch.cuda.current_device()))
    if is_hf:
        folder = HFFolder(path)
        engine.load_weights(((name, folder.read(name)) for name in sorted(folder.names)), version=0)
    else:
        engine.load_weights(_actor_tensors(recipe, inputs, checkpoint), version=0)
    settings = recipe.evaluation
    with RewardScorer(inputs.reward, workers=recipe.reward.workers, timeout_s=recipe.reward.timeout_seconds) as scorer:
        sampler = Sampler(inputs, engine, scorer, recipe.seed, recipe.rollout, recipe.reward)
        metrics = evaluate(sampler, inputs.held_out, settings.samples, settings.sampling).metrics
    engine.close()
    if _first_process():
        k = settings.samples
        print(
            f"avg@{k} {metrics['evaluate/accuracy']:.4f} +- {metrics['evaluate/standard_error']:.4f}  "
            f"pass@{k} {metrics['evaluate/pass_at_k']:.4f}  ({len(inputs.held_out)} problems, mean length "
            f"{metrics['evaluate/length_mean']:.1f}, truncated {metrics['evaluate/truncated']:.1%})"
        )


def _actor_tensors(recipe: Recipe, inputs: Inputs, checkpoint: Path) -> Iterable:
    from megatron_vapo.models.checkpointing import load_trainable
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.parameters import hf_tensors
    from megatron_vapo.models.roles import Actor
    from megatron_vapo.weights.hf_folder import torch_dtype

    layout = ParallelLayout(recipe.actor, recipe.seed)
    actor = Actor(recipe.actor, inputs.architecture, torch_dtype(recipe.model.dtype), layout)
    load_trainable(actor, checkpoint / "actor", with_optimizer=False)
    return hf_tensors(actor)


def _recipe_of(checkpoint: Path, is_hf: bool) -> str:
    run = checkpoint.resolve().parent if is_hf else checkpoint.resolve().parent.parent
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise RecipeError(f"{checkpoint} is not part of a run: name a recipe with data and reward by --recipe")
    return str(recipe)


def _description(recipe: Recipe, inputs: Inputs) -> str:
    a = inputs.architecture
    return (
        f"{recipe.name}: {a.family}, {a.layers} layers, hidden {a.hidden}, vocabulary {a.vocab}; "
        f"{len(inputs.prompts)} prompts, {len(inputs.held_out)} held out; {recipe.responses_per_step} responses a "
        f"step in minibatches of {recipe.minibatch_size}; {world_size()} process(es): ready to run"
    )


def _print_accuracy(console: Console, before: float | None, after: float | None) -> None:
    if before is not None and after is not None:
        console.print(f"accuracy {before:.4f} -> {after:.4f}", highlight=False)


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
