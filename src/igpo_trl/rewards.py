"""Answer extraction, F1 and exact match, and the outcome reward in TRL's form.

Two scorers, chosen by `variant`:

- `"squad"` (default): the SQuAD metric, that is bag-of-tokens F1 on text without case, punctuation and articles. As in
  HotpotQA's official scorer, `yes`, `no` and `noanswer` match only themselves: `yes no` against `yes` is 0.
- `"reference"`: what the IGPO authors' training script computes: *set*-of-tokens F1, articles kept, punctuation
  replaced by a space. It differs from SQuAD's on repeated tokens (`cat cat cat` against `cat` is 1 rather than 0.5)
  and on articles. Use it to compare with their numbers, not with those of other papers.

Only the last assistant turn is ever read: a tool may return anything, `<answer>` blocks included. Of an answer and a
call in one turn, the first counts; the rollout loop leaves the other out of the message.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

Variant = Literal["squad", "reference"]
Message = dict[str, Any]
Completion = str | Sequence[Message]

# The authors' scorer gives this to a response without a well-formed answer.
DEFAULT_FORMAT_PENALTY = -2.0

# Column with the text of each rollout's last turn, where the completion is a whole transcript (`rollout_func`).
LAST_TURN = "last_sampled_turn"

_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_THINK_TAG = re.compile(r"<(/?)think>", re.IGNORECASE)
_REFERENCE_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_REFERENCE_TAGS = ("answer", "think", "tool_call", "code")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# One word decides such a question: an answer that names both would earn 2/3 on each of them.
_WHOLE_ANSWERS = ("yes", "no", "noanswer")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACE_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))


class ReferenceScore(NamedTuple):
    """Scores of a whole response by the authors' rules, see [`reference_score`]."""

    f1: float
    f1_no_format: float
    em: float


def extract_answer(text: str, variant: Variant = "squad") -> str | None:
    """
    Text of the last `<answer>…</answer>` block, stripped.

    `None` when there is no block, when it is empty, or when the answer tags are not a sequence of open-close pairs
    (unclosed, reversed, nested). Reasoning does not count as an answer: text up to the last `</think>`, or after a
    `<think>` that is never closed, is not read. Tags match in any case.

    Args:
        text (`str`): One assistant turn. Do not pass a transcript: tool results would be read as well.
        variant (`str`, *optional*, defaults to `"squad"`): `"reference"` follows the authors' scorer instead: the
            *first* block, possibly empty (`""`), reasoning included, provided that the `answer`, `think`, `tool_call`
            and `code` tags balance.

    Returns:
        `str` or `None`: the answer, or `None` if it is missing or malformed.

    Example:
        ```python
        >>> extract_answer("<think>Paris or Rome?</think> <answer> Paris </answer>")
        'Paris'
        ```
    """
    if _checked(variant) == "reference":
        block = _REFERENCE_ANSWER.search(text) if _reference_tags_balance(text) else None
        return None if block is None else block.group(1).strip()
    tags = list(_ANSWER_TAG.finditer(_without_reasoning(text)))
    if not tags or len(tags) % 2 or any(tag.group(1) != ("", "/")[i % 2] for i, tag in enumerate(tags)):
        return None
    return tags[-1].string[tags[-2].end() : tags[-1].start()].strip() or None


def f1_score(prediction: str | None, answers: str | Sequence[str], variant: Variant = "squad") -> float:
    """
    Token F1 of a prediction against the best of the answers.

    `F1 = 2 P R / (P + R)` with precision P and recall R over tokens: counted tokens for `"squad"`, distinct ones for
    `"reference"`. Where prediction or answer has no token left after normalisation (`"the"`, `"!!!"`), `"squad"` gives
    1 if neither has and 0 otherwise (as SQuAD 2.0 does), `"reference"` always 0. Where one of the two is `yes`, `no`
    or `noanswer`, `"squad"` gives 1 or 0 (as HotpotQA's and 2WikiMultihopQA's scorers do).

    Normalisation is SQuAD's: only ASCII punctuation is removed. A typographic apostrophe stays, so `O’Brien` and
    `O'Brien` (`obrien`) share no token; give both as aliases where it matters.

    Args:
        prediction (`str` or `None`): Predicted answer; `None`, as [`extract_answer`] returns it, scores 0.
        answers (`str` or sequence of `str`): Gold answer, or its aliases.
        variant (`str`, *optional*, defaults to `"squad"`): `"squad"` or `"reference"`.

    Returns:
        `float`: F1 in [0, 1].

    Raises:
        `TypeError`, `ValueError`: if `answers` is not a string or a non-empty sequence of strings, or the variant is
            unknown.
    """
    score = _reference_f1 if _checked(variant) == "reference" else _squad_f1
    aliases = _aliases(answers)
    return 0.0 if prediction is None else max(score(prediction, alias) for alias in aliases)


def exact_match(prediction: str | None, answers: str | Sequence[str], variant: Variant = "squad") -> float:
    """
    1.0 if the prediction equals one of the answers after normalisation, else 0.0.

    Arguments and errors as in [`f1_score`]. Two texts that normalise to nothing are equal.
    """
    normalize = _normalize_reference if _checked(variant) == "reference" else _normalize_squad
    aliases = _aliases(answers)
    return float(prediction is not None and any(normalize(prediction) == normalize(alias) for alias in aliases))


