"""The estimate of memory against real training steps, in which every tensor is counted."""

import gc
import re
from functools import partial

import pytest
import tiny
import torch
from distributed import sharded
from peft import LoraConfig
from transformers import GenerationMixin
from typer.testing import CliRunner

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.cli.app import app
from igpo_trl.training.estimate import PeakBytes, estimate

SHAPE = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
LENGTH = 320


class LongTurns(tiny.Scripted, IGPOTrainer):
    """Every rollout is one turn of the greatest length, and no two begin alike."""

    scripts = [[[300 + (first + i) % 50 for i in range(LENGTH)]] for first in range(4)]


@pytest.mark.parametrize(
    "options",
    [
        {
            "gradient_checkpointing": True,
            "peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        },
        {"gradient_checkpointing": False, "beta": 0.1},
    ],
    ids=["LoRA, checkpointing", "full, KL"],
)
def test_estimate_is_within_15_percent_of_a_real_step(tmp_path, options):
    model = tiny.make_model("qwen3", **SHAPE)
    model.save_pretrained(tmp_path / "model")  # where TRL looks for the reference model
    model.config._name_or_path = str(tmp_path / "model")
    del model
    gc.collect()
    with PeakBytes() as real:
        model = tiny.make_model("qwen3", **SHAPE)
        model.config._name_or_path = str(tmp_path / "model")
        trainer = tiny.make_trainer(
            LongTurns, IGPOConfig, tmp_path, model=model, max_completion_length=LENGTH, reuse_prefixes=False,
            pad_to_longest=False, max_steps=2, per_device_train_batch_size=4, num_generations=4, **options,
        )  # fmt: skip
        trainer.train()
    prompt = len(trainer._tokenizer.apply_chat_template(
        trainer.train_dataset[0]["prompt"], tools=[tiny.search], add_generation_prompt=True, return_dict=False
    ))  # fmt: skip
    guess = estimate(
        model.config, trainer.args, dtype=torch.float32, peft_config=options.get("peft_config"),
        prompt_tokens=prompt, sampled_tokens=LENGTH,
    )  # fmt: skip
    expected = guess.peak["loss"]
    print(f"real {real.peak / 2**20:.1f} MiB, estimate {expected / 2**20:.1f} MiB, ratio {expected / real.peak:.3f}")
    assert expected == pytest.approx(real.peak, rel=0.15)


class Talking(sharded.Trainer):
    """Real generation and belief passes; what is counted while they run is kept by phase."""

    counted: PeakBytes

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.peaks = {"generation": 0, "belief pass": 0}
        self._belief_scorer.score = partial(self.measured, "belief pass", self._belief_scorer.score)

    def measured(self, phase, function, *args, **options):
        outer, self.counted.peak = self.counted.peak, self.counted.now
        result = function(*args, **options)
        self.peaks[phase] = max(self.peaks[phase], self.counted.peak)
        self.counted.peak = max(self.counted.peak, outer)
        return result

    def _generate(self, *args):
        return self.measured("generation", super()._generate, *args)

    def _score_ended_rollouts(self, *args):
        return self.measured("belief pass", super()._score_ended_rollouts, *args)


def search(query: str) -> str:
    """
    Searches.

    Args:
        query: What to look for.

    Returns:
        Long passages.
    """
    return "Rome is the capital of Italy. " * 60


@pytest.mark.parametrize("reuse_prefixes", [True, False])
def test_estimate_of_rollouts_and_belief_passes(tmp_path, monkeypatch, reuse_prefixes):
    said = [[tiny.call(f"Paris {i}"), tiny.call("Rome"), tiny.answer("Paris")] for i in range(4)]
    monkeypatch.setattr(Talking, "scripts", [said, said])
    gc.collect()
    with PeakBytes() as Talking.counted:
        model = tiny.make_model("qwen3", max_position_embeddings=4096, **SHAPE)
        trainer = tiny.make_trainer(
            Talking, IGPOConfig, tmp_path, model=model, tools=[search], max_completion_length=2000, max_turns=3,
            max_steps=2, num_generations=4, reuse_prefixes=reuse_prefixes, learning_rate=0.0,
        )  # fmt: skip
        monkeypatch.setattr(GenerationMixin, "generate", lambda *args, **options: trainer.say(*args, **options))
        trainer.train()
    trainer.args.max_completion_length = max(len(row) for row in trainer.records[-1]["completion_ids"])
    tokenizer = trainer._tokenizer
    prompt = len(tokenizer.apply_chat_template(
        trainer.train_dataset[0]["prompt"], tools=[search], add_generation_prompt=True, return_dict=False
    ))  # fmt: skip
    guess = estimate(
        model.config, trainer.args, dtype=torch.float32, prompt_tokens=prompt,
        sampled_tokens=sum(len(tokenizer.encode(turn)) + 1 for turn in said[0]),
    )  # fmt: skip
    for phase, real in trainer.peaks.items():
        print(f"{phase}: real {real / 2**20:.1f} MiB, ratio {guess.peak[phase] / real:.3f}")
        assert guess.peak[phase] == pytest.approx(real, rel=0.15), phase


def lines_of(output: str) -> dict[str, float]:
    return {
        name.strip(): float(number) for name, number in re.findall(r"^  (\D+?)\s+([\d.]+) (?:GiB|s)$", output, re.M)
    }


def test_the_command_reads_only_the_configuration(repository, tmp_path):
    tiny.make_model("qwen2", max_position_embeddings=8192).config.save_pretrained(tmp_path / "model")  # no weights
    options = [
        *("train", "--config", str(repository / "configs/qwen2.5-3b-lora.yaml"), "--estimate"),
        *("--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "run")),
    ]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    found = lines_of(result.stdout)
    assert set(found) >= {"weights", "gradients", "optimizer", "KV caches", "belief pass", "activations and logits"}
    assert set(found) >= {"generation", "loss", "sampling", "together"}
    assert not (tmp_path / "run").exists()
    options[options.index("--estimate") + 1 : options.index("--estimate") + 1] = ["8:zero9"]
    mistake = CliRunner().invoke(app, options)
    assert mistake.exit_code == 2 and "`estimate`: got '8:zero9'" in mistake.stderr


def test_what_sharding_and_four_bits_save(tmp_path):
    args = IGPOConfig(str(tmp_path), use_cpu=True, bf16=False, beta=0.1, max_completion_length=64)
    config = tiny.make_model("qwen2").config
    plain, sharded = estimate(config, args), estimate(config, args, num_processes=4, sharding="fsdp2")
    zero2 = estimate(config, args, num_processes=4, sharding="zero2")
    for kind in ("weights", "gradients", "optimizer", "reference model"):
        assert sharded.memory[kind] == plain.memory[kind] / 4
    assert zero2.memory["weights"] == plain.memory["weights"]
    assert zero2.memory["optimizer"] == plain.memory["optimizer"] / 4
    count = sum(p.numel() for p in tiny.make_model("qwen2").parameters())
    # bfloat16: two bytes for each weight, gradient and reference, four for the two moments of Adam.
    assert plain.memory["weights"] == plain.memory["reference model"] == plain.memory["gradients"] == 2 * count
    assert plain.memory["optimizer"] == 4 * count
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapter, quantized = (estimate(config, args, peft_config=lora, load_in_4bit=four) for four in (False, True))
    assert adapter.memory["reference model"] == 0 and adapter.memory["gradients"] < plain.memory["gradients"]
    assert quantized.memory["weights"] < 0.7 * adapter.memory["weights"]
    # 2 layers × 2 KV heads × 12 numbers, keys and values, two bytes each.
    rollouts, tokens = args.per_device_train_batch_size * args.steps_per_generation, 600 + 64
    assert plain.memory["KV caches"] == rollouts * tokens * 2 * 2 * 12 * 2 * 2
