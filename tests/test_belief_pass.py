"""Beliefs against the keys and values of other forwards, which turns they are scored before, and what is logged."""

import copy
import itertools
import logging
import math
import re

import oracles
import pytest
import tiny
import torch
import trl.trainer.grpo_trainer
from datasets import Dataset
from peft import LoraConfig
from test_beliefs import assert_beliefs, probe, ragged_batch, tokens
from transformers import DynamicCache
from trl import GRPOConfig, GRPOTrainer

import igpo_trl.beliefs.scorer
import igpo_trl.rollout.loop
import igpo_trl.step
from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.beliefs import CachedContexts, cached_obstacle, score_beliefs, scoring
from igpo_trl.beliefs.models import cache_argument
from igpo_trl.training.counterfactuals import reads_of
from igpo_trl.trajectory import read_jsonl
from igpo_trl.turns import gain_spans

MARKERS = tiny.make_tokenizer().convert_tokens_to_ids(tiny.MARKERS)
ROTARY = ["qwen3", "llama", "mistral", "qwen2_sliding"]


class Scripted(tiny.Scripted, IGPOTrainer):
    pass


@pytest.fixture
def searching(monkeypatch):
    """Whatever a random policy samples, it makes as many searches as its question has for its number."""

    def parse(tokenizer, ids, prefix=None, tools=None):
        text = tokenizer.decode(prefix)
        left = int(re.findall(r"number (\d)", text)[-1])
        query = f"q{sum(ids) % 9} number {left - 1}"
        calls = [{"type": "function", "function": {"name": "search", "arguments": {"query": query}}}]
        return {"role": "assistant", "content": ""} | ({} if left == 0 else {"tool_calls": calls})

    monkeypatch.setattr(trl.trainer.grpo_trainer, "parse_response", parse)
    monkeypatch.setattr(igpo_trl.rollout.loop, "parse_response", parse)


