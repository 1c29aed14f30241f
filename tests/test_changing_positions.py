"""
Position embeddings that change with the length of the sequence (LongRoPE, dynamic NTK): no key that was computed with
others is used again, and every number is that of a plain forward.
"""

import copy
import math

import pytest
import tiny
import torch

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.beliefs import build_probes, score_beliefs
from igpo_trl.beliefs.models import changing_positions
from igpo_trl.beliefs.scorer import BeliefScorer
from igpo_trl.rollout.kv_cache import PrefixCache
from igpo_trl.trajectory import read_jsonl

LIMIT = 48
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 6,
    "long_factor": [4.0, 3.0, 9.0, 2.0, 5.0, 7.0],
    "original_max_position_embeddings": LIMIT,
    "attention_factor": 1.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
MODELS = ["llama", "phi3", "dynamic"]


def make_model(name, limit=LIMIT):
    if name == "dynamic":
        return tiny.make_model("llama", rope_parameters=DYNAMIC, max_position_embeddings=limit)
    rope = LONGROPE | {"original_max_position_embeddings": limit}
    special = {"original_max_position_embeddings": limit} if name == "phi3" else {}
    return tiny.make_model(name, rope_parameters=rope, sliding_window=None, max_position_embeddings=4096, **special)


def plain_belief(model, context, probe):
    """One forward of a model that has seen no other sequence, without the last token, which predicts nothing."""
    ids, fresh = [*context, *probe.token_ids[: probe.answer_end]], copy.deepcopy(model).eval()
    with torch.no_grad():
        log_probs = fresh(torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(dim=-1)
    first = len(context) + probe.answer_start
    return torch.stack([log_probs[k - 1, ids[k]] for k in range(first, len(ids))]).mean()


def plain_beliefs(model, sequences, boundaries, probes):
    return [
        torch.tensor([[plain_belief(model, sequence[:cut], probe) for probe in of_rollout] for cut in cuts])
        for sequence, cuts, of_rollout in zip(sequences, boundaries, probes, strict=True)
    ]


def batch(longest):
    generator = torch.Generator().manual_seed(1)
    tokenizer = tiny.make_tokenizer()
    sequences = [torch.randint(3, 399, (n,), generator=generator).tolist() for n in (longest, longest - 9, 12)]
    boundaries = [[5, longest // 2, longest - 6, longest], [8, longest - 12, longest - 9], [12]]
    return sequences, boundaries, [build_probes(tokenizer, ["Paris", "City of Light"], "{answer}")] * 3


@pytest.mark.parametrize("method", ["auto", "per_turn"])
@pytest.mark.parametrize("longest", [LIMIT - 12, LIMIT, 2 * LIMIT])
@pytest.mark.parametrize("name", MODELS)
def test_beliefs_are_those_of_plain_forwards(name, longest, method):
    model = make_model(name)
    expected = plain_beliefs(model, *batch(longest))
    model(torch.tensor([[1] * 2 * LIMIT]))  # what came before does not matter
    for got, want in zip(score_beliefs(model, *batch(longest), method=method), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0.0)


def test_the_long_positions_matter():
    """Otherwise the tests above could not see that they are forgotten."""
    model, data = make_model("llama"), batch(2 * LIMIT)
    short = make_model("llama", limit=1000)
    apart = [a - b for a, b in zip(plain_beliefs(model, *data), plain_beliefs(short, *data), strict=True)]
    assert apart[0][-1].abs().max() > 0.01 and apart[0][0].abs().max() == 0


@pytest.mark.parametrize("method", ["auto", "packed"])
def test_a_batch_that_is_too_long_changes_nothing_for_the_next(method):
    """The first batch crosses the limit, the second one does not: it is packed, and no batch is refused."""
    model, tokenizer = make_model("llama", limit=100), tiny.make_tokenizer()
    scorer = BeliefScorer(tokenizer, "{answer}", method=method)
    forwards = []
    for longest in (150, 60):
        data = scorer.begin([("Paris", "City of Light")] * 3)
        sequences, boundaries, probes = batch(longest)
        hook = model.register_forward_hook(lambda *_: forwards.append(longest))  # noqa: B023
        got = scorer.score(model, data, sequences, boundaries)
        hook.remove()
        for mine, plain in zip(got, plain_beliefs(model, sequences, boundaries, probes), strict=True):
            torch.testing.assert_close(mine, plain.amax(dim=1), atol=1e-4, rtol=0.0)
    assert forwards.count(60) == 2  # trunks, probes


@pytest.mark.parametrize("name", MODELS)
def test_sampling_is_that_of_a_generation_without_a_cache(name):
    """Turns stay below the limit, cross it in the middle or between two turns, and come back when a row ends."""
    model, plain = make_model(name).eval(), make_model(name).eval()
    generator = torch.Generator().manual_seed(0)
    cache, run = PrefixCache(changing_positions(model)), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: run.append(args[0].numel()))
    rows, reused = {0: [5] * 12, 1: [6] * 9, 2: [7] * 4, 3: [8]}, []
    turns = [((0, 1, 2), 6), ((0, 1, 2), 7), ((0, 1, 2, 3), 3), ((0, 1, 3), 8), ((1, 3), 2), ((3,), 1)]
    for turn, (rollouts, new) in enumerate(turns):
        for i in rollouts:
            rows[i] = rows[i] + torch.randint(3, 399, (1 if i == 3 else new + 2 * i,), generator=generator).tolist()
        width = max(len(rows[i]) for i in rollouts)
        ids = torch.tensor([[0] * (width - len(rows[i])) + rows[i] for i in rollouts])
        mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in rollouts])
        options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
        run.clear()
        with torch.no_grad():
            got = cache.generate(model.generate, model, ids, mask, rollouts, **options)
            expected = plain.generate(input_ids=ids, attention_mask=mask, **options)
        assert torch.equal(got, expected), turn
        reused.append(run[0] < ids.numel())
        for i, sequence in zip(rollouts, got.tolist(), strict=True):
            rows[i] = rows[i] + sequence[width:]
    assert len(rows[3]) < LIMIT < len(rows[1])
    # Phi-3 itself drops a cache that crosses the limit. Dynamic positions are others for every length.
    assert reused == [False, True, True, False, name == "llama", False]


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_training_across_the_limit(tmp_path, name, captures):
    """Turns on both sides: the beliefs are those of plain forwards, whichever cache there was."""

    class Scripted(tiny.Scripted, IGPOTrainer):
        scripts = (
            [tiny.call("Paris"), tiny.call("Rome"), tiny.answer("Paris")],
            [tiny.call("Rome"), tiny.answer("Rome")],
            [tiny.answer("Paris")],
            ["?"],
        )

    tokenizer = tiny.make_tokenizer()
    limit = 545  # the prompts have 480 tokens, the longest rollout 113 more
    model = make_model(name, limit)
    trainer = tiny.make_trainer(
        Scripted,
        IGPOConfig,
        tmp_path,
        model=copy.deepcopy(model),
        processing_class=tokenizer,
        save_trajectories=True,
        belief_method="packed",
        num_iterations=2 if captures else 1,
        max_completion_length=400,
    )
    trainer.train()
    lengths = [len(ids) for ids in trainer.current_step.sequences]
    assert min(lengths) < limit < max(lengths)
    probes = build_probes(tokenizer, ("Paris", "City of Light"))
    step = trainer.current_step
    for i, record in enumerate(read_jsonl(tmp_path / "trajectories" / "rank0.jsonl")):
        if len(record.turns) == 1:
            continue
        (expected,) = plain_beliefs(model, [step.sequences[i]], [step.boundaries[i]], [probes])
        assert record.beliefs == pytest.approx([math.exp(max(row)) for row in expected.tolist()], rel=1e-3)
