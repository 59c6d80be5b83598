#!/bin/bash
# One command on one node, with the site's settings: sbatch slurm/task.sh COMMAND... It has no GPU unless asked for:
#
#     sbatch --gpus-per-node=8 --exclusive --mem=0 slurm/task.sh \
#         ${VAPO_PYTHON:-.venv/bin/python} -m megatron_vapo evaluate RUN/export ...
#
#SBATCH --job-name=vapo_task
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log

. "${SLURM_SUBMIT_DIR:?submit me with sbatch, from the repository}/slurm/job.sh" || exit
task "$@"
