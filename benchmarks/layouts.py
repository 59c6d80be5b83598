"""Every parallel layout takes the same VAPO minibatch: one table, against one process and against plain PyTorch.

    python -m benchmarks.layouts [--worlds 1 2 4 8] [--write docs/layouts.md]

Real ranks (gloo) for every layout; critic update, then actor update, twice, in float32 on a fixed batch.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.layout_cases import BINS, CASES, OPTIMIZER, OWN_LOSSES, UPDATES, Case, own_algorithms
from megatron_vapo.runtime import cpu_backend

ROOT = Path(__file__).resolve().parents[1]
LOSS_TOLERANCE = 1e-5
"""Relative, on losses, entropy and gradient norms."""
PARAMETER_TOLERANCE = 1e-4
"""Largest relative difference of any parameter after the updates: |difference| / largest of the tensor."""

BFLOAT16_TOLERANCES = ((0.1, 0.02), (0.25, 0.02))
"""The same for bfloat16, against one process in bfloat16 and against plain PyTorch in float32: 8 bits a number, so the
order of sums shows, and so does the format itself."""

FAMILIES = ("qwen2", "qwen3", "llama", "qwen3_moe", "tied", "wide")
"""wide: each of two ranks has a multiple of 32 rows and columns of every matrix, so that MXFP8's blocks stay whole."""
BATCHES = ("mixed", "no positive", "one positive", "one token", "two responses", "turns")
_SHAPE = {
    "vocab_size": 43,  # divisible by no tensor-parallel size
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class Row:
    """A case's numbers, and how far they are from two references."""

    case: Case
    result: dict
    from_one_process: tuple[float, float]
    """Largest relative difference of losses and norms; of parameters."""
    from_plain: tuple[float, float]

    @property
    def passed(self) -> bool:
        exact = (LOSS_TOLERANCE, PARAMETER_TOLERANCE)
        allowed = (exact, exact) if self.case.dtype == "float32" else BFLOAT16_TOLERANCES
        return all(
            losses <= most_losses and parameters <= most_parameters
            for (losses, parameters), (most_losses, most_parameters) in zip(
                (self.from_one_process, self.from_plain), allowed
            )
        )


References = dict[str, tuple[dict, dict]]
"""For a case alone, what one process and plain PyTorch make of it."""


def run_cases(cases: list[Case], folder: Path, references: References) -> list[Row]:
    """Start real ranks, one launch per world size, and compare every case with both references, which are added."""
    prepare(folder)
    for world in sorted({case.world for case in cases}):
        launch([case for case in cases if case.world == world], world, folder)
    rows = []
    for case in cases:
        key = repr(case.alone)
        if key not in references:
            references[key] = _single_process(case.alone, folder), plain_updates(case, folder)
        result = torch.load(folder / f"result {case.name}.pt", weights_only=True)
        one_process, plain = (compare(result, reference) for reference in references[key])
        rows.append(Row(case, result, one_process, plain))
    return rows


def _single_process(case: Case, folder: Path) -> dict:
    from benchmarks.layout_cases import take_updates

    cpu_backend.install()
    from megatron_vapo.models.layout import init_world

    init_world()
    return take_updates(case, folder)


def prepare(folder: Path) -> None:
    """Random checkpoints of every family and fixed batches."""
    for i, family in enumerate(FAMILIES):
        _model(family, seed=i).save_pretrained(folder / family)
        _model(family, seed=10 + i, labels=1).save_pretrained(folder / f"{family} critic")
    with_bins = Case("", critic=BINS)
    _model(with_bins.family, 20, with_bins.critic_config().head.bins).save_pretrained(folder / with_bins.critic_folder)
    for name in BATCHES:
        torch.save(_batch(name), folder / f"batch {name}.pt")


def launch(cases: list[Case], world: int, folder: Path) -> None:
    """Run cases in `world` processes; raises with the processes' output if one fails."""
    rendezvous = folder / f"rendezvous {world}"
    command = [sys.executable, "-m", "benchmarks.layout_cases", str(rendezvous), str(folder), *[c.name for c in cases]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    logs = [folder / f"log {world} {rank}" for rank in range(world)]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(r)}, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for r, log in enumerate(logs)
    ]
    failed = _first_failure(ranks)
    rendezvous.unlink(missing_ok=True)
    if failed is not None:
        raise RuntimeError(f"rank {failed} of {world} failed:\n{logs[failed].read_text()[-4000:]}")


