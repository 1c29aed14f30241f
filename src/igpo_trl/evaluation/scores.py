"""Scores of a run: per data set, and their average over the data sets."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from ..rewards import Variant, exact_match, extract_answer, f1_score
from ..trajectory import Trajectory, key_of
from .intervals import Interval, bootstrap_interval
from .tables import Table, format_interval, format_number, format_percent, format_share, to_plain

T = TypeVar("T")

AVERAGE = "average"

#: What is measured of a rollout, with its heading and its format in tables.
METRICS = {
    "f1": ("F1", format_percent),
    "em": ("EM", format_percent),
    "judge": ("Judge", format_percent),
    "searches": ("Searches", format_number),
    "failed_calls": ("Failed", format_number),
    "turns": ("Turns", format_number),
    "tokens_sampled": ("Sampled", format_number),
    "tokens_observed": ("Observed", format_number),
    "in_evidence": ("In evidence", format_percent),
    "belief_start": ("Belief before", "{:.2g}".format),
    "belief_end": ("Belief at the end", "{:.2g}".format),
    "answered": ("Answered", format_percent),
}
WITH_INTERVAL = ("f1", "em", "judge", "in_evidence")

_WORD = re.compile(r"[^\W_]+")
_ARTICLES = {"a", "an", "the"}
# Lines in which a tool repeats the policy's own words: the query, or a call that could not be read.
_REPEATED = re.compile(r"^(?:Results for .*:|Error: .*)$", re.MULTILINE)


def has_answer(texts: Iterable[str], answers: Sequence[str]) -> bool:
    """
    Whether one of the texts contains one of the answers, as whole words.

    Case, accents, punctuation and articles are ignored: `Paris` is in "Paris's" but not in "comparison". An answer
    that consists of nothing else, such as `"?"`, is in no text.

    Args:
        texts (iterable of `str`):
            Passages, or results of tools.
        answers (sequence of `str`): The gold answer and its aliases.
    """
    answer_words = [words for words in map(_words, answers) if words.strip()]
    return any(words in text for text in map(_words, texts) for words in answer_words)


def echoes(prediction: str | None, answers: Sequence[str], question: str) -> bool:
    """
    Whether a wrong answer shares words with the right one, and all of these are in the question.

    F1 pays for them although nobody had to look for them: for "the River Ems", where the question is which river
    flows through a town and the answer "River Elbe".
    """
    if prediction is None or not answers or exact_match(prediction, answers):
        return False
    closest = max(answers, key=lambda answer: f1_score(prediction, answer))
    shared = {*_words(prediction).split()} & {*_words(closest).split()}
    return bool(shared) and shared <= {*_words(question).split()}


class AnswerFinder:
    """
    Finds many answers in one text after another, as [`has_answer`] does; their number hardly affects the time.

    Args:
        answers (iterable of `str`): Answers and aliases of all questions.
    """

    def __init__(self, answers: Iterable[str]) -> None:
        self._answers: dict[str, list[str]] = defaultdict(list)  # as written, by their words
        self._lengths: dict[str, set[int]] = defaultdict(set)  # in words, by their first word
        for answer in dict.fromkeys(answers):
            if words := _words(answer).split():
                self._answers[" ".join(words)].append(answer)
                self._lengths[words[0]].add(len(words))

    def find(self, text: str) -> set[str]:
        """Those of the answers that the text contains, as they were given."""
        words = plain_words(text).split()
        starts = [i for i, word in enumerate(words) if word in self._lengths]
        phrases = {" ".join(words[i : i + n]) for i in starts for n in self._lengths[words[i]]}
        return {answer for phrase in phrases & self._answers.keys() for answer in self._answers[phrase]}


def as_evidence(observation: str) -> str:
    """An observation without the lines in which a tool repeats the policy's own words."""
    return _REPEATED.sub("", observation)


def is_searchable(answers: Sequence[str]) -> bool:
    """Whether it makes sense to look for the answer in a text: not for `yes` and `no`."""
    return _words(answers[0]) not in (" yes ", " no ")


def plain_words(text: str) -> str:
    """The words of a text without case, accents, punctuation and articles, with a space before and after each."""
    plain = text.casefold()
    if not plain.isascii():
        plain = unicodedata.normalize("NFKD", plain)
        for mark in filter(unicodedata.combining, set(plain)):
            plain = plain.replace(mark, "")
    return f" {' '.join([word for word in _WORD.findall(plain) if word not in _ARTICLES])} "


_words = lru_cache(maxsize=1 << 14)(plain_words)


