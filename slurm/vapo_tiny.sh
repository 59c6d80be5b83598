#!/bin/bash
# The tiny run on CPUs, two nodes of two processes: tries out a cluster without a GPU, in an environment without Transformer
# Engine (docs/run_32b.md). Make its base model first:
#
#     python tools/make_tiny_base.py
#     sbatch slurm/vapo_tiny.sh steps=10
#
#SBATCH --job-name=vapo_tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

. "${SLURM_SUBMIT_DIR:?submit me with sbatch, from the repository}/slurm/job.sh" || exit
train recipes/tiny.yaml 2 "$@"
