"""
Chat templates and how the turns that they render are parsed.

TRL knows published chat templates by their exact text. Here a template is known by what it renders: the response
template that parses a rendered call back into the same call is the right one, whatever else was edited.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trl.chat_template_utils as known
import trl.trainer.grpo_trainer as grpo_trainer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing import parse_response
from transformers.utils.chat_parsing.response_templates import load_response_template

from .observations import ObservationEncoder
from .written_calls import find_calls

logger = logging.getLogger(__name__)

_NAME, _ARGUMENTS, _RESULT, _ANSWER = "look_up", {"title": "a certain title"}, "what was found", "a certain answer"
_CALL_ID = "abcdef123"

#: Of the families whose calls TRL can parse. The order matters where two parse the same call.
_RESPONSE_TEMPLATES = (
    known.qwen3_template,
    known.qwen3_5_template,
    known.nemotron_3_template,
    known.glm4moe_template,
    known.llama3_template,
    known.gptoss_template,
    known.lfm2_2_5_template,
    known.gemma4_template,
)


def prepare_for_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Choose the chat template and the response template with which a tokenizer calls tools, unless they are set.

    Of several named chat templates it is the one for tools. A `response_template` that was set by hand stays.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Changed in place.

    Raises:
        ValueError: The chat template cannot call tools, or no known response template parses what it renders.
    """
    if isinstance(tokenizer.chat_template, dict):
        names = ", ".join(tokenizer.chat_template)
        name = next((name for name in ("tool_use", "default") if name in tokenizer.chat_template), None)
        if name is None:
            raise ValueError(
                f"The tokenizer has several chat templates ({names}), and none is named 'tool_use' or 'default'. "
                "Choose one: `tokenizer.chat_template = tokenizer.chat_template[...]`."
            )
        logger.warning("Of the tokenizer's chat templates (%s), %r is used.", names, name)
        tokenizer.chat_template = tokenizer.chat_template[name]
    if not tokenizer.chat_template:
        raise ValueError(
            "The tokenizer has no chat template, which tool calls are rendered with. Use an instruction-tuned model, "
            "set `tokenizer.chat_template`, or warm-start the model (`igpo warm-start`), which gives it one."
        )
    _tolerate_missing_tools(tokenizer)
    if problem := _tool_problem(tokenizer):
        raise ValueError(
            f"The tokenizer's chat template cannot call tools: {problem} Use a model that was trained to call tools "
            "(Qwen2.5, Qwen3, Llama 3.1, GPT-OSS, …), another `tokenizer.chat_template`, or warm-start the model "
            "(`igpo warm-start`), which gives it one."
        )
    if getattr(tokenizer, "response_template", None) is not None:
        try:
            load_response_template(tokenizer.response_template)
        except Exception as error:  # Transformers raises several kinds
            raise ValueError(f"`tokenizer.response_template` is no response template: {error}.") from error
        return
    try:
        known.add_response_schema(tokenizer)
    except ValueError:
        tokenizer.response_template = recognise(tokenizer)
    _check_observations(tokenizer)


