"""Parts of `gpu_check` that need no run: precision, kernels and memory against what is certain."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_machine import NotAvailable, Numbers, Workplace, at_most, device, relative
from benchmarks.gpu_models import MEDIUM, make_model, responses
from megatron_vapo.algorithm import advantages, losses
from megatron_vapo.algorithm.types import Outputs
from megatron_vapo.config import ActorConfig, OffloadConfig, PrecisionConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.models.layout import ParallelLayout, init_world
from megatron_vapo.models.offload import KINDS, SAVED
from megatron_vapo.models.parameters import held_parameters
from megatron_vapo.models.roles import Actor
from megatron_vapo.models.roles import fused as role_fused
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.models.vocab_parallel import fused_logprob_and_entropy, logprob_and_entropy
from megatron_vapo.recipe.precision import fp8_refusal
from megatron_vapo.runtime.kernels import detect_machine
from megatron_vapo.weights.architecture import read_architecture


def bfloat16_model(work: Workplace) -> Numbers:
    """Log-probs and gradients of a small model against the same one in float32."""
    return _against_float32(work, PrecisionConfig(), logprob_limit=0.02, cosine_limit=0.995)


def fp8_model(work: Workplace) -> Numbers:
    """The same with FP8 linear layers, by every recipe that this machine can compute."""
    machine, numbers = detect_machine(), {}
    recipes = [recipe for recipe in ("delayed", "tensorwise", "blockwise") if fp8_refusal(recipe, machine) is None]
    if not recipes:
        raise NotAvailable(f"needs {fp8_refusal('tensorwise', machine)}")
    for recipe in recipes:
        precision = PrecisionConfig(linear="fp8", recipe=recipe)
        compared = _against_float32(work, precision, logprob_limit=0.1, cosine_limit=0.95)
        numbers |= {f"{recipe}: {name}": value for name, value in compared.items()}
    return numbers


def _against_float32(work: Workplace, precision: PrecisionConfig, logprob_limit: float, cosine_limit: float) -> Numbers:
    batch = responses(MEDIUM, count=8, prompt=16, shortest=48, longest=240)
    exact, exact_gradient = _seen(work, batch, PrecisionConfig(), torch.float32)
    ours, gradient = _seen(work, batch, precision, torch.bfloat16)
    difference = float((ours - exact).abs().mean())
    assert gradient.keys() == exact_gradient.keys(), gradient.keys() ^ exact_gradient.keys()
    joined = [torch.cat([held[name] for name in exact_gradient]) for held in (gradient, exact_gradient)]
    cosine = float(F.cosine_similarity(*joined, dim=0))
    assert difference < logprob_limit, f"log-probs differ by {difference:.4f} nats on average"
    assert cosine > cosine_limit, f"cosine of the gradients is {cosine:.4f}"
    return {"log-prob difference": difference, "gradient cosine": cosine}


def _seen(
    work: Workplace, batch: Experience, precision: PrecisionConfig, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs [T], and the gradient of their mean by parameter: kinds of layers differ in their order."""
    trainer = _trainer(work, ActorConfig(micro_batch_tokens=1024, precision=precision), dtype)
    assert precision.linear == "model" or trainer.model.config.fp8, "the model was built without FP8"
    logprobs, _ = trainer.model.forward(batch)
    trainer.update(batch, _mean(len(logprobs)))
    with trainer.model.layout.active():
        held = held_parameters(trainer.model)
    gradient = {name: parameters[0].main_grad.double().flatten() for name, parameters in held.items()}
    trainer.model.layout.close()
    return logprobs, gradient


def _trainer(work: Workplace, role: ActorConfig, dtype: torch.dtype) -> Trainer:
    init_world()
    folder = make_model(work.folder / "medium", MEDIUM)
    trainer = Trainer(Actor(role, read_architecture(folder), dtype, ParallelLayout(role, seed=0)))
    trainer.load_hf(folder)
    return trainer


