"""The graph of a world: people, places, works and organisations, and one value for each relation of each of them."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from .names import Draw, Words, full_names, town_names

#: Fewest passages of a part of the world: below that there are too few people of each profession.
FEWEST = 100


@dataclass(eq=False)
class Entity:
    """
    What a passage is about.

    Attributes:
        kind (`str`): `person`, `work`, `organisation`, `town`, `region` or `river`.
        name (`str`): Title of its passage, unlike any other.
        sort (`str`): Profession, or the kind of work or organisation: `novelist`, `painting`, `museum`.
        facts (`dict`): By relation, the one value: another entity, a number, or a name without a passage.
        gender (`str`): Of a person.
        article (`bool`): Whether the name is written with "the".
    """

    kind: str
    name: str
    sort: str
    facts: dict[str, "Entity | int | str"] = field(default_factory=dict)
    gender: str = ""
    article: bool = False

    def number(self, relation: str) -> int:
        """The value of a relation that is a number."""
        value = self.facts[relation]
        assert isinstance(value, int)
        return value


#: Professions by field. Teachers and pupils, and employers and employees, are of one field.
PROFESSIONS = {
    "letters": ("novelist", "poet", "playwright", "essayist"),
    "music": ("composer", "conductor", "organist"),
    "art": ("painter", "engraver", "portraitist"),
    "science": ("botanist", "historian", "astronomer", "physician", "geologist", "chemist"),
    "trade": ("engineer", "clockmaker", "architect", "shipbuilder", "merchant", "glassmaker"),
}
DOCTORS = PROFESSIONS["science"]
FIELD_OF = {profession: name for name, professions in PROFESSIONS.items() for profession in professions}
_FIELDS = ("letters", "letters", "letters", "music", "music", "art", "art", "science", "science", "trade")

#: Kinds of organisations by the field of those who work for them, with the words that end their names.
_ORGANISATIONS = {
    "letters": ("publishing house", ("Press", "House", "Books")),
    "music": ("theatre", ("Theatre", "Playhouse", "Opera")),
    "art": ("museum", ("Museum", "Gallery", "Collection")),
    "science": ("research institute", ("Institute", "College", "Observatory")),
    "trade": ("engineering firm", ("Company", "Works", "Shipyard", "Foundry")),
}
#: Names that are written without an article.
_BARE = ("Press", "Books", "House", "Works", "College")

#: Kinds of works by the professions that make them, with the field of the organisation that shows them.
_WORKS = {
    "novelist": ("novel", "letters"),
    "poet": ("book of poems", "letters"),
    "playwright": ("play", "music"),
    "essayist": ("travel book", "letters"),
    "composer": ("opera", "music"),
    "painter": ("painting", "art"),
}
_TITLES = (
    *("The {noun} of {word}", "{a_noun} for {word}", "{word} and the {noun}", "The {adjective} {noun} of {word}"),
    *("{word}", "{word}, or the {adjective} {noun}", "The {adjective} {word}", "The Last {noun} of {word}"),
    *("The Road to {word}", "A Winter in {word}", "Farewell to {word}", "The House at {word}", "Letters from {word}"),
)
_NOUNS = (
    "Lantern Orchard Ferryman Mirror Harbour Garden Orphan Widow Island Bell Lighthouse Mask Piper Stranger".split()
)
_ADJECTIVES = "Silent Broken Golden Hidden Distant Scarlet Frozen Patient Borrowed Hollow".split()


class World:
    """
    The entities of one part of the world, for training (`part` 0) or for tests (`part` 1).

    Args:
        seed (`int`): Seed of everything.
        part (`int`): 0 or 1. The two parts share no name, and neither depends on the size of the other.
        size (`int`): Number of entities, each with one passage.
    """

    def __init__(self, seed: int, part: int, size: int) -> None:
        if size < FEWEST:
            raise ValueError(f"a world of {size} passages is too small: expected at least {FEWEST} in each part.")
        self._draw = Draw("graph", seed, part)
        self._words = Words(self._draw, part)
        share = {"region": 0.03, "river": 0.05, "town": 0.14, "organisation": 0.14, "work": 0.24}
        count = {kind: max(4, round(size * part_of)) for kind, part_of in share.items()}
        self._add_places(count["region"], count["river"], count["town"])
        self._add_people(size - sum(count.values()))
        self._add_organisations(count["organisation"])
        self._add_works(count["work"])
        self._add_relations()
        self.entities: list[Entity] = self.people + self.works + self.organisations
        self.entities += self.towns + self.regions + self.rivers

    def _add_places(self, regions: int, rivers: int, towns: int) -> None:
        draw, word = self._draw, self._words.new
        self.regions = [Entity("region", word("region"), "region") for _ in range(regions)]
        self.rivers = [Entity("river", f"River {word('other')}", "river", article=True) for _ in range(rivers)]
        self.towns = [Entity("town", name, "town") for name in town_names(draw, self._words, towns)]
        towns_of: dict[Entity, list[Entity]] = {}
        for town in self.towns:
            region = draw.pick(self.regions)
            towns_of.setdefault(region, []).append(town)
            town.facts |= {"region": region, "river": draw.pick(self.rivers)}
            town.facts |= {"charter": draw.between(1140, 1760), "population": draw.between(1_100, 89_000)}
        for region in self.regions:
            if inside := towns_of.get(region):
                region.facts["capital"] = draw.pick(inside)
            region.facts |= {"peak": f"Mount {word('other')}", "area": draw.between(1_200, 38_000)}
        for river in self.rivers:
            river.facts |= {"length": draw.between(60, 940), "lake": f"Lake {word('other')}"}
            river.facts["source"] = draw.pick(self.towns)

    def _add_people(self, number: int) -> None:
        draw, people = self._draw, []
        for index, (given, surname, gender) in enumerate(full_names(draw, self._words, number)):
            profession = draw.pick(PROFESSIONS[_FIELDS[index % len(_FIELDS)]])
            person = Entity("person", f"{given} {surname}", profession, gender=gender)
            born = draw.between(1780, 1925)
            died = born + draw.between(48, 93)
            person.facts |= {"birth_year": born, "birthplace": draw.pick(self.towns), "death_year": died}
            person.facts["death_place"] = draw.pick(self.towns)
            people.append(person)
        self.people = people
        ordered = sorted(people, key=lambda person: person.number("birth_year"))
        self._born = _ByYear([(person.number("birth_year"), person) for person in ordered])

    def _add_organisations(self, number: int) -> None:
        draw, names = self._draw, set[str]()
        self.organisations: list[Entity] = []
        word = ""
        for index in range(number):
            kind, endings = _ORGANISATIONS[_FIELDS[index % len(_FIELDS)]]
            # Namesakes: "Merivel Press" has nothing to do with the Merivel Institute.
            if not word or draw.chance(0.7):
                word = self._words.new("other")
            ending = draw.pick(endings)
            if f"{word} {ending}" in names:
                word = self._words.new("other")
            names.add(f"{word} {ending}")
            founder = draw.pick(self.people)
            founded = founder.number("birth_year") + draw.between(24, 45)
            entity = Entity("organisation", f"{word} {ending}", kind, article=ending not in _BARE)
            entity.facts |= {"founder": founder, "founded": founded, "seat": draw.pick(self.towns)}
            entity.facts["size"] = draw.between(120, 2_900)
            if director := self._born.pick(draw, founded - 55, founded - 28, alive=founded):
                if director is not founder:
                    entity.facts["director"] = director
            self.organisations.append(entity)
        self._founded = {
            kind: _ByYear(sorted(((o.number("founded"), o) for o in self.organisations if o.sort == kind), key=_year))
            for kind, _ in _ORGANISATIONS.values()
        }

    def _add_works(self, number: int) -> None:
        draw, taken = self._draw, set[str]()
        makers = draw.shuffled([person for person in self.people if person.sort in _WORKS])
        self.works: list[Entity] = []
        word, title, maker = "", "", makers[0]
        while len(self.works) < number:
            # A work in four has the same maker and a similar name as the one before.
            if not word or draw.chance(0.75):
                word, maker = self._words.new("other"), draw.pick(makers)
            pattern, noun = draw.pick(_TITLES), draw.pick(_NOUNS)
            title = pattern.format(
                word=word,
                noun=noun,
                a_noun=f"A{'n' if noun[0] in 'IO' else ''} {noun}",
                adjective=draw.pick(_ADJECTIVES),
            )
            if title in taken:
                continue
            taken.add(title)
            sort, field_of_house = _WORKS[maker.sort]
            year = maker.number("birth_year") + draw.between(22, 47)
            work = Entity("work", title, sort)
            work.facts |= {"maker": maker, "year": year, "setting": draw.pick(self.towns)}
            house = self._founded[_ORGANISATIONS[field_of_house][0]].pick(draw, 0, year)
            if house is not None:
                work.facts["house"] = house
            if sort in ("novel", "book of poems", "travel book"):
                work.facts["length"] = draw.between(112, 690)
            self.works.append(work)

    def _add_relations(self) -> None:
        """Who taught, married and employed whom, and who governed which place."""
        draw, fields = self._draw, dict[str, _ByYear]()
        for name in PROFESSIONS:
            of_field = [person for person in self.people if FIELD_OF[person.sort] == name]
            fields[name] = _ByYear(sorted(((p.number("birth_year"), p) for p in of_field), key=_year))
        married = set[int]()
        for person in self.people:
            born = person.number("birth_year")
            teacher = fields[FIELD_OF[person.sort]].pick(draw, born - 40, born - 14, alive=born + 16)
            if teacher is not None and draw.chance(0.8):
                person.facts["teacher"] = teacher
            house = self._founded[_ORGANISATIONS[FIELD_OF[person.sort]][0]].pick(draw, 0, born + 40)
            if house is not None and person not in house.facts.values():
                person.facts["employer"] = house
            # Only one of the two passages says so: the other would answer questions about a name that it repeats.
            if id(person) not in married and draw.chance(0.6):
                other = self._born.pick(draw, born - 9, born + 9)
                if other and other.gender != person.gender and id(other) not in married:
                    married |= {id(person), id(other)}
                    person.facts["spouse"] = other
        for town in self.towns:
            if draw.chance(0.6):
                town.facts["mayor"] = draw.pick(self.people)
        for region in self.regions:
            region.facts["governor"] = draw.pick(self.people)


def _year(dated: tuple[int, Entity]) -> int:
    return dated[0]


class _ByYear:
    """Entities in the order of their years, so that those of a period are found at once."""

    def __init__(self, dated: Sequence[tuple[int, Entity]]) -> None:
        self._years = [year for year, _ in dated]
        self._entities = [entity for _, entity in dated]

    def pick(self, draw: Draw, first: int, last: int, alive: int | None = None) -> Entity | None:
        """One of the years `first` to `last`, if there is any; a person who was `alive` in a certain year."""
        start, stop = bisect_left(self._years, first), bisect_right(self._years, last)
        for _ in range(3 if stop > start else 0):
            entity = self._entities[draw.between(start, stop - 1)]
            if alive is None or entity.number("death_year") > alive:
                return entity
        return None
