"""The faults that a run survives: kill -9 in every phase, damaged checkpoints, full disks, a second run, clock jumps.

    python -m benchmarks.faults --folder FOLDER [--base FOLDER] [--kills 24 12 30] [--write docs/reliability.md]

1. For each kind of run a small one of recipes/tiny.yaml goes to its end: the reference.
2. Other runs of the same recipe are killed (all ranks, SIGKILL) at a random moment of a phase, started again, killed
   again ... until each phase had its share. Each run that gets to its end is compared with the reference, bit by bit.
3. Every kind of file of a checkpoint is truncated, changed in one bit and deleted.
4. The rest of the table, one by one.

What was found is kept in FOLDER/findings.json: started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.records import records, timeless
from megatron_vapo.config import ActorConfig, CheckpointConfig
from megatron_vapo.data.position import SamplingPosition
from megatron_vapo.errors import CheckpointError
from megatron_vapo.runtime import cpu_backend
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.weights.architecture import read_architecture

cpu_backend.install()  # before the first import of Megatron

from megatron_vapo.checkpoint.checkpoints import Checkpoints, checkpoints
from megatron_vapo.checkpoint.snapshot import RunState, Snapshot
from megatron_vapo.models.layout import ParallelLayout, init_world
from megatron_vapo.models.roles import Actor
from megatron_vapo.runtime.verification import refuse_damaged

SETTINGS = ["minibatch_size=8", "epochs=2", "steps=8", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4",
            "rollout.max_response_tokens=64", "value_pretraining.max_steps=2",
            "value_pretraining.target_explained_variance=1.0", "evaluation.problems=16", "evaluation.every=2",
            "evaluation.samples=2", "actor.optimizer.warmup_steps=20", "checkpoint.every=1",
            "checkpoint.async_save=true", "observe.tensorboard=false"]  # fmt: skip
PHASES = (Phase.ROLLOUT, Phase.VALUES, Phase.LOGPROBS, Phase.CRITIC_UPDATE, Phase.ACTOR_UPDATE, Phase.WEIGHT_SYNC,
          Phase.CHECKPOINT, "write", Phase.EVALUATION)  # fmt: skip
"""`write` is a step that trains while the checkpoint before it is still being written."""
AHEAD = ("beside", "wait", "store", "take up", "queue", "forget")
"""What there is besides where rollouts run ahead; benchmarks.faults_rank says when."""


class Kind(NamedTuple):
    """A kind of run that is killed. Its name stands in those of its folders, its title above the table's column; its
    switches are of benchmarks.faults_rank."""

    name: str
    title: str
    world: int
    overrides: list[str]
    switches: tuple[str, ...] = ()
    phases: tuple[str, ...] = PHASES


KINDS = (
    Kind("2", "2 ranks", 2, ["critic.distributed_optimizer=true"]),
    Kind(
        "4",
        "4 ranks",
        4,
        ["actor.tensor_parallel=2", "critic.pipeline_parallel=2", "critic.first_stage_layers=2"],
    ),
    Kind(
        "ahead",
        "2 ranks, `rollout.lag=1`",
        2,
        ["critic.distributed_optimizer=true", "rollout.lag=1"],
        ("ROLLOUTS_BESIDE",),
        (*PHASES, *AHEAD),
    ),
)


@dataclass
class Findings:
    """The observations, for the document."""

    kills: Counter[str] = field(default_factory=Counter)
    lost_steps: list[int] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    """Runs that were compared with their reference."""
    resume_s: list[float] = field(default_factory=list)
    damage: dict[str, Counter[str]] = field(default_factory=dict)
    """By reference run."""
    lines: dict[str, list[str]] = field(default_factory=dict)
    """Rows of the table, by what made them."""
    numbers: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def load(folder: Path) -> Findings:
        path = folder / "findings.json"
        found = Findings(**json.loads(path.read_text())) if path.exists() else Findings()
        found.kills = Counter(found.kills)
        return found

    def save(self, folder: Path) -> None:
        (folder / "findings.json").write_text(json.dumps(vars(self), indent=1) + "\n")


class Ranks:
    """A run on several ranks, without a launcher that could help it."""

    def __init__(self, world: int, run_dir: Path, overrides: list[str], **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.run_dir, self.began = run_dir, time.monotonic()
        shared = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "benchmarks.faults_rank", "train", "recipes/tiny.yaml", f"run_dir={run_dir}"]
        self.processes = [
            subprocess.Popen(
                [*command, *SETTINGS, *overrides],
                env=shared | environment | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)},
                stdout=subprocess.PIPE if r == 0 else subprocess.DEVNULL,
                stderr=(run_dir.parent / f"{run_dir.name}.{r}.log").open("ab"),
                text=True,
            )
            for r in range(world)
        ]

    def said(self) -> Iterator[str]:
        """Yield what rank 0 announces, until it ends."""
        for line in self.processes[0].stdout:
            if line.startswith("@"):
                yield line[1:].strip()

    def kill(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> list[int]:
        for process in self.processes:
            if process.stdout:
                process.stdout.read()
        return [process.wait(timeout=300) for process in self.processes]


def run_to_the_end(ranks: Ranks) -> str:
    """Returns the last thing it said."""
    said = list(ranks.said())
    codes = ranks.wait()
    if any(codes):
        raise SystemExit(f"{ranks.run_dir}: exit codes {codes}; see {ranks.run_dir}.0.log")
    return said[-1]


def kill_runs(kind: Kind, base: list[str], folder: Path, kills: int, dice: random.Random, found: Findings) -> None:
    """Runs that die `kills` times in all, spread over the phases; the last one of them goes to its end too."""
    reference = folder / f"reference_{kind.name}"
    if not (reference / "summary.json").exists():
        run_to_the_end(ranks(kind, reference, base))
    wanted = Counter(in_kind(kind.phases[i % len(kind.phases)], kind) for i in range(kills))
    plan = [name.partition(" (")[0] for name in (wanted - found.kills).elements()]
    dice.shuffle(plan)
    while plan:
        number = sum(name.startswith(f"killed_{kind.name}_") for name in found.finished) + 1
        run_dir = folder / f"killed_{kind.name}_{number}"
        finished = False
        while not finished:
            finished = start_and_kill(ranks(kind, run_dir, base), kind, plan, dice, found)
            found.save(folder)
        differences = compare(run_dir, reference)
        if differences:
            raise SystemExit(f"{run_dir} differs from {reference}: {differences}")
        found.finished.append(run_dir.name)
        found.save(folder)
        print(f"{run_dir.name} is bitwise {reference.name}", flush=True)


def ranks(kind: Kind, run_dir: Path, base: list[str]) -> Ranks:
    """Start a run."""
    return Ranks(kind.world, run_dir, [*base, *kind.overrides], **dict.fromkeys(kind.switches, "1"))


def start_and_kill(run: Ranks, kind: Kind, plan: list[str], dice: random.Random, found: Findings) -> bool:
    """Kill the run in the next phase of the plan that it can come to, entered for the n-th time; True if it ended
    before."""
    target = next((phase for phase in reversed(plan) if comes_to(phase, run.run_dir)), "values" if plan else None)
    left = 1 if target in RESUMED else dice.randint(1, 3)
    steps_before = steps_done(run.run_dir)
    values = 0
    for said in run.said():
        name = said.removeprefix("phase ")
        values += name == "values"
        if name == "values" and values == 2 and steps_before:
            found.resume_s.append(time.monotonic() - run.began)
        left -= name == target
        if name == target and left == 0:
            time.sleep(dice.uniform(0, 0.05))
            steps = steps_done(run.run_dir)
            run.kill()
            found.kills[in_kind(target, kind)] += 1
            found.lost_steps.append(steps - checkpointed(run.run_dir))
            if target in plan:
                plan.remove(target)
            return False
    codes = run.wait()
    if any(codes):
        raise SystemExit(f"{run.run_dir}: exit codes {codes}; see {run.run_dir}.0.log")
    return True


RESUMED = {"queue": "checkpoints/latest/ahead", "take up": "kept_rollouts/train_*"}
"""Phases of runs that resume, once each, and what such a run finds then."""


def comes_to(phase: str, run_dir: Path) -> bool:
    return phase not in RESUMED or any(run_dir.glob(RESUMED[phase]))


def in_kind(phase: str, kind: Kind) -> str:
    return f"{phase} ({kind.title})"


def steps_done(run_dir: Path) -> int:
    """Training steps in the record."""
    return len(records(run_dir, "train"))


def checkpointed(run_dir: Path) -> int:
    found = sorted((run_dir / "checkpoints").glob("step_*[0-9]"))
    return int(found[-1].name.removeprefix("step_")) if found else 0


def compare(run_dir: Path, reference: Path) -> list[str]:
    """Return what differs: metrics, sampled responses, tensors, optimizer states, generators, progress, export."""
    differing = [] if timeless(run_dir) == timeless(reference) else ["metrics"]
    newest = reference / "checkpoints" / "latest"
    files = [newest / "state.json", newest / "sampling.pt", *newest.glob("*/*.distcp"), *reference.rglob("samples/*")]
    files.append(reference / "export" / "model.safetensors")
    for path in files:
        ours = run_dir / path.relative_to(reference)
        if not ours.is_file() or ours.read_bytes() != path.read_bytes():
            differing.append(str(path.relative_to(reference)))
    return differing


# Damage.


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def damage_everything(run_dir: Path, found: Findings) -> None:
    """Every file of the last checkpoint, harmed in three ways, must be refused and named; of the last with a rollout
    that waits for its step where there is one."""
    counts: Counter[str] = Counter()
    queues = sorted(run_dir.glob("checkpoints/step_*/ahead"))
    checkpoint = queues[-1].parent if queues else (run_dir / "checkpoints" / "latest").resolve()
    refuse_damaged(checkpoint)
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for harm in (truncate, flip, Path.unlink):
            harm(path)
            try:
                refuse_damaged(checkpoint)
            except CheckpointError as error:
                # A manifest whose entry has changed blames the file of that entry.
                if str(path) not in str(error) and path.name != "manifest.json":
                    raise SystemExit(f"{path} was harmed, the message is: {error}") from error
            else:
                raise SystemExit(f"{harm.__name__} of {path} was not noticed")
            path.write_bytes(content)
            counts[f"{path.suffix or path.name} {harm.__name__}"] += 1
    refuse_damaged(checkpoint)
    found.damage[run_dir.name] = counts


# The rest of the table.


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(base: list[str], folder: Path) -> Iterator[str]:
    if os.geteuid() != 0:
        yield "| disk full during a save | skipped: mounting a small disk needs root | |"
        return
    for policy, code in (("stop", 8), ("continue", 0)):
        with small_disk(folder / f"disk_{policy}", 22) as disk:
            settings = ["checkpoint.keep=99", f"checkpoint.failed_save={policy}", "value_pretraining.enabled=false"]
            run = Ranks(1, disk / "run", [*base, *settings])
            run.processes[0].stdout.read()
            log = Path(f"{disk / 'run'}.0.log").read_text()
            codes = run.wait()
            saved = checkpoints(disk / "run" / "checkpoints")
            for checkpoint in saved:
                refuse_damaged(checkpoint)
            if codes != [code] or not saved:
                raise SystemExit(f"full disk, {policy}: exit code {codes}, {len(saved)} checkpoints; {log[-2000:]}")
            yield (
                f"| disk full during a save, `failed_save={policy}` | exit code {codes[0]}; {len(saved)} checkpoints "
                f"of before, all whole; {steps_done(disk / 'run')} of 8 steps | 1 |"
            )


def two_runs(base: list[str], folder: Path) -> Iterator[str]:
    first = Ranks(2, folder / "shared", base)
    for said in first.said():
        if said == "phase rollout":
            break
    second = Ranks(1, folder / "shared", base)
    second.processes[0].stdout.read()
    codes = second.wait()
    first.kill()
    log = (folder / "shared.0.log").read_text()
    if codes != [2] or "in use by another run" not in log:
        raise SystemExit(f"two runs in one folder: exit code {codes}; {log[-2000:]}")
    yield "| two runs in one folder | the second is refused, exit code 2, and the holder named | 1 |"


def clock_jumps(base: list[str], folder: Path) -> Iterator[str]:
    run_to_the_end(Ranks(2, folder / "jumps", [*base, *KINDS[0].overrides], CLOCK_JUMPS="1"))
    differences = compare(folder / "jumps", folder / "reference_2")
    if differences:
        raise SystemExit(f"clock jumps change {differences}")
    yield "| wall clock that jumps by up to a day at every reading | bitwise the reference | 1 |"


# Numbers.


def saving_seconds(folder: Path) -> dict[str, float]:
    """Median seconds that training waits for a checkpoint of 26 million parameters with their optimizer states."""
    tiny = read_architecture(folder / "reference_2" / "export")
    large = replace(tiny, hidden=512, layers=8, heads=8, kv_heads=8, head_dim=64, ffn=1536, vocab=8192)
    actor = Actor(ActorConfig(), large, torch.float32, ParallelLayout(ActorConfig(), 0))
    seconds: dict[str, list[float]] = {"sync": [], "async": [], "async until complete": []}
    for kind in ("sync", "async"):
        settings = CheckpointConfig(async_save=kind == "async", keep=1)
        saved = Checkpoints(folder / "saving", settings, {"actor": actor}, "", "{}", lambda text: None)
        for step in range(5):
            began = time.perf_counter()
            state = RunState(pretraining_done=True, steps=step + (10 if kind == "async" else 0))
            saved.save(Snapshot(state, SamplingPosition({}, []), {}))
            seconds[kind].append(time.perf_counter() - began)
            saved.settle(wait=True)
            if kind == "async":
                seconds["async until complete"].append(time.perf_counter() - began)
    size = sum(p.stat().st_size for p in (folder / "saving" / "latest").rglob("*") if p.is_file())
    return {name: statistics.median(values) for name, values in seconds.items()} | {"bytes": float(size)}


def bookkeeping(base: list[str], folder: Path) -> dict[str, float]:
    """Seconds of bookkeeping a step, and its share, in steps of the size that recipes/tiny.yaml has."""
    sizes = ["minibatch_size=32", "rollout.prompts_per_step=16", "rollout.samples_per_prompt=16", "epochs=1", "steps=4",
             "rollout.max_response_tokens=200", "value_pretraining.enabled=false", "checkpoint.every=0"]  # fmt: skip
    said = run_to_the_end(Ranks(1, folder / "bookkeeping", [*base, *sizes]))
    spent = float(said.split()[1])
    rows = records(folder / "bookkeeping", "train")
    return {"bookkeeping": spent / 4, "bookkeeping share": spent / sum(row["seconds/step"] for row in rows)}


def kills_table(found: Findings) -> str:
    """Return how often a run of each kind was killed in each phase, in Markdown; `-` where it has no such phase."""
    lines = [f"| killed in | {' | '.join(kind.title for kind in KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for phase in (*PHASES, *AHEAD):
        counts = [str(found.kills[in_kind(phase, kind)]) if phase in kind.phases else "-" for kind in KINDS]
        lines.append(f"| {phase} | {' | '.join(counts)} |")
    return "\n".join(lines)


def document(found: Findings) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    damage = sum((Counter(counts) for counts in found.damage.values()), Counter())
    numbers = found.numbers
    return (
        (Path(__file__).parent / "faults_document.md")
        .read_text()
        .format(
            machine=f"{os.cpu_count()} cores, {platform.machine()}, shared (load {os.getloadavg()[2]:.0f})",
            commit=commit,
            date=time.strftime("%Y-%m-%d"),
            kills=found.kills.total(),
            runs=len(found.finished),
            table=kills_table(found),
            lost_kills=len(found.lost_steps),
            lost=max(found.lost_steps),
            mean_lost=statistics.mean(found.lost_steps),
            damage="\n".join(f"| {name} | {count} | {count} |" for name, count in sorted(damage.items())),
            harmed=damage.total(),
            harmed_runs="; ".join(kind.title for kind in KINDS),
            rest="\n".join(line for lines in found.lines.values() for line in lines),
            mib=numbers["bytes"] / 2**20,
            sync=numbers["sync"],
            asynchronous=numbers["async"],
            complete=numbers["async until complete"],
            resume=statistics.median(found.resume_s),
            bookkeeping=numbers["bookkeeping"] * 1e3,
            share=numbers["bookkeeping share"],
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--base", type=Path, default=Path("artifacts/derivation"), help="what tools/make_tiny_base.py made"
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the runs and findings.json")
    parser.add_argument("--kills", type=int, nargs=3, default=(24, 12, 30), metavar="N", help="of each kind of run")
    parser.add_argument("--kills-only", action="store_true", help="leave out the rest; print the table of kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="document to write")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    init_world()  # of this process alone, to look at checkpoints
    found, dice = Findings.load(folder), random.Random(options.seed)
    base = [f"model.path={options.base / 'base'}", f"data.train={options.base / 'train.jsonl'}",
            f"evaluation.data={options.base / 'heldout.jsonl'}"]  # fmt: skip
    for kind, kills in zip(KINDS, options.kills, strict=True):
        if kills:
            kill_runs(kind, base, folder, kills, dice, found)
    if options.kills_only:
        print(kills_table(found))
        return
    for part in (full_disk, two_runs, clock_jumps):
        if part.__name__ not in found.lines:
            print(part.__name__, flush=True)
            found.lines[part.__name__] = list(part(base, folder))
            found.save(folder)
    if not found.numbers:
        found.numbers = saving_seconds(folder) | bookkeeping(base, folder)
        found.save(folder)
    for kind in KINDS:
        damage_everything(folder / f"reference_{kind.name}", found)
    text = document(found)
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
