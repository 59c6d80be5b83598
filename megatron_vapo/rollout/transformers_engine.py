"""The embedded engine: Hugging Face transformers with a KV cache, in the trainer's own process, for small models.

Every token is drawn from one uniform number of its request's own stream (inverse transform sampling), so a response
depends on its request and the weights alone, not on the batch that it happens to share or the rank that writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.config import SamplingConfig
from megatron_vapo.errors import CheckpointError
from megatron_vapo.rollout import EngineIndex, FinishReason, Follow, Pause, Request, Response, nothing
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.checksum import digest
from megatron_vapo.weights.engine_layout import RolloutShard, whole_model

if TYPE_CHECKING:
    from transformers import Cache

_POLL_S = 0.5

_COMPACT_AT = 0.75
"""Finished responses leave the batch once no more than this share goes on: each time copies all keys and values, which
costs more than a few rows decoded for nothing."""


class TransformersEngine:
    """Decodes `batch_size` responses at a time; finished ones leave the batch, a quarter of it at a time. Every process
    has one of its own, whole.

    Args:
        model_path: Hugging Face folder whose configuration is used; weights come through `load_weights`.
        end_ids: tokens that end a response.
        pad_id: any token id, fills prompts on their left.
    """

    def __init__(
        self,
        model_path: str | Path,
        end_ids: Sequence[int],
        pad_id: int,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        from megatron_vapo.rollout.decoding import register_grouped_attention

        attention = register_grouped_attention() if device.type == "cpu" else "sdpa"
        with torch.device(device):
            self._model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(model_path), dtype=dtype, attn_implementation=attention
            ).eval()
        self._parameters = dict(_by_checkpoint_name(self._model))
        self._end_ids = torch.tensor(sorted(end_ids), device=device)
        self._pad_id, self._batch_size, self._device = pad_id, batch_size, device
        self.version = -1
        self.index = EngineIndex(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else EngineIndex(0, 1)
        self.failure: str | None = None
        self.asleep = False
        self._aborted = False

    def takes(self, architecture: Architecture) -> list[RolloutShard]:
        """See `RolloutEngine.takes`."""
        return whole_model(architecture, list(range(self.index.engines)))

    def checks(self, architecture: Architecture) -> list[list[RolloutShard]]:
        """See `RolloutEngine.checks`."""
        return [self.takes(architecture)]

    def revive(self) -> str | None:
        """Return at once: it is never down."""
        return None

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy every tensor over the model's own.

        Raises:
            CheckpointError: a tensor is missing, or the model has none of that name.
        """
        missing = set(self._parameters)
        for name, tensor in tensors:
            if name not in self._parameters:
                raise CheckpointError(f"rollout engine: the model has no tensor {name}")
            self._parameters[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise CheckpointError(f"rollout engine: no weights came for {', '.join(sorted(missing))}")
        self.version = version

    def digests(self) -> list[Mapping[str, str | None]]:
        """See `RolloutEngine.digests`."""
        return [{name: digest(parameter) for name, parameter in self._parameters.items()}]

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        max_tokens: int,
        on_tokens: Callable[[int], None] = lambda count: None,
        follow: Follow = nothing,
    ) -> Iterator[tuple[int, Response]]:
        """See `RolloutEngine.generate`: the first turns of all, then the second ones.

        Which turns are decoded together depends on no clock, so that rounding is the same each time. Each turn reads
        its context anew.
        """
        self._aborted = False
        asked = list(enumerate(requests))
        while asked:
            pauses: list[tuple[int, Pause]] = []
            for first in range(0, len(asked), self._batch_size):
                numbers, batch = zip(*asked[first : first + self._batch_size])
                for number, response in zip(numbers, self._decode(batch, sampling, max_tokens, on_tokens)):
                    yield number, response
                    if (pause := follow(number)) is not None:
                        pauses.append((number, pause))
            asked = self._next_turns(pauses)

    def _next_turns(self, pauses: Sequence[tuple[int, Pause]]) -> list[tuple[int, Request]]:
        """Return the requests that follow pauses; none after an abort."""
        asked = []
        for number, pause in pauses:
            while not self._aborted and wait([pause.until], timeout=_POLL_S).not_done:
                pass
            if self._aborted:
                return []
            request = pause.then()
            if request is not None:
                asked.append((number, request))
        return [] if self._aborted else asked

    def abort(self) -> None:
        """See `RolloutEngine.abort`."""
        self._aborted = True

    def sleep(self) -> None:
        """Do nothing: small models stay where they are."""

    def metrics(self) -> dict[str, float]:
        """Return no counts: nothing can go wrong unnoticed."""
        return {}

    def close(self) -> None:
        """Do nothing: nothing outlives the process."""

    @torch.inference_mode()
    def _decode(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        max_tokens: int,
        on_tokens: Callable[[int], None],
    ) -> list[Response]:
        count = len(requests)
        written = torch.tensor([len(r.written) for r in requests], device=self._device)
        limits = torch.tensor([r.left(max_tokens) for r in requests])
        left = limits.to(self._device)
        uniforms = torch.stack([_uniforms(r.seed, max_tokens) for r in requests]).to(self._device)
        tokens = torch.zeros(count, max_tokens, dtype=torch.int64, device=self._device)
        logprobs = torch.zeros(count, max_tokens, device=self._device)

        logits, cache, mask = self._read([r.prompt_ids + r.written for r in requests])
        active = torch.arange(count, device=self._device)
        going = torch.ones_like(active, dtype=torch.bool)
        unfinished, step = count, 0
        while unfinished and not self._aborted:
            drawn, drawn_logprobs = draw(logits, uniforms[active, (written[active] + step) % max_tokens], sampling)
            tokens[active, step], logprobs[active, step] = drawn, drawn_logprobs
            on_tokens(unfinished)
            step += 1
            going &= ~torch.isin(drawn, self._end_ids) & (step < left[active])
            unfinished = int(going.sum())
            if unfinished == 0:
                break
            if unfinished <= _COMPACT_AT * len(active):
                active, drawn, mask = active[going], drawn[going], mask[going]
                cache.batch_select_indices(going)
                going = going[going]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
            positions = mask.sum(1, keepdim=True) - 1
            # A mask in the shape that attention takes is not made anew by the model.
            logits = self._logits(drawn[:, None], mask[:, None, None], positions, cache)
        return self._responses(tokens.cpu(), logprobs.cpu(), limits, step)

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Cache, Tensor]:
        """Return logits after each prompt [count, V], keys and values, attention mask [count, longest] bool.

        A prompt that several requests share is read once."""
        from megatron_vapo.rollout.decoding import roomy_cache

        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([number[prompt] for prompt in prompts], device=self._device)
        ids, mask = self._left_pad(list(number))
        cache = roomy_cache(self._model.config)
        logits = self._logits(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        cache.batch_select_indices(rows)
        return logits[rows], cache, mask[rows]

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Return logits [b, V] after the last of `ids [b, n]` at `positions [b, n]`, which continue the cache.

        Args:
            mask: bool, of the cache and `ids` together: [b, L], or [b, 1, n, L] as attention takes it.
        """
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _responses(self, tokens: Tensor, logprobs: Tensor, limits: Tensor, steps: int) -> list[Response]:
        """Return rows [count, max_tokens] cut after their first end token, at their limit, or where it stopped."""
        ends = torch.isin(tokens, self._end_ids.cpu()) & (
            torch.arange(tokens.shape[1]) < limits.clamp(max=steps)[:, None]
        )
        responses = []
        for i, limit in enumerate(limits.tolist()):
            stopped = bool(ends[i].any())
            length = int(ends[i].int().argmax()) + 1 if stopped else min(limit, steps)
            reason: FinishReason = "stop" if stopped else "length" if length == limit else "abort"
            responses.append(Response(tokens[i, :length].clone(), logprobs[i, :length].clone(), reason, self.version))
        return responses

    def _left_pad(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask (bool) [count, longest]."""
        width = max(len(p) for p in prompts)
        ids = torch.tensor([[self._pad_id] * (width - len(p)) + list(p) for p in prompts], device=self._device)
        mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=self._device)
        return ids, mask


