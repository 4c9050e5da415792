"""Names of the backends in :mod:`dcpbench.bench.planted`, for the controller, which imports no torch."""

from __future__ import annotations

__all__ = ["IDLE", "LARGER", "PLANTED_BYTES", "SLOWER", "STAMPED"]

PLANTED_BYTES = 64 << 20
"""What ``larger`` allocates beside what it saves."""

SLOWER, LARGER, STAMPED, IDLE = (f"dcpbench.bench.planted:{name}" for name in ("slower", "larger", "stamped", "idle"))
