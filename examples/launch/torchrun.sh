#!/usr/bin/env bash
# Not run on several nodes. The same without Slurm: start this on every node, with the same HEAD and NODES.
#
#   HEAD=node1:29500 NODES=2 GPUS=8 examples/launch/torchrun.sh configs/qwen2.5-7b-paper.yaml [options of igpo train]
#
# torchrun restarts all processes up to three times if one fails, and training resumes from the last whole checkpoint.
# This is data parallelism; FSDP and DeepSpeed need `accelerate launch`, as in slurm.sh.
set -euo pipefail

config=${1:?usage: torchrun.sh CONFIG [OPTION ...]}
shift
exec torchrun --nnodes "${NODES:-1}" --nproc_per_node "${GPUS:-8}" --max_restarts 3 \
    --rdzv_backend c10d --rdzv_endpoint "${HEAD:-localhost:29500}" --rdzv_id "${JOB:-igpo}" \
    train.py --config "$config" --resume_from_checkpoint true "$@"
