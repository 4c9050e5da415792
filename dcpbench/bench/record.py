"""`Record`: what one round trip cost, as a row of a table and of a Parquet file.

`results/README.md` names each column with its unit; a test holds the two together.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dcpbench.case import Case
from dcpbench.errors import UsageError
from dcpbench.messages import Observation

__all__ = ["SCHEMA_VERSION", "Record", "as_frame", "check_writable", "records_of", "write_frame"]

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One load and the save that it reads, of one case. Times and peaks are those of the slowest, largest rank."""

    test: str
    family: str
    case: str
    save_backend: str
    load_backend: str
    device: str
    save_world_size: int
    load_world_size: int
    num_tensors: int
    num_objects: int
    state_bytes: int
    stored_bytes: int
    save_s: float
    load_s: float
    save_peak_bytes: int
    load_peak_bytes: int
    save_device_peak_bytes: int
    load_device_peak_bytes: int
    verdict: str


@dataclass(frozen=True, slots=True)
class RunContext:
    """What a run knows beside the case: the test, the backends, the device, the verdict."""

    test: str
    save_backend: str
    load_backend: str
    device: str
    verdict: str


def records_of(case: Case, observations: Sequence[Observation], context: RunContext) -> list[Record]:
    """Returns a record per load of ``case`` that ended well on all ranks, as its save did."""
    records = []
    for number, step in enumerate(case.steps):
        saves = [
            n for n in range(number) if case.steps[n].action == "save" and case.steps[n].checkpoint == step.checkpoint
        ]
        if step.action != "load" or not saves:
            continue
        saved = [seen for seen in observations if seen.step == saves[-1]]
        loaded = [seen for seen in observations if seen.step == number]
        usages = [(seen.usage, seen in saved) for seen in (*saved, *loaded)]
        save = [usage for usage, is_save in usages if is_save and usage is not None]
        load = [usage for usage, is_save in usages if not is_save and usage is not None]
        if len(save) != len(saved) or len(load) != len(loaded) or not save or not load:
            continue
        records.append(
            Record(
                test=context.test,
                family=case.family,
                case=case.id,
                save_backend=context.save_backend,
                load_backend=context.load_backend,
                device=context.device,
                save_world_size=saved[0].world_size,
                load_world_size=loaded[0].world_size,
                num_tensors=len(case.tensors),
                num_objects=len(case.objects),
                state_bytes=sum(leaf.num_bytes for leaf in case.tensors),
                stored_bytes=max((seen.bytes_on_storage or 0 for seen in saved), default=0),
                save_s=max(usage.seconds for usage in save),
                load_s=max(usage.seconds for usage in load),
                save_peak_bytes=max(usage.peak_bytes for usage in save),
                load_peak_bytes=max(usage.peak_bytes for usage in load),
                save_device_peak_bytes=max(usage.device_peak_bytes for usage in save),
                load_device_peak_bytes=max(usage.device_peak_bytes for usage in load),
                verdict=context.verdict,
            )
        )
    return records


def as_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Returns a frame with one row per record and the columns of :class:`Record`, also where there are no rows."""
    columns = [field.name for field in dataclasses.fields(Record)]
    return pd.DataFrame([dataclasses.asdict(record) for record in records], columns=columns)


def check_writable(folder: Path) -> None:
    """Makes the results folder if need be and checks that files can be written there.

    Raises:
        UsageError: they cannot.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"Expected a results folder that can be written but got --results={folder}: {error.strerror}. "
            "Give another folder."
        ) from error


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Writes ``frame`` as Parquet, whole or not at all: a reader never sees a half-written file."""
    frame = frame.assign(schema_version=SCHEMA_VERSION)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        frame.to_parquet(temporary, index=False)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
