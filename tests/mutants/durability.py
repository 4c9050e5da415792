"""Backends that are wrong under faults, each by one planted defect: what the fault suites must find.

`SAFE` is right: each rank writes a file of its own, a generation number in its name, and the coordinator commits by a
rename. The others bend it, or the reference's reader, in one place. They are in a bank of their own, since no generated
case without a fault shows what is wrong with them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import checkpoint as dcp

import reference
from dcpbench import EngineBackend, StorageBackend
from dcpbench.backends.protocol import Engine
from tests.odd_backends.dense import Dense, _gather, _raise_any, _rank

__all__ = ["FAULT_MUTANTS", "SAFE", "FaultMutant"]


@dataclasses.dataclass(frozen=True, slots=True)
class FaultMutant:
    """A backend with one planted defect.

    Attributes:
        backend: its specification.
        defect: what is wrong with it, in a sentence.
        rule: that names the defect.
        run: what shows it: ``crash/<scenario>``, ``live/<kind of fault>``, ``corruption`` or ``hostile/<sample>``.
    """

    name: str
    backend: str
    defect: str
    rule: str
    run: str


FAULT_MUTANTS: dict[str, FaultMutant] = {}


def shown_by(run: str, rule: str) -> Callable[[type], Any]:
    """Returns a class decorator that enters a bent part into the bank and makes a backend of it."""

    def enter(part: type) -> Any:
        name = part.__name__
        backend = f"{part.__module__}:{name}"
        FAULT_MUTANTS[name] = FaultMutant(name, backend, (part.__doc__ or "").strip(), rule, run)
        if issubclass(part, dcp.StorageReader):
            engine = getattr(part, "engine", Engine(reference.save, reference.load))
            return StorageBackend(name, reference.FileSystemWriter, part, engine)
        made = part()
        return EngineBackend(name, made.save, made.load)

    return enter


class Safe(Dense):
    """Each rank writes one file, and the coordinator commits them by a rename."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        folder, problem, generation = Path(checkpoint_id), None, 0
        try:
            if _rank() == 0:
                self.begin(folder)
                generation = self.generation(folder)
        except OSError as error:
            problem = self.word(error)
        answers = _gather((problem, generation))
        self.raise_any([answer[0] for answer in answers])
        path = folder / f"part-{_rank()}-{answers[0][1]}.bin"
        try:
            held = {self.key(path): self.pack(value) for path, value in self.leaves(state_dict)}
            self.write(path, self.sealed(pickle.dumps(held)))
            self.sync_names(folder)
        except Exception as error:
            problem = self.word(error)
        answers = _gather((problem, path.name))
        self.raise_any([answer[0] for answer in answers])
        try:
            if _rank() == 0:
                self.commit(folder, [answer[1] for answer in answers])
        except OSError as error:
            problem = self.word(error)
        self.raise_any(_gather(problem))

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        folder, problem, whole = Path(checkpoint_id), None, {}
        wanted = list(self.leaves(state_dict))
        try:
            for part in self.index(folder):
                for key, packed in pickle.loads(self.unsealed((folder / part["name"]).read_bytes(), part)).items():
                    self.join(whole, key, packed)
            for path, value in wanted:
                self.check(path, value, whole)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        _raise_any(_gather(problem))
        for path, value in wanted:
            self.put(state_dict, path, value, whole[self.key(path)])

    def begin(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.sync_names(folder.parent)

    def generation(self, folder: Path) -> int:
        taken = [int(path.stem.rpartition("-")[2]) for path in folder.glob("part-*.bin")]
        return max(taken, default=-1) + 1

    def sealed(self, data: bytes) -> bytes:
        return data + zlib.crc32(data).to_bytes(4, "little")

    def unsealed(self, data: bytes, part: dict[str, Any]) -> bytes:
        if zlib.crc32(data[:-4]) != part["crc"] or part["crc"] != int.from_bytes(data[-4:], "little"):
            raise ValueError(f"{part['name']} is damaged")
        return data[:-4]

    def write(self, path: Path, data: bytes) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            self.put_bytes(handle, data)
            self.sync_file(handle)
        finally:
            os.close(handle)

    def put_bytes(self, handle: int, data: bytes) -> None:
        while data:
            data = data[os.write(handle, data) :]

    def sync_file(self, handle: int) -> None:
        os.fsync(handle)

    def sync_names(self, folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def commit(self, folder: Path, names: list[str]) -> None:
        parts = [{"name": name, "crc": zlib.crc32((folder / name).read_bytes()[:-4])} for name in names]
        body = json.dumps(parts).encode()
        self.write(folder / "index.tmp", self.sealed(body))
        self.put_in_place(folder)
        self.sync_names(folder)
        self.clean(folder, names)

    def put_in_place(self, folder: Path) -> None:
        (folder / "index.tmp").replace(folder / "index")

    def clean(self, folder: Path, keep: list[str]) -> None:
        for path in folder.glob("part-*.bin"):
            if path.name not in keep:
                path.unlink()

    def index(self, folder: Path) -> list[dict[str, Any]]:
        data = (folder / "index").read_bytes()
        if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise ValueError("the index is damaged")
        return list(json.loads(data[:-4]))

    def word(self, error: Exception) -> str:
        return f"{type(error).__name__}: {error}"

    def raise_any(self, problems: list[str | None]) -> None:
        _raise_any(problems)


_safe = Safe()
SAFE = EngineBackend("safe", _safe.save, _safe.load)


@shown_by("crash/overwrite", "R801")
class overwrites_in_place(Safe):
    """Writes over the files that the old checkpoint needs, and looks at no checksum when it reads."""

    def generation(self, folder: Path) -> int:
        return 0

    def unsealed(self, data: bytes, part: dict[str, Any]) -> bytes:
        return data[:-4]


@shown_by("crash/overwrite", "R802")
class removes_before_it_writes(Safe):
    """Makes room for the new checkpoint by removing the old one first."""

    def begin(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        super().begin(folder)


@shown_by("crash/overwrite", "R802")
class unlinks_before_it_renames(Safe):
    """Removes the old index a moment before the new one takes its name."""

    def put_in_place(self, folder: Path) -> None:
        (folder / "index").unlink(missing_ok=True)
        super().put_in_place(folder)


@shown_by("crash/overwrite", "R802")
class cleans_before_it_commits(Safe):
    """Removes the files of the old checkpoint before the new one counts."""

    def put_in_place(self, folder: Path) -> None:
        self.clean(folder, [part["name"] for part in json.loads((folder / "index.tmp").read_bytes()[:-4])])
        super().put_in_place(folder)


@shown_by("crash/beside", "R803")
class keeps_only_the_latest(Safe):
    """Removes older checkpoints beside the one that it writes."""

    def begin(self, folder: Path) -> None:
        super().begin(folder)
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)


@shown_by("crash/first", "R804")
class forgets_to_sync_names(Safe):
    """Waits for the bytes of files, and never for their names."""

    def sync_names(self, folder: Path) -> None:
        pass


@shown_by("crash/first", "R804")
class forgets_to_sync_files(Safe):
    """Waits for names, and never for the bytes of files."""

    def sync_file(self, handle: int) -> None:
        pass


@shown_by("crash/first", "R804")
class syncs_too_early(Safe):
    """Waits for the file before its last bytes are written."""

    def write(self, path: Path, data: bytes) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            self.put_bytes(handle, data[:-4])
            self.sync_file(handle)
            self.put_bytes(handle, data[-4:])
        finally:
            os.close(handle)


@shown_by("crash/first", "R805")
class waits_for_the_rest(Safe):
    """Waits on a load until the index is there."""

    def index(self, folder: Path) -> list[dict[str, Any]]:
        while not (folder / "index").exists():
            time.sleep(0.05)
        return super().index(folder)


@shown_by("live/ENOSPC", "R806")
class swallows_write_errors(Safe):
    """Goes on when a file cannot be written."""

    def put_bytes(self, handle: int, data: bytes) -> None:
        with suppress(OSError):
            super().put_bytes(handle, data)


@shown_by("live/short", "R806")
class expects_whole_writes(Safe):
    """Does not look at how many bytes were written."""

    def put_bytes(self, handle: int, data: bytes) -> None:
        os.write(handle, data)


@shown_by("live/EIO", "R806")
class swallows_sync_errors(Safe):
    """Takes the commit for done when the rename has failed."""

    def put_in_place(self, folder: Path) -> None:
        with suppress(OSError):
            super().put_in_place(folder)


@shown_by("live/EIO", "R807")
class hides_the_cause(Safe):
    """Says no more than that the save has failed."""

    def word(self, error: Exception) -> str:
        return "the save has failed"


@shown_by("live/EIO", "R502")
class tells_only_the_coordinator(Safe):
    """Raises on the coordinator alone when the commit fails."""

    def raise_any(self, problems: list[str | None]) -> None:
        is_commit = not any(isinstance(problem, str) and "part-" in problem for problem in problems)
        if _rank() == 0 or not dist.is_initialized() or not is_commit:
            super().raise_any(problems)


@shown_by("corruption", "R808")
class checks_nothing(Safe):
    """Looks at no checksum when it reads."""

    def unsealed(self, data: bytes, part: dict[str, Any]) -> bytes:
        return data[:-4]


@shown_by("hostile/planner-data-that-calls", "R901")
class trusts_pickles(reference.FileSystemReader):
    """Loads the metadata with pickle, as it comes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return pickle.loads((self.path / ".metadata").read_bytes())


@shown_by("hostile/path-above", "R902")
class follows_paths(reference.FileSystemReader):
    """Goes wherever the metadata says."""

    def _data_path(self, relative_path: str) -> Path:
        return self.path / relative_path


@shown_by("hostile/doubling-lists", "R903")
class walks_every_branch(reference.FileSystemReader):
    """Visits each part of the metadata as often as it is named."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata = super().read_metadata(*args, **kwargs)
        self.num_parts = _count(metadata.planner_data)
        return metadata


def _count(value: Any) -> int:
    return 1 + sum(map(_count, value)) if isinstance(value, list) else 1


@shown_by("hostile/a-chunk-is-missing", "R904")
class leaves_gaps(reference.FileSystemReader):
    """Fills of a tensor what the metadata lists, with an engine that asks for no more."""

    engine = Engine(dcp.save, dcp.load)
