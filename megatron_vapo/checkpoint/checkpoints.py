"""Checkpoints of a run: everything that a step depends on, under its final name only when complete and verified.

    RUN/checkpoints/
        step_000020/
            actor/  critic/     Megatron's distributed checkpoints: parameters, optimizer, schedule
            sampling.pt         partial rollouts; global random generators of every rank (models.generators); metrics
                                of the rollouts that are ahead
            ahead/000/          the batch of the next step, where rollouts run ahead (rollout.lag), and so on
                                (data.batch_files)
            recipe.yaml         the settings it was made with
            data.json           the fingerprint of the prompts it was made with
            state.json          progress of the run, the order of prompts included
            manifest.json       size and SHA-256 of every file above
        latest -> step_000020

Written as `runtime.durable` says; nothing older is removed before the new one is complete.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vapo.checkpoint.run_folder import DATA, checkpoints
from megatron_vapo.checkpoint.snapshot import RunState, Snapshot
from megatron_vapo.config import CheckpointConfig
from megatron_vapo.data.batch_files import read_batch, share_name
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.position import SamplingPosition
from megatron_vapo.data.rollout import Rollout
from megatron_vapo.errors import CheckpointError, MachineError, first_line
from megatron_vapo.models.checkpointing import Save, load_trainer
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.runtime.collectives import any_rank, gather_objects, on_first_rank
from megatron_vapo.runtime.durable import begin_folder, clean_up, finish_folder, point_link, remove, remove_folder
from megatron_vapo.runtime.manifest import Entry, describe
from megatron_vapo.runtime.verification import refuse_damaged

_STATE, _RECIPE, _SAMPLING = "state.json", "recipe.yaml", "sampling.pt"


class Checkpoints:
    """Saves and loads a run's checkpoints. All ranks call all methods together.

    Args:
        folder: RUN/checkpoints.
        trainers: by role.
        recipe: the run's recipe as YAML, kept with each checkpoint.
        data: the fingerprint of its prompts as JSON, kept too.
        note: shows one line to the user.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        trainers: dict[str, Trainer],
        recipe: str,
        data: str,
        note: Callable[[str], None],
    ) -> None:
        self.folder, self._settings, self._trainers, self._recipe = folder, settings, trainers, recipe
        self._data, self._note = data, note
        self._pending: _Pending | None = None
        on_first_rank(lambda: _tidy(folder))

    @property
    def pending(self) -> bool:
        """Return whether a checkpoint is under way."""
        return self._pending is not None

    def save(self, snapshot: Snapshot) -> None:
        """Start a checkpoint, unless there is one of this very state. Returns once tensors are copied to the host,
        or, without `checkpoint.async_save`, once it is complete. Waits for the one before.

        Raises:
            MachineError: it, or the one before, could not be written, and `checkpoint.failed_save` is stop.
        """
        self.settle(wait=True)
        state = snapshot.state
        final = self.folder / state.name
        if on_first_rank(lambda: final.exists() and read_state(final) == state):
            return
        generators = gather_objects(snapshot.generators)
        try:
            part = on_first_rank(lambda: self._begin(final, snapshot, generators))
        except (MachineError, OSError) as error:
            self._failed(final, first_line(error))
            return
        saves = [Save(trainer, part / role) for role, trainer in self._trainers.items()]
        mine = share_name(dist.get_rank())
        batches = {part / _ahead(n) / mine: rollout.batch for n, rollout in enumerate(snapshot.ahead)}
        self._pending = _Pending(part, final, state, saves, batches)
        if self._settings.async_save:
            self._pending.thread.start()
        else:
            self._pending.write()

    def settle(self, wait: bool) -> RunState | None:
        """Give the checkpoint under way its name if all ranks have written their part, or wait until they have.

        Returns:
            The state that it holds, where one was completed.

        Raises:
            MachineError: it could not be written, and `checkpoint.failed_save` is stop.
        """
        pending = self._pending
        if pending is None:
            return None
        if wait:
            pending.done.wait()
        if any_rank(not pending.done.is_set()):
            return None
        self._pending = None
        described = gather_objects((pending.described, pending.error))
        for rank, (_, error) in enumerate(described):
            if error:
                self._failed(pending.final, f"rank {rank}: {error}")
                return None
        for save in pending.saves:
            save.finish()
        entries = {name: entry for share, _ in described for name, entry in share.items()}
        try:
            on_first_rank(lambda: self._publish(pending, entries))
        except OSError as error:
            self._failed(pending.final, first_line(error))
            return None
        self._note(f"checkpoint saved: {pending.final}")
        return pending.state

    def load(self) -> Snapshot | None:
        """Restore models from the newest checkpoint.

        Returns:
            The snapshot that it holds; None where there is no checkpoint.

        Raises:
            CheckpointError: it is damaged (the files are named) and `checkpoint.resume_older` is off, or none is whole.
        """
        damaged = 0
        for checkpoint in reversed(on_first_rank(lambda: checkpoints(self.folder))):
            try:
                refuse_damaged(checkpoint, required=(_STATE, _RECIPE, DATA, _SAMPLING))
                return self._load(checkpoint)
            except CheckpointError as error:
                if not self._settings.resume_older:
                    raise CheckpointError(
                        f"{error}. Set checkpoint.resume_older=true to go on from the one before it"
                    ) from error
                self._note(f"WARNING: {error}. Set aside as {checkpoint.name}.damaged")
            on_first_rank(partial(_set_aside, checkpoint))
            damaged += 1
        if damaged:
            raise CheckpointError(f"{self.folder}: no checkpoint is left that is whole; --restart trains anew")
        return None

    def _begin(self, final: Path, snapshot: Snapshot, generators: list[Any]) -> Path:
        """Make, on the first rank, the folder to fill, with all that is small. Another checkpoint is as large as the
        newest."""
        newest = checkpoints(self.folder)[-1:]
        part = begin_folder(final, sum(path.stat().st_size for folder in newest for path in folder.rglob("*")))
        for role in self._trainers:
            (part / role).mkdir()
        state = asdict(snapshot.state) | {"prompt_order": snapshot.position.order}
        (part / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        (part / _RECIPE).write_text(self._recipe, encoding="utf-8")
        (part / DATA).write_text(self._data, encoding="utf-8")
        for number in range(len(snapshot.ahead)):
            (part / _ahead(number)).mkdir(parents=True)
        ahead = [{"metrics": rollout.metrics, "failures": rollout.failures} for rollout in snapshot.ahead]
        sampling = {"unfinished": snapshot.position.unfinished, "generators": generators, "ahead": ahead}
        torch.save(sampling, part / _SAMPLING)
        return part

    def _publish(self, pending: _Pending, entries: dict[str, Entry]) -> None:
        """Give it, on the first rank, its name, then move `latest`, and only then remove what is no longer kept."""
        finish_folder(pending.final, entries)
        _point_latest(pending.final)
        kept = kept_checkpoints(self.folder, self._settings)
        for path in checkpoints(self.folder):
            if path not in kept:
                remove_folder(path)

    def _failed(self, final: Path, reason: str) -> None:
        on_first_rank(lambda: clean_up(final))
        found = on_first_rank(lambda: checkpoints(self.folder))
        last = f"the last complete one is {found[-1]}" if found else "there is none yet"
        text = f"checkpoint {final.name} could not be saved: {reason}; {last}"
        if self._settings.failed_save == "stop":
            raise MachineError(f"{text}. checkpoint.failed_save=continue would train on")
        self._note(f"WARNING: {text}")

    def _load(self, checkpoint: Path) -> Snapshot:
        for role, trainer in self._trainers.items():
            load_trainer(trainer, checkpoint / role)
        saved = torch.load(checkpoint / _SAMPLING, weights_only=True)
        generators = saved["generators"]
        ahead = [
            Rollout(read_batch(checkpoint / _ahead(number)), **facts)
            for number, facts in enumerate(saved.get("ahead", []))  # older checkpoints have none
        ]
        on_first_rank(lambda: _point_latest(checkpoint))
        self._note(f"resumed from {checkpoint}")
        mine = generators[dist.get_rank()] if len(generators) == dist.get_world_size() else None
        if mine is None:
            self._note(f"{len(generators)} processes before, {dist.get_world_size()} now: global generators start anew")
        state, prompt_order = _read_state(checkpoint)
        return Snapshot(state, SamplingPosition(prompt_order, saved["unfinished"]), mine, tuple(ahead))


class _Pending:
    """The checkpoint under way, and the thread that writes this rank's part of it.

    Args:
        batches: to write, by their files.
    """

    def __init__(
        self, part: Path, final: Path, state: RunState, saves: list[Save], batches: Mapping[Path, Experience]
    ) -> None:
        self.part, self.final, self.state, self.saves, self._batches = part, final, state, saves, batches
        self.described: dict[str, Entry] = {}
        self.error: str | None = None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.write, name="checkpoint", daemon=True)

    def write(self) -> None:
        files = [path for save in self.saves for path in save.files] + list(self._batches)
        try:
            for path, batch in self._batches.items():
                batch.save(path)
            for save in self.saves:
                save.write()
                if save.error is not None:
                    raise save.error
            self.described = {path.relative_to(self.part).as_posix(): describe(path) for path in files}
        except Exception as error:  # noqa: BLE001  # whatever it is, the training thread reports it, with the rank
            self.error = first_line(error)
        self.done.set()


