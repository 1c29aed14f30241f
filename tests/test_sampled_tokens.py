"""Training on real and sampled tokens alone gives TRL's numbers."""

import time

import pytest
import tiny
import torch
from peft import LoraConfig
from test_branching import PACKED, PER_TURN, make_model
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.training.sampled_tokens import SampledTokensModel, backbone_of, can_pack


class Scripted(tiny.Scripted, IGPOTrainer):
    scripts = (
        [tiny.call("Paris"), tiny.call("Rome"), tiny.call("Paris"), tiny.answer("Paris")],
        [tiny.call("Rome"), tiny.answer("Rome")],
        [tiny.answer("Paris")],
        [tiny.call("Paris"), "I do not know."],
    )


LOSSES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


def train(folder, **options):
    torch.manual_seed(0)
    trainer = tiny.make_trainer(
        Scripted,
        IGPOConfig,
        folder,
        model=tiny.make_model(initializer_range=0.1),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        optim="sgd",  # proportional to the gradient, so that rounding is not blown up
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"importance_sampling_level": "turn", "num_iterations": 2},
        {"beta": 0.1, "peft_config": LoraConfig(r=4, target_modules="all-linear")},
        {"gradient_checkpointing": True, "normalization": "critic"},
        {"mask_truncated_completions": True, "max_completion_length": 60},
        {"reuse_prefixes": False, "num_iterations": 2},  # beliefs against the forward of the old log-probabilities
    ],
    ids=["ratios of turns", "LoRA and KL", "checkpointing", "truncated", "captured"],
)
def test_training_is_that_of_padded_rows(tmp_path, options):
    before = dict(tiny.make_model(initializer_range=0.1).named_parameters())
    padded, packed = (
        train(tmp_path / str(pads), max_steps=2, pad_to_longest=pads, **options) for pads in (True, False)
    )
    names = {name for name, value in padded.model.named_parameters() if value.requires_grad}
    moved = [n for n, v in padded.model.named_parameters() if n in before and (v - before[n]).abs().max() > 1e-5]
    assert moved or "peft_config" in options
    weights = dict(packed.model.named_parameters())
    for name, value in padded.model.named_parameters():
        torch.testing.assert_close(weights[name], value, atol=2e-6, rtol=1e-4, msg=name)
    (log, other_log) = (trainer.state.log_history[0] for trainer in (padded, packed))
    assert names and set(log) == set(other_log)
    for name in ("loss", "grad_norm", "entropy", *(["kl"] if "beta" in options else [])):
        assert other_log[name] == pytest.approx(log[name], rel=1e-5, abs=1e-6), name
    assert other_log["perf/padding"] < 1 < log["perf/padding"]  # one copy of the prompt
    assert other_log["perf/head_tokens"] < log["perf/head_tokens"]


def test_every_loss_is_that_of_padded_rows(tmp_path):
    """Also where it reads entropies, a reference or ratios: gradients and metrics of the same microbatch."""
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = train(tmp_path, max_steps=1, beta=0.1, num_iterations=2, peft_config=adapter)
    inputs = trainer._buffered_inputs[0]
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + 0.1 * torch.randn_like(inputs["advantages"])
    variants = [{"loss_type": loss} for loss in LOSSES]
    variants += [{"top_entropy_quantile": 0.5}, {"importance_sampling_level": "sequence"}]
    for variant in variants:
        for name, value in {"top_entropy_quantile": 1.0, "importance_sampling_level": "token", **variant}.items():
            setattr(trainer, name, value)
        results = []
        for pads in (True, False):
            trainer.args.pad_to_longest = pads
            trainer.model.zero_grad()
            trainer._metrics["train"].clear()
            trainer._compute_loss(trainer.model, inputs).backward()
            gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
            results.append((gradients, {k: v[-1] for k, v in trainer._metrics["train"].items()}))
        (expected, metrics), (actual, others) = results
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4, msg=variant)
        assert others == pytest.approx(metrics, rel=1e-5, abs=1e-6), variant


