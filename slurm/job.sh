# What all jobs do; the scripts beside it say how much of the cluster they want, and call
#
#     train RECIPE PROCESSES_PER_NODE [key=value...]
#     task COMMAND...
#
# `train` checks everything that can be wrong without a GPU, starts torchrun once a node, and ends the job:
# done; requeued with a checkpoint (time limit, pre-emption); or failed, with the error of the rank that failed first.

set -uo pipefail

fail() {
    echo "error: $*"
    exit 1
}

cd "${SLURM_SUBMIT_DIR:?submit me with sbatch}" || exit 1
[ -f slurm/site.env ] && . slurm/site.env
[ -z "${VAPO_MODULES:-}" ] || module load $VAPO_MODULES || fail "VAPO_MODULES=$VAPO_MODULES: module load failed"

python=${VAPO_PYTHON:-$PWD/.venv/bin/python}
logs=$PWD/logs/${SLURM_JOB_NAME}-${SLURM_JOB_ID}/${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs" || fail "$PWD: no folder for logs can be made here"
container=()

# A container only when asked for: without the plugin, srun does not know these options.
if [ -n "${VAPO_CONTAINER:-}" ]; then
    [[ $(srun --help) == *--container-image* ]] ||
        fail "VAPO_CONTAINER=$VAPO_CONTAINER: this Slurm has no pyxis plugin (srun --container-image); unset it"
    [[ $VAPO_CONTAINER != /* || -f $VAPO_CONTAINER ]] || fail "VAPO_CONTAINER=$VAPO_CONTAINER: no such image"
    [ -n "${VAPO_PYTHON:-}" ] || fail "VAPO_CONTAINER=$VAPO_CONTAINER: set VAPO_PYTHON (slurm/site.env) to its python"
    mounts=$PWD:$PWD${VAPO_MOUNTS:+,$VAPO_MOUNTS}
    [[ ${VAPO_RUNS:-} != /* ]] || mkdir -p "$VAPO_RUNS" || fail "VAPO_RUNS=$VAPO_RUNS: cannot be made"
    for folder in "${VAPO_MODELS:-}" "${VAPO_DATA:-}" "${VAPO_RUNS:-}"; do
        [[ $folder == /* ]] || continue
        [ -d "$folder" ] || fail "$folder: no such folder; the container is to see it (VAPO_MODELS, VAPO_DATA)"
        mounts+=,$folder:$folder
    done
    container=(--container-image="$VAPO_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
else
    [ -x "$python" ] || fail "$python: no such Python; set VAPO_PYTHON (slurm/site.env), or run make setup"
fi

# One task a node with all of the node's CPUs, or those that the job asked for.
on_each_node=(srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
    --kill-on-bad-exit=1 ${container[@]+"${container[@]}"})
on_first_node=("${on_each_node[@]}" --nodes=1 --ntasks=1)

# One command on the first node: conversions, evaluation.
task() {
    echo "job $SLURM_JOB_ID: $*"
    "${on_first_node[@]}" "$@"
}

# Ends the job where the recipe does not fit its nodes by plan. VAPO_GPU names their GPUs; without it nothing is planned.
plan() {
    local recipe=$1 processes=$2 settings=() word code
    shift 2
    for word in "$@"; do  # of what the user gave, flags are about training
        [[ $word == -* ]] || settings+=("$word")
    done
    # Planning needs no GPU, and must not open one.
    "${on_first_node[@]}" env CUDA_VISIBLE_DEVICES= COLUMNS=200 "$python" -m megatron_vapo plan "$recipe" \
        --gpu "$VAPO_GPU" --nodes "$SLURM_JOB_NUM_NODES" --assume "gpus_per_node=${SLURM_GPUS_ON_NODE:-$processes}" \
        ${settings[@]+"${settings[@]}"} &> "$logs/plan.txt"
    code=$?
    if [ "$code" != 0 ]; then
        cat "$logs/plan.txt"
        echo "error: not started, by plan for VAPO_GPU=$VAPO_GPU; without VAPO_GPU (slurm/site.env) it would be"
        exit "$code"
    fi
    grep -m 1 "^It fits" "$logs/plan.txt"
}

train() {
    local recipe=$1 processes=$2
    shift 2
    if [[ ${1:-} == *.yaml ]]; then  # another recipe of this size: a baseline, an ablation
        recipe=$1
        shift
    fi
    # The batch shell alone is told of the time limit. What is asked for before the ranks start, they find as they do.
    trap 'echo "time limit is near: asking the run to stop"; touch "$logs/stop"' USR1
    trap 'echo "job is to end: asking the run to stop"; touch "$logs/stop"' TERM
    local overrides=()
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then  # a job array: its numbers are seeds, each with a run folder of its own
        overrides+=("seed=$SLURM_ARRAY_TASK_ID" "name=$(basename "$recipe" .yaml)_seed$SLURM_ARRAY_TASK_ID")
    fi
    overrides+=("$@")
    local arguments=(train "$recipe" ${overrides[@]+"${overrides[@]}"})

    export VAPO_PROCESSES=$processes VAPO_LOGS=$logs VAPO_PORT=$((20000 + SLURM_JOB_ID % 20000))
    VAPO_MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export VAPO_MASTER VAPO_PYTHON=$python
    echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)" \
        "x $processes processes${VAPO_CONTAINER:+ in $VAPO_CONTAINER}; logs in $logs"
    echo "$python: megatron-vapo ${arguments[*]}"

    # Says in seconds what would otherwise fail after minutes: paths, data, layout, recipe.
    WORLD_SIZE=$((SLURM_JOB_NUM_NODES * processes)) LOCAL_WORLD_SIZE=$processes "${on_first_node[@]}" \
        "$python" -m megatron_vapo "${arguments[@]}" --dry-run || exit
    [ -z "${VAPO_GPU:-}" ] || plan "$recipe" "$processes" ${overrides[@]+"${overrides[@]}"}
    echo "follow it: tail -f $logs/node0.log (each rank's output is below that folder)"
    echo "stop with a checkpoint, requeued: scancel --batch --signal=USR1 $SLURM_JOB_ID; for good: scancel $SLURM_JOB_ID"

    "${on_each_node[@]}" --nodes="$SLURM_JOB_NUM_NODES" --output="$logs/node%n.log" bash slurm/node.sh "${arguments[@]}" &
    local launched=$! code
    while wait "$launched"; kill -0 "$launched" 2> /dev/null; do :; done  # a signal ends `wait` before srun ends
    wait "$launched"
    code=$?

    if [ -e "$logs/interrupted" ] && ! scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
        echo "stopped with a checkpoint; cancelled, so the job stays ended: submit it again to go on"
    elif [ -e "$logs/interrupted" ]; then
        echo "stopped with a checkpoint; requeued to go on"
        scontrol requeue "$SLURM_JOB_ID"
    elif [ "$code" != 0 ]; then
        local show=("$python" slurm/first_error.py "$logs")
        [ -z "${VAPO_CONTAINER:-}" ] || show=("${on_first_node[@]}" "${show[@]}")  # that python is in the container
        "${show[@]}"
    else
        echo "done"
    fi
    exit "$code"
}