def dataset(count=8):
    # With two rollouts to a question, questions come as 0 0 1 1: the last word varies by question alone.
    prompts = [[{"role": "user", "content": f"{'long ' * n} question number {n}"}] for n in (3, 1) * (count // 2)]
    return Dataset.from_dict({"prompt": prompts, "answers": [["Paris", "City of Light"]] * count})


def make(tmp_path, trainer_class=IGPOTrainer, config_class=IGPOConfig, **options):
    family = options.pop("family", "qwen3")
    no_dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    defaults = {
        "model": tiny.make_model(family, **no_dropout),
        "train_dataset": dataset(),
        "seed": 1,
        "max_completion_length": 500,
        "reward_funcs": lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        # A random policy may write half a call, which is answered with an error.
        "generation_kwargs": {"do_sample": True, "max_new_tokens": 6, "top_k": None, "suppress_tokens": MARKERS},
        "shuffle_dataset": False,
    }
    return tiny.make_trainer(trainer_class, config_class, tmp_path, **defaults | options)


@pytest.fixture
def scored(monkeypatch):
    """What the belief pass returns for each batch, and a slow oracle's scores at the weights of the moment."""
    batches, score = [], igpo_trl.beliefs.scorer.BeliefScorer.score

    def record(self, model, batch, sequences, boundaries):
        expected = oracles.beliefs(model, sequences, boundaries, batch.probes)
        found = len(batch.memo)
        values = score(self, model, batch, sequences, boundaries)
        best = [[max(aliases) for aliases in rollout] for rollout in expected]
        batches.append((sequences, boundaries, [v.tolist() for v in values], best, found))
        return values

    monkeypatch.setattr(igpo_trl.beliefs.scorer.BeliefScorer, "score", record)
    return batches


@pytest.fixture
def trunks(monkeypatch):
    """Forwards that the belief pass makes for keys and values alone."""
    runs, run = [], scoring.run_trunk

    def count(model, contexts):
        runs.append(len(contexts))
        return run(model, contexts)

    monkeypatch.setattr(scoring, "run_trunk", count)
    return runs


def assert_right(scored, tolerance=2e-5):
    assert any(boundaries for _, boundaries, *_ in scored)
    for _, boundaries, actual, expected, _ in scored:
        assert [len(row) for row in actual] == [len(row) for row in boundaries]
        for got, want in zip(actual, expected, strict=True):
            assert got == pytest.approx(want, abs=tolerance)


# --- keys and values that are there ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dropout"),
    [("qwen3", None), ("qwen3", 0.0), ("gpt2", None), pytest.param("qwen3", 0.5, id="rollouts have no dropout")],
)
def test_the_cache_of_the_rollout_is_scored_against(tmp_path, searching, scored, trunks, family, dropout):
    adapter = None
    if dropout is not None:
        modules = ["q_proj", "v_proj"]
        adapter = LoraConfig(r=4, target_modules=modules, init_lora_weights=False, lora_dropout=dropout)
    trainer = make(tmp_path, family=family, peft_config=adapter, max_steps=1)
    trainer.train()
    assert len(scored) == 1
    assert_right(scored)
    assert any(len(row) > 2 for _, boundaries, *_ in scored for row in boundaries)
    # The first batch is scored anew and compared; after it no forward is made for a trunk.
    first = len(trunks)
    assert first > 0
    trainer.train()
    assert len(scored) == 2
    assert len(trunks) == first
    assert all(found > 0 for *_, found in scored)
    assert_right(scored)


@pytest.mark.parametrize(
    ("family", "temperature"), [("qwen3", 1.0), ("qwen3", 0.7), ("mistral", 0.7), ("qwen2_sliding", 1.0)]
)
def test_the_forward_of_the_old_log_probs_is_scored_against(
    tmp_path, searching, scored, trunks, monkeypatch, family, temperature
):
    logps = {GRPOTrainer: [], IGPOTrainer: []}
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (IGPOTrainer, IGPOConfig)):
        own = {"reuse_prefixes": False} if config_class is IGPOConfig else {}
        trainer = make(
            tmp_path,
            trainer_class,
            config_class,
            family=family,
            temperature=temperature,
            num_iterations=2,
            max_steps=4,
            learning_rate=0.0,
            **own,
        )
        generate = trainer._generate_and_score_completions

        def record(inputs, generate=generate, seen=logps[trainer_class]):
            output = generate(inputs)
            sampled = output["completion_mask"] * output["tool_mask"]
            seen.append((output["completion_ids"], output["old_per_token_logps"] * sampled))
            return output

        trainer._generate_and_score_completions = record
        torch.manual_seed(7)
        trainer.train()
    assert len(scored) == 2
    assert_right(scored)
    assert 0 < len(trunks) <= 2  # of the first batch, which is compared
    assert all(found > 0 for *_, found in scored)
    for (ids, expected), (same_ids, actual) in zip(*logps.values(), strict=True):
        assert (ids == same_ids).all()
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_reference_forwards_are_not_taken_for_those_of_the_policy(tmp_path, searching, scored):
    """The reference model of an adapter is the same model with the adapter off."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make(tmp_path, reuse_prefixes=False, beta=0.1, peft_config=adapter, max_steps=1)
    trainer.train()
    assert [found for *_, found in scored] == [0]
    trainer = make(tmp_path, reuse_prefixes=False, beta=0.1, peft_config=adapter, num_iterations=2, max_steps=1)
    trainer.train()
    assert scored[1][-1] > 0
    assert_right(scored)


def test_learned_positions_count_padding_in_the_old_log_probs(tmp_path, searching, scored):
    trainer = make(tmp_path, family="gpt2", reuse_prefixes=False, num_iterations=2, max_steps=2)
    trainer.train()
    assert [found for *_, found in scored] == [0]
    assert_right(scored)


def test_dropout_is_off_in_the_belief_pass(tmp_path, searching, scored):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    trainer = make(tmp_path, peft_config=adapter, reuse_prefixes=False, num_iterations=2, max_steps=2)
    trainer.train()
    assert [found for *_, found in scored] == [0]  # the forward for the old log-probabilities has dropout
    assert_right(scored)


def test_cached_obstacles():
    model = tiny.make_model("qwen3").train()
    assert cached_obstacle(model) is None
    model.config.attention_dropout = 0.1
    assert cached_obstacle(model) == "dropout was on"
    assert cached_obstacle(model.eval()) is None
    assert "absolute" in cached_obstacle(tiny.make_model("gpt2").eval(), offset=True)
    assert cached_obstacle(tiny.make_model("gpt2").eval()) is None


def test_wrong_keys_and_values_are_found_and_not_used(tmp_path, searching, scored, monkeypatch, caplog):
    class Shifted(CachedContexts):
        def trunk(self, rollouts):
            trunk = super().trunk(rollouts)
            trunk.padding = [skip + 1 for skip in trunk.padding]
            return trunk

    monkeypatch.setattr(igpo_trl.step, "CachedContexts", Shifted)
    trainer = make(tmp_path, max_steps=3)
    with caplog.at_level(logging.WARNING, "igpo_trl.beliefs.scorer"):
        trainer.train()
    assert "forwards of their own" in caplog.text
    assert [found > 0 for *_, found in scored] == [True, False, False]
    assert_right(scored)


def left_padded(model, batch, slots):
    """A cache as another forward leaves it: rows in another order, left padding, tokens behind the contexts."""
    sequences = [[*sequence, 5, 6] for sequence in batch[0]][::-1]
    width = max(map(len, sequences)) + slots
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in sequences])
    ids = torch.tensor([[0] * (width - len(row)) + row for row in sequences])
    cache = DynamicCache()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{cache_argument(model): cache},
        )
    padding = [width - len(row) for row in sequences]
    rows = list(range(len(sequences)))[::-1]
    return CachedContexts(cache, rows, padding[::-1], [0] * len(rows))


@pytest.mark.parametrize("tokens_per_batch", [30, 10_000])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*ROTARY, "gpt2"])
def test_any_cache_equals_oracle(family, attention, tokens_per_batch):
    model, batch = tiny.make_model(family, attn_implementation=attention).eval(), ragged_batch()
    cached = left_padded(model, batch, 3)
    before = [layer.keys.clone() for layer in cached.cache.layers]
    actual = score_beliefs(model, *batch, cached=cached, tokens_per_batch=tokens_per_batch)
    assert_beliefs(actual, oracles.beliefs(model, *batch))
    for layer, keys in zip(cached.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)  # it is left as it was


def test_nothing_is_scored_twice():
    model, batch = tiny.make_model("qwen3"), ragged_batch()
    expected, memo, ran = oracles.beliefs(model, *batch), {}, []
    model.register_forward_hook(lambda *_: ran.append(1))
    half = tuple(part[:2] for part in batch)
    assert_beliefs(score_beliefs(model, *half, memo=memo), expected[:2])
    once = len(ran)
    assert_beliefs(score_beliefs(model, *half, memo=memo), expected[:2])
    assert len(ran) == once > 0
    assert_beliefs(score_beliefs(model, *batch, memo=memo), expected)
    assert len(ran) > once


def test_the_prompt_of_a_group_is_scored_in_the_first_round_alone():
    model, prompt = tiny.make_model("qwen3").eval(), tokens(10, 1)
    batch = [prompt + tokens(6, 2), prompt + tokens(8, 3)], [[10, 16], [10, 18]], [[probe(3, 2)]] * 2
    cache, *rows = left_padded(model, batch, 3)
    memo, shapes = {}, []
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: shapes.append(tuple(ids[0].shape)))
    for i, expected in enumerate(oracles.beliefs(model, *batch)):
        shapes.clear()
        cached = CachedContexts(cache, *(values[i : i + 1] for values in rows))
        actual = score_beliefs(model, *(part[i : i + 1] for part in batch), cached=cached, memo=memo)
        assert_beliefs(actual, [expected])
        assert shapes == [(1, 2 * 4), (1, 4)][i : i + 1]  # the last of a probe's five tokens predicts nothing of it


def test_what_cannot_branch_is_not_scored_against_a_cache():
    model, batch = tiny.make_model("qwen3").eval(), ragged_batch()
    cached = left_padded(model, batch, 0)
    model.config.model_type = "unknown"
    with pytest.raises(ValueError, match="unknown"):
        score_beliefs(model, *batch, cached=cached)


# --- which turns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_turns", "every", "expected"),
    [
        (1, 1, []),
        (2, 1, [(0, 1)]),
        (4, 1, [(0, 1), (1, 2), (2, 3)]),
        (4, 2, [(0, 2), (2, 3)]),
        (5, 2, [(0, 2), (2, 4)]),
        (4, 9, [(0, 3)]),
        (1, 3, []),
    ],
)
def test_spans_by_hand(num_turns, every, expected):
    assert gain_spans(num_turns, every=every) == expected


def test_spans_of_some_tools_by_hand():
    called = [("search",), ("calculate",), ("calculate", "search"), ()]
    assert gain_spans(5, called, tools=["search"]) == [(0, 1), (2, 3)]
    assert gain_spans(5, called, tools=["calculate"], every=2) == [(0, 2), (2, 4)]
    assert gain_spans(5, called, tools=["search"], every=3) == [(0, 3)]
    assert gain_spans(5, called, tools=["browse"]) == []
    assert gain_spans(3, [], tools=["search"]) == []  # nobody knows what was called


def calculate(expression: str) -> str:
    """
    Calculates.

    Args:
        expression: What to calculate.

    Returns:
        A number.
    """
    return "42"


@pytest.mark.parametrize(
    ("options", "gains"),
    [
        ({}, [[True, True, True, None], [True, None]]),
        ({"info_gain_every": 2}, [[None, True, True, None], [True, None]]),
        ({"info_gain_tools": ["search"]}, [[True, None, True, None], [None, None]]),
        ({"info_gain_tools": ["calculate"]}, [[None, True, None, None], [True, None]]),
        ({"info_gain_tools": ["search"], "info_gain_every": 2}, [[None, True, True, None], [None, None]]),
    ],
)
def test_which_turns_get_a_gain(tmp_path, scored, options, gains):
    search, calculation = (
        tiny.call("Paris"),
        '<tool_call>\n{"name": "calculate", "arguments": {"expression": "1"}}\n</tool_call>',
    )
    trainer = tiny.make_trainer(
        Scripted,
        IGPOConfig,
        tmp_path,
        tools=[tiny.search, calculate],
        per_device_train_batch_size=2,
        save_trajectories=True,
        max_completion_length=600,
        max_steps=1,
        **options,
    )
    trainer.scripts = [[search, calculation, search, tiny.answer("Paris")], [calculation, tiny.answer("Rome")]]
    trainer.train()
    records = list(read_jsonl(tmp_path / "trajectories" / "rank0.jsonl"))
    for record, expected in zip(records, gains, strict=True):
        assert [turn.info_gain is not None or None for turn in record.turns] == expected
        known = [turn.belief for turn in record.turns]
        # A gain is the difference of the beliefs at the ends of its span.
        since = known[0]
        for turn, after in itertools.pairwise(record.turns):
            if turn.info_gain is not None and options.get("info_gain_tools") is None:
                assert turn.info_gain == pytest.approx(after.belief - since, abs=1e-6)
                since = after.belief
    assert_right(scored)
    if options.get("info_gain_tools") == ["search"] and "info_gain_every" not in options:
        assert [len(row) for row in scored[0][1]] == [4, 0]  # the second has no gain: nothing is scored


def test_tools_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match="names browse, got the tools search"):
        make(tmp_path, info_gain_tools=["browse"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"info_gain_every": 0}, "`info_gain_every` must be at least 1, got 0"),
        ({"info_gain_tools": []}, "must be a list of tool names"),
        ({"info_gain_tools": "search"}, "must be a list of tool names"),
        ({"info_gain_every": 2, "normalization": "critic"}, "reads the belief before every turn"),
        ({"info_gain_tools": ["search"], "normalization": "critic"}, "reads the belief before every turn"),
    ],
)
def test_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        IGPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [False, True])
def test_beliefs_at_evaluation(tmp_path, searching, scored, wanted):
    trainer = make(tmp_path, eval_dataset=dataset(4), belief_at_eval=wanted, num_generations_eval=1)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    assert len(scored) == wanted
    assert ("eval_belief/final" in logged) == ("eval_info_gain/mean" in logged) == wanted
    if wanted:
        assert_right(scored)
        values = [math.exp(row[-1]) for row in scored[0][2]]
        assert logged["eval_belief/final"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"reuse_prefixes": False, "num_iterations": 2}])
def test_in_bfloat16_rounding_is_taken_for_rounding(tmp_path, searching, scored, caplog, options):
    trainer = make(tmp_path, bf16=True, max_steps=3, **options)
    with caplog.at_level(logging.WARNING, "igpo_trl"):
        trainer.train()
    assert "forwards of their own" not in caplog.text
    assert all(found > 0 for *_, found in scored)
    assert trainer._belief_scorer.trusts_cache


def test_evaluation_sets_need_answers_for_beliefs(tmp_path):
    without = dataset(4).remove_columns("answers")
    with pytest.raises(ValueError, match="eval_dataset"):
        make(tmp_path, eval_dataset=without, belief_at_eval=True)
    make(tmp_path, eval_dataset=without)


# --- whose belief ----------------------------------------------------------------------------------------------------


def test_the_reference_is_the_model_without_its_adapter(tmp_path, searching, scored):
    """At a high learning rate the policy's own beliefs soon differ from those of the model that it started from."""
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = make(tmp_path, belief_model="reference", peft_config=adapter, max_steps=2, learning_rate=0.1)
    trainer.train()
    with trainer.model.disable_adapter():
        expected = oracle_of(trainer, trainer.model)
    assert_beliefs_of(trainer, expected)
    with pytest.raises(AssertionError):
        assert_beliefs_of(trainer, oracle_of(trainer, trainer.model))


