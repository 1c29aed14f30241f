"""Training on real and sampled tokens alone gives TRL's numbers."""

import pytest
import tiny
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.sampled_tokens import SampledTokensModel, backbone_of, by_length


class Scripted(tiny.Scripted, IGPOTrainer):
    scripts = (
        [tiny.call("Paris"), tiny.call("Rome"), tiny.call("Paris"), tiny.answer("Paris")],
        [tiny.call("Rome"), tiny.answer("Rome")],
        [tiny.answer("Paris")],
        [tiny.call("Paris"), "I do not know."],
    )


LOSSES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": loss} for loss in LOSSES),
        {"num_iterations": 2},
        {"beta": 0.1, "peft_config": LoraConfig(r=4, target_modules="all-linear")},
        {"top_entropy_quantile": 0.5},
        {"importance_sampling_level": "turn", "num_iterations": 2},
        {"mask_truncated_completions": True, "max_completion_length": 60},
        {"normalization": "critic"},
        {"reuse_prefixes": False, "num_iterations": 2},  # beliefs against the forward of the old log-probabilities
    ],
    ids=str,
)
def test_training_is_that_of_padded_rows(tmp_path, options):
    ends = []
    for pad_to_longest in (True, False):
        torch.manual_seed(0)
        trainer = tiny.make_trainer(
            Scripted,
            IGPOConfig,
            tmp_path / str(pad_to_longest),
            pad_to_longest=pad_to_longest,
            model=tiny.make_model(initializer_range=0.1),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            learning_rate=0.1,
            optim="sgd",  # proportional to the gradient, so that rounding is not blown up
            **options,
        )
        trainer.train()
        weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        ends.append((weights, trainer.state.log_history[0]))
    (padded, log), (trimmed, other_log) = ends
    before = dict(tiny.make_model(initializer_range=0.1).named_parameters())
    moved = [name for name, value in padded.items() if name in before and (value - before[name]).abs().max() > 1e-5]
    assert moved or "peft_config" in options
    for name, value in padded.items():
        torch.testing.assert_close(trimmed[name], value, atol=2e-6, rtol=1e-4, msg=name)
    assert other_log["loss"] == pytest.approx(log["loss"], abs=1e-5)
    assert other_log["grad_norm"] == pytest.approx(log["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_log_probs_entropies_and_gradients_of_sampled_tokens(tmp_path, family, batch_size):
    model = tiny.make_model(family, initializer_range=0.1)
    trainer = tiny.make_trainer(IGPOTrainer, IGPOConfig, tmp_path, model=model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 300, (3, 21), generator=generator)
    attention_mask = torch.ones(3, 21, dtype=torch.long)
    for row, (left, right) in enumerate([(3, 4), (1, 0), (6, 2)]):
        attention_mask[row, :left] = attention_mask[row, 21 - right :] = 0
    sampled = (torch.rand(3, 12, generator=generator) < 0.5) & attention_mask[:, 9:].bool()
    shapes, gradients, values = [], [], []
    model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    for called in (model, SampledTokensModel(model, backbone_of(model), sampled)):
        model.zero_grad()
        log_probs, entropy, _ = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, called, ids, attention_mask, 12, batch_size=batch_size, compute_entropy=True
        )
        (log_probs * sampled).sum().backward()
        values.append((log_probs * sampled, entropy * sampled))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for expected, actual in zip(*values, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)
    assert shapes[-1][1] < 21  # no column is padding in all rows


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


def test_microbatches_of_a_step_hold_neighbours():
    lengths = [5, 9, 2, 7, 1, 8, 3, 6]
    masks = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    batches = [
        {
            "prompt_mask": torch.ones(2, 1, dtype=torch.long),
            "completion_mask": masks[i : i + 2],
            "names": [f"r{j}" for j in lengths[i : i + 2]],
            "num_items_in_batch": torch.tensor(41),
            "nothing": None,
        }
        for i in range(0, 8, 2)
    ]
    grouped = by_length(batches, 2)
    assert [batch["names"] for batch in grouped] == [["r9", "r7"], ["r5", "r2"], ["r8", "r6"], ["r3", "r1"]]
    assert [batch["completion_mask"].sum(1).tolist() for batch in grouped] == [[9, 7], [5, 2], [8, 6], [3, 1]]
    assert all(batch["num_items_in_batch"] == 41 and batch["nothing"] is None for batch in grouped)
