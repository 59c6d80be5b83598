"""Log-probs and entropy of one process against float64 log_softmax and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_vapo.models.vocab_parallel import _LogProbEntropy, logprob_and_entropy

TOKENS, VOCAB, PADDED = 6, 11, 16


def random_case(seed: int, columns: int, dtype: torch.dtype, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [t, columns], targets [t] below VOCAB, and weights [2, t] of log-probs and entropies in some loss."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(TOKENS, columns, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    weights = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), targets, weights


def by_log_softmax(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (logits.double()[:, :VOCAB] / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("columns", [VOCAB, PADDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, columns, temperature):
    """The gradient of bfloat16 logits is rounded to bfloat16, everything else is float32."""
    logits, targets, weights = random_case(columns, columns, dtype)
    expected = by_log_softmax(logits, targets, temperature)
    (expected_gradient,) = torch.autograd.grad((weights * torch.stack(expected)).sum(), logits)
    ours = logprob_and_entropy(logits, targets, VOCAB, temperature)
    assert all(tensor.dtype == torch.float32 for tensor in ours)
    torch.testing.assert_close(torch.stack(ours).double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((weights * torch.stack(ours)).sum(), logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert not gradient[:, VOCAB:].any()


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_either_output_alone(output):
    logits, targets, weights = random_case(1, VOCAB, torch.float32)
    (expected,) = torch.autograd.grad((weights[0] * by_log_softmax(logits, targets, 1.0)[output]).sum(), logits)
    (ours,) = torch.autograd.grad((weights[0] * logprob_and_entropy(logits, targets, VOCAB)[output]).sum(), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_finite_differences():
    """The closed forms themselves, in float64 (the public function computes in float32, too coarse for differences)."""
    logits, targets, _ = random_case(2, VOCAB, torch.float64)
    assert torch.autograd.gradcheck(lambda z: _LogProbEntropy.apply(z, targets, 0, None), logits)


@given(st.lists(st.sampled_from([-1e30, -1e4, -80.0, 0.0, 80.0, 1e4, 1e30]), min_size=VOCAB, max_size=VOCAB))
def test_extreme_logits_stay_finite(row):
    logits = torch.tensor([row] * VOCAB, requires_grad=True)
    targets = torch.arange(VOCAB)
    logprob, entropy = logprob_and_entropy(logits, targets, VOCAB)
    expected = by_log_softmax(logits, targets, 1.0)
    torch.testing.assert_close(logprob.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1].nan_to_num(), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(logprob.sum() + entropy.sum(), logits)
    assert gradient.isfinite().all()


def test_padding_takes_no_part_whatever_it_holds():
    """An untrained row of the padded head may give the largest logit of all."""
    logits, targets, _ = random_case(3, PADDED, torch.float32)
    garbage = logits.detach().clone()
    garbage[:, VOCAB:] = torch.tensor([1e30, float("inf"), float("nan"), -1e30, 50.0])
    ours = logprob_and_entropy(garbage, targets, VOCAB)
    torch.testing.assert_close(ours, logprob_and_entropy(logits.detach()[:, :VOCAB], targets, VOCAB))


def test_a_micro_batch_without_responses():
    logits = torch.zeros(0, VOCAB, requires_grad=True)
    logprob, entropy = logprob_and_entropy(logits, torch.zeros(0, dtype=torch.int64), VOCAB)
    assert logprob.shape == entropy.shape == (0,)
    (logprob.sum() + entropy.sum()).backward()
    assert logits.grad.shape == logits.shape