def _ahead(number: int) -> str:
    """Return the folder of a rollout that is ahead."""
    return f"ahead/{number:03d}"


def kept_checkpoints(folder: Path, settings: CheckpointConfig) -> set[Path]:
    """Return the checkpoints that rotation leaves: the newest, the best by held-out accuracy, and every n-th."""
    found = checkpoints(folder)
    kept = set(found[-settings.keep :])
    states = {path: read_state(path) for path in found if path.name.startswith("step_")}
    if settings.keep_best:
        evaluated = {p: s.accuracy_after for p, s in states.items() if s.evaluated_at == s.steps and s.accuracy_after}
        kept |= set(sorted(evaluated, key=lambda path: (evaluated[path], path))[-1:])
    if settings.keep_every:
        kept |= {path for path, state in states.items() if state.steps and state.steps % settings.keep_every == 0}
    return kept


def read_state(checkpoint: Path) -> RunState:
    """Return the state that a checkpoint holds."""
    return _read_state(checkpoint)[0]


def _read_state(checkpoint: Path) -> tuple[RunState, Any]:
    """Return what state.json holds: the state, and the order of prompts."""
    path = checkpoint / _STATE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return RunState(**{field.name: saved[field.name] for field in fields(RunState)}), saved["prompt_order"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint's state: {first_line(error)}") from error


def _tidy(folder: Path) -> None:
    """Remove what a run that died left half done, and complete what it was replacing."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*.part"), *folder.glob("*.old")]:
        clean_up(folder / path.stem)


def _set_aside(checkpoint: Path) -> None:
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    remove(aside)
    checkpoint.rename(aside)


def _point_latest(checkpoint: Path) -> None:
    point_link(checkpoint.parent / "latest", checkpoint.name)
