"""Passages: what the graph says about an entity, as a few sentences of an encyclopedia."""

import re
from functools import cache

from .graph import DOCTORS, Entity
from .names import Draw

#: Every fact is within this many words from the beginning, so that passages may be cut off there.
WORDS_WITH_FACTS = 50
_FEWEST_WORDS, _MOST_WORDS = 40, 70

Templates = tuple[str, ...]

_PUBLISHED = ("{name} is {a_sort} by {maker}, published in {year}.",)
_PERFORMED = ("{name} is {a_sort} by {maker}, first performed in {year}.",)

#: First sentences by kind or sort. Those whose facts an entity does not have are not used for it.
_INTRODUCTIONS: dict[str, Templates] = {
    "person": (
        "{name} was {a_sort} born in {birthplace} in {birth_year}.",
        "{name} was {a_sort} who was born in {birth_year} in the town of {birthplace}.",
        "{name} ({birth_year}–{death_year}), {a_sort}, was born in {birthplace}.",
        "Born in {birthplace} in {birth_year}, {name} became {a_sort}.",
        "{name} ({birth_year}–{death_year}) was {a_sort}.",
        "{name}, {a_sort}, was born in {birth_year}.",
        "{name} was {a_sort}. {He} was born in {birthplace} in {birth_year}.",
    ),
    "work": (
        "{name} is {a_sort} by {maker}.",
        "{name}, {a_sort}, is the work of {maker}.",
        "{name} is {a_sort}.",
    ),
    "novel": _PUBLISHED,
    "book of poems": _PUBLISHED,
    "travel book": _PUBLISHED,
    "play": _PERFORMED,
    "opera": _PERFORMED,
    "painting": ("{name} is {a_sort} by {maker}, completed in {year}.",),
    "organisation": (
        "{Name} is {a_sort} in {seat}.",
        "{Name} is {a_sort} based in the town of {seat}.",
        "{Name} is {a_sort}, founded in {founded}, with its seat in {seat}.",
        "{Name} is {a_sort}.",
    ),
    "town": (
        "{name} is a town in {region}.",
        "The town of {name} lies in {region}, on {river}.",
        "{name} is a town on {river}, in the region of {region}.",
        "{name} is a town of {population} inhabitants in the region of {region}.",
    ),
    "region": (
        "{name} is a region with an area of {area} square kilometres.",
        "{name} is a region whose capital is {capital}.",
        "{name} is a region. Its capital is the town of {capital}.",
    ),
    "river": (
        "{Name} is a river that rises near {source}.",
        "{Name} is {length} kilometres long.",
        "{Name} is a river that flows into {lake}.",
    ),
}

_BOOK: tuple[Templates, ...] = (
    ("{It} was written by {maker}.", "{Its} author is {maker}.", "{Maker} wrote it."),
    (
        "{It} was published by {house} in {year}.",
        "{It} first appeared in {year} and was published by {house}.",
        "{House} published it in {year}.",
    ),
    ("{It} was published by {house}.", "{Its} publisher was {house}."),
    ("{It} was published in {year}.", "{It} first appeared in {year}."),
    ("The first edition has {length} pages.", "{It} is {length} pages long."),
)
_STAGE: tuple[Templates, ...] = (
    (
        "{It} was first performed at {house} in {year}.",
        "The first performance took place in {year} at {house}.",
        "In {year} {it} was first performed at {house}.",
    ),
    ("The first performance took place at {house}.", "{House} was the first theatre to perform it."),
    ("{It} was first performed in {year}.", "The first performance took place in {year}."),
)
_STORY = ("{It} is set in {setting}.", "The story takes place in {setting}.", "The action is set in {setting}.")
_STAFF = ("{It} employs {size} people.", "{It} has {size} employees.", "Its staff numbers {size}.")

