"""
Answer scores as metrics of 🤗 Evaluate: `AnswerF1`, `AnswerExactMatch` and `AnswerCoverExactMatch`.

They come with the package, so that nothing is loaded from the hub, and compute what `igpo_trl.rewards` does. All that
a metric can do works: `add`, `add_batch`, `compute`, `evaluate.combine`. Importing this module takes seconds, as
🤗 Evaluate imports transformers; the scores alone are in `igpo_trl.rewards`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import evaluate
from datasets import Features, List, Value

from ..rewards import Variant, cover_exact_match, exact_match, extract_answer, f1_score

_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)

_INPUTS = """
Args:
    predictions (list of `str`):
        Answers; or responses, that is last turns of the assistant with the answer between `<answer>` and `</answer>`.
        An empty text is no answer.
    references (list of lists of `str`, or list of `str`):
        The right answers to each question, every alias one; the best counts.
    variant (`str`, *optional*, defaults to `"squad"`):
        `"squad"`, or `"reference"` for the scorer of the IGPO authors.
    responses (`bool`, *optional*):
        Whether predictions are responses, of which only what is in answer tags counts, or answers as they stand. By
        default each is taken for a response if it has an answer tag.
    format_penalty (`float`, *optional*, defaults to 0.0):
        Score of a response without a well-formed answer; the authors' training reward has -2.0.

Returns:
    `dict` with the mean over the questions.
"""
_CITATION = """\
@inproceedings{rajpurkar2016squad,
    title = {{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
    author = {Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
    booktitle = {EMNLP},
    year = {2016}
}"""


class AnswerMetric(evaluate.Metric):
    """
    Mean of an answer score over questions; the base of the metrics below.

    Predictions are kept in memory by default, so that nothing is written and any number of processes may each have
    one. To gather over processes, give `num_process`, `process_id`, `experiment_id` and a `cache_dir` that they share,
    as for any metric.
    """

    score: Callable[[str | None, str | Sequence[str], Variant], float]
    key: str
    description_of_score: str

    def __init__(
        self, config_name: str | None = None, keep_in_memory: bool | None = None, num_process: int = 1, **options: Any
    ) -> None:
        if keep_in_memory is None:
            keep_in_memory = num_process == 1
        super().__init__(config_name, keep_in_memory=keep_in_memory, num_process=num_process, **options)

    def _build_data_dir(self) -> str:
        # The parent makes a folder in the user's cache even where nothing will be written to it.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        text = Value("string")
        return evaluate.MetricInfo(
            description=self.description_of_score,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                Features({"predictions": text, "references": List(text)}),
                Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(
        self,
        *,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        variant: Variant = "squad",
        responses: bool | None = None,
        format_penalty: float = 0.0,
    ) -> dict[str, float]:
        scores = []
        for text, answers in zip(predictions, references, strict=True):
            if responses or (responses is None and _ANSWER_TAG.search(text)):
                answer = extract_answer(text, variant)
                scores.append(format_penalty if answer is None else type(self).score(answer, answers, variant))
            else:
                scores.append(type(self).score(text if text.strip() else None, answers, variant))
        return {self.key: sum(scores) / len(scores)}


class AnswerF1(AnswerMetric):
    """
    Token F1 of the answer against the best alias, see [`rewards.f1_score`].

    Example:
        ```python
        >>> AnswerF1().compute(predictions=["<answer>Paris, France</answer>"], references=[["Paris", "City of Light"]])
        {'f1': 0.6666666666666666}
        ```
    """

    score = staticmethod(f1_score)
    key = "f1"
    description_of_score = "Token F1 of an answer against the best of the right answers."


class AnswerExactMatch(AnswerMetric):
    """Share of answers that equal an alias after normalisation, see [`rewards.exact_match`]; key `exact_match`."""

    score = staticmethod(exact_match)
    key = "exact_match"
    description_of_score = "Whether an answer equals one of the right answers after normalisation."


class AnswerCoverExactMatch(AnswerMetric):
    """Share of answers that contain an alias, see [`rewards.cover_exact_match`]; key `cover_exact_match`."""

    score = staticmethod(cover_exact_match)
    key = "cover_exact_match"
    description_of_score = "Whether an answer contains one of the right answers after normalisation."
