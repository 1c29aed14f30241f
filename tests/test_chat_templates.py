"""Chat templates are known by what they render, before a model is loaded."""

import pytest
import tiny
from trl import chat_template_utils as known
from trl.chat_template_utils import add_response_schema, parse_response

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.rollout.chat_templates import prepare_for_tools
from igpo_trl.rollout.turn_reader import TurnReader

FAMILIES = [
    *("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"),
    *("llama3_1", "llama3_2", "gptoss", "glm4moe", "lfm2_v2", "lfm2_2_5", "gemma4", "gemma4_v5", "nemotron_3_nano"),
]
CALL = '{"name": "search", "arguments": {"query": "Paris"}}'


def template_of(family):
    return getattr(known, f"{family}_chat_template")


def edited(template, edit):
    return {
        "newline": template + "\n",
        "comment": "{#- trained further -#}" + template,
        "system prompt": template.replace("You are Qwen, created by Alibaba Cloud.", "You search.").replace(
            "Cutting Knowledge Date", "Knowledge until"
        ),
        "another default": "{%- set enable_thinking = enable_thinking | default(true) -%}" + template,
    }[edit]


@pytest.mark.parametrize("edit", ["newline", "comment", "system prompt", "another default"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_template_is_recognised(family, edit):
    expected = add_response_schema(tiny.make_tokenizer(template_of(family))).response_template
    template = edited(template_of(family), edit)
    tokenizer = tiny.make_tokenizer(template)
    if edit == "newline":
        with pytest.raises(ValueError, match="Unrecognized chat template"):
            add_response_schema(tokenizer)
    prepare_for_tools(tokenizer)
    assert tokenizer.chat_template == template
    same = [expected, known.qwen3_5_template] if family.startswith("nemotron") else [expected]  # they render the same
    assert tokenizer.response_template in same


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_6", "glm4moe", "gptoss"])
def test_the_templates_for_training_are_recognised(family):
    """A model that was fine-tuned on assistant tokens only is saved with such a template."""
    tokenizer = tiny.make_tokenizer(getattr(known, f"{family}_training_chat_template"))
    prepare_for_tools(tokenizer)
    assert (
        tokenizer.response_template == add_response_schema(tiny.make_tokenizer(template_of(family))).response_template
    )


class Scripted(tiny.Scripted, IGPOTrainer):
    pass


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "qwen3_6"])
@pytest.mark.parametrize("edit", ["newline", "another default"])
def test_a_trainer_with_an_edited_template_runs_calls(tmp_path, family, edit):
    """TRL replaces Qwen3's template, which is not prefix-preserving, by its own, but only if it knows the text."""
    tokenizer = tiny.make_tokenizer(edited(template_of(family), edit))
    model = tiny.make_model("qwen3", max_position_embeddings=4000)
    options = {"processing_class": tokenizer, "model": model, "max_completion_length": 500, "save_trajectories": True}
    trainer = tiny.make_trainer(Scripted, IGPOConfig, tmp_path, **options)
    trainer.scripts = [[f"</think>\n\n<tool_call>\n{CALL}\n</tool_call>", tiny.answer("Paris")]]
    if family == "qwen3_6":
        call = "<tool_call>\n<function=search>\n<parameter=query>\nParis\n</parameter>\n</function>\n</tool_call>"
        trainer.scripts = [[f"</think>\n\n{call}", f"</think>\n\n{tiny.answer('Paris')}"]]
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "rollout/turns/mean" in log]
    assert log["rollout/turns/mean"] == 2.0 and log["rollout/stop/answered"] == 1.0 and log["reward"] == 1.0
    assert log["tools/failure_frequency"] == 0.0
    record = next(iter((tmp_path / "trajectories").glob("*.jsonl"))).read_text(encoding="utf-8").splitlines()[0]
    assert f"<|im_start|>user\\n<tool_response>\\n{tiny.search('Paris')}\\n</tool_response><|im_end|>\\n" in record


def test_a_family_without_a_response_template_in_trl(tmp_path):
    """DeepSeek's template takes arguments as text only, so TRL trains with another one."""
    tokenizer = tiny.make_tokenizer(known.deepseekv3_chat_template)
    tokenizer.add_special_tokens({"eos_token": "<｜end▁of▁sentence｜>"})
    tokenizer.add_tokens(["<｜User｜>", "<｜Assistant｜>"])
    model = tiny.make_model("qwen3", vocab_size=420, max_position_embeddings=4000, eos_token_id=tokenizer.eos_token_id)
    trainer = tiny.make_trainer(
        Scripted, IGPOConfig, tmp_path, processing_class=tokenizer, model=model, max_completion_length=400
    )
    call = 'function<｜tool▁sep｜>search\n```json\n{"query": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    trainer.scripts = [[f"</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}", tiny.answer("Paris")]]
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward"] == 1.0 and log["rollout/turns/mean"] == 2.0 and log["tools/failure_frequency"] == 0.0


