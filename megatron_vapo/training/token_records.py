"""Some responses of each step with all that was computed for their tokens, which `megatron-vapo view` shows.

    RUN/tokens/
        pretrain_000003.safetensors
        train_000012.safetensors

docs/view.md has the format. A file is whole or not there (`runtime.durable`).

Legend: B responses of a step, R of them that are kept, T response tokens of these.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_vapo.algorithm.statistics import calibration_of, calibration_sums
from megatron_vapo.checkpoint.snapshot import RunState, StepKind
from megatron_vapo.config import AlgorithmConfig
from megatron_vapo.data.experience import FACTS, RAGGED, Experience, Responses, offsets, whole_batch
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.errors import DataError
from megatron_vapo.runtime.collectives import sum_over_ranks
from megatron_vapo.runtime.durable import new_file, remove
from megatron_vapo.training.objectives import policy_ratios

FORMAT = 1
BINS = 10
"""The parts of the probability of success in a calibration."""

_KINDS: tuple[StepKind, ...] = get_args(StepKind)
_FLOATS_PER_TOKEN = 7  # rollout_logprobs, logprobs, entropy, values, advantages, returns, ratios
_BYTES_PER_TOKEN = 8 + 4 * _FLOATS_PER_TOKEN + 1
_BYTES_PER_MARK, _BYTES_PER_REWARD, _BYTES_PER_VERSION = 1, 4, 4
_BYTES_PER_PROMPT_TOKEN, _BYTES_PER_RESPONSE = 8, 64
_ANSWER = 200
"""Characters that are kept of a reference answer, which may be a whole program: answers are no part of the bound."""


@dataclass(frozen=True)
class TokenRecord:
    """The kept responses of one step."""

    kind: StepKind
    step: int
    responses: int
    """B, of which `batch` holds R."""
    batch: Experience
    answers: list[str]
    """[R] the first 200 characters of each reference answer; empty where the prompt is not in the run's prompt set (a
    replayed rollout)."""
    ratios: Tensor | None
    """[T] float32, of the policy in the last update that the token took part in; None without policy updates."""
    clipped: Tensor | None
    """[T] uint8, the bound that cut the token's gradient off in it: an index of `objectives.CLIPPED_BY`."""
    calibration: Tensor | None
    """[10, 3] float32, of the critic over all B responses, before its updates: in ten bins of the predicted success
    (V + 1) / 2 its mean, the share of right responses, the number of tokens. None without a critic."""

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors: dict[str, Tensor | None] = {**self.batch.tensors()}
        tensors |= {name: getattr(self, name) for name in _OF_RECORD}
        facts = {"format": FORMAT, "kind": self.kind, "step": self.step, "responses": self.responses}
        with new_file(path) as part:
            save_file(
                {name: tensor for name, tensor in tensors.items() if tensor is not None},
                part,
                metadata={"record": json.dumps(facts | {"answers": self.answers})},  # the order of several is random
            )

    @staticmethod
    def load(path: Path) -> TokenRecord:
        """Read what `save` wrote.

        Raises:
            DataError: it is damaged, or of another version.
        """
        facts, tensors = _read(path)
        return TokenRecord(
            kind=facts["kind"],
            step=facts["step"],
            responses=facts["responses"],
            batch=whole_batch({name: tensors[name] for name in _EXPERIENCE if name in tensors}),
            answers=facts["answers"],
            **{name: tensors.get(name) for name in _OF_RECORD},
        )


_EXPERIENCE = (*FACTS, *RAGGED)
_OF_RECORD = ("ratios", "clipped", "calibration")


def load_calibration(path: Path) -> Tensor | None:
    """Return the calibration of a file, without reading its tokens.

    Raises:
        DataError: as `TokenRecord.load`.
    """
    return _read(path, "calibration")[1].get("calibration")


