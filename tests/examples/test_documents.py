"""The code that documents show is the code of the examples, or does what the document says."""

from __future__ import annotations

import ast
import io
import re
import tokenize

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
        ("add_a_prompt_source.md", ["levels.py"]),
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


IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def lines_of_code(source: str) -> int:
    """All but blank lines, comments and docstrings."""
    with_text = {line for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in IGNORED
                 for line in range(t.start[0], t.end[0] + 1)}  # fmt: skip
    documented = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    strings = [node.body[0] for node in documented if ast.get_docstring(node)]
    return len(with_text - {line for one in strings for line in range(one.lineno, (one.end_lineno or 0) + 1)})


def test_lines_of_code_are_counted():
    assert lines_of_code('"""Doc."""\n\n# no\ndef f(\n    x,\n):\n    """Doc\n    more."""\n    return x  # yes\n') == 4


def part(path: str, *names: str) -> str:
    """The definitions of these names."""
    source = (REPOSITORY / path).read_text(encoding="utf-8")
    found = [n for n in ast.parse(source).body if getattr(n, "name", None) in names]
    assert len(found) == len(names)
    return "\n".join(ast.unparse(node) for node in found)


def whole(name: str) -> str:
    return (REPOSITORY / "examples" / f"{name}.py").read_text(encoding="utf-8")


def test_the_table_counts_what_a_newcomer_writes():
    text = (REPOSITORY / "docs" / "extend.md").read_text(encoding="utf-8")
    imports = "import torch\nfrom torch import Tensor\nfrom megatron_vapo.data.experience import Experience\n"
    written = {
        "a reward": "import re\n" + part("examples/my_reward.py", "last_number"),
        "an advantage": imports + part("examples/dr_grpo.py", "centred"),
        "a policy loss": whole("gspo"),
        "an environment": whole("calculator"),
        "a prompt source": whole("levels"),
        "a rollout engine": whole("my_engine"),
    }
    beside = text.split("## Beside others")[1]
    for what, source in written.items():
        (first,) = re.findall(rf"^\| {what}[^|]*\| (\d+) \(", text, re.MULTILINE)
        (second,) = re.findall(rf"^\| {what}[^|]*\| (\d+) lines", beside, re.MULTILINE)
        assert int(first) == int(second) == lines_of_code(source), what
    (entry,) = re.findall(r"FAMILIES = \{\n    \.\.\.\n(.*?)\n\}", blocks("add_a_model.md")[0], re.DOTALL)
    assert "an entry of a table, 6 lines" in text and "6 lines, 1 edit" in beside and len(entry.splitlines()) == 6
