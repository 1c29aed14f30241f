#!/usr/bin/env bash
# vLLM on GPUs of its own; training sends it the new weights before every batch of rollouts, over NCCL:
#
#   TENSOR_PARALLEL=4 examples/launch/vllm_server.sh Qwen/Qwen2.5-7B-Instruct 8192 [options of vllm serve]
#
# Start it before the training. A training that resumes may use a server that is running. Whoever reaches the port can
# replace the weights: keep it inside your network.
set -euo pipefail

usage="usage: vllm_server.sh MODEL LENGTH [OPTION ...]"
model=${1:?$usage}
length=${2:?$usage}
shift 2
# TRL sends weights through endpoints of development, and needs the log-probabilities of the distribution sampled from.
export VLLM_SERVER_DEV_MODE=1
exec vllm serve "$model" --max-model-len "$length" --host 0.0.0.0 --port "${PORT:-8000}" \
    --tensor-parallel-size "${TENSOR_PARALLEL:-1}" --weight-transfer-config '{"backend": "nccl"}' \
    --logprobs-mode processed_logprobs --max-logprobs -1 "$@"
