from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def plans_pretend(no_world: None) -> None:
    """Every test here plans."""
