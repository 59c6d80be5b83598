"""Train, evaluate and look at runs from the command line.

Exit codes: 0 done; 2 recipe or arguments; 3 data; 4 checkpoint; 5 layout; 6 training cannot go on, or an alarm of
alarms.stop; 7 rollout engine; 8 memory, disk or a process that no longer answers; 9 a package missing or of another
version; 10 rewards that fail; 75 stopped by a signal or its time limit, with a checkpoint; 130 Ctrl-C twice; 1 a bug.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vapo import __version__
from megatron_vapo.errors import INTERRUPTED_EXIT_CODE, LayoutError, ProcessError, UserError

if TYPE_CHECKING:
    from megatron_vapo.config import Recipe

_OVERRIDES = (
    "settings that win over the recipe, such as steps=10 or algorithm=grpo (vapo, ppo, vc_ppo, sao, grpo, dapo)"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the `megatron-vapo` command; returns its exit code."""
    options = _parse(arguments)
    warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\.", category=FutureWarning)
    try:
        return options.command(options)
    except UserError as error:
        # Once a node, for a file may be missing on one node only.
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, ProcessError):
            print(f"megatron-vapo: {error}", file=sys.stderr)
        return error.exit_code


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides only where no option stands before them.
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    description, _, exit_codes = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="megatron-vapo", description=description, epilog=exit_codes)
    parser.add_argument("--version", action="version", version=f"megatron-vapo {__version__}")
    commands = parser.add_subparsers(required=True, title="commands")

    for name, command, text in (
        ("train", _train, "run a recipe; a run that is already in its folder goes on"),
        ("pretrain-critic", _pretrain_critic, "only value pretraining; RUN/critic_pretrained is what it leaves"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("recipe", help="YAML recipe")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
        sub.add_argument("--restart", action="store_true", help="delete the run in this folder and start over")
        sub.add_argument("--dry-run", action="store_true", help="check recipe, model and data, then stop")
        sub.set_defaults(command=command)

    text = "held-out accuracy (avg@k, pass@k) of a Hugging Face folder or a run's checkpoint"
    sub = commands.add_parser("evaluate", help=text, description=text)
    sub.add_argument("checkpoint", help="Hugging Face folder, or RUN/checkpoints/step_...")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    sub.add_argument("--recipe", help="recipe with data, reward and sampling; default: that of the checkpoint's run")
    sub.add_argument("--data", help="prompt set; default: the recipe's evaluation.data")
    sub.add_argument("--samples", type=int, help="responses a problem; default: the recipe's evaluation.samples")
    sub.add_argument("--dry-run", action="store_true", help="check recipe, model and data, then stop")
    sub.set_defaults(command=_evaluate)

    text = "whether a recipe fits a cluster, what limits it, how much it moves and how long it takes"
    sub = commands.add_parser("plan", help=text, description=text)
    sub.add_argument("recipe", help="YAML recipe; of the model only config.json is read")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    sub.add_argument("--gpu", choices=("a100-80", "h100-80", "h200-141", "b200-192"), default="h100-80")
    sub.add_argument("--nodes", type=_at_least_one, default=16)
    sub.add_argument("--assume", action="append", default=[], metavar="name=value", help="instead of an assumption")
    sub.add_argument("--json", action="store_true", help="print everything as JSON")
    sub.add_argument("--out", type=_picture, help="picture to write (.png, .pdf, .svg)")
    sub.set_defaults(command=_plan)

    text = "what a recipe can say: each setting with its default, the values it may have, and what it does"
    sub = commands.add_parser("settings", help=text, description=text)
    sub.add_argument("key", nargs="?", default="", help="a setting, or a group such as rollout.sglang; default: all")
    sub.set_defaults(command=_settings)

    text = "draw the curves of one or several runs"
    sub = commands.add_parser("report", help=text, description=text)
    sub.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    sub.add_argument("--out", type=_picture, default="curves.png", help="picture to write (.png, .pdf, .svg)")
    sub.set_defaults(command=_report)

    text = "a run's responses token by token, with values, advantages, log-probs, as one HTML file"
    sub = commands.add_parser("view", help=text, description=text)
    sub.add_argument("run", metavar="RUN", help="run folder")
    sub.add_argument("--step", type=_at_least_one, help="training step to open with; default: the last that is kept")
    sub.add_argument("--out", type=_page, help="HTML file to write; default: RUN/view.html")
    sub.set_defaults(command=_view)

    text = "versions, devices, what works on this machine and what not"
    sub = commands.add_parser("doctor", help=text, description=text)
    sub.set_defaults(command=_doctor)
    return parser


def _picture(text: str) -> Path:
    return _output(text, ".png", ".pdf", ".svg")


def _page(text: str) -> Path:
    return _output(text, ".html")


def _output(text: str, *endings: str) -> Path:
    path = Path(text)
    if path.suffix not in endings or not path.parent.is_dir():
        *others, last = endings
        words = f"{', '.join(others)} or {last}" if others else last
        raise argparse.ArgumentTypeError(f"{text} must end in {words} and lie in a folder that exists")
    return path


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


# Each command imports what it needs, when it needs it: `--help` and a wrong recipe answer at once.


def _train(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from megatron_vapo.commands.train import run_recipe

    return _exit_code(run_recipe(recipe, options.restart, options.dry_run))


def _pretrain_critic(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from megatron_vapo.commands.train import pretrain

    return _exit_code(pretrain(recipe, options.restart, options.dry_run))


def _recipe(options: argparse.Namespace) -> Recipe:
    from megatron_vapo.recipe.load import load_recipe, without_effect
    from megatron_vapo.recipe.validate import doubts

    recipe = load_recipe(options.recipe, options.overrides)
    if os.environ.get("RANK", "0") == "0":
        for sentence in [*without_effect(recipe, options.recipe, options.overrides), *doubts(recipe)]:
            print(f"megatron-vapo: {sentence}", file=sys.stderr)
    return recipe


def _exit_code(finished: bool) -> int:
    return 0 if finished else INTERRUPTED_EXIT_CODE


def _evaluate(options: argparse.Namespace) -> int:
    from megatron_vapo.commands.evaluate import evaluate_checkpoint

    evaluate_checkpoint(
        options.checkpoint, options.recipe, options.overrides, options.data, options.samples, options.dry_run
    )
    return 0


def _plan(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from megatron_vapo.runtime import cpu_backend

    cpu_backend.install()
    from megatron_vapo.plan.command import run_plan

    return 0 if run_plan(recipe, options) else LayoutError.exit_code


def _settings(options: argparse.Namespace) -> int:
    from megatron_vapo.commands.settings import describe

    print(describe(options.key))
    return 0


def _report(options: argparse.Namespace) -> int:
    from megatron_vapo.observe.report import compare_curves

    print(compare_curves([Path(run) for run in options.runs], options.runs, options.out))
    return 0


def _view(options: argparse.Namespace) -> int:
    from megatron_vapo.commands.view import view

    run = Path(options.run)
    print(view(run, options.step, options.out or run / "view.html"))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_vapo.commands.doctor import run_doctor

    return run_doctor(Console())