def cover_exact_match(prediction: str | None, answers: str | Sequence[str], variant: Variant = "squad") -> float:
    """
    1.0 if one of the answers stands anywhere in the prediction after normalisation, else 0.0.

    Some papers report it as accuracy or "cover exact match": it forgives a sentence around the answer, and a list of
    guesses too. Arguments and errors as in [`f1_score`]. As in those papers, an answer may begin or end inside a word;
    one that normalises to nothing is in no prediction but its equal.
    """
    normalize = _normalize_reference if _checked(variant) == "reference" else _normalize_squad
    aliases = [normalize(alias) for alias in _aliases(answers)]
    text = None if prediction is None else normalize(prediction)
    return float(text is not None and any(alias == text or (alias != "" and alias in text) for alias in aliases))


def mentions(text: str, answers: str | Sequence[str]) -> bool:
    """Whether one of the answers stands in the text as whole words, after SQuAD's normalisation."""
    words = f" {_normalize_squad(text)} "
    aliases = [_normalize_squad(alias) for alias in _aliases(answers)]
    return any(alias != "" and f" {alias} " in words for alias in aliases)


def reference_score(
    text: str, answers: str | Sequence[str], format_penalty: float = DEFAULT_FORMAT_PENALTY
) -> ReferenceScore:
    """
    F1 and exact match of a whole response by the IGPO authors' rules.

    A response whose tags do not balance, or that has no answer block, gets `format_penalty` as `f1` and as `em`, and
    0 as `f1_no_format`.

    Args:
        text (`str`): the response.
        answers (`str` or sequence of `str`): gold answer, or its aliases.
        format_penalty (`float`, *optional*, defaults to `-2.0`): score of a malformed response.

    Returns:
        [`ReferenceScore`]: `(f1, f1_no_format, em)`.
    """
    prediction = extract_answer(text, "reference")
    if prediction is None:
        return ReferenceScore(format_penalty, 0.0, format_penalty)
    f1 = f1_score(prediction, answers, "reference")
    return ReferenceScore(f1, f1, exact_match(prediction, answers, "reference"))


def answer_reward(
    completions: Sequence[Completion],
    answers: Sequence[str | Sequence[str]] | None = None,
    *,
    answer_column: str = "answers",
    format_penalty: float = DEFAULT_FORMAT_PENALTY,
    variant: Variant = "squad",
    **columns: Any,
) -> list[float]:
    """
    Reward function in TRL's form: F1 of the answer in the last assistant turn, against the best alias.

    A completion that gives no answer gets `format_penalty`: no well-formed `<answer>` block in the last turn (see
    [`extract_answer`]), a rollout cut off at a tool call or after a tool result, or nothing at all. An `<answer>` in
    an earlier turn or in a tool result never counts.

    The default penalty is the authors' (-2.0): far enough below a wrong answer (0) that, within a group, giving one
    always pays. While most rollouts are malformed it widens the group's std and so shrinks the difference between a
    right and a wrong answer; once the format is learned it no longer occurs. With `-1.0` that difference weighs
    more; with `0.0` a wrong answer is worth no more than none.

    Args:
        completions (sequence of `str` or of message lists): What the policy and the tools produced after the prompt,
            as TRL passes it.
        answers (sequence of `str` or of sequences of `str`): Gold answers of each completion: the data set's `answers`
            column.
        answer_column (`str`, *optional*, defaults to `"answers"`): Name of the column that holds the answers. To set
            this and the following options for training, see [`make_answer_reward`].
        format_penalty (`float`, *optional*, defaults to `-2.0`): Reward of a completion without a well-formed answer.
        variant (`str`, *optional*, defaults to `"squad"`): Scorer: `"squad"` or `"reference"`.
        columns:
            Further columns and TRL's own arguments. Only `columns[answer_column]` is read and, for a `rollout_func`
            whose `env_mask` says what was sampled, `columns["last_sampled_turn"]`.

    Returns:
        `list[float]`: one reward per completion.

    Raises:
        `TypeError`, `ValueError`: if the answers are missing, their number is not that of the completions, or a row
            holds anything but a string or a non-empty list of strings (the message names the row).
    """
    if answers is not None:
        columns["answers"] = answers
    return _score(completions, columns, answer_column, format_penalty, variant, "f1")