def test_a_snapshot_is_renewed_when_it_is_due(tmp_path, searching, scored):
    trainer = make(tmp_path, belief_model="snapshot", belief_snapshot_steps=2, max_steps=4, learning_rate=0.1)
    before, seen = [], []
    generate = trainer._generate_and_score_completions

    def record(inputs):
        before.append(tiny.make_model())
        before[-1].load_state_dict(trainer.model.state_dict())
        output = generate(inputs)
        seen.append(trainer.current_step)
        assert all(map(torch.equal, before[-1].parameters(), trainer.model.parameters()))
        return output

    trainer._generate_and_score_completions = record
    trainer.train()
    for i, step in enumerate(seen):  # snapshots are taken in steps 0 and 2
        trainer.current_step = step
        assert_beliefs_of(trainer, oracle_of(trainer, before[i - i % 2]))
        if i % 2:
            with pytest.raises(AssertionError):
                assert_beliefs_of(trainer, oracle_of(trainer, before[i]))


def oracle_of(trainer, model):
    """Log-beliefs of the current step's rollouts, by plain forwards."""
    step = trainer.current_step
    probes = trainer._belief_scorer.begin(step.answers).probes
    rows = oracles.beliefs(model, step.sequences, step.boundaries, probes)
    return [torch.tensor(row).amax(dim=-1) for row in rows]


