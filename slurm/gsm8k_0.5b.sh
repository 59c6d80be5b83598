#!/bin/bash
# The first run: VAPO on Qwen2.5-0.5B and GSM8K, on one 80 GB GPU (docs/first_gpu_run.md). Overrides go to the recipe:
#
#     sbatch slurm/gsm8k_0.5b.sh steps=20
#
#SBATCH --job-name=gsm8k_0.5b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=96G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@600       # ten minutes before the limit: end with a checkpoint, requeue
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

. "${SLURM_SUBMIT_DIR:?submit me with sbatch, from the repository}/slurm/job.sh" || exit
train recipes/gsm8k_0.5b.yaml 1 "$@"
