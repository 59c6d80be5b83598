"""The code that documents show is the code of the examples, or does what the document says."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from torch import Tensor

from tests.conftest import REPOSITORY


def blocks(document: str) -> list[str]:
    text = (REPOSITORY / "docs" / document).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def bodies(source: str) -> dict[str, str]:
    """Every function's body, without docstring."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            found[node.name] = "\n".join(ast.dump(statement) for statement in body)
    return found


@pytest.mark.parametrize(
    ("document", "example"), [("add_a_reward.md", "my_reward.py"), ("add_an_engine.md", "my_engine.py")]
)
def test_documents_show_the_code_of_examples(document, example):
    shown = [bodies(block) for block in blocks(document)]
    whole = bodies((REPOSITORY / "examples" / example).read_text(encoding="utf-8"))
    assert shown
    for functions in shown:
        assert functions.items() <= whole.items()


def test_the_loss_term_that_is_added():
    """Shares add up, the value is the estimator k3 over all tokens, and its gradient vanishes where nothing moved."""
    (block,) = blocks("add_a_loss.md")
    names: dict[str, object] = {"Tensor": Tensor}
    exec(block, names)
    kl_penalty = names["kl_penalty"]
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    weights = torch.full((30,), 1 / 30, dtype=torch.float64)

    whole = kl_penalty(new, old, weights)
    parts = [kl_penalty(new[part], old[part], weights[part]) for part in (slice(0, 11), slice(11, 30))]
    torch.testing.assert_close(sum(parts), whole)
    by_hand = sum(2.718281828459045 ** (o - n) - 1 - (o - n) for n, o in zip(new.tolist(), old.tolist())) / 30
    assert float(whole) == pytest.approx(by_hand)
    still = old.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kl_penalty(still, old, weights), still)
    assert torch.equal(gradient, torch.zeros_like(gradient))
