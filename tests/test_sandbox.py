"""The sandbox: its world can be solved, its tokenizer is lossless and can call tools, its warm start is cached."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response, supports_tool_calling

from igpo_trl.files import cache_dir
from igpo_trl.sandbox.model import ANSWER_TEMPLATE, make_model, make_tokenizer
from igpo_trl.sandbox.warm_start import (
    IGNORE,
    WarmStartConfig,
    cache_entry,
    demonstration,
    make_examples,
    warm_start,
)
from igpo_trl.sandbox.world import (
    FAMILY_RELATIONS,
    KINDS,
    MAX_SEARCHES,
    RELATIONS,
    SearchEnvironment,
    World,
    make_dataset,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# --- world


def test_world_is_a_function_of_seed_and_index():
    one, same, other, later = World(3, 7), World(3, 7), World(4, 7), World(3, 8)
    assert (one.names, one.question) == (same.names, same.question)
    assert one.names != other.names
    assert one.names != later.names


def test_world_has_families_and_half_of_the_relations_stay_inside():
    world = World(0, 0)
    assert len(set(world.names)) == 24
    surnames = [name.split()[1] for name in world.names]
    assert sorted(surnames.count(s) for s in set(surnames)) == [4] * 6
    assert 2 * len(FAMILY_RELATIONS) == len(RELATIONS) == 8
    for person in range(24):
        for relation, name in enumerate(RELATIONS):
            target = world.follow(person, relation)
            assert target != person
            assert (surnames[target] == surnames[person]) == (name in FAMILY_RELATIONS)


def test_among_strangers_a_middle_hop_says_nothing_about_the_answer():
    """Neither does a name: that two people of a chain share a surname is as likely as for any two people."""
    worlds = [World(0, index, "strangers") for index in range(2000)]
    assert sorted({world.question.hops for world in worlds}) == [2, 3, 4]
    middle, relation_of_same = [], []
    for world in worlds:
        assert sorted(np.unique([name.split()[1] for name in world.names], return_counts=True)[1]) == [4] * 6
        *_, before, answer = world.question.path
        middle.append(world.names[before].split()[1] == world.names[answer].split()[1])
        relation_of_same.append(world.question.relations[-1] < len(FAMILY_RELATIONS))
    of_family_relations = np.array(middle)[np.array(relation_of_same)]
    for shared in (middle, of_family_relations):
        assert np.mean(shared) == pytest.approx(3 / 23, abs=4 * (3 / 23 * 20 / 23 / len(shared)) ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_oracle_reaches_the_answer_through_the_tool(kind):
    hops_seen = set()
    for row in make_dataset(5, 200, kind=kind):
        environment = SearchEnvironment()
        environment.reset(**row)
        question = row["prompt"][0]["content"]
        # "Who is the R2 of the R1 of Ada Brown?": the relations from the last to the first, then the name
        *relations, name = (
            question.removeprefix("Who is the ").removesuffix("?").replace(" of the ", " of ").split(" of ")
        )
        assert len(relations) == row["hops"] <= MAX_SEARCHES
        for relation in reversed(relations):
            name = environment.search(f"{name} {relation}").removesuffix(".").split(" is ")[1]
        assert [name] == row["answers"]
        hops_seen.add(row["hops"])
    assert hops_seen == set(KINDS[kind].hops)


@pytest.mark.parametrize("query", ["", "mother", "Nobody Here mother", "Ada Brown", "Ada Brown mother father"])
def test_a_query_that_names_no_fact_gets_an_irrelevant_one(query):
    for index in range(50):
        world = World(6, index)
        needed = {world.fact(p, r) for p, r in zip(world.question.path, world.question.relations, strict=False)}
        passage = world.search(query)
        assert passage.startswith("The ")
        assert passage not in needed
        assert passage == World(6, index).search(query)


def test_searching_before_reset_is_a_clear_error():
    with pytest.raises(RuntimeError, match="before reset"):
        SearchEnvironment().search("Ada Brown mother")


# --- tokenizer and model


def test_ids_survive_decoding_and_encoding(tokenizer):
    draw = random.Random(0)
    known = [i for i in range(len(tokenizer)) if i != tokenizer.unk_token_id]
    for _ in range(500):
        ids = draw.choices(known, k=draw.randrange(1, 15))
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids


def test_conversations_survive_encoding_and_decoding_without_unknown_words(tokenizer):
    rng = np.random.default_rng(0)
    conversations = [demonstration(World(0, i), rng, 0.5) for i in range(100)]
    for text in tokenizer.apply_chat_template(conversations, tokenize=False):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_trl_can_call_tools_with_it_and_the_frame_of_a_call_is_two_tokens(tokenizer):
    assert supports_tool_calling(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": "Ada Brown mother"}}}
    messages = [{"role": "user", "content": "Who is the mother of Ada Brown?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "", "tool_calls": [call]}], return_dict=False
    )
    turn = whole[len(prompt) :]
    assert whole[: len(prompt)] == prompt
    assert len(turn) == 2 + 3 + 1  # frame, given name, surname and relation, end of turn
    parsed = parse_response(tokenizer, turn, prefix=prompt, tools=[SearchEnvironment().search])
    assert parsed["tool_calls"] == [call]
    text = f"<tool_call>{json.dumps(call['function'])}</tool_call><|im_end|>"
    assert tokenizer.decode(turn) == text


def test_the_probe_is_what_the_policy_itself_answers(tokenizer):
    answered = tokenizer(ANSWER_TEMPLATE.format(answer="Ada Brown"))["input_ids"]
    assert [tokenizer.decode([i]) for i in answered] == ["<answer>", "Ada", "Brown", "</answer>"]


def test_model_is_a_small_full_attention_model(tokenizer):
    model = make_model(tokenizer)
    assert model.dtype == torch.float32
    assert set(model.config.layer_types) == {"full_attention"}
    assert sum(p.numel() for p in model.parameters()) < 200_000


# --- warm start


def test_labels_of_trajectories_and_of_reading(tokenizer):
    examples = make_examples(WarmStartConfig(demonstrations=40), tokenizer)
    for number, (ids, labels) in enumerate(examples):
        trained = ids[labels != IGNORE]
        assert (labels[labels != IGNORE] == trained).all()
        text = tokenizer.decode(trained)
        answer = World(0, number).question.answer
        assert text.endswith(f"{answer}</answer><|im_end|>")
        calls = tokenizer.decode(ids).count("<tool_call>")
        assert text.count("<tool_call>") == (0 if number % 2 else calls)
        assert text.count("<answer>") == (0 if number % 2 else 1)


def test_cache_entry_depends_on_every_field_and_on_the_code(monkeypatch, tmp_path):
    entries = {cache_entry(WarmStartConfig())}
    for field in dataclasses.fields(WarmStartConfig):
        other = "strangers" if field.name == "kind" else field.default + 1
        entries.add(cache_entry(dataclasses.replace(WarmStartConfig(), **{field.name: other})))
    assert len(entries) == 1 + len(dataclasses.fields(WarmStartConfig))
    other = tmp_path / "model.py"
    other.write_text("# another tokenizer\n")
    monkeypatch.setattr("igpo_trl.sandbox.model.__file__", str(other))
    assert cache_entry(WarmStartConfig()) not in entries


def test_warm_start_is_trained_once_and_saved_completely(tmp_path, monkeypatch):
    calls = []

    class Part:
        def __init__(self, name):
            self.name = name

        def save_pretrained(self, path):
            path.mkdir(exist_ok=True)
            (path / self.name).write_text("{}")

    def train(config):
        calls.append(config)
        assert not list(tmp_path.glob("warm-start-*"))
        return Part("config.json"), Part("tokenizer.json")

    config = WarmStartConfig(seed=1)
    first = warm_start(config, tmp_path, train)
    assert warm_start(config, tmp_path, train) == first
    assert len(calls) == 1
    assert sorted(p.name for p in first.iterdir()) == ["config.json", "tokenizer.json"]
    assert list(tmp_path.iterdir()) == [first]

    def fail(config):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_start(WarmStartConfig(seed=2), tmp_path, fail)
    assert list(tmp_path.iterdir()) == [first]
    monkeypatch.setenv("IGPO_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"
