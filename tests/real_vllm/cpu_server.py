"""
The server's end: every process of `vllm serve` imports this module if it is given `--worker-cls cpu_server.Worker`.

`--weight-transfer-config '{"backend": "gloo"}'` then takes new weights over gloo, one tensor at a time.
"""

from typing import Any

import torch
from cpu import keep_weights_as_they_are
from vllm.distributed.utils import stateless_init_torch_distributed_process_group as join
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.v1.worker.cpu_worker import CPUWorker


class GlooEngine(NCCLWeightTransferEngine):
    """The requests of vLLM's own engine, with other transport."""

    def init_transfer_engine(self, init_info: Any) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        address = init_info.master_address, init_info.master_port
        self.group = join(*address, rank, init_info.world_size, "gloo")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, info: Any) -> None:
        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(weight, 0).wait()
            self.model.load_weights([(name, weight)])


keep_weights_as_they_are()
WeightTransferEngineFactory.register_engine("gloo", GlooEngine)


class Worker(CPUWorker):
    """vLLM's own."""
