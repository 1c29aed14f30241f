"""Answers that a policy gives when it has to answer at once: sampled from the states whose belief was scored."""

from collections.abc import Sequence
from typing import Any

import torch

from ..beliefs.models import cache_argument, packed_obstacle
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
    """
    end, name = split_template(template)[1].strip(), cache_argument(model)
    options: dict[str, Any] = {"stop_strings": [end], "tokenizer": tokenizer} if end else {}
    shares = []
    for context, probe, right in zip(contexts, probes, answers, strict=True):
        ids = torch.tensor([[*context, *probe.token_ids[: probe.answer_start]]], device=model.device)
        length = max(_MIN_TOKENS, 2 * (probe.answer_end - probe.answer_start))
        if packed_obstacle(model, ids.shape[1] + length) is None:  # the context runs once for all samples
            cache = getattr(model(ids[:, :-1], use_cache=True, logits_to_keep=1), name)
            cache.batch_repeat_interleave(samples)
            options[name] = cache
        else:
            options.pop(name, None)
        inputs = ids.repeat(samples, 1)
        said = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            min_p=None, repetition_penalty=1.0, max_new_tokens=length, disable_compile=True, **options,
        )[:, ids.shape[1] :]  # fmt: skip
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        texts = [(text.split(end)[0] if end else text).strip() for text in texts]
        shares.append(sum(exact_match(text or None, right, variant) for text in texts) / samples)
    return shares
