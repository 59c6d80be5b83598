"""The verb `megatron-vapo evaluate`."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vapo.checkpoint.run_folder import check_same_data
from megatron_vapo.commands.train import first_process
from megatron_vapo.config import OffloadConfig, PrecisionConfig, Recipe
from megatron_vapo.errors import CheckpointError, RecipeError
from megatron_vapo.recipe.layout import check_model, check_world
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.recipe.preflight import Inputs, read_evaluation_inputs, world_size
from megatron_vapo.runtime import cpu_backend
from megatron_vapo.runtime.determinism import be_deterministic
from megatron_vapo.runtime.verification import refuse_damaged
from megatron_vapo.weights.hf_folder import HFFolder

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_vapo.rollout import RolloutEngine


# A folder's tensors are whole; SGLang takes such in flattened buckets, and one process can host a server of any size.
_OF_A_FOLDER = ("rollout.sglang.placement=colocated", "rollout.sglang.update=flattened_bucket")


def evaluate_checkpoint(
    path: str,
    recipe_path: str | None,
    overrides: Iterable[str],
    data: str | None,
    samples: int | None,
    dry_run: bool = False,
) -> None:
    """Print avg@k and pass@k of a Hugging Face folder or a run's checkpoint.

    A folder is evaluated by one process, a checkpoint by as many as its actor's layout takes.
    """
    checkpoint = Path(path)
    is_hf = (checkpoint / "config.json").is_file()
    if not is_hf and not (checkpoint / "state.json").is_file():
        raise CheckpointError(
            f"{path}: no checkpoint; name a Hugging Face folder (RUN/export) or RUN/checkpoints/step_..."
        )
    recipe_path = recipe_path or _recipe_of(checkpoint, is_hf)
    given = {"evaluation.data": data, "evaluation.samples": samples, "model.path": path if is_hf else None}
    overrides = [*overrides, *(f"{key}={value}" for key, value in given.items() if value is not None)]
    overrides += _OF_A_FOLDER if is_hf else ()
    recipe = load_recipe(recipe_path, overrides)
    if recipe.evaluation.data is None:
        raise RecipeError("evaluation.data is not set: name a prompt set with --data")
    if recipe.deterministic:
        be_deterministic()
    inputs = read_evaluation_inputs(recipe)
    if not is_hf:
        check_world("actor", recipe.actor, world_size())
        check_model("actor", recipe.actor, inputs.architecture)
    if dry_run:
        print(f"{path}: {len(inputs.held_out)} problems x {recipe.evaluation.samples} responses: ready to evaluate")
        return

    metrics = _evaluated(recipe, inputs, checkpoint, is_hf)
    if first_process():
        sizes = Counter(prompt.dataset for prompt in inputs.held_out)
        for name, count in sizes.items() if len(sizes) > 1 else ():
            print(f"{name}: {_line(metrics, f'evaluate/{name}', recipe.evaluation.samples, count)}")
        print(_line(metrics, "evaluate", recipe.evaluation.samples, len(inputs.held_out)))


def _line(metrics: dict[str, float], of: str, k: int, problems: int) -> str:
    return (
        f"avg@{k} {metrics[f'{of}/accuracy']:.4f} +- {metrics[f'{of}/standard_error']:.4f}  "
        f"pass@{k} {metrics[f'{of}/pass_at_k']:.4f}  ({problems} problems, mean length "
        f"{metrics[f'{of}/length_mean']:.1f}, truncated {metrics[f'{of}/truncated']:.1%})"
    )


def _evaluated(recipe: Recipe, inputs: Inputs, checkpoint: Path, is_hf: bool) -> dict[str, float]:
    import torch

    cpu_backend.install()
    from megatron_vapo.models.layout import init_world
    from megatron_vapo.sampling.evaluation import evaluate
    from megatron_vapo.training.build import build_engine, build_sampler

    init_world()
    check_same_data(inputs)
    if not is_hf:
        refuse_damaged(checkpoint)
    settings = recipe.evaluation
    with (
        tempfile.TemporaryDirectory(prefix="megatron-vapo-") as logs,
        closing(build_engine(recipe, inputs, torch.device(torch.cuda.current_device()), Path(logs))) as engine,
    ):
        load_weights = (_folder_loader if is_hf else _checkpoint_loader)(recipe, inputs, engine, checkpoint)
        load_weights()
        with closing(build_sampler(recipe, inputs, engine, load_weights)) as sampler:
            return evaluate(sampler, inputs.held_out, settings.samples, settings.sampling).metrics


def _folder_loader(recipe: Recipe, _: Inputs, engine: RolloutEngine, folder: Path) -> Callable[[], None]:
    """Return what gives the engine a Hugging Face folder's tensors, read anew each time."""
    from megatron_vapo.training.build import engine_form
    from megatron_vapo.training.weight_sync import load_everywhere
    from megatron_vapo.weights.fp8 import whole_tensors

    source = HFFolder(folder)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        return whole_tensors(engine_form(recipe), ((name, source.read(name)) for name in sorted(source.names)))

    return lambda: load_everywhere(engine, tensors, version=0)


def _checkpoint_loader(recipe: Recipe, inputs: Inputs, engine: RolloutEngine, checkpoint: Path) -> Callable[[], None]:
    """Return what gives the engine a run's actor, of which each rank holds its part and no more."""
    from megatron_vapo.models.checkpointing import load_parameters
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.roles import Actor
    from megatron_vapo.training.build import build_weight_sync
    from megatron_vapo.weights.hf_folder import torch_dtype

    layout = ParallelLayout(recipe.actor, recipe.seed)
    # Nothing is computed; beside a server that answers, the parameters wait on the host.
    role = replace(recipe.actor, precision=PrecisionConfig(), offload=OffloadConfig(parameters=True))
    actor = Actor(role, inputs.architecture, torch_dtype(recipe.model.dtype), layout)
    load_parameters(actor, checkpoint / "actor")
    actor.offloader.keep()
    sync = build_weight_sync(recipe, actor, engine)

    def load() -> None:
        sync(version=0)
        actor.offloader.keep()

    return load


def _recipe_of(checkpoint: Path, is_hf: bool) -> str:
    run = checkpoint.resolve().parent if is_hf else checkpoint.resolve().parent.parent
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise RecipeError(f"{checkpoint} is not part of a run: name a recipe with data and reward by --recipe")
    return str(recipe)
