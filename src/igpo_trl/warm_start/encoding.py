"""Traces → token ids and labels, the same ids that a rollout with these turns has."""

import os.path
from collections.abc import Callable, Sequence
from typing import Any

from ..rollout.observations import ObservationEncoder

IGNORE = -100
"""Label of a token without loss."""


_USER = {"role": "user", "content": "a question"}


class TraceEncoder:
    """
    Encodes traces as [`IGPOTrainer`] encodes rollouts: the rendered prompt, each turn by itself, each observation.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template that calls tools.
        tools (sequence of `Callable`): The tools that the prompt describes.
        chat_template_kwargs (`dict`, *optional*): Passed on to the template.
    """

    def __init__(
        self,
        tokenizer: Any,
        tools: Sequence[Callable[..., Any]],
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.tokenizer, self.tools, self.options = tokenizer, list(tools), chat_template_kwargs or {}
        self._observations = ObservationEncoder(tokenizer, None, chat_template_kwargs)
        self._turn_start = self._render([_USER], add_generation_prompt=True)
        self._ends = set(tokenizer.all_special_ids) | {
            i for i, t in tokenizer.added_tokens_decoder.items() if t.special
        }

    def encode(self, messages: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
        """
        `input_ids` and `labels` of a trace. Only the assistant's turns have labels.

        Raises:
            ValueError: The chat template cannot render the messages.
        """
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(messages[:first]),
            tools=self.tools or None,
            add_generation_prompt=True,
            return_dict=False,
            **self.options,
        )
        ids = list(ids)
        labels = [IGNORE] * len(ids)
        observed: list[dict[str, Any]] = []
        for message in messages[first:]:
            if message["role"] != "assistant":
                observed.append(message)
                continue
            if observed:
                observation = self._observations.encode([observed])[0]
                ids += observation
                labels += [IGNORE] * len(observation)
                observed = []
            turn = self._turn(message)
            ids += turn
            labels += turn
        return {"input_ids": ids, "labels": labels}

    def _turn(self, message: dict[str, Any]) -> list[int]:
        """What a policy samples to say this."""
        rendered = self._render([_USER, message])
        text = rendered[len(os.path.commonprefix([self._turn_start, rendered])) :].rstrip()
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if ids and ids[-1] in self._ends else [*ids, self.tokenizer.eos_token_id]

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "tokenize": False, **self.options}
        return str(self.tokenizer.apply_chat_template(messages, **options))
