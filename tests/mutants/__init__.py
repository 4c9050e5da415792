"""Backends that are wrong on purpose, each by one planted defect: what the suites must find.

`MUTANTS` has them all. A mutant bends one part of a correct backend, mostly in a way that shows in some cases only; in
the others it works.
"""

from tests.mutants import (
    background,
    content,
    encoding,
    geometry,
    identity,
    metadata,
    objects,
    outcome,
    places,
    planning,
    ranks,
    replicas,
    reuse,
    state,
)
from tests.mutants.bank import MUTANTS, Mutant

__all__ = [
    "MUTANTS",
    "Mutant",
    "background",
    "content",
    "encoding",
    "geometry",
    "identity",
    "metadata",
    "objects",
    "outcome",
    "places",
    "planning",
    "ranks",
    "replicas",
    "reuse",
    "state",
]
