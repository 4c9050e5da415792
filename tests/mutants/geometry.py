"""Mutants that read shards from the wrong place, or put them there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import Shard

from dcpbench import Case
from dcpbench.case import Placement
from dcpbench.geometry import Box
from tests.mutants.bank import (
    Dense,
    LoadPlanner,
    Reader,
    any_key,
    any_tensor,
    breaks,
    rank,
    world_size,
)


def _is_strided(case: Case) -> bool:
    leaves = [leaf for layout in case.layouts for leaf in layout.leaves]
    return any(placement.split_factor > 1 for leaf in leaves for placement in leaf.placements or ())


def _is_uneven(case: Case) -> bool:
    """Reads as: some tensor is cut into chunks of different length along dim 0, by one mesh axis."""
    layout = case.layouts[0]
    cut = (
        leaf.shape[0]
        for leaf, how in zip(case.tensors, layout.leaves, strict=True)
        if how.placements == (Placement(0),)
    )
    return any(size % len(layout.mesh.ranks) for size in cut)


def any_part(is_meant: Callable[[Box, tuple[int, ...]], Any]) -> Callable[[Case], bool]:
    """Returns a predicate over cases: some part that is read of a saved chunk, with what the rank holds, is meant.

    A part's offsets are those within the chunk; there are none of a tensor of no dims.
    """

    def boxes(case: Case, number: int, layout: int) -> Iterator[tuple[Box, tuple[int, ...]]]:
        for number_of_rank in range(case.layouts[layout].world_size):
            region = case.layouts[layout].region(number, case.tensors[number].shape, number_of_rank)
            yield from ((box, region.shape) for box in (region.boxes() if region and region.shape else ()))

    def parts(case: Case) -> Iterator[tuple[Box, tuple[int, ...]]]:
        for number in range(len(case.tensors)):
            for wanted, shape in boxes(case, number, -1):
                for chunk, _ in boxes(case, number, 0):
                    if (both := wanted.intersect(chunk)) is not None:
                        within = (at - start for at, start in zip(both.offsets, chunk.offsets, strict=True))
                        yield Box(tuple(within), both.sizes), shape

    return lambda case: any(is_meant(part, shape) for part, shape in parts(case))


def _moved(item: ReadItem, dim: int, by: int) -> ReadItem:
    offsets = list(item.storage_offsets)
    offsets[dim] += by
    return dataclasses.replace(item, storage_offsets=torch.Size(offsets))


@breaks("R101", on=any_part(lambda part, _: part.offsets[0] > 0))
class shifted_reader(Reader):
    """Reads a part that starts within a saved chunk from one row too early."""

    def bend(self, item: ReadItem) -> ReadItem:
        return _moved(item, 0, -1) if item.storage_offsets and item.storage_offsets[0] else item


@breaks("R101", on=any_part(lambda part, _: len(part.sizes) > 2 and part.offsets[-1] > 0))
class shifted_in_last_dim(Reader):
    """Reads a part that starts within a saved chunk along its last dim, of three or more, from one column too early."""

    def bend(self, item: ReadItem) -> ReadItem:
        return _moved(item, -1, -1) if len(item.storage_offsets) > 2 and item.storage_offsets[-1] else item


@breaks(
    "R101", on=lambda case: case.layouts[-1].world_size == 3 and any_part(lambda part, _: part.offsets[0] > 0)(case)
)
class shifted_on_three_ranks(Reader):
    """Reads one row too early, on three ranks only."""

    def bend(self, item: ReadItem) -> ReadItem:
        is_bent = world_size() == 3 and item.storage_offsets and item.storage_offsets[0]
        return _moved(item, 0, -1) if is_bent else item


@breaks("R107", on=lambda case: case.layouts[0].world_size > 2 > case.layouts[-1].world_size)
class lazy_reader(Reader):
    """Reads at most two saved chunks for what a rank holds of a tensor."""

    def prepare_local_plan(self, plan: Any) -> Any:
        taken: dict[str, int] = {}
        kept = []
        for item in plan.items:
            taken[item.dest_index.fqn] = taken.get(item.dest_index.fqn, 0) + 1
            kept += [item] if taken[item.dest_index.fqn] <= 2 else []
        return dataclasses.replace(plan, items=kept)


@breaks("R107", "R101", on=_is_uneven)
class forgets_uneven_chunk(Reader):
    """Leaves out what comes from a saved chunk that is shorter than the first one of its tensor."""

    def set_up_storage_reader(self, metadata: Any, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self.entries = metadata.state_dict_metadata

    def bend(self, item: ReadItem) -> ReadItem | None:
        chunks = self.entries[item.storage_index.fqn].chunks
        (size,) = (
            chunk.sizes for chunk in chunks if chunk.offsets == item.storage_index.offset and 0 not in chunk.sizes
        )
        return None if size and size[0] < chunks[0].sizes[0] else item


@breaks("R107", on=any_part(lambda part, whole: part.numel == 1 < whole[0]))
class forgets_last_element(Reader):
    """Leaves out a part of one single element, where a tensor has more."""

    def bend(self, item: ReadItem) -> ReadItem | None:
        is_single = item.lengths and item.lengths.numel() == 1 and any(item.dest_offsets)
        return None if is_single else item


@breaks("R101", on=any_part(lambda part, whole: len(part.sizes) == 2 and part.sizes[1] < whole[1]))
class contiguous_range_reader(LoadPlanner):
    """Takes the rows of a part for one contiguous range: right for cuts along dim 0, wrong along others."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = super().resolve_tensor(read_item)
        return torch.empty_like(target, memory_format=torch.contiguous_format)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        whole = self.lookup_tensor(read_item.dest_index).detach()
        if tensor.shape[1:] == whole.shape[1:] or not whole.is_contiguous():
            super().resolve_tensor(read_item).detach().copy_(tensor)
            return
        start = sum(o * s for o, s in zip(read_item.dest_offsets, whole.stride(), strict=True))
        length = min(tensor.numel(), whole.numel() - start)
        whole.view(-1)[start : start + length].copy_(tensor.reshape(-1)[:length])


