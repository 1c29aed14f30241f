r"""Turn-level advantages: one function per estimator, and [`turn_advantages`], which picks one by name.

Pure functions on tensors. Axes: B rollouts in consecutive groups of G, K turns. Rollout i has `num_turns[i]` = K_i
turns; turn k < K_i - 1 is rewarded with its information gain, the last one with the outcome.

    name       compares a reward with                                          source
    joint      all rewards of the group                                        IGPO, Eq. 6
    separate   gains with the group's gains, outcomes with its outcomes        the IGPO authors' training script
    per_turn   gains with the group's gains at the same turn index             A²TGPO
    returns    all that follows a turn with what follows it in the group       REINFORCE, leave one out
    critic     all that follows a turn with a value fitted from the belief     this package

The first three subtract a mean from every reward before they add up what follows, so a rollout of more turns pays, or
earns, that mean more often ([`turn_price`]): their gradient is not that of the reward. The last two add up first.

A new estimator is a function from [`TurnRewards`] to advantages, and a line in `ESTIMATORS`.
"""

from .by_name import ESTIMATORS, NORMALIZATIONS, Normalization, turn_advantages, turn_price
from .critic import critic_advantages
from .estimators import joint_advantages, per_turn_advantages, returns_advantages, separate_advantages
from .turn_rewards import TurnRewards

__all__ = [
    "ESTIMATORS",
    "NORMALIZATIONS",
    "Normalization",
    "TurnRewards",
    "critic_advantages",
    "joint_advantages",
    "per_turn_advantages",
    "returns_advantages",
    "separate_advantages",
    "turn_advantages",
    "turn_price",
]
