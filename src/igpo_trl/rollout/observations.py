"""Observations: the token ids of what a policy reads between two of its turns.

A tool may return any text, including role markers, tool calls, answers and end-of-turn strings. In the policy's
context they must remain plain text. A marker that is one token of the tokenizer (`<|im_end|>`, `<tool_call>`, …) is
therefore encoded in two pieces if it occurs in a message's content, and as that token only where the chat template
wrote it. Content without markers is encoded exactly like the rendering of the chat template.
"""

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

TRUNCATION_MARKER = " … [truncated]"

# Characters without a meaning in templates and texts. The first that no content contains marks where to split.
_PRIVATE_USE = range(0xE000, 0xF8FF)


class ObservationEncoder:
    """
    Renders the messages after an assistant turn with the chat template, and encodes them once.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            A tokenizer with a prefix-preserving chat template.
        chat_template (`str`, *optional*):
            Replaces the tokenizer's chat template.
        chat_template_kwargs (`dict`, *optional*):
            Passed on to the template.
        max_tokens (`int`, *optional*):
            Longest content of a tool message, in tokens, truncation marker included; `None` for no limit.

    Raises:
        ValueError: `max_tokens` leaves no room beside the truncation marker, or the tokenizer gives no offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_tokens: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.template = {"chat_template": chat_template, **(chat_template_kwargs or {})}
        markers = {
            str(token): i
            for i, token in tokenizer.added_tokens_decoder.items()
            # Added whitespace and the unknown token are plain text.
            if i != tokenizer.unk_token_id and (token.special or (not str(token).isspace() and len(str(token)) > 1))
        }
        self._marker_ids = frozenset(markers.values())
        # The lookahead finds overlapping markers as well. Their order does not matter, because only starts are used.
        alternatives = "|".join(re.escape(marker) for marker in markers if len(marker) > 1)
        self._marker = re.compile(f"(?=(?:{alternatives}))") if alternatives else None
        self._prefixes: dict[str, list[int]] = {}
        self._frames: dict[tuple[str, ...], Counter[int]] = {}
        self.max_tokens = max_tokens
        if max_tokens is not None:
            least = len(self._encode_text(TRUNCATION_MARKER)) + 1
            if max_tokens < least:
                raise ValueError(
                    f"`max_tool_response_tokens` must be at least {least}, one token and the marker "
                    f"{TRUNCATION_MARKER!r}, got {max_tokens}."
                )
            if not tokenizer.is_fast:
                raise ValueError(
                    f"`max_tool_response_tokens` needs a tokenizer with character offsets, got "
                    f"{type(tokenizer).__name__}. Use the fast version of the tokenizer, or set it to `None`."
                )

    def truncate(self, text: str, max_tokens: int | None = None) -> str:
        """
        Truncate a text at the edge of a token, never inside a character, and append a marker.

        Args:
            text (`str`): Content of a tool message.
            max_tokens (`int`, *optional*): Limit in tokens, marker included. Defaults to that of the encoder. If it
                leaves no room for text, only the marker remains.

        Returns:
            `str`: The truncated text, or the text itself if it fits.
        """
        limit = self.max_tokens if max_tokens is None else max_tokens
        # A token has at least one byte, except the few that a tokenizer adds.
        if limit is None or len(text.encode("utf-8", "replace")) + 2 <= limit or self.count(text) <= limit:
            return text
        budget = limit - len(self._encode_text(TRUNCATION_MARKER))
        while budget > 0:
            shorter = text[: self._cut(text, budget)] + TRUNCATION_MARKER
            if self.count(shorter) <= limit:
                return shorter
            budget -= 1  # the text near the cut has become more tokens
        return TRUNCATION_MARKER

    def count(self, text: str) -> int:
        """Number of tokens that a text has in an observation."""
        return sum(len(ids) for ids in self._encode_texts(self._pieces(text)))

    def encode(self, observations: Sequence[Sequence[dict[str, Any]]]) -> list[list[int]]:
        """
        Encode what follows the end-of-turn token of an assistant turn.

        Args:
            observations (`Sequence[Sequence[dict]]`): For each rollout, the messages after that turn:
                `{"role": "tool", "name": …, "content": …}`, optionally followed by a `{"role": "user", …}`.

        Returns:
            `list[list[int]]`: Token ids of the rendered messages and the next generation prompt.

        Raises:
            ValueError: The chat template is not prefix-preserving.
        """
        prefixes = [self._prefix(messages) for messages in observations]
        rendered = [self._render(messages) for messages in observations]
        encoded = iter(self._encode_texts(itertools.chain.from_iterable(rendered)))
        results: list[list[int]] = []
        for messages, prefix, pieces in zip(observations, prefixes, rendered, strict=True):
            ids = list(itertools.chain.from_iterable(itertools.islice(encoded, len(pieces))))
            if self._markers(ids) != self._frame(messages):
                # Normalisation made a marker out of text that was not one. Encode every character by itself.
                pieces = self._render(messages, everywhere=True)
                ids = list(itertools.chain.from_iterable(self._encode_texts(pieces)))
            results.append(ids[self._turn_end(messages, prefix, ids) :])
        return results

    def render_call(self, name: str, arguments: dict[str, Any]) -> str:
        """The text that the chat template writes for a call; empty if it cannot write it alone."""
        user = {"role": "user", "content": "dummy"}
        function = {"type": "function", "function": {"name": name, "arguments": arguments}}
        assistant = {"role": "assistant", "content": "", "tool_calls": [function]}
        try:
            before = self._apply([user], add_generation_prompt=True)
            text = self._apply([user, assistant], add_generation_prompt=False)
        except Exception:  # a template may raise anything
            return ""
        text = text[len(os.path.commonprefix([before, text])) :].split(str(self.tokenizer.eos_token))[0]
        return text.rpartition("</think>")[2].strip()

    def _prefix(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Tokens of the dummy conversation up to the end of its assistant turn."""
        dummy = _dummy_conversation(messages)
        key = str(dummy[-1])
        if key not in self._prefixes:
            ids = self._encode_text(self._apply(dummy, add_generation_prompt=False))
            ends = [i for i, token in enumerate(ids) if token == self.tokenizer.eos_token_id]
            # Templates write a newline after the end of a turn, which the policy does not sample.
            self._prefixes[key] = ids[: ends[-1] + 1] if ends else ids
        return self._prefixes[key]

    def _turn_end(self, messages: Sequence[dict[str, Any]], prefix: list[int], ids: list[int]) -> int:
        """Index in `ids` after the assistant turn of the dummy conversation."""
        if ids[: len(prefix)] == prefix:
            return len(prefix)
        end = self.tokenizer.eos_token_id
        ends = [i for i, token in enumerate(ids) if token == end]
        if prefix[-1] == end and len(ends) >= prefix.count(end):
            # Templates of thinking models write empty thoughts into the last turn only. The policy's sampled turns are
            # not rendered here, so only the messages after them matter.
            after = ends[prefix.count(end) - 1] + 1
            turns = [_without_thoughts(self.tokenizer.decode(tokens)) for tokens in (prefix, ids[:after])]
            if messages[-1]["role"] == "user" or turns[0] == turns[1]:
                return after
        raise ValueError(
            "The chat template is not prefix-preserving: rendering a tool message changed the tokens of the turn "
            f"before it. Expected them to begin with {self.tokenizer.decode(prefix)!r}, got "
            f"{self.tokenizer.decode(ids[: len(prefix)])!r}."
        )

    def _render(self, messages: Sequence[dict[str, Any]], everywhere: bool = False) -> list[str]:
        """Render a dummy conversation with these messages, in pieces that split every marker in their contents."""
        contents = [str(message["content"]) for message in messages]
        taken = set().union(*contents)
        split = next(chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        broken = [
            message | {"content": split.join(content if everywhere else self._pieces(content))}
            for message, content in zip(messages, contents, strict=True)
        ]
        return self._apply(_dummy_conversation(messages) + broken, add_generation_prompt=True).split(split)

    def _pieces(self, text: str) -> list[str]:
        """The text, split after the first character of every marker."""
        if self._marker is None:
            return [text]
        cuts = [match.start() + 1 for match in self._marker.finditer(text)]
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def _frame(self, messages: Sequence[dict[str, Any]]) -> Counter[int]:
        """Number of times that the chat template writes each marker around these messages."""
        key = tuple(f"{message['role']}\0{message.get('name', '')}" for message in messages)
        if key not in self._frames:
            plain = [message | {"content": "x"} for message in messages]
            (text,) = self._render(plain)
            self._frames[key] = self._markers(self._encode_text(text))
        return self._frames[key]

    def _markers(self, ids: Iterable[int]) -> Counter[int]:
        return Counter(token for token in ids if token in self._marker_ids)

    def _cut(self, text: str, budget: int) -> int:
        """Index of the first character that is not entirely in the first `budget` tokens."""
        position = 0
        for piece in self._pieces(text):
            offsets = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            if len(offsets) > budget:
                return position + offsets[budget][0]
            budget -= len(offsets)
            position += len(piece)
        return position

    def _apply(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "tokenize": False, **self.template}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except TypeError:  # DeepSeek's template takes arguments as text only
            return self.tokenizer.apply_chat_template([_with_text_arguments(one) for one in messages], **options)

    def _encode_text(self, text: str) -> list[int]:
        return self._encode_texts([text])[0]

    def _encode_texts(self, texts: Iterable[str]) -> list[list[int]]:
        texts = list(texts)
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    entries = [{"type": "function", "function": call | {"arguments": json.dumps(call["arguments"])}} for call in calls]
    return message | ({"tool_calls": entries} if entries else {})


def _without_thoughts(text: str) -> str:
    return re.sub(r"<think>\s*</think>\s*", "", text)


def _dummy_conversation(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation that these messages can follow; a tool message needs an assistant turn that called its tool."""
    assistant: dict[str, Any] = {"role": "assistant", "content": "dummy"}
    if messages[0]["role"] == "tool":
        # Some templates (GPT-OSS) write the called tool's name into the tool message's header.
        function = {"name": str(messages[0].get("name", "tool")), "arguments": {}}
        assistant |= {"content": "", "tool_calls": [{"type": "function", "function": function}]}
    return [{"role": "user", "content": "dummy"}, assistant]
