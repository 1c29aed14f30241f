"""Planning the forwards of a belief pass: which probes run in which forward, so that no token runs twice.

This module knows neither models nor tensors. Contexts and probes are lists of token ids.

Targets that leave the same context share the tokens that they begin with. Three answers after the template t1 t2, each
run up to its last token but one, which predicts the last one:

    answer a d      run t1 t2 a         t1 ─ t2 ─┬─ a ─ b
    answer a b c    run t1 t2 a b                └─ e
    answer e f      run t1 t2 e

    node            t1  t2   a   b   e
    first            0   1   2   3   4      number in pre-order
    last             5   5   4   4   5      number after the last descendant
    predicts         –   a   d   c   f      t2 also predicts e, and a also predicts b

Node i sees node j, which is i or an ancestor of i, where first[j] <= first[i] < last[j]: b sees t1, t2, a and itself.
A forest has one such tree for every context length and first token.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

# Most elements of a forward's attention mask and logits, which a budget in tokens does not bound: 64 MB of booleans
# and 512 MB in bfloat16.
_MASK_ELEMENTS = 1 << 26
_LOGITS = 1 << 28
# Most nodes of a row in a forward. On a CPU a further forward costs less than attention among more nodes, and needs
# only the keys of its own contexts: over many turns, half of all keys. On a GPU, starting its kernels costs more.
_NODES = 256
_NODES_ON_GPU = 8192
# Trunks of clearly different lengths share a forward only until it has this many tokens: more of them would not make a
# token cheaper, and padding costs as much as tokens.
_ENOUGH_TOKENS = 4096


class Target(NamedTuple):
    """
    A run of tokens after a context, the last of which predict the labels.

    Attributes:
        limit (`int`): Length of the context.
        tokens (`list[int]`): Tokens to run after it.
        labels (`list[int]`): Tokens that the last `len(labels)` of them must predict.
        places (`list`): Entries of the result that get the score, each as (rollout, boundary, probe).
        key (`Hashable`): Identifies the context and the probe.
    """

    limit: int
    tokens: list[int]
    labels: list[int]
    places: list[tuple[int, int, int]]
    key: Hashable = None


class Unit(NamedTuple):
    """A trunk of tokens, the targets that leave it, and the number of its rollout."""

    context: Sequence[int]
    targets: list[Target]
    rollout: int = 0


class ForwardBudget(NamedTuple):
    """Limits of a forward: tokens with padding, and rows (`None` for no limit)."""

    tokens: int
    rows: int | None
    vocabulary: int
    on_gpu: bool = False

    @property
    def nodes(self) -> int:
        """Most nodes of a row."""
        return _NODES_ON_GPU if self.on_gpu else _NODES

    def allows(self, rows: int, width: int, logits: int, keys: int = 0) -> bool:
        """Whether a forward may have `rows` × `width` tokens, `logits` per row and a mask over `keys` per token."""
        return (
            (self.rows is None or rows <= self.rows)
            and rows * width <= self.tokens
            and rows * width * keys <= _MASK_ELEMENTS
            and rows * logits * self.vocabulary <= _LOGITS
        )


class Forest(NamedTuple):
    """
    The tokens of several targets as the nodes of trees; see the picture in the module.

    Nodes that predict a label come last, so that one slice of the hidden states goes through the LM head.

    Attributes:
        tokens (`list[int]`): Token of each node.
        positions (`list[int]`): Its position in the sequence that it continues.
        limits (`list[int]`): Length of the context that it sees.
        first (`list[int]`): Its number in pre-order.
        last (`list[int]`): The number after its last descendant.
        num_predicting (`int`): Number of nodes that predict a label.
        reads (`list[int]`): For each label of each target in turn, the predicting node that predicts it.
    """

    tokens: list[int]
    positions: list[int]
    limits: list[int]
    first: list[int]
    last: list[int]
    num_predicting: int
    reads: list[int]


def grow(targets: Sequence[Target]) -> Forest:
    """Build the forest of targets that are sorted by [`in_order`]."""
    tokens: list[int] = []  # all lists in pre-order
    positions: list[int] = []
    limits: list[int] = []
    last: list[int] = []
    reads: list[int] = []
    path: list[int] = []  # nodes of the current target
    for shared, target in _shared_with_previous(targets):
        del path[shared:]
        for depth, token in enumerate(target.tokens[shared:], start=shared):
            path.append(len(tokens))
            tokens.append(token)
            positions.append(target.limit + depth)
            limits.append(target.limit)
            last.append(0)
        for node in path:
            last[node] = len(tokens)
        reads += path[len(path) - len(target.labels) :]
    predicting = sorted(set(reads))
    place = {node: i for i, node in enumerate(predicting)}
    order = [node for node in range(len(tokens)) if node not in place] + predicting
    return Forest(
        tokens=[tokens[node] for node in order],
        positions=[positions[node] for node in order],
        limits=[limits[node] for node in order],
        first=order,
        last=[last[node] for node in order],
        num_predicting=len(predicting),
        reads=[place[node] for node in reads],
    )


def in_order(targets: Iterable[Target]) -> list[Target]:
    """Sort targets so that those that share the most tokens are neighbours."""
    return sorted(targets, key=lambda target: (target.limit, target.tokens))


def _shared_with_previous(targets: Sequence[Target]) -> Iterator[tuple[int, Target]]:
    """Each target with the number of first tokens that it shares with the target before it."""
    previous = None
    for target in targets:
        shared = 0
        if previous is not None and previous.limit == target.limit:
            for a, b in zip(previous.tokens, target.tokens, strict=False):
                if a != b:
                    break
                shared += 1
        yield shared, target
        previous = target


class PackedBatch(NamedTuple):
    """Trunks that run in one forward, and the targets of each later forward against them: `chunks[forward][row]`."""

    units: list[Unit]
    chunks: list[list[list[Target]]]

    @property
    def num_forwards(self) -> int:
        return 1 + len(self.chunks)


def pack_trunks(units: Sequence[Unit], budget: ForwardBudget, *, cached: bool = False) -> list[PackedBatch]:
    """
    Batch trunks with their targets. `units` come longest first, and their targets sorted by [`in_order`].

    Trunks share a batch if the budget allows it for them and for all their targets, and if it needs little padding or
    is small; `cached` trunks do not run, so their padding costs nothing. The targets of a batch run in as many
    forwards as the row with the most targets needs.
    """
    batches: list[list[Unit]] = []
    nodes = logits = 0  # maxima over the units of the last batch
    for unit in units:
        unit_nodes = sum(len(target.tokens) - shared for shared, target in _shared_with_previous(unit.targets))
        labels = sum(len(target.labels) for target in unit.targets)
        if batches:
            rows, length = len(batches[-1]) + 1, len(batches[-1][0].context)
            nodes, logits = max(nodes, unit_nodes), max(logits, labels)
            fits = cached or len(unit.context) >= 0.9 * length or (rows - 1) * length < _ENOUGH_TOKENS
            if fits and budget.allows(rows, length, 1) and budget.allows(rows, nodes, logits, length + nodes):
                batches[-1].append(unit)
                continue
        batches.append([unit])
        nodes, logits = unit_nodes, labels
    return [
        PackedBatch(
            batch,
            [list(rows) for rows in zip_longest(*(_split(unit, budget) for unit in batch), fillvalue=[])],
        )
        for batch in batches
    ]


def _split(unit: Unit, budget: ForwardBudget) -> list[list[Target]]:
    chunks: list[list[Target]] = []
    nodes = logits = 0
    for shared, target in _shared_with_previous(unit.targets):
        nodes, logits = nodes + len(target.tokens) - shared, logits + len(target.labels)
        if not chunks or nodes > budget.nodes or not budget.allows(1, nodes, logits, target.limit + nodes):
            chunks.append([])
            nodes, logits = len(target.tokens), len(target.labels)
        chunks[-1].append(target)
    return chunks


class PlainBatch(NamedTuple):
    """Contexts, each followed by one target, that run in one forward."""

    rows: list[list[int]]
    targets: list[Target]

    @property
    def num_forwards(self) -> int:
        return 1

    @property
    def columns(self) -> list[int]:
        """The columns in which at least one row predicts a label."""
        return sorted({column for row in range(len(self.rows)) for column in self.reads(row)})

    def reads(self, row: int) -> range:
        """The columns of a row that predict its labels."""
        return range(len(self.rows[row]) - len(self.targets[row].labels), len(self.rows[row]))


def pack_rows(
    units: Sequence[Unit], budget: ForwardBudget, share: Callable[[int, int], bool] = lambda length, other: True
) -> list[PlainBatch]:
    """Batch one row per context and target, longest first; `share` says which lengths may be in the same forward."""
    rows = [([*unit.context[: target.limit], *target.tokens], target) for unit in units for target in unit.targets]
    batches: list[PlainBatch] = []
    columns: set[int] = set()
    for row, target in sorted(rows, key=lambda pair: -len(pair[0])):
        own = PlainBatch([row], [target])
        if (
            batches
            and share(len(batches[-1].rows[0]), len(row))
            and budget.allows(len(batches[-1].rows) + 1, len(batches[-1].rows[0]), len(columns.union(own.reads(0))))
        ):
            batches[-1].rows.append(row)
            batches[-1].targets.append(target)
            columns.update(own.reads(0))
        else:
            batches.append(own)
            columns = set(own.reads(0))
    return batches
