"""The tiny model: its tokenizer, conversations, training and abilities."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from igpo_trl.beliefs import build_probes
from igpo_trl.data import hold_out, load_questions
from igpo_trl.sandbox.conversations import ANSWER_TEMPLATE, find_names, make_cloze, make_conversations
from igpo_trl.sandbox.tiny_model import learn_tokenizer, make_copying_model, make_tiny_model
from igpo_trl.search import BM25Index, Passage, SearchTool
from igpo_trl.warm_start.encoding import IGNORE, TraceEncoder

CITIES = {"Tacoma": "Puget Sound", "Lyon": "Rhone", "Bratislava": "Danube", "Vienna": "Wien", "Cairo": "Nile"}
PEOPLE = ["Ada Byron", "Grace Hopper", "Alan Turing", "Emmy Noether", "Kurt Godel", "Lise Meitner", "Max Planck"]


def world() -> tuple[list[dict], list[dict]]:
    """A corpus of people born in cities on rivers, and questions about both."""
    passages = [{"id": c, "title": c, "text": f"The city of {c} is a port at the {r}."} for c, r in CITIES.items()]
    questions = []
    for i, person in enumerate(PEOPLE):
        city = list(CITIES)[i % len(CITIES)]
        text = f"The scientist {person} was born in {city}. Later {person} moved to Vienna for a while."
        passages.append({"id": person, "title": person, "text": text})
        questions.append(
            {
                "question": f"At which water lies the city in which {person} was born?",
                "answers": [CITIES[city]],
                "supporting_titles": [person, city],
            }
        )
    return passages, questions


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    passages, questions = world()
    return write(tmp_path / "corpus.jsonl", passages), write(tmp_path / "questions.jsonl", questions)


@pytest.fixture
def parts(files):
    corpus, questions = files
    passages = [Passage(p["id"], p["title"], p["text"]) for p in world()[0]]
    tool = SearchTool(BM25Index.build(corpus, show_progress=False), k=2, max_words=40)
    dataset = load_questions(questions)
    return passages, tool, dataset, learn_tokenizer(passages, dataset, tool, vocab_size=600)


def test_tokenizer_is_lossless_and_keeps_markers_whole(parts):
    tokenizer = parts[3]
    for text in ("Ada Byron\n\n  x", "Gödel — Wien \U0001f30a", '{"a": "b"}'):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("<tool_call></tool_call><|im_end|><answer>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<tool_call>", "</tool_call>", "<|im_end|>", "<answer>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call></tool_call><answer>"


def test_the_loaded_tokenizer_splits_as_the_learned_one(parts, tmp_path):
    tokenizer = parts[3]
    tokenizer.save_pretrained(tmp_path)
    make_copying_model(tokenizer, 128, 2).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("In 1969 it wasn't 21,345 km\n\n  away.", "Gödel — Wien\r\n \U0001f30a", *(p.text for p in parts[0])):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"], text


def test_conversations_search_read_and_end_in_an_answer(parts):
    passages, tool, dataset, _ = parts
    stream = make_conversations(dataset, passages, tool, random.Random(0))
    conversations = [next(stream) for _ in range(60)]
    searches = set()
    for messages in conversations:
        roles = [message["role"] for message in messages]
        calls = (len(messages) - 3) // 2
        searches.add(calls)
        assert roles == ["system", "user", *["assistant", "tool"] * calls, "assistant"]
        for call, result in zip(messages[2:-1:2], messages[3:-1:2], strict=True):
            query = call["tool_calls"][0]["function"]["arguments"]["query"]
            assert result["content"] == tool(query)
        assert messages[-1]["content"].startswith("<answer> ") and messages[-1]["content"].endswith(" </answer>")
    assert searches == {1, 2}
    # Alternately a question of the file, with its gold answer, and a cloze question.
    gold = {row["prompt"][1]["content"]: ANSWER_TEMPLATE.format(answer=row["answers"][0]) for row in dataset}
    assert all(messages[-1]["content"] == gold[messages[1]["content"]] for messages in conversations[::2])
    assert all("what" in messages[1]["content"] for messages in conversations[1::2])


def test_names_and_clozes():
    assert find_names("Which city in the United States of America is Ada Byron's home?") == [
        "United States of America",
        "Ada Byron's",
    ]
    assert find_names("who wrote it") == []
    passage = Passage("1", "Dune", "It was written by Frank Herbert in the sixties.")
    question, answer = make_cloze(passage, random.Random(0))
    assert (question, answer) == ("Dune: It was written by what in the sixties?", "Frank Herbert")
    assert make_cloze(Passage("1", "Dune", "nothing with a name in it at all"), random.Random(0)) is None


def test_loss_is_on_the_assistants_turns_only(parts):
    passages, tool, dataset, tokenizer = parts
    conversation = next(make_conversations(dataset, passages, tool, random.Random(0)))
    ids, labels = map(torch.tensor, TraceEncoder(tokenizer, [tool]).encode(conversation).values())
    assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
    learned = tokenizer.decode(labels[labels != IGNORE])
    query = conversation[2]["tool_calls"][0]["function"]["arguments"]["query"]
    assert f'"query": "{query}"' in learned
    assert conversation[-1]["content"] in learned
    assert "[1]" not in learned and "tool_response" not in learned  # what the tool returned
    assert dataset[0]["prompt"][0]["content"] not in learned


@pytest.mark.parametrize(("hidden_size", "num_layers"), [(192, 3), (128, 2), (256, 4)])
def test_an_untrained_model_copies_what_it_has_seen(parts, hidden_size, num_layers):
    tokenizer = parts[3]
    model = make_copying_model(tokenizer, hidden_size, num_layers)
    seen = torch.stack([torch.randperm(len(tokenizer))[:100] for _ in range(4)])
    ids = torch.cat([seen, torch.randint(len(tokenizer), (4, 50)), seen], dim=1)
    with torch.no_grad():
        predicted = model(ids).logits[:, 150:-1].argmax(-1)
    assert (predicted == seen[:, 1:]).float().mean() > 0.6  # below 1 because random tokens repeat


def test_a_word_is_the_same_token_in_passage_and_answer(parts):
    tokenizer = parts[3]
    (probe,) = build_probes(tokenizer, ["Danube"], ANSWER_TEMPLATE)
    passage = tokenizer(" port at the Danube.")["input_ids"]
    answer = probe.token_ids[probe.answer_start : probe.answer_end]
    assert any(passage[i : i + len(answer)] == answer for i in range(len(passage)))


def test_held_out_questions_are_the_same_everywhere_and_nested(parts):
    dataset = parts[2]
    train, small = hold_out(dataset, 2)
    _, large = hold_out(dataset.shuffle(seed=1), 4)
    assert large["id"][:2] == small["id"][:]
    assert set(train["id"]) | set(small["id"]) == set(dataset["id"])
    assert not set(train["id"]) & set(small["id"])
    assert hold_out(dataset, 0)[0]["id"][:] == dataset["id"][:]
    for number in (-1, len(dataset)):
        with pytest.raises(ValueError, match=f"cannot hold out {number} of 7"):
            hold_out(dataset, number)


def test_makes_a_model_that_searches(files, tmp_path):
    corpus, questions = files
    stats = make_tiny_model(
        tmp_path / "model",
        corpus,
        questions,
        minutes=30,  # `max_steps` ends the training, on a slow machine too
        max_steps=450,
        max_words=12,
        eval_questions=0,
        vocab_size=700,
        hidden_size=128,
        num_layers=2,
        batch_size=4,
        learning_rate=5e-3,
        show_progress=False,
    )
    assert stats["steps"] <= 450
    assert stats["loss"] < 1.0
    assert stats["valid_search_share"] > 0  # of 7 sampled rollouts; three to seven, the same code on other processors
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.num_parameters() == stats["parameters"]
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "model", "questions.jsonl"]


def test_bad_input_is_refused_before_any_work(files, tmp_path):
    corpus, questions = files
    with pytest.raises(FileExistsError, match="not empty"):
        make_tiny_model(tmp_path, corpus, questions)
    with pytest.raises(FileNotFoundError, match="absent"):
        make_tiny_model(tmp_path / "model", tmp_path / "absent.jsonl", questions)
    with pytest.raises(ValueError, match="hidden_size=100"):
        make_tiny_model(tmp_path / "model", corpus, questions, hidden_size=100)
    with pytest.raises(ValueError, match="num_layers=1"):
        make_tiny_model(tmp_path / "model", corpus, questions, num_layers=1)
    assert not (tmp_path / "model").exists()
