#!/bin/bash
# One command on one node, with the site's settings: sbatch slurm/task.sh COMMAND...
#
#SBATCH --job-name=vapo_task
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log

. "${SLURM_SUBMIT_DIR:?submit me with sbatch, from the repository}/slurm/job.sh" || exit
task "$@"
