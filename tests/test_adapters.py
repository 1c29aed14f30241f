"""The directory of a PEFT adapter as the model: it is trained further."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.evaluation.settings import EvaluationSettings
from igpo_trl.training.adapters import base_of_adapter

SCRIPTS = [[tiny.call("Paris"), tiny.answer("Paris")], [tiny.answer("Rome")]]


class Trainer(tiny.Scripted, IGPOTrainer):
    scripts = SCRIPTS


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter that was trained: its B matrices are not zero."""
    base = tiny.make_model("qwen3")
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    tiny.make_tokenizer().save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["inference_mode"]
    return tmp_path / "adapter"


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_adapter_is_trained_further_and_its_base_model_is_not(adapter, tmp_path, beta):
    before = load_file(adapter / "adapter_model.safetensors")
    trainer = tiny.make_trainer(Trainer, IGPOConfig, tmp_path / "run", model=str(adapter), beta=beta)
    assert isinstance(trainer.model, PeftModel)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and ".default." in name for name in trained)
    loaded = trainer.model.state_dict()
    for name, value in before.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], value)
    trainer.train()
    trainer.save_model()
    after = load_file(tmp_path / "run/adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert base_of_adapter(tmp_path / "run") == str(tmp_path / "base")
    assert load_file(tmp_path / "base/model.safetensors").keys() == tiny.make_model("qwen3").state_dict().keys()


def test_the_tokenizer_is_that_of_the_adapter_or_else_of_its_base_model(adapter, tmp_path):
    trainer = Trainer(
        str(adapter),
        args=IGPOConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", num_generations=2),
        train_dataset=tiny.make_dataset(),
        tools=[tiny.search],
    )
    assert trainer.processing_class.chat_template == tiny.make_tokenizer().chat_template


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: (a / "adapter_config.json").write_text("{}"), ValueError, "names no base model"),
        (lambda a: (a / "adapter_config.json").write_text("{"), ValueError, "names no base model"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), FileNotFoundError, "no adapter_model.safetensors in"),
        (lambda a: (a.parent / "base").rename(a.parent / "moved"), FileNotFoundError, "base model .* is missing"),
    ],
)
def test_a_wrong_adapter_is_refused_before_anything_is_loaded(adapter, tmp_path, change, error, message):
    change(adapter)
    with pytest.raises(error, match=message):
        tiny.make_trainer(Trainer, IGPOConfig, tmp_path / "run", model=str(adapter))
    with pytest.raises(error, match=message):
        EvaluationSettings(model=str(adapter), sources=["a"], indexes=["b"]).resolve()


def test_a_second_adapter_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match="is an adapter, which is trained further, and `peft_config`"):
        tiny.make_trainer(Trainer, IGPOConfig, tmp_path / "run", model=str(adapter), peft_config=LoraConfig(r=2))
