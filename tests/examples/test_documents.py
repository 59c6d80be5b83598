"""The code that documents show is the code of the examples, or does what the document says."""

from __future__ import annotations

import ast
import re

import pytest

from megatron_vapo.algorithm.types import ADVANTAGE_READS, LOSS_READS
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
    ("document", "examples"),
    [
        ("add_a_reward.md", ["my_reward.py"]),
        ("add_an_engine.md", ["my_engine.py"]),
        ("add_an_environment.md", ["calculator.py"]),
        ("extend.md", ["gspo.py", "dr_grpo.py"]),
    ],
)
def test_documents_show_the_code_of_examples(document, examples):
    shown = [bodies(block) for block in blocks(document)]
    whole: dict[str, str] = {}
    for example in examples:
        whole |= bodies((REPOSITORY / "examples" / example).read_text(encoding="utf-8"))
    assert shown
    for functions in shown:
        assert functions.items() <= whole.items()


def test_every_tensor_that_a_plug_in_may_read_is_named():
    text = (REPOSITORY / "docs" / "extend.md").read_text(encoding="utf-8")
    loss, advantage = text.split("## An advantage")
    rows = "".join(line.split("|")[1] for line in loss.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", rows)) == set(LOSS_READS)
    (sentence,) = re.findall(r"Tensors may be named after `batch`: ([^;]*);", advantage)
    assert re.findall(r"`(\w+)`", sentence) == list(ADVANTAGE_READS)
