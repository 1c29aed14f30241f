"""
The trainer's end of vLLM without a GPU.

vLLM 0.31 samples on a CPU, and its own log-probabilities and weights are what these tests compare. What vLLM and TRL
1.16 do only with CUDA is replaced here: they send new weights over NCCL, and a layer on a CPU keeps a repacked copy of
its weights, which no new weights reach.
"""

import functools
import os
import sys
from types import SimpleNamespace
from typing import Any

#: Read by vLLM when it is imported: GiB of KV cache; nothing is compiled.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_HOST_IP": "127.0.0.1"}


def keep_weights_as_they_are() -> None:
    """Linear layers read the parameters that new weights are loaded into, instead of a copy in another layout."""
    import torch
    import vllm.model_executor.layers.utils as layers

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = plain


def patch_colocate() -> None:
    """For vLLM in the trainer's process. Before a trainer is made."""
    import trl.generation.vllm_generation as generation
    import vllm.triton_utils.dispatcher as dispatcher

    keep_weights_as_they_are()

    def attributes(module: Any) -> dict[str, Any]:
        """Some modules of llvmlite, which BM25 brings, have no attributes in the ordinary sense."""
        found = getattr(module, "__dict__", None)
        return dict(found) if hasattr(found, "items") else {}

    dispatcher.vars = attributes
    # TRL names no dtype, and vLLM would make bfloat16 of float32.
    generation.LLM = functools.partial(generation.LLM, dtype="float32", enforce_eager=True)


def patch_client() -> None:
    """For a server that was started with `cpu_server.Worker`. Before a trainer is made."""
    import torch
    import trl.generation.vllm_client as client
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group as join

    def open_endpoint(info: dict[str, Any]) -> Any:
        # With torchrun's variable, its store would be taken for that of this group.
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        group = join(info["master_address"], info["master_port"], 0, info["world_size"], "gloo")
        return SimpleNamespace(broadcast=group.broadcast, group=SimpleNamespace())

    def send(iterator: Any, group: Any, src: int, post_iter_func: Any) -> None:
        for item in iterator:
            group.broadcast(post_iter_func(item).contiguous(), src).wait()

    original = client.VLLMClient.init_communicator

    def init_communicator(self: Any, device: Any = 0) -> None:
        original(self, torch.device("cuda"))  # "the current device", which is never asked for

    client.open_trainer_endpoint = open_endpoint
    client.packed_nccl_broadcast_producer = send
    client.VLLMClient.init_communicator = init_communicator


def main() -> None:
    """`igpo` with vLLM on a CPU: `python cpu.py colocate|server train …`."""
    {"colocate": patch_colocate, "server": patch_client}[sys.argv.pop(1)]()
    from igpo_trl.cli.app import app

    sys.argv[0] = "igpo"
    app()


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main()
