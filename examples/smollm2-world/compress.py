"""Makes an adapter small enough to be kept here: the best approximation of a lower rank, in 8 bits.

python examples/smollm2-world/compress.py outputs/warm/adapter examples/smollm2-world --rank 8
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.conversion import save_as_lora
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--rank", type=int, default=8)
args = parser.parse_args()

config = PeftConfig.from_pretrained(args.adapter)
base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype=torch.float32)
save_as_lora(args.out, PeftModel.from_pretrained(base, args.adapter), args.rank)

weights = args.out / "adapter_model.safetensors"
# PEFT loads any number format into that of the model. 5 bits of exponent need no scale.
tensors = {name: tensor.to(torch.float8_e5m2).contiguous() for name, tensor in load_file(weights).items()}
save_file(tensors, weights, metadata={"format": "pt"})

saved = args.out / "adapter_config.json"
options = json.loads(saved.read_text())
options |= {"task_type": config.task_type, "target_modules": sorted({name.split(".")[-3] for name in tensors})}
saved.write_text(json.dumps(options, indent=2) + "\n")
