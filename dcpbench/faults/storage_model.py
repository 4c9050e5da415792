"""What operations do to a storage: effects that a crash may keep or lose, and the trees that they leave. Pure.

A tree is a dict from path to content, with None for a folder. The operations of a trace become *effects* on numbered
files and folders, so that a file keeps its identity when its name changes. An image of the storage after a crash is the
first tree with some of the effects applied: which ones may be missing is said in `crash_images`.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dcpbench.faults.operations import (
    Close,
    Link,
    MakeFolder,
    OpenFile,
    Operation,
    RemoveFolder,
    Rename,
    Sync,
    SyncAll,
    Trace,
    Truncate,
    Unlink,
    Unsupported,
    Write,
)

__all__ = ["Effect", "History", "PutBytes", "SetNames", "SetSize", "Tree", "history_of", "tree_with"]

Tree = Mapping[str, bytes | None]

PAGE_BYTES = 4096
_ROOT = 0


@dataclass(frozen=True)
class Effect:
    """One change that a crash keeps or loses as a whole.

    Attributes:
        operation: number of the operation in the trace.
        synced_by: numbers of the operations that make it durable, as POSIX has it, wherever they were done.
    """

    operation: int
    synced_by: tuple[int, ...] = ()


@dataclass(frozen=True)
class SetNames(Effect):
    """Names in folders: each (folder, name, file), where the file is None when the name goes away.

    Attributes:
        replaced: the file that lost its name to another, if there was one.
    """

    changes: tuple[tuple[int, str, int | None], ...] = ()
    replaced: int | None = None


@dataclass(frozen=True)
class SetSize(Effect):
    """A file was cut or extended with zeros."""

    file: int = 0
    size: int = 0


@dataclass(frozen=True)
class PutBytes(Effect):
    """Bytes of one page of a file.

    Attributes:
        appends: they lie where the file had no bytes before, at least in part.
    """

    file: int = 0
    offset: int = 0
    data: bytes = b""
    appends: bool = False


@dataclass(frozen=True)
class History:
    """A trace with what its operations did.

    Attributes:
        trace: the operations.
        first: the tree before them.
        effects: in order.
        syncs: numbers of operations that waited for the storage.
        needs: for each operation the numbers of those that must have been done before it.
        closes: (number of the operation, file) of each close.
        made: new files and folders by number; True for a folder.
        unsupported: what the model cannot follow; where there is any, no image can be trusted.
    """

    trace: Trace
    first: Tree
    effects: tuple[Effect, ...]
    syncs: tuple[int, ...]
    needs: tuple[frozenset[int], ...]
    closes: tuple[tuple[int, int], ...]
    made: tuple[tuple[int, bool], ...]
    unsupported: tuple[str, ...]


class _Nodes:
    """Files and folders by number."""

    def __init__(self, tree: Tree) -> None:
        self.folders: dict[int, dict[str, int]] = {_ROOT: {}}
        self.files: dict[int, bytearray] = {}
        for path in sorted(tree):
            content = tree[path]
            folder, name = self.place(path)
            number = self.new_number()
            if content is None:
                self.folders[number] = {}
            else:
                self.files[number] = bytearray(content)
            self.folders[folder][name] = number

    def new_number(self) -> int:
        return len(self.folders) + len(self.files)

    def make(self, number: int, *, is_folder: bool) -> None:
        if is_folder:
            self.folders[number] = {}
        else:
            self.files[number] = bytearray()

    def find(self, path: str) -> int | None:
        at: int | None = _ROOT
        for name in path.split("/") if path else ():
            at = self.folders.get(at, {}).get(name) if at is not None else None
        return at

    def place(self, path: str) -> tuple[int, str]:
        """Returns the folder and the name of a path, whether there is something or not."""
        folder = self.find(posixpath.dirname(path))
        if folder not in self.folders:
            raise LookupError(f"expected the folder of {path!r} in the model but there is none.")
        return folder, posixpath.basename(path)

    def apply(self, effect: Effect) -> None:
        if isinstance(effect, SetNames):
            for folder, name, number in effect.changes:
                if number is None:
                    self.folders[folder].pop(name, None)
                else:
                    self.folders[folder][name] = number
        elif isinstance(effect, SetSize):
            content = self.files[effect.file]
            del content[effect.size :]
            content.extend(bytes(effect.size - len(content)))
        elif isinstance(effect, PutBytes):
            content = self.files[effect.file]
            content.extend(bytes(max(0, effect.offset + len(effect.data) - len(content))))
            content[effect.offset : effect.offset + len(effect.data)] = effect.data

    def tree(self) -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}

        def visit(folder: int, prefix: str) -> None:
            for name, number in sorted(self.folders[folder].items()):
                path = prefix + name
                if number in self.folders:
                    found[path] = None
                    visit(number, f"{path}/")
                else:
                    found[path] = bytes(self.files[number])

        visit(_ROOT, "")
        return found


def history_of(trace: Sequence[Operation], first: Tree) -> History:
    """Returns what the operations of a trace did to the tree ``first``."""
    return _Recorder(tuple(_timed(number, operation) for number, operation in enumerate(trace)), first).history()


def _timed(number: int, operation: Operation) -> Operation:
    if operation.end < 0:
        operation = replace(operation, begin=2 * number, end=2 * number + 1)
    told = operation.end if operation.told is None else operation.told
    heard = operation.begin if operation.heard is None else operation.heard
    return replace(operation, told=told, heard=heard)


def _must_precede(one: Operation, other: Operation) -> bool:
    """Reads as: ``one``, which ended first, was done before ``other`` in each order in which the ranks may come."""
    if one.end >= other.begin:
        return False
    if one.rank == other.rank or (one.told or 0) < (other.heard or 0):
        return True
    if isinstance(one, Sync | SyncAll | Close):
        return False
    return any(_is_at_or_below(mine, yours) for mine in _paths(one) for yours in _paths(other))


def _paths(operation: Operation) -> tuple[str, ...]:
    return (operation.path, operation.target) if isinstance(operation, Rename | Link) else (operation.path,)


def _is_at_or_below(above: str, path: str) -> bool:
    return above == path or path.startswith(f"{above}/")


class _Recorder:
    """Follows a trace on full nodes, and notes effects."""

    def __init__(self, trace: Trace, first: Tree) -> None:
        self._trace = trace
        self._needs = tuple(
            frozenset(other for other in range(number) if _must_precede(trace[other], trace[number]))
            for number in range(len(trace))
        )
        self._first = first
        self._nodes = _Nodes(first)
        self._effects: list[Effect] = []
        self._syncs: list[int] = []
        self._closes: list[tuple[int, int]] = []
        self._made: list[tuple[int, bool]] = []
        self._unsupported: list[str] = []

    def history(self) -> History:
        for number, operation in enumerate(self._trace):
            try:
                self._follow(number, operation)
            except LookupError as error:
                self._unsupported.append(f"{operation}: {error}")
        return History(
            self._trace,
            self._first,
            tuple(self._effects),
            tuple(self._syncs),
            self._needs,
            tuple(self._closes),
            tuple(self._made),
            tuple(self._unsupported),
        )

    def _add(self, effect: Effect) -> None:
        self._nodes.apply(effect)
        self._effects.append(effect)

    def _follow(self, number: int, operation: Operation) -> None:  # noqa: PLR0912  one branch for each kind
        nodes = self._nodes
        match operation:
            case MakeFolder(path=path):
                place, made = nodes.place(path), self._make(is_folder=True)
                self._add(SetNames(number, changes=((*place, made),)))
            case OpenFile(path=path, truncates=truncates):
                found = nodes.find(path)
                if found is None:
                    place, found = nodes.place(path), self._make(is_folder=False)
                    self._add(SetNames(number, changes=((*place, found),)))
                elif truncates and nodes.files[found]:
                    self._add(SetSize(number, file=found, size=0))
            case Write(path=path, data=data, offset=offset, is_synced=is_synced):
                file = self._file(path)
                at = len(nodes.files[file]) if offset is None else offset
                durable = (number,) if is_synced else ()
                for start, part in _pages(at, data):
                    appends = start + len(part) > len(nodes.files[file])
                    self._add(PutBytes(number, durable, file=file, offset=start, data=part, appends=appends))
                if is_synced:
                    self._syncs.append(number)
            case Truncate(path=path, size=size):
                self._add(SetSize(number, file=self._file(path), size=size))
            case Rename(path=path, target=target):
                old, new = nodes.place(path), nodes.place(target)
                moved, replaced = nodes.find(path), nodes.find(target)
                if moved is None:
                    raise LookupError(f"expected {path!r} in the model but there is none.")
                self._add(SetNames(number, changes=((*old, None), (*new, moved)), replaced=replaced))
            case Link(path=path, target=target):
                self._add(SetNames(number, changes=((*nodes.place(target), self._file(path)),)))
            case Unlink(path=path) | RemoveFolder(path=path):
                self._add(SetNames(number, changes=((*nodes.place(path), None),), replaced=nodes.find(path)))
            case Close(path=path):
                if (closed := nodes.find(path)) is not None:
                    self._closes.append((number, closed))
            case Sync(path=path):
                self._sync(number, nodes.find(path))
            case SyncAll():
                self._sync(number, None)
            case Unsupported():
                self._unsupported.append(f"{operation.path}: {operation}" if operation.path else str(operation))

    def _make(self, *, is_folder: bool) -> int:
        number = self._nodes.new_number()
        self._nodes.make(number, is_folder=is_folder)
        self._made.append((number, is_folder))
        return number

    def _file(self, path: str) -> int:
        found = self._nodes.find(path)
        if found not in self._nodes.files:
            raise LookupError(f"expected the file {path!r} in the model but there is none.")
        return found

    def _sync(self, number: int, node: int | None) -> None:
        """Marks what had surely been done before the sync began: of one file or folder, or with None of all."""
        self._syncs.append(number)
        for at, effect in enumerate(self._effects):
            if effect.operation in self._needs[number] and (node is None or _touches(effect, node)):
                self._effects[at] = replace(effect, synced_by=(*effect.synced_by, number))


def _pages(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, bytes) of each page that a write touches: pages reach the storage one by one, in any order."""
    at = 0
    while at < len(data):
        length = min(len(data) - at, PAGE_BYTES - (offset + at) % PAGE_BYTES)
        yield offset + at, data[at : at + length]
        at += length


def _touches(effect: Effect, node: int) -> bool:
    """Reads as: a sync of ``node`` makes the effect durable; of a name that moves, a sync of its new folder."""
    if isinstance(effect, SetNames):
        return effect.changes[-1][0] == node
    return isinstance(effect, SetSize | PutBytes) and effect.file == node


def tree_with(history: History, effects: Iterable[Effect]) -> dict[str, bytes | None]:
    """Returns the tree in which ``effects`` of the history, whole or in part, have taken place, in their order."""
    nodes = _Nodes(history.first)
    for number, is_folder in history.made:  # whatever has a number must be there, named or not
        nodes.make(number, is_folder=is_folder)
    for effect in effects:
        nodes.apply(effect)
    return nodes.tree()
