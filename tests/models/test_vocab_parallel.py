"""Log-probs and entropy of one process, from logits and from hidden states, against float64 log_softmax and finite
differences. Several tensor-parallel ranks are in benchmarks/layouts.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vapo.models import vocab_parallel
from megatron_vapo.models.vocab_parallel import fused_logprob_and_entropy, logprob_and_entropy

TOKENS, HIDDEN, VOCAB, PADDED = 7, 5, 150, 152

Outputs = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True, params=[False, True], ids=["one block", "narrow blocks"])
def narrow_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(vocab_parallel, "BLOCK_BYTES", {"cpu": 1, "cuda": 1})


def random_case(seed: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [t, H], output layer [columns, H], targets [t], and weights [2, t] of both outputs in some loss."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, weights = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((TOKENS, HIDDEN), (columns, HIDDEN), (2, TOKENS))
    )
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, weights


def by_log_softmax(logits: Tensor, targets: Tensor, vocab: int, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (logits.double()[:, :vocab] / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def from_hidden(outputs: Outputs, hidden: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    if outputs is fused_logprob_and_entropy:
        return outputs(hidden, weight, *rest)
    return outputs(hidden @ weight.t(), *rest)


both = pytest.mark.parametrize("outputs", [logprob_and_entropy, fused_logprob_and_entropy])


@both
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("columns", [VOCAB, PADDED])
@pytest.mark.parametrize("used", ["both", "log-prob", "entropy"])
def test_values_and_gradients(outputs, columns, temperature, used):
    hidden, weight, targets, weights = random_case(columns, columns, torch.float32)
    if used != "both":
        weights[1 if used == "log-prob" else 0] = 0
    rest = (targets, VOCAB, temperature)
    expected = by_log_softmax(hidden.double() @ weight.double().t(), *rest)
    expected_gradients = torch.autograd.grad((weights * torch.stack(expected)).sum(), (hidden, weight))
    ours = from_hidden(outputs, hidden, weight, *rest)
    assert all(tensor.dtype == torch.float32 for tensor in ours)
    torch.testing.assert_close(torch.stack(ours).double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    loss = sum((w * tensor).sum() for w, tensor in zip(weights, ours) if w.any())  # an unused output has no gradient
    gradients = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)
    assert not gradients[1][VOCAB:].any()


@both
def test_bfloat16_is_rounded_only_where_it_enters_and_leaves(outputs):
    hidden, weight, targets, weights = random_case(5, VOCAB, torch.bfloat16)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    expected = by_log_softmax(logits, targets, VOCAB, 1.0)
    ours = from_hidden(outputs, hidden, weight, targets, VOCAB)
    torch.testing.assert_close(torch.stack(ours).double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    (upstream,) = torch.autograd.grad((weights * torch.stack(expected)).sum(), logits)
    gradients = torch.autograd.grad((weights * torch.stack(ours)).sum(), (hidden, weight))
    expected_gradients = (upstream @ weight, upstream.t() @ hidden)
    torch.testing.assert_close(gradients, expected_gradients, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@both
def test_finite_differences(outputs):
    """Float64 in and out, but computed in float32: hence wide steps and a wide tolerance."""
    hidden, weight, targets, _ = random_case(2, PADDED, torch.float64)

    def function(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logprob, entropy = from_hidden(outputs, hidden, weight, targets, VOCAB, 0.8)
        return logprob.double(), entropy.double()

    assert torch.autograd.gradcheck(function, (hidden, weight), eps=1e-2, atol=3e-3, rtol=3e-3)


@given(st.lists(st.sampled_from([-1e4, -300.0, -80.0, 0.0, 80.0, 300.0, 1e4]), min_size=9, max_size=9))
def test_extreme_logits_stay_finite(row):
    """And are as right as float32 numbers of their size can be."""
    vocab = len(row)
    logits = torch.tensor([row] * vocab, requires_grad=True)
    targets = torch.arange(vocab)
    ours = logprob_and_entropy(logits, targets, vocab)
    expected = by_log_softmax(logits, targets, vocab, 1.0)
    rounding = 3e-7 * max(map(abs, row))
    torch.testing.assert_close(torch.stack(ours).double(), torch.stack(expected), rtol=1e-5, atol=1e-5 + rounding)
    (gradient,) = torch.autograd.grad(ours[0].sum() + ours[1].sum(), logits)
    assert gradient.isfinite().all()


def test_padding_takes_no_part_whatever_it_holds():
    """An untrained row of the padded head may give the largest logit of all."""
    hidden, weight, targets, _ = random_case(3, PADDED, torch.float32)
    logits = (hidden @ weight.t()).detach()
    expected = logprob_and_entropy(logits[:, :VOCAB], targets, VOCAB)
    for garbage in (1e30, float("inf"), float("nan"), float("-inf")):
        logits[:, VOCAB:] = garbage
        torch.testing.assert_close(logprob_and_entropy(logits, targets, VOCAB), expected)


@both
def test_a_micro_batch_without_responses(outputs):
    hidden, weight, targets, _ = random_case(4, VOCAB, torch.float32)
    logprob, entropy = from_hidden(outputs, hidden[:0], weight, targets[:0], VOCAB)
    assert logprob.shape == entropy.shape == (0,)
    (logprob.sum() + entropy.sum()).backward()
    assert not weight.grad.any()


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_gpu_gets_few_blocks_and_never_waits_for_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stage of vapo_32b on one of 8 ranks: 20,480 tokens, 19,008 columns. Operations alone are counted, on the
    meta device, which stands for a GPU. With blocks made for a CPU's cache it had 187 blocks and 410 waits."""
    monkeypatch.undo()
    hidden, weight = (torch.empty(n, 5120, device="meta", requires_grad=True) for n in (20480, 19008))
    targets = torch.empty(20480, dtype=torch.int64, device="meta")
    with Counted() as counted:
        logprobs, entropy = fused_logprob_and_entropy(hidden, weight, targets, 152064)
        (logprobs + entropy).sum().backward()
    assert counted.calls["nonzero"] == counted.calls["_local_scalar_dense"] == counted.calls["item"] == 0
    assert counted.calls["mm"] <= 4 * 6  # forward; again, and two gradients backward


@pytest.mark.gpu
def test_a_gpus_logits_are_not_rounded_to_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 512, generator=generator).bfloat16()
    weight = (torch.randn(VOCAB, 512, generator=generator) / 4).bfloat16()
    targets = torch.randint(0, VOCAB, (64,), generator=generator)
    logprobs, _ = fused_logprob_and_entropy(hidden.cuda(), weight.cuda(), targets.cuda(), VOCAB)
    exact, _ = by_log_softmax(hidden.double() @ weight.double().t(), targets, VOCAB, 1.0)
    torch.testing.assert_close(logprobs.double().cpu(), exact, rtol=0, atol=1e-4)
