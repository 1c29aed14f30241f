"""
Answer scores as metrics of 🤗 Evaluate: `AnswerF1`, `AnswerExactMatch` and `AnswerCoverExactMatch`.

They compute the scores of `igpo_trl.rewards`, load nothing from the hub, and support `add`, `add_batch`, `compute` and
`evaluate.combine`. 🤗 Evaluate imports transformers, which takes seconds: use `igpo_trl.rewards` for the scores alone.
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
    predictions (`list[str]`): Answers, or responses: last turns of the assistant with the answer between `<answer>`
        and `</answer>`. An empty text counts as no answer.
    references (`list[list[str]]` or `list[str]`): The right answers to each question, with all aliases. The best match
        counts.
    variant (`str`, *optional*, defaults to `"squad"`): `"squad"`, or `"reference"` for the scorer of the IGPO authors.
    responses (`bool`, *optional*): Whether the predictions are responses, of which only the text in answer tags
        counts. By default, a prediction is a response if it has an answer tag.
    format_penalty (`float`, *optional*, defaults to `0.0`): Score of a response without a well-formed answer. The
        authors' training reward uses -2.0.

Returns:
    `dict`: The mean over the questions.
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
    The mean of an answer score over questions; base class of the metrics below.

    Predictions stay in memory by default: nothing is written, and processes can use the metric independently. To
    gather the predictions of several processes, pass `num_process`, `process_id`, `experiment_id` and a shared
    `cache_dir`, as for any metric.
    """

    score: Callable[[str | None, str | Sequence[str], Variant], float]

    def __init__(
        self, config_name: str | None = None, keep_in_memory: bool | None = None, num_process: int = 1, **options: Any
    ) -> None:
        if keep_in_memory is None:
            keep_in_memory = num_process == 1
        super().__init__(config_name, keep_in_memory=keep_in_memory, num_process=num_process, **options)

    def _build_data_dir(self) -> str:
        # The parent class creates a folder in the user's cache even if nothing will be written to it.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        text = Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
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
        return {self.name.removeprefix("answer_"): sum(scores) / len(scores)}


class AnswerF1(AnswerMetric):
    """
    Token F1 between the answer and the best alias, see [`rewards.f1_score`].

    Example:
        ```python
        >>> AnswerF1().compute(predictions=["<answer>Paris, France</answer>"], references=[["Paris", "City of Light"]])
        {'f1': 0.6666666666666666}
        ```
    """

    score = staticmethod(f1_score)


class AnswerExactMatch(AnswerMetric):
    """Share of answers that equal an alias after normalisation, see [`rewards.exact_match`]; key `exact_match`."""

    score = staticmethod(exact_match)


class AnswerCoverExactMatch(AnswerMetric):
    """Share of answers that contain an alias, see [`rewards.cover_exact_match`]; key `cover_exact_match`."""

    score = staticmethod(cover_exact_match)
