#!/usr/bin/env bash
# Not run. Training on several nodes of a Slurm cluster, restarted from the last whole checkpoint until it is done:
#
#   sbatch --nodes 2 examples/launch/slurm.sh configs/qwen2.5-7b-paper.yaml [options of igpo train]
#
# SEARCH_SERVER is the address of a shared search server (see search_server.sh). With VLLM_SERVER, an address such as
# http://node7:8000, turns are sampled there (see vllm_server.sh) instead of on the nodes of the training.
#SBATCH --job-name=igpo
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=igpo-%j.log
#SBATCH --open-mode=append
set -euo pipefail

config=${1:?usage: sbatch slurm.sh CONFIG [OPTION ...]}
shift
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-8}

options=(--config "$config" --resume_from_checkpoint true "$@")
if [ -n "${SEARCH_SERVER:-}" ]; then options+=(--index "$SEARCH_SERVER"); fi
if [ -n "${VLLM_SERVER:-}" ]; then
    options+=(--use_vllm true --vllm_mode server --vllm_server_base_url "$VLLM_SERVER")
fi

# Slurm sends SIGTERM two minutes before the time is up: the job goes back into the queue, and resumes there.
trap 'scontrol requeue "$SLURM_JOB_ID"' TERM

# One task per node starts its GPUs' processes; `machine_rank` differs, so that each node expands it for itself.
export ACCELERATE=${ACCELERATE:-accelerate_configs/fsdp2.yaml} head_node nodes gpus
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$ACCELERATE" \
        --num_machines "$nodes" --num_processes "$((nodes * gpus))" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$head_node" --main_process_port 29500 --rdzv_backend c10d \
        train.py "$@"
' launch "${options[@]}" &
wait $!
