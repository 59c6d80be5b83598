"""What the documents mention exists: linked files, paths, modules, Make targets, settings of a recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_vapo.recipe.load import MOVED
from megatron_vapo.recipe.schema import SCHEMA
from tests.conftest import REPOSITORY
from tests.documented import undescribed

FOLDERS = "megatron_vapo|tests|tools|benchmarks|recipes|slurm|examples|docs"
FREE = {"rollout.sglang.arguments", "algorithm.options"}
"""Mappings whose keys are another program's, or a plug-in's."""
NO_SETTINGS = {"model.layers"}
"""Names of tensors."""
NOT_COMMITTED = {"slurm/site.env", "megatron_vapo.sqsh"}
"""Files that a document asks its reader to make."""

DOCUMENTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "tools/**/*.md", "benchmarks/**/*.md")
    for path in REPOSITORY.glob(pattern)
)


@pytest.fixture(params=DOCUMENTS)
def document(request: pytest.FixtureRequest) -> Path:
    return REPOSITORY / request.param


def code(text: str) -> str:
    """Spans between backticks, fenced blocks and indented ones, a line each."""
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = re.findall(r"`([^`]+)`", rest)
    indented = re.findall(r"^ {4,}(\S.*)$", rest, re.MULTILINE)
    return "\n".join([*fenced, *spans, *indented])


def is_module(dotted: str) -> bool:
    path = REPOSITORY / dotted.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", link):
            target = link.partition("#")[0]
            assert not target or (document.parent / target).exists(), f"{document.name}: {link}"


def test_paths_exist(document):
    text = document.read_text(encoding="utf-8")
    for mentioned in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*-]+", text):
        path = mentioned.rstrip("./")
        assert path in NOT_COMMITTED or list(REPOSITORY.glob(path)), f"{document.name}: {mentioned}"


def test_source_files_that_are_called_by_their_name_exist(document):
    names = {path.name for folder in FOLDERS.split("|") for path in (REPOSITORY / folder).rglob("*.py")}
    mentioned = set(re.findall(r"(?<![\w/.*-])[a-z_0-9]+\.py\b", code(document.read_text(encoding="utf-8"))))
    assert mentioned <= names, f"{document.name}: {sorted(mentioned - names)}"


def test_modules_exist(document):
    """Also `package.module:function`: the module, and the function by its name in the source."""
    text = document.read_text(encoding="utf-8")
    for mentioned, _, name in re.findall(r"\b((?:megatron_vapo|benchmarks|examples)(?:\.(?!md\b)\w+)+)(:(\w+))?", text):
        module, _, last = mentioned.rpartition(".")
        if mentioned not in NOT_COMMITTED:
            assert is_module(mentioned) or (is_module(module) and _defines(module, last)), (
                f"{document.name}: {mentioned}"
            )
        assert not name or _defines(mentioned, name), f"{document.name}: {mentioned}:{name}"


def _defines(module: str, name: str) -> bool:
    path = REPOSITORY / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return re.search(rf"^(def|class) {name}\b|^{name}\b", source.read_text(encoding="utf-8"), re.MULTILINE) is not None


def test_make_targets_exist(document):
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    mentioned = re.findall(r"(?:^|[\s&;])make ([a-z][\w-]*)", code(document.read_text(encoding="utf-8")), re.MULTILINE)
    assert set(mentioned) <= targets, document.name


def test_settings_exist(document):
    """`group.key`, with or without a value. What follows a mapping (sglang's own arguments) is free; the changelog may
    say what a setting was called."""
    known = set(SCHEMA) | (set(MOVED) if document.name == "CHANGELOG.md" else set())
    groups = "|".join(sorted({key.partition(".")[0] for key in known if "." in key}))
    text = code(document.read_text(encoding="utf-8"))
    mentioned = re.findall(rf"(?<![\w./-])(?:{groups})(?:\.(?!py\b|safetensors\b)[a-z_0-9]+)+(?![\w/])", text)
    unknown = {key for key in mentioned if key not in known | NO_SETTINGS and key.rpartition(".")[0] not in FREE}
    assert not unknown, f"{document.name}: {sorted(unknown)}"


def test_every_metric_is_described():
    """Those whose whole names stand in the sources; tests/commands/test_cli.py compares a run's."""
    groups = "reward|response|critic|actor|advantage|rollout|tokens|throughput|seconds|evaluate|data|memory"
    sources = [path.read_text("utf-8") for path in (REPOSITORY / "megatron_vapo").rglob("*.py")]
    names = {name for source in sources for name in re.findall(rf'"((?:{groups})/[a-z_0-9]+)"', source)}
    assert len(names) > 50
    # Counts that a share is made of, and beginnings of names.
    parts = {"rollout/prompt_tokens", "rollout/cached_prompt_tokens"}
    begun = {name for name in names if name.endswith("_tenth") or name == "critic/value"}
    assert undescribed(names - parts - begun) == []


def test_every_document_is_in_the_index():
    index = (REPOSITORY / "docs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w.-]+\.md)\)", index))
    documents = {path.name for path in (REPOSITORY / "docs").glob("*.md")}
    assert linked == documents - {"README.md"}


def test_no_document_names_a_path_of_one_machine():
    for name in DOCUMENTS:
        assert not re.search(r"/(home|root)/\w", (REPOSITORY / name).read_text(encoding="utf-8")), name


def test_the_licence_is_the_one_that_the_package_names():
    licence = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "Version 2.0" in licence
    assert 'license = "Apache-2.0"' in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


def test_hosted_ci_calls_make_targets_only():
    """What CI does, anyone can do by the same words."""
    workflow = (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z][\w-]*):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = re.findall(r"- run: (.*)", workflow)
    assert commands and {command.split()[0] for command in commands} == {"make"}
    assert {command.split()[1] for command in commands} <= set(targets)


def test_commands_show_help_that_documents_promise():
    """Every `megatron-vapo COMMAND` that a document names is one."""
    from megatron_vapo import cli

    for name in DOCUMENTS:
        for command in re.findall(r"(?:^|\s)megatron-vapo ([a-z][\w-]*)", code((REPOSITORY / name).read_text("utf-8"))):
            assert f'"{command}"' in Path(cli.__file__).read_text(encoding="utf-8"), f"{name}: {command}"
