"""Losses against loops over tokens, their gradients against finite differences, and any split against the whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_vapo.algorithm.losses import (
    importance_correction,
    importance_ratio,
    kl_loss,
    policy_loss,
    positive_lm_loss,
    token_weights,
    value_loss,
)

CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
seeds = st.integers(0, 2**32)


def normal(tokens: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, generator=generator, dtype=torch.float64)


def policy_token_loss(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


@given(seeds, st.sampled_from([None, 3.0, 10.0]), st.booleans())
def test_policy_loss_by_the_formula(seed, dual_clip, corrected):
    logprobs, old, advantages, weights, importance = normal(5 * 30, seed).reshape(5, 30)
    weights, importance = weights.abs(), importance.abs()
    expected, low, high, dual, k1, k3 = [0.0] * 6
    for new_t, old_t, a, w, rho in zip(*(x.tolist() for x in (logprobs, old, advantages, weights, importance))):
        ratio = math.exp(new_t - old_t)
        expected += w * (rho if corrected else 1) * policy_token_loss(ratio, a, 0.2, 0.28, dual_clip)
        low += w * (a < 0 and ratio < 0.8)
        high += w * (a > 0 and ratio > 1.28)
        dual += w * (dual_clip is not None and a < 0 and ratio > dual_clip)
        k1 += w * (old_t - new_t)
        k3 += w * (ratio - 1 - math.log(ratio))

    arguments = (logprobs, old, advantages, weights)
    loss, sums = policy_loss(*arguments, **CLIPS, dual_clip=dual_clip, importance_T=importance if corrected else None)
    assert float(loss) == pytest.approx(expected)
    assert {name: float(x) for name, x in sums.items()} == pytest.approx(
        {
            "clip_fraction_low": low,
            "clip_fraction_high": high,
            "clip_fraction_dual": dual,
            "kl_k1": k1,
            "kl_k3": k3,
        }
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.0, 1.0, 1.0),
        (1.27, 1.0, 1.0),  # clip-higher leaves room up to 1.28
        (1.29, 1.0, 0.0),
        (0.5, 1.0, 1.0),  # raising a good token's probability is never clipped from below
        (0.81, -1.0, 1.0),
        (0.79, -1.0, 0.0),
        (2.9, -1.0, 1.0),
        (3.1, -1.0, 0.0),  # dual clip at 3
    ],
)
def test_where_the_policy_gradient_is_cut(ratio, advantage, slope):
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    loss, _ = policy_loss(logprobs, zero, advantage * one, one, **CLIPS, dual_clip=3.0)
    loss.backward()
    assert float(logprobs.grad) == pytest.approx(-slope * ratio * advantage)


@given(seeds)
def test_without_movement_the_policy_gradient_is_minus_weight_times_advantage(seed):
    old, advantages, weights = normal(60, seed).reshape(3, 20)
    logprobs = old.clone().requires_grad_()
    loss, sums = policy_loss(logprobs, old, advantages, weights, **CLIPS, dual_clip=10.0)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -weights * advantages)
    assert all(float(x) == 0 for x in sums.values())


@given(seeds)
def test_policy_switches_change_only_their_own_tokens(seed):
    """Wider high clip: only ratios above; wider low clip: only ratios below; dual clip: only bad tokens above it."""
    logprobs, old, advantages = normal(3 * 40, seed).reshape(3, 40)
    ratio = (logprobs - old).exp()

    def per_token(**changes) -> Tensor:
        arguments = CLIPS | {"dual_clip": None} | changes
        rows = zip(logprobs, old, advantages, strict=True)
        one = torch.ones(1, dtype=torch.float64)
        return torch.stack([policy_loss(*(x[None] for x in row), one, **arguments)[0] for row in rows])

    base = per_token()
    assert torch.equal(per_token(clip_high=0.5) != base, (advantages > 0) & (ratio > 1.28))
    assert torch.equal(per_token(clip_low=0.5) != base, (advantages < 0) & (ratio < 0.8))
    assert torch.equal(per_token(dual_clip=2.0) != base, (advantages < 0) & (ratio > 2.0))


def away_from(x: Tensor, kinks: list[float], distance: float = 1e-2) -> Tensor:
    for kink in kinks:
        x = torch.where((x - kink).abs() < distance, kink + 2 * distance, x)
    return x


@given(seeds)
def test_policy_gradient_against_finite_differences(seed):
    old, log_ratio, advantages, weights, importance = normal(5 * 12, seed).reshape(5, 12)
    ratio = away_from(log_ratio.exp(), [0.8, 1.28, 2.0])
    logprobs = (old + ratio.log()).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return policy_loss(x, old, advantages, weights.abs(), **CLIPS, dual_clip=2.0, importance_T=importance.abs())[0]

    assert torch.autograd.gradcheck(loss, logprobs, eps=1e-6, atol=1e-6)


@given(seeds, st.sampled_from([None, 0.5]))
def test_value_gradient_against_finite_differences(seed, clip):
    old, step, targets, weights = normal(4 * 12, seed).reshape(4, 12)
    step = away_from(step, [-0.5, 0.5])
    # Where both errors are equal beyond the clip, the target lies halfway: the one other kink.
    targets = torch.where((old + step.sign() * (step.abs() + 0.5) / 2 - targets).abs() < 1e-2, targets + 0.1, targets)
    values = (old + step).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(x, targets, weights.abs(), old, clip), values, atol=1e-6)


@given(seeds)
def test_language_model_gradient_is_uniform_over_positive_tokens(seed):
    logprobs = normal(20, seed).requires_grad_()
    positive = normal(20, seed + 1) > 0
    positive_lm_loss(logprobs, positive, 37).backward()
    torch.testing.assert_close(logprobs.grad, -positive.double() / 37)


@given(seeds)
def test_value_loss_by_the_formula(seed):
    values, targets, weights, old = normal(4 * 20, seed).reshape(4, 20)
    plain = pessimistic = 0.0
    for v, r, w, o in zip(*(x.tolist() for x in (values, targets, weights, old)), strict=True):
        clipped = min(max(v, o - 0.2), o + 0.2)
        plain += w * 0.5 * (v - r) ** 2
        pessimistic += w * 0.5 * max((v - r) ** 2, (clipped - r) ** 2)
    assert float(value_loss(values, targets, weights)) == pytest.approx(plain)
    assert float(value_loss(values, targets, weights, old)) == pytest.approx(plain)
    assert float(value_loss(values, targets, weights, old, clip=0.2)) == pytest.approx(pessimistic)


def test_value_clip_without_old_values_is_refused():
    with pytest.raises(ValueError, match="old_values"):
        value_loss(torch.zeros(2), torch.zeros(2), torch.ones(2), clip=0.2)


@st.composite
def splits(draw):
    """Lengths of a minibatch's responses, the micro-batch each response goes to, and a seed."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=10))
    parts = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    return lengths, parts, draw(seeds)


