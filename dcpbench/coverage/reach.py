"""Which generated cases reach an argument of DCP, and why none reaches the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from dcpbench.case import Case
from dcpbench.case_files import AnyCase
from dcpbench.models.case import TrainingCase
from dcpbench.protocol_case import ProtocolCase

__all__ = ["FEATURES", "REACHED", "REASONS"]

Reach = Callable[[AnyCase], Any]


def _plain(is_reached: Callable[[Case], Any]) -> Reach:
    """Returns a predicate over all cases: a case of state dicts is meant."""
    return lambda case: isinstance(case, Case) and is_reached(case)


def _training(is_reached: Callable[[TrainingCase], Any]) -> Reach:
    """Returns a predicate over all cases: a case of models is meant."""
    return lambda case: isinstance(case, TrainingCase) and is_reached(case)


def _does(*actions: str) -> Reach:
    return lambda case: any(step.action in actions for step in case.steps)


def _saves_with(name: str, value: Any = True) -> Reach:
    return _plain(lambda case: getattr(case.options, name) == value and any(step.saves for step in case.steps))


def _acts_with(action: str, is_reached: Callable[[Case], Any]) -> Reach:
    """Returns a predicate: a step of this action is taken in a case of state dicts that is meant."""
    return _plain(lambda case: is_reached(case) and any(step.action == action for step in case.steps))


def _in_group(action: str) -> Reach:
    return _plain(lambda case: any(s.action == action and case.layouts[s.layout].members for s in case.steps))


def _without_dist(action: str) -> Reach:
    return _plain(
        lambda case: (
            case.options.no_dist
            and any(s.action == action and case.layouts[s.layout].world_size == 1 for s in case.steps)
        )
    )


def _set_or_load(case: TrainingCase) -> bool:
    return any(step.restores or step.action == "load" for step in case.steps)


def _option(name: str, value: Any) -> Reach:
    return _training(lambda case: getattr(case.options, name) == value)


def _form(*forms: str) -> Reach:
    return _training(lambda case: case.form in forms)


_SAVES, _LOADS, _ASYNC, _CONVERTS = _does("save"), _does("load"), _does("async_save"), _does("convert")
_ALL_FORMS = ("both", "apart", "stateful", "model", "optimizer")

REACHED: Final[dict[str, Reach]] = {
    "save.state_dict": _SAVES,
    "save.checkpoint_id": _SAVES,
    "save.storage_writer": _SAVES,
    "save.planner": _SAVES,
    "save.process_group": _in_group("save"),
    "save.no_dist": _without_dist("save"),
    "async_save.state_dict": _ASYNC,
    "async_save.checkpoint_id": _ASYNC,
    "async_save.storage_writer": _ASYNC,
    "async_save.planner": _ASYNC,
    "async_save.process_group": _acts_with("async_save", lambda case: sum(s.is_left_open for s in case.steps) > 1),
    "AsyncCheckpointerType.THREAD": _ASYNC,
    "load.state_dict": _LOADS,
    "load.checkpoint_id": _LOADS,
    "load.storage_reader": _LOADS,
    "load.planner": _LOADS,
    "load.process_group": _in_group("load"),
    "load.no_dist": _without_dist("load"),
    "DefaultSavePlanner.flatten_state_dict": _saves_with("is_flattened", False),
    "DefaultSavePlanner.dedup_save_to_lowest_rank": _saves_with("is_deduplicated_low"),
    "DefaultSavePlanner.enable_plan_caching": _saves_with("caches_plans"),
    "DefaultLoadPlanner.flatten_state_dict": _acts_with("load", lambda case: not case.options.is_flattened),
    "DefaultLoadPlanner.allow_partial_load": _plain(lambda case: any(step.lenient for step in case.steps)),
    "FileSystemWriter.path": _SAVES,
    "FileSystemWriter.single_file_per_rank": _saves_with("has_file_per_item"),
    "FileSystemWriter.thread_count": _plain(lambda case: case.options.num_threads > 1),
    "FileSystemReader.path": _LOADS,
    "SerializationFormat.TORCH_SAVE": _SAVES,
    "StateDictOptions.full_state_dict": _option("full_state_dict", True),
    "StateDictOptions.cpu_offload": _option("cpu_offload", True),
    "StateDictOptions.ignore_frozen_params": _option("ignore_frozen_params", True),
    "StateDictOptions.keep_submodule_prefixes": _option("keep_submodule_prefixes", False),
    "StateDictOptions.strict": _option("strict", False),
    "StateDictOptions.broadcast_from_rank0": _option("broadcast_from_rank0", True),
    "StateDictOptions.flatten_optimizer_state_dict": _option("flatten_optimizer_state_dict", True),
    "get_model_state_dict.model": _form("apart", "model"),
    "get_model_state_dict.submodules": _training(
        lambda case: case.options.submodule and case.form in ("apart", "model")
    ),
    "get_model_state_dict.options": _form("apart", "model"),
    "get_optimizer_state_dict.model": _form("apart", "optimizer"),
    "get_optimizer_state_dict.optimizers": _form("apart", "optimizer"),
    "get_optimizer_state_dict.submodules": _training(
        lambda case: case.options.submodule and case.form in ("apart", "optimizer")
    ),
    "get_optimizer_state_dict.options": _form("apart", "optimizer"),
    "get_state_dict.model": _form("both", "stateful"),
    "get_state_dict.optimizers": _form("both", "stateful"),
    "get_state_dict.submodules": _training(lambda case: case.options.submodule and case.form in ("both", "stateful")),
    "get_state_dict.options": _form("both", "stateful"),
    **{
        f"set_model_state_dict.{name}": _training(lambda case: case.form in ("apart", "model") and _set_or_load(case))
        for name in ("model", "model_state_dict", "options")
    },
    **{
        f"set_optimizer_state_dict.{name}": _training(
            lambda case: case.form in ("apart", "optimizer") and _set_or_load(case)
        )
        for name in ("model", "optimizers", "optim_state_dict", "options")
    },
    **{
        f"set_state_dict.{name}": _training(lambda case: case.form in ("both", "stateful") and _set_or_load(case))
        for name in ("model", "optimizers", "model_state_dict", "optim_state_dict", "options")
    },
    "Stateful": lambda case: (
        bool(case.options.statefuls)
        if isinstance(case, Case)
        else isinstance(case, TrainingCase) and case.form == "stateful"
    ),
    "dcp_to_torch_save.dcp_checkpoint_dir": _CONVERTS,
    "dcp_to_torch_save.torch_save_path": _CONVERTS,
    "torch_save_to_dcp.torch_save_path": _does("convert", "import"),
    "torch_save_to_dcp.dcp_checkpoint_dir": _does("convert", "import"),
}
"""What a case must be like to reach an argument with another value than its default, or at all if it has none."""

_FSSPEC = "no built-in backend; every case runs on one that is given by --backend, since a writer and a reader plug in"
_HF = "no built-in backend, since the format holds contiguous tensors only; fixed cases in tests/reference/test_hf_*.py"
_SWITCH = "a switch of speed, not of what is saved; left at its default"
_PROCESS = "costs seconds a save, since it starts a process; fixed cases in tests/reference/test_process_save.py"
_STAGER = "what a stager must keep is asked of async_save as a whole; fixed cases in tests/reference/test_staging.py"
_EXTENSION = "two odd backends write through one; fixed cases in tests/reference/test_extensions.py"
_FORMATS = (
    "part of the two conversions, which reach it from within; fixed cases in tests/reference/test_format_utils.py"
)

REASONS: Final[dict[str, str]] = {
    "save.use_collectives": "without collectives a rank keeps metadata of its own; fixed cases in tests/reference",
    "async_save.use_collectives": "as of save",
    "async_save.no_dist": "one process without a process group saves in the background in tests/reference only",
    "async_save.async_checkpointer_type": "left at its default, a thread; for the other see PROCESS",
    "async_save.async_stager": _STAGER,
    "AsyncCheckpointerType.PROCESS": _PROCESS,
    "DefaultSavePlanner.flatten_sharded_tensors": "ShardedTensor only; fixed cases in tests/reference",
    "DefaultSavePlanner.dedup_replicated_tensors": "deprecated, and without effect",
    "DefaultLoadPlanner.flatten_sharded_tensors": "as of the save planner",
    "FileSystemWriter.sync_files": "shows after a crash only: suites/test_crash.py, in fixed scenarios",
    "FileSystemWriter.per_thread_copy_ahead": f"{_SWITCH}; it matters where tensors lie on a GPU",
    "FileSystemWriter.cache_staged_state_dict": _STAGER,
    "FileSystemWriter.overwrite": "left at its default, which overwrites: suites/test_roundtrip.py asks for that",
    "FileSystemWriter._extensions": _EXTENSION,
    "FileSystemWriter.serialization_format": "left at its default; the other one is the Hugging Face writer's",
    "FileSystemReader._extension_registry": _EXTENSION,
    "SerializationFormat.SAFETENSORS": _HF,
    "StateDictOptions.dsd_fqn_modifiers": "the name of a method that few models have; fixed cases in tests/reference",
    "BroadcastingTorchSaveReader.checkpoint_id": _FORMATS,
    "BroadcastingTorchSaveReader.coordinator_rank": _FORMATS,
    "DynamicMetaLoadPlanner": _FORMATS,
    **{f"FsspecWriter.{name}": _FSSPEC for name in ("path", "single_file_per_rank", "sync_files", "thread_count")},
    **{f"FsspecWriter.{name}": _FSSPEC for name in ("per_thread_copy_ahead", "overwrite", "_extensions")},
    "FsspecWriter.serialization_format": _FSSPEC,
    "FsspecReader.path": _FSSPEC,
    **{f"HuggingFaceStorageWriter.{name}": _HF for name in ("path", "fqn_to_index_mapping", "thread_count")},
    **{f"HuggingFaceStorageWriter.{name}": _HF for name in ("save_distributed", "enable_consolidation")},
    "HuggingFaceStorageWriter.thread_count_consolidation": _HF,
    **{f"HuggingFaceStorageReader.{name}": _HF for name in ("path", "thread_count")},
    **{
        f"QuantizedHuggingFaceStorageReader.{name}": _HF
        for name in ("path", "thread_count", "target_dtype", "block_size")
    },
    **{f"StagingOptions.{name}": _STAGER for name in ("use_pinned_memory", "use_shared_memory", "use_async_staging")},
    "StagingOptions.use_non_blocking_copy": _STAGER,
    "DefaultStager.config": _STAGER,
    "BlockingAsyncStager.cache_staged_state_dict": _STAGER,
    "BlockingAsyncStager.type_check": _STAGER,
    "Extension": _EXTENSION,
    "StreamTransformExtension": _EXTENSION,
    "ZStandard": _EXTENSION,
    "ExtensionRegistry": _EXTENSION,
}
"""Why no generated case reaches an argument."""


def _tensor(is_meant: Callable[[Any], Any]) -> Reach:
    return _plain(lambda case: any(is_meant(leaf) for leaf in case.tensors))


def _placed(is_meant: Callable[[Any, Any], Any]) -> Reach:
    """Returns a predicate: some tensor has placements that, on its mesh, are meant."""
    return _plain(
        lambda case: any(
            leaf.placements is not None and is_meant(leaf.placements, layout.mesh_of(number))
            for layout in case.layouts
            for number, leaf in enumerate(layout.leaves)
        )
    )


def _memory(form: str) -> Reach:
    return _plain(lambda case: any(leaf.memory == form for layout in case.layouts for leaf in layout.leaves))


def _saves_over(case: Case) -> bool:
    names = [step.checkpoint for step in case.steps if step.saves and step.misuse == "none"]
    return len(set(names)) < len(names)


def _parallel(kind: str) -> Reach:
    return _training(lambda case: any(layout.kind == kind for layout in case.layouts))


FEATURES: Final[dict[str, Reach]] = {
    "a tensor of no dims": _tensor(lambda leaf: not leaf.shape),
    "a tensor without elements": _tensor(lambda leaf: 0 in leaf.shape),
    "a tensor of more than 65,536 elements": _tensor(lambda leaf: leaf.num_bytes > 1 << 16),
    "two keys for one tensor": _tensor(lambda leaf: leaf.tied_to is not None),
    "an expanded tensor": _tensor(lambda leaf: leaf.expanded),
    "a parameter": _tensor(lambda leaf: leaf.requires_grad),
    "a view that is transposed": _memory("transposed"),
    "a view with gaps": _memory("sliced"),
    "a conjugated view": _memory("conjugated"),
    "Shard": _placed(lambda how, _: any(p.dim is not None for p in how)),
    "Replicate": _placed(lambda how, _: any(p.dim is None for p in how)),
    "a strided shard": _placed(lambda how, _: any(p.split_factor > 1 for p in how)),
    "a dim cut by two axes": _placed(
        lambda how, _: len([p for p in how if p.dim is not None]) > len({p.dim for p in how if p.dim is not None})
    ),
    "a mesh of two or three axes": _placed(lambda how, _: len(how) > 1),
    "a mesh in another order of ranks": _placed(lambda _, mesh: list(mesh.ranks) != sorted(mesh.ranks)),
    "a mesh of some of the ranks": _plain(
        lambda case: any(len(layout.mesh.ranks) < layout.world_size for layout in case.layouts)
    ),
    "another world size at the load": _plain(lambda case: len({one.world_size for one in case.layouts}) > 1),
    "a load without a process group": lambda case: (
        not isinstance(case, ProtocolCase) and any(not layout.distributed for layout in case.layouts)
    ),
    "keys that differ between ranks": _plain(lambda case: any(layout.holders for layout in case.layouts)),
    "values that differ between ranks": _plain(lambda case: any(leaf.differs for leaf in case.objects)),
    "nested dicts and lists": _plain(lambda case: any(len(leaf.path) > 1 for leaf in case.leaves)),
    "a key that is an int": _plain(
        lambda case: any(p.kind == "key" and isinstance(p.value, int) for leaf in case.leaves for p in leaf.path)
    ),
    "a save over a checkpoint": _plain(_saves_over),
    "writer and reader used again": _plain(lambda case: case.options.reuse),
    "a checkpoint that is copied, renamed or deleted": _does("copy", "rename", "delete"),
    "a load that must be refused": _plain(
        lambda case: any(s.action == "load" and s.misuse != "none" for s in case.steps)
    ),
    "a save that must be refused": _plain(lambda case: any(s.saves and s.misuse != "none" for s in case.steps)),
    **{
        f"models under {kind}": _parallel(kind)
        for kind in ("ddp", "fsdp", "hsdp", "tp", "fsdp_tp", "dp_cp_tp", "hsdp_tp")
    },
}
"""What states, meshes and runs are like, beside the arguments."""
