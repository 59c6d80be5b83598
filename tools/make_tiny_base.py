"""Make the tiny base model and its problems, in two minutes on one CPU core (chained arithmetic: five).

Writes, below --out:

    base/           Qwen2ForCausalLM of 153,408 parameters with a character-level tokenizer, in Hugging Face format
    train.jsonl     rows {"prompt", "answer"}, for reinforcement learning
    heldout.jsonl   other problems, for evaluation

The base stands for a pretrained model: it imitates a mixture of careful and careless work (`Mixture` of
`megatron_vapo.data.derivation`, `long_derivation`, `chained_arithmetic` or `products`), and is seldom right, but right
when it works carefully. Errors of derivations, long ones too, are tokens of their own, those of chained arithmetic are
wrong digits, which a critic of this size does not see.
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
    TASKS,
    Checker,
    Task,
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

from megatron_vapo.data import chained_arithmetic, derivation, long_derivation, products
from megatron_vapo.runtime.durable import new_folder, write_text

TRAIN_PROBLEMS = 20_000
HELD_OUT_PROBLEMS = 512
EVALUATED_PROBLEMS = 256
MAX_POSITIONS = 512
IGNORED_LABEL = -100

Example = tuple[list[int], list[int]]
"""Token ids of prompt and response, and as many labels: the same ids, `IGNORED_LABEL` over the prompt."""


Mixture = chained_arithmetic.Mixture | derivation.Mixture | long_derivation.Mixture | products.Mixture
Problem = chained_arithmetic.Problem | derivation.Problem | long_derivation.Problem | products.Problem


@dataclass(frozen=True)
class Stage:
    """Supervised training on demonstrations of one mixture."""

    mixture: Mixture
    steps: int
    learning_rate: float


def derivation_curriculum() -> list[Stage]:
    """Lines in full first, long enough that nearly all are copied rightly: a wrong copy is an error that the critic
    does not see."""
    mixture = derivation.Mixture()
    careful = dataclasses.replace(mixture, p_gap=0.05)
    return [Stage(careful, steps=700, learning_rate=5e-3), Stage(mixture, steps=200, learning_rate=3e-3)]


def long_derivation_curriculum() -> list[Stage]:
    """Nothing between lines first, so that they are soon copied rightly; then the mixture, long enough that nearly all
    are."""
    mixture = long_derivation.Mixture()
    plain = dataclasses.replace(mixture, most_remarks=0)
    return [Stage(plain, steps=600, learning_rate=5e-3), Stage(mixture, steps=1400, learning_rate=5e-3)]


def chained_curriculum(mixture: chained_arithmetic.Mixture) -> list[Stage]:
    """Careful work first, long enough that 99 of 100 careful steps are right: what the base cannot do at all when it
    works carefully, reinforcement finds much later."""
    return [
        Stage(dataclasses.replace(mixture, p_short=0.1, p_sloppy=0.1), steps=1000, learning_rate=3e-3),
        Stage(dataclasses.replace(mixture, p_sloppy=0.25), steps=600, learning_rate=2e-3),
        Stage(mixture, steps=500, learning_rate=1.5e-3),
    ]


def products_curriculum() -> list[Stage]:
    """Calls first, long enough that nearly all numbers are copied rightly into them and out of results."""
    careful = products.Mixture(p_guess=0.05)
    return [Stage(careful, steps=700, learning_rate=5e-3), Stage(products.Mixture(), steps=150, learning_rate=3e-3)]


BATCH_SIZE = 32
INITIALIZER_RANGE = 0.08
"""Standard deviation of initial weights: a model this narrow learns to copy operands sooner than with 0.02."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("artifacts/derivation"))
    parser.add_argument("--task", choices=TASKS, default="derivation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--problems", type=int, default=TRAIN_PROBLEMS, help="rows of train.jsonl; the base has seen more"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing base and its problems")
    shares = parser.add_argument_group("chained arithmetic")
    shares.add_argument("--short", type=float, help="share of responses that only guess")
    shares.add_argument("--sloppy", type=float, help="share of steps done in the head")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)  # of each stage, at most: for tests
    args = parser.parse_args()

    if (args.out / "base").is_dir() and not args.force:
        print(f"{args.out / 'base'} exists; --force makes it anew")
        return
    if not 1 <= args.problems <= TRAIN_PROBLEMS:
        parser.error(f"--problems {args.problems}: from 1 to {TRAIN_PROBLEMS}")
    for name in ("short", "sloppy"):
        share = getattr(args, name)
        if share is not None and (args.task != "chained_arithmetic" or not 0 <= share <= 1):
            parser.error(f"--{name} {share}: a share, from 0 to 1, for --task chained_arithmetic")
    stages = [
        dataclasses.replace(stage, steps=min(stage.steps, args.steps or stage.steps)) for stage in stages_of(args)
    ]
    out = args.out.resolve()
    with new_folder(out / "base", replace=True) as base:  # the last to be there: where it exists, all is complete
        make(TASKS[args.task], out, base, args.seed, stages, args.problems)
    print(f"wrote {out}")


