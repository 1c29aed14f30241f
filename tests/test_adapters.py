"""Every kind of PEFT adapter is trained, saved, loaded, merged, and trained further from its directory."""

import copy
import json
from pathlib import Path

import peft
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.beliefs import AnswerProbe, score_beliefs
from igpo_trl.evaluation.settings import EvaluationSettings
from igpo_trl.training.adapters import base_of_adapter
from igpo_trl.training.belief_model import Reference

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


LAYERS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "rslora": LoraConfig(r=4, target_modules=LAYERS, use_rslora=True, rank_pattern={"q_proj": 2}),
    "dora": LoraConfig(r=4, target_modules=LAYERS, use_dora=True),
    "pissa": LoraConfig(r=4, target_modules=LAYERS, init_lora_weights="pissa"),
    "olora": LoraConfig(r=4, target_modules=LAYERS, init_lora_weights="olora"),
    "modules_to_save": LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]),
    "embeddings": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "tokens": LoraConfig(r=4, target_modules=LAYERS, trainable_token_indices=[5, 6]),
    "experts": LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
    "lokr": peft.LoKrConfig(r=4, target_modules=LAYERS),
    "ia3": peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=LAYERS),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def save_base(folder, **overrides):
    """A base model in a directory that its name leads to, with experts if there are any."""
    model = tiny.make_model("qwen3")
    if overrides:
        config = model.config.to_dict() | {"model_type": "qwen3_moe", "architectures": None} | overrides
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))
    model.save_pretrained(folder)
    model.config._name_or_path = model.name_or_path = str(folder)
    return model


@torch.no_grad()
def logits_of(model, ids):
    training = model.training
    logits = model.eval()(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
    model.train(training)
    return logits


def check_beliefs(model, ids):
    """Beliefs are those of plain forwards of this model."""
    cuts, probe = [10, 20, 30], AnswerProbe([7, 8, 9], 1, 3)
    beliefs = score_beliefs(model, [ids], [cuts], [[probe]])[0][:, 0]
    for belief, cut in zip(beliefs, cuts, strict=True):
        log_probs = logits_of(model, [*ids[:cut], 7, 8, 9]).log_softmax(dim=-1)
        assert belief == pytest.approx((log_probs[cut, 8] + log_probs[cut + 1, 9]).item() / 2, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_trained_saved_loaded_merged_and_trained_further(kind, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if kind == "experts" else {}
    base = save_base(tmp_path / "base", **experts)
    ids = torch.arange(3, 33).tolist()
    of_base = logits_of(base, ids)
    options = {"beta": 0.1, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    config = copy.deepcopy(KINDS[kind])
    run = tiny.make_trainer(Trainer, IGPOConfig, tmp_path / "run", model=base, peft_config=config, **options)
    model, virtual = run.model, kind == "prompt"
    trained = {name: weights.clone() for name, weights in model.named_parameters() if weights.requires_grad}
    assert trained and not any(".ref" in name for name in trained)
    start = logits_of(model, ids)
    run.train()

    # The reference is the base model, whatever was split off its weights; training starts there.
    with Reference().scoring(model, 0) as reference:
        torch.testing.assert_close(logits_of(reference, ids), of_base, atol=2e-5, rtol=0.0)
    assert (run.state.log_history[0]["kl"] > 1e-3) if virtual else (run.state.log_history[0]["kl"] < 1e-9)
    assert {name for name, weights in model.named_parameters() if weights.requires_grad} == trained.keys()
    end = logits_of(model, ids)
    assert (end - start).abs().max() > 1e-4
    check_beliefs(model, ids)

    saved = tmp_path / "run/checkpoint-2"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), saved)
    torch.testing.assert_close(logits_of(loaded, ids), end, atol=2e-5, rtol=0.0)
    if virtual:
        with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
            tiny.make_trainer(Trainer, IGPOConfig, tmp_path / "next", model=str(saved))
        return
    torch.testing.assert_close(logits_of(loaded.merge_and_unload(), ids), end, atol=1e-4, rtol=0.0)

    options |= {"max_steps": 1, "save_strategy": "no"}
    run = tiny.make_trainer(Trainer, IGPOConfig, tmp_path / "next", model=str(saved), **options)
    torch.testing.assert_close(logits_of(run.model, ids), end, atol=2e-5, rtol=0.0)
    run.train()
    assert run.state.log_history[0]["kl"] < 1e-9  # the reference is the adapter that training started from
    with Reference().scoring(run.model, 0) as reference:
        torch.testing.assert_close(logits_of(reference, ids), end, atol=2e-5, rtol=0.0)
    assert (logits_of(run.model, ids) - end).abs().max() > 1e-4


@pytest.mark.parametrize("init", [True, "pissa"])
def test_reference_beliefs_of_a_continued_adapter_are_those_it_started_with(init, adapter, tmp_path):
    """Without `beta` too, where TRL keeps no copy of it."""
    changed = json.loads((adapter / "adapter_config.json").read_text()) | {"init_lora_weights": init}
    (adapter / "adapter_config.json").write_text(json.dumps(changed))
    options = {"belief_model": "reference", "learning_rate": 1.0, "optim": "sgd"}
    run = tiny.make_trainer(Trainer, IGPOConfig, tmp_path / "run", model=str(adapter), **options)
    ids = torch.arange(3, 33).tolist()
    start = logits_of(run.model, ids)
    run.train()
    assert (logits_of(run.model, ids) - start).abs().max() > 1e-3
    with run._belief_model.scoring(run.model, 0) as reference:
        torch.testing.assert_close(logits_of(reference, ids), start, atol=1e-6, rtol=0.0)


def test_a_run_whose_adapter_took_over_weights_is_resumed(tmp_path):
    ends, config = [], KINDS["pissa"]
    for checkpoint in (None, str(tmp_path / "run/checkpoint-1")):
        run = tiny.make_trainer(
            Trainer, IGPOConfig, tmp_path / "run", model=save_base(tmp_path / "base"),
            peft_config=copy.deepcopy(config), beta=0.1, max_steps=2, save_strategy="steps", save_steps=1,
        )  # fmt: skip
        run.train(checkpoint)
        ends.append(dict(run.model.named_parameters()))
    whole, resumed = ends
    assert any(".ref." in name for name in whole)
    for name, weights in whole.items():
        torch.testing.assert_close(resumed[name], weights, atol=1e-6, rtol=0.0, msg=name)


REFUSED = {
    "not_repeated": (LoraConfig(target_modules=LAYERS, init_lora_weights="pissa_niter_4"), "would move another part"),
    "invoked": (
        LoraConfig(target_modules=LAYERS, task_type="CAUSAL_LM", alora_invocation_tokens=[1]),
        "acts after the last of them only",
    ),
    "prefix": (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "Set `gradient_checkpointing=False`",
    ),
    "head": (LoraConfig(target_modules=["q_proj", "lm_head"]), "adapter to `lm_head` is not supported"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_adapters_that_would_be_trained_wrongly_are_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny.make_trainer(Trainer, IGPOConfig, tmp_path / "run", peft_config=config)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_adapter_that_was_loaded_for_inference_is_refused(adapter, tmp_path, beta):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
    run = tiny.make_trainer(Trainer, IGPOConfig, tmp_path / "run", model=model, beta=beta)
    with pytest.raises(ValueError, match="all parameters of this PeftModel"):
        run.train()


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
