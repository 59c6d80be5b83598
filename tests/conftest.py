"""Tiny checkpoints that tests share, made from scratch: every dimension differs, so that no transpose hides.

`pytest -n 2 --dist loadscope --no-loadscope-reorder` gives every module to one process, so that its servers and models
are made once.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from megatron_vapo.runtime import cpu_backend

cpu_backend.install()

# The same examples in every run, so that a failure belongs to the change it is seen with; HYPOTHESIS_PROFILE=search
# looks for new ones. Tests share the machine with others: no time limit per example, no more threads than asked for.
settings.register_profile("repeat", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))
torch.set_num_threads(1)

VOCAB = 43
"""Symbols of the tiny tokenizer; not divisible by 2 or 4."""

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


TOGETHER = {
    "slurm": ("tests/slurm/",),
    "servers": (
        "tests/rollout/test_sglang_engine.py",
        "tests/distributed/test_first_gpu_recipe.py",
        "tests/distributed/test_sglang_layouts.py",
    ),
    "ranks": ("tests/crossing/", "tests/distributed/", "tests/test_ranks.py"),
}
"""Tests of several processes each, of which one at a time is enough of a kind: a job waits while others compute."""

LONGEST = (
    "ranks",
    "slurm",
    "servers",
    "tests/training/test_resume.py",
    "tests/benchmarks/test_gpu_check.py",
    "tests/plan/test_plan_against_reality.py",
    "tests/benchmarks/test_table1_sweep.py",
    "tests/tools/test_launch.py",
)
"""Of the units below those of more than half a minute, which begin: no process is left with a long one at the end."""


def unit_of(nodeid: str) -> str:
    """What one process of tests runs whole: a module, or what is `TOGETHER`."""
    kinds = (kind for kind, beginnings in TOGETHER.items() if nodeid.startswith(beginnings))
    return next(kinds, nodeid.partition("::")[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest units, then with those that have most slow tests."""
    units = [unit_of(item.nodeid) for item in items]
    slow = Counter(unit for unit, item in zip(units, items) if item.get_closest_marker("slow"))
    order = {unit: position for position, unit in enumerate(LONGEST)}
    items.sort(key=lambda item: (order.get(unit := unit_of(item.nodeid), len(order)), -slow[unit]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give every unit to one process. (pytest-xdist 3.8's own loadgroup has no effect under pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    return Units(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was skipped, and why, in the last lines of every run."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ())
    )
    for reason, count in sorted(reasons.items()):
        tests = "test" if count == 1 else "tests"
        terminalreporter.write_line(f"NOT CHECKED: {count} {tests}, because {reason}", yellow=True, bold=True)


def build_tokenizer():
    """Every character of chained arithmetic is a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<eos>", *"0123456789+-*=#!^|", *"abcdefghijklmnopqrstuvw"]
    assert len(symbols) == VOCAB
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


SHAPES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def build_model(family: str, classifier: bool = False, seed: int = 0, **changes: object):
    """A Hugging Face model with random weights, norms and biases included."""
    import transformers

    config_class, settings = {
        "qwen2": (transformers.Qwen2Config, {}),
        "qwen3": (transformers.Qwen3Config, {"head_dim": 10}),
        "llama": (transformers.LlamaConfig, {"head_dim": 6}),
        "mistral": (transformers.MistralConfig, {"head_dim": 6, "sliding_window": None}),
        "seed_oss": (transformers.SeedOssConfig, {"head_dim": 10}),  # no family yet: tests/models/test_new_family.py
        "qwen3_moe": (
            transformers.Qwen3MoeConfig,
            {"head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            | {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
        ),
    }[family]
    settings = SHAPES | {"tie_word_embeddings": False} | settings | changes
    auto = transformers.AutoModelForSequenceClassification if classifier else transformers.AutoModelForCausalLM
    config = config_class(**settings, **({"num_labels": 1} if classifier else {}))
    model = auto.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1 and bool((parameter == 1).all())
        parameter.data = 1 + 0.2 * noise if is_norm else 0.25 * noise
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., torch.nn.Module]:
    """`build_model` above: the model whose checkpoint `make_checkpoint` writes for the same arguments."""
    return build_model


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkpoint("qwen2", classifier=False, **config changes)` -> folder with model and tokenizer."""

    def make(family: str = "qwen2", classifier: bool = False, seed: int = 0, **changes: object) -> Path:
        folder = tmp_path_factory.mktemp(family)
        build_model(family, classifier, seed, **changes).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_experience() -> Callable[..., object]:
    """`make_experience(prompt_lengths, response_lengths, seed=0, samples=2, **fields)` -> Experience with random
    tokens and numbers, old log-probs near those of a uniform policy, groups of `samples` neighbours."""
    from megatron_vapo.data.experience import Experience

    def make(prompts: list[int], responses: list[int], seed: int = 0, samples: int = 2, **fields: torch.Tensor):
        generator = torch.Generator().manual_seed(seed)
        count, total = len(responses), sum(responses)
        outcomes = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
        random = torch.randn(6, total, generator=generator)
        logprobs = 0.5 * random[:2] - torch.tensor(float(VOCAB)).log()
        made = {
            # Never 0, the padding token, whose embedding transformers does not train.
            "tokens": torch.randint(1, VOCAB, (sum(prompts) + total,), generator=generator),
            "prompt_lengths": torch.tensor(prompts),
            "response_lengths": torch.tensor(responses),
            "groups": torch.arange(count) // samples,
            "truncated": torch.zeros(count, dtype=torch.bool),
            "rollout_logprobs": logprobs[0],
            "outcomes": outcomes,
            "rewards": outcomes.clone(),
            "logprobs": logprobs[1],
            "entropy": random[2].abs(),
            "values": random[3],
            "advantages": random[4],
            "returns": random[5],
        }
        return Experience(**(made | fields))

    return make


class InlinePool:
    """Stands for `rewards.pool.Pool`, in this process: faster where processes are not what is tested, and with its
    random generators."""

    broken = ""

    def __init__(self, callees: list, **_: object) -> None:
        self._callees = callees

    def submit(self, callee: int, sample: object) -> Future:
        from megatron_vapo.rewards import worker

        future: Future = Future()
        future.set_result(worker._judged(self._callees[callee], sample))
        return future

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def inline_rewards() -> Iterator[None]:
    """Rewards and environments of a module's tests run in this process."""
    from megatron_vapo.rewards import scorer
    from megatron_vapo.sampling import turns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "Pool", InlinePool)
        patch.setattr(turns, "Pool", InlinePool)
        yield


@pytest.fixture(scope="session")
def world() -> None:
    """torch.distributed with this process alone."""
    from megatron_vapo.models.layout import init_world

    init_world()


@pytest.fixture(scope="module")
def no_world() -> Iterator[None]:
    """No process group: a plan pretends worlds of its own, and a test before may have left a real one."""
    import torch.distributed as dist

    from megatron_vapo.models.layout import init_world

    left = dist.is_initialized()
    if left:
        dist.destroy_process_group()
    yield
    if left:
        init_world()


@pytest.fixture(scope="session")
def tiny_problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt file of 40 problems of one step."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [{"prompt": f"^{d}a+{n}=|", "answer": f"{d}{(d + n) % 10}"} for d in range(10) for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder of real data sets, ../shared/data, is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """Interpreter of the environment that `make sglang-cpu` makes; `make test` sees to it."""
    python = Path(os.environ.get("SGLANG_VENV", REPOSITORY / ".venv-sglang")).absolute() / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no SGLang environment at {python}: make sglang-cpu")
    return str(python)


@pytest.fixture(scope="session")
def forking_sglang_python(sglang_python: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same interpreter, whose servers need less CPU time to start (tests/rollout/forked_sglang.py)."""
    wrapper = tmp_path_factory.mktemp("sglang") / "python"
    script = REPOSITORY / "tests" / "rollout" / "forked_sglang.py"
    wrapper.write_text(
        f'#!/bin/sh\ncase $1 in */server_main.py) set -- "{script}" "$@";; esac\nexec "{sglang_python}" "$@"\n'
    )
    wrapper.chmod(0o755)
    return str(wrapper)


@pytest.fixture
def run_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_tool("prepare_data.py", *arguments)` runs a script of tools/ in this process, which has imported all."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(REPOSITORY / "tools" / name), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.syspath_prepend(REPOSITORY / "tools")  # as Python does for a script
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    return run
