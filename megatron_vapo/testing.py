"""Proofs for losses and advantages of one's own: a call each, without Megatron, processes or a model.

    from megatron_vapo.testing import check_loss

    def test_my_loss():
        check_loss("my_package.my_loss:my_loss", clip=0.2)

A loss touches the layout in two places only, the tokens that a rank has and `MinibatchPart.sum_over_response`. Both are
made here by threads that stand for ranks.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_vapo.algorithm.types import of_one_rank
from megatron_vapo.config import AlgorithmConfig, ImportanceConfig
from megatron_vapo.data.exchange import Placement
from megatron_vapo.data.experience import Experience, Share, ranges
from megatron_vapo.training.objectives import policy_loss_of, policy_objective, with_advantages

LENGTHS = (1, 9, 4, 17, 2, 30, 6, 12)
"""Response tokens of the made-up minibatch."""

PATIENCE_S = 10.0
"""Seconds that ranks wait for each other in a sum."""


def check_loss(name: str, **options: object) -> None:
    """Prove that a policy loss is the same however its minibatch is cut, and that left-out responses are not in it.

    A made-up minibatch is computed whole, and cut: into micro-batches of one response, and over data-parallel times
    context-parallel ranks, of which the latter have random tokens of each response. Under either
    `algorithm.loss_reduction`, with responses left out, and with an importance correction if the loss reads one.

    Args:
        name: as `algorithm.loss` in a recipe.
        options: as `algorithm.options`.

    Raises:
        RecipeError: the function's signature or an option is of another kind.
        AssertionError: loss, a statistic or a gradient depends on the cut, or on responses that are left out.
    """
    minibatch = made_up_minibatch()
    outputs = new_outputs(minibatch)
    plain = AlgorithmConfig(loss=name, options=options, positive_lm_coefficient=0.0)
    left_out = replace(plain, mask_truncated=True)
    algorithms = [plain, replace(plain, loss_reduction="sample"), left_out]
    if "importance" in policy_loss_of(plain).reads:
        algorithms.append(replace(plain, importance=ImportanceConfig("truncate")))
    for algorithm in algorithms:
        whole = computed(minibatch, outputs, algorithm)
        for cut in (Cut(micro_batches=len(LENGTHS)), Cut(data=2), Cut(sequence=3), Cut(3, 2, 2)):
            _compare(computed(minibatch, outputs, algorithm, cut), whole, f"{name}: {cut}")

    kept = (~minibatch.truncated).nonzero().flatten()
    rows = _rows(minibatch, kept)
    alone = computed(minibatch.select(kept), outputs[:, rows], left_out)
    together = computed(minibatch, outputs, left_out)
    gradients = torch.zeros_like(outputs).index_copy(1, rows, alone.gradients)
    _compare(together, replace(alone, gradients=gradients), f"{name}: beside responses that are left out")


def check_advantage(name: str, critic: bool = False, **options: object) -> None:
    """Prove that an advantage is the same for a process that holds only some of the responses.

    Args:
        name: as `algorithm.advantage` in a recipe.
        critic: as `algorithm.critic`.
        options: as `algorithm.options`.

    Raises:
        RecipeError: the function's signature, an option, or a shape that it returns is of another kind.
        AssertionError: a number is not finite, or depends on which responses are together.
    """
    batch = replace(made_up_minibatch(), advantages=None, returns=None)
    algorithm = AlgorithmConfig(advantage=name, critic=critic, options=options)
    everything = torch.arange(len(batch))
    whole = with_advantages(_part(batch, everything), algorithm)
    for rank in range(3):
        part = with_advantages(_part(batch, everything[rank::3]), algorithm)
        rows = _rows(batch, everything[rank::3])
        for estimate in ("advantages", "returns") if critic else ("advantages",):
            ours, expected = getattr(part, estimate), getattr(whole, estimate)
            assert expected.isfinite().all(), f"{name}: {estimate} are not finite"
            _close(ours, expected[rows], f"{name}: {estimate} of some responses")


@dataclass(frozen=True)
class Cut:
    """A cut of a minibatch: over data-parallel ranks, and there over context-parallel ones and into micro-batches."""

    data: int = 1
    sequence: int = 1
    micro_batches: int = 1


@dataclass
class Result:
    """The numbers that ranks computed of a minibatch's loss."""

    gradients: Tensor
    """[2, T] with respect to log-probs and entropies."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """The loss among them."""


def made_up_minibatch(seed: int = 0) -> Experience:
    """Return responses of `LENGTHS` tokens with random numbers for all that a loss may read, in float64.

    Pairs are groups, some of them mixed; the third response is cut off.
    """
    generator = torch.Generator().manual_seed(seed)
    count, total = len(LENGTHS), sum(LENGTHS)
    noise = torch.randn(6, total, generator=generator, dtype=torch.float64)
    outcomes = torch.tensor([1, -1, -1, -1, 1, 1, -1, 1], dtype=torch.float64)
    return Experience(
        tokens=torch.randint(0, 40, (2 * count + total,), generator=generator),
        prompt_lengths=torch.full((count,), 2),
        response_lengths=torch.tensor(LENGTHS),
        groups=torch.arange(count) // 2,
        truncated=torch.arange(count) == 2,
        outcomes=outcomes,
        rewards=outcomes,
        rollout_logprobs=0.5 * noise[0] - 3,
        logprobs=0.5 * noise[0] + 0.3 * noise[1] - 3,
        entropy=noise[2].abs(),
        reference_logprobs=0.5 * noise[1] - 3,
        values=noise[3],
        advantages=noise[4],
        returns=noise[5],
    )


def new_outputs(minibatch: Experience, seed: int = 1) -> Tensor:
    """Return log-probs and entropies [2, T] of a policy that was updated since; ratios lie on both sides of clips."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, int(minibatch.cu_seqlens[-1]), generator=generator, dtype=torch.float64)
    return torch.stack([minibatch.require("logprobs") + 0.4 * noise[0], 1 + noise[1].abs()])


