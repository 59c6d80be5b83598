"""The embedded engine against transformers' own generation, teacher forcing and sampling."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vapo.config import SamplingConfig
from megatron_vapo.errors import CheckpointError
from megatron_vapo.rollout import Pause, Request, Response, in_order
from megatron_vapo.rollout.transformers_engine import TransformersEngine, draw
from megatron_vapo.weights.hf_folder import HFFolder

FAMILIES = {
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}
PROMPTS = [(5, 9, 12), (7,), (30, 31, 2, 17, 8, 9), (22, 4)]
GREEDY = SamplingConfig(temperature=0.0)
MAX_TOKENS = 12


def make_engine(
    folder: Path, end_ids: Sequence[int] = (1,), batch_size: int = 64, dtype: torch.dtype = torch.float32
) -> TransformersEngine:
    engine = TransformersEngine(folder, end_ids, 0, batch_size, dtype, torch.device("cpu"))
    source = HFFolder(folder)
    engine.load_weights(((name, source.read(name)) for name in sorted(source.names)), version=0)
    return engine


@pytest.fixture(scope="module")
def folder(make_checkpoint) -> Path:
    return make_checkpoint("qwen2")


@pytest.fixture(scope="module")
def engine(folder) -> TransformersEngine:
    return make_engine(folder)


def requests(samples: int = 1) -> list[Request]:
    return [Request(prompt, seed=100 * i + k) for i, prompt in enumerate(PROMPTS) for k in range(samples)]


def teacher_forced(model: torch.nn.Module, prompt: Sequence[int], response: Tensor, temperature: float) -> Tensor:
    """[l] log-probs of the response's tokens from one forward pass over the whole sequence, without a cache."""
    tokens = torch.cat([torch.tensor(prompt), response])
    with torch.no_grad():
        log_p = (model(tokens[None]).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return log_p.gather(1, response[:, None])[:, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_decoding_and_its_log_probs(make_checkpoint, make_model, name):
    family, changes = FAMILIES[name]
    engine = make_engine(make_checkpoint(family, **changes))
    model = make_model(family, **changes)
    responses = in_order(engine.generate(requests(), GREEDY, MAX_TOKENS))
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS)
        assert response.token_ids.tolist() == expected[0, len(prompt) :].tolist()
    for sampling in (SamplingConfig(), SamplingConfig(temperature=0.6, top_p=0.8), GREEDY):
        for request, response in zip(
            requests(2), in_order(engine.generate(requests(2), sampling, MAX_TOKENS)), strict=True
        ):
            expected = teacher_forced(model, request.prompt_ids, response.token_ids, sampling.temperature or 1.0)
            assert response.logprobs.dtype == torch.float32
            torch.testing.assert_close(response.logprobs, expected, rtol=0, atol=1e-5)


def test_a_response_depends_on_its_request_alone(folder, engine):
    """Not on the other requests, their order, or the number decoded at a time."""
    everything = requests(4)
    alone = {r: in_order(engine.generate([r], SamplingConfig(), MAX_TOKENS))[0] for r in everything}
    shuffled = random.Random(0).sample(everything, len(everything))
    for size, asked in ((64, everything), (64, shuffled), (5, shuffled), (3, everything[3:9])):
        answers = in_order(make_engine(folder, batch_size=size).generate(asked, SamplingConfig(), MAX_TOKENS))
        for request, response in zip(asked, answers, strict=True):
            assert torch.equal(response.token_ids, alone[request].token_ids)
            assert response.finish_reason == alone[request].finish_reason
            torch.testing.assert_close(response.logprobs, alone[request].logprobs, rtol=0, atol=1e-5)
    assert len({tuple(response.token_ids.tolist()) for response in alone.values()}) > len(everything) // 2


def test_seeds_draw_whatever_the_length_limit(engine):
    """A longer limit goes on where a shorter one stopped."""
    short, long = (in_order(engine.generate(requests(), SamplingConfig(), limit)) for limit in (5, 12))
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a.token_ids, b.token_ids[:5])


def ended(response: Response, ends: set[int], limit: int) -> bool:
    """A response stops at its first end token, which it keeps, or at the limit."""
    *before, last = response.token_ids.tolist()
    stops = last in ends
    length_is_right = len(before) + 1 == limit or (stops and len(before) + 1 < limit)
    return not ends & set(before) and length_is_right and response.finish_reason == ("stop" if stops else "length")


def test_responses_end_at_an_end_token_or_the_limit(folder):
    """With a third of the symbols as end tokens, both happen, and some responses are one token."""
    ends = set(range(1, 43, 3))
    engine = make_engine(folder, end_ids=sorted(ends))
    responses = in_order(engine.generate(requests(30), SamplingConfig(), 4))
    assert all(ended(response, ends, 4) for response in responses)
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    assert {len(response.token_ids) for response in responses} == {1, 2, 3, 4}
    assert all(len(response.logprobs) == len(response.token_ids) for response in responses)


def test_progress_counts_every_token(engine):
    counts: list[int] = []
    responses = in_order(engine.generate(requests(10), SamplingConfig(), MAX_TOKENS, counts.append))
    assert sum(counts) == sum(len(response.token_ids) for response in responses)


def test_one_token_at_most(engine):
    responses = in_order(engine.generate(requests(), SamplingConfig(), 1))
    assert [len(response.token_ids) for response in responses] == [1] * len(PROMPTS)


