"""Emulated FP8 linear layers: their three products from operands rounded one by one, torchao's emulation, where in a
model they are, recompute and checkpoints."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_vapo.config import ActorConfig, PrecisionConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.models import fp8_formats as fp8

pytestmark = pytest.mark.usefixtures("world")
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")


def fp8_role(recipe: str = "blockwise", format: str = "hybrid", **precision: object) -> ActorConfig:
    fp8 = PrecisionConfig(linear="fp8", emulate=True, recipe=recipe, format=format, **precision)
    return ActorConfig(micro_batch_tokens=64, precision=fp8)


def by_hand(matrix: Tensor, dtype: torch.dtype, recipe: str, blocks: tuple[int, int]) -> Tensor:
    """Each block of a matrix rounded by itself, in a loop."""
    rounded = torch.empty_like(matrix)
    (rows, columns), (height, width) = matrix.shape, blocks
    rule = {"tensorwise": "float", "blockwise": "power_of_two", "mxfp8": "e8m0"}[recipe]
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            part = slice(top, top + height), slice(left, left + width)
            rounded[part] = fp8.round_blocks(matrix[part].contiguous(), dtype, None, rule).numbers()
    return rounded


WHOLE = (10**6, 10**6)
DIRECTIONS = {
    # product: (first operand's blocks, second operand's), by recipe
    "tensorwise": {"y": (WHOLE, WHOLE), "dx": (WHOLE, WHOLE), "dw": (WHOLE, WHOLE)},
    "blockwise": {"y": ((1, 128), (128, 128)), "dx": ((1, 128), (128, 128)), "dw": ((128, 1), (128, 1))},
    "mxfp8": {"y": ((1, 32), (1, 32)), "dx": ((1, 32), (32, 1)), "dw": ((32, 1), (32, 1))},
}


@pytest.mark.parametrize("format", ["e4m3", "hybrid"])
@pytest.mark.parametrize("recipe", DIRECTIONS)
def test_products_from_operands_rounded_block_by_block(recipe, format):
    """T, K and N are ragged in blocks of 128 and of 32."""
    from megatron_vapo.models.emulated_fp8 import Rounding, _Linear

    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(150, 1, generator=generator).exp() * torch.randn(1, 200, generator=generator).exp()
    x = (torch.randn(150, 200, generator=generator) * spread).requires_grad_()
    weight = torch.randn(140, 200, generator=generator).requires_grad_()
    bias = torch.randn(140, generator=generator).requires_grad_()
    dy = torch.randn(150, 140, generator=generator) * torch.randn(150, 1, generator=generator).exp()
    rounding = Rounding(PrecisionConfig(recipe=recipe, format=format), torch.device("cpu"))
    y = _Linear.apply(x.view(50, 3, 200), weight, bias, rounding)
    y.backward(dy.view(50, 3, 140))

    e4m3, grad = fp8.E4M3, fp8.E5M2 if format == "hybrid" else fp8.E4M3
    blocks = DIRECTIONS[recipe]
    plain_x, plain_w = x.detach(), weight.detach()

    def product(name: str, a: Tensor, a_dtype: torch.dtype, b: Tensor) -> tuple[Tensor, Tensor]:
        first, second = blocks[name]
        return by_hand(a, a_dtype, recipe, first).double(), by_hand(b, e4m3, recipe, second).double()

    a, b = product("y", plain_x, e4m3, plain_w)
    close = {"rtol": 1e-5, "atol": 1e-3}
    torch.testing.assert_close(y.detach().view(150, 140).double(), a @ b.t() + bias.detach().double(), **close)
    a, b = product("dx", dy, grad, plain_w)
    torch.testing.assert_close(x.grad.double(), a @ b, **close)
    a, b = product("dw", dy, grad, plain_x)
    torch.testing.assert_close(weight.grad.double(), a.t() @ b, **close)
    torch.testing.assert_close(bias.grad, dy.sum(0))
    assert (y.detach().view(150, 140) - plain_x @ plain_w.t() - bias.detach()).abs().max() > 1e-2  # FP8 it is


def test_tensorwise_against_torchao():
    """torchao's emulated Float8Linear: dynamic tensorwise scales, e4m3 forward and e5m2 backward."""
    pytest.importorskip("torchao")
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    from megatron_vapo.models.emulated_fp8 import Rounding, _Linear

    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 48)
    theirs = Float8Linear.from_float(copy.deepcopy(plain), config=Float8LinearConfig(emulate=True))
    x = (torch.randn(32, 64) * torch.randn(32, 1).exp()).requires_grad_()
    dy = torch.randn(32, 48)
    expected = torch.autograd.grad(theirs(x), [x, theirs.weight, theirs.bias], dy)
    rounding = Rounding(PrecisionConfig(recipe="tensorwise", format="hybrid"), torch.device("cpu"))
    y = _Linear.apply(x, plain.weight, plain.bias, rounding)
    torch.testing.assert_close(y, theirs(x), rtol=1e-5, atol=1e-5)
    for ours, other in zip(torch.autograd.grad(y, [x, plain.weight, plain.bias], dy), expected):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_once_after_sum_and_bias():
    from megatron_vapo.models.emulated_fp8 import Rounding, _Linear

    x, weight = torch.randn(8, 32).bfloat16(), torch.randn(16, 32).bfloat16()
    bias = torch.randn(16).bfloat16()
    rounding = Rounding(PrecisionConfig(recipe="tensorwise"), torch.device("cpu"))
    y = _Linear.apply(x, weight, bias, rounding)
    operands = [fp8.round_blocks(m, fp8.E4M3, None, "float").numbers() for m in (x, weight)]
    assert torch.equal(y, (operands[0] @ operands[1].t() + bias.float()).bfloat16())


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_only_linear_layers_of_the_layers_asked_for(make_actor, make_checkpoint, family):
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    actor = make_actor(make_checkpoint(family, num_hidden_layers=4), fp8_role(first_layers=1, last_layers=1))
    emulated = {name for name, module in actor.modules[0].named_modules() if type(module).__name__.startswith("Emul")}
    linear = {
        name
        for name, module in actor.modules[0].named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    }
    assert emulated == {name for name in linear if name.startswith(("decoder.layers.1.", "decoder.layers.2."))}
    assert {name.rsplit(".", 1)[-1] for name in emulated} == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert "output_layer" in linear


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint("qwen2")


