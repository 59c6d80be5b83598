"""The page holds the run's own numbers and text, and nothing of it can leave its place."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vapo.cli import main
from megatron_vapo.commands.view import _when
from megatron_vapo.config import AlgorithmConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.observe.alarms import ALARMS, Raised
from megatron_vapo.training.objectives import CLIPPED_BY, policy_ratios
from megatron_vapo.training.token_records import critic_calibration
from tests.commands.view.conftest import HOSTILE, LONG, ViewedRun, hostile_tokenizer


@pytest.fixture(scope="module")
def page(viewed_run: ViewedRun, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["view", str(viewed_run.folder), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def embedded(page: str) -> dict[str, Any]:
    """What a browser finds in the page's data: the text up to the first end of a script."""
    return json.loads(page.partition('id="data">')[2].partition("</script")[0])


def floats(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())


def of_step(batch: Experience) -> dict[str, torch.Tensor]:
    ratios, clipped = policy_ratios(batch, AlgorithmConfig())
    turns = {} if batch.trained is None else {"trained": batch.trained.float(), "reward": batch.token_rewards}
    return turns | {
        "value": batch.values,
        "advantage": batch.advantages,
        "return": batch.returns,
        "logprob": batch.logprobs,
        "rollout_logprob": batch.rollout_logprobs,
        "entropy": batch.entropy,
        "ratio": ratios,
        "clipped": clipped.float(),
    }


def test_every_number_is_the_runs(embedded: dict[str, Any], viewed_run: ViewedRun) -> None:
    assert [step["step"] for step in embedded["steps"]] == [1, 2] and embedded["open"] == 1
    for step in embedded["steps"]:
        batch = viewed_run.batches[step["step"]]
        expected = of_step(batch)
        assert step["tensors"].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(floats(step["tensors"][name]), tensor), name
        assert [len(row["tokens"]) for row in step["rows"]] == batch.response_lengths.tolist()
        for key, tensor in (("outcome", batch.outcomes), ("reward", batch.rewards), ("group", batch.groups)):
            assert [row[key] for row in step["rows"]] == tensor.tolist()
    assert embedded["clipped_by"] == list(CLIPPED_BY)


def test_the_critics_charts_are_of_all_responses(embedded: dict[str, Any], viewed_run: ViewedRun) -> None:
    """Curves are those of the metrics; there is a calibration where tokens were kept."""
    assert [(step["kind"], step["step"]) for step in embedded["critic"]] == [
        ("pretrain", 1),
        ("train", 1),
        ("train", 2),
    ]
    metrics = [json.loads(line) for line in (viewed_run.folder / "metrics.jsonl").read_text().splitlines()]
    for step, record in zip(embedded["critic"], metrics):
        for name in ("explained_variance_tenth", "value_right_tenth", "value_wrong_tenth"):
            expected = [record.get(f"critic/{name}_{k}", math.nan) for k in range(1, 11)]
            assert floats(step[name]).tolist() == pytest.approx(expected, nan_ok=True)
        if step["kind"] == "train":
            expected = critic_calibration(viewed_run.batches[step["step"]]).reshape(-1)
            assert torch.equal(floats(step["calibration"]).nan_to_num(), expected.nan_to_num())
        else:
            assert step["calibration"] is None


def test_every_text_is_the_models(embedded: dict[str, Any], viewed_run: ViewedRun) -> None:
    tokenizer = hostile_tokenizer()
    for step in embedded["steps"]:
        batch, start = viewed_run.batches[step["step"]], 0
        for row, length in zip(step["rows"], batch.sequence_lengths.tolist()):
            tokens = batch.tokens[start : start + length].tolist()
            start += length
            assert step["prompts"][row["prompt"]] == tokenizer.decode(tokens[:3])
            assert row["tokens"] == [tokenizer.decode([token]) for token in tokens[3:]]
    assert set(HOSTILE) < set(embedded["steps"][1]["rows"][0]["tokens"])
    answers = {row["answer"] for step in embedded["steps"] for row in step["rows"]}
    assert answers == {"", "<b>4</b>"}


def test_no_text_gets_out_of_its_place(page: str) -> None:
    """The page's tags are the template's: two scripts, one style, no image; the policy allows these by their hashes."""
    assert len(re.findall(r"<script\b", page)) == len(re.findall("</script", page)) == 2
    assert "<img" not in page and "<!--" not in page and "viewed </title>" not in page
    style, script = page.partition("<style>")[2].partition("</style>")[0], page.rpartition('"module">')[2][:-1]
    script = script.partition("</script>")[0]
    policy = re.search(r'Policy" content="([^"]*)"', page)[1]
    for kind, source in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    outside = page.partition('id="data">')[0] + page.rpartition('"module">')[2]
    assert re.findall(r"https?://[^\s\"']+", outside) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert not re.search(r"\b(fetch|XMLHttpRequest|innerHTML|eval|import)\b", outside)


def test_alarms_of_the_metrics_are_listed(embedded: dict[str, Any]) -> None:
    (alarm,) = embedded["alarms"]
    assert (alarm["name"], alarm["when"]) == ("flat_values", "since train step 2")
    assert alarm["advice"].startswith("Likely causes: ")


@pytest.mark.parametrize(
    ("until", "until_kind", "shown"),
    [
        (None, "train", "since pretrain step 16"),
        (18, "pretrain", "pretrain steps 16 to 18"),
        (3, "train", "pretrain step 16 to train step 3"),
    ],
)
def test_the_steps_of_an_alarm(until: int | None, until_kind: str, shown: str) -> None:
    assert _when(Raised(ALARMS[0], "pretrain", 16, until, until_kind)) == shown


def test_the_step_that_is_asked_for_opens(viewed_run: ViewedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(viewed_run.folder), "--step", "1"]) == 0
    out = Path(capsys.readouterr().out.strip())
    assert out == viewed_run.folder / "view.html"
    assert '"open": 0' in out.read_text(encoding="utf-8")
    out.unlink()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 2, "nowhere: no run folder"),
        (["RUN", "--step", "9"], 3, "step 9 is not kept, these are: 1, 2"),
        (["EMPTY"], 3, "observe.tokens_mib"),
    ],
)
def test_mistakes(viewed_run: ViewedRun, tmp_path: Path, capsys, arguments, code, words) -> None:
    (tmp_path / "recipe.yaml").write_bytes((viewed_run.folder / "recipe.yaml").read_bytes())
    places = {"RUN": viewed_run.folder, "EMPTY": tmp_path}
    assert main(["view", *(str(places.get(word, word)) for word in arguments)]) == code
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and words in errors


def test_a_long_response_is_among_them(embedded: dict[str, Any]) -> None:
    assert len(embedded["steps"][1]["rows"][0]["tokens"]) == LONG
