"""
Tool calls in every published form of the families, and in the forms that models make of them.

A call that was meant runs, or the policy is told what was wrong. A text that only mentions JSON or a tool is an answer.
"""

# ruff: noqa: E501
import time

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from trl import chat_template_utils
from trl.chat_template_utils import add_response_schema, parse_response

from igpo_trl.rewards import answer_reward
from igpo_trl.rollout import ToolRunner
from igpo_trl.rollout.loop import RolloutLoop, SampledTurns
from igpo_trl.rollout.observations import ObservationEncoder
from igpo_trl.rollout.state import Rollout, RolloutLimits
from igpo_trl.rollout.tool_calls import signature_of
from igpo_trl.rollout.turn_reader import TurnReader, parser_errors_as_value_errors
from igpo_trl.rollout.written_calls import find_calls

ENDS = {"qwen2_5": "<|im_end|>", "qwen3_6": "<|im_end|>", "llama3_1": "<|eot_id|>", "gptoss": "<|return|>"}
MARKS = {
    "llama3_1": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"],
    "gptoss": [f"<|{name}|>" for name in ("start", "end", "message", "channel", "constrain", "return", "call")],
}


def add(a: int, b: int = 1, tags: list[str] | None = None) -> str:
    """
    Adds.

    Args:
        a: A number.
        b: Another.
        tags: Ignored.
    """
    return f"{a} + {b}"


TOOLS = {"search": tiny.search, "add": add}
PARAMETERS = {name: signature_of(tool).parameters for name, tool in TOOLS.items()}
_tokenizers = {}


def tokenizer_of(family):
    if family not in _tokenizers:
        tokenizer = tiny.make_tokenizer(getattr(chat_template_utils, f"{family}_chat_template"))
        tokenizer.add_tokens([AddedToken(mark, special=True) for mark in MARKS.get(family, [])])
        tokenizer.eos_token = ENDS[family]
        _tokenizers[family] = add_response_schema(tokenizer)
    return _tokenizers[family]


def read(turn, family="qwen2_5", was_cut=False):
    """What the loop makes of a turn."""
    tokenizer = tokenizer_of(family)
    ids = tokenizer.encode(turn, add_special_tokens=False)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Where?"}], add_generation_prompt=True)
    with parser_errors_as_value_errors(tokenizer):
        message = parse_response(tokenizer, ids, prefix=prompt["input_ids"], tools=list(TOOLS.values()))
        ends = tokenizer.convert_tokens_to_ids(["<|eom_id|>"]) if family == "llama3_1" else []
        reader = TurnReader(tokenizer, ObservationEncoder(tokenizer).render_call, ends)
        return reader.read(ids, message, TOOLS, prefix=prompt["input_ids"], was_cut=was_cut)


def calls_of(turn, family="qwen2_5", **options):
    """Name and arguments of each call; its error instead of the arguments of one that cannot run."""
    reading = read(turn, family, **options)
    assert not reading.is_answer
    assert len(reading.message["tool_calls"]) == len(reading.calls) > 0
    return [(call.name, call.problem.error.value if call.problem else call.arguments) for call in reading.calls]


PARIS = [("search", {"query": "Paris"})]
CALL = '{"name": "search", "arguments": {"query": "Paris"}}'
LLAMA = '{"name": "search", "parameters": {"query": "Paris"}}'
XML = "<function=search>\n<parameter=query>\nParis\n</parameter>\n</function>"

