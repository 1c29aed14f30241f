"""Questions over a world: chains of facts, comparisons, and questions for yes or no."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from .graph import DOCTORS, Entity, World
from .names import Draw
from .passages import reference
from .phrases import COMPARISONS, IN_COMMON, phrases_of

MAX_HOPS = 4
#: Shares of the questions whose answer can be guessed from two.
_COMPARISON_SHARE, _YES_NO_SHARE = 0.1, 0.08
_START_KINDS = ("work", "work", "work", "person", "person", "organisation", "organisation", "town", "river", "region")
_TRIES = 300
# Facts that the second of these relations states would surprise: directors work for what they direct.
_ODD = {("director", "employer"), ("founder", "employer")}

Value = Entity | int | str
Question = dict[str, Any]


class Questions:
    """
    Makes questions about a world. No two ask for the same, and none has the text of another.

    Args:
        world ([`World`]): Its entities have the facts that their passages state, and no others.
        texts (`dict[Entity, str]`): The passages.
        ids (`dict[Entity, str]`): Ids of the passages.
        draw ([`Draw`]): Random choices.
    """

    def __init__(self, world: World, texts: dict[Entity, str], ids: dict[Entity, str], draw: Draw) -> None:
        self._world, self._texts, self._ids, self._draw = world, texts, ids, draw
        self._asked: set[object] = set()
        self._made = 0
        self._by_kind: dict[str, list[Entity]] = defaultdict(list)
        self._leading_to: dict[Entity, list[tuple[Entity, str]]] = defaultdict(list)
        self._sharing: dict[tuple[str, Value], list[Entity]] = defaultdict(list)
        for entity in world.entities:
            self._by_kind[entity.kind].append(entity)
            for relation, value in entity.facts.items():
                if isinstance(value, Entity):
                    self._leading_to[value].append((entity, relation))
                    self._sharing[relation, value].append(entity)

    def make(self, number: int, weights: Sequence[float]) -> Iterator[Question]:
        """
        This many questions in a random order, with shares of 1, 2, 3 and 4 hops by `weights`.

        Raises:
            ValueError: There are not so many different questions about this world.
        """
        plan: list[tuple[int, str]] = []
        more_yes, more_first = 0, 0
        for hops, count in enumerate(_allot(number, weights), start=1):
            shares = (_YES_NO_SHARE, _COMPARISON_SHARE if hops > 1 else 0.0)
            verdicts, comparisons, chains = _allot(count, (*shares, 1 - sum(shares)))
            # Half of each; an odd one goes to the side that has had fewer.
            yes, first = (verdicts + 1 - more_yes) // 2, (comparisons + 1 - more_first) // 2
            more_yes, more_first = more_yes + 2 * yes - verdicts, more_first + 2 * first - comparisons
            parts = {"yes": yes, "no": verdicts - yes, "first": first, "second": comparisons - first, "chain": chains}
            plan += [(hops, kind) for kind, part in parts.items() for _ in range(part)]
        for hops, kind in self._draw.shuffled(plan):
            yield self._make_one(hops, kind)

    def _make_one(self, hops: int, kind: str) -> Question:
        for _ in range(_TRIES):
            if kind in ("first", "second"):
                question = self._compare(hops, winner=("first", "second").index(kind))
            elif kind == "chain":
                question = self._follow(hops)
            elif hops > 1 and self._draw.chance(0.5):
                question = self._match(hops, kind == "yes")
            else:
                question = self._follow(hops, kind)
            if question is None:
                continue
            facts = frozenset((step["title"], step["answer"]) for step in question["question_decomposition"])
            asked = {question["question"], (question["type"], question["answers"][0], facts)}
            if not asked & self._asked:
                self._asked |= asked
                self._made += 1
                return question
        raise ValueError(
            f"no more different questions of {hops} hops about {len(self._texts):,} passages, after "
            f"{self._made:,}. Ask for fewer questions or more passages."
        )

    def _follow(self, hops: int, verdict: str = "") -> Question | None:
        """A chain of facts; with a verdict, a question whether the last one has a certain value."""
        draw = self._draw
        path, relations = [draw.pick(self._by_kind[draw.pick(_START_KINDS)])], list[str]()
        value: Value = path[0]
        while len(relations) < hops:
            if relations:
                assert isinstance(value, Entity)
                path.append(value)
            last = len(relations) == hops - 1
            options = [
                relation
                for relation, of in path[-1].facts.items()
                if relation not in relations and (*relations[-1:], relation) not in _ODD
                if isinstance(of, Entity) or (last and not verdict)
                if not (last and verdict) or phrases_of(path[-1], relation).claims
            ]
            if not options:
                return None
            relations.append(draw.pick(options))
            value = path[-1].facts[relations[-1]]
        if len(set(path)) < len(path) or value in path:
            return None
        said = _plain(value, relations[-1])
        if any(f" {said} " in _spaced(self._texts[entity]) for entity in path[:-1]):
            return None  # fewer searches would do
        phrases = phrases_of(path[-1], relations[-1])
        steps = [self._step(entity, relation) for entity, relation in zip(path, relations, strict=True)]
        if verdict:
            assert isinstance(value, Entity)
            claimed = value if verdict == "yes" else self._other(value, path)
            if claimed is None:
                return None
            described = self._describe(path[0], relations[:-1], at_the_end=False)
            text = _fill(draw.pick(phrases.claims), path[-1], described, reference(claimed))
            return self._question(text, [verdict], "yes_no", steps)
        options = list(phrases.questions)
        if hops > 2:  # a long description is easier to read at the end
            options = [text for text in options if text.endswith("{x}?")] or options
        template = draw.pick(options)
        text = _fill(template, path[-1], self._describe(path[0], relations[:-1], template.endswith("{x}?")))
        if f" {said} " in _spaced(text):
            return None
        answers = _answers(value, relations[-1])
        return self._question(text, answers, "bridge" if hops > 1 else "lookup", steps)

    def _compare(self, hops: int, winner: int) -> Question | None:
        draw = self._draw
        kind, relation, smaller, texts = draw.pick(COMPARISONS)
        pair = [draw.pick(self._by_kind[kind]) for _ in range(2)]
        if pair[0] is pair[1] or any(relation not in entity.facts for entity in pair):
            return None
        values = [entity.number(relation) for entity in pair]
        if values[0] == values[1]:
            return None
        if values.index(min(values) if smaller else max(values)) != winner:
            pair.reverse()
        ends = self._ends(pair, hops)
        if ends is None:
            return None
        (first, steps), (second, more) = ends
        steps = [*steps, self._step(pair[0], relation), *more, self._step(pair[1], relation)]
        return self._question(draw.pick(texts).format(a=first, b=second), _answers(pair[winner]), "comparison", steps)

    def _match(self, hops: int, same: bool) -> Question | None:
        draw = self._draw
        kind, relation, texts = draw.pick(IN_COMMON)
        first = draw.pick(self._by_kind[kind])
        if relation not in first.facts:
            return None
        value = first.facts[relation]
        second = draw.pick(self._sharing[relation, value] if same else self._by_kind[kind])
        if second is first or relation not in second.facts or (second.facts[relation] is value) is not same:
            return None
        ends = self._ends([first, second], hops)
        if ends is None:
            return None
        (one, steps), (other, more) = ends
        steps = [*steps, self._step(first, relation), *more, self._step(second, relation)]
        return self._question(draw.pick(texts).format(a=one, b=other), ["yes" if same else "no"], "yes_no", steps)

    def _ends(self, pair: Sequence[Entity], hops: int) -> list[tuple[str, list[Question]]] | None:
        """
        How a question names two entities, and the steps to each: all but two hops are spent on descriptions.

        A name comes before a description, because "the teacher of A and B" could be either.
        """
        ends: list[tuple[str, list[Question]]] = []
        used = list(pair)
        for entity, by_description in zip(pair, (hops > 3, hops > 2), strict=True):
            if not by_description:
                ends.append((self._describe(entity, [], at_the_end=False), []))
                continue
            ways = [way for way in self._leading_to[entity] if way[0] not in used]
            if not ways:
                return None
            start, relation = self._draw.pick(ways)
            used.append(start)
            ends.append((self._describe(start, [relation], at_the_end=False), [self._step(start, relation)]))
        return ends

    def _describe(self, start: Entity, relations: Sequence[str], at_the_end: bool) -> str:
        """
        The entity that a chain leads to, in the words of a question.

        A clause ("the town where A was born") would run into what follows: it stands only `at_the_end`.
        """
        draw, entity = self._draw, start
        text = reference(start)
        if start.kind == "work" and start.sort != "painting" and draw.chance(0.5):
            text = f"the {start.sort} {start.name}"
        elif start.kind in ("town", "region") and draw.chance(0.3):
            text = f"the {start.kind} of {start.name}"
        for depth, relation in enumerate(relations):
            options = phrases_of(entity, relation).nouns
            if depth or not at_the_end:
                options = tuple(noun for noun in options if noun.endswith("{x}"))
            text = _fill(draw.pick(options), entity, text)
            value = entity.facts[relation]
            assert isinstance(value, Entity)
            entity = value
        return text

    def _step(self, entity: Entity, relation: str) -> Question:
        phrases, value = phrases_of(entity, relation), entity.facts[relation]
        return {
            "question": _fill(self._draw.pick(phrases.questions), entity, reference(entity)),
            "answer": _answers(value, relation)[0],
            "title": entity.name,
            "passage_id": self._ids[entity],
        }

    def _question(self, text: str, answers: list[str], kind: str, steps: list[Question]) -> Question:
        return {
            "question": text,
            "answers": answers,
            "hops": len(steps),
            "type": kind,
            "supporting_titles": [step["title"] for step in steps],
            "supporting_ids": [step["passage_id"] for step in steps],
            "question_decomposition": steps,
        }

    def _other(self, value: Entity, path: Sequence[Entity]) -> Entity | None:
        """Another entity that might as well be the value, if there is any."""
        same = [
            entity
            for entity in self._by_kind[value.kind]
            if entity is not value and entity not in path and entity.gender == value.gender
            if value.kind != "organisation" or entity.sort == value.sort
        ]
        return self._draw.pick(same) if same else None


def _allot(number: int, weights: Sequence[float]) -> list[int]:
    """Splits a number by weights, exactly; what is left over goes to the largest remainders."""
    exact = [number * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: number - sum(counts)]:
        counts[i] += 1
    return counts


def _fill(template: str, entity: Entity, x: str, v: str = "") -> str:
    return template.format(x=x, v=v, spouse="husband" if entity.gender == "female" else "wife")


def _spaced(text: str) -> str:
    """The words of a text without punctuation at their ends, with a space before and after each."""
    return f" {' '.join(word.strip('.,()?') for word in text.replace('–', ' ').split())} "


def _plain(value: Value, relation: str) -> str:
    return value.name if isinstance(value, Entity) else reference(value, relation)


def _answers(value: Value, relation: str = "") -> list[str]:
    """
    The answer, then what says the same.

    Nothing that F1 would pay for without a search: no "the town of …", whose words are in the question.
    """
    said = _plain(value, relation)
    if isinstance(value, int):
        return [said]
    if isinstance(value, str) or value.kind == "river":
        return [said, said.split(maxsplit=1)[1]]  # without "River", "Lake", "Mount"
    if value.kind == "person" and value.sort in DOCTORS:
        return [said, f"Dr. {said}"]
    return [said, f"the {said}"] if value.article else [said]