#: By kind or sort, the sentences after the first: for each group of facts, its phrasings. A group of which the first
#: sentence has said a part is followed by one of the shorter groups below it.
_SENTENCES: dict[str, tuple[Templates, ...]] = {
    "person": (
        (
            "{He} was born in {birthplace}.",
            "{He} was born in the town of {birthplace}.",
            "{His} birthplace was {birthplace}.",
        ),
        (
            "{He} died in {death_place} in {death_year}.",
            "{He} died in {death_year} in the town of {death_place}.",
            "{He} spent {his} last years in {death_place} and died there in {death_year}.",
        ),
        ("{He} died in {death_place}.", "{He} died in the town of {death_place}."),
        (
            "{He} studied under {teacher}.",
            "{His} teacher was {teacher}.",
            "{He} was a pupil of {teacher}.",
            "{He} was taught by {teacher}.",
        ),
        (
            "{He} worked for {employer}.",
            "For many years {he} worked for {employer}.",
            "{He} was employed by {employer}.",
            "{His} employer was {employer}.",
        ),
        ("{He} married {spouse}.", "{He} was married to {spouse}.", "{His} {partner} was {spouse}."),
    ),
    "novel": (*_BOOK, _STORY),
    "travel book": (*_BOOK, ("{It} describes the town of {setting}.", "{It} tells of a year in {setting}.")),
    "book of poems": (
        *_BOOK,
        ("Most of the poems are about {setting}.", "The poems describe the town of {setting}."),
    ),
    "play": (*_STAGE, _STORY, ("{It} was written by {maker}.", "{Its} author is {maker}.", "{Maker} wrote it.")),
    "opera": (
        *_STAGE,
        _STORY,
        ("{It} was composed by {maker}.", "{Its} composer is {maker}.", "{Maker} composed it."),
    ),
    "painting": (
        ("{It} was painted by {maker}.", "{Its} painter was {maker}.", "{Maker} painted it."),
        ("{It} was completed in {year}.", "The painter finished it in {year}.", "{It} dates from {year}."),
        ("{It} hangs in {house}.", "Today {it} hangs in {house}.", "{It} belongs to {house}."),
        ("{It} shows a street in {setting}.", "{It} shows the market square of {setting}."),
    ),
    "organisation": (
        ("{It} is based in {seat}.", "{It} has its seat in {seat}."),
        (
            "{It} was founded in {founded} by {founder}.",
            "{Founder} founded it in {founded}.",
            "In {founded} {it} was founded by {founder}.",
        ),
        ("{It} was founded by {founder}.", "{Its} founder was {founder}."),
        ("{Its} first director was {director}.", "{Director} was its first director."),
    ),
    "publishing house": (_STAFF,),
    "engineering firm": (_STAFF,),
    "theatre": (("{It} has {size} seats.", "{It} seats {size} people."),),
    "museum": (("{Its} collection comprises {size} objects.", "{It} holds {size} objects."),),
    "research institute": (("{It} has {size} members.", "Its members number {size}."),),
    "town": (
        ("{River} flows through it.", "{It} lies on {river}.", "{It} stands on the banks of {river}."),
        (
            "{It} has {population} inhabitants.",
            "{Its} population is {population}.",
            "{It} has a population of {population}.",
        ),
        ("{It} received its charter in {charter}.", "{Its} charter dates from {charter}."),
        ("{Its} longest-serving mayor was {mayor}.", "{Mayor} was its longest-serving mayor."),
    ),
    "region": (
        ("{Its} capital is {capital}.", "The capital of the region is {capital}."),
        ("{It} covers {area} square kilometres.", "{Its} area is {area} square kilometres."),
        ("{Its} highest mountain is {peak}.", "{Peak} is its highest mountain."),
        ("{Its} first governor was {governor}.", "{Governor} was its first governor."),
    ),
    "river": (
        ("{It} is {length} kilometres long.", "{Its} length is {length} kilometres."),
        ("{It} rises near {source} and flows into {lake}.",),
        ("{It} rises near {source}.", "{Its} source lies near {source}."),
        ("{It} flows into {lake}.", "{It} ends in {lake}."),
    ),
}

#: What fills a short passage and answers no question.
_FILLERS: dict[str, Templates] = {
    "person": (
        "Little else is known of {his} life.",
        "Most of {his} papers were lost in a fire.",
        "{He} kept a diary all {his} life.",
        "{His} letters have been published in part.",
        "Friends described {him} as patient and a little shy.",
        "{He} was fond of long walks and of chess.",
        "{His} early years were spent in modest circumstances.",
        "{He} declined every honour that was offered to {him}.",
        "A portrait of {him} has survived.",
        "{He} travelled widely and wrote about it in letters.",
        "In old age {he} gave away most of {his} books.",
        "{He} spoke several languages and taught {his} neighbours to read.",
        "There is no full account of {his} life.",
        "{His} house has been turned into a small inn.",
    ),
    "book": (
        "Critics praised its humour and its plain style.",
        "{It} has been translated into several languages.",
        "{It} was long out of print.",
        "{It} was written in a single summer.",
        "A new edition with notes is in preparation.",
        "The manuscript is lost.",
        "Schoolchildren used to learn parts of it by heart.",
    ),
    "stage": (
        "Critics praised its humour and its pace.",
        "{It} is still performed from time to time.",
        "{It} was written in a single summer.",
        "The first audience received it coolly.",
        "It calls for a small cast and no elaborate scenery.",
    ),
    "painting": (
        "{It} is painted in oils on a large canvas.",
        "Critics praised its light and its muted colours.",
        "Two sketches for it have survived.",
        "{It} has been restored more than once.",
        "A copy by an unknown hand is in private possession.",
    ),
    "organisation": (
        "{It} survived several lean years.",
        "{Its} archive is open to visitors by appointment.",
        "{Its} main building was enlarged twice.",
        "{It} is supported by a circle of friends.",
        "A history of it has been written but never printed.",
        "{Its} courtyard is planted with lime trees.",
        "Its rooms can be visited on Sundays.",
        "Its name is that of an old farm on the same site.",
    ),
    "town": (
        "A market is held there every Friday.",
        "Parts of the old town wall are still standing.",
        "{It} is known for its cheese and its brass bands.",
        "A fire destroyed many of the older houses.",
        "Visitors come for the narrow lanes and the covered bridge.",
        "The railway station lies a little outside the centre.",
        "Much of the surrounding land is used for orchards.",
        "The old bridge is the subject of several songs.",
        "Two fairs a year draw crowds from the villages nearby.",
    ),
    "region": (
        "Much of {it} is covered by forest.",
        "Winters there are long, and the summers are mild.",
        "Most of its people live from farming and from small workshops.",
        "The dialect spoken there has been studied in detail.",
        "{Its} flag shows a white heron on a green field.",
        "Few roads cross the hills in the north.",
    ),
    "river": (
        "Barges use its lower course for most of the year.",
        "{It} often floods the meadows along its banks in spring.",
        "Trout and pike are caught in {it}.",
        "Several old mills stand along its upper course.",
        "A footpath follows it from beginning to end.",
        "The water is clear and, even in summer, very cold.",
    ),
}
_FILLER_KEYS = dict.fromkeys(("novel", "book of poems", "travel book"), "book")
_FILLER_KEYS |= {"play": "stage", "opera": "stage", "painting": "painting"}


