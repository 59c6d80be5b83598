"""Make the tiny reward model, from which the tiny critic starts: one or two minutes on one CPU core.

Samples responses from the tiny base, labels them with the checker, and trains `Qwen2ForSequenceClassification` with
one label, initialised from the base, to predict at the last token whether the response is right. The label is 1 for
right, 0 for wrong or cut; the score is its logit. Writes OUT in Hugging Face format, with the tokenizer.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from _tiny import (
    BATCH_SIZE,
    TASKS,
    learning_rate_at,
    make_optimizer,
    micro_batches,
    optimizer_step,
    pad,
    prepare,
    progress,
    sample,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from megatron_vapo.errors import CheckpointError, DataError, UserError
from megatron_vapo.runtime.durable import new_folder

LEARNING_RATE = 1e-3
HELD_OUT_SHARE = 0.2

Example = tuple[list[int], float]
"""Token ids of prompt and response, and 1.0 if the response is right, else 0.0."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder that make_tiny_base.py wrote as base/")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of the same tool")
    tasks = [name for name, task in TASKS.items() if task.checker]
    parser.add_argument("--task", choices=tasks, default="derivation", help="the one that the base was made for")
    parser.add_argument("--samples", type=int, default=10_240, help="responses to train on; a fifth more for the AUC")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace an existing reward model")
    args = parser.parse_args()

    if args.out.is_dir() and not args.force:
        print(f"{args.out} exists; --force makes it anew")
        return
    if not (args.base / "config.json").is_file():
        raise CheckpointError(f"no model at {args.base}: make one with tools/make_tiny_base.py")
    if not args.data.is_file():
        raise DataError(f"no problems at {args.data}: name the train.jsonl that tools/make_tiny_base.py wrote")
    with new_folder(args.out, replace=True) as part:
        make(part, args)
    print(f"wrote {args.out.resolve()}")


def make(out: Path, args: argparse.Namespace) -> None:
    """Write the trained reward model into the folder `out`, and print how well it tells right from wrong."""
    prepare(args.seed)
    rng = random.Random(args.seed)
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    rng.shuffle(rows)
    held_out = int(HELD_OUT_SHARE * args.samples)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    with progress("sampling, responses", args.samples + held_out) as report:
        samples = sample(
            base, tokenizer, list(islice(cycle(rows), args.samples + held_out)), TASKS[args.task].checker, report
        )
    examples = [(sample.prompt + sample.response, float(sample.right)) for sample in samples]

    model = AutoModelForSequenceClassification.from_pretrained(args.base, num_labels=1, dtype=torch.float32)
    train_model(model, examples[held_out:], args.epochs, rng)
    scores, labels = score(model, examples[:held_out])
    print(f"AUC {area_under_curve(scores, labels):.3f} on {held_out} held-out responses, {labels.mean():.1%} right")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_model(model: PreTrainedModel, examples: list[Example], epochs: int, rng: random.Random) -> None:
    """Binary cross-entropy of the score at the last token."""
    optimizer = make_optimizer(model)
    steps = epochs * len(range(0, len(examples), BATCH_SIZE))
    done = 0
    with progress("reward model, step", steps) as report:
        for _ in range(epochs):
            rng.shuffle(examples)
            for start in range(0, len(examples), BATCH_SIZE):
                loss = backward(model, examples[start : start + BATCH_SIZE])
                optimizer_step(model, optimizer, learning_rate_at(done, steps, LEARNING_RATE))
                done += 1
                report(done, f"loss {loss:.3f}")


def backward(model: PreTrainedModel, batch: Sequence[Example]) -> float:
    """Accumulate the gradient of the mean loss over the batch's responses; returns that mean."""
    total = 0.0
    for micro_batch in micro_batches(batch):
        scores, labels = forward(model, micro_batch)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum") / len(batch)
        loss.backward()
        total += loss.item()
    return total


def forward(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (logits) and labels, both `[B]`. The model itself finds the last token that is not padding."""
    tokens = pad([tokens for tokens, _ in examples], model.config.pad_token_id)
    return model(input_ids=tokens).logits[:, 0], torch.tensor([label for _, label in examples])


@torch.inference_mode()
def score(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and labels `[B]` of all examples, in an order of their own."""
    parts = [forward(model.eval(), micro_batch) for micro_batch in micro_batches(examples)]
    scores, labels = zip(*parts)
    return torch.cat(scores), torch.cat(labels)


def area_under_curve(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The chance that a right response scores above a wrong one; a tie counts half."""
    difference = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