@given(splits(), st.sampled_from(["token", "sample"]))
def test_any_split_into_micro_batches_gives_the_same_loss_gradient_and_statistics(split, reduction):
    lengths, parts, seed = split
    tokens = sum(lengths)
    old, moved, advantages, targets, old_values = normal(5 * tokens, seed).reshape(5, tokens)
    positive = (normal(len(lengths), seed + 1) > 0).repeat_interleave(torch.tensor(lengths))
    part_T = torch.tensor(parts).repeat_interleave(torch.tensor(lengths))

    def total(micro_batches: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Sums over micro-batches of every loss and statistic, and the accumulated gradient."""
        x = (old + 0.3 * moved).requires_grad_()
        sums: dict[str, Tensor] = {}
        for part in micro_batches:
            mine = part_T == part if part >= 0 else torch.ones_like(part_T, dtype=torch.bool)
            lengths_B = torch.tensor(
                [n for n, p in zip(lengths, parts, strict=True) if part in (p, -1)], dtype=torch.int64
            )
            weights = token_weights(lengths_B, reduction, total_tokens=tokens, total_samples=len(lengths)).double()
            policy, statistics = policy_loss(x[mine], old[mine], advantages[mine], weights, **CLIPS, dual_clip=1.5)
            value = value_loss(x[mine], targets[mine], weights, old_values[mine], clip=0.3)
            language = positive_lm_loss(x[mine], positive[mine], int(positive.sum()))
            (policy + 2 * value + 3 * language).backward()
            for name, number in {"policy": policy, "value": value, "language": language, **statistics}.items():
                sums[name] = sums.get(name, 0) + number.detach()
        return sums, x.grad

    whole, whole_gradient = total([-1])
    split_up, split_gradient = total([0, 1, 2, 3])
    torch.testing.assert_close(split_up, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split_gradient, whole_gradient, rtol=1e-12, atol=1e-12)


def test_token_weights_of_each_reduction():
    lengths = torch.tensor([1, 4])
    token = token_weights(lengths, "token", total_tokens=10, total_samples=4)
    sample = token_weights(lengths, "sample", total_tokens=10, total_samples=4)
    assert token.dtype == sample.dtype == torch.float32
    torch.testing.assert_close(token, torch.full((5,), 0.1))
    torch.testing.assert_close(sample, torch.tensor([0.25, 0.0625, 0.0625, 0.0625, 0.0625]))
    with pytest.raises(ValueError, match="'mean'"):
        token_weights(lengths, "mean", 10, 4)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.sampled_from(["token", "sample"]))
def test_token_weights_of_a_minibatch_sum_to_one(lengths, reduction):
    weights = token_weights(torch.tensor(lengths), reduction, total_tokens=sum(lengths), total_samples=len(lengths))
    assert float(weights.double().sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("positive_tokens_total", [0, 5])
def test_no_positive_tokens_give_zero_loss_and_zero_gradient(positive_tokens_total):
    logprobs = torch.tensor([-1.0, -math.inf], requires_grad=True)
    loss = positive_lm_loss(logprobs, torch.zeros(2, dtype=torch.bool), positive_tokens_total)
    loss.backward()
    assert loss.item() == 0 and logprobs.grad.tolist() == [0, 0]


@pytest.mark.parametrize("log_ratio", [-200.0, 200.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_ratio_beyond_float32_leaves_loss_and_gradient_finite(log_ratio, advantage):
    logprobs = torch.tensor([log_ratio], requires_grad=True)
    loss, sums = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), **CLIPS)
    loss.backward()
    assert all(bool(x.isfinite()) for x in (loss, logprobs.grad, *sums.values()))


def test_statistics_carry_no_gradient():
    logprobs = torch.zeros(2, requires_grad=True)
    _, sums = policy_loss(logprobs, torch.zeros(2), torch.ones(2), torch.ones(2), **CLIPS, dual_clip=10.0)
    assert not any(x.requires_grad for x in sums.values())


@given(seeds, st.booleans())
def test_the_double_sided_mask_is_the_loop_over_tokens(seed, corrected):
    """Loss and gradient: `r A` within the bounds, nothing beyond them, whatever the advantage's sign (SAO)."""
    logprobs, old, advantages, weights, importance = normal(5 * 30, seed).reshape(5, 30)
    weights, importance = weights.abs(), importance.abs()
    logprobs.requires_grad_()
    bounds = {"clip_low": 0.8, "clip_high": 1.0, "beyond": "mask"}
    loss, sums = policy_loss(
        logprobs, old, advantages, weights, **bounds, importance_T=importance if corrected else None
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    expected, slopes, low, high = 0.0, [], 0.0, 0.0
    for new_t, old_t, a, w, rho in zip(*(x.tolist() for x in (logprobs, old, advantages, weights, importance))):
        ratio = math.exp(new_t - old_t)
        slopes.append(-w * (rho if corrected else 1) * ratio * a if 0.2 <= ratio <= 2.0 else 0.0)
        expected += slopes[-1]
        low, high = low + w * (ratio < 0.2), high + w * (ratio > 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64))  # d(r A) = r A dlogp
    assert sums["clip_fraction_low"].item() == pytest.approx(low)
    assert sums["clip_fraction_high"].item() == pytest.approx(high)
    assert sums["clip_fraction_dual"] == 0


def test_the_double_sided_mask_has_no_dual_clip():
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(*torch.zeros(4, 3), **CLIPS, dual_clip=3.0, beyond="mask")


@given(seeds)
def test_kl_estimates_by_the_formula(seed):
    """Token by token, and their mean over all of a policy's tokens is KL(policy || reference) for k3."""
    policy, reference = normal(2 * 30, seed).reshape(2, 30)
    pairs = list(zip(policy.tolist(), reference.tolist()))
    assert kl_loss(policy, reference, "k3").tolist() == pytest.approx([math.exp(r - p) - 1 - (r - p) for p, r in pairs])
    assert kl_loss(policy, reference, "k2").tolist() == pytest.approx([(r - p) ** 2 / 2 for p, r in pairs])
    p, q = policy.log_softmax(0), reference.log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * kl_loss(p, q, "k3")).sum(), exact)