def stages_of(args: argparse.Namespace) -> list[Stage]:
    """Return the stages of the task that the command line names."""
    if args.task == "derivation":
        return derivation_curriculum()
    if args.task == "long_derivation":
        return long_derivation_curriculum()
    if args.task == "products":
        return products_curriculum()
    given = {"p_short": args.short, "p_sloppy": args.sloppy}
    return chained_curriculum(
        chained_arithmetic.Mixture(**{name: share for name, share in given.items() if share is not None})
    )


def make(task: Task, out: Path, base: Path, seed: int, stages: Sequence[Stage], problems: int) -> None:
    """Write the trained model into the folder `base`, then the problems into `out`, `problems` of those that it was
    trained on; print what the model can do."""
    prepare(seed)
    train, held_out = task.problems.make_problem_sets(seed, TRAIN_PROBLEMS, HELD_OUT_PROBLEMS)
    held_out_rows = problem_rows(held_out)

    tokenizer = build_tokenizer(task)
    model = build_model(tokenizer)
    started = time.monotonic()
    train_model(model, tokenizer, task, train, stages, random.Random(seed))
    print(f"trained in {time.monotonic() - started:.0f} s")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_rows(out / "train.jsonl", problem_rows(train[:problems]))
    write_rows(out / "heldout.jsonl", held_out_rows)
    if task.checker is not None:
        print(evaluate(model, tokenizer, task.checker, held_out_rows[:EVALUATED_PROBLEMS]))


def problem_rows(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write a file of JSON lines."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def build_tokenizer(task: Task) -> Qwen2Tokenizer:
    """One token per character of the task's vocabulary, ids in its order.

    For a Qwen2 model `AutoTokenizer` builds this class from the vocabulary and the merges alone, whatever class the
    folder names. Without merges, it splits into characters; it ignores characters that it does not know.
    """
    vocabulary = {symbol: index for index, symbol in enumerate(task.problems.VOCABULARY)}
    return Qwen2Tokenizer(
        vocabulary,
        merges=[],
        unk_token=None,
        bos_token=task.problems.BOS,
        eos_token=task.problems.EOS,
        pad_token=task.problems.PAD,
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
        vocab_size=len(tokenizer),
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
    task: Task,
    problems: Sequence[Problem],
    stages: Sequence[Stage],
    rng: random.Random,
) -> None:
    """Supervised training through all stages, with one optimiser."""
    optimizer = make_optimizer(model)
    done = 0
    with progress("supervised training, step", sum(stage.steps for stage in stages)) as report:
        for stage in stages:
            for step, batch in enumerate(demonstration_batches(stage, tokenizer, task, problems, rng)):
                loss = backward(model, batch)
                optimizer_step(model, optimizer, learning_rate_at(step, stage.steps, stage.learning_rate))
                done += 1
                report(done, f"loss {loss:.3f}")


def demonstration_batches(
    stage: Stage, tokenizer: Qwen2Tokenizer, task: Task, problems: Sequence[Problem], rng: random.Random
) -> Iterator[list[Example]]:
    """One batch of fresh demonstrations for each step of the stage."""
    for _ in range(stage.steps):
        chosen = rng.choices(problems, k=BATCH_SIZE)
        prompts = tokenizer([problem.prompt for problem in chosen])["input_ids"]
        texts = [task.problems.demonstrate(problem, stage.mixture, rng) for problem in chosen]
        responses = tokenizer(texts)["input_ids"]
        labels = [imitated(task, text, response) for text, response in zip(texts, responses)]
        yield [
            (prompt + response, [IGNORED_LABEL] * len(prompt) + label)
            for prompt, response, label in zip(prompts, responses, labels)
        ]


def imitated(task: Task, text: str, tokens: list[int]) -> list[int]:
    """The tokens of a demonstration, one a character, without those that an environment writes."""
    labels = list(tokens)
    for read in task.problems.READ.finditer(text) if hasattr(task.problems, "READ") else ():
        labels[read.start() : read.end()] = [IGNORED_LABEL] * len(read[0])
    return labels


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


def evaluate(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, checker: Checker, rows: Sequence[dict[str, str]]
) -> str:
    """A line on one response at temperature 1 to each row."""
    samples = sample(model.eval(), tokenizer, rows, checker)
    lengths = torch.tensor([len(sample.response) for sample in samples], dtype=torch.float32)
    right = torch.tensor([sample.right for sample in samples], dtype=torch.float32)
    quantiles = lengths.quantile(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])).int().tolist()
    return (
        f"{len(rows)} held-out problems at temperature 1: right {right.mean():.1%}, "
        f"tokens min, 10 %, median, 90 %, max: {', '.join(map(str, quantiles))}"
    )


if __name__ == "__main__":
    main()