QWEN2_5 = {
    "as published": f"<tool_call>\n{CALL}\n</tool_call><|im_end|>",
    "after a sentence": f"I search.\n<tool_call>\n{CALL}\n</tool_call><|im_end|>",
    "on one line": f"<tool_call>{CALL}</tool_call>",
    "code fence": f"```json\n{CALL}\n```<|im_end|>",
    "code fence without a language": f"I will search:\n```\n{CALL}\n```",
    "code fence inside the tags": f"<tool_call>\n```json\n{CALL}\n```\n</tool_call>",
    "bare JSON": CALL + "<|im_end|>",
    "bare JSON after a sentence": f"First I search. {CALL}",
    "bare JSON over several lines": '{\n  "name": "search",\n  "arguments": {\n    "query": "Paris"\n  }\n}',
    "tools": f"<tools>\n{CALL}\n</tools>",
    "tools with a list": f"<tools>\n[{CALL}]\n</tools>",
    "tool_calls": f"<tool_calls>[{CALL}]</tool_calls>",
    "nested": f"<tool_calls>\n<tool_call>{CALL}</tool_call>\n</tool_calls>",
    "function_call": f"<function_call>{CALL}</function_call>",
    "parameters": f"<tool_call>{LLAMA}</tool_call>",
    "no closing tag": f"<tool_call>\n{CALL}<|im_end|>",
    "no closing tag, then a sentence": f"<tool_call>\n{CALL}\nLet us see.<|im_end|>",
    "no opening tag": f"{CALL}\n</tool_call><|im_end|>",
    "two opening tags": f"<tool_call>\n<tool_call>\n{CALL}\n</tool_call>",
    "a brace too many": f"<tool_call>\n{CALL}}}\n</tool_call>",
    "doubled braces": f"<tool_call>\n{{{CALL}}}\n</tool_call>",
    "arguments as text": r'<tool_call>{"name": "search", "arguments": "{\"query\": \"Paris\"}"}</tool_call>',
    "arguments first": '<tool_call>{"arguments": {"query": "Paris"}, "name": "search"}</tool_call>',
    "single quotes": "<tool_call>{'name': 'search', 'arguments': {'query': 'Paris'}}</tool_call>",
    "function inside": f'<tool_call>{{"type": "function", "function": {CALL}}}</tool_call>',
    "function as the name": '<tool_call>{"function": "search", "arguments": {"query": "Paris"}}</tool_call>',
    "arguments without a level": '<tool_call>{"name": "search", "query": "Paris"}</tool_call>',
    "the name as the key": '<tool_call>{"search": {"query": "Paris"}}</tool_call>',
    "a namespace": CALL.replace("search", "functions.search"),
    "Qwen-Agent": '✿FUNCTION✿: search\n✿ARGS✿: {"query": "Paris"}',
    "ReAct": 'Thought: I search.\nAction: search\nAction Input: {"query": "Paris"}',
    "Search-R1": "<think>I search.</think>\n<search>Paris</search>",
    "ReAct in code marks": 'Action: `search`\nAction Input: `{"query": "Paris"}`',
    "ReAct with brackets": 'Action: search("Paris")',
    "a labelled call": 'Tool call: search({"query": "Paris"})',
    "type as the name": '{"type": "search", "parameters": {"query": "Paris"}}',
    "name and JSON": 'search\n{"query": "Paris"}',
    "Python": 'search(query="Paris")',
    "Python in a fence": "```python\nsearch(query='Paris')\n```",
    "the form of Qwen3.5": f"<tool_call>\n{XML}\n</tool_call>",
}  # fmt: skip
QWEN3_5 = {
    "as published": f"<tool_call>\n{XML}\n</tool_call><|im_end|>",
    "after a thought": f"I search.\n</think>\n\n<tool_call>\n{XML}\n</tool_call><|im_end|>",
    "no opening tag": f"{XML}\n</tool_call><|im_end|>",
    "no opening tag after a sentence": f"I search.\n\n{XML}\n</tool_call>",
    "no tags": XML,
    "no closing tag": f"<tool_call>\n{XML}<|im_end|>",
    "no closing function": "<tool_call>\n<function=search>\n<parameter=query>\nParis\n</parameter>\n</tool_call>",
    "no closing parameter": "<tool_call>\n<function=search>\n<parameter=query>\nParis\n</function>\n</tool_call>",
    "on one line": "<tool_call><function=search><parameter=query>Paris</parameter></function></tool_call>",
    "JSON inside the tag": f"<tool_call>\n{CALL}\n</tool_call><|im_end|>",
    "JSON inside the function": '<tool_call><function=search>{"query": "Paris"}</function></tool_call>',
    "attributes": '<tool_call><function name="search"><parameter name="query">Paris</parameter></function></tool_call>',
    "in an unclosed thought": f"<think>\nI should search.\n<tool_call>\n{XML}\n</tool_call><|im_end|>",
    "in a thought opened by the prompt": f"I should search.\n<tool_call>\n{XML}\n</tool_call><|im_end|>",
    "JSON in an unclosed thought": f"<think>I should search. {CALL}",
    "bare JSON": CALL,
    "elements": "<tool_call>\n<search>\n<query>Paris</query>\n</search>\n</tool_call>",
}
HARMONY = '<|message|>{"query": "Paris"}<|call|>'
GPTOSS = {
    "as the template renders it": f" to=functions.search<|channel|>commentary json{HARMONY}",
    "the model's own order": f"<|channel|>commentary to=functions.search <|constrain|>json{HARMONY}",
    "after a thought": f"<|channel|>analysis<|message|>I search.<|end|><|start|>assistant<|channel|>commentary to=functions"
    f".search <|constrain|>json{HARMONY}",
    "recipient in the role": f"<|channel|>analysis<|message|>I search.<|end|><|start|>assistant to=functions.search"
    f"<|channel|>commentary <|constrain|>json{HARMONY}",
    "no space before the type": f"<|channel|>commentary to=functions.search<|constrain|>json{HARMONY}",
    "no type": f"<|channel|>commentary to=functions.search{HARMONY}",
    "analysis channel": f"<|channel|>analysis to=functions.search code{HARMONY}",
    "no namespace": f"<|channel|>commentary to=search <|constrain|>json{HARMONY}",
    "after a preamble": f"<|channel|>commentary<|message|>I will search.<|end|><|start|>assistant<|channel|>commentary to="
    f"functions.search <|constrain|>json{HARMONY}",
    "no end": '<|channel|>commentary to=functions.search <|constrain|>json<|message|>{"query": "Paris"}',
    "no message token": '<|channel|>commentary to=functions.search <|constrain|>json {"query": "Paris"}<|call|>',
    "Python in the final channel": "<|channel|>final<|message|>functions.search(query='Paris')<|return|>",
    "JSON in the final channel": f"<|channel|>final<|message|>{CALL}<|return|>",
}  # fmt: skip
LLAMA3_1 = {
    "as published": LLAMA + "<|eot_id|>",
    "type first": '{"type": "function", "name": "search", "parameters": {"query": "Paris"}}<|eot_id|>',
    "type around": f'{{"type": "function", "function": {LLAMA}}}<|eot_id|>',
    "type last": '{"name": "search", "parameters": {"query": "Paris"}, "type": "function"}<|eot_id|>',
    "other spacing": '{ "name" : "search" , "parameters" : { "query" : "Paris" } }<|eot_id|>',
    "no spacing": '{"name":"search","parameters":{"query":"Paris"}}<|eot_id|>',
    "several lines": '{\n"name": "search",\n"parameters": {\n"query": "Paris"\n}\n}<|eot_id|>',
    "end of message": LLAMA + "<|eom_id|>",
    "python tag": f"<|python_tag|>{LLAMA}<|eom_id|>",
    "python tag, built-in form": '<|python_tag|>search.call(query="Paris")<|eom_id|>',
    "user-defined form without >": '<function=search{"query": "Paris"}</function><|eot_id|>',
    "user-defined form": '<function=search>{"query": "Paris"}</function><|eom_id|>',
    "Python list": "[search(query='Paris')]<|eot_id|>",
    "arguments": CALL + "<|eot_id|>",
    "after a sentence": f"I will search.\n\n{LLAMA}<|eot_id|>",
    "list": f"[{LLAMA}]<|eot_id|>",
    "code fence": f"```json\n{LLAMA}\n```<|eot_id|>",
}
OTHERS = {
    "GLM": "<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
    "GLM without line breaks": "<tool_call>search<arg_key>query</arg_key><arg_value>Paris</arg_value></tool_call>",
    "Gemma": '<|tool_call>call:search{query:<|"|>Paris<|"|>}<tool_call|>',
    "LFM2": "<|tool_call_start|>[search(query='Paris')]<|tool_call_end|>",
    "Mistral": f"[TOOL_CALLS] [{CALL}]",
    "Mistral, later": '[TOOL_CALLS]search[ARGS]{"query": "Paris"}',
    "DeepSeek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n"
    '{"query": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "DeepSeek, later": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>search<｜tool▁sep｜>{"query": "Paris"}<｜tool▁call▁end｜>',
    "Kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.search:0<|tool_call_argument_begin|>"
    '{"query": "Paris"}<|tool_call_end|><|tool_calls_section_end|>',
    "Phi": f"<|tool_call|>[{CALL}]<|/tool_call|>",
    "Command": '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "search", "parameters": {"query": "Paris"}}]<|END_ACTION|>',
    "MiniMax": '<minimax:tool_call><invoke name="search"><parameter name="query">Paris</parameter></invoke></minimax:tool_call>',
}  # fmt: skip
FAMILIES = {"qwen2_5": QWEN2_5, "qwen3_6": QWEN3_5, "gptoss": GPTOSS, "llama3_1": LLAMA3_1}
FORMS = [(family, form) for family, forms in FAMILIES.items() for form in forms] + [
    ("qwen2_5", form) for form in OTHERS
]


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_a_call_in_any_published_form_runs(family, form):
    assert calls_of((FAMILIES[family] | OTHERS).get(form) or OTHERS[form], family) == PARIS


