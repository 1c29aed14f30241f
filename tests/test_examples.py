"""The adapter that the demonstration with a language model starts from, and the script that made it small."""

import subprocess
import sys

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open


def test_compressed_adapter_is_near_the_whole_one(repository, tmp_path):
    tiny.make_model("llama").save_pretrained(tmp_path / "base")
    family = type(tiny.make_model("llama"))
    base = family.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "whole")
    script = repository / "examples" / "smollm2-world" / "compress.py"
    command = [sys.executable, script, tmp_path / "whole", tmp_path / "small", "--rank", "4"]
    subprocess.run(command, check=True, capture_output=True)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        whole = model(ids).logits
        plain = model.unload()(ids).logits
        small = PeftModel.from_pretrained(family.from_pretrained(tmp_path / "base"), tmp_path / "small")(ids).logits
    assert (small - whole).norm() < 0.2 * (whole - plain).norm()


def test_the_kept_adapter_is_small(repository):
    weights = repository / "examples" / "smollm2-world" / "adapter_model.safetensors"
    assert weights.stat().st_size <= 3_000_000
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F8_E5M2"}  # noqa: SIM118
