#!/bin/bash
# VAPO on Qwen2.5-7B on four nodes of eight 80 GB GPUs. Overrides go to the recipe:
#
#     sbatch slurm/vapo_7b.sh rollout.prompts_per_step=256
#     sbatch --nodes=2 slurm/vapo_7b.sh              # `megatron-vapo plan` says what fits
#     sbatch --array=0-2 slurm/vapo_7b.sh            # three seeds
#
#SBATCH --job-name=vapo_7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@1800      # half an hour before the limit: end with a checkpoint, requeue
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

. "${SLURM_SUBMIT_DIR:?submit me with sbatch, from the repository}/slurm/job.sh" || exit
train recipes/vapo_7b.yaml 8 "$@"