@pytest.mark.parametrize(
    ("family", "turn", "message"),
    [
        ("qwen2_5", f"I search.\n```json\n{CALL}\n```<|im_end|>", {"content": "I search."}),
        ("qwen2_5", f"<think>So.</think>I search.\n<tools>\n{CALL}\n</tools>", {"content": "I search.", "reasoning_content": "So."}),
        ("qwen3_6", f"So.</think>\n\n{XML}\n</tool_call>", {"content": "", "reasoning_content": "So."}),
        ("gptoss", GPTOSS["recipient in the role"], {"content": "", "thinking": "I search."}),
        ("gptoss", GPTOSS["after a preamble"], {"content": "I will search."}),
        ("llama3_1", LLAMA3_1["after a sentence"], {"content": "I will search."}),
    ],
)  # fmt: skip
def test_the_message_has_the_call_apart_from_the_text(family, turn, message):
    """What reward functions read is the same whatever form the call had."""
    function = {"name": "search", "arguments": {"query": "Paris"}}
    calls = [{"type": "function", "function": function}]
    assert read(turn, family).message == {"role": "assistant", "tool_calls": calls} | message


@pytest.mark.parametrize(
    ("family", "turn", "reason"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "search", "arguments": {"query": "Paris}\n</tool_call>', "invalid JSON"),
        ("qwen2_5", '{"name": "search", "arguments": {"query": "Paris"}<|im_end|>', "invalid JSON"),
        ("qwen2_5", '```json\n{"name": "search", "arguments": {"query": Paris}}\n```', "invalid JSON"),
        ("qwen2_5", '"name": "search", "arguments": {"query": "Paris"}}', "an opening brace is missing"),
        ("qwen2_5", '{"name": "search"\n"arguments": {"query": "Paris"}}', "invalid JSON"),
        ("qwen2_5", "<tool_call>\n</tool_call>", "it is empty"),
        ("qwen2_5", "<tool_call>", "it is empty"),
        ("qwen2_5", "<tool_call>Paris, please</tool_call>", "expected a JSON object"),
        ("qwen2_5", '<tool_call>{"arguments": {"query": "Paris"}}</tool_call>', "a name and arguments"),
        ("qwen2_5", "I search for Paris.</tool_call>", "no opening tag"),
        ("qwen2_5", "Action: search\nThe capital of France", "its arguments are missing"),
        ("qwen2_5", "<search>Paris", "</search> is missing"),
        ("qwen2_5", '{"search": "Paris"}', "not valid JSON"),
        ("qwen2_5", '<tool_use><name>search</name><input>{"query": "Paris"}</input></tool_use>', "expected a JSON"),
        ("qwen2_5", "Action: search[Paris]", "its arguments are missing"),
        ("qwen2_5", 'search(query="Paris', "is not closed"),
        ("qwen2_5", "search(query=Paris)", 'expected search(parameter="value")'),
        ("qwen2_5", f"<think>I search.\n<tool_call>{CALL}</tool_call>\n</think>\n", "inside a thought"),
        ("qwen3_6", "<tool_call>\n<function=search\n<parameter=query\nParis\n</parameter></function>", "not closed by >"),
        ("qwen3_6", "<parameter=query>\nParis\n</parameter>\n</function>\n</tool_call>", "outside its <function=name>"),
        ("qwen3_6", "<tool_call>\n<function=search>\nParis\n</function>\n</tool_call>", "<parameter=key>"),
        ("qwen3_6", '<think>\nI search.\n<tool_call>\n{"name": "search", "arg', "invalid JSON"),
        ("gptoss", '<|channel|>commentary to=functions.search <|constrain|>json<|message|>{"query": <|call|>', "JSON"),
        ("gptoss", "<|channel|>commentary to=functions.search <|message|>Paris<|call|>", "JSON object after"),
        ("gptoss", '<|channel|>commentary<|constrain|>json<|message|>{"query": "Paris"}<|call|>', "a name and arg"),
        ("llama3_1", '{"name": "search", "parameters": {"query": "Paris"<|eot_id|>', "invalid JSON"),
        ("llama3_1", "<|python_tag|>import requests<|eom_id|>", "expected a JSON object"),
        ("llama3_1", "[search(query='Paris', ]<|eot_id|>", "expected search("),
    ],
)  # fmt: skip
def test_a_broken_call_is_answered_with_what_to_write(family, turn, reason):
    (call,) = read(turn, family).calls
    assert call.problem.error == "malformed"
    assert reason in call.problem.text and len(call.problem.text) <= 500
    published = {
        "qwen2_5": '<tool_call>\n{"name": "search", "arguments": {"query": "..."}}\n</tool_call>',
        "qwen3_6": "<tool_call>\n<function=search>\n<parameter=query>\n...\n</parameter>\n</function>\n</tool_call>",
        "gptoss": 'to=functions.search<|channel|>commentary json<|message|>{"query": "..."}<|call|>',
        "llama3_1": '{"name": "search", "parameters": {"query": "..."}}',
    }
    assert call.problem.text.endswith(f"Write it in this form:\n{published[family]}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    [
        "Paris",
        "I used search to find it: Paris.",
        'The record is {"name": "Ada Lovelace", "born": 1815}.',
        '{"name": "Paris", "country": "France"}',
        '```json\n{"answer": "Paris"}\n```',
        '<answer>{"city": "Paris", "population": 2000000}</answer>',
        'A call looks like {"name": "foo", "arguments": {}} in JSON.',
        'The tool "search" found nothing.',
        "search: nothing was found",
        "- search engines are of no use here",
        "I could call search(query) once more, but Paris is right.",
        "search(query) would give the same again.",
        "The set {x | x > 1} has no name: search as you like.",
        '{"name": "search", "born": 1950}',
        '{"search": "nothing was found", "answer": "Paris"}',
        '{"type": "search", "result": "Paris"}',
        "a < b and {c} > d",
        "5 tools were of no help.",
    ],
)
def test_a_text_that_mentions_json_or_a_tool_is_an_answer(family, text):
    end = {"gptoss": "<|return|>", "llama3_1": "<|eot_id|>"}.get(family, "<|im_end|>")
    begin = {"gptoss": "<|channel|>final<|message|>", "qwen3_6": "</think>\n\n"}.get(family, "")
    turn = begin + text + end
    reading = read(turn, family)
    assert reading.calls == [] and "tool_calls" not in reading.message
    assert reading.message["content"] == text


