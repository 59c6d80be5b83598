"""The start of the processes' world."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_vapo.errors import LayoutError
from megatron_vapo.models import layout

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    "there", [("RANK", "WORLD_SIZE"), ("WORLD_SIZE",), ("RANK",), VARIABLES[:3], ("RANK", "MASTER_ADDR", "MASTER_PORT")]
)
def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...]) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in there:
        monkeypatch.setenv(name, "1")
    with pytest.raises(LayoutError) as refusal:
        layout.init_world()
    text = str(refusal.value)
    missing = [name for name in VARIABLES if name not in there]
    assert text.startswith(f"{', '.join(there)} set, but not {', '.join(missing)}:") and "torchrun" in text
