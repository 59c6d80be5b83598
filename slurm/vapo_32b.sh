#!/bin/bash
# The paper's experiment, Qwen2.5-32B on 16 nodes of eight 80 GB GPUs. Overrides go to the recipe:
#
#     sbatch slurm/vapo_32b.sh actor.tensor_parallel=4
#     sbatch slurm/vapo_32b.sh recipes/dapo_32b.yaml  # a baseline or an ablation of the same size
#     sbatch --nodes=8 slurm/vapo_32b.sh              # `megatron-vapo plan` says what fits
#     sbatch --array=0-2 slurm/vapo_32b.sh            # three seeds
#
#SBATCH --job-name=vapo_32b
#SBATCH --nodes=16
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
train recipes/vapo_32b.yaml 8 "$@"
