"""The KV cache between turns: right rows, right columns, and only what is shared."""

import pytest
import tiny
import torch
from transformers.cache_utils import DynamicLayer

from igpo_trl.rollout.kv_cache import PrefixCache, _RoomyLayer, reuse_obstacle


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def sample(generate, seed, **inputs):
    torch.manual_seed(seed)
    return generate(**inputs, do_sample=True, max_new_tokens=5, min_new_tokens=5, top_k=0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gpt2"])
def test_sampling_is_that_of_a_generation_without_a_cache(family):
    """Rows grow by different lengths, change places, leave, are cut back, differ from what is cached, and join."""
    model = tiny.make_model(family).eval()
    generator = torch.Generator().manual_seed(0)

    def words(n):
        return torch.randint(3, 399, (n,), generator=generator).tolist()

    cache = PrefixCache()
    rows = {i: words(n) for i, n in enumerate((9, 4, 17, 6, 11))}
    run = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: run.append(args[0].numel()))
    steps = [
        ([0, 1, 2, 3, 4], lambda i, row: row + words(3 + 4 * i)),
        ([0, 1, 2, 3, 4], lambda i, row: row + words(2)),
        ([4, 1, 2], lambda i, row: row[: -3 * i] + words(1)),  # cut back
        ([2, 4], lambda i, row: row[:12] + words(15) if i == 2 else row + words(3)),  # differs from what is cached
        ([4, 2, 0], lambda i, row: row + words(1)),  # 0 is no longer cached
        ([0, 2], lambda i, row: row),  # the same again: the last token is run
    ]
    for seed, (rollouts, change) in enumerate(steps):
        for i in rollouts:
            rows[i] = change(i, rows[i])
        inputs = left_padded([rows[i] for i in rollouts])
        with torch.no_grad():
            expected = sample(model.generate, seed, **inputs)
            plain = run.copy()
            run.clear()
            got = sample(
                lambda inputs=inputs, rollouts=rollouts, **kwargs: cache.generate(
                    model.generate, model, inputs["input_ids"], inputs["attention_mask"], rollouts, **kwargs
                ),
                seed,
            )
        assert torch.equal(got, expected), f"step {seed}"
        assert seed not in (1, 2, 5) or sum(run) < sum(plain)
        run.clear()
        for i, sequence in zip(rollouts, got.tolist(), strict=True):
            rows[i] = (
                rows[i] + sequence[inputs["input_ids"].shape[1] :][: 1 + i]
            )  # each keeps some of what was sampled


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_prompt_of_a_group_runs_once(family):
    """Three prompts, four rollouts each: their tokens but the last run in three rows, then one each in twelve."""
    model = tiny.make_model(family).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 399, (n,), generator=generator).tolist() for n in (9, 4, 17)]
    inputs = left_padded([prompt for prompt in prompts for _ in range(4)])
    shapes = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        expected = sample(model.generate, 0, **inputs)
        shapes.clear()
        got = sample(
            lambda **kwargs: PrefixCache().generate(model.generate, model, *inputs.values(), range(12), **kwargs), 0
        )
    assert torch.equal(got, expected)
    assert shapes[:2] == [(3, 16), (12, 1)]


def test_sampled_tokens_are_written_into_the_room_of_a_layer():
    """The keys and values of a `DynamicLayer`, through all that happens to them, without a copy for every token."""
    torch.manual_seed(0)
    room, plain = _RoomyLayer(), DynamicLayer()

    def add(rows, tokens):
        states = torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4)
        for got, expected in zip(room.update(*states), plain.update(*states), strict=True):
            assert torch.equal(got, expected)
        return room.keys.untyped_storage().data_ptr()

    assert add(3, 5) == add(3, 1) == add(3, _RoomyLayer.ROOM - 1)
    assert add(3, 1) != add(3, _RoomyLayer.ROOM + 1)  # no room is left
    for change in (
        lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
        lambda layer: layer.crop(-3),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reset(),
    ):
        change(room)
        change(plain)
        rows = 3 if room.keys is None else len(room.keys)
        assert add(rows, 2) == add(rows, 1)


@pytest.mark.parametrize(
    ("family", "generation", "says"),
    [
        ("qwen2", {}, None),
        ("mistral", {}, "DynamicSlidingWindowLayer"),
        ("qwen2_sliding", {}, "DynamicSlidingWindowLayer"),
        ("qwen2", {"cache_implementation": "static"}, "static"),
        ("qwen2", {"use_cache": False}, "use_cache"),
    ],
)
def test_models_whose_cache_cannot_be_cut_back(family, generation, says):
    model = tiny.make_model(family)
    model.generation_config.update(**generation)
    obstacle = reuse_obstacle(model, model.generation_config)
    assert obstacle is None if says is None else says in obstacle


@pytest.mark.parametrize("name", ["Mamba", "Lfm2", "Qwen3Next"])
def test_recurrent_models_are_refused(name):
    import transformers

    options = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    options |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 2}
    if name == "Lfm2":
        options |= {"layer_types": ["conv", "full_attention"] * 2}
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    assert reuse_obstacle(model, model.generation_config)