def _mean(tokens: int) -> Callable[[Outputs, Tensor], tuple[Tensor, dict[str, Tensor]]]:
    def loss(outputs: Outputs, _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        share = outputs[0].sum() / tokens
        return share, {"loss": share.detach()}

    return loss


def logprob_kernels(_: Workplace) -> Numbers:
    """Log-probs, entropy and gradients, from logits, fused and by Triton, against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, vocab = 300, 128, 5003
    x, weight = torch.randn(tokens, hidden, generator=generator), torch.randn(vocab, hidden, generator=generator) / 8
    targets = torch.randint(vocab, (tokens,), generator=generator)
    mix = torch.randn(2, tokens, generator=generator)

    def plain(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logs = F.log_softmax(x @ weight.T, dim=-1)
        return logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)

    def ours(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return logprob_and_entropy(x @ weight.T, targets, vocab)

    def fused(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return fused_logprob_and_entropy(x, weight, targets, vocab)

    def results(way: Callable, dtype: torch.dtype, where: torch.device) -> list[Tensor]:
        leaves = [t.to(where, dtype, copy=True).requires_grad_() for t in (x, weight)]
        outputs = way(*leaves, targets.to(where))
        sum((m.to(where, dtype) * o).sum() for m, o in zip(mix, outputs)).backward()
        return [t.detach() for t in (*outputs, *(leaf.grad for leaf in leaves))]

    expected = results(plain, torch.float64, torch.device("cpu"))
    found = {"from logits": ours, "fused": fused}
    if torch.cuda.is_available():
        found["triton"] = lambda *rest: role_fused("triton")(*rest, vocab)
    worst = {
        name: max(relative(a, b) for a, b in zip(results(way, torch.float32, device()), expected))
        for name, way in found.items()
    }
    return at_most(worst, 1e-4)


def gae_and_losses(_: Workplace) -> Numbers:
    """Advantages, returns and losses in float32 against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 3000, (64,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = int(cu_seqlens[-1])
    outcomes = torch.randint(0, 2, (64,), generator=generator) * 2.0 - 1.0
    values, old, new = (torch.randn(tokens, generator=generator) for _ in range(3))

    def results(dtype: torch.dtype, where: torch.device) -> dict[str, Tensor]:
        bounds = cu_seqlens.to(where)
        v, o, n, rewards = (t.to(where, dtype) for t in (values, old / 10, new / 10, outcomes))
        per_token = advantages.outcome_token_rewards(rewards, bounds)
        adaptive = advantages.length_adaptive_lambda(lengths.to(where), 0.05)
        estimated = advantages.generalized_advantages(per_token, v, bounds, 1.0, adaptive)
        returns = advantages.lambda_returns(per_token, v, bounds, 1.0, 0.95)
        weights = losses.token_weights(lengths.to(where), "token", tokens, 64)
        policy, _ = losses.policy_loss(n, o, estimated, weights, 0.2, 0.28)
        value = losses.value_loss(v, returns, weights)
        return {"advantages": estimated, "returns": returns, "policy loss": policy, "value loss": value}

    expected, found = results(torch.float64, torch.device("cpu")), results(torch.float32, device())
    return at_most({name: relative(found[name], expected[name]) for name in expected}, 1e-4)


def offload_round_trip(work: Workplace) -> Numbers:
    """Everything of a model leaves the device and comes back, bit for bit, and trains on."""
    everything = OffloadConfig(parameters=True, gradients=True, main_parameters=True, optimizer=True)
    role = ActorConfig(micro_batch_tokens=1024, offload=everything, distributed_optimizer=True)
    trainer = _trainer(work, role, torch.bfloat16)
    batch = responses(MEDIUM, count=4, prompt=16, shortest=48, longest=240)
    trainer.update(batch, _mean(int(batch.cu_seqlens[-1])))
    before, sizes = _content(trainer), trainer.model.offloader.resident()
    allocated = torch.cuda.memory_allocated()
    seconds = [_timed(lambda: trainer.model.offloader.keep())]
    released = allocated - torch.cuda.memory_allocated()
    assert not any(trainer.model.offloader.resident().values()), "something stayed"
    assert not torch.cuda.is_available() or released >= 0.99 * sum(sizes.values()), f"only {released} bytes were freed"
    seconds.append(_timed(lambda: trainer.model.offloader.ready(*KINDS)))
    assert trainer.model.offloader.resident() == sizes, "another size came back"
    assert all(torch.equal(a, b) for a, b in zip(_content(trainer), before)), "other numbers came back"
    trainer.update(batch, _mean(int(batch.cu_seqlens[-1])))
    trainer.model.layout.close()
    copied = sum(sizes[kind] for kind in SAVED) / 1e9
    return {"GB": copied, "GB/s out, first time": copied / seconds[0], "GB/s in": copied / seconds[1]}


def _content(trainer: Trainer) -> list[Tensor]:
    found = trainer.model.offloader.storages()
    at = trainer.model.device
    return [torch.empty(0, dtype=torch.uint8, device=at).set_(s).clone() for kind in SAVED for s in found[kind]]


def _timed(action: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - start
