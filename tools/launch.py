#!/usr/bin/env python
"""Train a recipe through NeMo-Run, on this machine or on a Slurm cluster, from a login node or from afar.

    python tools/launch.py recipes/tiny.yaml --executor local --processes 2 steps=10
    python tools/launch.py recipes/vapo_32b.yaml --executor slurm --nodes 16 --account A --partition P --dry-run
    python tools/launch.py recipes/vapo_32b.yaml --executor slurm --host login.example.org \\
        --job-dir /scratch/me/jobs --repository /scratch/me/megatron_vapo

Needs `pip install "nemo-run==0.11.1" "leptonai>=0.26.6,<0.47" omegaconf` (the extra `launch`), best in an environment
of its own: it brings about 110 packages and no torch. All settings stay in the recipe. Slurm jobs are submitted and
left alone; from a login node, NEMORUN_HOME must be on storage that all nodes see. On each node slurm/node.sh starts the
ranks, as in the job scripts. Requeueing before a time limit is theirs alone (slurm/job.sh): use
`sbatch slurm/vapo_32b.sh` where that is wanted.

From afar: port, user and key of --host are those of ~/.ssh/config. NeMo-Run sends its files by rsync, which both ends
need, to the resolved address: options that this must have (ProxyJump, UserKnownHostsFile) belong to a `Host` line with
the alias and the address. It runs commands through paramiko, which does not check the host's key; rsync's ssh does, so
log in by ssh once before.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from megatron_vapo.errors import UserError  # noqa: E402
from megatron_vapo.recipe.load import load_recipe  # noqa: E402

if TYPE_CHECKING:
    from nemo_run import LocalExecutor, Script, SlurmExecutor


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        recipe = load_recipe(REPOSITORY / options.recipe, options.overrides)  # a typo is found here, not in the queue
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        return error.exit_code
    import nemo_run as run

    local = options.executor == "local"
    executor = local_executor() if local else slurm_executor(options)
    with run.Experiment(recipe.name, executor=executor) as experiment:
        experiment.add(local_script(options) if local else slurm_script(options), name=recipe.name, tail_logs=local)
        if options.dry_run:
            experiment.dryrun(delete_exp_dir=True)
        else:
            experiment.run(detach=not local, tail_logs=local)
    if local and not options.dry_run:
        return 0 if all(job.state.name == "SUCCEEDED" for job in experiment.jobs) else 1
    return 0


def local_executor() -> LocalExecutor:
    import nemo_run as run

    return run.LocalExecutor(packager=run.Packager())


def local_script(options: argparse.Namespace) -> Script:
    """torchrun with as many processes as asked for."""
    import nemo_run as run

    launcher = [options.python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    command = [*launcher, "-m", "megatron_vapo", "train", options.recipe, *options.overrides]
    return run.Script(inline=f"cd {shlex.quote(options.repository)} && exec {shlex.join(command)}\n")


def slurm_executor(options: argparse.Namespace) -> SlurmExecutor:
    """One task a node, through this machine's sbatch or that of a login node."""
    import nemo_run as run

    if options.host:
        tunnel = run.SSHTunnel(
            host=options.host, user=options.user, job_dir=options.job_dir, pre_command=options.before
        )
    else:
        tunnel = run.LocalTunnel(job_dir="")  # elsewhere than in NEMORUN_HOME it would not find its own script
    ports = "$((20000 + SLURM_JOB_ID % 20000))"
    logs = f"{options.repository}/logs/{options.name}-$SLURM_JOB_ID/${{SLURM_RESTART_COUNT:-0}}"
    return run.SlurmExecutor(
        account=options.account,
        partition=options.partition,
        nodes=options.nodes,
        ntasks_per_node=1,
        gpus_per_node=options.gpus_per_node or None,
        cpus_per_task=options.cpus_per_task,
        exclusive=True,
        time=options.time,
        container_image=options.container,
        container_mounts=[f"{options.repository}:{options.repository}", *options.mount],
        packager=run.Packager(),
        tunnel=tunnel,
        # In the batch script, where Slurm's commands are at hand also with a container.
        setup_lines=f"export VAPO_MASTER=${{nodes_array[0]}} VAPO_PORT={ports} VAPO_LOGS={logs}\nmkdir -p $VAPO_LOGS",
        env_vars={"VAPO_PROCESSES": str(options.processes), "VAPO_PYTHON": options.python},
    )


def slurm_script(options: argparse.Namespace) -> Script:
    """Return the script that runs on each node."""
    import nemo_run as run

    command = shlex.join(["bash", "slurm/node.sh", "train", options.recipe, *options.overrides])
    site = "if [ -f slurm/site.env ]; then . slurm/site.env; fi"
    return run.Script(inline=f"cd {shlex.quote(options.repository)} && {site} && exec {command}\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML recipe, relative to the repository or absolute")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--executor", choices=("local", "slurm"), required=True)
    parser.add_argument("--processes", type=int, help="a node; default: 8 on Slurm, 1 on this machine")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    parser.add_argument("--python", help="where the nodes have it; default: VAPO_PYTHON, or the repository's .venv")
    parser.add_argument("--repository", default=str(REPOSITORY), help="where the nodes have it")
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--nodes", type=int, default=1)
    slurm.add_argument("--account", default=os.environ.get("SBATCH_ACCOUNT", "default"))
    slurm.add_argument("--partition", default=os.environ.get("SBATCH_PARTITION"))
    slurm.add_argument("--time", default="1-00:00:00")
    slurm.add_argument("--gpus-per-node", type=int, default=8, help="0 on a cluster of CPUs")
    slurm.add_argument("--cpus-per-task", type=int)
    slurm.add_argument("--container", default=os.environ.get("VAPO_CONTAINER"), help="image (needs the pyxis plugin)")
    slurm.add_argument("--mount", action="append", default=[], metavar="FROM:TO", help="what the container sees")
    slurm.add_argument("--host", help="login node, for submitting over SSH")
    slurm.add_argument("--user", default="", help="with --host; default: as ~/.ssh/config says")
    slurm.add_argument("--job-dir", default="", help="with --host: the cluster's folder for NeMo-Run's files")
    slurm.add_argument("--before", help="with --host: run there before each command, such as `module load slurm`")
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    options.overrides += rest
    options.processes = options.processes or (1 if options.executor == "local" else options.gpus_per_node or 1)
    options.python = options.python or os.environ.get("VAPO_PYTHON", f"{options.repository}/.venv/bin/python")
    options.name = Path(options.recipe).stem
    if options.host and not options.job_dir:
        parser.error("--host needs --job-dir, a folder on the cluster")
    return options


if __name__ == "__main__":
    sys.exit(main())
