"""The verbs `train` and `pretrain-critic` of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record

from megatron_vapo.checkpoint.run_folder import check_data, check_same_data, open_run_folder, sole_use
from megatron_vapo.config import Recipe
from megatron_vapo.errors import RecipeError, RewardError, RolloutError
from megatron_vapo.observe.progress import ProgressDisplay
from megatron_vapo.observe.report import plot_curves, write_summary
from megatron_vapo.recipe.precision import check_machine
from megatron_vapo.recipe.preflight import Inputs, read_inputs, world_size
from megatron_vapo.runtime import cpu_backend
from megatron_vapo.runtime.collectives import on_first_rank
from megatron_vapo.runtime.determinism import be_deterministic
from megatron_vapo.runtime.kernels import detect_machine

if TYPE_CHECKING:
    from megatron_vapo.training.run import Run


def run_recipe(recipe: Recipe, restart: bool, dry_run: bool) -> bool:
    """Train; return True once the run is finished, False where a signal stopped it."""
    return execute(recipe, restart, dry_run, _train)


def pretrain(recipe: Recipe, restart: bool, dry_run: bool) -> bool:
    """Do value pretraining alone; return as `run_recipe`."""
    if not recipe.uses_critic or not recipe.value_pretraining.enabled or recipe.value_pretraining.checkpoint:
        raise RecipeError(
            "pretrain-critic needs a critic (algorithm.advantage=gae), value_pretraining.enabled=true and no "
            "value_pretraining.checkpoint"
        )
    return execute(recipe, restart, dry_run, _pretrain)


def execute(recipe: Recipe, restart: bool, dry_run: bool, body: Callable[[Run], None]) -> bool:
    """Build the recipe's run and do `body` with it; return whether it finished."""
    if recipe.deterministic:
        be_deterministic()
    inputs = read_inputs(recipe)
    console = Console(quiet=not first_process())
    if dry_run:
        console.print(_description(recipe, inputs), markup=False, highlight=False)
        return True
    return bool(_work(recipe, inputs, restart, console, body))


@record  # leaves the first failure of any process where torchrun reports it
def _work(recipe: Recipe, inputs: Inputs, restart: bool, console: Console, body: Callable) -> bool:
    cpu_backend.install()
    from megatron_vapo.models.layout import init_world

    init_world()  # takes this process's device, which `detect_machine` asks
    machine = detect_machine()
    for name, role in recipe.roles.items():
        check_machine(name, role.precision, machine)
    check_same_data(inputs)
    with ExitStack() as stack:
        summary = on_first_rank(lambda: _open(recipe, inputs, restart, stack, console))
        if summary is not None:
            console.print(f"{recipe.run_dir} is finished; --restart trains anew", markup=False, highlight=False)
        else:
            summary = _supervised(recipe, inputs, console, body)
    if summary is not None:
        _print_accuracy(console, summary["accuracy_before"], summary["accuracy_after"])
    return summary is not None


def _open(recipe: Recipe, inputs: Inputs, restart: bool, stack: ExitStack, console: Console) -> dict[str, Any] | None:
    def note(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    stack.enter_context(sole_use(Path(recipe.run_dir)))
    summary = open_run_folder(recipe, restart, note)
    if summary is None:
        check_data(recipe, inputs, note)
    return summary


def _supervised(recipe: Recipe, inputs: Inputs, console: Console, body: Callable) -> dict[str, Any] | None:
    """Run under signals and watchdog; return the final state, None where it was stopped (with a checkpoint)."""
    from megatron_vapo.runtime.signals import Interrupt
    from megatron_vapo.runtime.watchdog import Watchdog, name_machine_errors
    from megatron_vapo.training.run import Run

    with (
        ProgressDisplay(console, quiet=not first_process()) as display,
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
    return asdict(run.state) if finished else None


def _until_stopped(run: Run, body: Callable[[Run], None]) -> bool:
    from megatron_vapo.runtime.signals import StopRequested

    try:
        body(run)
    except StopRequested:
        run.save(ending=True)
        run.settle(wait=True)
        run.raise_alarm()
        return False
    except (RolloutError, RewardError):  # on all ranks together, between updates: nothing is half done
        run.save(ending=True)
        run.settle(wait=True)
        raise
    return True


def _train(run: Run) -> None:
    from megatron_vapo.checkpoint.export import export_actor
    from megatron_vapo.training.loop import train

    train(run)
    recipe = run.recipe
    export = export_actor(run.actor, run.folder / "export", recipe.model.path, recipe.rollout.bucket_mib * 2**20)
    if run.first_rank:
        write_summary(
            run.folder,
            **asdict(run.state),
            export=str(export),
            seconds={k.split("/")[1]: v for k, v in run.timer.run_seconds().items() if k.startswith("seconds/")},
        )
        run.display.note(f"export: {export}   curves: {plot_curves(run.folder)}")


def _pretrain(run: Run) -> None:
    from megatron_vapo.training.loop import pretrain_critic

    if not run.state.pretraining_done:
        pretrain_critic(run)
    run.settle(wait=True)
    run.display.note(f"critic: {run.folder / 'critic_pretrained'}")


def _description(recipe: Recipe, inputs: Inputs) -> str:
    a = inputs.architecture
    dropped = f" ({inputs.dropped} too long, dropped)" if inputs.dropped else ""
    of_files = [f"{len(inputs.prompts)} prompts{dropped}"] if inputs.prompts else []
    prompts = " and ".join([*of_files, *(f"prompts of {name}" for name in inputs.sources)])
    return (
        f"{recipe.name}: {a.family}, {a.layers} layers, hidden {a.hidden}, vocabulary {a.vocab}; "
        f"{prompts}, {len(inputs.held_out)} held out; "
        f"{recipe.responses_per_step} responses a step in minibatches of {recipe.minibatch_size}; "
        f"{world_size()} process(es): ready to run"
    )


def _print_accuracy(console: Console, before: float | None, after: float | None) -> None:
    if before is not None and after is not None:
        console.print(f"accuracy {before:.4f} -> {after:.4f}", highlight=False)


def first_process() -> bool:
    """Return whether this is the first process, which prints."""
    return int(os.environ.get("RANK", "0")) == 0
