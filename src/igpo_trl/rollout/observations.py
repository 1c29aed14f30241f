"""Observations: the token ids of what a policy reads between two of its turns.

A tool may return any text: role markers, tool calls, answers, end-of-turn strings. In the policy's context they are
text and nothing else. A marker that is one token of the tokenizer (`<|im_end|>`, `<tool_call>`, …) is therefore
encoded in two halves where it stands in a message's content, and as that token only where the chat template put it. A
content without any such marker is encoded exactly as the chat template's rendering would be.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

TRUNCATION_MARKER = " … [truncated]"

# Characters that no template and no text gives a meaning to; the first that no content holds marks where to split.
_PRIVATE_USE = range(0xE000, 0xF8FF)


class ObservationEncoder:
    """
    Renders the messages that follow an assistant turn with the chat template, and encodes them once.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a prefix-preserving chat template.
        chat_template (`str`, *optional*): used instead of the tokenizer's own.
        chat_template_kwargs (`dict`, *optional*): passed on to the template.
        max_tokens (`int`, *optional*): longest content of one tool message, in tokens, including the marker that
            says so; `None` for no limit.

    Raises:
        `ValueError`: if `max_tokens` leaves no room beside the marker, or the tokenizer gives no character offsets.
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
            # Some tokenizers add plain whitespace, which is text, as is what stands for words that they do not know
            if i != tokenizer.unk_token_id and (token.special or (not str(token).isspace() and len(str(token)) > 1))
        }
        self._marker_ids = frozenset(markers.values())
        # Looking ahead finds overlapping ones as well. Longest first is not needed: only where they begin counts.
        alternatives = "|".join(re.escape(marker) for marker in markers if len(marker) > 1)
        self._marker = re.compile(f"(?=(?:{alternatives}))") if alternatives else None
        self._prefixes: dict[str, list[int]] = {}
        self._frames: dict[tuple[str, ...], Counter[int]] = {}
        self.max_tokens = max_tokens
        if max_tokens is not None:
            least = len(self._encode_text(TRUNCATION_MARKER)) + 1
            if max_tokens < least:
                raise ValueError(
                    f"`max_tool_response_tokens` must be at least {least}, which is one token and the marker "
                    f"{TRUNCATION_MARKER!r}, got {max_tokens}."
                )
            if not tokenizer.is_fast:
                raise ValueError(
                    f"`max_tool_response_tokens` needs a tokenizer that knows character offsets, got "
                    f"{type(tokenizer).__name__}. Use the fast version of the tokenizer, or set it to `None`."
                )

    def truncate(self, text: str, max_tokens: int | None = None) -> str:
        """
        The longest beginning of a text that fits, cut between two characters at a token's edge, and a marker.

        Args:
            text (`str`): content of a tool message.
            max_tokens (`int`, *optional*): limit in tokens, the marker included; default that of the encoder. A limit
                that has no room for text leaves the marker alone.

        Returns:
            `str`: the text itself if it fits.
        """
        limit = self.max_tokens if max_tokens is None else max_tokens
        # A token is at least one byte, except where a tokenizer adds some of its own.
        if limit is None or len(text.encode("utf-8", "replace")) + 2 <= limit or self.count(text) <= limit:
            return text
        budget = limit - len(self._encode_text(TRUNCATION_MARKER))
        while budget > 0:
            shorter = text[: self._cut(text, budget)] + TRUNCATION_MARKER
            if self.count(shorter) <= limit:
                return shorter
            budget -= 1  # the cut made the tokenizer split its neighbourhood otherwise
        return TRUNCATION_MARKER

    def count(self, text: str) -> int:
        """Number of tokens of a text inside an observation."""
        return sum(len(ids) for ids in self._encode_texts(self._pieces(text)))

    def encode(self, observations: Sequence[Sequence[dict[str, Any]]]) -> list[list[int]]:
        """
        Token ids of what follows the end-of-turn token of an assistant turn that called tools.

        Args:
            observations: for each rollout, the messages after that turn: `{"role": "tool", "name": …, "content": …}`,
                perhaps a `{"role": "user", …}` at the end.

        Returns:
            list of list of `int`: rendered messages and the next generation prompt.

        Raises:
            `ValueError`: if the chat template is not prefix-preserving.
        """
        prefixes = [self._prefix(messages) for messages in observations]
        rendered = [self._render(messages) for messages in observations]
        encoded = iter(self._encode_texts(itertools.chain.from_iterable(rendered)))
        results: list[list[int]] = []
        for messages, prefix, pieces in zip(observations, prefixes, rendered, strict=True):
            ids = list(itertools.chain.from_iterable(itertools.islice(encoded, len(pieces))))
            if self._markers(ids) != self._frame(messages):
                # The tokenizer normalises text to a marker that was not one: single characters cannot become one.
                pieces = self._render(messages, everywhere=True)
                ids = list(itertools.chain.from_iterable(self._encode_texts(pieces)))
            results.append(ids[self._turn_end(messages, prefix, ids) :])
        return results

    def _prefix(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Tokens of the dummy conversation up to the end of its assistant turn."""
        dummy = _dummy_conversation(messages)
        key = str(dummy[-1])
        if key not in self._prefixes:
            ids = self._encode_text(self._apply(dummy, add_generation_prompt=False))
            ends = [i for i, token in enumerate(ids) if token == self.tokenizer.eos_token_id]
            # Templates write a newline behind the end of a turn, which the policy does not sample.
            self._prefixes[key] = ids[: ends[-1] + 1] if ends else ids
        return self._prefixes[key]

    def _turn_end(self, messages: Sequence[dict[str, Any]], prefix: list[int], ids: list[int]) -> int:
        """Where the dummy conversation's assistant turn ends in a rendering of all messages."""
        if ids[: len(prefix)] == prefix:
            return len(prefix)
        end = self.tokenizer.eos_token_id
        ends = [i for i, token in enumerate(ids) if token == end]
        if messages[-1]["role"] == "user" and prefix[-1] == end and len(ends) >= prefix.count(end):
            # Templates of thinking models drop the thoughts of turns before a user message. Those of the policy were
            # sampled and stay as they are; all that is needed here is what follows.
            return ends[prefix.count(end) - 1] + 1
        raise ValueError(
            "The chat template is not prefix-preserving: rendering a tool message changed the tokens of the turn "
            f"before it. Expected them to begin with {self.tokenizer.decode(prefix)!r}, got "
            f"{self.tokenizer.decode(ids[: len(prefix)])!r}."
        )

    def _render(self, messages: Sequence[dict[str, Any]], everywhere: bool = False) -> list[str]:
        """Rendered dummy conversation with these messages behind it, split where a marker must not become a token."""
        contents = [str(message["content"]) for message in messages]
        taken = set().union(*contents)
        split = next(chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        broken = [
            message | {"content": split.join(content if everywhere else self._pieces(content))}
            for message, content in zip(messages, contents, strict=True)
        ]
        return self._apply(_dummy_conversation(messages) + broken, add_generation_prompt=True).split(split)

    def _pieces(self, text: str) -> list[str]:
        """The text, split behind the first character of every marker."""
        if self._marker is None:
            return [text]
        cuts = [match.start() + 1 for match in self._marker.finditer(text)]
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def _frame(self, messages: Sequence[dict[str, Any]]) -> Counter[int]:
        """How often each marker stands in the rendering when the contents hold none."""
        key = tuple(f"{message['role']}\0{message.get('name', '')}" for message in messages)
        if key not in self._frames:
            plain = [message | {"content": "x"} for message in messages]
            (text,) = self._render(plain)
            self._frames[key] = self._markers(self._encode_text(text))
        return self._frames[key]

    def _markers(self, ids: Iterable[int]) -> Counter[int]:
        return Counter(token for token in ids if token in self._marker_ids)

    def _cut(self, text: str, budget: int) -> int:
        """Position of the first character that the first `budget` tokens do not hold whole."""
        position = 0
        for piece in self._pieces(text):
            offsets = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            if len(offsets) > budget:
                return position + offsets[budget][0]
            budget -= len(offsets)
            position += len(piece)
        return position

    def _apply(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False, **self.template
        )

    def _encode_text(self, text: str) -> list[int]:
        return self._encode_texts([text])[0]

    def _encode_texts(self, texts: Iterable[str]) -> list[list[int]]:
        texts = list(texts)
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _dummy_conversation(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What may stand before these messages: an assistant turn that called the first one's tool, if it is a tool's."""
    assistant: dict[str, Any] = {"role": "assistant", "content": "dummy"}
    if messages[0]["role"] == "tool":
        # Some templates (GPT-OSS) write the called tool's name into the tool message's header.
        function = {"name": str(messages[0].get("name", "tool")), "arguments": {}}
        assistant |= {"content": "", "tool_calls": [{"type": "function", "function": function}]}
    return [{"role": "user", "content": "dummy"}, assistant]
