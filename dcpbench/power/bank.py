"""A bank: wrong backends with the rules that must catch them, and odd ones that are right. Read on a rank.

A bank is a module with two names. ``MUTANTS`` maps a name to an object with three attributes: ``backend``, its
specification; ``defect``, what is wrong, in a sentence; ``rules``, the codes any of which names the defect.
``ODD_BACKENDS`` lists the specifications of backends that are unusual and right, ``SAFE_BACKENDS`` those that are right
under faults too; there may be none of either.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dcpbench.errors import UsageError, expected
from dcpbench.messages import Call
from dcpbench.ranks.pool import RankPool
from dcpbench.rules import RULES

__all__ = ["DEFAULT_BANK", "Bank", "Half", "Mutant", "chosen", "half_of", "read_bank"]

DEFAULT_BANK = "tests.bank"
"""The project's own, in a checkout."""

Half = Literal["tuning", "reporting"]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A backend with one planted defect.

    Attributes:
        name: of the mutant, once in its bank.
        backend: its specification.
        defect: what is wrong with it, in a sentence.
        rules: any of these codes names the defect.
    """

    name: str
    backend: str
    defect: str
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bank:
    """What a bank holds.

    Attributes:
        mutants: wrong backends.
        odd: specifications of backends that are right.
        safe: those of them that are right under faults as well.
    """

    mutants: tuple[Mutant, ...]
    odd: tuple[str, ...]
    safe: frozenset[str] = frozenset()


def half_of(name: str) -> Half:
    """Returns the half of the bank that a mutant belongs to.

    The choice is made by a digest of the name, so that nobody makes it and a new mutant moves no other one.
    """
    return "tuning" if hashlib.sha256(name.encode()).digest()[0] % 2 else "reporting"


def chosen(bank: Bank, only: Sequence[str], half: str) -> Bank:
    """Returns a part of ``bank``.

    Args:
        bank: all of it.
        only: parts of names; of no names, all are meant.
        half: "tuning" or "reporting" leaves out the other half of the mutants and all odd backends; "" does not.

    Raises:
        UsageError: nothing is left.
    """
    mutants = [one for one in bank.mutants if not half or half_of(one.name) == half]
    odd: list[str] = [] if half else list(bank.odd)
    if only:
        mutants = [one for one in mutants if any(part in one.name for part in only)]
        odd = [one for one in odd if any(part in one.rpartition(":")[2] for part in only)]
    if not mutants and not odd:
        raise expected("a part of a name in the bank", "--only", " ".join(only), "Give another one.")
    return Bank(tuple(mutants), tuple(odd), bank.safe)


def read_bank(pool: RankPool, module: str) -> Bank:
    """Has a rank import ``module``, which may need torch, and returns what it holds.

    Raises:
        UsageError: it cannot be imported, or is no bank.
    """
    (seen,) = pool.step(Call(0, 1, "dcpbench.power.bank:describe", {"module": module}, distributed=False))
    if seen.outcome != "ok":
        reason = seen.error.text.strip().splitlines()[0] if seen.error else seen.outcome
        raise UsageError(f"Expected a bank but --bank={module} cannot be read: {reason}. Give a module that is one.")
    mutants = tuple(Mutant(name, *one) for name, one in seen.value["mutants"].items())
    for one in mutants:
        if not one.rules or not set(one.rules) <= set(RULES):
            raise expected("codes of rules", f"{module}: rules of {one.name}", one.rules, "See: dcpbench rules.")
    odd, safe = seen.value["odd"], seen.value["safe"]
    return Bank(mutants, tuple(dict.fromkeys([*odd, *safe])), frozenset(safe))


def describe(_rank: int, _world_size: int, module: str) -> dict[str, Any]:
    """Runs on a rank: returns a bank as plain values."""
    held = importlib.import_module(module)
    mutants = {name: (one.backend, one.defect, tuple(one.rules)) for name, one in held.MUTANTS.items()}
    return {
        "mutants": mutants,
        "odd": list(getattr(held, "ODD_BACKENDS", ())),
        "safe": list(getattr(held, "SAFE_BACKENDS", ())),
    }
