"""What a save does to its storage, call by call: plain frozen data, in the order in which the calls ended.

Paths are relative to the traced folder, with ``""`` for the folder itself. They are resolved at the time of the call.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "Close",
    "Link",
    "MakeFolder",
    "OpenFile",
    "Operation",
    "RemoveFolder",
    "Rename",
    "Sync",
    "SyncAll",
    "Trace",
    "Truncate",
    "Unlink",
    "Unsupported",
    "Write",
]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One call that may change the storage, or make it durable.

    Attributes:
        path: what it is about.
        call: name of the system call.
        rank: whose process made it.
        begin, end: places of its start and its end among all starts and ends; -1 stands for the operation's number.
        told: when other ranks can first have heard that it was done; None stands for at once.
        heard: when its rank last heard of others before it began; None stands for just then.
    """

    path: str
    call: str = ""
    rank: int = 0
    begin: int = -1
    end: int = -1
    told: int | None = None
    heard: int | None = None

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} {self.path or '.'}"


@dataclass(frozen=True, kw_only=True)
class MakeFolder(Operation):
    """A new folder."""

    def __str__(self) -> str:
        return f"mkdir {self.path}"


@dataclass(frozen=True, kw_only=True)
class OpenFile(Operation):
    """A file was opened for writing; it was made if it was not there, and emptied if ``truncates``."""

    truncates: bool = False

    def __str__(self) -> str:
        return f"open {self.path}{' (truncates)' if self.truncates else ''}"


@dataclass(frozen=True, kw_only=True)
class Write(Operation):
    """Bytes went into a file at ``offset``; None is its end. With ``is_synced`` the call itself waited for them."""

    data: bytes
    offset: int | None = None
    is_synced: bool = False

    def __str__(self) -> str:
        at = "the end" if self.offset is None else f"byte {self.offset}"
        return f"write {len(self.data)} bytes to {self.path} at {at}"


@dataclass(frozen=True, kw_only=True)
class Truncate(Operation):
    """A file was cut, or extended with zeros, to ``size``."""

    size: int

    def __str__(self) -> str:
        return f"truncate {self.path} to {self.size}"


@dataclass(frozen=True, kw_only=True)
class Close(Operation):
    """A file that was open for writing was closed."""

    def __str__(self) -> str:
        return f"close {self.path}"


@dataclass(frozen=True, kw_only=True)
class Sync(Operation):
    """The content of a file, or the names in a folder, were made durable."""

    def __str__(self) -> str:
        return f"fsync {self.path or '.'}"


@dataclass(frozen=True, kw_only=True)
class SyncAll(Operation):
    """Everything was made durable."""

    path: str = ""

    def __str__(self) -> str:
        return "sync"


@dataclass(frozen=True, kw_only=True)
class Rename(Operation):
    """A file or folder got another name, in place of what had it before."""

    target: str

    def __str__(self) -> str:
        return f"rename {self.path} to {self.target}"


@dataclass(frozen=True, kw_only=True)
class Link(Operation):
    """A file got a further name."""

    target: str

    def __str__(self) -> str:
        return f"link {self.path} as {self.target}"


@dataclass(frozen=True, kw_only=True)
class Unlink(Operation):
    """A file lost a name."""

    def __str__(self) -> str:
        return f"unlink {self.path}"


@dataclass(frozen=True, kw_only=True)
class RemoveFolder(Operation):
    """An empty folder was removed."""

    def __str__(self) -> str:
        return f"rmdir {self.path}"


@dataclass(frozen=True, kw_only=True)
class Unsupported(Operation):
    """Something changed the storage in a way that is not modelled: what is said of it is UNKNOWN."""

    text: str

    def __str__(self) -> str:
        return self.text


Trace = tuple[Operation, ...]