@pytest.mark.parametrize(
    ("family", "turn"),
    [
        ("qwen2_5", f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "search", "argu\n</tool_call>'),
        ("qwen2_5", f'<tool_call>\n{{"name": "search", "argu\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>'),
        ("qwen2_5", f'<tool_call>\n{{"name": "search", "arguments": \n<tool_call>\n{CALL}\n</tool_call>'),
        ("qwen2_5", f'<tool_call>\n{CALL}\n{{"name": "search", "arguments"\n</tool_call>'),
        ("qwen2_5", f'{{"name": "search", "arguments": {{"query": "a"}}\n{CALL}'),
        ("qwen2_5", f"```json\n{CALL}\n```\n<tool_call>\n</tool_call>"),
        ("qwen3_6", f"<tool_call>\n{XML}\n</tool_call>\n<tool_call>\n<function=search\n</tool_call>"),
        ("qwen3_6", f"<tool_call>\n<function=\n</tool_call>\n<tool_call>\n{XML}\n</tool_call>"),
        ("gptoss", GPTOSS["analysis channel"] + '<|start|>assistant<|channel|>commentary to=functions.search<|message|>{"q"<|call|>'),
        ("llama3_1", f'{LLAMA}; {{"name": "search", "parameters": {{"query": <|eot_id|>'),
    ],
)  # fmt: skip
def test_of_a_good_and_a_broken_call_the_good_one_runs(family, turn):
    called = calls_of(turn, family)
    assert sorted(arguments == {"query": "Paris"} for _, arguments in called) == [False, True]
    assert [arguments for _, arguments in called if arguments != {"query": "Paris"}] == ["malformed"]


@pytest.mark.parametrize(
    ("family", "turn"),
    [
        ("qwen2_5", f"<tool_call>{CALL}</tool_call><tool_call>{CALL.replace('Paris', 'Rome')}</tool_call>"),
        ("qwen2_5", f"<tools>[{CALL}, {CALL.replace('Paris', 'Rome')}]</tools>"),
        ("qwen2_5", f"{CALL}\n{CALL.replace('Paris', 'Rome')}"),
        ("qwen2_5", f"```json\n[{CALL}, {CALL.replace('Paris', 'Rome')}]\n```"),
        ("qwen3_6", f"<tool_call>{XML}</tool_call>\n{XML.replace('Paris', 'Rome')}\n</tool_call>"),
        ("llama3_1", f"{LLAMA}; {LLAMA.replace('Paris', 'Rome')}<|eom_id|>"),
        ("llama3_1", "[search(query='Paris'), search(query='Rome')]<|eot_id|>"),
    ],
)
def test_several_calls_run_in_their_order(family, turn):
    assert calls_of(turn, family) == [*PARIS, ("search", {"query": "Rome"})]


@pytest.mark.parametrize(
    ("turn", "arguments"),
    [
        ("<function=add><parameter=a>7</parameter></function>", {"a": 7}),
        ("<function=add><parameter=a>7</parameter><parameter=b>\n8\n</parameter></function>", {"a": 7, "b": 8}),
        ('<function=add><parameter=a>7</parameter><parameter=tags>["x"]</parameter></function>', {"a": 7, "tags": ["x"]}),
        ("<function=add><parameter=a>7</parameter><parameter=tags>None</parameter></function>", {"a": 7, "tags": None}),
        ("add(7, b=8)", {"a": 7, "b": 8}),
        ('add({"a": 7})', {"a": 7}),
        ("<tool_call>add<arg_key>a</arg_key><arg_value>7</arg_value></tool_call>", {"a": 7}),
        ("<add>7</add>", {"a": 7}),
        ('<add a="7"/>', {"a": 7}),
    ],
)  # fmt: skip
def test_values_that_are_text_get_the_types_of_the_parameters(turn, arguments):
    assert calls_of(turn) == [("add", arguments)]


def test_text_stays_text():
    assert calls_of(XML.replace("Paris", "75001"), "qwen3_6") == [("search", {"query": "75001"})]


def test_a_tool_that_does_not_exist_is_named():
    turns = ("<tool_call>{0}</tool_call>", "{0}", "```json\n{0}\n```", "<tool_call>{0}")
    for turn in turns:
        text = turn.format(CALL.replace("search", "serch"))
        assert calls_of(text) == [("serch", "unknown_tool")]


def test_marks_inside_the_arguments_belong_to_them():
    """Neither a tag nor an answer nor a call in a query is one."""
    for query in ("</tool_call>", "<answer>Paris</answer>", "<tool_call>{", CALL.replace('"', "'"), "search(x)"):
        turn = (
            f'<tool_call>{{"name": "search", "arguments": {{"query": "{query}"}}}}</tool_call> And <tool_call>{CALL}'
        )
        assert calls_of(turn) == [("search", {"query": query}), *PARIS]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_of_every_family(family):
    """A broken call, a call in an unusual form, an answer: each is followed by what it should be."""
    tokenizer = tokenizer_of(family)
    unusual = {"qwen2_5": "code fence", "qwen3_6": "no tags", "gptoss": "analysis channel", "llama3_1": "python tag"}
    broken = {"gptoss": "<|channel|>commentary to=functions.search<|message|>{<|call|>"}.get(family, "<tool_call>{")
    final = {"gptoss": "<|channel|>final<|message|>", "qwen3_6": "</think>"}.get(family, "")
    script = [broken, FAMILIES[family][unusual[family]], f"{final}<answer>Paris</answer>{ENDS[family]}"]
    turns = [tokenizer.encode(turn, add_special_tokens=False) for turn in script]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Where?"}], add_generation_prompt=True)
    ids = prompt["input_ids"]
    ends = tokenizer.convert_tokens_to_ids([ENDS[family], *MARKS.get(family, [])[-2:]])
    loop = RolloutLoop(
        tokenizer,
        RolloutLimits(max_completion_length=4000),
        ObservationEncoder(tokenizer),
        ToolRunner(),
        sample=lambda contexts, rollouts, longest: ([turns.pop(0)], None),
        end_token_ids=ends,
    )
    rollout, first = Rollout(0, list(ids), {"search": tiny.search}), turns.pop(0)
    with parser_errors_as_value_errors(tokenizer):
        message = parse_response(tokenizer, first, prefix=ids)
        log = loop.run([rollout], SampledTurns([first], None, [message]))
    assert log.stops == ["answered"] and log.errors == {"malformed": 1} and log.tools_called == [[(), ("search",), ()]]
    observations = [message["content"] for message in rollout.messages if message["role"] == "tool"]
    assert "Write it in this form:" in observations[0] and observations[1] == tiny.search("Paris")
    assert answer_reward([rollout.messages], answers=["Paris"]) == [1.0]


# An answer and a call in one turn


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["good", "broken"])
def test_the_first_of_answer_and_call_counts(family, kind):
    good = {"qwen2_5": QWEN2_5["on one line"], "qwen3_6": QWEN3_5["on one line"], "llama3_1": LLAMA}
    harmony = GPTOSS["the model's own order"], '<|channel|>commentary to=functions.search<|message|>{"query"<|call|>'
    if family == "gptoss":
        call, answer = (
            harmony[kind == "broken"],
            "<|channel|>final<|message|><answer>Rome</answer><|end|><|start|>assistant",
        )
    else:
        broken = {"qwen2_5": "<tool_call>{</tool_call>", "qwen3_6": "<tool_call><function=search</tool_call>"}
        call, answer = (good if kind == "good" else broken).get(family, LLAMA[:-2] + "\n"), "<answer>Rome</answer>"
    begin = "</think>" if family == "qwen3_6" else ""  # the prompt has opened a thought
    answered = read(begin + answer + call, family)
    assert answered.is_answer and answered.calls == [] and "tool_calls" not in answered.message
    assert answer_reward([[answered.message]], answers=[["Rome"]]) == [1.0]
    called = read(begin + call + answer, family)
    assert not called.is_answer and bool(called.malformed) == (kind == "broken")
    assert answer_reward([[called.message]], answers=[["Rome"]]) == [-2.0]