@pytest.fixture
def batch(make_experience) -> Experience:
    return make_experience([3, 1, 5], [6, 30, 9])


def outputs_sum(outputs: tuple[Tensor, ...], token_index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    share = (outputs[0] * (1 + token_index % 3)).sum()
    return share, {"loss": share}


def state(model) -> dict[str, object]:
    return model.modules[0].state_dict()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recompute_changes_nothing(train_actor, folder, batch, recipe):
    """A layer that runs forward twice rounds to the same numbers: also while delayed scales move between steps."""
    results = []
    for recompute in ("none", "full"):
        actor = train_actor(folder, replace(fp8_role(recipe), recompute=recompute))
        updates = [actor.update(batch, outputs_sum) for _ in range(3)]
        results.append((updates, state(actor.model), actor.model.forward(batch)))
    (updates, plain, outputs), (again, recomputed, other) = results
    assert updates == again and plain.keys() == recomputed.keys()
    torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(outputs, other))


def test_delayed_scales_move_with_updates_only_and_are_those_of_the_largest_numbers(train_actor, folder, batch):
    actor = train_actor(folder, fp8_role("delayed"))
    layer = actor.model.modules[0].decoder.layers[0].mlp.linear_fc1
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().abs().max()))
    actor.model.forward(batch)
    assert layer.rounding.delayed.scale.tolist() == [1.0, 1.0, 1.0] and not layer.rounding.delayed.history.any()
    seen.clear()
    weight = layer.weight.detach().abs().max()
    actor.update(batch, outputs_sum)
    assert len(seen) > 0
    expected = torch.stack([448 / torch.stack(seen).max(), 448 / weight])
    torch.testing.assert_close(layer.rounding.delayed.scale[:2], expected)
    assert float(layer.rounding.delayed.scale[2]) != 1.0


def test_delayed_scales_are_in_checkpoints(train_actor, folder, batch, tmp_path):
    """Two updates, then the third: the same bits where a checkpoint lies between."""
    from megatron_vapo.models.checkpointing import load_trainer, save_trainer

    (tmp_path / "actor").mkdir()
    actor = train_actor(folder, fp8_role("delayed"))
    for _ in range(2):
        actor.update(batch, outputs_sum)
    save_trainer(actor, tmp_path / "actor")
    resumed = train_actor(folder, fp8_role("delayed"))
    load_trainer(resumed, tmp_path / "actor")
    torch.testing.assert_close(state(resumed.model), state(actor.model), rtol=0, atol=0)
    assert resumed.update(batch, outputs_sum) == actor.update(batch, outputs_sum)
    torch.testing.assert_close(state(resumed.model), state(actor.model), rtol=0, atol=0)


def test_checkpoints_cross_between_recipes(train_actor, folder, batch, tmp_path):
    """State of delayed scaling is no part of the model: others leave it, and it begins anew where there is none."""
    from megatron_vapo.models.checkpointing import load_trainer, save_trainer

    roles = {"delayed": fp8_role("delayed"), "plain": ActorConfig(micro_batch_tokens=64)}
    for name, role in roles.items():
        (tmp_path / name).mkdir()
        actor = train_actor(folder, role)
        actor.update(batch, outputs_sum)
        save_trainer(actor, tmp_path / name)
    plain = train_actor(folder, roles["plain"])
    load_trainer(plain, tmp_path / "delayed")
    delayed = train_actor(folder, roles["delayed"])
    load_trainer(delayed, tmp_path / "plain")
    layer = delayed.model.modules[0].decoder.layers[0].mlp.linear_fc1
    assert layer.rounding.delayed.scale.tolist() == [1.0, 1.0, 1.0]