def computed(minibatch: Experience, outputs: Tensor, algorithm: AlgorithmConfig, cut: Cut = Cut()) -> Result:
    """Return the loss of a minibatch, of which the model returns `outputs [2, T]`, as ranks compute it together."""
    result = Result(torch.zeros_like(outputs))
    everything = torch.arange(len(minibatch))
    for data_rank in range(cut.data):
        responses = everything[data_rank :: cut.data]
        ranks = _Ranks(cut.sequence)
        args = (_part(minibatch, responses), outputs[:, _rows(minibatch, responses)], algorithm, cut, ranks)
        for part in ranks.run(_on_a_rank, *args):
            result.gradients[:, _rows(minibatch, responses)] += part.gradients
            for name, share in part.statistics.items():
                result.statistics[name] = result.statistics.get(name, 0) + share
    return result


def _on_a_rank(
    rank: int, part: Experience, outputs: Tensor, algorithm: AlgorithmConfig, cut: Cut, ranks: _Ranks
) -> Result:
    """Compute a context-parallel rank's micro-batches, forward and backward."""
    loss = policy_objective(part, algorithm, ranks.sum_of(rank))
    owner = torch.randint(0, cut.sequence, (outputs.shape[1],), generator=torch.Generator().manual_seed(0))
    result = Result(torch.zeros_like(outputs))
    for micro in torch.arange(len(part)).chunk(cut.micro_batches):
        index = ranges(part.cu_seqlens[:-1][micro], part.response_lengths[micro])
        index = index[owner[index] == rank]
        leaf = outputs[:, index].clone().requires_grad_()
        share, statistics = loss(tuple(leaf), index)
        (gradient,) = torch.autograd.grad(share, leaf)
        result.gradients[:, index] += gradient
        for name, tensor in statistics.items():
            result.statistics[name] = result.statistics.get(name, 0) + tensor.detach()
    return result


def _part(batch: Experience, responses: Tensor) -> Experience:
    """Return the share of a process that holds these responses of a batch."""
    here = _Here(responses, torch.tensor([len(responses)]))
    return replace(batch.select(responses), share=Share(batch.whole, here))


def _rows(batch: Experience, responses: Tensor) -> Tensor:
    """Return where the tokens of some responses stand among those of a batch."""
    return ranges(batch.cu_seqlens[:-1][responses], batch.response_lengths[responses])


class _Here(Placement):
    """The responses of one rank, in a program without ranks."""

    @property
    def mine(self) -> Tensor:
        return self.responses


class _Ranks:
    """Threads that stand for the ranks that share each sequence."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=PATIENCE_S)
        self._put: list[Any] = [None] * count

    def run(self, work: Any, *args: Any) -> list[Result]:
        """Return what `work(rank, *args)` returns on each rank."""
        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(self._run, work, rank, *args) for rank in range(self.count)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            if isinstance(error, threading.BrokenBarrierError):
                raise AssertionError("ranks that share a sequence must call sum_over_response equally often") from error
            raise error
        return [future.result() for future in futures]

    def _run(self, work: Any, rank: int, *args: Any) -> Result:
        try:
            return work(rank, *args)
        except BaseException:
            self._barrier.abort()  # the others wait for this rank
            raise

    def sum_of(self, rank: int) -> Any:
        """Return a rank's `SumOverRanks`."""
        return of_one_rank if self.count == 1 else lambda x: _Sum.apply(x, self, rank)

    def total(self, x: Tensor, rank: int) -> Tensor:
        """Return the sum of what all ranks put in."""
        self._put[rank] = x.detach()
        self._barrier.wait()
        total = torch.stack(self._put).sum(0)
        self._barrier.wait()
        return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: _Ranks, rank: int) -> Tensor:
        ctx.ranks, ctx.rank = ranks, rank
        return ranks.total(x, rank)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.total(gradient, ctx.rank), None, None


def _compare(found: Result, expected: Result, what: str) -> None:
    for name, tensor in expected.statistics.items():
        assert tensor.isfinite(), f"{what}: {name} is {float(tensor)}"
        _close(found.statistics[name], tensor, f"{what}: {name}")
    _close(found.gradients, expected.gradients, f"{what}: gradient")


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, msg=lambda text: f"{what}\n{text}")
