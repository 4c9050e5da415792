"""From the text that ``strace -f -y -xx`` prints to operations. Pure.

A call that another one interrupts is printed in two parts; both are joined here. Paths come from ``-y``, which asks
the kernel for the name that a descriptor has at that moment, so that renamed files need no book-keeping. Only file
positions are kept, for ``write`` has no offset of its own. Of what goes over sockets it is kept when a rank sent or
received anything: where neither has happened, what two ranks did could have come in the other order.
"""

from __future__ import annotations

import posixpath
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcpbench.errors import MalformedFile
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

__all__ = ["TRACED_CALLS", "parse"]

TRACED_CALLS = (
    *("open", "openat", "openat2", "creat", "close", "dup", "dup2", "dup3", "fcntl", "lseek"),
    *("read", "readv", "write", "writev", "pwrite64", "pwritev", "pwritev2", "ftruncate", "truncate", "fallocate"),
    *("fsync", "fdatasync", "sync", "syncfs", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir"),
    *("mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat", "clone", "clone3", "fork", "vfork"),
    *("sendto", "sendmsg", "sendmmsg", "recvfrom", "recvmsg", "recvmmsg"),
    *("mmap", "copy_file_range", "sendfile", "splice", "io_uring_setup", "io_submit"),
)
"""What strace must be asked for. ``sync_file_range`` is left out: it makes nothing durable that has a new size."""

_LINE = re.compile(r"(\d+)\s+(.*)")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)")
_CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+|0x[0-9a-f]+|\?)(.*)")
_DESCRIPTOR = re.compile(r"(-?\d+|AT_FDCWD)(?:<([^>]*)>)?(.*)")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_BUFFER = re.compile(r'iov_base="((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_UNFINISHED = "<unfinished ...>"
_DETACHED = "<detached ...>"
_CHANNELS = ("socket:", "pipe:")
_NEVER = 1 << 62


@dataclass(slots=True)
class _Open:
    """An open file of a process: where its next ``write`` goes."""

    position: int = 0
    appends: bool = False
    is_synced: bool = False


_Effect = tuple[type[Operation], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    arguments: tuple[str, ...]
    result: int
    begin: int
    end: int

    def path(self, at: int) -> str:
        """Returns the path that an argument gives as text."""
        return _bytes(self.arguments[at]).decode("utf-8", "surrogateescape")

    def path_at(self, at: int) -> str:
        """Returns the path that two arguments give: a folder's descriptor, and text below it."""
        return posixpath.join(_path_of(self.arguments[at]), self.path(at + 1))


def parse(text: str, root: str, ranks: Mapping[int, int]) -> Trace:
    """Returns the operations on files under ``root``, in the order in which they ended.

    Args:
        text: the log.
        root: absolute path of the folder whose storage is looked at; no symbolic link in it.
        ranks: rank by thread id, of all threads that there were when strace began.

    Raises:
        MalformedFile: a line cannot be read, or data was cut.
    """
    return tuple(_Log(root, ranks).operations(text.splitlines()))


class _Log:
    def __init__(self, root: str, ranks: Mapping[int, int]) -> None:
        self._root = root
        self._rank_of = dict(ranks)
        self._sent: dict[int, list[int]] = {}
        self._received: dict[int, list[int]] = {}
        self._files: dict[tuple[int, int], _Open] = {}  # by process, which is known by its rank, and descriptor

    def operations(self, lines: Sequence[str]) -> Iterator[Operation]:
        calls = list(_calls(lines))
        for thread, call in calls:
            if call.name in ("clone", "clone3", "fork", "vfork") and call.result > 0:
                self._rank_of.setdefault(call.result, self._rank_of.get(thread, 0))
        for thread, call in calls:
            self._listen(self._rank_of.get(thread, 0), call)
        for thread, call in calls:
            if call.result >= 0:
                yield from self._of(self._rank_of.get(thread, 0), call)

    def _listen(self, rank: int, call: _Call) -> None:
        """Notes when a rank sends, and when it has received."""
        if call.result > 0 and call.arguments and _path_of(call.arguments[0]).startswith(_CHANNELS):
            if call.name.startswith(("send", "write")):
                self._sent.setdefault(rank, []).append(call.begin)
            elif call.name.startswith(("recv", "read")):
                self._received.setdefault(rank, []).append(call.end)

    def _of(self, rank: int, call: _Call) -> Iterator[Operation]:
        sent, received = sorted(self._sent.get(rank, [])), sorted(self._received.get(rank, []))
        later, earlier = bisect_right(sent, call.end), bisect_left(received, call.begin)
        common: dict[str, Any] = {
            "call": call.name,
            "rank": rank,
            "begin": call.begin,
            "end": call.end,
            "told": sent[later] if later < len(sent) else _NEVER,
            "heard": received[earlier - 1] if earlier else -1,
        }
        for kind, fields in self._effects(rank, call):
            named = [name for name in ("path", "target") if name in fields]
            paths: dict[str, str | None] = {name: self._inside(fields[name]) for name in named}
            if paths and all(path is None for path in paths.values()):
                continue
            if None in paths.values():
                inside = next(path for path in paths.values() if path is not None)
                yield Unsupported(path=inside, text=f"{call.name} across the folder's border", **common)
            else:
                given: dict[str, Any] = {"path": "", **fields}
                given.update(paths)
                yield kind(**given, **common)

    def _inside(self, path: str) -> str | None:
        path = posixpath.normpath(path)
        if path == self._root:
            return ""
        return path[len(self._root) + 1 :] if path.startswith(f"{self._root}/") else None

    def _effects(self, rank: int, call: _Call) -> Iterator[_Effect]:
        if call.name in _STATELESS:
            yield from _STATELESS[call.name](call)
            return
        name, arguments = call.name, call.arguments
        opened = self._files.get((rank, _number(arguments[0])))
        if name in _OPENS:
            yield from self._opened(rank, call, *_OPENS[name](call))
        elif name.startswith(("write", "pwrite")):
            yield from self._written(call, opened)
        elif opened is None:
            return
        elif name == "close":
            del self._files[rank, _number(arguments[0])]
            yield from _on_file(Close)(call)
        elif name == "lseek":
            opened.position = call.result
        elif name in ("read", "readv"):
            opened.position += call.result
        elif name.startswith("dup") or (name == "fcntl" and arguments[1].startswith("F_DUPFD")):
            self._files[rank, call.result] = opened

    def _opened(self, rank: int, call: _Call, path: str, flags: str) -> Iterator[_Effect]:
        if "O_TMPFILE" in flags:
            yield Unsupported, {"path": path, "text": "open of a file without a name"}
        elif any(flag in flags for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC")):
            self._files[rank, call.result] = _Open(appends="O_APPEND" in flags, is_synced="SYNC" in flags)
            yield OpenFile, {"path": path, "truncates": "O_TRUNC" in flags}

    def _written(self, call: _Call, opened: _Open | None) -> Iterator[_Effect]:
        if opened is None or _is_deleted(call.arguments[0]) or self._inside(_path_of(call.arguments[0])) is None:
            return
        data = _bytes(call.arguments[1])[: call.result]
        if len(data) != call.result:
            raise MalformedFile("strace log", f"expected {call.result} bytes of a {call.name} but got {len(data)}.")
        offset: int | None
        if call.name.startswith("pwrite"):
            offset = int(call.arguments[3])
        else:
            offset = None if opened.appends else opened.position
            opened.position += call.result
        path = _path_of(call.arguments[0])
        yield Write, {"path": path, "data": data, "offset": offset, "is_synced": opened.is_synced}


def _on_file(kind: type[Operation]) -> Callable[[_Call], list[_Effect]]:
    """Returns what a call does to the file of its first argument: nothing, if that has no name any more."""
    return lambda call: [] if _is_deleted(call.arguments[0]) else [(kind, {"path": _path_of(call.arguments[0])})]


def _cut(call: _Call) -> list[_Effect]:
    path = call.path(0) if call.name == "truncate" else _path_of(call.arguments[0])
    is_gone = call.name == "ftruncate" and _is_deleted(call.arguments[0])
    return [] if is_gone else [(Truncate, {"path": path, "size": int(call.arguments[1])})]


def _renamed_at(call: _Call) -> list[_Effect]:
    if call.name == "renameat2" and "RENAME_EXCHANGE" in call.arguments[4]:
        return [(Unsupported, {"path": call.path_at(0), "text": "renameat2 that exchanges two names"})]
    return [(Rename, {"path": call.path_at(0), "target": call.path_at(2)})]


def _mapped(call: _Call) -> list[_Effect]:
    is_shared = "MAP_SHARED" in call.arguments[3] and "PROT_WRITE" in call.arguments[2]
    if not is_shared or "<" not in call.arguments[4]:
        return []
    return [(Unsupported, {"path": _path_of(call.arguments[4]), "text": "mmap for writing"})]


def _unseen(at: int) -> Callable[[_Call], list[_Effect]]:
    return lambda call: [(Unsupported, {"path": _path_of(call.arguments[at]), "text": call.name})]


def _queued(call: _Call) -> list[_Effect]:
    return [(Unsupported, {"text": f"{call.name}: what it writes is not seen"})]


_OPENS: dict[str, Callable[[_Call], tuple[str, str]]] = {
    "creat": lambda call: (call.path(0), "O_WRONLY|O_CREAT|O_TRUNC"),
    "open": lambda call: (call.path(0), call.arguments[1]),
    "openat": lambda call: (call.path_at(0), call.arguments[2]),
    "openat2": lambda call: (call.path_at(0), call.arguments[2]),
}
_STATELESS: dict[str, Callable[[_Call], list[_Effect]]] = {
    "ftruncate": _cut,
    "truncate": _cut,
    "fsync": _on_file(Sync),
    "fdatasync": _on_file(Sync),
    "sync": lambda _: [(SyncAll, {})],
    "syncfs": lambda _: [(SyncAll, {})],
    "rename": lambda call: [(Rename, {"path": call.path(0), "target": call.path(1)})],
    "renameat": _renamed_at,
    "renameat2": _renamed_at,
    "link": lambda call: [(Link, {"path": call.path(0), "target": call.path(1)})],
    "linkat": lambda call: [(Link, {"path": call.path_at(0), "target": call.path_at(2)})],
    "unlink": lambda call: [(Unlink, {"path": call.path(0)})],
    "unlinkat": lambda call: [
        (RemoveFolder if "AT_REMOVEDIR" in call.arguments[2] else Unlink, {"path": call.path_at(0)})
    ],
    "rmdir": lambda call: [(RemoveFolder, {"path": call.path(0)})],
    "mkdir": lambda call: [(MakeFolder, {"path": call.path(0)})],
    "mkdirat": lambda call: [(MakeFolder, {"path": call.path_at(0)})],
    "symlink": lambda call: [(Unsupported, {"path": call.path(1), "text": call.name})],
    "symlinkat": lambda call: [(Unsupported, {"path": call.path_at(1), "text": call.name})],
    "mmap": _mapped,
    "copy_file_range": _unseen(2),
    "splice": _unseen(2),
    "sendfile": _unseen(0),
    "fallocate": _unseen(0),
    "io_uring_setup": _queued,
    "io_submit": _queued,
}
"""What a call does, where that needs nothing but its arguments."""


def _calls(lines: Sequence[str]) -> Iterator[tuple[int, _Call]]:
    """Yields (thread, call) in the order in which calls ended."""
    begun: dict[int, tuple[int, str]] = {}
    for number, line in enumerate(lines):
        match = _LINE.fullmatch(line)
        if match is None:
            raise MalformedFile(f"strace log, line {number + 1}", f"expected a call but got {line!r:.120}.")
        thread, rest = int(match[1]), match[2]
        if rest.startswith(("+++", "---")) or rest.endswith(_DETACHED):
            continue
        if rest.endswith(_UNFINISHED):
            begun[thread] = (number, rest.removesuffix(_UNFINISHED))
            continue
        begin = number
        if (resumed := _RESUMED.fullmatch(rest)) is not None:
            begin, first = begun.pop(thread, (number, f"{resumed[1]}("))
            rest = first + resumed[2]
        call = _CALL.fullmatch(rest)
        if call is None:
            raise MalformedFile(f"strace log, line {number + 1}", f"expected a call but got {rest!r:.120}.")
        if call[3] != "?":
            yield thread, _Call(call[1], _split(call[2]), int(call[3], 0), begin, number)


def _split(arguments: str) -> tuple[str, ...]:
    """Returns the arguments, cut at the commas that are in no bracket. Text is in hex, so that quotes do not matter."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(arguments):
        if character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and not depth:
            parts.append(arguments[start:at].strip())
            start = at + 1
    return (*parts, arguments[start:].strip())


def _number(argument: str) -> int:
    match = _DESCRIPTOR.match(argument)
    return -1 if match is None or match[1] == "AT_FDCWD" else int(match[1])


def _path_of(descriptor: str) -> str:
    match = _DESCRIPTOR.match(descriptor)
    return _unhex(match[2] or "").decode("utf-8", "surrogateescape") if match else ""


def _is_deleted(descriptor: str) -> bool:
    match = _DESCRIPTOR.match(descriptor)
    return match is not None and "(deleted)" in match[3]


def _bytes(argument: str) -> bytes:
    """Returns the bytes of a text argument, or those of all buffers of a list."""
    parts = _BUFFER.findall(argument) if argument.startswith("[") else _STRING.findall(argument)
    if any(cut for _, cut in parts):
        raise MalformedFile("strace log", "expected all bytes of a call but they were cut. Raise the limit of strings.")
    return b"".join(_unhex(text) for text, _ in parts)


def _unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))
