"""The numbers of a run: `metrics.jsonl` is the record; TensorBoard and W&B show the same numbers."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from megatron_vapo.errors import RecipeError, UserError
from megatron_vapo.observe.files import complete_lines, to_json
from megatron_vapo.runtime.durable import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Kind = Literal["pretrain", "train", "evaluate"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends the metrics of each step to a run folder. One per run, so on one rank only.

    1. Opening drops what an interrupted run wrote beyond its last checkpoint: records of a kind in `start_at` with
       `step >= start_at[kind]`, in `metrics.jsonl` and in TensorBoard. Kinds that are not named keep all records.
    2. `write` appends one record and flushes it, so that a killed run loses nothing.
    3. `close` (or leaving the `with` block) ends TensorBoard and W&B.

    Each kind is a TensorBoard run of its own (`tensorboard/train`, ...), because pretraining and training count
    their steps separately under the same metric names.

    Args:
        folder: run folder; made if absent.
        start_at: the step each kind goes on with; zeros for a run that starts over in an old folder.
        tensorboard: write TensorBoard's events too.
        wandb: arguments of `wandb.init` such as `{"project": "vapo", "mode": "offline"}`; None: no W&B.

    Raises:
        RecipeError: W&B is asked for but not installed.
    """

    def __init__(
        self,
        folder: Path,
        start_at: Mapping[Kind, int] | None = None,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        start_at = start_at or {}
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = None if wandb is None else _Wandb(folder, wandb)
        _drop_records(folder / FILE_NAME, start_at)
        self._file = (folder / FILE_NAME).open("a", encoding="utf-8")
        self._tensorboard = _event_writers(folder / "tensorboard", start_at) if tensorboard else {}

    def write(self, step: int, metrics: Mapping[str, float], kind: Kind) -> None:
        """Record `metrics` (names with slashes, such as `critic/loss`) for one step of one kind."""
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(to_json({"kind": kind, "step": step, "time": time.time(), **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint is on disk too: a record lost before it would never come again
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard[kind].add_scalar(name, value, step)
            self._tensorboard[kind].flush()
        if self._wandb is not None:
            self._wandb.log(step, values, kind)

    def close(self) -> None:
        """Close the file and every writer."""
        self._file.close()
        for writer in self._tensorboard.values():
            writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(folder: Path, kind: Kind) -> list[dict[str, Any]]:
    """Return records of one kind in the order written: `step`, `time` (Unix seconds), `kind` and the metrics as floats.

    Safe while the run is still writing.

    Raises:
        UserError: the folder holds no `metrics.jsonl`.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {FILE_NAME}. Give the folder that a run wrote into.")
    records = map(json.loads, complete_lines(path))
    return [_with_floats(record) for record in records if record["kind"] == kind]


def _with_floats(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: float(value) if isinstance(value, str) and name != "kind" else value for name, value in record.items()
    }


def _event_writers(folder: Path, start_at: Mapping[Kind, int]) -> dict[Kind, "SummaryWriter"]:
    from torch.utils.tensorboard import SummaryWriter

    return {kind: SummaryWriter(str(folder / kind), purge_step=start_at.get(kind)) for kind in KINDS}


def _drop_records(path: Path, start_at: Mapping[Kind, int]) -> None:
    """Keep the records before `start_at`; also mend a torn last line, to which the next would be appended."""
    if not path.exists():
        return
    lines = [(line, json.loads(line)) for line in complete_lines(path)]
    kept = [line + "\n" for line, record in lines if record["step"] < start_at.get(record["kind"], math.inf)]
    write_text(path, "".join(kept))


class _Wandb:
    """A W&B run in which each kind counts its own steps; W&B by itself has one step for all."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise RecipeError(
                "the recipe asks for Weights & Biases, but the package `wandb` is not installed: "
                "`pip install wandb`, or leave W&B out of the recipe (metrics.jsonl is always written)"
            ) from error
        self._run = wandb.init(dir=str(folder), **settings)
        self._known: set[str] = set()

    def log(self, step: int, values: Mapping[str, float], kind: Kind) -> None:
        named = {f"{kind}/{name}": value for name, value in values.items()}
        for name in named.keys() - self._known:  # one by one: its pattern "train/*" would not match "train/critic/loss"
            self._run.define_metric(name, step_metric=f"{kind}/step")
        self._known |= named.keys()
        self._run.log({f"{kind}/step": step, **named})

    def finish(self) -> None:
        self._run.finish()
