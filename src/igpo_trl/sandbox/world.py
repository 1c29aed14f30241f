"""
A synthetic world of multi-hop questions: every question has its own graph, and every search returns one fact of it.

Each world has 24 people with 8 relations, and shuffles their names, so no fact can be memorised. A question is the
composition of 2 to 4 relations. There are two kinds of worlds, see [`KINDS`].
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

GIVEN_NAMES = (
    "Ada Ben Cleo Dan Eve Finn Gwen Hugo Iris Jack Kate Liam "
    "Mona Noah Olga Paul Quinn Rosa Sam Tess Umar Vera Will Zoe"
).split()
SURNAMES = "Brown Chen Diaz Evans Fox Green".split()
FAMILY_SIZE = 4
FAMILY_RELATIONS = ("mother", "father", "sister", "brother")
OTHER_RELATIONS = ("friend", "teacher", "doctor", "rival")
RELATIONS = FAMILY_RELATIONS + OTHER_RELATIONS
MAX_SEARCHES = 4

_RELATION_INDEX = {name: i for i, name in enumerate(RELATIONS)}


@dataclass(frozen=True)
class Kind:
    """What the worlds of a kind have in common."""

    families: bool  # whether people come in families, and half of the relations stay inside
    hops: tuple[int, ...]  # numbers of hops of the questions, drawn from uniformly


#: Families share their surname, so a middle hop already narrows down the answer. Strangers have any surname and any
#: relation: only the last fact of the chain says anything about the answer.
KINDS = {"families": Kind(families=True, hops=(2, 3)), "strangers": Kind(families=False, hops=(2, 3, 4))}
DEFAULT_KIND = "families"


@dataclass(frozen=True)
class Question:
    """A question and the chain of facts that answers it."""

    text: str
    answer: str
    path: tuple[int, ...]  # the `hops + 1` people, all different, from the one named to the answer
    relations: tuple[int, ...]  # the relation of each hop, in the order of the lookups

    @property
    def hops(self) -> int:
        """Number of facts needed."""
        return len(self.relations)


class World:
    """The graph of one question: number `index` of the stream `seed`. Training and tests use different streams."""

    def __init__(self, seed: int, index: int, kind: str = DEFAULT_KIND) -> None:
        self.seed, self.index, self.kind = seed, index, KINDS[kind]
        rng = np.random.default_rng((seed, index))
        people, families = len(GIVEN_NAMES), len(SURNAMES)
        given = rng.permutation(people)
        surname = np.repeat(rng.permutation(families), FAMILY_SIZE)
        if not self.kind.families:
            surname = rng.permutation(surname)
        self.names = [f"{GIVEN_NAMES[g]} {SURNAMES[s]}" for g, s in zip(given, surname, strict=True)]
        self._person = {name: i for i, name in enumerate(self.names)}
        person = np.arange(people)[:, None]
        # (people, relations)
        if self.kind.families:
            first_of_family, place = person - person % FAMILY_SIZE, person % FAMILY_SIZE
            inside = (place + rng.integers(1, FAMILY_SIZE, (people, len(FAMILY_RELATIONS)))) % FAMILY_SIZE
            outside = rng.integers(FAMILY_SIZE, people, (people, len(OTHER_RELATIONS)))
            self._target = np.hstack([first_of_family + inside, (first_of_family + outside) % people])
        else:
            self._target = (person + rng.integers(1, people, (people, len(RELATIONS)))) % people
        self.question = self._draw_question(rng)

    def _draw_question(self, rng: np.random.Generator) -> Question:
        hops = self.kind.hops[rng.integers(len(self.kind.hops))]
        while True:
            relations = tuple(int(r) for r in rng.permutation(len(RELATIONS))[:hops])
            path = [int(rng.integers(len(self.names)))]
            for relation in relations:
                path.append(self.follow(path[-1], relation))
            if len(set(path)) == len(path):
                break
        chain = " of ".join(f"the {RELATIONS[r]}" for r in reversed(relations))
        text = f"Who is {chain} of {self.names[path[0]]}?"
        return Question(text, self.names[path[-1]], tuple(path), relations)

    def follow(self, person: int, relation: int) -> int:
        """Index of the person who has this relation to `person`."""
        return int(self._target[person, relation])

    def query(self, person: int, relation: int) -> str:
        """The search query for one fact: `"Ada Brown mother"`."""
        return f"{self.names[person]} {RELATIONS[relation]}"

    def fact(self, person: int, relation: int) -> str:
        """The passage for one fact: `"The mother of Ada Brown is Eve Brown."`."""
        return f"The {RELATIONS[relation]} of {self.names[person]} is {self.names[self.follow(person, relation)]}."

    def search(self, query: str) -> str:
        """The fact that the query names, or an irrelevant fact, which is always the same for the same query."""
        name, _, relation = query.rpartition(" ")
        if name in self._person and relation in _RELATION_INDEX:
            return self.fact(self._person[name], _RELATION_INDEX[relation])
        return self.irrelevant_fact(zlib.crc32(query.encode()))

    def irrelevant_fact(self, draw: int) -> str:
        """A fact that is not on the question's path, selected by the number `draw`."""
        needed = set(zip(self.question.path, self.question.relations, strict=False))
        facts = [(p, r) for p in range(len(self.names)) for r in range(len(RELATIONS)) if (p, r) not in needed]
        return self.fact(*facts[draw % len(facts)])


def make_dataset(seed: int, count: int, start: int = 0, kind: str = DEFAULT_KIND) -> Dataset:
    """Questions of the worlds `(seed, start)` to `(seed, start + count - 1)` of a kind."""
    rows = []
    for index in range(start, start + count):
        question = World(seed, index, kind).question
        rows.append(
            {
                "prompt": [{"role": "user", "content": question.text}],
                "answers": [question.answer],
                "hops": question.hops,
                "id": f"sandbox-{seed}-{index}",
                "world_seed": seed,
                "world_index": index,
                "world_kind": kind,
            }
        )
    return Dataset.from_list(rows)


class SearchEnvironment:
    """The world as an environment of TRL: with `environment_factory=SearchEnvironment` every rollout gets its own."""

    def __init__(self) -> None:
        self._world: World | None = None

    def reset(self, **row: Any) -> None:
        """Switches to the world of a row of `make_dataset`."""
        self._world = World(row["world_seed"], row["world_index"], row["world_kind"])

    def search(self, query: str) -> str:
        """Look up one fact about a person.

        Args:
            query: A full name and a relation, such as "Ada Brown mother".

        Returns:
            One sentence.
        """
        if self._world is None:
            raise RuntimeError("SearchEnvironment.search was called before reset(...)")
        return self._world.search(query)
