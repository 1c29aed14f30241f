"""Other ways of writing an answer: dates, numbers and names by rules, anything else from a file."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

_DATES = ("%B %d, %Y", "%d %B %Y", "%b %d, %Y", "%d %b %Y", "%Y-%m-%d")
_NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def paraphrases(answer: str) -> list[str]:
    """
    Other ways of writing an answer that mean the same, without the answer itself.

    - dates: `March 5, 1999`, `5 March 1999` and `1999-03-05` are the same;
    - numbers: with and without commas between thousands, from five digits on (`1999` may be a year), and `zero` to
      `twelve` in words;
    - names: without `The`, accents, initials in the middle, full stops of an abbreviation, or an explanation in
      brackets; `&` is `and`.

    Args:
        answer (`str`): A right answer.
    """
    text = answer.strip()
    found = [*_dates(text), *_numbers(text), *_names(text)]
    return [each for each in dict.fromkeys(found) if each and each != answer]


def _dates(text: str) -> list[str]:
    for form in _DATES:
        try:
            date = datetime.strptime(text, form)
        except ValueError:
            continue
        return [f"{date:%B} {date.day}, {date:%Y}", f"{date.day} {date:%B %Y}", f"{date:%Y-%m-%d}"]
    return []


def _numbers(text: str) -> list[str]:
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        return [text.replace(",", "")]
    if re.fullmatch(r"[1-9]\d{4,}", text):
        return [f"{int(text):,}"]
    if text.lower() in _NUMERALS:
        return [str(_NUMERALS.index(text.lower()))]
    return [_NUMERALS[int(text)]] if re.fullmatch(r"\d|1[0-2]", text) else []


def _names(text: str) -> list[str]:
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    return [
        re.sub(r"^the (?=\S)", "", text, flags=re.IGNORECASE),
        re.sub(r"(?<=\S) \([^()]*\)$", "", text),
        re.sub(r"(?<=\w )(?:[A-Z]\. ?)+(?=[A-Z]\w)", "", text),
        re.sub(r"(?<=\S) & (?=\S)", " and ", text),
        text.replace(".", "") if re.fullmatch(r"(?:[A-Z]\.){2,}", text) else text,
        unicodedata.normalize("NFC", plain),
    ]


def add_paraphrases(
    answers: Sequence[str], known: Mapping[str, Sequence[str]] | None = None, *, rules: bool = True
) -> list[str]:
    """
    The right answers of a question, then their paraphrases.

    Args:
        answers (list of `str`): The right answers.
        known (mapping of `str` to list of `str`, *optional*): Paraphrases of answers, see [`read_paraphrases`].
        rules (`bool`, *optional*, defaults to `True`): Whether to add those of [`paraphrases`].
    """
    by_answer = {answer.strip().casefold(): others for answer, others in (known or {}).items()}
    found = [*answers]
    for answer in answers:
        found += by_answer.get(answer.strip().casefold(), ())
        found += paraphrases(answer) if rules else ()
    return list(dict.fromkeys(found))


def read_paraphrases(path: str | Path) -> dict[str, list[str]]:
    """
    Paraphrases from a JSON file: an object of answers, each with a list of the other ways to write it.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). {_EXPECTED}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}. {_EXPECTED}")
    for answer, others in found.items():
        if not isinstance(others, list) or not all(isinstance(each, str) and each.strip() for each in others):
            raise ValueError(f"{path}: the paraphrases of {answer!r} are {others!r}. {_EXPECTED}")
    return found


_EXPECTED = 'Expected an object of lists, such as {"New York City": ["NYC", "New York"]}.'
