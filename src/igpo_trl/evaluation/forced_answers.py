"""Answers that a policy gives when it has to answer at once: sampled from the states whose belief was scored."""

from collections.abc import Sequence
from typing import Any

import torch

from ..beliefs.probes import AnswerProbe, split_template
from ..rewards import Variant, exact_match

_MIN_TOKENS = 32  # of an answer and what follows it


@torch.no_grad()
def shares_of_right_answers(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[Sequence[int]],
    probes: Sequence[AnswerProbe],
    answers: Sequence[Sequence[str]],
    template: str,
    *,
    samples: int,
    variant: Variant = "squad",
    batch_size: int = 16,
) -> list[float]:
    """
    The share of right answers among several that are sampled after each context and the opening of the template.

    They are sampled at a temperature of 1 and without any cut of the distribution, because that is the probability
    that teacher forcing scores. An answer is right if it matches one of the right ones exactly.

    Args:
        model (`PreTrainedModel`): the policy.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        contexts (sequence of sequence of `int`): tokens of the prompt and the turns so far.
        probes (sequence of [`AnswerProbe`]): of each context, of any of its answers: its tokens before the answer.
        answers (sequence of sequence of `str`): the right answers of each context.
        template (`str`): what the probes were made with.
        samples (`int`): answers after each context.
        variant (`str`, *optional*, defaults to `"squad"`): scorer, see [`exact_match`].
        batch_size (`int`, *optional*, defaults to `16`): sequences at a time, at least those of one context.
    """
    end = split_template(template)[1].strip()
    length = max(_MIN_TOKENS, *(2 * (probe.answer_end - probe.answer_start) for probe in probes)) if probes else 0
    options: dict[str, Any] = {"stop_strings": [end], "tokenizer": tokenizer} if end else {}
    sequences = [[*ids, *probe.token_ids[: probe.answer_start]] for ids, probe in zip(contexts, probes, strict=True)]
    # Equal lengths together, so that there is little padding.
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    at_once = max(1, batch_size // samples)
    shares = [0.0] * len(sequences)
    for first in range(0, len(order), at_once):
        members = order[first : first + at_once]
        batch = tokenizer.pad({"input_ids": [sequences[i] for i in members]}, padding_side="left", return_tensors="pt")
        said = model.generate(
            **batch.to(model.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_p=None,
            repetition_penalty=1.0, num_return_sequences=samples, max_new_tokens=length, disable_compile=True,
            **options,
        )[:, batch["input_ids"].shape[1] :]  # fmt: skip
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        texts = [(text.split(end)[0] if end else text).strip() for text in texts]
        for row, i in enumerate(members):
            own = texts[row * samples : (row + 1) * samples]
            shares[i] = sum(exact_match(text or None, answers[i], variant) for text in own) / samples
    return shares
