"""The exceptions that dcpbench raises, all of them.

    DcpbenchError
    ├── UsageError            the user gave something that cannot be used; one line with the remedy
    ├── MalformedFile         a case, observation or results file does not say what it must
    └── RanksUnavailable      the rank pool could not be started or rebuilt

A broken rule is not an error of dcpbench: it is a finding, raised by the suites as one of the classes in
:mod:`dcpbench.oracle.verdict`.
"""

from __future__ import annotations

__all__ = ["DcpbenchError", "MalformedFile", "RanksUnavailable", "UsageError", "expected"]


class DcpbenchError(Exception):
    """Everything that dcpbench itself raises on purpose."""


class UsageError(DcpbenchError):
    """Something that the user gave cannot be used; the text is one line that ends with the remedy."""


class MalformedFile(UsageError):
    """A file does not hold what it must.

    Attributes:
        where: the file and the place in it, for example ``case.json: leaves[2].dtype``.
    """

    def __init__(self, where: str, text: str) -> None:
        super().__init__(f"{where}: {text}")
        self.where = where


class RanksUnavailable(DcpbenchError):
    """The rank pool could not be started, or not rebuilt after a rank was lost."""


def expected(what: str, name: str, value: object, remedy: str) -> UsageError:
    """Returns the usage error of the house form: what was expected, what was got, what to do about it."""
    return UsageError(f"Expected {what} but got {name}={value!r}. {remedy}")
