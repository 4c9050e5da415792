"""How many cases a run of the suites draws: profiles for a run, shares of them for a test."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, settings

__all__ = ["PROFILES", "register", "share"]

PROFILES = {"quick": 20, "standard": 120, "nightly": 2000}
"""Cases per test and backend; `share` gives a test fewer."""

_LEAST = 3
_COMMON: dict[str, Any] = {
    "deadline": None,  # ranks have their own timeout
    "phases": [phase for phase in Phase if phase is not Phase.explain],  # it traces, at 3x the time
    "print_blob": False,  # a failure writes a file that replays
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}


def register() -> None:
    """Makes the profiles known to Hypothesis. ``quick`` draws the same cases each time, and remembers none."""
    for name, max_examples in PROFILES.items():
        fixed: dict[str, Any] = {"derandomize": True, "database": None} if name == "quick" else {}
        settings.register_profile(name, **_COMMON, **fixed, max_examples=max_examples)


def share(fraction: float) -> settings:
    """Returns settings for a part of the profile's cases: for a test whose cases cost more, or vary less, than others.

    Args:
        fraction: of the profile's cases, above 0 up to 1; at least 3 cases are drawn, whatever it is.
    """
    usual: int = settings().max_examples
    return settings(max_examples=max(round(usual * fraction), min(_LEAST, usual)))
