import logging
import math

import oracles
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from igpo_trl.beliefs import (
    DEFAULT_TEMPLATE,
    NO_THINK_TEMPLATE,
    AnswerProbe,
    branching,
    build_probes,
    check_beliefs,
    packed_obstacle,
    packing,
    reduce_aliases,
    score_beliefs,
    scoring,
)
from igpo_trl.beliefs.probes import fit_template

FAMILIES = ["qwen3", "gpt2", "mistral", "qwen2_sliding"]  # tests/test_branching.py has them all
VOCABULARY = 400
NATS = 2e-5  # what two ways to compute the same float32 number may differ by,
RELATIVE = 5e-6  # and this much more where an answer is unlikely, and the number large


@pytest.fixture(scope="module")
def models():
    """One model per family, made when first asked for."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny.make_model(family, VOCABULARY).eval()
        return made[family]

    return get


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def probe(prefix, answer, suffix=2, seed=0):
    return AnswerProbe(tokens(prefix + answer + suffix, seed), prefix, prefix + answer)


def ragged_batch():
    """Rollouts that differ in everything: length, number and place of boundaries, aliases, lengths of answers."""
    sequences = [tokens(40, 1), tokens(9, 2), tokens(73, 3), tokens(23, 4)]
    boundaries = [[10, 25, 40], [4], [1, 2, 30, 31, 73], [23, 12]]
    probes = [
        [probe(6, 3, seed=5), probe(6, 1, seed=6)],
        [probe(0, 4, seed=7)],  # the answer follows the context directly
        [probe(3, 1, 0, seed=8), probe(0, 1, 0, seed=9), probe(11, 7, 5, seed=10)],
        [probe(2, 2, seed=11)],
    ]
    return sequences, boundaries, probes


def assert_beliefs(actual, expected, nats=NATS):
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), atol=nats, rtol=RELATIVE)


# --- equal to the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("method", ["packed", "per_turn", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_oracle(models, family, method, batch_size):
    model, batch = models(family), ragged_batch()
    assert_beliefs(score_beliefs(model, *batch, method=method, batch_size=batch_size), oracles.beliefs(model, *batch))


def test_eager_attention_equals_oracle():
    model = tiny.make_model("qwen3", VOCABULARY, attn_implementation="eager")
    assert packed_obstacle(model) is None
    batch = ragged_batch()
    assert_beliefs(score_beliefs(model, *batch, method="packed"), oracles.beliefs(model, *batch))


@st.composite
def rollouts(draw):
    length = draw(st.integers(1, 24))
    boundaries = draw(st.lists(st.integers(1, length), min_size=1, max_size=4))
    probes = draw(
        st.lists(
            st.builds(probe, st.integers(0, 4), st.integers(1, 4), st.integers(0, 2), st.integers(0, 99)),
            min_size=1,
            max_size=2,
        )
    )
    return tokens(length, draw(st.integers(0, 99))), boundaries, probes


@settings(deadline=None, max_examples=30)
@given(st.lists(rollouts(), min_size=1, max_size=3))
def test_any_shape_equals_oracle(batch):
    model = _shared_qwen3()
    batch = tuple(zip(*batch, strict=True))
    expected = oracles.beliefs(model, *batch)
    for method in ("packed", "per_turn"):
        assert_beliefs(score_beliefs(model, *batch, method=method, batch_size=2), expected)


def _shared_qwen3(made=[]):  # noqa: B006  (hypothesis takes no function-scoped fixtures)
    if not made:
        made.append(tiny.make_model("qwen3", VOCABULARY).eval())
    return made[0]


def test_by_hand():
    """
    A model that gives each token the probability of a table, whatever the context: the mean log-prob is that of the
    table's entries. Embedding 0, so all logits are the LM head's bias, made of the logs of 1/2, 1/4, 1/8, 1/8.
    """

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.5, 0.25, 0.125, 0.125]).log())
            self.config = tiny.make_model("qwen3").config

        def forward(self, input_ids, attention_mask=None, use_cache=None):
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(logits=self.bias.expand(*input_ids.shape, -1))

    # Answer tokens 0, 1, 2 between template tokens 3: (log 1/2 + log 1/4 + log 1/8) / 3 = 2 log 1/2.
    probes = [AnswerProbe([3, 0, 1, 2, 3], 1, 4), AnswerProbe([3, 3, 0], 2, 3)]
    (actual,) = score_beliefs(Table(), [[3, 3, 0]], [[1, 3]], [probes])
    torch.testing.assert_close(actual, torch.tensor([[2.0, 1.0], [2.0, 1.0]]) * math.log(0.5))


# --- invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["packed", "per_turn"])
def test_alone_or_in_a_batch(models, method):
    model, (sequences, boundaries, probes) = models("qwen3"), ragged_batch()
    together = score_beliefs(model, sequences, boundaries, probes, method=method, batch_size=4)
    for i, rollout in enumerate(zip(sequences, boundaries, probes, strict=True)):
        (alone,) = score_beliefs(model, *([part] for part in rollout), method=method)
        torch.testing.assert_close(alone, together[i], atol=NATS, rtol=0.0)
    reverse = score_beliefs(model, sequences[::-1], boundaries[::-1], probes[::-1], method=method, batch_size=4)
    for got, want in zip(reverse[::-1], together, strict=True):
        torch.testing.assert_close(got, want, atol=NATS, rtol=0.0)


@pytest.mark.parametrize("method", ["packed", "per_turn"])
def test_mistake_1_a_longer_earlier_batch_changes_nothing(models, method):
    model, batch = models("qwen3"), ragged_batch()
    short = [tokens(5, 1)], [[3, 5]], [[probe(1, 2)]]
    before = score_beliefs(model, *short, method=method)
    score_beliefs(model, *batch, method=method)
    after = score_beliefs(model, *short, method=method)
    assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("method", ["packed", "per_turn"])
def test_only_the_context_and_what_precedes_an_answer_token_count(models, method):
    model, sequence, boundaries = models("qwen3"), tokens(20, 1), [8, 14]
    base = probe(3, 2, 2, seed=5)
    (expected,) = score_beliefs(model, [sequence], [boundaries], [[base]], method=method)

    changed = sequence[:14] + tokens(6, 99)  # after the last boundary
    (actual,) = score_beliefs(model, [changed], [boundaries], [[base]], method=method)
    torch.testing.assert_close(actual, expected, atol=NATS, rtol=0.0)

    suffix = AnswerProbe(base.token_ids[:5] + [7, 8, 9], 3, 5)  # after the answer
    (actual,) = score_beliefs(model, [sequence], [boundaries], [[suffix]], method=method)
    torch.testing.assert_close(actual, expected, atol=NATS, rtol=0.0)

    middle = sequence[:8] + tokens(6, 98) + sequence[14:]  # between the boundaries: the first belief stays
    (actual,) = score_beliefs(model, [middle], [boundaries], [[base]], method=method)
    torch.testing.assert_close(actual[0], expected[0], atol=NATS, rtol=0.0)
    assert (actual[1] - expected[1]).abs().max() > 1e-3

    template = AnswerProbe([7, *base.token_ids[1:]], 3, 5)  # before the answer: both change
    (actual,) = score_beliefs(model, [sequence], [boundaries], [[template]], method=method)
    assert (actual - expected).abs().min() > 1e-3


def test_a_longer_template_is_not_part_of_the_mean(models):
    # The answer's log-prob is the mean over its own tokens: from the probe's [0:2] and [2:3] follows that of [0:3].
    model, context, ids = models("qwen3"), tokens(6), tokens(3, 5)
    probes = [AnswerProbe(ids, 0, 2), AnswerProbe(ids, 2, 3), AnswerProbe(ids, 0, 3)]
    for method in ("packed", "per_turn"):
        (values,) = score_beliefs(model, [context], [[6]], [probes], method=method)
        first, second, whole = values[0].tolist()
        assert whole == pytest.approx((2 * first + second) / 3, abs=NATS)


def test_nothing_to_score(models):
    assert score_beliefs(models("qwen3"), [], [], []) == []
    values = score_beliefs(models("qwen3"), [tokens(4), tokens(4)], [[], [2]], [[probe(1, 1)], []])
    assert [tuple(value.shape) for value in values] == [(0, 1), (1, 0)]


# --- how the model is run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["packed", "per_turn"])
def test_dropout_is_off_and_every_mode_is_restored(method):
    model = tiny.make_model("qwen3", VOCABULARY, attention_dropout=0.5)
    batch = ragged_batch()
    expected = oracles.beliefs(model, *batch)
    model.train()
    model.model.layers[0].eval()  # frozen in eval mode by its owner
    modes = {name: module.training for name, module in model.named_modules()}
    assert_beliefs(score_beliefs(model, *batch, method=method), expected)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_modes_are_restored_after_an_error():
    model = tiny.make_model("qwen3", VOCABULARY).train()
    with pytest.raises(IndexError):
        score_beliefs(model, [[VOCABULARY + 5, 3]], [[2]], [[probe(1, 1)]])
    assert all(module.training for module in model.modules())


def test_no_gradient_is_recorded():
    model = tiny.make_model("qwen3", VOCABULARY).train()
    recording = []
    model.model.register_forward_hook(lambda module, inputs, output: recording.append(output[0].requires_grad))
    for method in ("packed", "per_turn"):
        score_beliefs(model, *ragged_batch(), method=method)
    assert recording
    assert not any(recording)
    assert torch.is_grad_enabled()


def test_packed_runs_the_trajectory_once():
    model = tiny.make_model("qwen3", VOCABULARY)
    widths = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].shape))
    sequence, boundaries = tokens(60), [10, 20, 30, 40, 50, 60]
    score_beliefs(model, [sequence], [boundaries], [[probe(3, 2)]], method="packed")
    # The trunk, then 6 probes of 3 + 2 - 1 tokens: the last answer token predicts nothing that is asked for.
    assert widths == [(1, 60), (1, 24)]
    widths.clear()
    score_beliefs(model, [sequence], [boundaries], [[probe(3, 2)]], method="per_turn")
    assert sum(rows * width for rows, width in widths) >= sum(boundaries)


@pytest.mark.parametrize("method", ["packed", "per_turn"])
def test_softmax_is_in_float32_for_a_bfloat16_model(method):
    model, batch = tiny.make_model("qwen3", VOCABULARY).to(torch.bfloat16), ragged_batch()
    # What bfloat16 rounds in the hidden states may differ (a few hundredths of a nat); the softmax adds nothing to it.
    assert_beliefs(score_beliefs(model, *batch, method=method), oracles.beliefs(model, *batch), nats=0.15)

    # One token of context, one answer token after it: the same bfloat16 logits either way.
    ids = torch.tensor([[5]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    assert logits.dtype == torch.bfloat16
    (actual,) = score_beliefs(model, [[5]], [[1]], [[AnswerProbe([9], 0, 1)]], method="per_turn")
    assert actual.item() == pytest.approx(torch.log_softmax(logits.float(), -1)[9].item(), abs=1e-6)
    # In bfloat16 the softmax itself would have been wrong by more than that.
    assert abs(torch.log_softmax(logits, -1)[9].item() - actual.item()) > 1e-4


def test_mistake_17_every_process_makes_the_same_number_of_forwards(models):
    model, batch = models("qwen3"), ragged_batch()
    count = [0]
    hook = model.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    expected = score_beliefs(model, *batch, method="packed", batch_size=2)
    own = count[0]
    assert own == 4  # trunk and probes of each of two batches
    count[0] = 0
    asked = []

    def synchronize(forwards):
        asked.append(forwards)
        return 7  # another process makes seven forwards

    actual = score_beliefs(model, *batch, method="packed", batch_size=2, synchronize=synchronize)
    assert asked == [own]
    assert count[0] == 7
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)
    # A process without anything to score takes part all the same.
    count[0] = 0
    assert score_beliefs(model, [], [], [], method="packed", synchronize=lambda forwards: 3) == []
    assert count[0] == 3
    hook.remove()


def test_peft_model_is_packed():
    peft = pytest.importorskip("peft")
    model = tiny.make_model("qwen3", VOCABULARY)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert packed_obstacle(model) is None
    batch = ragged_batch()
    expected = oracles.beliefs(model, *batch)
    assert_beliefs(score_beliefs(model, *batch, method="packed"), expected)
    with model.disable_adapter():
        other = oracles.beliefs(model, *batch)
    assert abs(other[0][0][0] - expected[0][0][0]) > 1e-3  # the adapter is part of the policy


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("method", ["packed", "per_turn"])
@pytest.mark.parametrize("change", [checkpointed, compiled])
def test_a_changed_model_in_training_equals_oracle(change, method):
    plain, batch = tiny.make_model("qwen3", VOCABULARY), ragged_batch()
    expected = oracles.beliefs(plain, *batch)
    model = change(plain.train())
    assert_beliefs(score_beliefs(model, *batch, method=method), expected)
    assert all(module.training for module in model.modules())


def test_a_compiled_model_is_run_as_it_was(monkeypatch):
    model = compiled(tiny.make_model("qwen3", VOCABULARY))
    monkeypatch.setattr(type(model), "__call__", None)  # graphs would be made anew for the shapes of every batch
    score_beliefs(model, *ragged_batch())


@pytest.mark.parametrize("method", ["packed", "per_turn"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast(method, attention):
    model = tiny.make_model("qwen3", VOCABULARY, initializer_range=0.1, attn_implementation=attention)
    batch, dtypes = ragged_batch(), set()
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        expected = oracles.beliefs(model, *batch)
        assert check_beliefs(model, *batch) is None
        assert_beliefs(score_beliefs(model, *batch, method=method), expected, nats=0.05)
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("method", ["packed", "per_turn"])
@pytest.mark.parametrize("tied", [False, True])
def test_lm_head_in_float32_as_trl_casts_it(tmp_path, method, tied):
    from trl import GRPOConfig, GRPOTrainer

    # Where the embeddings are tied, they are float32 as well, and the layers between them are not.
    model = tiny.make_model("qwen3", VOCABULARY, initializer_range=0.1, tie_word_embeddings=tied).to(torch.bfloat16)
    trainer = tiny.make_trainer(
        GRPOTrainer,
        GRPOConfig,
        tmp_path,
        model=model,
        cast_lm_head_to_fp32=True,
        tools=None,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )
    assert trainer.model.lm_head.weight.dtype == torch.float32
    assert trainer.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    batch = ragged_batch()
    expected = oracles.beliefs(trainer.model, *batch)
    assert_beliefs(score_beliefs(trainer.model, *batch, method=method), expected, nats=0.05)
    assert check_beliefs(trainer.model, *batch) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundaries": [[1], [2]]}, "got 1, 2 and 1"),
        ({"boundaries": [[5]]}, "Rollout 0 has 4 tokens, got the boundary 5"),
        ({"boundaries": [[-1]]}, "got the boundary -1"),
        ({"boundaries": [[0]], "probes": [[probe(0, 1)]]}, "needs a context"),
        ({"method": "fast"}, "got 'fast'"),
    ],
)
def test_errors(models, change, message):
    arguments = {"sequences": [tokens(4)], "boundaries": [[2]], "probes": [[probe(1, 1)]]} | change
    with pytest.raises(ValueError, match=message):
        score_beliefs(models("qwen3"), **arguments)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (2, 2), (3, 2), (0, 4), (-1, 2)])
def test_probe_rejects_an_empty_or_outside_span(start, end):
    with pytest.raises(ValueError, match="3 tokens"):
        AnswerProbe([1, 2, 3], start, end)


# --- nothing twice, and bounded --------------------------------------------------------------------------------------


def forwards_of(model, run):
    """Shape of the input of every forward, and how many rows of hidden states each sent through the LM head."""
    shapes, logits = [], []
    handles = [
        model.get_input_embeddings().register_forward_hook(
            lambda _, inputs, __: shapes.append(tuple(inputs[0].shape))
        ),
        model.lm_head.register_forward_hook(lambda _, inputs, __: logits.append(inputs[0].shape[:-1].numel())),
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return shapes, logits


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 100, 10_000])
@pytest.mark.parametrize("method", ["packed", "per_turn"])
def test_a_budget_in_tokens(models, method, tokens_per_batch):
    model, batch = models("qwen3"), ragged_batch()
    actual = []
    options = {"method": method, "tokens_per_batch": tokens_per_batch}
    shapes, _ = forwards_of(model, lambda: actual.extend(score_beliefs(model, *batch, **options)))
    assert_beliefs(actual, oracles.beliefs(model, *batch))
    longest = max(max(bounds) + 20 for bounds in batch[1])  # a single row may be longer than the budget
    assert all(rows * width <= tokens_per_batch or (rows == 1 and width <= longest) for rows, width in shapes)
    if method == "packed":
        # From a forward for each of 4 trunks and 6 + 1 + 15 + 2 probes to one for all trunks and one for all probes.
        assert {1: 28, 30: 13, 100: 7, 10_000: 2}[tokens_per_batch] == len(shapes)


def test_trunks_of_different_lengths_are_not_padded_to_the_longest(models, monkeypatch):
    monkeypatch.setattr(packing, "_ENOUGH_TOKENS", 190)
    model, lengths = models("qwen3"), [100, 20, 95, 50, 48, 21]
    batch = [tokens(length, seed=length) for length in lengths], [[n // 2, n] for n in lengths], [[probe(3, 2)]] * 6
    actual = []
    shapes, _ = forwards_of(model, lambda: actual.extend(score_beliefs(model, *batch, method="packed")))
    assert shapes[::2] == [(2, 100), (4, 50)]  # a forward of trunks, then one of their probes; few tokens share one
    assert_beliefs(actual, oracles.beliefs(model, *batch))


@settings(deadline=None, max_examples=30)
@given(st.lists(rollouts(), min_size=1, max_size=4), st.integers(1, 80))
def test_any_budget_equals_oracle(batch, tokens_per_batch):
    model = _shared_qwen3()
    batch = tuple(zip(*batch, strict=True))
    expected = oracles.beliefs(model, *batch)
    for method in ("packed", "per_turn"):
        assert_beliefs(score_beliefs(model, *batch, method=method, tokens_per_batch=tokens_per_batch), expected)


@pytest.mark.parametrize(("limit", "value"), [("_MASK_ELEMENTS", 20_000), ("_LOGITS", 20_000), ("_NODES", 50)])
@pytest.mark.parametrize("method", ["packed", "per_turn"])
def test_masks_and_logits_are_bounded_however_many_turns(models, monkeypatch, method, limit, value):
    model, sequence, boundaries = models("qwen3"), tokens(100), list(range(1, 101))
    batch = [sequence], [boundaries], [[probe(3, 4)]]
    expected = score_beliefs(model, *batch, method=method)
    monkeypatch.setattr(packing, limit, value)
    masks, make = [], branching._masks
    monkeypatch.setattr(branching, "_masks", lambda *arguments: masks.append(make(*arguments)) or masks[-1])
    actual = []
    shapes, logits = forwards_of(model, lambda: actual.extend(score_beliefs(model, *batch, method=method)))
    torch.testing.assert_close(actual[0], expected[0], atol=NATS, rtol=0.0)
    if limit == "_LOGITS":
        assert max(logits) * VOCABULARY <= value
    elif method == "packed":
        sizes = [mask["full_attention"].shape[-2:] for mask in masks]
        assert len(sizes) > 2
        assert max(size[0] if limit == "_NODES" else size.numel() for size in sizes) <= value
        # The first forward has the shortest contexts, and no keys of tokens that none of them holds.
        assert [keys - width for width, keys in sizes] == sorted({keys - width for width, keys in sizes})
        assert sizes[-1][1] - sizes[-1][0] == 100 > sizes[0][1] - sizes[0][0]


def test_what_probes_begin_with_in_common_is_run_once(models):
    model, base = models("qwen3"), tokens(9, 1)
    # Three aliases after 6 template tokens, with 3, 3 and 1 tokens, the last of which predict nothing.
    aliases = [[4, 5, 6], [4, 5, 7], [8]]
    probes = [AnswerProbe([*base[:6], *alias, 3], 6, 6 + len(alias)) for alias in aliases]
    batch = [tokens(30)], [[10, 30]], [probes]
    actual = []
    shapes, logits = forwards_of(model, lambda: actual.extend(score_beliefs(model, *batch, method="packed")))
    assert_beliefs(actual, oracles.beliefs(model, *batch))
    assert shapes == [(1, 30), (1, 2 * 8)]  # six of the template, 4 and 5
    assert logits == [2 * 3]  # after the template, after 4, after 5


def test_equal_probes_after_equal_contexts_are_run_once(models):
    """The rollouts of a group have one prompt; a boundary or an alias may come twice; a rollout may be there twice."""
    model, prompt = models("qwen3"), tokens(10, 1)
    sequences = [prompt + tokens(10, 2), prompt + tokens(6, 3), prompt + tokens(10, 2)]
    boundaries = [[10, 20, 20], [10, 16], [10, 20]]
    twice = [probe(2, 2, 0), probe(2, 2, 5)]  # tokens after the answer do not count
    batch = sequences, boundaries, [twice, [probe(2, 2)], [probe(2, 2)]]
    actual = []
    shapes, _ = forwards_of(model, lambda: actual.extend(score_beliefs(model, *batch, method="packed")))
    assert_beliefs(actual, oracles.beliefs(model, *batch))
    assert shapes == [
        (2, 20),
        (2, 6),
    ]  # two rollouts; after the prompt and the end of the first, the end of the second
    shapes, _ = forwards_of(model, lambda: score_beliefs(model, *batch, method="per_turn"))
    assert shapes == [(3, 23)]


# --- the self-check --------------------------------------------------------------------------------------------------


def one_column_off(monkeypatch, model):
    """A mask that shows each probe one token too many."""
    honest = branching._masks

    def masks(config, nodes, *rest):
        return honest(config, nodes._replace(limits=nodes.limits + 1), *rest)

    monkeypatch.setattr(branching, "_masks", masks)


def positions_ignored(monkeypatch, model):
    def drop(module, arguments, options):
        return arguments, options | {"position_ids": None}

    model.register_forward_pre_hook(drop, with_kwargs=True)


def not_a_number(monkeypatch, model):
    def spoil(module, arguments, options):
        if "position_ids" in options:
            module.lm_head.weight.data.fill_(torch.nan)

    model.register_forward_pre_hook(spoil, with_kwargs=True)


@pytest.mark.parametrize("sabotage", [one_column_off, positions_ignored])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_check_finds_what_packing_gets_wrong(monkeypatch, caplog, family, sabotage):
    model, batch = tiny.make_model(family, VOCABULARY).train(), ragged_batch()
    assert check_beliefs(model, *batch) is None
    assert not caplog.records
    expected = oracles.beliefs(model, *batch)
    sabotage(monkeypatch, model)
    reason = check_beliefs(model, *batch)
    assert "differ from those of plain forwards" in reason
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert reason in caplog.text
    assert all(module.training for module in model.modules())
    assert_beliefs(score_beliefs(model, *batch, method="per_turn"), expected)  # the way out is exact
    assert check_beliefs(model, [], [], []) is not None  # found on made-up tokens as well


def test_check_does_not_take_nan_for_agreement(monkeypatch):
    model = tiny.make_model("qwen3", VOCABULARY)
    not_a_number(monkeypatch, model)
    assert "by nan nats" in check_beliefs(model, *ragged_batch())


def test_check_names_what_packing_cannot_do():
    model = tiny.make_model("qwen3", VOCABULARY)
    model.config.model_type = "mamba"
    assert "mamba" in check_beliefs(model, *ragged_batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_check_takes_rounding_for_rounding(dtype):
    model = tiny.make_model("qwen3", VOCABULARY, initializer_range=0.1).to(dtype)
    batch = [tokens(73)], [[73]], [[probe(3, 4)]]
    assert check_beliefs(model, *batch) is None
    assert check_beliefs(model, *batch, tolerance=1e-7) is not None


def answers(*maxima):
    """Maxima over processes, in turn."""
    left = list(maxima)
    return lambda number: left.pop(0)


def test_check_is_in_step_across_processes(models):
    model, count = models("qwen3"), []
    hook = model.register_forward_hook(lambda *_: count.append(1))
    for batch in (ragged_batch(), ([], [], []), ([tokens(3)], [[1]], [[probe(1, 1)]])):
        count.clear()
        assert check_beliefs(model, *batch, synchronize=lambda number: number) is None
        assert len(count) == 4
        # Another process has found that they differ, or cannot pack at all.
        assert "another process" in check_beliefs(model, *batch, synchronize=answers(0, 1))
        assert "another process" in check_beliefs(model, *batch, synchronize=answers(1))
    hook.remove()


def test_the_choice_is_logged_once_with_its_reason(caplog, models):
    scoring._log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="igpo_trl")
    for _ in range(2):
        score_beliefs(models("qwen3"), *ragged_batch())
    assert [record.getMessage() for record in caplog.records] == [
        "Beliefs are scored packed: Qwen3ForCausalLM can branch its cache."
    ]
    caplog.clear()
    model = tiny.make_model("qwen3", VOCABULARY)
    model.config._attn_implementation = "unheard_of"
    model.forward = models("qwen3").forward
    for _ in range(2):
        score_beliefs(model, *ragged_batch())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'unheard_of'" in record.getMessage()


# --- probes from text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, NO_THINK_TEMPLATE, "The answer is {answer}.", "{answer}"])
@pytest.mark.parametrize("answer", ["Paris", "the author", "x", "Beyoncé", "3.14", "東京"])
def test_probe_is_the_rendered_template(template, answer):
    tokenizer = tiny.make_tokenizer()
    (made,) = build_probes(tokenizer, [answer], template)
    assert tokenizer.decode(made.token_ids) == template.replace("{answer}", answer)
    span = tokenizer.decode(made.token_ids[made.answer_start : made.answer_end])
    assert span.removeprefix(" ") == answer  # a space before the answer may be merged with it, nothing else
    assert answer not in tokenizer.decode(made.token_ids[: made.answer_start])


def test_probe_of_an_answer_that_merges_with_the_template():
    # " Paris" is one piece for a tokenizer that merges the space: the merged tokens are the answer's.
    tokenizer = tiny.make_tokenizer()
    (made,) = build_probes(tokenizer, ["Paris"], "It is {answer}")
    assert tokenizer.decode(made.token_ids[made.answer_start : made.answer_end]) == " Paris"


def test_answer_that_looks_like_the_template():
    tokenizer = tiny.make_tokenizer()
    (made,) = build_probes(tokenizer, ["answer"], "<answer>{answer}</answer>")
    assert tokenizer.decode(made.token_ids[: made.answer_start]) == "<answer>"


@pytest.mark.parametrize("template", ["no slot", "{answer} {answer}", "{answers}", ""])
def test_template_needs_one_slot(template):
    with pytest.raises(ValueError, match="exactly once"):
        build_probes(tiny.make_tokenizer(), ["Paris"], template)


def test_empty_answer_is_an_error():
    with pytest.raises(ValueError, match="''"):
        build_probes(tiny.make_tokenizer(), [""], DEFAULT_TEMPLATE)


def test_long_answers_are_cut_with_one_warning(caplog):
    tokenizer, answers = tiny.make_tokenizer(), ["Paris is the capital of France", "Rome is the capital of Italy", "x"]
    whole = build_probes(tokenizer, answers)
    caplog.set_level(logging.WARNING, logger="igpo_trl")
    cut = build_probes(tokenizer, answers, max_answer_tokens=3)
    for before, after in zip(whole, cut, strict=True):
        assert after.token_ids == before.token_ids
        assert after.answer_start == before.answer_start
        assert after.answer_end == min(before.answer_end, before.answer_start + 3)
    assert whole[0].answer_end - whole[0].answer_start > 3
    assert len(caplog.records) == 1
    assert "more than 3 tokens" in caplog.text


def test_thought_is_not_opened_twice():
    assert fit_template(DEFAULT_TEMPLATE, "<|im_start|>assistant\n") == DEFAULT_TEMPLATE
    opened = fit_template(DEFAULT_TEMPLATE, "<|im_start|>assistant\n<think>\n")
    assert opened == DEFAULT_TEMPLATE.removeprefix("<think>\n")
    closed = fit_template(DEFAULT_TEMPLATE, "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert closed == NO_THINK_TEMPLATE
    assert fit_template(NO_THINK_TEMPLATE, "<|im_start|>assistant\n<think>\n\n</think>\n\n") == NO_THINK_TEMPLATE


def test_alias_reductions_by_hand():
    log_probs = torch.tensor([[0.5, 0.25], [0.1, 0.3]]).log()
    torch.testing.assert_close(reduce_aliases(log_probs, "max").exp(), torch.tensor([0.5, 0.3]))
    torch.testing.assert_close(reduce_aliases(log_probs, "mean").exp(), torch.tensor([0.375, 0.2]))
    torch.testing.assert_close(reduce_aliases(log_probs, "first").exp(), torch.tensor([0.5, 0.1]))
    with pytest.raises(ValueError, match="got 'min'"):
        reduce_aliases(log_probs, "min")


def test_a_gpu_runs_more_probes_in_a_forward():
    targets = [packing.Target(limit, [1] * 20, [1], []) for limit in range(100, 200)]
    unit = packing.Unit(list(range(200)), targets)
    forwards = [
        packing.pack_trunks([unit], packing.ForwardBudget(16384, None, 300, on_gpu)) for on_gpu in (False, True)
    ]
    assert [len(batch.chunks) for (batch,) in forwards] == [9, 1]
