"""The tools that make the tiny models, as processes, with a few training steps. Most are forked from a warm one."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vapo.data.derivation import VOCABULARY, Mixture, demonstrate, make_problem
from tests.ranks import run_world

TOOLS = Path(__file__).parents[2] / "tools"
MAKE_BASE = [sys.executable, str(TOOLS / "make_tiny_base.py")]


pytestmark = pytest.mark.slow


@pytest.fixture
def fork(tmp_path_factory) -> Callable[..., str]:
    """`fork("make_tiny_base.py", *arguments)` -> its output."""
    log = tmp_path_factory.mktemp("logs") / "log"
    return lambda name, *arguments: run_world(1, [TOOLS / name, *map(str, arguments)], log)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What `make_tiny_base.py` writes after 5 steps of each stage."""
    out = tmp_path_factory.mktemp("tiny") / "tiny"
    subprocess.run([*MAKE_BASE, "--out", str(out), "--steps", "5"], check=True)
    return out


@pytest.fixture(scope="module")
def tokenizer(made):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made / "base")


@pytest.fixture(scope="module")
def rows(made) -> dict[str, list[dict[str, str]]]:
    return {
        name: [json.loads(line) for line in (made / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    }


def test_base_loads_and_generates(made, tokenizer, rows):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made / "base")
    assert model.num_parameters() == 153_408
    assert not model.config.tie_word_embeddings
    torch.manual_seed(0)
    prompt = tokenizer(rows["heldout"][0]["prompt"], return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=8)
    assert generated.shape[1] > prompt["input_ids"].shape[1]


def test_a_prompt_has_the_same_ids_whoever_tokenizes_it(tokenizer, rows):
    for prompt in (row["prompt"] for row in rows["heldout"]):
        ids = tokenizer(prompt)["input_ids"]
        assert ids == [VOCABULARY.index(symbol) for symbol in prompt]
        assert ids == tokenizer(prompt, add_special_tokens=False)["input_ids"] == tokenizer.encode(prompt)
        assert ids[0] == tokenizer.bos_token_id


def test_tokenizer_round_trips_demonstrations(tokenizer):
    rng = random.Random(0)
    for _ in range(500):
        problem = make_problem(rng)
        text = problem.prompt + demonstrate(problem, Mixture(), rng)
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text[1:-1]
        assert ids[-1] == tokenizer.eos_token_id


def test_tokenizer_has_no_token_that_the_model_lacks(tokenizer):
    assert tokenizer.get_vocab() == {symbol: index for index, symbol in enumerate(VOCABULARY)}
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("_", "^", "$")


def test_problem_files_are_disjoint_and_answered_rightly(rows):
    prompts = [row["prompt"] for part in rows.values() for row in part]
    assert (len(rows["train"]), len(rows["heldout"])) == (20_000, 512)
    assert len(set(prompts)) == len(prompts)
    for row in rows["heldout"]:
        value, lines = int(row["prompt"][1]), []
        for label, operation in re.findall(r"([a-t])(.)", row["prompt"]):
            result = eval({"+": "{}+1", "-": "{}-1", "*": "{}*3", "~": "9-{}"}[operation].format(value)) % 10
            lines.append(f"{label}{value}{operation}{result}")
            value = result
        assert row["answer"] == "".join(lines)


def test_complete_base_is_left_alone_unless_forced(made, run_tool):
    before = (made / "base" / "model.safetensors").stat().st_ino
    assert "exists" in run_tool("make_tiny_base.py", "--out", made).stdout
    assert (made / "base" / "model.safetensors").stat().st_ino == before


def test_same_seed_makes_the_same_weights_and_force_replaces(made, tmp_path, fork):
    from safetensors.torch import load_file

    out = tmp_path / "again"
    (out / "base").mkdir(parents=True)
    fork("make_tiny_base.py", "--out", out, "--steps", 5, "--force")
    first, second = (load_file(folder / "base" / "model.safetensors") for folder in (made, out))
    assert all(first[name].equal(second[name]) for name in first)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize(
    ("task", "more", "prompt", "answer"),
    [
        ("chained_arithmetic", ("--sloppy", 0.2), r"\^.*=", r"\d\d"),
        ("long_derivation", ("--problems", 100), r"\^\d(\w[-+*~])+=", r"(\w\d[-+*~][0234568BH9])+"),
        ("products", (), r"\^\d+(\*\d+)+=", r"\d+"),
    ],
)
def test_the_bases_of_other_tasks(tmp_path, fork, task, more, prompt, answer):
    fork("make_tiny_base.py", "--task", task, *more, "--out", tmp_path / "tiny", "--steps", 1)
    row = json.loads((tmp_path / "tiny" / "heldout.jsonl").read_text().partition("\n")[0])
    assert re.fullmatch(prompt, row["prompt"]) and re.fullmatch(answer, row["answer"])
    problems = 100 if "--problems" in more else 20_000
    assert len((tmp_path / "tiny" / "train.jsonl").read_text().splitlines()) == problems


def test_a_share_of_the_other_task_is_refused(tmp_path, run_tool):
    done = run_tool("make_tiny_base.py", "--sloppy", 0.2, "--out", tmp_path)
    assert done.returncode == 2 and "for --task chained_arithmetic" in done.stderr


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interruption_leaves_no_half_made_base(tmp_path, kind):
    out = tmp_path / "tiny"
    process = subprocess.Popen(
        [*MAKE_BASE, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Tests that a shell started in its background ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert "step" in process.stdout.readline()
    os.kill(process.pid, kind)
    assert process.wait(timeout=60) != 0
    process.stdout.close()
    left = ["base.part"] if kind == signal.SIGKILL else []  # which the next try removes
    assert [path.name for path in out.iterdir()] == left
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_reward_model_scores_at_the_last_token(made, tokenizer, rows, tmp_path, fork):
    import torch
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "reward_model"
    data = ["--data", made / "train.jsonl", "--samples", 64, "--epochs", 1]
    printed = fork("make_tiny_reward_model.py", made / "base", out, *data)
    assert "AUC" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["reward_model"]

    model = AutoModelForSequenceClassification.from_pretrained(out)
    texts = [row["prompt"] + "a?b?$" for row in rows["heldout"][:8]]
    padded = tokenizer(texts, return_tensors="pt", padding=True)
    together = model(**padded).logits
    alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert together.shape == (8, 1)
    torch.testing.assert_close(together, alone)


def test_reward_model_names_a_missing_base(tmp_path, run_tool):
    failed = run_tool("make_tiny_reward_model.py", tmp_path / "none", tmp_path / "out", "--data", "x")
    assert failed.returncode == 4
    assert str(tmp_path / "none") in failed.stderr
    assert "Traceback" not in failed.stderr
