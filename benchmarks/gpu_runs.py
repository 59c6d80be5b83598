"""Parts of `gpu_check` that are VAPO itself: updates on made-up responses, their memory against the plan, rollouts, and
the same command twice.

They go through recipe, preflight and `Run`, as training does; only a step's order is written out here, because the loop
ends with a checkpoint, which for actor and critic of 1.5B would be 40 GB.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu_machine import NotAvailable, Numbers, Workplace, need_cuda
from benchmarks.gpu_models import QWEN_1_5B, TINY, make_model, make_prompts, responses
from megatron_vapo.checkpoint.run_folder import open_run_folder
from megatron_vapo.commands.doctor import find_sglang
from megatron_vapo.config import Recipe
from megatron_vapo.data.experience import Experience
from megatron_vapo.models.layout import init_world
from megatron_vapo.models.offload import KINDS, NEEDED
from megatron_vapo.observe.metrics import read_metrics
from megatron_vapo.observe.progress import ProgressDisplay
from megatron_vapo.plan.work import forward_flops
from megatron_vapo.recipe.load import ALGORITHMS, load_recipe
from megatron_vapo.recipe.preflight import read_inputs
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.runtime.signals import Interrupt
from megatron_vapo.runtime.watchdog import Watchdog
from megatron_vapo.training.objectives import with_advantages
from megatron_vapo.training.run import Run
from megatron_vapo.weights.architecture import read_architecture

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("actor", "critic")
OFFLOAD = [f"{role}.offload.{kind}=true" for role in ROLES for kind in KINDS]
TRAINING = (Phase.VALUES, Phase.LOGPROBS, Phase.CRITIC_UPDATE, Phase.ACTOR_UPDATE)
PADDING = 0.02
"""Share by which Megatron's buffers may be larger than what is in them."""
PEAK = 0.15
"""Share by which the device's peak may be above the planned one."""


def tiny_updates(work: Workplace) -> Numbers:
    """Two steps of a tiny model in float32 on made-up responses, everything offloaded."""
    made = responses(TINY, count=16, prompt=12, shortest=20, longest=200)
    settings = ["minibatch_size=8", *(f"{role}.micro_batch_tokens=512" for role in ROLES), *OFFLOAD]
    record = _trained(work, "tiny updates", TINY, settings, [made] * 2)[-1]
    return {"tokens/s": int(made.sequence_lengths.sum()) / _training_seconds(record)}


def updates_1_5b(work: Workplace) -> Numbers:
    """Three steps of 64 responses at the shape of Qwen2.5-1.5B in bfloat16, everything offloaded."""
    need_cuda()
    made = responses(QWEN_1_5B, count=64, prompt=256, shortest=512, longest=4096)
    of_roles = ("distributed_optimizer=true", "micro_batch_tokens=8192")
    settings = [
        "minibatch_size=32",
        "model.dtype=bfloat16",
        "actor.logprobs=chunked",
        *(f"{role}.{setting}" for role in ROLES for setting in of_roles),
        *OFFLOAD,
    ]
    record = _trained(work, "updates at 1.5B", QWEN_1_5B, settings, [made] * 3)[-1]
    seconds = _training_seconds(record)
    numbers: Numbers = {"tokens/s": int(made.sequence_lengths.sum()) / seconds, "seconds a step": seconds}
    numbers["peak, GB"] = max(size for name, size in record.items() if name.endswith("/allocated")) / 1e9
    achieved = _model_flops(_model(work, QWEN_1_5B), made) / seconds / 1e12
    numbers["TFLOP/s"] = achieved
    if "matmul peak" in work.found:
        numbers["MFU, of the measured peak"] = achieved / float(work.found["matmul peak"]["TFLOP/s"])
    return numbers


