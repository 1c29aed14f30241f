#!/usr/bin/env bash
# Not run. vLLM on a node of its own; training sends it the new weights after every step, over NCCL:
#
#   TENSOR_PARALLEL=4 DATA_PARALLEL=2 examples/launch/vllm_server.sh Qwen/Qwen2.5-7B-Instruct 8192
#
# Start it before the training, and again before a training that resumes.
set -euo pipefail

model=${1:?usage: vllm_server.sh MODEL LENGTH}
exec trl vllm-serve --model "$model" --max_model_len "${2:?usage: vllm_server.sh MODEL LENGTH}" --host 0.0.0.0 \
    --port "${PORT:-8000}" --tensor_parallel_size "${TENSOR_PARALLEL:-1}" --data_parallel_size "${DATA_PARALLEL:-1}"