HERMES = (
    "{{- '<|im_start|>system\n<tools>' -}}{%- for tool in tools -%}{{- tool | tojson -}}{%- endfor -%}"
    "{{- '</tools><|im_end|>\n' -}}{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'tool' -%}{{- '<tool_response>\n' + m.content + '\n</tool_response>' -}}"
    "{%- else -%}{{- m.content -}}{%- endif -%}{%- for call in m.tool_calls or [] -%}"
    "{{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' -}}{%- endfor -%}{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
PLAIN = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def test_of_several_templates_the_one_for_tools_is_used(tmp_path):
    """Hermes has one without tools and one that cannot be rendered without a list of tools."""
    tokenizer = tiny.make_tokenizer({"default": PLAIN, "tool_use": HERMES})
    trainer = tiny.make_trainer(Scripted, IGPOConfig, tmp_path, processing_class=tokenizer)
    assert tokenizer.chat_template.endswith(HERMES) and tokenizer.response_template == known.qwen3_template
    trainer.scripts = [[f"<tool_call>\n{CALL}\n</tool_call>", tiny.answer("Paris")]]
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == 1.0


UNKNOWN = HERMES.replace(
    "'<tool_call>\n' + (call.function | tojson) + '\n</tool_call>'",
    "'<call ' + call.function.name + '|' + (call.function.arguments.values() | join('|')) + '>'",
)


def mistral(with_ids):
    check = (
        "{%- if call.id is not defined or call.id | length != 9 -%}"
        "{{- raise_exception('Tool call IDs should have 9 characters!') -}}{%- endif -%}"
    )
    return (
        "{%- for m in messages -%}{%- if m.role == 'tool' -%}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' -}}"
        "{%- elif m.tool_calls -%}{{- '[TOOL_CALLS][' -}}{%- for call in m.tool_calls -%}"
        + check
        * with_ids
        + "{{- call.function | tojson -}}{%- endfor -%}{{- ']<|im_end|>' -}}{%- elif m.role == 'user' -%}"
        "{{- '[INST]' + m.content + '[/INST]' -}}{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}"
        "{%- endfor -%}"
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (mistral(with_ids=True), r"it demands an id with every call \('Tool call IDs should have 9 characters!'\)"),
        (PLAIN, "it leaves out the name of the tool and the arguments"),
        (HERMES.replace("m.content + '\n</tool_response>'", "'x</tool_response>'"), "it leaves out the tool's answer"),
        (
            PLAIN + "{{ raise_exception('No roles but user') if messages | length > 1 }}",
            "fails with 'No roles but user'",
        ),
        ({"one": PLAIN, "two": HERMES}, r"several chat templates \(one, two\)"),
        ("", "no chat template"),
        (UNKNOWN, r"of no known family: it renders a call as '<call look_up\|a certain title>"),
    ],
)
def test_the_reason_why_a_template_cannot_call_tools(tmp_path, template, reason):
    with pytest.raises(ValueError, match=reason):
        tiny.make_trainer(
            IGPOTrainer,
            IGPOConfig,
            tmp_path,
            processing_class=tiny.make_tokenizer(template),
            model="a-model-that-does-not-exist",
        )


def test_calls_that_only_this_package_reads():
    """TRL has no response template for Mistral's form. Content is parsed, and calls are read from the text."""
    tokenizer = tiny.make_tokenizer(mistral(with_ids=False))
    prepare_for_tools(tokenizer)
    for turn, content, calls in (("[TOOL_CALLS][" + CALL + "]", "", ["search"]), ("Paris", "Paris", [])):
        ids = [*tokenizer.encode(turn), tokenizer.eos_token_id]
        message = parse_response(tokenizer, ids, prefix=tokenizer.encode("[INST]Where?[/INST]"))
        reading = TurnReader(tokenizer).read(ids, message, {"search": tiny.search})
        assert [call.name for call in reading.calls] == calls and reading.message["content"] == content


BY_HAND = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<look>",
            "close": "</look>",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "search", "arguments": {"query": "{content}"}}},
        },
        "content": {"close_pattern": r"<\|im_end\|>", "content": "text"},
    },
}


def test_a_response_template_that_was_set_by_hand_is_used(tmp_path):
    tokenizer = tiny.make_tokenizer(known.qwen2_5_chat_template + "\n")
    tokenizer.response_template = BY_HAND
    trainer = tiny.make_trainer(Scripted, IGPOConfig, tmp_path, processing_class=tokenizer, num_generations=2)
    trainer.scripts = [["<look>Paris</look>", tiny.answer("Paris")], ["<look>Paris", tiny.answer("Paris")]]
    trainer.train()
    assert tokenizer.response_template == BY_HAND
    log = trainer.state.log_history[0]
    assert log["reward"] == 1.0 and log["rollout/turns/mean"] == 2.0
    tokenizer.response_template = {"fields": {"content": {"open": 3}}}
    with pytest.raises(ValueError, match="response_template"):
        prepare_for_tools(tokenizer)
