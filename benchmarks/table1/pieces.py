"""The pieces that the arms of a seed share, each made once: base model and problems, reward model, pretrained critic.

OUT/bases/3/                     of seed 3; tuning seeds have theirs here too
    base/  train.jsonl  heldout.jsonl  reward_model/
OUT/runs/seed_003/
    critic/                      run folder of value pretraining, from the reward model
    vapo/  dapo/  ...            run folders of the arms
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.table1.arms import ARMS, Arm

TOOLS = Path(__file__).resolve().parents[2] / "tools"
VAPO = ARMS[0]
TASK = ("--task", "long_derivation")
PROBLEMS = ("--problems", "1024")
"""A finite set: with one response a prompt a run sees each twice, with four some two thirds of them."""

PLACES = ("seed", "run_dir", "model.path", "data.train", "evaluation.data", "critic.reward_model",
          "value_pretraining.checkpoint")  # fmt: skip
"""What differs between the runs of an arm."""

Command = list[str]


def base_command(folder: Path, seed: int, arguments: tuple[str, ...]) -> Command:
    """Makes base model and problems in `folder`."""
    tool = str(TOOLS / "make_tiny_base.py")
    return [sys.executable, tool, *TASK, *PROBLEMS, "--out", str(folder), "--seed", str(seed), *arguments]


def reward_model_command(folder: Path, seed: int, arguments: tuple[str, ...]) -> Command:
    """Makes the reward model of the base in `folder`."""
    tool, data = str(TOOLS / "make_tiny_reward_model.py"), str(folder / "train.jsonl")
    folders = [str(folder / "base"), str(folder / "reward_model")]
    return [sys.executable, tool, *folders, *TASK, "--data", data, "--seed", str(seed), *arguments]


def critic_arm(arm: Arm) -> Arm | None:
    """The arm whose value pretraining makes this arm's critic: VAPO for all whose critic starts and is trained as
    VAPO's; None where there is no pretrained critic."""
    if not arm.settings.uses_critic or not arm.settings.value_pretraining.enabled:
        return None
    return VAPO if _critic(arm) == _critic(VAPO) else arm


def _critic(arm: Arm) -> tuple[object, ...]:
    """Return what makes one pretrained critic another than the next."""
    critic = arm.settings.critic
    return critic.init, critic.head, critic.frozen


def critic_folder(seed_folder: Path, arm: Arm) -> Path:
    """Run folder of the value pretraining that `critic_arm` names."""
    return seed_folder / ("critic" if arm == VAPO else f"critic_of_{arm.name}")


def overrides(arm: Arm, seed: int, base: Path, run_dir: Path) -> list[str]:
    """Return the overrides that make an arm's recipe one of a seed's runs."""
    places = {
        "seed": seed,
        "run_dir": run_dir,
        "model.path": base / "base",
        "data.train": base / "train.jsonl",
        "evaluation.data": base / "heldout.jsonl",
    }
    if arm.settings.critic.init == "reward_model":
        places["critic.reward_model"] = base / "reward_model"
    return [f"{key}={value}" for key, value in places.items()]