def _first_failure(ranks: list[subprocess.Popen]) -> int | None:
    """Wait for all; the first rank that fails ends the others."""
    while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
        time.sleep(0.05)
    failed = next((i for i, rank in enumerate(ranks) if rank.poll()), None)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()
    return failed


def plain_updates(case: Case, folder: Path) -> dict:
    """The same updates by `benchmarks.reference`."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    batch = torch.load(folder / f"batch {case.batch}.pt", weights_only=True)
    actor = AutoModelForCausalLM.from_pretrained(folder / case.family, attn_implementation="eager")
    critic = AutoModelForSequenceClassification.from_pretrained(
        folder / case.critic_folder, attn_implementation="eager"
    )
    head = case.critic_config().head
    if case.critic_config().frozen == "attention":
        for name, parameter in critic.named_parameters():
            parameter.requires_grad_("self_attn" not in name)
    with torch.no_grad():
        logprobs, entropy = reference.actor_outputs(actor, batch)
        values = reference.critic_outputs(critic, batch, head)
    steps: dict[str, list] = {"actor": [], "critic": []}
    algorithms = [case.algorithm] * UPDATES + (list(own_algorithms().values()) if case.losses else [])
    optimizer = reference.make_optimizer(critic, OPTIMIZER)
    for step in range(1, UPDATES + 1):
        losses = reference.critic_loss(critic, batch, head)
        steps["critic"].append(reference.update(critic, optimizer, losses, OPTIMIZER, step))
    optimizer = reference.make_optimizer(actor, OPTIMIZER)
    for step, algorithm in enumerate(algorithms, 1):
        losses = reference.actor_loss(actor, batch, algorithm)
        steps["actor"].append(reference.update(actor, optimizer, losses, OPTIMIZER, step))
    return {
        "forward": {
            name: torch.where(torch.cat(reference.trained(batch)), torch.cat(outputs), 0.0)
            for name, outputs in (("values", values), ("logprobs", logprobs), ("entropy", entropy))
        },
        **steps,
        "parameters": _hf_parameters("actor", actor) | _hf_parameters("critic", critic),
    }


def _hf_parameters(role: str, model: torch.nn.Module) -> dict[str, Tensor]:
    """By their names in a checkpoint, which transformers 5 holds fused for experts."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        from megatron_vapo.weights.hf_folder import HFFolder

        saved = HFFolder(folder)
        return {f"{role} {name}": saved.read(name) for name in saved.names}


def compare(result: dict, expected: dict) -> tuple[float, float]:
    """Largest relative difference of losses, entropy and norms (and forward outputs); of parameters."""
    scalars = [
        abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-3)
        for role in ("critic", "actor")
        for ours, theirs in zip(result[role], expected[role], strict=True)
        for name in theirs
        if name in ours and name not in ("learning_rate", "skipped") and not name.startswith(("clip", "kl"))
    ]
    forward = [_relative(result["forward"][n], expected["forward"][n]) for n in expected["forward"]]
    ours, theirs = result["parameters"], expected["parameters"]
    if ours.keys() != theirs.keys():
        raise AssertionError(f"parameters differ: {ours.keys() ^ theirs.keys()}")
    return max(scalars + forward), max(_relative(ours[name], theirs[name]) for name in theirs)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3))


