"""Evaluations in a model card: the trainer's own, and the tables of `igpo eval`."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_EVALUATION = ("<!-- evaluation -->", "<!-- end of the evaluation -->")


def evaluation_of(trainer: Any, folder: Path) -> str:
    parts = [] if trainer.is_in_train else [_scores(trainer, folder)]
    parts += [_results(file) for file in sorted(folder.glob("*/results.md"))]
    text = "\n\n".join(filter(None, parts))
    return f"{_EVALUATION[0]}\n{text}\n{_EVALUATION[1]}"


def _scores(trainer: Any, folder: Path) -> str:
    """F1 and exact match before and after training, or of the first and the last evaluation of the log."""
    datasets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    rows = []
    for label, scores in _evaluations(trainer.state.log_history, folder).items():
        for name, dataset in datasets.items():
            of_set = scores.get("sets", {}).get(name, {} if name else scores)
            if "f1" in of_set and "exact_match" in of_set:
                number = len(dataset) if hasattr(dataset, "__len__") else 0
                share = of_set["exact_match"]
                match = f"{100 * share:.1f}" + (" [{:.1f}, {:.1f}]".format(*_wilson(share, number)) if number else "")
                rows.append(f"| {label} | {name or 'all'} | {number or '?'} | {100 * of_set['f1']:.1f} | {match} |")
    if not rows:
        return ""
    head = "| evaluation | set | questions | F1 | exact match [95 % interval] |\n|---|---|---:|---:|---:|\n"
    return f"Held-out questions, in percent; Wilson intervals.\n\n{head}" + "\n".join(rows)


def _evaluations(logs: Iterable[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    try:
        written: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        return {f"{name} training": scores for name, scores in written.items()}
    except (OSError, ValueError):
        pass
    found: dict[str, Any] = {}
    for log in logs:
        for name, value in log.items():
            if match := re.fullmatch(r"eval_(?:(.+)_)?(f1|exact_match)", name):
                scores = found.setdefault(f"step {log['step']}", {"sets": {}})
                (scores["sets"].setdefault(match[1], {}) if match[1] else scores)[match[2]] = value
    labels = list(found)
    return {label: found[label] for label in dict.fromkeys([*labels[:1], *labels[-1:]])}


def _wilson(share: float, number: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share, in percent."""
    middle, square = share + z * z / (2 * number), z * z / number
    half = z * math.sqrt(share * (1 - share) / number + square / (4 * number))
    return 100 * max(0.0, (middle - half) / (1 + square)), 100 * min(1.0, (middle + half) / (1 + square))


def _results(file: Path) -> str:
    """The tables of `igpo eval`, one level of headings lower."""
    return re.sub(r"^#", "##", file.read_text(encoding="utf-8").strip(), flags=re.MULTILINE)


def add_evaluation(results: Path) -> bool:
    """
    Put the tables of an evaluation into the card of the model in the folder above, where there is such a card.

    Args:
        results (`Path`): The `results.md` that `igpo eval` has written, such as `outputs/run/eval/results.md`.
    """
    card = results.absolute().parent.parent / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, start, rest = text.partition(_EVALUATION[0])
    old, end, after = rest.partition(_EVALUATION[1])
    if not end:
        return False
    own = old.split("### ", 1)[0].strip()  # what the trainer has measured
    tables = [_results(file) for file in sorted(card.parent.glob("*/results.md"))]
    card.write_text(f"{before}{start}\n" + "\n\n".join(filter(None, [own, *tables])) + f"\n{end}{after}", "utf-8")
    return True
