"""Two processes that sample from one vLLM server keep their own rollouts, and ask for no more than it allows."""

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed


def test_live_rollouts_that_differ_between_processes_keep_their_own_turns(launch, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).with_name("vllm_server.py"))
    launch([*command, script, str(tmp_path)], ACCELERATE_USE_CPU="true")
    ranks = [json.loads((tmp_path / f"vllm{rank}.json").read_text()) for rank in range(2)]
    for rank in ranks:
        assert rank["longest"] <= 720
        rows = zip(rank["numbers"], rank["texts"], rank["logprobs"], rank["roles"], rank["stops"], strict=True)
        for number, text, logprobs, roles, stop in rows:
            assert stop == "answered"
            assert roles == ["assistant", "tool"] * number + ["assistant"]
            assert text.count(f'"query": "author {number}"') == number
            assert text.endswith(f"<answer>author {number}</answer><|im_end|>")
            assert logprobs == [-float(number)]
    requests = ranks[0]["requests"]
    assert requests[0][:2] == [4, 2]  # 4 questions, sampled twice
    # Rounds of 6, 4 and 2 live rollouts: rank 0 has 2, 2, 2 and rank 1 has 4, 2, 0. Filled up, both have 4, 2, 2.
    sizes = [size for size, n, _ in requests[1:] if n == 1]
    assert 8 in sizes and 4 in sizes