def masked_rows(vocabulary, shared=0):
    """
    Token ids of three rollouts of different lengths, padded as TRL pads them, and which tokens were sampled. All begin
    with the same `shared` tokens.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (3, 31), generator=generator)
    attention_mask = torch.ones(3, 31, dtype=torch.long)
    for row, (left, right) in enumerate([(3, 4), (1, 0), (6, 2)]):
        attention_mask[row, :left] = attention_mask[row, 31 - right :] = 0
        ids[row, left : left + shared] = ids[0, 3 : 3 + shared]
    sampled = (torch.rand(3, 20, generator=generator) < 0.5) & attention_mask[:, 11:].bool()
    return ids, attention_mask, sampled


def scores_and_gradients(model, called, compute, sampled):
    model.zero_grad()
    log_probs, entropy = compute(called)
    (log_probs * sampled).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return log_probs * sampled, entropy * sampled, gradients / gradients.abs().max()


# 12 are more than the shortest prompt: a sampled token is among them. 20 are more than any row has of its own.
@pytest.mark.parametrize("shared", [0, 12, 20])
@pytest.mark.parametrize("case", PACKED)
def test_scores_and_gradients_of_every_model(case, shared):
    model = make_model(*PACKED[case])
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids, attention_mask, sampled = masked_rows(model.config.vocab_size, shared)
    labels = ids.masked_fill(attention_mask == 0, -100)
    # TRL counts the padding, which matters to absolute positions and to a norm of rotated queries.
    counted = (attention_mask.cumsum(1) - 1).clamp(min=0)
    positions = {"position_ids": counted} if case in ("gpt2", "hunyuan") else {}

    def compute(called):
        more = positions if called is model else {}
        output = called(input_ids=ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True, **more)
        return output.log_probs[:, -20:], output.entropy[:, -20:]

    expected = scores_and_gradients(model, model, compute, sampled)
    # A router's loss counts tokens, so that none may be missing.
    shares = model.config._attn_implementation == "sdpa" and not getattr(model.config, "output_router_logits", False)
    num_computed = {False: 3 * attention_mask.sum(1).max(), True: attention_mask.sum() - 2 * shared * shares}
    eager = model.config._attn_implementation == "eager"
    assert can_pack(model) == (case not in ("nemotron", "stablelm") and not eager)
    for packs in (False, True)[: 1 + can_pack(model)]:
        called = SampledTokensModel(model, backbone_of(model), sampled, packs=packs)
        for actual, value in zip(scores_and_gradients(model, called, compute, sampled), expected, strict=True):
            torch.testing.assert_close(actual, value, atol=1e-4, rtol=1e-4)
        assert called.num_computed == num_computed[packs]
        assert called.num_scored == sampled.sum()


def test_rows_do_not_share_a_prompt_whose_dropout_they_would_share():
    model = tiny.make_model("gpt2", resid_pdrop=0.1)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids, attention_mask, sampled = masked_rows(300, shared=12)
    computed = []
    for training in (True, False):
        called = SampledTokensModel(model.train(training), backbone_of(model), sampled, packs=True)
        called(input_ids=ids, attention_mask=attention_mask, labels=ids, fused_lm_head=True)
        computed.append(called.num_computed)
    assert computed == [attention_mask.sum(), attention_mask.sum() - 2 * 12]


@pytest.mark.parametrize("name", ["mamba", "lfm2", "qwen3_next"])
def test_recurrent_models_are_not_packed(name):
    assert not can_pack(make_model(*PER_TURN[name]))


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_trl_calls_it_in_chunks(tmp_path, batch_size, packs):
    model = tiny.make_model("llama", initializer_range=0.1)
    trainer = tiny.make_trainer(IGPOTrainer, IGPOConfig, tmp_path, model=model)
    ids, attention_mask, sampled = masked_rows(300)

    def compute(called):
        return GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, called, ids, attention_mask, 20, batch_size=batch_size, compute_entropy=True
        )[:2]

    expected = scores_and_gradients(model, model, compute, sampled)
    called = SampledTokensModel(model, backbone_of(model), sampled, packs=packs)
    for actual, value in zip(scores_and_gradients(model, called, compute, sampled), expected, strict=True):
        torch.testing.assert_close(actual, value, atol=1e-5, rtol=1e-5)


def test_the_head_runs_on_sampled_tokens_alone(tmp_path, monkeypatch):
    import trl.trainer.utils

    rows = []
    apply = trl.trainer.utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        trl.trainer.utils._ChunkedLogProbFunction,
        "apply",
        lambda hidden, *a: (rows.append(len(hidden)), apply(hidden, *a))[1],
    )
    trainer = tiny.make_trainer(Scripted, IGPOConfig, tmp_path, pad_to_longest=False)
    trainer.train()
    sampled = sum(mask.sum() for mask in [trainer.current_step.turn_index >= 0])
    assert rows == [int(sampled)]


def test_nothing_sampled_is_a_zero_with_a_gradient():
    model = tiny.make_model()
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    called = SampledTokensModel(model, backbone_of(model), torch.zeros(2, 3))
    ids = torch.randint(5, 300, (2, 8))
    output = called(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    assert output.log_probs.shape == (2, 7) and (output.log_probs == 0).all()
    output.log_probs.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_parts_of_a_step_add_up_and_exclude_each_other(tmp_path):
    """A slow tool, reward and optimizer are seen where they are, and evaluation is not counted."""

    def search(query: str) -> str:
        """
        Searches.

        Args:
            query: What to look for.
        """
        time.sleep(0.3)
        return f"{query} is the capital of France."

    def reward(completions, **columns):
        time.sleep(0.2)
        return [float(i) for i in range(len(completions))]

    class SlowOptimizer(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            time.sleep(0.1)

    trainer = tiny.make_trainer(
        Scripted,
        IGPOConfig,
        tmp_path,
        tools=[search],
        reward_funcs=reward,
        callbacks=[SlowOptimizer()],
        max_steps=2,
        num_iterations=2,
        eval_dataset=tiny.make_dataset(2),
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "perf/padding" in row]
    assert len(logs) == 2
    first, second = ({k.rpartition("/")[2]: v for k, v in row.items() if "perf/seconds" in k} for row in logs)
    assert first["tools"] > 0.6  # two rounds
    assert first["rewards"] > 0.2
    assert min(first["beliefs"], first["log_probs"], first["training"], first["other"]) > 0
    assert {"training", "optimizer"} == set(second)  # the second iteration over the same rollouts
    assert logs[0]["step_time"] == pytest.approx(sum(first.values()) - first["optimizer"], abs=0.05)
    sampled = int((trainer.current_step.turn_index >= 0).sum())
    assert logs[1]["perf/head_tokens"] == sampled
    assert logs[0]["perf/head_tokens"] == 2 * sampled  # the old log-probabilities and the loss
    tokens = sum(map(len, trainer.current_step.sequences))
    assert logs[1]["perf/tokens_per_second"] == pytest.approx(tokens / sum(second.values()))


def test_sampling_has_its_own_part(tmp_path):
    trainer = tiny.make_trainer(IGPOTrainer, IGPOConfig, tmp_path, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["perf/seconds/sampling"] > log["perf/seconds/tools"]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's own compiler
def test_compiled_models_keep_the_path_of_trl():
    """Hooks are left out of a compiled forward."""
    model = tiny.make_model()
    assert backbone_of(model) is model.model
    assert backbone_of(torch.compile(model)) is None
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert backbone_of(model) is None
