"""One optimizer step: schedule, decay, clipping, skipped steps, main parameters; and a role's checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vapo.algorithm.types import Loss, Outputs
from megatron_vapo.config import ActorConfig, CriticConfig, OptimizerConfig, PrecisionConfig, RoleConfig
from megatron_vapo.data import packing
from megatron_vapo.data.experience import Experience
from megatron_vapo.errors import CheckpointError
from megatron_vapo.models.checkpointing import load_parameters, load_trainer, save_trainer
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.runtime.work import working

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=4, weight_decay=0.1, clip_grad=1.0)
KINDS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, distributed optimizer": (torch.bfloat16, {"distributed_optimizer": True}),
}


def role(cls: type[RoleConfig] = ActorConfig, optimizer: dict | None = None, **changes: object) -> RoleConfig:
    return cls(micro_batch_tokens=40, optimizer=replace(OPTIMIZER, **(optimizer or {})), **changes)


@pytest.fixture(scope="module")
def folder(make_checkpoint) -> Path:
    return make_checkpoint("qwen2")


@pytest.fixture(scope="module")
def critic_folder(make_checkpoint) -> Path:
    return make_checkpoint("qwen2", classifier=True)


@pytest.fixture
def batch(make_experience) -> Experience:
    return make_experience([3, 1, 5], [6, 30, 9])


def weighted(batch: Experience, factor: float = 1.0, seed: int = 0) -> Loss:
    """A random linear function of the first output, times `factor`."""
    weights = torch.randn(int(batch.cu_seqlens[-1]), generator=torch.Generator().manual_seed(seed))

    def loss(outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        share = factor * (weights[token_index] * outputs[0]).sum()
        return share, {"loss": share}

    return loss


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.modules[0].named_parameters()}


def states(trainer: Trainer) -> list[Tensor]:
    """Every tensor of the optimizer: moments, and main parameters where it keeps them."""

    def tensors(part: object) -> list[Tensor]:
        if isinstance(part, Tensor):
            return [part.clone()]
        children = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else []
        return [tensor for child in children for tensor in tensors(child)]

    inner = [optimizer.optimizer for optimizer in trainer.optimizer.chained_optimizers]
    return [t for o in inner for t in tensors(list(o.state.values())) + tensors([g["params"] for g in o.param_groups])]


def assert_same(ours: Trainer, other: Trainer) -> None:
    """To the bit: parameters, optimizer, schedule."""
    torch.testing.assert_close(parameters(ours), parameters(other), rtol=0, atol=0)
    torch.testing.assert_close(states(ours), states(other), rtol=0, atol=0)
    assert ours.scheduler.state_dict() == other.scheduler.state_dict()


def test_the_learning_rate_warms_up_by_optimizer_steps(train_actor, folder, batch):
    actor = train_actor(folder, role())
    rates = [actor.update(batch, weighted(batch))["learning_rate"] for _ in range(6)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_the_learning_rate_falls_linearly_and_stays(train_actor, folder, batch):
    chosen = {"warmup_steps": 2, "decay_steps": 6, "final_learning_rate": 2e-4}
    actor = train_actor(folder, role(optimizer=chosen))
    rates = [actor.update(batch, weighted(batch))["learning_rate"] for _ in range(8)]
    assert rates == pytest.approx([5e-4, 1e-3, 8e-4, 6e-4, 4e-4, 2e-4, 2e-4, 2e-4])


def test_without_warm_up_the_first_step_has_the_full_rate(train_actor, folder, batch):
    actor = train_actor(folder, role(optimizer={"warmup_steps": 0}))
    assert actor.update(batch, weighted(batch))["learning_rate"] == pytest.approx(1e-3)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_only_matrices_decay(train_actor, make_checkpoint, batch, family):
    """A gradient of zero leaves weight decay alone: p -= rate * decay * p."""
    actor = train_actor(make_checkpoint(family), role(optimizer={"warmup_steps": 0}))
    before = parameters(actor)
    assert actor.update(batch, weighted(batch, factor=0.0))["grad_norm"] == 0
    for name, after in parameters(actor).items():
        decays = before[name].dim() == 2
        assert decays != name.endswith((".bias", "layernorm.weight")), name
        torch.testing.assert_close(after, before[name] * (1 - 1e-4 * decays), rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_clipping_by_the_global_norm(train_actor, folder, batch, clip):
    """0 turns it off, and a bound above the norm changes nothing."""
    actor = train_actor(folder, role(optimizer={"clip_grad": clip}))
    norm = actor.update(batch, weighted(batch))["grad_norm"]
    used = math.hypot(*(float(p.main_grad.norm()) for p in actor.model.modules[0].parameters()))
    assert norm > 1
    assert used == pytest.approx(0.5 if clip == 0.5 else norm, rel=1e-4)


def test_the_bound_reaches_the_update(train_critic, critic_folder, batch):
    """With epsilon far above the gradient, Adam's first step is rate * gradient / epsilon."""
    optimizer = {"learning_rate": 100.0, "warmup_steps": 0, "epsilon": 1e4, "weight_decay": 0.0}
    moves = []
    for clip in (0.0, 0.5):
        critic = train_critic(critic_folder, role(RoleConfig, optimizer | {"clip_grad": clip}))
        before = parameters(critic)
        norm = critic.update(batch, weighted(batch))["grad_norm"]
        after = parameters(critic)
        moves.append(math.hypot(*(float((after[name] - before[name]).norm()) for name in before)))
    assert moves[1] / moves[0] == pytest.approx(0.5 / norm, rel=2e-2)