@pytest.mark.parametrize(
    ("turn", "is_answer"),
    [
        (f"<answer>Rome<tool_call>{CALL}</tool_call></answer>", False),  # the answer is not complete before the call
        (f"<answer>Rome {CALL}", False),
        (f"</answer>Rome<answer> <tool_call>{CALL}</tool_call>", False),
        (f"<answer></answer><tool_call>{CALL}</tool_call>", False),  # nothing is no answer
        (f"<answer>Rome</answer> or <answer>Milan</answer> <tool_call>{CALL}</tool_call>", True),
        (f"<answer>Milan</answer> <tool_call>{CALL}</tool_call> <answer>Rome</answer>", True),
        (f"<think><answer>Rome</answer></think> <tool_call>{CALL}</tool_call>", False),
        (f"<think>{CALL}</think> <answer>Milan</answer>", True),
    ],
)
def test_what_is_an_answer_before_a_call(turn, is_answer):
    reading = read(turn)
    assert (reading.is_answer, bool(reading.calls)) == (is_answer, not is_answer)
    assert answer_reward([[reading.message]], answers=[["Milan"]]) == [1.0 if is_answer else -2.0]


def test_an_answer_in_an_unclosed_thought_is_none():
    """Qwen3.5's generation prompt opens the thought. Without the call this turn has no answer either."""
    answer = "<answer>Rome</answer>"
    assert not read(answer, "qwen3_6").is_answer
    assert calls_of(answer + QWEN3_5["as published"], "qwen3_6") == PARIS
    assert read(f"</think>{answer}{QWEN3_5['as published']}", "qwen3_6").is_answer