def _read(path: Path, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a file's facts, and its tensors whose names begin so."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("record", "{}"))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
    except SafetensorError as error:
        raise DataError(f"{path}: damaged ({error}). Remove it to see the other steps") from error
    if facts.get("format") != FORMAT:
        raise DataError(f"{path}: of format {facts.get('format')}, this version reads {FORMAT}: view it with the run's")
    return facts, tensors


class TokenRecords:
    """Writes RUN/tokens, on the first rank alone.

    Args:
        folder: the run's.
        prompts: the run's prompt set.
        state: what the run goes on from; files of later steps are removed.
    """

    def __init__(self, folder: Path, algorithm: AlgorithmConfig, prompts: Sequence[Prompt], state: RunState) -> None:
        self._folder, self._algorithm = folder / "tokens", algorithm
        self._answers = {prompt.token_ids: prompt.answer for prompt in prompts}
        for kind, step in recorded_steps(folder):
            if step > (state.steps if kind == "train" else state.pretraining_steps):
                remove(path_of(folder, kind, step))

    def write(self, kind: StepKind, step: int, kept: Kept | None) -> None:
        """Keep some of a step's responses, in place of those that are there; None: keep nothing."""
        if kept is not None:
            self._folder.mkdir(exist_ok=True)
            self._record(kind, step, kept).save(path_of(self._folder.parent, kind, step))

    def _record(self, kind: StepKind, step: int, kept: Kept) -> TokenRecord:
        batch = kept.batch
        ratios, clipped = (None, None) if batch.update_logprobs is None else policy_ratios(batch, self._algorithm)
        return TokenRecord(
            kind,
            step,
            responses=len(batch.whole),
            batch=replace(batch, update_logprobs=None, reference_logprobs=None),  # the ratios say what the first do
            answers=[self._answers.get(prompt, "")[:_ANSWER] for prompt in _prompts(batch)],
            ratios=ratios,
            clipped=clipped,
            calibration=kept.calibration,
        )


@dataclass(frozen=True)
class Kept:
    """The responses of a step that its record is made of."""

    batch: Experience
    """The kept responses, with all that was computed for them, on the first rank; nobody else has any."""
    calibration: Tensor | None
    """`TokenRecord.calibration`."""

    @staticmethod
    def of(batch: Experience, limit: int) -> Kept | None:
        """Bring a step's first responses to the first rank, as many as fit into `limit` bytes; None if that is 0. All
        ranks call it.

        Of a batch in windows they are responses that have ended, with what earlier steps wrote as context; None if none
        has.
        """
        ended = batch.ended
        if not limit or not len(ended.whole):
            return None
        batch = ended.for_policy
        per_token = _BYTES_PER_TOKEN
        per_token += 0 if batch.trained is None else _BYTES_PER_MARK
        per_token += 0 if batch.token_rewards is None else _BYTES_PER_REWARD
        per_token += 0 if batch.token_versions is None else _BYTES_PER_VERSION
        kept = batch.on_first_rank(kept_responses(batch.whole, limit, per_token))
        return Kept(kept, None if ended.values is None else critic_calibration(ended))


def recorded_steps(folder: Path) -> list[tuple[StepKind, int]]:
    """Return the steps that a run folder has token records of: those of value pretraining, then of training."""
    names = [path.stem.split("_") for path in (folder / "tokens").glob("*_*.safetensors")]
    return [(kind, step) for kind in _KINDS for step in sorted(int(n) for k, n in names if k == kind)]


def path_of(folder: Path, kind: StepKind, step: int) -> Path:
    """Return the file of a step in a run folder."""
    return folder / "tokens" / f"{kind}_{step:06d}.safetensors"


def kept_responses(batch: Responses, limit: int, per_token: int = _BYTES_PER_TOKEN) -> Tensor:
    """Return the responses [R] that fit into `limit` bytes: the first groups, in the order that they were sampled in;
    where not even one does, responses of the first group.

    Nothing but size decides, so that what is kept represents the step.
    """
    sizes = (
        per_token * batch.response_lengths
        + _BYTES_PER_PROMPT_TOKEN * batch.sequence_lengths.sub(batch.response_lengths)
        + _BYTES_PER_RESPONSE
    )
    ends = torch.cat([batch.groups.diff() != 0, torch.tensor([True])]).nonzero()[:, 0] + 1
    total = offsets(sizes)
    whole = ends[total[ends] <= limit]
    count = int(whole[-1]) if len(whole) else int((total[1 : int(ends[0]) + 1] <= limit).sum())
    return torch.arange(count)


def critic_calibration(batch: Experience) -> Tensor:
    """Return `TokenRecord.calibration` of all responses."""
    batch = batch.only_trained
    predicted = (batch.require("values") + 1) / 2
    sums = calibration_sums(predicted, batch.per_token(batch.correct).float(), BINS)
    return calibration_of(sum_over_ranks({"calibration": sums})["calibration"]).float()


def _prompts(batch: Experience) -> list[tuple[int, ...]]:
    """Return the tokens of each response's prompt."""
    starts = offsets(batch.sequence_lengths).tolist()
    return [tuple(batch.tokens[s : s + n].tolist()) for s, n in zip(starts, batch.prompt_lengths.tolist())]