def test_new_weights_answer_under_their_version(folder, make_checkpoint):
    engine, other = make_engine(folder), make_checkpoint("qwen2", seed=1)
    before = in_order(engine.generate(requests(), SamplingConfig(), MAX_TOKENS))
    engine.load_weights(load_file(other / "model.safetensors").items(), version=7)
    after = in_order(engine.generate(requests(), SamplingConfig(), MAX_TOKENS))
    expected = in_order(make_engine(other).generate(requests(), SamplingConfig(), MAX_TOKENS))
    assert {response.weight_version for response in before} == {0}
    assert {response.weight_version for response in after} == {7}
    assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(after, expected, strict=True))
    assert any(not torch.equal(a.token_ids, b.token_ids) for a, b in zip(after, before, strict=True))


def test_loaded_weights_are_copies(folder):
    """The trainer goes on changing the tensors that it handed over."""
    engine = make_engine(folder)
    tensors = load_file(folder / "model.safetensors")
    engine.load_weights(tensors.items(), version=1)
    before = in_order(engine.generate(requests(), SamplingConfig(), MAX_TOKENS))
    for tensor in tensors.values():
        tensor.zero_()
    after = in_order(engine.generate(requests(), SamplingConfig(), MAX_TOKENS))
    assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(after, before, strict=True))


def test_incomplete_and_foreign_weights_are_refused(folder):
    engine = make_engine(folder)
    tensors = load_file(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor made\.up"):
        engine.load_weights((tensors | {"made.up": torch.ones(1)}).items(), version=1)
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"no weights came for model\.norm\.weight"):
        engine.load_weights(tensors.items(), version=1)


def test_bfloat16(folder, make_model):
    engine = make_engine(folder, dtype=torch.bfloat16)
    model = make_model("qwen2").bfloat16().float()
    for request, response in zip(
        requests(), in_order(engine.generate(requests(), SamplingConfig(), MAX_TOKENS)), strict=True
    ):
        expected = teacher_forced(model, request.prompt_ids, response.token_ids, 1.0)
        torch.testing.assert_close(response.logprobs, expected, rtol=0, atol=0.2)


def test_draws_follow_the_distribution():
    """The largest deviation of 43 frequencies in 200,000 draws stays below five standard deviations, and their
    chi-square within what its own mean and spread allow."""
    generator = torch.Generator().manual_seed(0)
    count, vocab = 200_000, 43
    logits = 2 * torch.randn(vocab, generator=generator)
    sampling = SamplingConfig(temperature=0.7)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    drawn, logprobs = draw(logits.expand(count, vocab), uniform, sampling)
    probs = (logits.double() / 0.7).softmax(0)
    torch.testing.assert_close(logprobs.double(), probs.log()[drawn], rtol=0, atol=1e-5)
    expected = probs * count
    observed = torch.bincount(drawn, minlength=vocab)
    likely = expected >= 5
    deviations = (observed - expected)[likely] / expected[likely].sqrt()
    assert deviations.abs().max() < 5
    degrees = int(likely.sum()) - 1
    assert deviations.square().sum() < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.7, 0.95, 1.0])
def test_top_p_draws_from_the_set_that_transformers_keeps(top_p):
    """All of it and nothing else, in proportion to the probabilities; log-probs are those before top-p."""
    from transformers import TopPLogitsWarper

    generator = torch.Generator().manual_seed(1)
    uniform = torch.arange(4096, dtype=torch.float64) / 4096  # even steps: frequencies are right to one step each
    for scale in (0.3, 1.0, 3.0):
        logits = scale * torch.randn(13, generator=generator)
        kept = logits if top_p == 1 else TopPLogitsWarper(top_p)(None, logits[None])[0]
        drawn, logprobs = draw(logits.expand(len(uniform), 13), uniform, SamplingConfig(top_p=top_p))
        frequencies = torch.bincount(drawn, minlength=13) / len(uniform)
        torch.testing.assert_close(frequencies, kept.softmax(0), rtol=0, atol=1.5 / len(uniform))
        assert not frequencies[kept == float("-inf")].any()
        torch.testing.assert_close(logprobs, logits.log_softmax(0)[drawn], rtol=0, atol=1e-6)


def test_tokens_without_probability_are_never_drawn():
    """At both ends of the unit interval too."""
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    uniform = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    drawn, _ = draw(logits.expand(4, 5), uniform, SamplingConfig())
    assert drawn.tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_turns_go_on_after_what_others_wrote(folder: Path, make_model, batch_size: int) -> None:
    """Each turn is what its request alone makes of the tokens before it, with the log-probs of the whole sequence."""
    engine, model = make_engine(folder, end_ids=range(1, 15), batch_size=batch_size), make_model("qwen2")
    asked = dict(enumerate(requests(2)))
    turns: dict[int, list[tuple[Request, Response]]] = {number: [] for number in asked}
    over: Future[None] = Future()
    over.set_result(None)

    def follow(number: int) -> Pause | None:
        request, response = turns[number][-1]
        written = request.written + tuple(response.token_ids.tolist()) + (30, 31)
        asked[number] = Request(request.prompt_ids, request.seed, written)
        goes_on = response.finish_reason == "stop" and len(written) < MAX_TOKENS
        return Pause(over, lambda: asked[number]) if goes_on else None

    for number, response in engine.generate(requests(2), SamplingConfig(), MAX_TOKENS, follow=follow):
        turns[number].append((asked[number], response))
    assert max(map(len, turns.values())) > 2
    for request, response in (turn for of_response in turns.values() for turn in of_response):
        before = request.prompt_ids + request.written
        expected = teacher_forced(model, before, response.token_ids, 1.0)
        torch.testing.assert_close(response.logprobs, expected, rtol=0, atol=1e-5)
        (alone,) = in_order(engine.generate([request], SamplingConfig(), MAX_TOKENS))
        assert torch.equal(alone.token_ids, response.token_ids) and alone.finish_reason == response.finish_reason