def reference(value: Entity | int | str, relation: str = "") -> str:
    """A value within a sentence: "the Merivel Museum", "1884", "48,200"."""
    if isinstance(value, Entity):
        return f"the {value.name}" if value.article else value.name
    if isinstance(value, int):
        return str(value) if relation in YEARS else f"{value:,}"
    return value


YEARS = ("birth_year", "death_year", "year", "founded", "charter")


def with_article(noun: str) -> str:
    """A noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def write_passage(entity: Entity, draw: Draw) -> str:
    """
    The text about an entity.

    The facts for which there is no room are removed from the entity, so that nobody is asked for them.
    """
    missing, fields = set(entity.facts), _fields(entity, draw)
    introductions = _INTRODUCTIONS[entity.kind] + _INTRODUCTIONS.get(entity.sort, ())
    first = draw.pick([text for text in introductions if _relations(text) <= missing])
    missing -= _relations(first)
    chosen = []
    groups = _SENTENCES.get(entity.kind, ())
    for group in groups if entity.sort == entity.kind else (*groups, *_SENTENCES.get(entity.sort, ())):
        if options := [text for text in group if _relations(text) <= missing]:
            chosen.append(draw.pick(options))
            missing -= _relations(chosen[-1])
    fillers = _FILLERS[_FILLER_KEYS.get(entity.sort, entity.kind)]
    sentences, count, unclear = list[str](), 0, False
    for template in (first, *draw.shuffled(chosen), *draw.shuffled(fillers)):
        sentence = template.format_map(fields | _subject(entity, draw, unclear))
        length = count + len(sentence.split())
        if template in fillers:
            if length > _MOST_WORDS or (count >= _FEWEST_WORDS and draw.chance(0.6)):
                break
        elif length > WORDS_WITH_FACTS:
            missing |= _relations(template)
            continue
        sentences.append(sentence)
        count, unclear = length, bool(_relations(template) & {"teacher", "spouse"})
    for relation in missing:
        del entity.facts[relation]
    return " ".join(sentences)


@cache
def _relations(template: str) -> frozenset[str]:
    return RELATIONS.intersection(name.lower() for name in _FIELD.findall(template))


def _fields(entity: Entity, draw: Draw) -> dict[str, str]:
    """What a template can name, in the middle of a sentence and at its beginning."""
    values = {relation: reference(value, relation) for relation, value in entity.facts.items()}
    values["name"] = reference(entity)
    if entity.kind == "person":
        values |= _WOMAN if entity.gender == "female" else _MAN
        if entity.sort in DOCTORS and draw.chance(0.5):
            values["name"] = f"Dr. {entity.name}"
    else:
        values |= {"it": "it", "its": "its"}
    values |= {name[0].upper() + name[1:]: value[0].upper() + value[1:] for name, value in values.items()}
    return values | {"a_sort": with_article(entity.sort)}


def _subject(entity: Entity, draw: Draw, unclear: bool) -> dict[str, str]:
    """
    Other words for the subject of a sentence, now and then. After a sentence about another person, pronouns are
    `unclear`.
    """
    if entity.kind == "person":
        surname = entity.name.split()[-1]
        if unclear:
            return {"He": surname, "he": surname, "His": f"{surname}'s"}
        return {"He": surname} if draw.chance(0.3) else {}
    return {"It": f"The {_SHORT.get(entity.sort, entity.sort)}"} if draw.chance(0.3) else {}


_WOMAN = {"he": "she", "his": "her", "him": "her", "partner": "husband"}
_MAN = {"he": "he", "his": "his", "him": "him", "partner": "wife"}
_SHORT = {"publishing house": "house", "engineering firm": "firm", "research institute": "institute"}
_SHORT |= {"travel book": "book", "book of poems": "book"}
_FIELD = re.compile(r"{(\w+)}")
RELATIONS = frozenset(
    "birthplace birth_year death_year death_place teacher employer spouse maker house year setting length seat "
    "founded founder director size region river population charter mayor area capital peak governor source "
    "lake".split()
)
