"""Invented names: pronounceable, never repeated where they must not be, and apart for training and test."""

import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """
    Random choices that are the same for a key on every machine and under every version of Python.

    Only `random.Random.random` is used: the methods built on it may change from one version of Python to the next.
    """

    def __init__(self, *key: object) -> None:
        self._next = random.Random("/".join(map(str, key))).random

    def chance(self, share: float) -> bool:
        """True in this share of calls."""
        return self._next() < share

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._next() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(self._next() * len(options))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in a random order."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.between(0, last)
            result[last], result[other] = result[other], result[last]
        return result


_ONSETS = "B Br C Cr D Dr F Fl G Gr H J K L M N P Pr Qu R S Sk St T Th Tr V W Y Z".split()
_VOWELS = "a e i o u a e i o ae ei".split()
_CODAS = ["l", "n", "r", "s", "m", "v", "d", "lv", "ss", "rr", "nn", "rn"]
_MIDDLES = "a e i o".split()
_LINKS = "l n r v m d".split()
_ENDINGS = {
    "female": "a ina essa ela issa ane ima aya ora ith eth una".split(),
    "male": "an or im eon ard us ek io ain ulf emar ic".split(),
    "surname": "ack ane arde asko aval ebrand eck ell endry ero esk ett inger ink ique isko ock olt omer oy "
    "undy uvier wain worrell".split(),
    "town": "avale ebeck ecombe edell efield ehaven emarsh emouth eport ester estow ewold igate inholm inster "
    "iswick obrook ocastle oford omere oness orough osted".split(),
    "region": "alia andria ania avia ennia eria esia idia imar onia oria ovia umbra undy ysia".split(),
    "other": "abel adon aris ast avel edon eril ethis ida ivo imel iron odel olan onde oris uro usk yra yth".split(),
}
# What the parts above would give, and what has a meaning or a bearer already; and what is rude, or close to it.
_KNOWN = frozenset(
    "adela adelina alan amelia bernard bevan brian carina carissa cecilia celia corina corsica costa damian "
    "darian darrell davida davina delia doma dora dorina doris drina fiona flora florian forester gena gloria "
    "hadith jalan jamaica janina jared jessa joris karina katrina lima lorina lucas mara marian marina marissa "
    "marius melissa milan mina nadia nina nora nova para parra petra romania rosa rosina sabina salina samoa "
    "sara sena sierra silesia simeon sina sonic tamara tania tasmania teresa tina tora valor vera verona vila "
    "zara".split()
)
_RUDE = re.compile(
    "cu[mn]|pis|sem|sod|pen|hom|hel|dam|coc|tur|anus|anal|nazi|vulv|porn|molest|^yid|fann|^bum|perv|stalin|lenin|boner|"
    "^nud|gonor|rape|slut|lust|tit[aeio]|ass[aeo]hol|bastar|dild|fart|suck|sadis|maso|tumo|nigr|negr|rect|vagi"
)


class Words:
    """
    Words that are in no other part of the world.

    Training and test never share a word, whichever is made first and whatever their sizes: each takes only the words
    whose checksum says that they are its own.
    """

    def __init__(self, draw: Draw, part: int) -> None:
        self._draw, self._part = draw, part
        self._taken: set[str] = set()

    def new(self, kind: str) -> str:
        """A word that was not drawn before, with the ending of its kind. Where words run out, they grow longer."""
        draw, tries = self._draw, 0
        while True:
            tries += 1
            word = draw.pick(_ONSETS) + draw.pick(_VOWELS) + draw.pick(_CODAS)
            for _ in range(tries // 50):
                word += draw.pick(_MIDDLES) + draw.pick(_LINKS)
            word += draw.pick(_ENDINGS[kind])
            unusable = word in self._taken or word.lower() in _KNOWN or _RUDE.search(word.lower())
            if unusable or zlib.crc32(word.encode()) % 2 != self._part:
                continue
            self._taken.add(word)
            return word


def full_names(draw: Draw, words: Words, number: int) -> Iterator[tuple[str, str, str]]:
    """
    Given name, surname and gender of people, no two with the same full name.

    Several people share a given name, and about four a surname, so neither tells who is meant.
    """
    given = {gender: [words.new(gender) for _ in range(max(4, 2 * math.isqrt(number)))] for gender in GENDERS}
    surnames = [words.new("surname") for _ in range(max(6, number // 4))]
    taken = set[tuple[str, str, str]]()
    while len(taken) < number:
        gender = draw.pick(GENDERS)
        name = draw.pick(given[gender]), draw.pick(surnames), gender
        if name not in taken:
            taken.add(name)
            yield name


GENDERS = ("female", "male")

_QUALIFIERS = ("North {}", "South {}", "Upper {}", "Lower {}", "New {}", "{} Bridge", "{} Cross", "{} Mills")


def town_names(draw: Draw, words: Words, number: int) -> Iterator[str]:
    """Names of towns, a third of which have a namesake or two: "North Quarnester" and "Quarnester Mills"."""
    made = 0
    while made < number:
        word = words.new("town")
        family = draw.shuffled(_QUALIFIERS)[: draw.between(2, 3)] if draw.chance(0.2) else ["{}"]
        for pattern in family[: number - made]:
            yield pattern.format(word)
            made += 1