@given(seeds)
def test_the_gradient_of_k2_is_that_of_the_divergence(seed):
    """In expectation over the policy's own tokens; that of k3 is the other divergence's (the reference's over it)."""
    logits, other = normal(2 * 12, seed).reshape(2, 12)
    logits.requires_grad_()
    reference = other.log_softmax(0)
    p = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((p.exp() * (p - reference)).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad((p.detach().exp() * kl_loss(p, reference, "k2")).sum(), logits, retain_graph=True)
    torch.testing.assert_close(found, exact)
    (forward,) = torch.autograd.grad((reference.exp() * (reference - p)).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad((p.detach().exp() * kl_loss(p, reference, "k3")).sum(), logits)
    torch.testing.assert_close(found, forward)


def test_kl_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'k1'"):
        kl_loss(torch.ones(2), torch.ones(2), "k1")


def brute_force_ratios(train: list[float], rollout: list[float], lengths: list[int], level: str) -> list[float]:
    """Response by response, as products of single ratios."""
    ratios, start = [], 0
    for length in lengths:
        own = [math.exp(train[t] - rollout[t]) for t in range(start, start + length)]
        product = math.prod(own)
        ratios += {"token": own, "sequence": [product] * length, "geometric": [product ** (1 / length)] * length}[level]
        start += length
    return ratios


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(["token", "sequence", "geometric"]))
def test_importance_weights_are_the_loops(seed, lengths, level):
    """Every level with every mode, bounded on one side and on both."""
    train, rollout = normal(2 * sum(lengths), seed, scale=0.5).reshape(2, -1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    expected = brute_force_ratios(train.tolist(), rollout.tolist(), lengths, level)
    ratios = importance_ratio(train.clone().requires_grad_(), rollout, cu_seqlens, level)
    assert not ratios.requires_grad
    assert ratios.tolist() == pytest.approx(expected, rel=1e-12)
    for mode, low, weight in (
        ("truncate", None, lambda rho: min(rho, 1.3)),
        ("mask", None, lambda rho: rho if rho <= 1.3 else 0.0),
        ("mask", 0.7, lambda rho: rho if 0.7 <= rho <= 1.3 else 0.0),
    ):
        weights, bounded = importance_correction(ratios, mode, low, 1.3)
        assert weights.tolist() == pytest.approx([weight(rho) for rho in expected], rel=1e-12)
        assert bounded.tolist() == [weight(rho) != rho for rho in ratios.tolist()]


def test_products_beyond_float32_are_bounded():
    """A thousand tokens that differ by 0.2 nats: e^200 and e^-200."""
    difference = torch.cat([torch.full((1000,), 0.2), torch.full((1000,), -0.2)])
    ratios = importance_ratio(difference, torch.zeros(2000), torch.tensor([0, 1000, 2000]), "sequence")
    assert ratios.dtype == torch.float32
    truncated, _ = importance_correction(ratios, "truncate", None, 2.0)
    masked, bounded = importance_correction(ratios, "mask", 0.5, 2.0)
    assert truncated.tolist() == [2.0] * 1000 + [0.0] * 1000
    assert not masked.any() and bounded.all()


def test_importance_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'clip'"):
        importance_correction(torch.ones(2), "clip", None, 4.0)
    with pytest.raises(ValueError, match="no low bound"):
        importance_correction(torch.ones(2), "truncate", 0.5, 4.0)
    with pytest.raises(ValueError, match="'turn'"):
        importance_ratio(torch.ones(2), torch.ones(2), torch.tensor([0, 2]), "turn")