def make_answer_reward(
    answer_column: str = "answers",
    format_penalty: float = DEFAULT_FORMAT_PENALTY,
    variant: Variant = "squad",
    metric: str = "f1",
) -> Callable[..., list[float]]:
    """
    [`answer_reward`] with its options bound, for `reward_funcs=`.

    The result keeps the name `answer_reward`, under which TRL logs it, and no data set column can collide with an
    option.

    Args:
        answer_column (`str`, *optional*, defaults to `"answers"`): data set column with the gold answers.
        format_penalty (`float`, *optional*, defaults to `-2.0`): reward of a completion without a well-formed answer.
        variant (`str`, *optional*, defaults to `"squad"`): scorer, `"squad"` or `"reference"`.
        metric (`str`, *optional*, defaults to `"f1"`): `"f1"`, the paper's, or `"em"`, exact match. F1 also pays for
            single words of the answer, and many of them can be taken from the question ("the River …").

    Returns:
        `Callable`: a reward function `(completions, **columns) -> list[float]`.

    Example:
        ```python
        IGPOTrainer(..., reward_funcs=make_answer_reward("golden_answers", format_penalty=-1.0))
        ```
    """
    _checked(variant)
    if metric not in ("f1", "em"):
        raise ValueError(f"`metric` must be 'f1' or 'em', got {metric!r}.")

    def reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
        return _score(completions, columns, answer_column, format_penalty, variant, metric)

    reward.__name__ = reward.__qualname__ = "answer_reward"
    reward.__doc__ = answer_reward.__doc__
    return reward


def _score(
    completions: Sequence[Completion],
    columns: dict[str, Any],
    answer_column: str,
    format_penalty: float,
    variant: Variant,
    metric: str,
) -> list[float]:
    score = f1_score if metric == "f1" else exact_match
    rows = columns.get(answer_column)
    if rows is None:
        raise ValueError(
            f"`answer_reward` needs the gold answers of every completion: expected a data set column "
            f"`{answer_column}`, got the columns {sorted(columns)}. Rename the column, or name yours with "
            f"`make_answer_reward(answer_column=...)` (`IGPOConfig.answer_column` when training with `IGPOTrainer`)."
        )
    if len(rows) != len(completions):
        raise ValueError(
            f"`answer_reward` needs one row of `{answer_column}` per completion, got {len(rows)} rows for "
            f"{len(completions)} completions. Pass the column repeated for every generation, as TRL does."
        )
    last_turns = columns.get(LAST_TURN)
    rewards = []
    for index, (completion, row) in enumerate(zip(completions, rows, strict=True)):
        aliases = _aliases(row, where=f"row {index} of `{answer_column}`")
        text = last_assistant_text(completion) if last_turns is None else last_turns[index]
        prediction = extract_answer(text, variant)
        rewards.append(format_penalty if prediction is None else score(prediction, aliases, variant))
    return rewards


def last_assistant_text(completion: Completion) -> str:
    """Text of the turn that ends the completion; empty unless it is an assistant turn that calls no tool."""
    if isinstance(completion, str):
        return completion
    last = completion[-1] if len(completion) else {}
    if last.get("role") != "assistant" or last.get("tool_calls"):
        return ""
    content = last.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text") or "" for block in content if block.get("type", "text") == "text")


def _without_reasoning(text: str) -> str:
    # A generation prompt may have opened `<think>` already: the last closing tag decides, opened here or not.
    start, end = 0, len(text)
    for tag in _THINK_TAG.finditer(text):
        if tag.group(1):
            start, end = tag.end(), len(text)
        else:
            end = min(end, tag.start())
    return text[start:end]


def _reference_tags_balance(text: str) -> bool:
    text = text.lower()
    return all(
        text.count(f"<{tag}>") == text.count(f"</{tag}>") and text.rfind(f"<{tag}>") <= text.rfind(f"</{tag}>")
        for tag in _REFERENCE_TAGS
    )


def _normalize_squad(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def _normalize_reference(text: str) -> str:
    return " ".join(text.lower().translate(_SPACE_PUNCTUATION).split())


def _squad_f1(prediction: str, answer: str) -> float:
    texts = _normalize_squad(prediction), _normalize_squad(answer)
    predicted, gold = (Counter(text.split()) for text in texts)
    if not predicted or not gold or any(text in _WHOLE_ANSWERS for text in texts):
        return float(predicted == gold)
    return _harmonic_mean((predicted & gold).total(), predicted.total(), gold.total())


def _reference_f1(prediction: str, answer: str) -> float:
    predicted, gold = set(_normalize_reference(prediction).split()), set(_normalize_reference(answer).split())
    return _harmonic_mean(len(predicted & gold), len(predicted), len(gold))


def _harmonic_mean(common: int, num_predicted: int, num_gold: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / num_predicted, common / num_gold
    return 2 * (precision * recall) / (precision + recall)


def _aliases(answers: str | Sequence[str], where: str = "`answers`") -> Sequence[str]:
    if hasattr(answers, "tolist"):  # an array of NumPy
        answers = answers.tolist()
    aliases = [answers] if isinstance(answers, str) else answers
    if not isinstance(aliases, Sequence) or not all(isinstance(alias, str) for alias in aliases):
        raise TypeError(
            f"Gold answers must be a string or a list of strings, got {answers!r} ({where}). Convert the column, for "
            f"example `dataset.map(lambda row: {{'answers': [str(row['answers'])]}})`."
        )
    if not aliases:
        raise ValueError(f"Gold answers must name at least one answer, got {answers!r} ({where}). Drop such rows.")
    return aliases


def _checked(variant: str) -> str:
    if variant not in ("squad", "reference"):
        raise ValueError(f"`variant` must be 'squad' or 'reference', got {variant!r}.")
    return variant
