"""The check of a loss and an advantage of one's own, before anything is built: signature, settings, one try."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_vapo.algorithm.types import ADVANTAGE_READS, LOSS_READS, MinibatchPart
from megatron_vapo.config import Recipe
from megatron_vapo.errors import RecipeError, few
from megatron_vapo.plugins import ADVANTAGES, LOSSES, Plugin

TAKEN = {"loss", "policy_loss", "lm_loss", "kl_reference", "entropy"}
TAKEN |= {"grad_norm", "learning_rate", "skipped", "effective_sample_size"}
"""Names of the actor's other metrics, which a loss of one's own must not give to its own, nor `importance_*`."""


def check_plugins(recipe: Recipe) -> None:
    """Refuse a loss or an advantage that cannot work.

    Raises:
        RecipeError: what `Plugin` raises; a setting that neither has; a tensor that the run does not compute; a loss
            that returns no share.
    """
    algorithm = recipe.algorithm
    loss, own = Plugin.load("loss", algorithm.loss, LOSSES, LOSS_READS), []
    if algorithm.advantage not in ADVANTAGES:
        own.append(Plugin.load("advantage", algorithm.advantage, {}, ADVANTAGE_READS))
        _check_critic(own[0], recipe.uses_critic)
    if algorithm.loss not in LOSSES:
        own.append(loss)
        _check_reads(loss, recipe)
    chosen = [plugin.chosen(algorithm.options) for plugin in own]
    _check_options(own, algorithm.options)
    if loss in own:
        _try_loss(loss, chosen[-1])


def reduction_acts(recipe: Recipe) -> bool:
    """Return whether algorithm.loss_reduction changes the actor's loss: a loss of one's own may weigh tokens itself.

    Raises:
        RecipeError: as `check_plugins`, of the loss.
    """
    algorithm = recipe.algorithm
    if algorithm.loss in LOSSES or algorithm.kl_coefficient > 0:
        return True
    loss = Plugin.load("loss", algorithm.loss, LOSSES, LOSS_READS)
    options = loss.chosen(algorithm.options)
    by_token, by_sample = (_made_up(weights) for weights in (_BY_TOKEN, _BY_SAMPLE))
    return not torch.equal(_called(loss, options, by_token)[0], _called(loss, options, by_sample)[0])


def _check_critic(advantage: Plugin, uses_critic: bool) -> None:
    reads = "values" in advantage.reads
    if reads != uses_critic:
        raise RecipeError(
            f"{advantage.title} {'reads' if reads else 'does not read'} the critic's values: set "
            f"algorithm.critic={str(reads).lower()}"
        )


def _check_reads(loss: Plugin, recipe: Recipe) -> None:
    critics = [name for name in ("values", "returns") if name in loss.reads]
    if critics and not recipe.uses_critic:
        raise RecipeError(f"{loss.title} reads {critics[0]}, which only a critic gives, and this recipe has none")
    if "reference_logprobs" in loss.reads and not recipe.uses_reference:
        raise RecipeError(f"{loss.title} reads reference_logprobs: set reference.enabled=true")
    mode = recipe.resolved_algorithm.importance.mode
    if mode != "none" and "importance" not in loss.reads:
        raise RecipeError(
            f"algorithm.importance.mode={recipe.algorithm.importance.mode}: {loss.title} does not read importance, so "
            "nothing would be corrected: let it multiply its terms by that, or set mode=none"
        )


def _check_options(plugins: list[Plugin], options: dict[str, Any]) -> None:
    known = sorted({name for plugin in plugins for name in plugin.options})
    unknown = sorted(options.keys() - set(known))
    if unknown:
        titles = " and ".join(plugin.title for plugin in plugins) or "no loss and no advantage of one's own"
        raise RecipeError(
            f"algorithm.options: there is no setting {unknown[0]} of {titles}; known are {few(known) or 'none'}"
        )


def _try_loss(loss: Plugin, options: dict[str, Any]) -> None:
    """Call a loss on made-up responses."""
    returned = _called(loss, options, _made_up(_BY_TOKEN))
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise RecipeError(f"{loss.title}: return a pair, the share of the loss and a dict of statistics")
    share, statistics = returned
    for name, tensor in {"the share": share, **statistics}.items():
        if not isinstance(tensor, Tensor) or tensor.dim():
            raise RecipeError(f"{loss.title}: {name} must be a scalar tensor, as part.mean returns")
    if not share.requires_grad:
        raise RecipeError(f"{loss.title}: its share has no gradient: it depends on neither logprobs nor entropy")
    taken = [name for name in statistics if name in TAKEN or name.startswith("importance_")]
    if taken:
        raise RecipeError(f"{loss.title}: another metric is called actor/{taken[0]}: call this statistic otherwise")


_BY_TOKEN, _BY_SAMPLE = [1 / 4] * 4, [1 / 2] + [1 / 6] * 3
"""The weights of the tokens of two responses, of one token and of three, with either algorithm.loss_reduction."""


def _made_up(weights: list[float]) -> MinibatchPart:
    return MinibatchPart(
        weights=torch.tensor(weights),
        lengths=torch.tensor([1, 3, 3, 3]),
        tokens=4,
        responses=2,
        response=torch.tensor([0, 1, 1, 1]),
        responses_here=2,
    )


def _called(loss: Plugin, options: dict[str, Any], part: MinibatchPart) -> Any:
    """Return what a loss returns for made-up tokens."""
    tokens = torch.tensor([-1.0, -2.0, -0.5, -1.5])
    tensors = dict.fromkeys(loss.reads, tokens) | {
        "logprobs": (tokens + 0.1).requires_grad_(),
        "entropy": (-tokens).requires_grad_(),
        "correct": torch.tensor([True, False, False, False]),
        "groups": torch.zeros(4, dtype=torch.int64),
    }
    return loss.function(part, *(tensors[name] for name in loss.reads), **options)