def memory_against_plan(work: Workplace) -> Numbers:
    """Return what the larger of the runs above had in each phase, against `megatron-vapo plan` of its recipe."""
    name = next(name for name in ("updates at 1.5B", "tiny updates") if name in work.found)
    run = _run_folder(work, name)
    command = ["plan", str(run / "recipe.yaml"), "--nodes", "1", "--assume", "gpus_per_node=1", "--json"]
    planned = {use["phase"]: use["parts"] for use in json.loads(_command(command).stdout)["phases"]}
    record = read_metrics(run, "train")[-1]
    ratios: Numbers = {}
    for phase in (phase for phase in NEEDED if phase in planned and phase != Phase.ROLLOUT):  # responses were made up
        parts = planned[phase]
        expected = sum(size for part, size in parts.items() if part.split(" ")[0] in ROLES)
        resident = sum(record[f"memory/{phase}/{kind}"] for kind in KINDS)
        assert expected <= resident <= expected * (1 + PADDING), f"{phase}: {resident:.0f} bytes of models, {expected}"
        if torch.cuda.is_available():
            ratio = record[f"memory/{phase}/allocated"] / (sum(parts.values()) - parts.get("keys and values", 0))
            ratios[f"{phase}, measured / planned"] = ratio
    too_high = [name for name, ratio in ratios.items() if float(ratio) > 1 + PEAK]
    assert not too_high, f"above the plan: {', '.join(f'{name} {ratios[name]:.2f}' for name in too_high)}"
    return {"of": name} | ratios


def rollouts(work: Workplace) -> Numbers:
    """Two steps on what an engine writes: SGLang where there is a GPU and SGLang, else the embedded engine.

    The engine's weights are proven after every sync, which after the first is also after a wake-up.
    """
    cuda, sglang = torch.cuda.is_available(), find_sglang()
    settings = [
        "minibatch_size=16",
        "actor.logprobs=chunked",
        f"model.dtype={'bfloat16' if cuda else 'float32'}",
        f"rollout.max_response_tokens={256 if cuda else 24}",
        "rollout.check_weights_every=1",
        *(f"{role}.distributed_optimizer=true" for role in ROLES),
        *OFFLOAD,
    ]
    if cuda and sglang:
        settings += [
            "rollout.engine=sglang",
            f"rollout.sglang.python={sglang[0]}",
            "rollout.sglang.memory_fraction=0.5",
        ]
    record = _trained(work, "rollouts", QWEN_1_5B if cuda else TINY, settings)[-1]
    return {
        "engine": "SGLang" if cuda and sglang else "embedded",
        "tokens/s": record["response/length_mean"] * 16 / record["seconds/rollout"],
        "log-prob difference to the actor": record["rollout/logprob_difference_mean"],
    }


def separate_placement(work: Workplace) -> Numbers:
    """Two steps with SGLang on a GPU of its own, which gets weights by broadcast."""
    need_cuda()
    sglang = find_sglang()
    if torch.cuda.device_count() < 2 or sglang is None:
        raise NotAvailable("needs two CUDA devices and SGLang")
    settings = [
        "minibatch_size=16",
        "model.dtype=bfloat16",
        "rollout.max_response_tokens=256",
        "rollout.check_weights_every=1",
        "rollout.engine=sglang",
        f"rollout.sglang.python={sglang[0]}",
        "rollout.sglang.placement=separate",
    ]
    record = _trained(work, "separate placement", QWEN_1_5B, settings)[-1]
    return {"log-prob difference to the actor": record["rollout/logprob_difference_mean"]}


def determinism(work: Workplace) -> Numbers:
    """`megatron-vapo train` with deterministic=true twice at a time: the same metrics and the same weights."""
    folders = [work.folder / "determinism" / name for name in ("one", "two")]
    settings = ["deterministic=true", "steps=1", "minibatch_size=8", "rollout.max_response_tokens=24"]
    base = [str(ALGORITHMS / "vapo.yaml"), *_settings(work, TINY), *settings, "name=twice"]
    runs = [_start(["train", *base, f"run_dir={folder}"]) for folder in folders]
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, _last_line(errors)
    exports = [(folder / "export" / "model.safetensors").read_bytes() for folder in folders]
    assert exports[0] == exports[1], "weights differ"
    apart = ("seconds/", "cpu_seconds/", "throughput/", "time", "memory/")
    one, two = ({k: v for k, v in read_metrics(f, "train")[-1].items() if not k.startswith(apart)} for f in folders)
    assert one == two, f"metrics differ: {', '.join(k for k in one if one[k] != two[k])}"
    return {"bytes compared": len(exports[0])}