def _by_checkpoint_name(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters under a checkpoint's names, which holds experts one by one; transformers 5 stacks them."""
    for name, parameter in model.named_parameters():
        experts, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, (gate, up) in enumerate(parameter.data.unflatten(1, (2, -1)).unbind(0)):
                yield f"{experts}.{e}.gate_proj.weight", gate
                yield f"{experts}.{e}.up_proj.weight", up
        elif last == "down_proj":
            for e, down in enumerate(parameter.data):
                yield f"{experts}.{e}.down_proj.weight", down
        else:
            yield name, parameter.data


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Return tokens drawn by inverse transform, and their log-probs before top-p.

    Args:
        logits: [b, V].
        uniform: [b] float64 in [0, 1), one number per token drawn.

    Returns:
        token ids [b] int64, log-probs [b] float32 of softmax(logits / temperature). At temperature 0 the likeliest
        tokens, and log-probs of temperature 1, as SGLang has it.
    """
    all_logprobs = torch.log_softmax(logits.float() / (sampling.temperature or 1.0), dim=-1)
    if sampling.temperature == 0:
        likeliest = all_logprobs.max(dim=-1)
        return likeliest.indices, likeliest.values
    probs = all_logprobs.double().exp()
    if sampling.top_p < 1:
        probs = _nucleus(probs, sampling.top_p)
    cumulative = _cumulative(probs)
    threshold = uniform[:, None] * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the threshold has probability above 0.
    drawn = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    return drawn.squeeze(-1), all_logprobs.gather(-1, drawn).squeeze(-1)


def _cumulative(probs: Tensor) -> Tensor:
    """Return sums along the last dimension; CUDA has no deterministic way to them."""
    if torch.are_deterministic_algorithms_enabled():
        return probs.cpu().cumsum(dim=-1).to(probs.device)
    return probs.cumsum(dim=-1)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest likeliest tokens whose probabilities reach top_p."""
    ordered, order = probs.sort(dim=-1, descending=True)
    before = _cumulative(ordered) - ordered
    return torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
