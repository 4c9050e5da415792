"""The Stateful protocol: objects that give their state for saving and take it back after loading.

torch's own runtime-checkable class is used, so that `isinstance` here and in torch agree.
"""

from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful, StatefulT

__all__ = ["Stateful", "StatefulT", "is_stateful"]


def is_stateful(value: Any) -> bool:
    """Whether `value` is `Stateful`; the answer is quick for tensors, of which there are many and none are."""
    return not isinstance(value, torch.Tensor) and isinstance(value, Stateful)
