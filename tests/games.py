"""Search games small enough for their exact policy gradient: what an estimator of advantages should agree with.

At every stage of the evidence the policy answers, or searches with a good or a poor query; the last turn has to
answer. An answer is right with a probability that belongs to the stage, so that the calibrated belief is known, and
the gradient of the success rate in the policy's logits is a sum over all turns, stages and actions. Nothing here
imports `igpo_trl`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

ANSWER, GOOD, POOR = 0, 1, 2
Estimator = Callable[..., np.ndarray]  # (info_gain, outcome, num_turns, beliefs) of one batch -> advantages (B, K)


@dataclass(frozen=True)
class Game:
    """
    A question with stages of evidence, and a policy.

    Attributes:
        name (`str`): row of the table.
        right (questions, stages): probability that an answer is right.
        found (questions, 2, stages, stages): where a good and a poor query lead.
        policy (stages, 3): probabilities of the actions; the policy sees the stage, not the kind of question.
        num_turns (`int`): the last turn answers.
    """

    name: str
    right: np.ndarray
    found: np.ndarray
    policy: np.ndarray
    num_turns: int = 5

    def values(self) -> np.ndarray:
        """Q (K, questions, stages, 3): success rate after an action; that of a search in the last turn is not used."""
        q = np.zeros((self.num_turns, *self.right.shape, 3))
        q[:, :, :, ANSWER] = self.right
        for k in range(self.num_turns - 2, -1, -1):
            following = self.right if k == self.num_turns - 2 else (q[k + 1] * self.policy).sum(-1)
            q[k, :, :, 1:] = np.einsum("qast,qt->qsa", self.found, following)
        return q

    def true_advantages(self) -> np.ndarray:
        """Q - V, (K - 1, questions, stages, 3), of the turns that have a choice."""
        q = self.values()[:-1]
        return q - (q * self.policy).sum(-1, keepdims=True)

    def gradient(self) -> np.ndarray:
        """Gradient (stages, 3) of the success rate in the logits: Σ over k, q, s of P(s at turn k) π(a|s) (Q - V)."""
        advantages = self.true_advantages()
        reached = np.zeros_like(self.right)
        reached[:, 0] = 1 / len(self.right)
        total = np.zeros_like(self.policy)
        for k in range(self.num_turns - 1):
            total += np.einsum("qs,sa,qsa->sa", reached, self.policy, advantages[k])
            reached = np.einsum("qs,sa,qast->qt", reached, self.policy[:, 1:], self.found)
        return total

    def play(self, generator: np.random.Generator, num_batches: int, num_groups: int, size: int) -> "Rollouts":
        """Sample batches; a group shares its question."""
        shape = (num_batches, num_groups * size)
        question = np.repeat(generator.integers(len(self.right), size=(num_batches, num_groups)), size, axis=1)
        stage, alive = np.zeros(shape, dtype=int), np.ones(shape, dtype=bool)
        stages, actions = np.zeros((2, *shape, self.num_turns), dtype=int)
        num_turns, outcome = np.zeros(shape, dtype=int), np.zeros(shape)
        arrivals = self.found.cumsum(axis=-1)
        for k in range(self.num_turns):
            draw = generator.random((3, *shape))
            action = (draw[0][..., None] > self.policy.cumsum(axis=-1)[stage][..., :-1]).sum(axis=-1)
            action = np.where(k == self.num_turns - 1, ANSWER, action)
            stages[..., k], actions[..., k] = stage, action
            num_turns += alive
            ends = alive & (action == ANSWER)
            outcome = np.where(ends, draw[1] < self.right[question, stage], outcome)
            arrival = arrivals[question, np.maximum(action, 1) - 1, stage]
            stage = np.where(action == ANSWER, stage, (draw[2][..., None] > arrival[..., :-1]).sum(axis=-1))
            alive &= action != ANSWER
        return Rollouts(self, question, stages, actions, num_turns, outcome.astype(float), size)


@dataclass(frozen=True)
class Rollouts:
    """Batches (N, B, …) of a game: question, stage and action of every turn (K), number of turns, outcome."""

    game: Game
    question: np.ndarray
    stages: np.ndarray
    actions: np.ndarray
    num_turns: np.ndarray
    outcome: np.ndarray
    num_generations: int

    @property
    def is_choice(self) -> np.ndarray:
        """Turns (N, B, K) of the rollout in which the policy had a choice."""
        turn = np.arange(self.game.num_turns)
        return (turn < self.num_turns[..., None]) & (turn < self.game.num_turns - 1)

    def beliefs(self, kind: str, generator: np.random.Generator) -> np.ndarray:
        """Beliefs (N, B, K) before every turn."""
        return BELIEFS[kind](self.game.right[self.question[..., None], self.stages], generator)

    def gradients(self, advantages: np.ndarray) -> np.ndarray:
        """Policy gradient (N, stages, 3) of every batch: the mean over rollouts of Σ_k A_k ∇ log π(a_k | s_k)."""
        num_batches, policy = len(advantages), self.game.policy
        index = self.stages * 3 + self.actions + policy.size * np.arange(num_batches)[:, None, None]
        weights = np.where(self.is_choice, advantages, 0.0) / advantages.shape[1]
        taken = np.bincount(index.ravel(), weights.ravel(), minlength=num_batches * policy.size)
        taken = taken.reshape(num_batches, *policy.shape)
        return taken - taken.sum(-1, keepdims=True) * policy

    def true_advantages(self) -> np.ndarray:
        """Q - V (N, B, K) of the actions taken."""
        turn = np.minimum(np.arange(self.game.num_turns), self.game.num_turns - 2)
        return self.game.true_advantages()[turn, self.question[..., None], self.stages, self.actions]


@dataclass(frozen=True)
class Quality:
    """
    How good an estimator is in a game.

    Attributes:
        cosine: of the mean gradient with the exact one (bias), corrected for the noise of the mean. NaN if the exact
            gradient is 0.
        snr: norm of the mean gradient by the root of the summed variances of one batch's.
        one_batch: mean cosine of one batch's gradient with the exact one.
        credit: cosine of the advantages of turns with the true ones, over all batches.
        push: mean gradient of the logits of searching, by its own standard deviation in one batch.
    """

    cosine: float
    snr: float
    one_batch: float
    credit: float
    push: float


def measure(rollouts: Rollouts, beliefs: np.ndarray, estimator: Estimator) -> Quality:
    """Run the estimator on every batch and compare with the exact gradient."""
    gain = np.zeros_like(beliefs)
    gain[..., :-1] = np.diff(beliefs)
    batches: Iterator = zip(gain, rollouts.outcome, rollouts.num_turns, beliefs, strict=True)
    advantages = np.stack([estimator(*batch) for batch in batches])

    exact = rollouts.game.gradient()
    gradients = rollouts.gradients(advantages)
    mean, variance = gradients.mean(axis=0), gradients.var(axis=0, ddof=1).sum()
    squared = max((mean**2).sum() - variance / len(gradients), 1e-300)  # unbiased, unlike that of the mean of few
    norm = np.linalg.norm(exact)
    if norm < 1e-12:
        cosine = one_batch = float("nan")
    else:
        cosine = float((mean * exact).sum() / norm / squared**0.5)
        each = np.linalg.norm(gradients, axis=(1, 2))
        one_batch = float(((gradients * exact).sum(axis=(1, 2)) / norm / np.where(each > 0, each, 1.0)).mean())
    choice, true = rollouts.is_choice, rollouts.true_advantages()
    product = np.linalg.norm(advantages[choice]) * np.linalg.norm(true[choice])
    credit = float(advantages[choice] @ true[choice] / product) if norm >= 1e-12 else float("nan")
    searching = gradients[..., 1:].sum(axis=(1, 2))
    return Quality(
        cosine=cosine,
        snr=float((squared / variance) ** 0.5),
        one_batch=one_batch,
        credit=credit,
        push=float(searching.mean() / searching.std(ddof=1)),
    )


# --- the games -------------------------------------------------------------------------------------------------------


def _climb(good: float, poor: float, stages: int) -> np.ndarray:
    """Queries that lead from a stage to the next one, or leave it as it is; (2, stages, stages)."""
    up = np.eye(stages, k=1)
    up[-1, -1] = 1.0
    return np.stack([chance * up + (1 - chance) * np.eye(stages) for chance in (good, poor)])


def _game(name: str, right: list[list[float]], answer: float, found: np.ndarray | None = None) -> Game:
    """A game whose policy answers with probability `answer`, and searches well and poorly equally often."""
    stages = len(right[0])
    found = _climb(0.6, 0.2, stages) if found is None else found
    policy = np.tile([answer, (1 - answer) / 2, (1 - answer) / 2], (stages, 1))
    return Game(name, np.array(right), np.broadcast_to(found, (len(right), *found.shape)), policy)


# From stage 0 to 1 or to 2, whatever the query, and on from there to nowhere.
_SCATTER = np.broadcast_to(np.array([[0.2, 0.4, 0.4], [0, 1, 0], [0, 0, 1]]), (2, 3, 3))

GAMES = {
    game.name: game
    for game in (
        _game("evidence helps", [[0.15, 0.5, 0.85]], answer=0.3),
        _game("a bridge first", [[0.15, 0.15, 0.9]], answer=0.3),
        _game("doubt first", [[0.35, 0.1, 0.9]], answer=0.3),
        _game("mostly searches", [[0.15, 0.5, 0.85]], answer=0.08),
        _game("easy and hard", [[0.5, 0.8, 0.95], [0.05, 0.25, 0.6]], answer=0.3),
        _game("search is useless", [[0.5, 0.25, 0.75]], answer=0.3, found=_SCATTER),
    )
}


def _logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# From the probability that an answer would be right to the belief.
BELIEFS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "calibrated": lambda p, generator: p,
    "overconfident": lambda p, generator: _sigmoid(2.5 * _logit(p)),
    "noisy": lambda p, generator: _sigmoid(_logit(p) + generator.normal(size=p.shape)),
    "blind": lambda p, generator: _sigmoid(-1 + 0.3 * generator.normal(size=p.shape)),
    "inverted": lambda p, generator: 1 - p,
}
