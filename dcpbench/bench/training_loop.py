"""A training loop small enough to stand beside a save: what a save in the background takes from it. Runs on ranks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["TrainingLoop"]

_WIDTH = 128
_BATCH = 64


class TrainingLoop:
    """Steps of a model of two layers, each with forward, backward and an update; it shares nothing with the state."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self._device = device
        self._model = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH)).to(device)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01)
        self._batch = torch.randn(_BATCH, _WIDTH, device=device)
        self.rate_for(0.02)  # the first step allocates

    def rate_for(self, seconds: float) -> float:
        """Trains for so long and returns the steps per second."""
        deadline = time.monotonic() + seconds
        return self.rate_until(lambda: time.monotonic() >= deadline)

    def rate_until(self, is_over: Callable[[], bool]) -> float:
        """Trains until ``is_over`` and returns the steps per second; 0.0 if it is over at once."""
        begin, num_steps = time.monotonic(), 0
        while not is_over():
            self._step()
            num_steps += 1
        return num_steps / (time.monotonic() - begin)

    def _step(self) -> None:
        self._optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()
        if self._device != "cpu":
            torch.cuda.synchronize()
