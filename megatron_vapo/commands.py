"""What the command line's verbs do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from megatron_vapo.backend import look
from megatron_vapo.config import PrecisionConfig, Recipe
from megatron_vapo.determinism import be_deterministic
from megatron_vapo.errors import CheckpointError, RecipeError, RolloutError
from megatron_vapo.layout_checks import check_model, check_world
from megatron_vapo.observe.progress import Progress
from megatron_vapo.observe.report import plot_curves, write_summary
from megatron_vapo.precision_checks import check_machine
from megatron_vapo.preflight import Inputs, read_evaluation_inputs, read_inputs, world_size
from megatron_vapo.recipe import load_recipe
from megatron_vapo.run_folder import open_run_folder, sole_use
from megatron_vapo.together import on_first_rank
from megatron_vapo.weights.hf_folder import HFFolder

if TYPE_CHECKING:
    from megatron_vapo.run import Run


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
    if recipe.deterministic:
        be_deterministic()
    inputs = read_inputs(recipe)
    console = Console(quiet=not _first_process())
    if dry_run:
        console.print(_description(recipe, inputs), highlight=False)
        return True
    return _work(recipe, inputs, restart, console, body)


@record  # leaves the first failure of any process where torchrun reports it
def _work(recipe: Recipe, inputs: Inputs, restart: bool, console: Console, body: Callable) -> bool:
    from megatron_vapo.models.layout import init_world

    init_world()  # takes this process's device, which `look` asks
    found = look()
    for name, role in recipe.roles.items():
        check_machine(name, role.precision, found)
    with ExitStack() as stack:
        summary = on_first_rank(lambda: _open(recipe, restart, stack, console))
        if summary is not None:
            console.print(f"{recipe.run_dir} is finished; --restart trains anew", highlight=False)
        else:
            summary = _supervised(recipe, inputs, console, body)
    if summary is not None:
        _print_accuracy(console, summary["accuracy_before"], summary["accuracy_after"])
    return summary is not None


def _open(recipe: Recipe, restart: bool, stack: ExitStack, console: Console) -> dict[str, Any] | None:
    stack.enter_context(sole_use(Path(recipe.run_dir)))
    return open_run_folder(recipe, restart, note=lambda text: console.print(text, markup=False, highlight=False))


def _supervised(recipe: Recipe, inputs: Inputs, console: Console, body: Callable) -> dict[str, Any] | None:
    """The run, under the eyes of signals and watchdog; its progress, None where it was stopped (with a checkpoint)."""
    from megatron_vapo.interrupt import Interrupt
    from megatron_vapo.run import Run
    from megatron_vapo.watchdog import Watchdog, name_machine_errors

    with (
        Progress(console, quiet=not _first_process()) as display,
        Interrupt(recipe.limits) as interrupt,
        Watchdog(recipe.limits, interrupt, recipe.run_dir) as watchdog,
        name_machine_errors(watchdog),
    ):
        run = Run(recipe, inputs, display, interrupt, watchdog)
        try:
            finished = _until_stopped(run, body)
        finally:
            run.close()
        run.leave_groups()  # never after an error: other processes may be gone
    return asdict(run.progress) if finished else None


def _until_stopped(run: Run, body: Callable[[Run], None]) -> bool:
    from megatron_vapo.interrupt import StopRequested

    try:
        body(run)
    except StopRequested:
        run.save()
        run.settle(wait=True)
        return False
    except RolloutError:  # on all ranks together, and engines are asked between updates only: nothing is half done
        run.save()
        run.settle(wait=True)
        raise
    return True


def _train(run: Run) -> None:
    from megatron_vapo.loop import train

    train(run)
    export = run.export()
    if run.first_rank:
        write_summary(
            run.folder,
            **asdict(run.progress),
            export=str(export),
            seconds={k.split("/")[1]: v for k, v in run.timer.run_seconds().items() if k.startswith("seconds/")},
        )
        run.display.note(f"export: {export}   curves: {plot_curves(run.folder)}")


def _pretrain(run: Run) -> None:
    from megatron_vapo.loop import pretrain_critic

    if not run.progress.pretraining_done:
        pretrain_critic(run)
    run.settle(wait=True)
    run.display.note(f"critic: {run.folder / 'critic_pretrained'}")


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
    if recipe.deterministic:
        be_deterministic()
    inputs = read_evaluation_inputs(recipe)
    if not is_hf:
        check_world("actor", recipe.actor, world_size())
        check_model("actor", recipe.actor, inputs.architecture)

    metrics = _evaluated(recipe, inputs, checkpoint, is_hf)
    if _first_process():
        k = recipe.evaluation.samples
        print(
            f"avg@{k} {metrics['evaluate/accuracy']:.4f} +- {metrics['evaluate/standard_error']:.4f}  "
            f"pass@{k} {metrics['evaluate/pass_at_k']:.4f}  ({len(inputs.held_out)} problems, mean length "
            f"{metrics['evaluate/length_mean']:.1f}, truncated {metrics['evaluate/truncated']:.1%})"
        )


def _evaluated(recipe: Recipe, inputs: Inputs, checkpoint: Path, is_hf: bool) -> dict[str, float]:
    import torch

    from megatron_vapo.checkpoint import refuse_damaged
    from megatron_vapo.evaluation import evaluate
    from megatron_vapo.models.layout import init_world
    from megatron_vapo.rewards.scorer import RewardScorer
    from megatron_vapo.run import build_engine, engine_form
    from megatron_vapo.sampling import Sampler
    from megatron_vapo.weight_sync import load_everywhere
    from megatron_vapo.weights.fp8 import whole_tensors

    init_world()
    if not is_hf:
        refuse_damaged(checkpoint)
    # Whole tensors come from a file or a checkpoint, not from the actor's shards.
    recipe.rollout.sglang.update = "flattened_bucket"
    settings, reward = recipe.evaluation, recipe.reward
    with (
        tempfile.TemporaryDirectory(prefix="megatron-vapo-") as logs,
        RewardScorer(inputs.reward, workers=reward.workers, timeout_s=reward.timeout_seconds) as scorer,
        closing(build_engine(recipe, inputs, torch.device(torch.cuda.current_device()), Path(logs))) as engine,
    ):

        def tensors() -> Iterable:
            stored = _folder_tensors(checkpoint) if is_hf else _actor_tensors(recipe, inputs, checkpoint)
            return whole_tensors(engine_form(recipe), stored)

        def load_weights() -> None:
            load_everywhere(engine, tensors, version=0)

        load_weights()
        sampler = Sampler(inputs, engine, scorer, recipe.seed, recipe.rollout, reward, load_weights)
        return evaluate(sampler, inputs.held_out, settings.samples, settings.sampling).metrics


def _folder_tensors(folder: Path) -> Iterable:
    source = HFFolder(folder)
    return ((name, source.read(name)) for name in sorted(source.names))


def _actor_tensors(recipe: Recipe, inputs: Inputs, checkpoint: Path) -> Iterable:
    from megatron_vapo.models.checkpointing import load_trainable
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.parameters import hf_tensors
    from megatron_vapo.models.roles import Actor
    from megatron_vapo.weights.hf_folder import torch_dtype

    layout = ParallelLayout(recipe.actor, recipe.seed)
    role = replace(recipe.actor, precision=PrecisionConfig())  # nothing is computed
    actor = Actor(role, inputs.architecture, torch_dtype(recipe.model.dtype), layout)
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
