"""`importance_sampling_level="turn"`: one ratio per turn, against finite differences and by hand."""

import pytest
import tiny
import torch

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.turns import old_log_probs_of_turn_ratios

# Two rollouts: turns of 3 and 2 tokens around an observation of 2; one turn of 4 tokens, then padding.
MASK = torch.tensor([[1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
PADDING = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
TURNS = [[(0, 3), (5, 7)], [(0, 4)]]
ADVANTAGES = torch.tensor([[0.9] * 3 + [0.0] * 2 + [-2.3] * 2, [1.3] * 4 + [0.0] * 3], dtype=torch.float64)


@pytest.fixture
def trainer(tmp_path):
    def make(**options):
        model = tiny.make_model().double()
        options = {"importance_sampling_level": "turn", "bf16": False, "loss_type": "grpo"} | options
        trainer = tiny.make_trainer(IGPOTrainer, IGPOConfig, tmp_path, model=model, **options)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def make_inputs(trainer, *, off_policy=0.5):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 300, (2, 11), generator=generator)
    inputs = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": torch.ones(2, 4, dtype=torch.long),
        "completion_ids": ids[:, 4:],
        "completion_mask": PADDING,
        "tool_mask": MASK,
        "advantages": ADVANTAGES,
        "num_items_in_batch": torch.tensor(9.0),
    }
    log_probs = policy(trainer.model, inputs).detach()
    noise = torch.randn(log_probs.shape, generator=generator, dtype=torch.float64)
    inputs["ref_per_token_logps"] = log_probs + 0.3 * noise.flip(0)
    if off_policy:
        inputs["old_per_token_logps"] = log_probs + off_policy * noise
    return inputs


def policy(model, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    logits = model(input_ids=ids).logits[:, 3:-1]
    return logits.log_softmax(dim=-1).gather(2, inputs["completion_ids"][:, :, None])[:, :, 0]


def loss_by_hand(log_probs, inputs, *, beta=0.0, epsilon=0.2):
    """GRPO's loss, turn by turn: mean over rollouts of the mean over sampled tokens."""
    of_rollouts = []
    for i, turns in enumerate(TURNS):
        total = 0.0
        for first, end in turns:
            ratio = (log_probs[i, first:end] - inputs["old_per_token_logps"][i, first:end]).mean().exp()
            advantage = inputs["advantages"][i, first]
            gain = torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
            total = total + (end - first) * -gain
            distance = inputs["ref_per_token_logps"][i, first:end] - log_probs[i, first:end]
            total = total + beta * ratio * (distance.exp() - distance - 1).sum()  # `use_bias_correction_kl`
        of_rollouts.append(total / sum(end - first for first, end in turns))
    return torch.stack(of_rollouts).mean()


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_and_gradient_against_finite_differences(trainer, beta):
    trainer = trainer(epsilon=0.5)
    trainer.beta = beta  # as a config option it would load a reference model by name
    inputs = make_inputs(trainer)
    loss = trainer._compute_loss(trainer.model, inputs)
    expected = loss_by_hand(policy(trainer.model, inputs), inputs, beta=beta, epsilon=0.5)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)

    trainer.model.zero_grad()
    loss.backward()
    head = trainer.model.lm_head.weight
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        direction = torch.randn(head.shape, generator=generator, dtype=head.dtype)
        direction /= direction.norm()
        with torch.no_grad():
            sides = []
            for sign in (1, -1):
                head += sign * 1e-4 * direction
                sides.append(loss_by_hand(policy(trainer.model, inputs), inputs, beta=beta, epsilon=0.5))
                head -= sign * 1e-4 * direction
        slope = (sides[0] - sides[1]) / 2e-4
        assert abs(slope) > 1e-4
        torch.testing.assert_close((head.grad * direction).sum(), slope, atol=1e-6, rtol=1e-3)


def test_on_policy_the_gradient_is_that_of_token_ratios(trainer, tmp_path):
    gradients = []
    for level in ("turn", "token"):
        one = trainer(importance_sampling_level=level)
        one._compute_loss(one.model, make_inputs(one, off_policy=0.0)).backward()
        gradients.append(one.model.lm_head.weight.grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-6)


def test_the_credit_of_turns_survives():
    """Advantages 9 and -23 on turns of 23 and 9 tokens sum to 0: one ratio per sequence would have no gradient."""
    mask = torch.tensor([[1] * 23 + [0] + [1] * 9])
    advantages = torch.tensor([[9.0] * 23 + [0.0] + [-23.0] * 9])
    log_probs = torch.zeros(1, 33, requires_grad=True)
    old = torch.linspace(-0.1, 0.1, 33)[None]
    ratio = (log_probs - old_log_probs_of_turn_ratios(log_probs, old, mask)).exp()
    (ratio * advantages * mask).sum().backward()
    first, second = old[0, :23].mean().neg().exp(), old[0, 24:].mean().neg().exp()
    expected = torch.tensor([[9 * first] * 23 + [0.0] + [-23 * second] * 9])
    torch.testing.assert_close(log_probs.grad, expected)


def test_observations_and_padding_keep_their_old_log_probs():
    log_probs, old = torch.rand(2, 7), torch.rand(2, 7)
    changed = old_log_probs_of_turn_ratios(log_probs, old, MASK)
    assert torch.equal(changed[MASK == 0], old[MASK == 0])
    for i, turns in enumerate(TURNS):
        for first, end in turns:
            mean = (log_probs - old)[i, first:end].mean()
            torch.testing.assert_close((log_probs - changed)[i, first:end], mean.expand(end - first))


def test_inputs_of_later_iterations_are_left_alone(trainer):
    trainer = trainer()
    inputs = make_inputs(trainer)
    old = inputs["old_per_token_logps"].clone()
    trainer._compute_loss(trainer.model, inputs)
    assert torch.equal(inputs["old_per_token_logps"], old) and not inputs["old_per_token_logps"].requires_grad


def test_training_with_turn_ratios(tmp_path):
    class Scripted(tiny.Scripted, IGPOTrainer):
        scripts = ([tiny.call("Paris"), tiny.answer("Paris")], [tiny.call("Rome"), tiny.answer("Rome")])

    options = {"importance_sampling_level": "turn", "num_iterations": 2, "max_steps": 2}
    trainer = tiny.make_trainer(Scripted, IGPOConfig, tmp_path, **options)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2 and all(loss == loss for loss in losses)