@breaks("R107", on=lambda case: any(leaf.memory != "contiguous" for leaf in case.layouts[-1].leaves))
class loses_transposed_destination(LoadPlanner):
    """Reads into a contiguous copy of a destination that is not contiguous, and does not copy it back."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(read_item).contiguous()


@breaks("R107", "R501", "R101")
class reads_own_file(Reader):
    """Reads only what a rank of its own number wrote, where there is such a file."""

    def bend(self, item: ReadItem) -> ReadItem | None:
        path = self.storage_data[item.storage_index].relative_path
        has_own = any(info.relative_path.startswith(f"__{rank()}_") for info in self.storage_data.values())
        return item if path.startswith(f"__{rank()}_") or not has_own else None


@breaks("R101", "R501", "R401", suite="round_trips", on=any_key(lambda fqn: not fqn.isascii()))
class ascii_names(Dense):
    """Keeps a leaf under the ASCII letters and digits of its key: two keys may become one."""

    def key(self, path: tuple[Any, ...]) -> str:
        return ".".join(re.sub(r"[^0-9A-Za-z_]", "", str(part)) for part in path)


@breaks("R101", "R401", "R104", "R501", suite="round_trips")
class by_position(Dense):
    """Takes the leaves of source and destination for each other in the order in which they stand."""

    def leaves(self, value: Any, path: tuple[Any, ...] = ()) -> Any:
        found = list(super().leaves(value, path))
        if not path:
            self.order = {at: number for number, (at, _) in enumerate(found)}
        return iter(found)

    def key(self, path: tuple[Any, ...]) -> int:
        return self.order[path]


@breaks("R101", "R501", "R502", suite="resharding", on=_is_strided)
class ignores_split_factor(Dense):
    """Takes a strided shard for a plain one."""

    def cut(self, indices: Any, placement: Any, num_parts: int, part: int) -> Any:
        return super().cut(indices, Shard(placement.dim), num_parts, part)


@breaks("R501", "R101", suite="round_trips")
class splits_like_numpy(Dense):
    """Cuts dims as numpy.array_split does: the first parts one longer, in place of the last one shorter."""

    def parts(self, indices: Any, num_parts: int) -> list[Any]:
        return np.array_split(indices, num_parts)


@breaks("R101", suite="resharding", on=any_tensor(lambda leaf: leaf.shape and leaf.shape[0] > 9))
class rounds_up_to_alignment(Dense):
    """Starts what a rank reads at a multiple of four rows, as a reader of aligned blocks does."""

    def put(self, state_dict: Any, path: tuple[Any, ...], value: Any, held: Any) -> None:
        places = self.places(value) if isinstance(value, torch.Tensor) else None
        if places and len(places[0]) and places[0][0] > 8:
            aligned = held[1].copy()
            start = places[0][0] // 4 * 4
            aligned[places[0]] = held[1][places[0] - places[0][0] + start]
            held = (held[0], aligned)
        super().put(state_dict, path, value, held)


@breaks("R501", suite="without_process_group")
class needs_process_group(Reader):
    """Asks for its rank although there may be no process group."""

    def prepare_local_plan(self, plan: Any) -> Any:
        torch.distributed.get_rank()
        return plan


@breaks("R101", "R103", "R201", suite="round_trips", on=any_tensor(lambda leaf: leaf.path[-1].value == 11))
class sorts_list_items_as_text(Dense):
    """Takes list items back in the order of their numbers as text: 1, 10, 2."""

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        super().load(state_dict, checkpoint_id)
        for value in state_dict.values():
            if isinstance(value, list):
                value[:] = [value[int(number)] for number in sorted(map(str, range(len(value))))]
