"""The restart score: what is left for training once checkpoints and failures are paid for. Standard library only."""

from __future__ import annotations

import math

__all__ = ["goodput"]


def goodput(blocking_s: float, durable_s: float, interference: float, load_s: float, mtbf_s: float) -> float:
    """Returns the share of the time that is training which counts, 0.0 to 1.0, at the best interval between saves.

    A save costs what it blocks, and what it takes from the steps beside it until it is durable. A failure, every
    ``mtbf_s`` on average, costs the load and half an interval of work; an interval cannot be shorter than a save.

    Source: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.

    Args:
        blocking_s: seconds that a save stops training.
        durable_s: seconds until the checkpoint can be loaded.
        interference: share of the steps that is lost meanwhile.
        load_s: seconds of a load.
        mtbf_s: mean time between failures of the whole job.
    """
    cost_s = blocking_s + interference * max(0.0, durable_s - blocking_s)
    interval_s = max(math.sqrt(2 * cost_s * mtbf_s), durable_s)
    lost = cost_s / interval_s + (interval_s / 2 + load_s) / mtbf_s if interval_s else load_s / mtbf_s
    return max(0.0, 1.0 - lost)
