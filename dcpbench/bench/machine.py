"""What a figure depends on beside the code: the machine, the file system, the versions. No names of hosts or users."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dcpbench.versions import versions_of

__all__ = ["Machine", "available_memory_bytes", "commit_of", "file_system_of", "this_machine", "versions"]

_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
_GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """A kind of machine: runs on two of the same kind may be compared.

    Attributes:
        id: made of the rest; a folder under ``results/`` has this name.
        cpu: model.
        num_cores: that this process may use.
        memory_gib: rounded.
    """

    id: str
    cpu: str
    num_cores: int
    memory_gib: int
    architecture: str


def this_machine() -> Machine:
    """Returns the machine that this runs on."""
    cpu = _first(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo")) or platform.processor() or "unknown"
    memory = round(int(_first(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo")) or 0) * 1024 / _GIB)
    num_cores, architecture = len(os.sched_getaffinity(0)), platform.machine()
    mark = hashlib.blake2b(cpu.encode(), digest_size=3).hexdigest()
    return Machine(f"{architecture}-{num_cores}cpu-{memory}gib-{mark}", cpu, num_cores, memory, architecture)


def available_memory_bytes() -> int:
    """Returns what may still be allocated: by the system, and within the limit of this control group."""
    found = [int(_first(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo")) or 0) * 1024]
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        allowed, used = (_first(r"^(\d+)$", Path(path)) for path in (limit, usage))
        if allowed and used:
            found.append(int(allowed) - int(used))
    return max(0, min(found))


def file_system_of(folder: Path) -> tuple[str, bool]:
    """Returns the type of the file system that ``folder`` lies on, and whether that is in memory."""
    best, kind = "", "unknown"
    resolved = f"{folder.resolve()}/"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        if resolved.startswith(f"{mount.rstrip('/')}/") and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind, kind in _MEMORY_FILE_SYSTEMS


def commit_of(folder: Path) -> str:
    """Returns the git commit of ``folder``, ``+changes`` behind it if files differ; empty outside of a repository."""
    words = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Returns the versions of what the figures may depend on."""
    packages = ("torch", "numpy", "isal", "safetensors", "fsspec")
    return {**versions_of(packages), "kernel": platform.release()}


def _first(pattern: str, path: Path) -> str | None:
    try:
        match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return match[1] if match else None
