"""Where the supported versions of Megatron Core differ. Each difference is one function, whose docstring says which
version needs it; everything else in this room is the same code for all of them."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from packaging.version import Version

from megatron_vapo.weights.torch_dist import COMMON_STATE, TorchDistReader

_IS_0_19 = Version(version("megatron-core")) >= Version("0.19")


def save_request(content: dict[str, Any], folder: Path) -> Any:
    """Megatron's plan for writing `content`, an AsyncRequest; all ranks together.

    0.19.2 would by default write through nvidia-resiliency-ext, a package that 0.16.1 does not know.
    """
    settings = {"async_strategy": "mcore"} if _IS_0_19 else {}
    return dist_checkpointing.save(content, str(folder), async_sharded_save=True, **settings)


def load_checkpoint(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Megatron's load, of checkpoints of all supported versions; all ranks together.

    0.16.1 finds plain values in common.pt only. 0.19.2 writes them among the tensors, and reads both.
    """
    if _IS_0_19 or (folder / "common.pt").is_file():
        return dist_checkpointing.load(wanted, str(folder))
    return dist_checkpointing.load(wanted, str(folder), common_strategy=_common_state_strategy())


def _common_state_strategy() -> Any:
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class CommonStateStrategy(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str) -> dict[str, Any]:
            return TorchDistReader(checkpoint_dir).read_object(COMMON_STATE)

    return CommonStateStrategy()


def hide_successors() -> None:
    """0.19.2 warns at each GPTModel that its successor is HybridModel, which 0.16.1 does not have."""
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
        lambda record: not record.getMessage().startswith("GPTModel IS DEPRECATED")
    )
