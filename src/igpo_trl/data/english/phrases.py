"""How questions speak of relations: the value described by its entity, the question for it, and a claim about it."""

from typing import NamedTuple

from .graph import Entity


class Phrases(NamedTuple):
    """
    Wordings of one relation, where `{x}` is the entity and `{v}` the value.

    Attributes:
        nouns (`tuple[str, ...]`): The value, described by the entity. Descriptions nest where the entity comes last.
        questions (`tuple[str, ...]`): Questions for the value.
        claims (`tuple[str, ...]`): Questions for yes or no.
    """

    nouns: tuple[str, ...]
    questions: tuple[str, ...]
    claims: tuple[str, ...] = ()


def _count(*questions: str) -> Phrases:
    return Phrases((), questions)


def _maker(noun: str, verb: str, participle: str) -> Phrases:
    return Phrases(
        (f"the {noun} of {{x}}", f"the person who {verb} {{x}}"),
        (f"Who {verb} {{x}}?", f"Who is the {noun} of {{x}}?", f"By whom was {{x}} {participle}?"),
        (f"Was {{x}} {participle} by {{v}}?", f"Is {{v}} the {noun} of {{x}}?"),
    )


_PAGES = _count("How many pages does the first edition of {x} have?", "How many pages long is {x}?")
_STORY = Phrases(
    ("the town in which {x} is set", "the setting of {x}"),
    ("In which town is {x} set?", "Where is {x} set?", "Which town is the setting of {x}?"),
    ("Is {x} set in {v}?",),
)
_SUBJECT = Phrases(
    ("the town described in {x}",),
    ("Which town does {x} describe?", "Which town is described in {x}?"),
    ("Does {x} describe the town of {v}?",),
)
_BOOK = {
    "maker": _maker("author", "wrote", "written"),
    "house": Phrases(
        ("the publisher of {x}", "the publishing house that brought out {x}"),
        ("Which publishing house brought out {x}?", "Who published {x}?", "Who was the publisher of {x}?"),
        ("Was {x} published by {v}?", "Did {v} publish {x}?"),
    ),
    "year": Phrases((), ("In what year was {x} published?", "When was {x} published?", "When did {x} first appear?")),
    "length": _PAGES,
}
_STAGE = {
    "house": Phrases(
        ("the theatre where {x} was first performed", "the theatre that first performed {x}"),
        ("At which theatre was {x} first performed?", "Which theatre first performed {x}?"),
        ("Was {x} first performed at {v}?",),
    ),
    "year": Phrases((), ("In what year was {x} first performed?", "When was {x} first performed?")),
    "setting": _STORY,
}

