"""The example engine keeps the protocol, and a whole run goes through it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.records import records
from examples.my_engine import UniformEngine
from megatron_vapo.cli import main
from megatron_vapo.config import SamplingConfig
from megatron_vapo.rollout import Request, Response, RolloutEngine, in_order
from megatron_vapo.training import build

VOCABULARY = 43
END = 1


def generate(engine: UniformEngine, requests: list[Request], max_tokens: int = 40) -> list[Response]:
    return in_order(engine.generate(requests, SamplingConfig(), max_tokens))


def test_it_has_every_part_of_the_protocol():
    engine = UniformEngine(VOCABULARY, [END])
    parts = {name for name in dir(RolloutEngine) if not name.startswith("_")} | set(RolloutEngine.__annotations__)
    assert parts <= set(dir(engine))


def test_responses_end_where_they_must():
    engine = UniformEngine(VOCABULARY, [END])
    engine.load_weights([("name", torch.zeros(1))], version=3)
    responses = generate(engine, [Request((5, 6), seed) for seed in range(200)])
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    for r in responses:
        tokens = r.token_ids.tolist()
        assert END not in tokens[:-1] and (tokens[-1] == END) == (r.finish_reason == "stop")
        assert r.finish_reason == "stop" or len(tokens) == 40
        assert r.weight_version == 3
        torch.testing.assert_close(r.logprobs, torch.full((len(tokens),), -math.log(VOCABULARY)))


def test_a_response_that_goes_on_is_the_one_that_was_begun():
    engine = UniformEngine(VOCABULARY, [END])
    seed, whole = next(
        (seed, whole)
        for seed in range(100)
        for whole in generate(engine, [Request((5,), seed)])
        if len(whole.token_ids) > 3
    )
    begun = tuple(whole.token_ids[:3].tolist())
    (rest,) = generate(engine, [Request((5,), seed, written=begun)])
    assert torch.equal(torch.cat([torch.tensor(begun), rest.token_ids]), whole.token_ids)


def test_an_abort_leaves_the_rest_unwritten():
    engine = UniformEngine(VOCABULARY, [END])
    written = []
    for number, response in engine.generate([Request((5,), seed) for seed in range(3)], SamplingConfig(), 40):
        written.append((number, response.finish_reason))
        engine.abort()
    assert written[1:] == [(1, "abort"), (2, "abort")]


@pytest.mark.slow
def test_a_run_trains_on_it(
    make_checkpoint: Callable[..., Path], tiny_problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sampling, reward, critic, actor and weight sync with this engine in the place of the recipe's own, and a loss and
    an advantage of one's own."""
    recipe = {
        "name": "own_engine",
        "run_dir": str(tmp_path / "run"),
        "steps": 1,
        "minibatch_size": 8,
        "model": {"path": str(make_checkpoint("qwen2"))},
        "critic": {"init": "actor"},
        "algorithm": {
            "advantage": "tests.test_testing:temporal_difference",
            "critic": True,
            "loss": "examples.entropy_bonus:entropy_bonus",
            "options": {"coefficient": 0.01},
            "importance": {"mode": "truncate"},
        },
        "value_pretraining": {"max_steps": 1},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 16}
        | {"check_weights_every": 0},  # this engine holds no weights
        "data": {"train": str(tiny_problems)},
        "reward": {"name": "chained_arithmetic"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    engines = []

    def build_engine(*arguments: object) -> UniformEngine:
        engines.append(UniformEngine(VOCABULARY, [END]))
        return engines[-1]

    monkeypatch.setattr(build, "build_engine", build_engine)
    assert main(["train", str(path)]) == 0
    lines = records(tmp_path / "run")
    assert [line["kind"] for line in lines] == ["pretrain", "train"]
    assert all(math.isfinite(line["critic/loss"]) for line in lines)
    assert engines[0].version == 1
    assert lines[1]["actor/importance_mean"] > 0 and lines[1]["actor/kl_k3"] == pytest.approx(0, abs=1e-4)