def _trained(
    work: Workplace, name: str, shape: dict[str, Any], settings: list[str], made: list[Experience] | None = None
) -> list[dict[str, Any]]:
    """Metrics of a few steps, on made-up responses or two on an engine's."""
    steps = len(made) if made else 2
    if made:
        replay = work.folder / name / "made"
        replay.mkdir(parents=True)
        for step, batch in enumerate(made, 1):
            batch.save(replay / f"train_{step:06d}.safetensors")
        longest = int(made[0].response_lengths.max())
        settings = [f"rollout.replay={replay}", f"rollout.max_response_tokens={longest}", *settings]
        settings.append(f"rollout.prompts_per_step={len(made[0]) // 4}")
    run_dir = _run_folder(work, name)
    overrides = [*_settings(work, shape), *settings, f"name={name}", f"run_dir={run_dir}", f"steps={steps}"]
    recipe = load_recipe(ALGORITHMS / "vapo.yaml", overrides)
    with _opened(recipe) as run, run.display.bar("train", total=steps):
        for step in range(1, steps + 1):
            _step(run, step)
    records = read_metrics(run_dir, "train")
    for record in records:
        numbers = [record[f"{role}/{value}"] for role in ROLES for value in ("loss", "grad_norm", "skipped")]
        assert all(map(math.isfinite, numbers)) and not any(record[f"{role}/skipped"] for role in ROLES), numbers
    return records


def _run_folder(work: Workplace, name: str) -> Path:
    return work.folder / name / "run"


def _settings(work: Workplace, shape: dict[str, Any]) -> list[str]:
    """Return the settings that all runs here share."""
    return [
        f"model.path={_model(work, shape)}",
        f"data.train={make_prompts(work.folder / 'prompts.jsonl')}",
        "data.max_prompt_tokens=256",
        "reward.name=benchmarks.gpu_models:half_right",
        "critic.init=actor",
        "value_pretraining.enabled=false",
        "rollout.prompts_per_step=4",
        "rollout.samples_per_prompt=4",
        "rollout.check_weights_every=100",
        "checkpoint.rollouts=false",
    ]


def _model(work: Workplace, shape: dict[str, Any]) -> Path:
    return make_model(work.folder / f"model_{shape['hidden_size']}", shape)


@contextmanager
def _opened(recipe: Recipe) -> Iterator[Run]:
    inputs = read_inputs(recipe)
    init_world()
    open_run_folder(recipe, restart=True)
    with (
        ProgressDisplay(Console(quiet=True), quiet=True) as display,
        Interrupt(recipe.limits) as interrupt,
        Watchdog(recipe.limits, interrupt, recipe.run_dir) as watchdog,
    ):
        run = Run(recipe, inputs, display, interrupt, watchdog)
        try:
            yield run
        finally:
            run.close()
        run.leave_groups()


def _step(run: Run, step: int) -> None:
    """Take one step as `megatron_vapo.training.loop` does."""
    rollout = run.rollout("train", step)
    batch = run.logprobs(run.values(rollout.batch))
    batch = with_advantages(batch, run.recipe.algorithm)
    critic_metrics = run.update_critic(batch, run.recipe.critic.epochs, step)
    batch, actor_metrics = run.update_actor(batch, step)
    run.finish_step("train", step, rollout, batch, critic_metrics | actor_metrics)
    run.sync_weights()


def _training_seconds(record: dict[str, Any]) -> float:
    return sum(record[f"seconds/{phase}"] for phase in TRAINING)


def _model_flops(folder: Path, batch: Experience) -> float:
    """Return the operations of actor and critic, forward once and forward and backward once."""
    actor = read_architecture(folder)
    critic = replace(actor, classifier=True, tied_embeddings=False)
    return sum(4 * n * forward_flops(a, n) for a in (actor, critic) for n in batch.sequence_lengths.tolist())


def _command(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A command of megatron-vapo, which must succeed."""
    process = _start(arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, _last_line(errors)
    return subprocess.CompletedProcess(arguments, 0, output, errors)


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_vapo", *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
