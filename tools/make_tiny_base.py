"""Make the tiny base model and its problems, in minutes on one CPU core.

Writes, below --out:

    base/           Qwen2ForCausalLM of 153,408 parameters with a character-level tokenizer, in Hugging Face format
    train.jsonl     rows {"prompt", "answer"}, for reinforcement learning
    heldout.jsonl   other problems, for evaluation

The base stands for a pretrained model: it imitates a mixture of guesses, sloppy and careful work
(`megatron_vapo.data.chained_arithmetic.Mixture`), and is seldom right, but right when it works carefully.
"""

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _tiny import (
    MAX_RESPONSE,
    learning_rate_at,
    make_optimizer,
    micro_batches,
    optimizer_step,
    pad,
    prepare,
    progress,
    sample,
)
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from megatron_vapo.data.chained_arithmetic import (
    BOS,
    EOS,
    PAD,
    VOCABULARY,
    Mixture,
    Problem,
    demonstrate,
    make_problem_sets,
)
from megatron_vapo.runtime.durable import new_folder, write_text

TRAIN_PROBLEMS = 20_000
HELD_OUT_PROBLEMS = 512
EVALUATED_PROBLEMS = 256
MAX_POSITIONS = 512
IGNORED_LABEL = -100
GUESS_LENGTH = len("#73$")

Example = tuple[list[int], list[int]]
"""Token ids of prompt and response, and as many labels: the same ids, `IGNORED_LABEL` over the prompt."""


@dataclass(frozen=True)
class Stage:
    """Supervised training on demonstrations of one mixture."""

    mixture: Mixture
    steps: int
    learning_rate: float


def curriculum(mixture: Mixture, most: int | None = None) -> list[Stage]:
    """Careful work first, long enough that 99 of 100 careful steps are right: what the base cannot do at all when it
    works carefully, reinforcement finds much later. A stage takes at most `most` steps."""
    stages = (
        Stage(dataclasses.replace(mixture, p_short=0.1, p_sloppy=0.1), steps=1000, learning_rate=3e-3),
        Stage(dataclasses.replace(mixture, p_sloppy=0.25), steps=600, learning_rate=2e-3),
        Stage(mixture, steps=500, learning_rate=1.5e-3),
    )
    return [dataclasses.replace(stage, steps=min(stage.steps, most or stage.steps)) for stage in stages]


BATCH_SIZE = 32
INITIALIZER_RANGE = 0.08
"""Standard deviation of initial weights: a model this narrow learns to copy operands sooner than with 0.02."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("artifacts/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace an existing base and its problems")
    parser.add_argument("--short", type=float, default=Mixture.p_short, help="share of responses that only guess")
    parser.add_argument("--sloppy", type=float, default=Mixture.p_sloppy, help="share of steps done in the head")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)  # of each stage, at most: for tests
    args = parser.parse_args()

    if (args.out / "base").is_dir() and not args.force:
        print(f"{args.out / 'base'} exists; --force makes it anew")
        return
    for name in ("short", "sloppy"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)}: a share, from 0 to 1")
    stages = curriculum(Mixture(p_short=args.short, p_sloppy=args.sloppy), args.steps)
    out = args.out.resolve()
    with new_folder(out / "base", replace=True) as base:  # the last to be there: where it exists, all is complete
        make(out, base, args.seed, stages)
    print(f"wrote {out}")


def make(out: Path, base: Path, seed: int, stages: Sequence[Stage]) -> None:
    """Write the trained model into the folder `base`, then the problems into `out`; print what the model can do."""
    prepare(seed)
    train, held_out = make_problem_sets(seed, TRAIN_PROBLEMS, HELD_OUT_PROBLEMS)
    held_out_rows = problem_rows(held_out)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    started = time.monotonic()
    train_model(model, tokenizer, train, stages, random.Random(seed))
    print(f"trained in {time.monotonic() - started:.0f} s")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_rows(out / "train.jsonl", problem_rows(train))
    write_rows(out / "heldout.jsonl", held_out_rows)
    print(evaluate(model, tokenizer, held_out_rows[:EVALUATED_PROBLEMS]))


def problem_rows(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write a file of JSON lines."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def build_tokenizer() -> Qwen2Tokenizer:
    """One token per character of `VOCABULARY`, ids in its order.

    For a Qwen2 model `AutoTokenizer` builds this class from the vocabulary and the merges alone, whatever class the
    folder names. Without merges, it splits into characters; it ignores characters that it does not know.
    """
    vocabulary = {symbol: index for index, symbol in enumerate(VOCABULARY)}
    return Qwen2Tokenizer(
        vocabulary,
        merges=[],
        unk_token=None,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
    )


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Random weights from torch's global generator."""
    special_ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=False,
        initializer_range=INITIALIZER_RANGE,
        **special_ids,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, max_new_tokens=MAX_RESPONSE, **special_ids)
    return model


def train_model(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    problems: Sequence[Problem],
    stages: Sequence[Stage],
    rng: random.Random,
) -> None:
    """Supervised training through all stages, with one optimiser."""
    optimizer = make_optimizer(model)
    done = 0
    with progress("supervised training, step", sum(stage.steps for stage in stages)) as report:
        for stage in stages:
            for step, batch in enumerate(demonstration_batches(stage, tokenizer, problems, rng)):
                loss = backward(model, batch)
                optimizer_step(model, optimizer, learning_rate_at(step, stage.steps, stage.learning_rate))
                done += 1
                report(done, f"loss {loss:.3f}")


def demonstration_batches(
    stage: Stage, tokenizer: Qwen2Tokenizer, problems: Sequence[Problem], rng: random.Random
) -> Iterator[list[Example]]:
    """One batch of fresh demonstrations for each step of the stage."""
    for _ in range(stage.steps):
        chosen = rng.choices(problems, k=BATCH_SIZE)
        prompts = tokenizer([problem.prompt for problem in chosen])["input_ids"]
        responses = tokenizer([demonstrate(problem, stage.mixture, rng) for problem in chosen])["input_ids"]
        yield [
            (prompt + response, [IGNORED_LABEL] * len(prompt) + response)
            for prompt, response in zip(prompts, responses)
        ]


def backward(model: Qwen2ForCausalLM, batch: Sequence[Example]) -> float:
    """Accumulate the gradient of the mean cross-entropy over the batch's response tokens; returns that mean."""
    response_tokens = sum(label != IGNORED_LABEL for _, labels in batch for label in labels)
    total = 0.0
    for micro_batch in micro_batches(batch):
        tokens = pad([tokens for tokens, _ in micro_batch], model.config.pad_token_id)
        labels = pad([labels for _, labels in micro_batch], IGNORED_LABEL)
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        (loss / response_tokens).backward()
        total += loss.item()
    return total / response_tokens


def evaluate(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, rows: Sequence[dict[str, str]]) -> str:
    """A line on one response at temperature 1 to each row."""
    samples = sample(model.eval(), tokenizer, rows)
    lengths = torch.tensor([len(sample.response) for sample in samples], dtype=torch.float32)
    right = torch.tensor([sample.right for sample in samples], dtype=torch.float32)
    quantiles = lengths.quantile(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])).int().tolist()
    return (
        f"{len(rows)} held-out problems at temperature 1: right {right.mean():.1%}, "
        f"only a guess {(lengths == GUESS_LENGTH).float().mean():.1%}, "
        f"tokens min, 10 %, median, 90 %, max: {', '.join(map(str, quantiles))}"
    )


if __name__ == "__main__":
    main()
