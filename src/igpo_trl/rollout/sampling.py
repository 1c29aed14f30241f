"""One turn of several rollouts, from a backend that takes one length for all of them: within the context, in step."""

from collections.abc import Callable, Sequence

#: Rows, their contexts (further ones may follow, of no row) and a number of new tokens → token ids of the turns and,
#: where the backend gives them, their log-probabilities.
Generate = Callable[[list[int], list[list[int]], int], tuple[list[list[int]], list[list[float]] | None]]


def sample_within_context(
    generate: Generate,
    contexts: Sequence[list[int]],
    max_new_tokens: int,
    context_length: int,
    end_token_ids: Sequence[int],
    *,
    max_over_ranks: Callable[[int], int] = int,
    same_number_on_ranks: bool = False,
) -> tuple[list[list[int]], list[list[float]] | None]:
    """
    Sample one turn after each context.

    A backend takes one length for all rows of a call, and the longest context may have room for fewer tokens than the
    others: a vLLM server refuses the call, and a model runs past its last position. The turns are then sampled in
    pieces: as many tokens as the longest context has room for, then the turns that have not ended continue. As a rule
    there is one piece.

    Args:
        generate (`Callable`): samples after every context, see `Generate`. Every rank calls it equally often.
        contexts (list of list of `int`): token ids before the turns of this rank.
        max_new_tokens (`int`): longest turn of this rank.
        context_length (`int`): most tokens of a context and its turn together.
        end_token_ids (list of `int`): tokens that end a turn.
        max_over_ranks (`Callable`, *optional*): maximum of a number over all ranks that sample in step.
        same_number_on_ranks (`bool`, *optional*, defaults to `False`): whether every call is filled up, with contexts
            of one token, to the largest number on any rank. TRL deals the completions of a vLLM server, or of a
            tensor-parallel engine, to the ranks as if each had sent as many prompts as the caller.

    Returns:
        `tuple`: token ids of each turn, and their log-probabilities or `None`.

    Raises:
        `ValueError`: if a context leaves no room for a token.
    """
    rooms = [min(max_new_tokens, context_length - len(ids)) for ids in contexts]
    if min(rooms, default=1) < 1:
        raise ValueError(
            f"A prompt has {max(map(len, contexts))} tokens, which leaves no room in the model's context of "
            f"{context_length} tokens. Shorten the prompts, or use a model with a longer context."
        )
    turns: list[list[int]] = [[] for _ in contexts]
    logprobs: list[list[float]] | None = [[] for _ in contexts]
    rows = list(range(len(contexts)))
    while largest := max_over_ranks(len(rows)):
        prompts = [contexts[i] + turns[i] for i in rows]
        longest = max_over_ranks(max(map(len, prompts), default=1))
        wanted = max_over_ranks(max((rooms[i] - len(turns[i]) for i in rows), default=1))
        piece = min(wanted, context_length - longest)
        size = largest if same_number_on_ranks else max(1, len(rows))
        prompts += [[end_token_ids[0]]] * (size - len(rows))
        # A sharded model samples on all ranks until the last one has ended: one without rows must not prolong that.
        new_ids, new_logprobs = generate(rows, prompts, piece if rows or same_number_on_ranks else 1)
        continued = []
        for position, i in enumerate(rows):
            ids, left = list(new_ids[position]), rooms[i] - len(turns[i])
            turns[i] += ids[:left]
            if logprobs is not None and new_logprobs is not None:
                logprobs[i] += new_logprobs[position][:left]
            if len(ids) == piece < left and ids[-1] not in end_token_ids:
                continued.append(i)
        logprobs = None if new_logprobs is None else logprobs
        rows = continued
    return turns, logprobs
