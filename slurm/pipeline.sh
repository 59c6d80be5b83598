#!/bin/bash
# Submit the whole way: convert -> train -> export -> evaluate, each after the one before has succeeded.
#
#     slurm/pipeline.sh slurm/vapo_32b.sh MODEL RUN [key=value...]
#
# MODEL is the Hugging Face folder of the base, RUN the run's folder. Conversion proves that Megatron holds the model that
# Hugging Face has (--check compares logits) and leaves RUN-base for other tools; export makes RUN-export of the last
# checkpoint; evaluation answers the recipe's problems with it. Options for sbatch: SBATCH_* (slurm/site.env), TASK_OPTIONS
# (conversions, without GPUs: --mem=0 and the like) and TRAIN_OPTIONS (training, and evaluation on one node of its kind).
set -euo pipefail

[ $# -ge 3 ] || { sed -n '2,4p' "$0"; exit 2; }
script=$1 model=$2 run=$3
shift 3
cd "$(dirname "$0")/.."
[ ! -f slurm/site.env ] || . slurm/site.env
python=${VAPO_PYTHON:-$PWD/.venv/bin/python}

submit() { sbatch --parsable --kill-on-invalid-dep=yes "$@"; }
convert=$(submit ${TASK_OPTIONS:-} --job-name=convert slurm/task.sh \
    "$python" tools/convert_hf_to_megatron.py "$model" "$run-base" --check)
train=$(submit ${TRAIN_OPTIONS:-} --dependency=afterok:"$convert" "$script" model.path="$model" run_dir="$run" "$@")
export=$(submit ${TASK_OPTIONS:-} --dependency=afterok:"$train" --job-name=export slurm/task.sh \
    bash -c "$python tools/convert_megatron_to_hf.py \$(ls -d $run/checkpoints/step_* | tail -n 1)/actor $run-export --base $model")
# What training asks of each node.
node=$(sed -nE 's/^#SBATCH (--(gpus-per-node|cpus-per-task|exclusive|mem)\S*).*/\1/p' "$script")
evaluate=$(submit $node ${TRAIN_OPTIONS:-} --nodes=1 --dependency=afterok:"$export" --job-name=evaluate slurm/task.sh \
    "$python" -m megatron_vapo evaluate "$run-export" --recipe "$run/recipe.yaml")
echo "convert $convert, train $train, export $export, evaluate $evaluate"