def assert_beliefs_of(trainer, expected):
    for row, turns, values in zip(
        trainer.current_step.beliefs, trainer.current_step.scored_turns, expected, strict=True
    ):
        torch.testing.assert_close(row[turns].log(), values, atol=1e-4, rtol=1e-4)


def test_a_reference_needs_an_adapter_or_a_reference_model(tmp_path):
    with pytest.raises(ValueError, match="train an adapter"):
        make(tmp_path, belief_model="reference")


# --- if something else had been read ---------------------------------------------------------------------------------


def test_gains_over_what_another_question_found(tmp_path, searching):
    """The belief after each search is compared with that after an observation of the other question."""
    trainer = make(tmp_path, gain_baseline="random", max_steps=1, info_gain="log_prob_diff")
    trainer.train()
    step = trainer.current_step
    reads = reads_of(step)
    observations = {i // 2: [ids for read in reads[i : i + 2] for ids in read.all_read] for i in (0, 2)}
    probes = trainer._belief_scorer.begin(step.answers).probes
    fresh = tiny.make_model()  # as before the optimizer's step
    checked = 0
    for i, read in enumerate(reads):
        for k in range(len(read.observations)):
            actual = [*read.before(k), *read.observation(k)]
            assert actual == step.sequences[i][: len(actual)]
            candidates = [[*read.before(k), *ids] for ids in observations[1 - i // 2]]
            contexts = [actual, *candidates]
            scores = oracles.beliefs(fresh, contexts, [[len(ids)] for ids in contexts], [probes[i]] * len(contexts))
            after, *foreign = [max(values[0]) for values in scores]
            gains = [after - value for value in foreign]
            assert min(abs(step.gains[i, k].item() - gain) for gain in gains) < 1e-4
            checked += 1
    assert checked >= 4
    assert step.baseline.isnan().any()  # no turn follows the last


def test_how_much_the_next_turn_needs_what_was_read(tmp_path, searching):
    trainer = make(tmp_path, evidence_every=2, max_steps=3, learning_rate=0.0)
    steps, gather = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (gather(inputs), steps.append(trainer.current_step))[0]
    trainer.train()
    assert [step.evidence_used is None for step in steps] == [False, True, False]
    encode = trainer._rollout_loop.observations.encode
    model = trainer.model.eval()
    by_rollout = []
    for i, read in enumerate(reads_of(steps[0])):
        differences = []
        for k, names in zip(range(len(read.observations)), steps[0].tools_called[i], strict=False):
            turn = read.next_turn(k)
            assert turn
            (empty,) = encode([[{"role": "tool", "name": name, "content": ""} for name in names]])
            contexts = [[*read.before(k), *read.observation(k)], [*read.before(k), *empty]]
            rows = [[*context, *turn] for context in contexts]
            log_probs = [
                model(input_ids=torch.tensor([row]))
                .logits[0]
                .log_softmax(-1)[:-1]
                .gather(1, torch.tensor(row)[1:, None])
                for row in rows
            ]
            with_it, without = (values[-len(turn) :].mean().item() for values in log_probs)
            differences.append(with_it - without)
        by_rollout.append(sum(differences) / len(differences))
    assert steps[0].evidence_used.tolist() == pytest.approx(by_rollout, abs=1e-4)
    logged = [row["evidence/used"] for row in trainer.state.log_history if "evidence/used" in row]
    assert len(logged) == 2
    # A mean over rollouts, not over turns: rollouts of many turns do not count more.
    assert logged[0] == pytest.approx(sum(by_rollout) / len(by_rollout), abs=1e-4)
    assert {len(read.observations) for read in reads_of(steps[0])} == {1, 3}