def measure(trajectory: Trajectory, variant: Variant = "squad") -> dict[str, float | None]:
    """
    The value of every metric in [`METRICS`] for one rollout; `None` where a metric does not apply.

    `f1` and `em` read the last turn only, as the reward does. `in_evidence` is 1 if an observation contains an answer;
    it is `None` for yes-no questions.
    """
    info, turns, answers = trajectory.info, trajectory.turns, trajectory.answers
    prediction = extract_answer(info.get("response", turns[-1].text), variant)
    observations = [turn.observation for turn in turns if turn.observation]
    evidence = map(as_evidence, observations)
    verdict = (info.get("judge") or {}).get("correct")
    return {
        "f1": f1_score(prediction, answers, variant),
        "em": exact_match(prediction, answers, variant),
        "judge": None if verdict is None else float(verdict),
        "searches": float(info.get("searches", len(observations))),
        "failed_calls": info.get("failed_calls"),
        "turns": float(len(turns)),
        "tokens_sampled": float(sum(turn.num_tokens for turn in turns)),
        "tokens_observed": info.get("tokens_observed"),
        "in_evidence": float(has_answer(evidence, answers)) if is_searchable(answers) else None,
        "belief_start": turns[0].belief,
        "belief_end": turns[-1].belief,
        "answered": float(prediction is not None),
    }


def question_values(
    trajectories: Sequence[Trajectory], variant: Variant = "squad"
) -> dict[str, dict[str, dict[str, float]]]:
    """Values as `[data set][metric][question id]`; of several samples of a question, the mean."""
    samples: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for trajectory in trajectories:
        key = key_of(trajectory)
        for metric, value in measure(trajectory, variant).items():
            if value is not None:
                samples[key.dataset][metric][key.id].append(value)
    return {
        dataset: {
            metric: {name: sum(values) / len(values) for name, values in questions.items()}
            for metric, questions in metrics.items()
        }
        for dataset, metrics in sorted(samples.items())
    }


@dataclass(frozen=True)
class SetScores:
    """Scores of one data set, or the average over all."""

    questions: int
    rollouts: int
    # Mean over the questions with a 95 % interval, by the names in `METRICS`; without the metrics that apply to no
    # question, such as beliefs that were not scored.
    metrics: dict[str, Interval]
    stops: dict[str, float]  # share of the rollouts by stop reason


@dataclass(frozen=True)
class RunScores:
    """Scores of a run: `sets` by name, and under [`AVERAGE`] the mean over the sets with equal weights."""

    sets: dict[str, SetScores]
    variant: Variant

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(to_plain(self))

    def tables(self) -> list[Table]:
        """A table of the scores, and one of the stop reasons."""
        sets = without_repetition(self.sets)
        shown = [name for name in METRICS if any(name in scores.metrics for scores in sets.values())]
        reasons = sorted({reason for scores in sets.values() for reason in scores.stops})
        rows, stops = [], []
        for name, scores in sets.items():
            cells = [format_interval(scores.metrics.get(m), METRICS[m][1], m in WITH_INTERVAL) for m in shown]
            rows.append([name, str(scores.questions), *cells])
            cells = [format_share(scores.stops.get(reason, 0.0)) for reason in reasons]
            stops.append([name, str(scores.rollouts), *cells])
        note = f"F1 and EM ({self.variant}), judge and shares in percent; 95 % bootstrap intervals over questions."
        return [
            Table("Scores", ["Set", "Questions", *(METRICS[metric][0] for metric in shown)], rows, note),
            Table("Why rollouts ended", ["Set", "Rollouts", *reasons], stops, "Percent of rollouts."),
        ]


def score_run(trajectories: Sequence[Trajectory], variant: Variant = "squad", seed: int = 0) -> RunScores:
    """
    Scores of the rollouts of a run.

    Args:
        trajectories (sequence of [`Trajectory`]): Rollouts, with `dataset` and `id` in `info`. Several rollouts of a
            question are samples, and their mean counts once.
        variant (`str`, *optional*, defaults to `"squad"`): Scorer, `"squad"` or `"reference"`.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

    Raises:
        ValueError: There are no rollouts, or one has no answers.
    """
    if not trajectories:
        raise ValueError("there are no rollouts to score.")
    stops: dict[str, Counter[str]] = defaultdict(Counter)
    for trajectory in trajectories:
        if not trajectory.answers:
            raise ValueError(f"the rollout of {key_of(trajectory)} has no `answers` to be scored against.")
        stops[key_of(trajectory).dataset][trajectory.stop_reason or "unknown"] += 1
    values = question_values(trajectories, variant)
    sets = {name: _set_scores([metrics], [stops[name]], seed) for name, metrics in values.items()}
    sets[AVERAGE] = _set_scores(list(values.values()), list(stops.values()), seed)
    return RunScores(sets, variant)


def without_repetition(sets: Mapping[str, T]) -> dict[str, T]:
    """What tables show of values by data set: the average of a single set would only repeat it."""
    return {name: value for name, value in sets.items() if name != AVERAGE or len(sets) > 2}


def _set_scores(
    sets: Sequence[Mapping[str, Mapping[str, float]]], stops: Sequence[Counter[str]], seed: int
) -> SetScores:
    """Scores of one data set, or of several with equal weights, from values as `[metric][question id]`."""
    values = {name: [list(metrics[name].values()) for metrics in sets if name in metrics] for name in METRICS}
    reasons = sorted({reason for counts in stops for reason in counts})
    return SetScores(
        questions=sum(len(metrics["f1"]) for metrics in sets),
        rollouts=sum(counts.total() for counts in stops),
        metrics={name: bootstrap_interval(*scored, seed=seed) for name, scored in values.items() if scored},
        stops={reason: sum(counts[reason] / counts.total() for counts in stops) / len(stops) for reason in reasons},
    )