def test_what_is_wrong_is_said_once():
    called = calls_of("<tool_call>\n" * 500 + CALL)
    assert [arguments for _, arguments in called if arguments != "malformed"] == [{"query": "Paris"}]
    assert len(called) <= 2


# Turns that a limit has cut off


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3_6", "gptoss", "llama3_1"])
def test_no_half_of_a_call_runs(family):
    """Wherever a limit cuts a call, what runs is whole; as soon as there is a sign of a call, it is none of an answer."""
    turn = {"gptoss": GPTOSS["the model's own order"], "llama3_1": LLAMA, "qwen2_5": QWEN2_5["as published"]}
    text = turn.get(family, QWEN3_5["as published"]).removesuffix("<|im_end|>")
    for length in range(1, len(text) + 1):
        reading = read(text[:length], family, was_cut=True)
        ran = [call.arguments for call in reading.calls if call.problem is None]
        assert ran in ([], [{"query": "Paris"}]), text[:length]
        assert not reading.is_answer
        if "Par" in text[:length]:
            assert reading.calls, text[:length]
    assert ran == [{"query": "Paris"}]


# Any text

PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tools>", "<function=search>", "<parameter=query>", "</parameter>", "<think>"),
        *("</think>", "to=functions.search", "<|message|>", "<|channel|>analysis", "<|call|>", "<|python_tag|>", "```json"),
        *('{"name": "search", "arguments": {', '"query": "Paris"', "}", "{", "[", "]", '"', "'", "\\", "\n", "search("),
        *("query='x'", ")", "<search>", "</search>", "Action: search", "<answer>", "</answer>", "[TOOL_CALLS]", "é🙂\x00"),
        *(CALL, XML, LLAMA, "<arg_key>", "<arg_value>", "search", ":", ",", "=", "<｜tool▁call▁begin｜>", "\ud800"),
    ]
)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(PIECES | st.text(max_size=5), max_size=30).map("".join))
def test_any_text_is_read(text):
    calls = find_calls(text, PARAMETERS)
    assert all(0 <= call.start <= call.end <= len(text) for call in calls)
    assert [call.start for call in calls] == sorted(call.start for call in calls)
    reading = read(text.encode("utf-8", "replace").decode() + "<|im_end|>")
    assert all((call.problem is None) == (call.function is not None) or call.problem for call in reading.calls)
    assert not (reading.is_answer and reading.calls)


@pytest.mark.parametrize(
    "unit",
    [
        *("{", '{"a":', '{"name": "search",', '"name": "search", ', '{"name": "search", "arguments": [', "<tool_call>"),
        *("</tool_call> x", "<function=search>", "<parameter=query>", "<function=search><parameter=query>", "<search>"),
        *("\nsearch(", "\nsearch(x)", "Action: search\n", "to=functions.search ", "<search a", " ", "\n", "a", "<a>"),
        *("<tool_call>search<arg_key>", CALL, "<tool_call>{", "```json\n{", "<think>", "</think>", "<|end|>", "'", "\\"),
    ],
)  # fmt: skip
def test_the_time_is_linear_in_the_length_of_the_text(unit):
    """A hundred thousand characters of anything; quadratic time would take minutes."""
    text = unit * (100_000 // len(unit))
    reader, start = TurnReader(tokenizer_of("qwen2_5")), time.process_time()
    find_calls(text, PARAMETERS)
    reader._split(text)
    assert time.process_time() - start < 5