def _model(family: str, seed: int, labels: int = 0) -> torch.nn.Module:
    import transformers

    config_class, extra = {
        "qwen2": (transformers.Qwen2Config, {}),
        "tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
        "wide": (
            transformers.Qwen2Config,
            {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64},
        ),
        "qwen3": (transformers.Qwen3Config, {"head_dim": 10}),
        "llama": (
            transformers.LlamaConfig,
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
        ),
        "qwen3_moe": (
            transformers.Qwen3MoeConfig,
            {"head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
            | {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
        ),
    }[family]
    settings = {"tie_word_embeddings": False} | _SHAPE | extra | ({"num_labels": labels} if labels else {})
    auto = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModelForCausalLM
    model = auto.from_config(config_class(**settings), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1 and bool((parameter == 1).all())
        parameter.data = 1 + 0.1 * noise if is_norm else 0.15 * noise
    return model


def _batch(name: str) -> dict[str, Tensor]:
    """Responses of 1 to 60 tokens with made-up advantages, targets and old log-probs, far enough to be clipped.

    Of those of several turns the policy wrote runs of tokens, of some neither the first token nor the last.
    """
    generator = torch.Generator().manual_seed(BATCHES.index(name))

    def integers(low: int, high: int, n: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    count = 2 if name == "two responses" else 14
    prompts, responses = integers(2, 9, count), integers(1, 60, count)
    if name == "one token":
        responses[::2] = 1
    total = int(responses.sum())
    outcomes = torch.where(torch.rand(count, generator=generator) < 0.4, 1.0, -1.0)
    if name in ("no positive", "one positive"):
        outcomes = torch.full((count,), -1.0)
    if name == "one positive":
        outcomes[3] = 1.0
    uniform = -torch.log(torch.tensor(float(_SHAPE["vocab_size"])))
    normal = torch.randn(4, total, generator=generator)
    turns: dict[str, Tensor] = {}
    if name == "turns":
        whose = integers(0, 2, total).bool().repeat_interleave(integers(1, 10, total))[:total]
        whose[responses.cumsum(0) - (responses + 1) // 2] = True
        turns = {"trained": whose}
    return turns | {
        "tokens": integers(0, _SHAPE["vocab_size"], int(prompts.sum()) + total),
        "prompt_lengths": prompts,
        "response_lengths": responses,
        "groups": torch.arange(count) // 2,
        "truncated": torch.full((count,), name == "no positive"),
        "rollout_logprobs": uniform + normal[0],
        "outcomes": outcomes,
        "rewards": outcomes,
        "logprobs": uniform + 1.5 * normal[0],
        "values": 0.5 * normal[1],
        "advantages": normal[2],
        "returns": normal[3],
    }


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| layout | ranks | model | batch | policy loss | value loss | LM loss | entropy "
        "| gradient norm (actor, critic) | vs one process: losses, parameters "
        "| vs plain PyTorch: losses, parameters | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        actor, critic = row.result["actor"][UPDATES - 1], row.result["critic"][-1]
        numbers = [actor["policy_loss"], critic["loss"], actor["lm_loss"], actor["entropy"]]
        cells = [
            row.case.name + (", every loss" if row.case.losses else ""),
            str(row.case.world),
            row.case.family,
            row.case.batch,
        ]
        cells += [f"{number:.6f}" for number in numbers]
        cells += [f"{actor['grad_norm']:.5f}, {critic['grad_norm']:.5f}"]
        cells += [f"{a:.1e}, {b:.1e}" for a, b in (row.from_one_process, row.from_plain)]
        lines.append("| " + " | ".join([*cells, "ok" if row.passed else "**differs**"]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4, 8], help="world sizes to run")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--write", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args()
    cases = [c for c in CASES if c.world in options.worlds and (not options.only or options.only in c.name)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = run_cases(cases, Path(folder), {})
    agree = f"{sum(row.passed for row in rows)} of {len(rows)} agree, {time.monotonic() - started:.0f} s"
    print(table(rows))
    print(agree)
    if options.write:
        options.write.write_text(document(rows, agree), encoding="utf-8")
    return 0 if all(row.passed for row in rows) else 1


def document(rows: list[Row], agree: str) -> str:
    """The table with what it compares, where and when."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return f"""# Every layout takes the same training step

One VAPO minibatch (forward, {UPDATES} critic updates, {UPDATES} actor updates) on a fixed batch in float32, by real
processes over gloo on CPU, for every layout below; numbers are those of the last update. Rows with "every
loss" take an actor update more with each of the examples' losses ([extend.md](extend.md)):
{", ".join(OWN_LOSSES)}. Compared with one process, and with a plain PyTorch + transformers implementation that
shares no code with the package (`benchmarks/reference.py`).
In a batch of turns the policy wrote a part of the response tokens, and the others are context. A critic with bins has
the HL-Gauss head; one whose attention is frozen trains all its other parameters.
Required: {LOSS_TOLERANCE:.0e} relative on losses, entropy and gradient norm, {PARAMETER_TOLERANCE:.0e} on parameters
(largest difference over the tensor's largest number); for bfloat16 with float32 main parameters 0.1 and 0.02
against one process in bfloat16.

Context parallelism is proven with this project's all-gather attention; Transformer Engine's, and everything else that
only a GPU runs, is not verified by this table.

{table(rows)}

{agree}; {os.cpu_count()} CPU cores; torch {torch.__version__}, megatron-core {version("megatron-core")};
{datetime.date.today()}; commit {commit}; `python -m benchmarks.layouts --write docs/layouts.md`.
"""


if __name__ == "__main__":
    sys.exit(main())
