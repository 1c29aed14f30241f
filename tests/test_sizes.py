"""Options and sizes that do not fit each other are noticed before a model is loaded."""

import warnings
from pathlib import Path

import pytest
import tiny
import yaml

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.checks import check_room, context_before_loading
from igpo_trl.evaluation.settings import make_settings
from igpo_trl.search import BM25Index, Passage, SearchTool

NO_MODEL = {"model": "no/such-model", "processing_class": tiny.make_tokenizer()}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    passages = [Passage(str(i), f"Title {i}", f"word{i} " * 250) for i in range(5)]
    return BM25Index.build(passages, directory=tmp_path_factory.mktemp("index"))


def make(tmp_path, **options):
    return tiny.make_trainer(IGPOTrainer, IGPOConfig, tmp_path, **options)


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [3, -1])
def test_too_few_questions_for_one_step(tmp_path, max_steps):
    """16 rollouts in groups of 2 are 8 questions; with fewer, TRL's sampler yields no batch at all."""
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": max_steps}
    with pytest.raises(ValueError, match=r"has 7 questions, and a step needs 8: 16 rollouts, `num_generations=2`"):
        make(tmp_path, train_dataset=tiny.make_dataset(7), **options, **NO_MODEL)
    make(tmp_path, train_dataset=tiny.make_dataset(8), **options)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences", "n"])
def test_several_sequences_per_turn_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"generation_kwargs\['{name}'\]` must be 1, got 4.*`num_generations`"):
        make(tmp_path, generation_kwargs={name: 4}, **NO_MODEL)


def test_beams_of_the_models_own_generation_config_are_not_used(tmp_path):
    model = tiny.make_model()
    model.generation_config.num_beams = 4
    trainer = make(tmp_path, model=model, max_completion_length=48)
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.generation_config.num_beams == 1


# --- room ------------------------------------------------------------------------------------------------------------


def warnings_of(args, tools, *, context=32_768, dataset=None, tokenizer=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_room(args, tokenizer or tiny.make_tokenizer(), dataset or tiny.make_dataset(), tools, context)
    return [str(warning.message) for warning in caught]


def config(tmp_path, **options):
    return IGPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_the_defaults_fit_each_other(tmp_path, index):
    assert warnings_of(config(tmp_path), [SearchTool(index)]) == []
    evaluation = make_settings({"model": "m", "sources": ["nq"], "indexes": ["i"]}).rollout
    assert evaluation == {"max_turns": 8, "max_completion_length": 8192}


def test_a_real_search_of_the_default_tool_fits_the_default_completion(tmp_path, index):
    """By the tokens of an actual result, and of a tokenizer with three tokens a word."""
    result = SearchTool(index)(query="word1 word2 word3")
    assert len(result.split()) <= SearchTool(index).tool_options.max_words
    assert len(tiny.make_tokenizer().encode(result)) < IGPOConfig.__dataclass_fields__["max_completion_length"].default


def test_one_search_that_does_not_fit_is_a_warning_that_says_what_to_raise(tmp_path, index):
    (message,) = warnings_of(config(tmp_path, max_completion_length=512), [SearchTool(index)])
    assert "`max_completion_length` is 512" in message and "1 round of a turn" in message
    assert "without an answer" in message and "`max_tool_response_tokens`" in message
    capped = config(tmp_path, max_completion_length=512, max_tool_response_tokens=200)
    assert warnings_of(capped, [SearchTool(index)]) == []
    assert warnings_of(config(tmp_path, max_completion_length=512), [tiny.search]) == []  # its length is unknown


def test_the_limit_of_a_result_counts_where_its_usual_length_is_unknown(tmp_path):
    """For any tool, and for those of an environment, which do not exist yet."""
    for tools in ([tiny.search], ()):
        options = {"max_turns": 4, "max_tool_response_tokens": 400, "max_turn_length": 60}
        (message,) = warnings_of(config(tmp_path, max_completion_length=1439, **options), tools)
        assert "3 rounds of a turn (about 60 tokens)" in message and "need about 1440 tokens" in message
        assert warnings_of(config(tmp_path, max_completion_length=1440, **options), tools) == []


@pytest.mark.parametrize("limit", [{"max_turns": 6}, {"max_tool_calling_iterations": 5}])
def test_all_turns_count(tmp_path, index, limit):
    options = {"max_tool_response_tokens": 800, "max_completion_length": 4096}
    (message,) = warnings_of(config(tmp_path, **options, **limit), [SearchTool(index)])
    assert "5 rounds" in message and "need about 4600 tokens" in message


def test_the_context_counts_the_prompt(tmp_path, index):
    (message,) = warnings_of(config(tmp_path, max_tool_response_tokens=300), [SearchTool(index)], context=900)
    assert "the context is 900 tokens long" in message and "after a prompt of " in message


def test_a_prompt_that_fills_the_context_is_an_error(tmp_path, index):
    dataset = tiny.make_dataset(8)
    rows = [{"prompt": dataset[i]["prompt"], "answers": ["Paris"]} for i in range(8)]
    rows[5]["prompt"] = [{"role": "user", "content": "very long " * 600}]
    with pytest.raises(ValueError, match=r"prompt of row 5 of `train_dataset` has \d+ tokens.*context of 1024 tokens"):
        make(tmp_path, train_dataset=type(dataset).from_list(rows))


def test_the_context_of_a_model_is_known_before_it_is_loaded(tmp_path):
    tiny.make_model(max_position_embeddings=777).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    args = config(tmp_path)
    assert context_before_loading(args, str(tmp_path / "model")) == 777
    assert context_before_loading(args, tiny.make_model(max_position_embeddings=50)) == 50
    args.use_vllm, args.vllm_max_model_length = True, 600
    assert context_before_loading(args, str(tmp_path / "model")) == 600
    assert context_before_loading(args, str(tmp_path / "absent")) > 10**9  # loading it says what is wrong


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_recipes_fit(tmp_path, index, path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = ("max_turns", "max_tool_calling_iterations", "max_tool_response_tokens", "max_completion_length")
    args = config(tmp_path, **{key: values[key] for key in names if key in values})
    tool = SearchTool(index, values["search_k"], values["search_max_words"])
    words = tiny.make_dataset().map(lambda _: {"prompt": [{"role": "user", "content": "Rome Paris search"}]})
    assert warnings_of(args, [tool], dataset=words) == []