FP8 = {"precision": PrecisionConfig(linear="fp8", emulate=True, recipe="delayed")}


@pytest.mark.parametrize("changes", [{}, {"recompute": "full"}, {"recompute": "selective"}, FP8], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_frozen_attention_has_no_gradient_and_all_else_has_its_own(
    train_critic, make_checkpoint, batch, family, changes
):
    """The others' gradients are those of a critic without it, to the bit, and the norm is theirs alone."""
    folder = make_checkpoint(family, classifier=True)
    whole, frozen = (
        train_critic(folder, role(CriticConfig, {"clip_grad": 0.0}, frozen=part, **changes))
        for part in ("none", "attention")
    )
    norms = [trainer.update(batch, weighted(batch))["grad_norm"] for trainer in (whole, frozen)]
    expected = dict(whole.model.modules[0].named_parameters())
    squares = []
    for name, parameter in frozen.model.modules[0].named_parameters():
        assert parameter.requires_grad == ("self_attention" not in name), name
        if parameter.requires_grad:
            assert torch.equal(parameter.main_grad, expected[name].main_grad), name
            squares.append(float(parameter.main_grad.double().square().sum()))
        else:
            assert parameter.grad is None and not hasattr(parameter, "main_grad"), name
    assert norms[1] == pytest.approx(sum(squares) ** 0.5, rel=1e-5) and norms[1] < norms[0]


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_attention_stays_and_takes_no_memory_of_the_optimizer(train_critic, critic_folder, batch, kind):
    """Neither gradient nor decay moves it; moments and main parameters are those of the rest."""
    dtype, changes = KINDS[kind]
    critic = train_critic(
        critic_folder, role(CriticConfig, {"learning_rate": 0.05}, frozen="attention", **changes), dtype
    )
    before = parameters(critic)
    for _ in range(3):
        critic.update(batch, weighted(batch))
    after = parameters(critic)
    assert [torch.equal(after[name], before[name]) for name in after] == ["self_attention" in name for name in after]
    trained = sum(tensor.numel() for name, tensor in after.items() if "self_attention" not in name)
    held = critic.model.offloader.resident()
    assert held["optimizer"] == 8 * trained and held["gradients"] >= 4 * trained
    assert held["gradients"] < 4 * trained * 1.1  # buffers of the distributed optimizer are padded
    assert held["main_parameters"] == (4 * trained if dtype == torch.bfloat16 else 0)


BAD_LOSSES = {
    "nan": lambda share: share * float("nan"),
    "inf": lambda share: share * float("inf"),
    "gradient alone": lambda share: share + (share - share.detach()).sqrt(),
    "loss alone": lambda share: share + float("inf"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_a_step_that_is_not_finite_never_happened(train_actor, folder, batch, bad, kind):
    """Parameters, optimizer and schedule stay, and training goes on as if without it."""
    dtype, changes = KINDS[kind]
    actor, undisturbed = (train_actor(folder, role(**changes), dtype) for _ in range(2))
    for trainer in (actor, undisturbed):
        assert trainer.update(batch, weighted(batch))["skipped"] == 0

    def spoiled(outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        share, _ = weighted(batch)(outputs, token_index)
        if 0 in token_index:  # one of the micro-batches
            share = BAD_LOSSES[bad](share)
        return share, {"loss": share}

    assert actor.update(batch, spoiled)["skipped"] == 1
    assert_same(actor, undisturbed)
    for trainer in (actor, undisturbed):
        trainer.update(batch, weighted(batch, seed=1))
    assert_same(actor, undisturbed)


def test_bfloat16_updates_below_its_precision_add_up(train_critic, critic_folder, batch):
    """The head's gradient keeps its sign mostly, so Adam moves it by about the rate each time; one such step is an
    eighth of the distance between neighbouring bfloat16 numbers at 0.25 and would be lost without float32 main
    parameters."""
    rate, steps = 2**-12, 32
    optimizer = {"learning_rate": rate, "warmup_steps": 0, "weight_decay": 0.0}
    critic = train_critic(critic_folder, role(RoleConfig, optimizer), torch.bfloat16)
    head = critic.model.modules[0].output_layer.weight
    head.data.fill_(0.25)
    critic.reload_parameters()
    for _ in range(steps):
        critic.update(batch, weighted(batch))
    moved = (head.float() - 0.25).abs()
    assert head.dtype == torch.bfloat16
    assert moved.mean() > 0.5 * steps * rate
    main = head.main_param
    assert main.dtype == torch.float32
    assert torch.equal(main.bfloat16().view_as(head), head)
    assert not torch.equal(main.view_as(head), head.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["none", "attention"])
def test_a_checkpoint_restores_everything(train_critic, critic_folder, batch, kind, frozen, tmp_path):
    dtype, changes = KINDS[kind]
    settings = role(CriticConfig, frozen=frozen, **changes)
    trained, restored = (train_critic(critic_folder, settings, dtype) for _ in range(2))
    for _ in range(2):
        trained.update(batch, weighted(batch))
    save_trainer(trained, tmp_path)
    load_trainer(restored, tmp_path)
    assert_same(restored, trained)
    results = [trainer.update(batch, weighted(batch, seed=1)) for trainer in (restored, trained)]
    assert results[0] == results[1]
    assert_same(restored, trained)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_a_whole_critic_serves_a_frozen_one(train_critic, critic_folder, batch, kind, tmp_path):
    """Its attention and the others' optimizer states are taken; the other way round states are missing."""
    dtype, changes = KINDS[kind]
    whole, frozen = (
        train_critic(critic_folder, role(CriticConfig, frozen=part, **changes), dtype) for part in ("none", "attention")
    )
    whole.update(batch, weighted(batch))
    for folder, trainer in (("whole", whole), ("frozen", frozen)):
        (tmp_path / folder).mkdir()
        save_trainer(trainer, tmp_path / folder)
    load_trainer(frozen, tmp_path / "whole")
    torch.testing.assert_close(parameters(frozen), parameters(whole), rtol=0, atol=0)
    moments = [sum(float(tensor.double().square().sum()) for tensor in states(trainer)) for trainer in (frozen, whole)]
    assert 0 < moments[0] < moments[1]
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this critic: .*self_attention"):
        load_trainer(whole, tmp_path / "frozen")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_its_optimizer_starts_fresh(train_actor, folder, batch, kind, tmp_path):
    """As if its parameters came from a Hugging Face folder; a used optimizer must not leak into the new start."""
    dtype, changes = KINDS[kind]
    trained, restored, expected = (train_actor(folder, role(**changes), dtype) for _ in range(3))
    trained.update(batch, weighted(batch))
    save_trainer(trained, tmp_path)
    load_parameters(restored.model, tmp_path)
    restored.reset_optimizer()
    for ours, theirs in zip(expected.model.modules[0].parameters(), trained.model.modules[0].parameters(), strict=True):
        ours.data.copy_(theirs)
    expected.reload_parameters()
    assert_same(restored, expected)
    rates = [trainer.update(batch, weighted(batch, seed=1))["learning_rate"] for trainer in (restored, expected)]
    assert rates == pytest.approx([2.5e-4, 2.5e-4])
    assert_same(restored, expected)


def test_reset_optimizer_keeps_parameters_only(train_actor, folder, batch):
    trained, fresh = (train_actor(folder, role()) for _ in range(2))
    trained.update(batch, weighted(batch))
    kept = parameters(trained)
    trained.reset_optimizer()
    for ours, theirs in zip(fresh.model.modules[0].parameters(), trained.model.modules[0].parameters(), strict=True):
        ours.data.copy_(theirs)
    fresh.reload_parameters()
    assert_same(trained, fresh)
    torch.testing.assert_close(parameters(trained), kept, rtol=0, atol=0)
    for trainer in (trained, fresh):
        trainer.update(batch, weighted(batch, seed=1))
    assert_same(trained, fresh)


def test_a_missing_or_foreign_checkpoint_is_refused(train_actor, make_checkpoint, folder, tmp_path):
    actor = train_actor(folder, role())
    with pytest.raises(CheckpointError, match="no checkpoint of the actor"):
        load_trainer(actor, tmp_path / "absent")
    save_trainer(actor, tmp_path)
    other = train_actor(make_checkpoint("qwen3"), role())
    with pytest.raises(CheckpointError, match="not a checkpoint of this actor"):
        load_trainer(other, tmp_path)


def test_forward_changes_nothing(train_actor, folder, batch):
    """Neither random state nor parameters, and twice gives the same to the bit."""
    actor, untouched = (train_actor(folder, role()) for _ in range(2))
    random_state = torch.get_rng_state()
    first, second = actor.model.forward(batch), actor.model.forward(batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_same(actor, untouched)


def test_passes_and_the_optimizer_are_work(train_actor, folder, batch, monkeypatch):
    actor, seen = train_actor(folder, role()), {}
    whole, step = weighted(batch), actor.optimizer.step_with_ready_grads

    def loss(*arguments):
        seen["loss"] = working.under_way
        return whole(*arguments)

    def takes_step():
        seen["optimizer"] = working.under_way
        return step()

    monkeypatch.setattr(actor.optimizer, "step_with_ready_grads", takes_step)
    actor.update(batch, loss)
    assert seen == {"loss": True, "optimizer": True} and not working.under_way


def test_loading_weights_reaches_the_main_parameters(train_actor, make_checkpoint, folder, batch):
    """Else the first update would bring the old weights back."""
    actor = train_actor(folder, role(), torch.bfloat16)
    other_folder = make_checkpoint("qwen2", seed=1)
    actor.load_hf(other_folder)
    expected = train_actor(other_folder, role(), torch.bfloat16)
    for trainer in (actor, expected):
        trainer.update(batch, weighted(batch))
    assert_same(actor, expected)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize("multiple", [16, 128])
def test_padding_to_what_fp8_needs_changes_nothing(
    train_actor, make_checkpoint, make_experience, monkeypatch, family, multiple
):
    """The computation is in float32 both times; only the packing is that of FP8."""
    folder, batch = make_checkpoint(family), make_experience([3, 1, 5, 2], [6, 30, 9, 17])
    plain, padded = train_actor(folder, role()), train_actor(folder, role())
    lengths = []

    pack = packing.pack

    def pack_to_multiple(*arguments: object) -> object:
        micro = pack(*arguments)
        lengths.append(len(micro.tokens))
        return micro

    expected = plain.model.forward(batch)
    monkeypatch.setattr(RoleConfig, "packing_multiples", property(lambda _: (1, multiple)))
    monkeypatch.setattr(packing, "pack", pack_to_multiple)
    for mine, other in zip(expected, padded.model.forward(batch), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    theirs = padded.update(batch, weighted(batch))
    assert lengths and all(length % multiple == 0 for length in lengths)
    monkeypatch.undo()
    assert plain.update(batch, weighted(batch)) == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(parameters(plain), parameters(padded), rtol=1e-4, atol=1e-5)
