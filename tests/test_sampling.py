"""Turns from a backend that takes one length for all rows: within the context, unchanged, in step."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.rollout.sampling import sample_within_context

END = 2


def turn_after(context):
    """What the stand-in of a model samples after a context: ids that depend on it, and an end now and then."""
    state, ids = sum(context) + len(context), []
    while len(ids) < 40:
        state = (state * 1103515245 + 12345) % 2**31
        ids.append(END if state % 9 == 0 else 3 + state % 50)
        if ids[-1] == END:
            break
    return ids


def backend(context_length, requests):
    """Refuses what a vLLM server refuses."""
    started = {}

    def generate(rows, prompts, length):
        requests.append((len(prompts), length))
        assert length >= 1 and all(len(prompt) + length <= context_length for prompt in prompts)
        turns = []
        for row, prompt in zip(rows, prompts, strict=False):
            context = started.setdefault(row, prompt)
            turns.append(turn_after(context)[len(prompt) - len(context) :][:length])
        turns += [[5] * length] * (len(prompts) - len(rows))
        return turns, [[float(token) for token in turn] for turn in turns]

    return generate


@given(st.lists(st.integers(1, 29), min_size=1, max_size=6), st.integers(1, 40))
def test_every_turn_is_the_one_that_its_context_gives_alone(lengths, max_new_tokens):
    contexts = [[3 + i] * length for i, length in enumerate(lengths)]
    requests: list[tuple[int, int]] = []
    turns, logprobs = sample_within_context(backend(30, requests), contexts, max_new_tokens, 30, [END])
    for context, turn, values in zip(contexts, turns, logprobs, strict=True):
        assert turn == turn_after(context)[: min(max_new_tokens, 30 - len(context))]
        assert values == [float(token) for token in turn]
    if max(lengths) + max_new_tokens <= 30:
        assert len(requests) == 1


def test_contexts_with_room_take_one_call():
    requests: list[tuple[int, int]] = []
    sample_within_context(backend(1000, requests), [[3], [4] * 30], 40, 1000, [END])
    assert requests == [(2, 40)]


def test_calls_are_filled_up_to_the_most_prompts_of_a_rank():
    """Another rank sends three prompts in the first call and none after it."""
    requests: list[tuple[int, int]] = []
    answers = iter([3, 20, 8, 0])  # prompts, longest context, length; then nobody has any
    turns, _ = sample_within_context(
        backend(30, requests),
        [[7]],
        4,
        30,
        [END],
        max_over_ranks=lambda number: max(number, next(answers)),
        same_number_on_ranks=True,
    )
    assert requests == [(3, 8)] and turns == [turn_after([7])[:4]]


def test_a_context_without_room_is_an_error():
    with pytest.raises(ValueError, match="A prompt has 30 tokens.*context of 30 tokens"):
        sample_within_context(backend(30, []), [[3], [3] * 30], 4, 30, [END])


@pytest.mark.filterwarnings("ignore:Neither `tools`")  # their descriptions would fill the context
@pytest.mark.parametrize("reuse_prefixes", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_prompts_of_different_lengths_stay_within_the_context(tmp_path, family, reuse_prefixes):
    """GPT-2 has no position beyond its context: one token more is an IndexError."""
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    context = {"n_positions": 96, **dropout} if family == "gpt2" else {"max_position_embeddings": 96}
    model = tiny.make_model(family, **context)
    options = {"model": model, "max_completion_length": 999, "temperature": 1e-6, "tools": None}
    trainer = tiny.make_trainer(IGPOTrainer, IGPOConfig, tmp_path, **options)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in (58, 88, 73, 95)]
    if reuse_prefixes:
        from igpo_trl.rollout.kv_cache import PrefixCache

        trainer.current_step.kv_cache = PrefixCache()
    turns, _ = trainer._generate_single_turn(prompts, None, {}, 1)
    for prompt, turn in zip(prompts, turns, strict=True):
        (alone,), _ = trainer._generate_single_turn([prompt], None, {}, 1)
        assert turn == alone
        assert len(prompt) + len(turn) == 96 or turn[-1] in trainer.eos_token_ids
