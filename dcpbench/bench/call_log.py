"""From what strace prints of a save to counts: calls on the checkpoint's files, bytes written and made durable. Pure.

Contents are not kept, so that a save of gigabytes leaves a small log; :mod:`dcpbench.faults.strace_log` is for crash
states and keeps them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from dcpbench.bench.samples import Counts

__all__ = ["STRACE_ARGUMENTS", "counts_of"]

_WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range")
_SYNCS = ("fsync", "fdatasync")
_SYNCS_ALL = ("sync", "syncfs")
_RENAMES = ("rename", "renameat", "renameat2")
_UNLINKS = ("unlink", "unlinkat")
_OPENS = ("open", "openat", "creat")
_OTHERS = ("mkdir", "mkdirat", "ftruncate", "fallocate", "lseek", "link", "linkat")
_CALLS = (*_WRITES, *_SYNCS, *_SYNCS_ALL, *_RENAMES, *_UNLINKS, *_OPENS, *_OTHERS)

STRACE_ARGUMENTS = ["-y", "-s", "0", "-e", f"trace={','.join(_CALLS)}", "-e", "signal=none"]
"""Options of strace with which :func:`counts_of` can read its log."""

_LINE = re.compile(r"(\d+)\s+(.*)")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)(?:<([^>]*)>)?")
_HANDLE = re.compile(r"\d+<([^>]*)>")
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')
_UNFINISHED = " <unfinished ...>"


@dataclass
class _Files:
    """Bytes that were written to each file, and those of them that nothing has made durable yet."""

    written: Counter[str] = field(default_factory=Counter)
    unsynced: Counter[str] = field(default_factory=Counter)
    synchronous: set[str] = field(default_factory=set)
    synced_bytes: int = 0

    def write(self, path: str, count: int) -> None:
        self.written[path] += count
        self.unsynced[path] += count
        if path in self.synchronous:
            self.sync(path)

    def sync(self, path: str) -> None:
        self.synced_bytes += self.unsynced.pop(path, 0)

    def rename(self, source: str, target: str) -> None:
        for counts in (self.written, self.unsynced):
            moved = counts.pop(source, 0)
            counts.pop(target, None)
            if moved:
                counts[target] = moved

    def unlink(self, path: str) -> None:
        self.unsynced.pop(path, None)


def counts_of(log: str, folder: str) -> Counts:
    """Returns what the calls in ``log`` did to the files below ``folder``; collectives and copies are not in it."""
    calls: Counter[str] = Counter()
    files, written_bytes = _Files(), 0
    inside = f"{folder.rstrip('/')}/"
    for name, arguments, result, handle in _finished(log):
        if result < 0:
            continue
        if name in _SYNCS_ALL:
            for path in list(files.unsynced):
                files.sync(path)
            calls[name] += 1
            continue
        paths = [path for path in _paths(name, arguments, handle) if f"{path}/".startswith(inside)]
        if not paths:
            continue
        calls[name] += 1
        if name in _WRITES:
            files.write(paths[-1], result)
            written_bytes += result
        elif name in _SYNCS:
            files.sync(paths[0])
        elif name in _RENAMES and len(paths) == 2:
            files.rename(*paths)
        elif name in _UNLINKS:
            files.unlink(paths[0])
        elif name in _OPENS and re.search(r"\bO_D?SYNC\b", arguments):
            files.synchronous.add(paths[0])
    return Counts(
        calls=dict(sorted(calls.items())),
        written_bytes=written_bytes,
        synced_bytes=files.synced_bytes,
        num_unsynced_files=sum(count > 0 for count in files.unsynced.values()),
    )


def _finished(log: str) -> Iterator[tuple[str, str, int, str | None]]:
    """Yields each call that returned: its name, its arguments, its result, the path of a descriptor that it made."""
    begun: dict[str, str] = {}
    for line in log.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        pid, text = match.groups()
        if text.endswith(_UNFINISHED):
            begun[pid] = text.removesuffix(_UNFINISHED)
            continue
        if resumed := _RESUMED.match(text):
            text = begun.pop(pid, "") + resumed[1]
        if call := _CALL.match(text):
            yield call[1], call[2], int(call[3]), call[4]


def _paths(name: str, arguments: str, handle: str | None) -> list[str]:
    """Returns the paths that a call names, those of descriptors included."""
    if name in _OPENS:
        return [handle] if handle else []
    if name in (*_RENAMES, *_UNLINKS, "mkdir", "mkdirat", "link", "linkat"):
        folders = re.findall(r"(?:AT_FDCWD|\d+)<([^>]*)>", arguments) or [""]
        found = _PATH.findall(arguments)
        return [
            path if path.startswith("/") else f"{folders[min(number, len(folders) - 1)]}/{path}"
            for number, path in enumerate(found)
        ]
    return _HANDLE.findall(arguments)
