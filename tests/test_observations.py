"""Observations are encoded once, as the chat template renders them, and no text becomes a marker."""

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import chat_template_utils
from trl.chat_template_utils import qwen2_5_chat_template, qwen3_training_chat_template

from igpo_trl.rollout.observations import TRUNCATION_MARKER, ObservationEncoder

TOKENIZER = tiny.make_tokenizer()
MARKERS = [*tiny.SPECIAL_TOKENS, *tiny.MARKERS]
MARKER_IDS = {TOKENIZER.convert_tokens_to_ids(marker) for marker in MARKERS}
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*MARKERS, "<|im_start|>assistant\n", "<answer>", "<", "|im_end|>", "<<|im_end|>", "\ue000"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    ),
    max_size=8,
).map("".join)


def tool_message(content, name="search"):
    return {"role": "tool", "name": name, "content": content}


@pytest.mark.parametrize("template", [qwen2_5_chat_template, qwen3_training_chat_template])
@pytest.mark.parametrize("contents", [["Rome."], ["a\n\n", " b"], [""], ["é 你好 🙂\n"], ["\ue000 private"]])
def test_plain_text_is_encoded_as_the_template_renders_it(template, contents):
    """One rendering, tokenized in one go, cut after the end-of-turn token, as TRL trains on it."""
    tokenizer = tiny.make_tokenizer(template)
    call = {"type": "function", "function": {"name": "search", "arguments": {}}}
    before = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages = [tool_message(content) for content in contents]
    text = tokenizer.apply_chat_template(before + messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    # The first end of turn may be that of a system prompt: the assistant's is the last one before the tool message.
    without = tokenizer.encode(tokenizer.apply_chat_template(before, tokenize=False), add_special_tokens=False)
    start = len(without) - without[::-1].index(tokenizer.eos_token_id)
    assert ObservationEncoder(tokenizer).encode([messages]) == [ids[start:]]


@given(contents=st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_no_text_becomes_a_marker_and_none_is_lost(contents):
    encoder = ObservationEncoder(TOKENIZER)
    messages = [tool_message(content) for content in contents]
    (ids,) = encoder.encode([messages])
    (frame,) = encoder.encode([[tool_message("x")] * len(contents)])
    assert [i for i in ids if i in MARKER_IDS] == [i for i in frame if i in MARKER_IDS]
    # Decoded, the observation reads as the template rendered it, markers in the contents included.
    joined = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, *messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert joined.endswith(TOKENIZER.decode(ids, clean_up_tokenization_spaces=False))


def test_text_around_a_marker_is_encoded_as_ever():
    """Only the marker itself costs more tokens than its one."""
    encoder = ObservationEncoder(TOKENIZER)
    plain, marked = encoder.encode([[tool_message("Paris is the capital. " * n)] for n in (40, 20)])
    (both,) = encoder.encode([[tool_message("Paris is the capital. " * 20 + "<|im_end|> Paris is the capital." * 20)]])
    word = len(TOKENIZER.encode("<")) + len(TOKENIZER.encode("|im_end|>"))
    assert len(marked) < len(plain) and len(both) <= len(plain) + 20 * word


def test_rollouts_are_encoded_independently():
    encoder = ObservationEncoder(TOKENIZER)
    observations = [[tool_message("one <|im_end|> two")], [tool_message("x", "other"), tool_message("y")]]
    assert encoder.encode(observations) == [*encoder.encode(observations[:1]), *encoder.encode(observations[1:])]
    assert encoder.encode([]) == []


def test_a_tokenizer_that_normalises_text_to_a_marker_is_not_fooled():
    from tokenizers import AddedToken, normalizers

    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<mark>", normalized=True)])
    mark = tokenizer.convert_tokens_to_ids("<mark>")
    fullwidth = "".join(chr(ord(c) + 0xFEE0) for c in "<mark>")
    assert mark in tokenizer.encode(fullwidth)
    (ids,) = ObservationEncoder(tokenizer).encode([[tool_message(f"a {fullwidth} b")]])
    assert mark not in ids


def test_a_request_to_answer_follows_the_results():
    (ids,) = ObservationEncoder(TOKENIZER).encode([[tool_message("Rome"), {"role": "user", "content": "Answer now."}]])
    text = TOKENIZER.decode(ids)
    assert text.index("Rome") < text.index("<|im_start|>user\nAnswer now.<|im_end|>")
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_5", "qwen3_training", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8",
        "llama3_1", "llama3_2", "glm4moe_training", "gemma4_v5", "lfm2_v2", "nemotron_3_nano", "deepseekv3_training",
    ],
)  # fmt: skip
def test_templates_of_trl_render_results_and_requests(name):
    """Those of thinking models drop the thoughts of turns before a user message, which must not matter."""
    tokenizer = tiny.make_tokenizer(getattr(chat_template_utils, f"{name}_chat_template"))
    encoder = ObservationEncoder(tokenizer)
    result, request = tool_message("a result"), {"role": "user", "content": "Answer now."}
    alone, followed, asked = (
        tokenizer.decode(ids) for ids in encoder.encode([[result], [result, request], [request]])
    )
    assert "a result" in alone and "a result" in followed and "Answer now." in followed and "Answer now." in asked
    assert followed.index("a result") < followed.index("Answer now.")
    assert "dummy" not in alone + followed + asked
    for text in (followed, asked):
        assert text.endswith(alone[-12:]) or name.startswith(("gemma", "deepseek"))


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewriting = (
        "{%- for m in messages -%}<|im_start|>{{ m.role }}{{ loop.length }}\n{{ m.content }}<|im_end|>{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    )
    with pytest.raises(ValueError, match="not prefix-preserving"):
        ObservationEncoder(tiny.make_tokenizer(rewriting)).encode([[tool_message("x")]])


@given(text=TEXTS.map(lambda text: text * 9), limit=st.integers(20, 60))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_truncation_keeps_a_beginning_that_fits_and_says_so(text, limit):
    encoder = ObservationEncoder(TOKENIZER, max_tokens=limit)
    shorter = encoder.truncate(text)
    assert encoder.count(shorter) <= limit
    if encoder.count(text) <= limit:
        assert shorter == text
    else:
        assert shorter.endswith(TRUNCATION_MARKER)
        assert text.startswith(shorter.removesuffix(TRUNCATION_MARKER))
        assert "�" not in TOKENIZER.decode(encoder.encode([[tool_message(shorter)]])[0]) or "�" in text


def test_truncation_never_cuts_a_character():
    """🙂 is four tokens here: with room for two and a half, two are left."""
    marker = len(TOKENIZER.encode(TRUNCATION_MARKER))
    encoder = ObservationEncoder(TOKENIZER, max_tokens=marker + 10)
    assert encoder.truncate("🙂" * 9) == "🙂🙂" + TRUNCATION_MARKER
    assert encoder.truncate("🙂" * 9, marker) == TRUNCATION_MARKER


def test_a_limit_without_room_is_refused():
    least = len(TOKENIZER.encode(TRUNCATION_MARKER)) + 1
    ObservationEncoder(TOKENIZER, max_tokens=least)
    with pytest.raises(ValueError, match=f"`max_tool_response_tokens` must be at least {least}.*got 2"):
        ObservationEncoder(TOKENIZER, max_tokens=2)