#: By kind or sort of the entity, and by relation.
PHRASES: dict[str, dict[str, Phrases]] = {
    "novel": _BOOK | {"setting": _STORY},
    "book of poems": _BOOK | {"setting": _SUBJECT},
    "travel book": _BOOK | {"setting": _SUBJECT},
    "play": _STAGE | {"maker": _maker("author", "wrote", "written")},
    "opera": _STAGE | {"maker": _maker("composer", "composed", "composed")},
    "painting": {
        "maker": _maker("painter", "painted", "painted"),
        "house": Phrases(
            ("the museum where {x} hangs", "the museum that owns {x}"),
            ("In which museum does {x} hang?", "To which museum does {x} belong?"),
            ("Does {x} hang in {v}?", "Does {x} belong to {v}?"),
        ),
        "year": Phrases((), ("In what year was {x} completed?", "From what year does {x} date?")),
        "setting": Phrases(
            ("the town shown in {x}",),
            ("Which town does {x} show?", "Which town is shown in {x}?"),
            ("Does {x} show the town of {v}?",),
        ),
    },
    "person": {
        "birthplace": Phrases(
            ("the birthplace of {x}", "the town where {x} was born"),
            ("In which town was {x} born?", "Where was {x} born?", "What is the birthplace of {x}?"),
            ("Was {x} born in {v}?", "Is {v} the birthplace of {x}?"),
        ),
        "birth_year": Phrases(
            (), ("In what year was {x} born?", "When was {x} born?", "What is the year of birth of {x}?")
        ),
        "death_year": Phrases(
            (), ("In what year did {x} die?", "When did {x} die?", "What is the year of death of {x}?")
        ),
        "death_place": Phrases(
            ("the place of death of {x}", "the town where {x} died"),
            ("In which town did {x} die?", "Where did {x} die?", "What is the place of death of {x}?"),
            ("Did {x} die in {v}?",),
        ),
        "teacher": Phrases(
            ("the teacher of {x}", "{x}'s teacher"),
            ("Who taught {x}?", "Who was the teacher of {x}?", "Under whom did {x} study?"),
            ("Was {x} a pupil of {v}?", "Did {x} study under {v}?"),
        ),
        "employer": Phrases(
            ("the employer of {x}", "{x}'s employer", "the organisation that employed {x}"),
            ("For which organisation did {x} work?", "Who employed {x}?", "Who was the employer of {x}?"),
            ("Did {x} work for {v}?", "Was {x} employed by {v}?"),
        ),
        "spouse": Phrases(
            ("the {spouse} of {x}", "{x}'s {spouse}"),
            ("Who was the {spouse} of {x}?", "To whom was {x} married?", "Whom did {x} marry?"),
            ("Was {x} married to {v}?", "Did {x} marry {v}?"),
        ),
    },
    "organisation": {
        "seat": Phrases(
            ("the seat of {x}", "the town where {x} is based"),
            ("In which town is {x} based?", "Where is {x} based?", "Which town is the seat of {x}?"),
            ("Is {x} based in {v}?", "Does {x} have its seat in {v}?"),
        ),
        "founder": Phrases(
            ("the founder of {x}", "the person who founded {x}"),
            ("Who founded {x}?", "Who was the founder of {x}?", "By whom was {x} founded?"),
            ("Was {x} founded by {v}?", "Did {v} found {x}?"),
        ),
        "founded": Phrases((), ("In what year was {x} founded?", "When was {x} founded?")),
        "director": Phrases(
            ("the first director of {x}",),
            ("Who was the first director of {x}?", "Who became the first director of {x}?"),
            ("Was {v} the first director of {x}?",),
        ),
    },
    "publishing house": {"size": _count("How many employees does {x} have?")},
    "engineering firm": {"size": _count("How many employees does {x} have?")},
    "theatre": {"size": _count("How many seats does {x} have?")},
    "museum": {"size": _count("How many objects are in the collection of {x}?")},
    "research institute": {"size": _count("How many members does {x} have?")},
    "town": {
        "region": Phrases(
            ("the region of {x}", "the region in which {x} lies"),
            ("In which region is {x}?", "In which region does {x} lie?", "To which region does {x} belong?"),
            ("Does {x} lie in {v}?", "Does {x} belong to the region of {v}?"),
        ),
        "river": Phrases(
            ("the river that flows through {x}", "the river on which {x} lies"),
            ("Which river flows through {x}?", "On which river does {x} stand?", "On which river does {x} lie?"),
            ("Does {v} flow through {x}?", "Does {x} lie on {v}?"),
        ),
        "population": _count("What is the population of {x}?", "How many people live in {x}?",
            "How many inhabitants does {x} have?"
        ),
        "charter": Phrases((), ("In what year did {x} receive its charter?", "When did {x} receive its charter?")),
        "mayor": Phrases(
            ("the longest-serving mayor of {x}",),
            ("Who was the longest-serving mayor of {x}?", "Who served longest as mayor of {x}?"),
            ("Was {v} the longest-serving mayor of {x}?",),
        ),
    },
    "region": {
        "capital": Phrases(
            ("the capital of {x}",),
            ("What is the capital of {x}?", "Which town is the capital of {x}?"),
            ("Is {v} the capital of {x}?",),
        ),
        "area": _count("What is the area of {x}?",
            "How many square kilometres does {x} cover?",
        ),
        "peak": Phrases((), ("What is the highest mountain of {x}?", "Which mountain is the highest in {x}?")),
        "governor": Phrases(
            ("the first governor of {x}",),
            ("Who was the first governor of {x}?", "Who became the first governor of {x}?"),
            ("Was {v} the first governor of {x}?",),
        ),
    },
    "river": {
        "length": _count("How many kilometres long is {x}?", "What is the length of {x}?"),
        "source": Phrases(
            ("the town near the source of {x}",),
            ("Near which town does {x} rise?", "Which town lies near the source of {x}?"),
            ("Does {x} rise near {v}?",),
        ),
        "lake": Phrases((), ("Into which lake does {x} flow?", "Which lake is at the end of {x}?")),
    },
}  # fmt: skip


def phrases_of(entity: Entity, relation: str) -> Phrases:
    """The wordings of a relation of an entity."""
    by_kind = PHRASES.get(entity.kind, {})
    return by_kind[relation] if relation in by_kind else PHRASES[entity.sort][relation]


#: Two entities compared: their kind, the relation, whether the smaller value wins, and the question.
COMPARISONS: tuple[tuple[str, str, bool, tuple[str, ...]], ...] = (
    ("person", "birth_year", True, ("Who was born first, {a} or {b}?", "Who was born earlier, {a} or {b}?")),
    ("person", "birth_year", False, ("Who was born later, {a} or {b}?",)),
    ("person", "death_year", True, ("Who died first, {a} or {b}?",)),
    ("person", "death_year", False, ("Who died later, {a} or {b}?",)),
    ("organisation", "founded", True, ("Which was founded first, {a} or {b}?", "Which is older, {a} or {b}?")),
    ("organisation", "founded", False, ("Which was founded later, {a} or {b}?",)),
    ("town", "population", False, ("Which town has more inhabitants, {a} or {b}?",)),
    ("town", "population", True, ("Which town has fewer inhabitants, {a} or {b}?",)),
    ("town", "charter", True, ("Which town received its charter first, {a} or {b}?",)),
    ("work", "year", True, ("Which is the earlier work, {a} or {b}?", "Which work came first, {a} or {b}?")),
    ("work", "year", False, ("Which is the later work, {a} or {b}?",)),
    ("region", "area", False, ("Which region is larger, {a} or {b}?",)),
    ("river", "length", False, ("Which river is longer, {a} or {b}?",)),
)

#: Two entities that may have a value in common.
IN_COMMON: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("person", "birthplace", ("Were {a} and {b} born in the same town?",)),
    ("person", "death_place", ("Did {a} and {b} die in the same town?",)),
    ("person", "employer", ("Did {a} and {b} work for the same organisation?",)),
    ("person", "teacher", ("Did {a} and {b} have the same teacher?",)),
    ("organisation", "seat", ("Are {a} and {b} based in the same town?",)),
    ("town", "region", ("Are {a} and {b} in the same region?", "Do {a} and {b} lie in the same region?")),
    ("town", "river", ("Do {a} and {b} lie on the same river?", "Does the same river flow through {a} and {b}?")),
)
