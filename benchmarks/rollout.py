"""The cost of rollouts: SGLang beside the embedded engine, the parts of a step's cycle, our client beside SGLang's own.

    python -m benchmarks.rollout [--repeats 5] [--python .venv-sglang/bin/python] [--write docs/benchmarks_rollout.md]

A random Qwen2 of 5M parameters in float32; 64 requests of 32 prompt tokens and 64 new ones, none of which ends early,
32 in flight. Everything is measured turn about, on one server. SGLang's client is `sglang.bench_serving` with the same
lengths, the same concurrency, no streaming, log-probs returned; its own duration is taken.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_vapo.config import RolloutConfig, SamplingConfig, SGLangConfig
from megatron_vapo.rollout import Request, RolloutEngine, in_order
from megatron_vapo.rollout.sglang.engine import SGLangEngine
from megatron_vapo.rollout.transformers_engine import TransformersEngine
from megatron_vapo.runtime import cpu_backend
from megatron_vapo.weights.hf_folder import HFFolder

cpu_backend.install()  # before the first import of Megatron

from megatron_vapo.models.layout import init_world

ROOT = Path(__file__).resolve().parents[1]
REQUESTS, PROMPT_TOKENS, NEW_TOKENS, IN_FLIGHT = 64, 32, 64, 32
VOCAB = 2048


def make_model(folder: Path) -> None:
    """A random model, with a tokenizer of one word per id for SGLang's client."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, max_position_embeddings=512, **sizes, **heads)).save_pretrained(
        folder
    )
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def generate(engine: RolloutEngine) -> None:
    """Prompts that were never seen before, so that no cache helps."""
    prompts = [tuple(random.randrange(2, VOCAB) for _ in range(PROMPT_TOKENS)) for _ in range(REQUESTS)]
    responses = in_order(engine.generate([Request(p, i) for i, p in enumerate(prompts)], SamplingConfig(), NEW_TOKENS))
    if [len(response.token_ids) for response in responses] != [NEW_TOKENS] * REQUESTS:
        raise SystemExit(f"the engine did not write what was asked for: {engine.failure}")


def their_client(python: str, engine: SGLangEngine, folder: Path) -> float:
    """Seconds that SGLang's client takes for the same load."""
    address, out = engine._address, folder / "bench.jsonl"
    out.unlink(missing_ok=True)
    lengths = ["--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(NEW_TOKENS)]
    load = ["--num-prompts", str(REQUESTS), "--max-concurrency", str(IN_FLIGHT), "--random-range-ratio", "1.0"]
    plain = ["--disable-stream", "--disable-tqdm", "--tokenize-prompt", "--return-logprob", "--warmup-requests", "0"]
    sampling = {"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}  # its default is greedy
    body = ["--extra-request-body", json.dumps({"sampling_params": sampling})]
    where = ["--host", "127.0.0.1", "--port", address.url.rpartition(":")[2], "--model", str(folder)]
    what = ["--backend", "sglang", "--dataset-name", "random-ids", "--seed", str(random.randrange(10**6))]
    command = [python, "-m", "sglang.bench_serving", *what, *where, *lengths, *load, *plain, *body]
    subprocess.run(
        [*command, "--output-file", str(out)],
        env=os.environ | {"OPENAI_API_KEY": address.key, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
    )
    result = json.loads(out.read_text())
    if result["completed"] != REQUESTS or result["total_output_tokens"] != REQUESTS * NEW_TOKENS:
        raise SystemExit(f"SGLang's client did other work: {result['completed']}, {result['total_output_tokens']}")
    return result["duration"]


def measure(python: str, repeats: int, folder: Path) -> dict[str, list[float]]:
    init_world()
    settings = RolloutConfig(sglang=SGLangConfig(python=python, update="flattened_bucket", concurrency=IN_FLIGHT))
    make_model(folder)
    cpu = torch.device("cpu")
    embedded = TransformersEngine(folder, (), 0, IN_FLIGHT, torch.float32, cpu)
    served = SGLangEngine(settings, folder, (), torch.float32, cpu, folder / "logs", longest=1024)
    source = HFFolder(folder)

    def load(engine: RolloutEngine, version: int) -> None:
        problem = engine.revive()
        engine.load_weights(((name, source.read(name)) for name in sorted(source.names)), version)
        if problem or engine.failure:
            raise SystemExit(problem or engine.failure)

    seconds: dict[str, list[float]] = {"start": [timed(lambda: load(served, 0))]}
    load(embedded, 0)
    for engine in (embedded, served):
        generate(engine)  # warm
    for version in range(1, repeats + 1):
        parts = {
            "sleep": served.sleep,
            "wake and update": lambda version=version: load(served, version),
            "sglang": lambda: generate(served),
            "embedded": lambda: generate(embedded),
        }
        for name, part in parts.items():
            seconds.setdefault(name, []).append(timed(part))
        seconds.setdefault("sglang's client", []).append(their_client(python, served, folder))
    served.close()
    return seconds


def report(seconds: dict[str, list[float]], repeats: int) -> str:
    tokens = REQUESTS * NEW_TOKENS
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [ours / theirs for ours, theirs in zip(seconds["sglang"], seconds["sglang's client"])]
    rows = "\n".join(
        f"| {name} | {middle[name]:.2f} | {min(values):.2f} to {max(values):.2f} | "
        + (f"{tokens / middle[name]:,.0f} |" if name in ("sglang", "embedded", "sglang's client") else " |")
        for name, values in seconds.items()
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return f"""# What rollouts cost

{__doc__.split("measured turn about")[0].split(chr(10) * 2)[-1].strip()} measured turn about, on one server.
SGLang's client is `sglang.bench_serving` with the same lengths and concurrency, no streaming, log-probs returned.
On CPU a release of memory frees nothing, and kernels are SGLang's torch-native ones: nothing here tells of a GPU.

| part | wall s, median of {repeats} | range | tokens / s |
|---|---|---|---|
{rows}

Our client's time over that of SGLang's own, for the same load on the same server, pair by pair: median
{statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f} (aim: at most 1.05).

2 CPU cores shared by client and server; torch {torch.__version__}; {datetime.date.today()};
commit {commit.stdout.strip()}; `python -m benchmarks.rollout --repeats {repeats}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--python", default=str(ROOT / ".venv-sglang" / "bin" / "python"))
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = report(measure(options.python, options.repeats, Path(folder)), options.repeats)
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
