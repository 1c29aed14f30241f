"""LoRA on weights of 4 bits: gradients pass them, whatever has been run in eval mode."""

import importlib.util

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.beliefs import AnswerProbe, score_beliefs

if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("bitsandbytes is not installed: pip install 'igpo-trl[quantization]'", allow_module_level=True)

from bitsandbytes.functional import has_avx512bf16  # noqa: E402

IDS = torch.arange(3, 43)[None]


class Trainer(tiny.Scripted, IGPOTrainer):
    scripts = [[tiny.call("Paris"), tiny.answer("Paris")], [tiny.answer("Rome")]]


@pytest.fixture
def base(tmp_path):
    # bitsandbytes rearranges weights in blocks of 32 × 64.
    tiny.make_model("qwen3", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def quantized(kind="nf4"):
    options = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": kind == "nf4"}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)


def make(base, folder, **options):
    options = {"optim": "sgd", "learning_rate": 0.0, "beta": 0.1, "quantization_config": quantized()} | options
    return tiny.make_trainer(Trainer, IGPOConfig, folder, model=base, **options)


def gradients(model):
    model.train()
    model.zero_grad()
    # All of these tokens are likely to have a gradient, unlike those of a rollout whose advantages are 0.
    logits = model(input_ids=IDS).logits[0, :-1].float()
    logits.log_softmax(dim=-1).gather(1, IDS[0, 1:, None]).mean().backward()
    return torch.cat([weights.grad.float().flatten() for weights in model.parameters() if weights.requires_grad])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_gradients_pass_the_weights_after_beliefs_rollouts_and_evaluation(base, tmp_path, kind):
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    run = make(
        base, tmp_path / "run", peft_config=adapter, quantization_config=quantized(kind),
        eval_dataset=tiny.make_dataset(2), belief_at_eval=True, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    before = gradients(run.model)
    run.train()
    assert run.state.log_history[0]["grad_norm"] > 0
    after = gradients(run.model)
    # .22 if the weights were rearranged, with a norm of a fifth.
    assert torch.cosine_similarity(before, after, dim=0) > 0.9999
    assert after.norm().item() == pytest.approx(before.norm().item(), rel=1e-4)


def test_beliefs_outside_the_trainer_leave_gradients_alone(base):
    from peft import get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantized())
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    before = gradients(model)
    score_beliefs(model, [IDS[0].tolist()], [[10, 30]], [[AnswerProbe([1, 2, 3], 1, 3)]])
    assert torch.equal(gradients(model), before)


def test_an_adapter_is_saved_loaded_and_trained_further(base, tmp_path):
    run = make(base, tmp_path / "run", peft_config=LoraConfig(r=4, target_modules=["q_proj"]), learning_rate=0.1)
    run.train()
    run.save_model()
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantized())
    model = PeftModel.from_pretrained(model, tmp_path / "run").train()
    run.model.train()
    with torch.no_grad():
        expected, loaded = run.model(input_ids=IDS).logits, model(input_ids=IDS).logits
        with model.disable_adapter():
            effect = (model(input_ids=IDS).logits - loaded).abs().max()
    # TRL trains adapters on 4-bit weights in bfloat16, which has 8 bits.
    assert 0 < (loaded - expected).abs().max() < 0.02 * effect
    further = make(str(tmp_path / "run"), tmp_path / "next", learning_rate=0.1)
    further.train()
    assert further.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert further.state.log_history[0]["grad_norm"] > 0


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes rearranges weights on CPUs with AVX512-BF16 only")
def test_a_model_whose_weights_are_rearranged_already_is_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantized())
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    with pytest.raises(ValueError, match="has rearranged this model's weights for inference"):
        make(model, tmp_path / "run", peft_config=LoraConfig(r=4, target_modules=["q_proj"]), quantization_config=None)
