"""The order of the loop's verbs, where no model is needed to see it."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest

from megatron_vapo.runtime.signals import StopRequested
from megatron_vapo.training import loop


def test_a_stop_that_the_last_step_of_value_pretraining_asked_for_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as an alarm of `alarms.stop`: with pretraining concluded, and a checkpoint of that."""
    monkeypatch.setattr(loop, "_pretraining_steps", lambda run: True)
    monkeypatch.setattr(loop, "save_pretrained_critic", lambda *_: None)
    run = MagicMock()
    run.recipe.value_pretraining.checkpoint = None
    run.interrupt.check.side_effect = StopRequested
    with pytest.raises(StopRequested):
        loop.pretrain_critic(run)
    verbs = [name for name, _, _ in run.mock_calls]
    assert verbs.index("end_pretraining") < verbs.index("save") < verbs.index("interrupt.check")
