"""The catalogue of capabilities: what a backend may lack, each by a name and a sentence that defines it.

An *open* capability is there unless the backend declares it absent; a *closed* one is absent unless the backend shows
it (it brings the function, or names the argument in its signature) or declares it. What is absent is not held against a
backend: rules that need it are UNSUPPORTED, as long as all ranks refuse it cleanly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from dcpbench.errors import expected

__all__ = ["CAPABILITIES", "CLOSED", "DTYPE_FAMILIES", "OPEN", "Capability", "as_markdown", "check_names"]


@dataclass(frozen=True, slots=True)
class Capability:
    """What a backend may have or lack.

    Attributes:
        name: two words at most, hyphenated.
        sentence: reads as true of a backend that has it.
        is_open: there unless declared absent.
    """

    name: str
    sentence: str
    is_open: bool = True


DTYPE_FAMILIES: Final[dict[str, tuple[str, ...]]] = {
    "complex-dtypes": ("complex32", "complex64", "complex128"),
    "float8-dtypes": ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    "float4-dtypes": ("float4_e2m1fn_x2",),
    "unsigned-dtypes": ("uint16", "uint32", "uint64"),
}
"""The dtypes of which a backend may lack a whole family."""

_ALL = (
    Capability("objects", "Values that are no tensors are saved and loaded."),
    Capability("resharding", "A load may have another layout, or another number of ranks, than the save."),
    Capability("strided-shards", "A rank may hold several boxes of one tensor, as strided shards are."),
    Capability("partial-loads", "A load may ask for some of the saved leaves only."),
    Capability("scalar-tensors", "Tensors may be 0-d."),
    Capability("empty-tensors", "Tensors may have no elements."),
    *(
        Capability(name, f"Tensors may be of the dtypes {', '.join(dtypes)}.")
        for name, dtypes in DTYPE_FAMILIES.items()
    ),
    Capability("overwrite", "A save may write over the checkpoint that its checkpoint_id names."),
    Capability("several-checkpoints", "A store holds several checkpoints beside each other."),
    Capability("concurrent-readers", "Several processes without a process group may load a checkpoint at once."),
    Capability(
        "local-folders", "A checkpoint is a local folder: its id is any path to it, and it may be moved or copied."
    ),
    Capability("atomic-commit", "A crash in the middle of a save leaves the old checkpoint, or the new one, whole."),
    Capability("durability", "What a save has written outlives a loss of power once the save has returned."),
    Capability("async", "There is an async_save, which returns before the checkpoint is written.", is_open=False),
    Capability("process-groups", "A save or load may be one of some ranks only: process_group=.", is_open=False),
    Capability("lenient-loads", "A load may leave what the checkpoint lacks: allow_partial_load=.", is_open=False),
    Capability("statefuls", "Objects with state_dict() and load_state_dict() are saved and loaded.", is_open=False),
    Capability("conversions", "A checkpoint becomes a torch.save file, and the other way round.", is_open=False),
    Capability("metadata", "What a checkpoint holds can be read as Metadata, chunk by chunk.", is_open=False),
)

CAPABILITIES: Final[dict[str, Capability]] = {one.name: one for one in _ALL}
"""The catalogue, by name."""

OPEN: Final = frozenset(one.name for one in _ALL if one.is_open)
"""What is there unless declared absent."""

CLOSED: Final = frozenset(CAPABILITIES) - OPEN
"""What is absent unless it shows."""


def check_names(names: Iterable[str], where: str) -> None:
    """Checks that ``names`` are names of capabilities.

    Raises:
        UsageError: one is not; the text lists them all.
    """
    for name in names:
        if name not in CAPABILITIES:
            raise expected("a capability", where, name, f"Give one of {', '.join(CAPABILITIES)}.")


def as_markdown() -> Iterator[str]:
    """Yields the lines of the catalogue, for ``docs/rules.md``."""
    yield "## Capabilities"
    yield ""
    yield "What a backend may lack. An *open* one is there unless the backend declares it absent (`absent=`); a"
    yield "*closed* one is absent unless it shows: the backend brings the function, or names the argument."
    yield ""
    yield "| capability | default | what it says |"
    yield "| --- | --- | --- |"
    for one in _ALL:
        yield f"| `{one.name}` | {'open' if one.is_open else 'closed'} | {one.sentence} |"
