"""Whose beliefs are scored: those of the policy, of the model that it started from, or of an earlier policy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from .trained_adapter import as_reference


class Reference:
    """
    Beliefs of the reference model: the policy with its adapter switched off or as it was, or a model of its own.

    Args:
        model (`nn.Module`, *optional*): the reference model, if the policy has no adapter.
    """

    def __init__(self, model: nn.Module | None = None):
        self._model = model

    @contextmanager
    def scoring(self, policy: nn.Module, optimizer_step: int) -> Iterator[nn.Module]:
        """The model that scores."""
        if self._model is not None:
            yield self._model
            return
        with as_reference(extract_model_from_parallel(policy)):
            yield policy


class Snapshot:
    """
    Beliefs of the policy as it was up to `every` optimizer steps ago: its trainable weights are copied.

    Args:
        every (`int`): optimizer steps between two snapshots.
    """

    carried = ("taken_at",)  # the weights are in a file of their own

    def __init__(self, every: int):
        self._every = every
        self.taken_at: int | None = None
        self.weights: list[torch.Tensor] = []

    @contextmanager
    def scoring(self, policy: nn.Module, optimizer_step: int) -> Iterator[nn.Module]:
        """The policy with the weights of the snapshot, which is renewed first if it is due."""
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if not self.weights or self.taken_at is None or not 0 <= optimizer_step - self.taken_at < self._every:
            self.taken_at = optimizer_step
            self.weights = [parameter.detach().clone() for parameter in parameters]
        own = [parameter.detach().clone() for parameter in parameters]
        _assign(parameters, self.weights)
        try:
            yield policy
        finally:
            _assign(parameters, own)


@torch.no_grad()
def _assign(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
