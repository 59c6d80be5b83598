"""Checkpoints of a run: everything that a step depends on, under its final name only when complete.

    RUN/checkpoints/step_000020/
        actor/  critic/     Megatron's distributed checkpoints: parameters, optimizer, schedule
        state.json          progress of the run

Random draws are keyed by (seed, purpose, step), so there is no generator to save.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch.distributed as dist

from megatron_vapo.errors import CheckpointError
from megatron_vapo.models.checkpointing import load_trainable, save_trainable
from megatron_vapo.models.trainable import Trainable


@dataclass
class Progress:
    """How far a run has come."""

    pretraining_steps: int = 0
    pretraining_done: bool = False
    steps: int = 0
    prompt_order: dict[str, int] | None = None
    sampled_tokens: int = 0
    """Response tokens of training rollouts."""
    pretraining_tokens: int = 0
    """Response tokens of value pretraining's rollouts."""
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    """Of the last evaluation."""


def save_checkpoint(folder: Path, progress: Progress, models: dict[str, Trainable], keep: int) -> Path:
    """Write a checkpoint, then drop the oldest beyond `keep`. All ranks together."""
    name = f"step_{progress.steps:06d}" if progress.pretraining_done else f"pretrain_{progress.pretraining_steps:06d}"
    final, part = folder / name, folder / f"{name}.part"
    if _first_rank():
        shutil.rmtree(part, ignore_errors=True)
        for role in models:
            (part / role).mkdir(parents=True)
    dist.barrier()
    for role, model in models.items():
        save_trainable(model, part / role)
    if _first_rank():
        (part / "state.json").write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("*_[0-9]*") if (p / "state.json").is_file() and not p.name.endswith(".part")]
    return sorted(found, key=lambda p: (p.name.startswith("step_"), p.name))


def load_checkpoint(checkpoint: Path, models: dict[str, Trainable]) -> Progress:
    """Restore models and progress. All ranks together.

    Raises:
        CheckpointError: a damaged or foreign checkpoint.
    """
    for role, model in models.items():
        load_trainable(model, checkpoint / role)
    return read_progress(checkpoint)


def read_progress(checkpoint: Path) -> Progress:
    """The progress that a checkpoint holds."""
    path = checkpoint / "state.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return Progress(**{f.name: saved[f.name] for f in fields(Progress)})
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a checkpoint's state: {type(error).__name__}: {error}") from error


def _first_rank() -> bool:
    return dist.get_rank() == 0
