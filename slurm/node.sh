#!/bin/bash
# On each node of a job (job.sh starts it by srun): torchrun with as many processes as it has GPUs.

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-1} / VAPO_PROCESSES > 1 ? SLURM_CPUS_PER_TASK / VAPO_PROCESSES : 1))}
export CUDA_DEVICE_MAX_CONNECTIONS=1      # Megatron: what is launched first runs first, so that transfers overlap
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a dead rank ends the others instead of hanging them
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # this repository's code, also where a container has none or another
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 TORCHELASTIC_ERROR_FILE=
if [ -n "${VAPO_INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$VAPO_INTERFACE GLOO_SOCKET_IFNAME=$VAPO_INTERFACE
fi

# Most clusters (proctrack/cgroup) send a step's signals to this shell alone, others to all processes of the job. So this
# shell leaves a file that the ranks look for (runtime/signals.py); torchrun hears nothing, for it would kill them.
export VAPO_STOP=$VAPO_LOGS/stop
trap 'touch "$VAPO_STOP"' TERM USR1
(
    trap '' TERM USR1
    exec "$VAPO_PYTHON" -m torch.distributed.run \
        --nnodes="$SLURM_NNODES" --nproc-per-node="$VAPO_PROCESSES" --node-rank="$SLURM_NODEID" \
        --master-addr="$VAPO_MASTER" --master-port="$VAPO_PORT" --max-restarts=0 --signals-to-handle=SIGINT \
        --log-dir="$VAPO_LOGS/node$SLURM_NODEID" --redirects=3 --tee=0:3 \
        slurm/rank.py "$@"
) &
launched=$!
while wait "$launched"; kill -0 "$launched" 2> /dev/null; do :; done  # a signal ends `wait` before the process ends
wait "$launched"
