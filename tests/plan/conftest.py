from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_vapo.models.layout import init_world


@pytest.fixture(autouse=True, scope="module")
def no_world() -> Iterator[None]:
    """A plan pretends worlds of its own; a test before may have left a real one."""
    left = dist.is_initialized()
    if left:
        dist.destroy_process_group()
    yield
    if left:
        init_world()