def _check_observations(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless results can be rendered after a turn."""
    try:
        ObservationEncoder(tokenizer).encode([[{"role": "tool", "name": _NAME, "content": _RESULT}]])
    except Exception as error:  # a template may raise anything
        raise ValueError(f"The tokenizer's chat template cannot call tools: {error}") from error


def recognise(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    The response template that parses the calls and the answers that the tokenizer's chat template renders.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template that can call tools.

    Returns:
        `dict`: One of TRL's, or one that leaves the calls to [`TurnReader`] if that can read them.

    Raises:
        ValueError: Nothing can read the calls.
    """
    user = {"role": "user", "content": "a question"}
    prompt = _render(tokenizer, [user], add_generation_prompt=True)
    try:
        call = _render(tokenizer, [user, _calling_turn(as_text=False)])
    except TypeError:  # DeepSeek's template takes arguments as text only
        call = _render(tokenizer, [user, _calling_turn(as_text=True)])
    answer = _render(tokenizer, [user, {"role": "assistant", "content": _ANSWER}])
    for template in _RESPONSE_TEMPLATES:
        called, answered = (_parsed(template, prompt, full) for full in (call, answer))
        functions = [entry.get("function") for entry in called.get("tool_calls", ())]
        if functions == [{"name": _NAME, "arguments": _ARGUMENTS}] and answered.get("content") == _ANSWER:
            return template
    turn = call[_common(prompt, call) :]
    found = find_calls(turn, {_NAME: tuple(_ARGUMENTS)})
    if [(one.name, one.arguments) for one in found] == [(_NAME, _ARGUMENTS)]:
        end = re.escape(answer.rpartition(_ANSWER)[2].strip())
        content = {"close_pattern": rf"(?:{end})\s*|$" if end else "$", "content": "text"}
        return {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"\Z", "fields": {"content": content}}
    raise ValueError(
        f"The tokenizer's chat template is of no known family: it renders a call as {turn!r}. "
        "Set `tokenizer.response_template`, which says how to parse such a call (the docs of Transformers describe "
        "it under 'Response parsing'), or use the chat template of Qwen2.5, Qwen3, Llama 3.1, GPT-OSS, ...."
    )


@contextmanager
def edited_templates_accepted() -> Iterator[None]:
    """
    Keep TRL from refusing an edited template that is not prefix-preserving.

    TRL replaces such templates by its own, and has them only for published ones. This package's observations do not
    depend on it: what follows a turn is cut at the end-of-turn token.
    """
    original = grpo_trainer.get_training_chat_template

    def training_template_or_none(processing_class: Any) -> str | None:
        try:
            return original(processing_class)
        except ValueError:
            return None

    grpo_trainer.get_training_chat_template = training_template_or_none
    try:
        yield
    finally:
        grpo_trainer.get_training_chat_template = original


def _parsed(template: dict[str, Any], prompt: str, full: str) -> dict[str, Any]:
    """What a response template makes of the turn in `full`, which begins like `prompt`."""
    begin = _common(prompt, full)
    try:
        return parse_response(full[begin:], template, prefix=full[:begin])
    except Exception:  # it parses another family's turns
        return {}


def _common(prompt: str, full: str) -> int:
    """Where two texts begin to differ."""
    return next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))


def _calling_turn(as_text: bool) -> dict[str, Any]:
    arguments = json.dumps(_ARGUMENTS) if as_text else _ARGUMENTS
    call = {"type": "function", "id": _CALL_ID, "function": {"name": _NAME, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _tolerate_missing_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template that runs over its tools without asking whether there are any fails in TRL's checks."""
    user = [{"role": "user", "content": "a question"}]
    try:
        _render(tokenizer, user)
    except TypeError:
        tokenizer.chat_template = "{%- set tools = tools or [] -%}" + str(tokenizer.chat_template)


def _tool_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why TRL cannot call tools with this chat template; `None` if it can."""
    messages = [
        {"role": "user", "content": "a question"},
        _calling_turn(as_text=False),
        {"role": "tool", "name": _NAME, "content": _RESULT},
    ]
    del messages[1]["tool_calls"][0]["id"]  # TRL writes none
    try:
        rendered = _render(tokenizer, messages)
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error).split())
        messages[1] = _calling_turn(as_text=False)
        messages[2]["tool_call_id"] = _CALL_ID
        try:
            _render(tokenizer, messages)
        except Exception:
            try:
                supported = known.supports_tool_calling(tokenizer)
            except Exception:
                supported = False
            return None if supported else f"it fails with {reason!r}."
        return f"it demands an id with every call ({reason!r}), which TRL does not write. Take the ids out of it."
    parts = {
        "the name of the tool": _NAME,
        "the arguments": _ARGUMENTS["title"],
        "the tool's answer": _RESULT,
    }
    missing = [what for what, text in parts.items() if text not in rendered]
    return f"it leaves out {' and '.join(missing)}." if missing else None
