"""Names of Megatron that are not public stand in one file, where a new release is to be looked through."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_vapo"
ALLOWED = {"models/megatron_versions.py", "runtime/cpu_backend.py"}


def private_names(source: str) -> list[str]:
    """Underscored names that a module takes from what it imports of Megatron, also as strings for getattr and the like,
    and imports of the writers of checkpoints, which have no public interface."""
    tree = ast.parse(source)
    imported, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            imported |= {alias.asname or alias.name for alias in node.names}
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
            found += [node.module] if "dist_checkpointing.strategies" in node.module else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            found += [node.attr] if imported & {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)} else []
        if isinstance(node, (ast.Call, ast.Tuple)):
            parts = node.args if isinstance(node, ast.Call) else node.elts
            names = [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
            if imported & {part.id for part in parts if isinstance(part, ast.Name)}:
                found += [name for name in names if name.startswith("_")]
    return found


def test_private_names_of_megatron_stand_in_one_file() -> None:
    files = {str(path.relative_to(PACKAGE)): private_names(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {name for name, found in files.items() if found} == ALLOWED, files


def test_each_way_to_a_private_name_is_seen() -> None:
    head = "from megatron.core import parallel_state as state\n"
    for line in (
        "from megatron.core.parallel_state import _GROUP",
        "from megatron.core.dist_checkpointing.strategies import filesystem_async",
        "state._GROUP = 1",
        "state.groups._first",
        "getattr(state, '_GROUP')",
        "[(state, '_GROUP', 1)]",
    ):
        assert private_names(head + line), line
    assert not private_names(head + "state.__name__; self._state; state.groups")
