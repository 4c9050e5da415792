"""Strategies for what is done one thing after another: chains of layouts, and any sequence of steps.

A sequence is drawn against a model of what checkpoints there are. They shrink towards few steps.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from dcpbench.case import Case, Layout, LeafLayout, Mesh, ObjectLeaf, Options, Part, Step, TensorLeaf
from dcpbench.strategies.contents import contents
from dcpbench.strategies.layouts import layouts, world_sizes
from dcpbench.strategies.scope import narrowed, scope

__all__ = ["chains", "conversions", "sequences", "stateful_round_trips"]

_seeds = st.integers(0, 2**16)
_NAMES = ("a", "b", "c")


@st.composite
def chains(draw: st.DrawFn) -> Case:
    """Draws a case that saves, loads under another layout, saves what was loaded, and so on; the last load is on any.

    Whatever the path of layouts, the bytes at its end are those at its beginning; N to M and back to N is one path.
    """
    tensors, objects = draw(contents())
    num_layouts = draw(st.integers(2, 3), label="layouts")
    found = tuple(
        draw(layouts(tensors, draw(world_sizes(scope.max_world_size), label="ranks")), label="layout")
        for _ in range(num_layouts)
    )
    path = draw(st.lists(st.integers(0, num_layouts - 1), min_size=1, max_size=3), label="path")
    steps = [Step("save", 0, "hop-0")]
    for hop, layout in enumerate(path):
        steps += [Step("load", layout, f"hop-{hop}"), Step("save", layout, f"hop-{hop + 1}", resaves=True)]
    steps.append(Step("load", 0, f"hop-{len(path)}"))
    return narrowed(Case("chain", draw(_seeds), tensors, objects, found, tuple(steps)))


@st.composite
def conversions(draw: st.DrawFn) -> Case:
    """Draws a case whose checkpoint becomes a torch.save file and a checkpoint again, before it is loaded.

    The first checkpoint may come from such a file itself. Where it does not, keys are text: a checkpoint's metadata
    knows no others.
    """
    tensors, objects = draw(contents())
    is_imported = draw(st.booleans(), label="from a file")
    if not is_imported:
        tensors = tuple(replace(leaf, path=_as_text(leaf.path)) for leaf in tensors)
        objects = tuple(replace(leaf, path=_as_text(leaf.path)) for leaf in objects)
    pair = tuple(draw(layouts(tensors, draw(world_sizes(scope.max_world_size), label="ranks"))) for _ in range(2))
    alone = Layout(1, Mesh(("dp",), (1,), (0,)), tuple(LeafLayout() for _ in tensors), distributed=False)
    first = Step("import", 2) if is_imported else Step("save", 0)
    steps = (first, Step("convert", 2, target="converted"), Step("load", 1, "converted"))
    return Case("convert", draw(_seeds), tensors, objects, (*pair, alone), steps)


def _as_text(path: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(Part("key", str(part.value)) if part.kind == "key" else part for part in path)


@st.composite
def stateful_round_trips(draw: st.DrawFn) -> Case:
    """Draws a case whose dicts at the top are held by Stateful objects, which give and take them."""
    tensors, objects = draw(contents())
    pair = tuple(draw(layouts(tensors, draw(world_sizes(scope.max_world_size), label="ranks"))) for _ in range(2))
    leaves: list[TensorLeaf | ObjectLeaf] = [*tensors, *objects]
    nested = [leaf.path for leaf in leaves if len(leaf.path) > 1 and leaf.path[1].kind == "key"]
    statefuls = tuple(dict.fromkeys(str(path[0].value) for path in nested))
    steps = (Step("save", 0), Step("load", 1))
    return narrowed(Case("stateful", draw(_seeds), tensors, objects, pair, steps, Options(statefuls=statefuls)))


@st.composite
def sequences(draw: st.DrawFn) -> Case:
    """Draws a case of several steps of any kind.

    They are: save, save over, save in the background, load, save what was loaded, delete, copy, rename, a save that
    fails, a load of what is gone.
    """
    tensors, objects = draw(contents())
    sizes = draw(st.sampled_from(["one size", "one size", "two sizes"]), label="world sizes")
    world = draw(world_sizes(scope.max_world_size), label="ranks")
    other = world if sizes == "one size" else draw(world_sizes(scope.max_world_size), label="other ranks")
    found = tuple(draw(layouts(tensors, size), label="layout") for size in (world, other))
    # plans are remembered by a process, whose world does not change its size
    is_caching = world == other and draw(st.booleans(), label="caching")
    options = Options(reuse=draw(st.booleans(), label="reuse"), caches_plans=is_caching)
    maker = _Maker(draw, len(tensors) + len(objects), bool(objects), len(tensors))
    for _ in range(draw(st.integers(2, 7), label="steps")):
        maker.add()
    if maker.held and maker.steps[-1].action != "load":
        maker.add("load")
    return narrowed(Case("sequence", draw(_seeds), tensors, objects, found, tuple(maker.steps), options))


_NEEDED = {
    "async_save": "async",
    "save over": "overwrite",
    **dict.fromkeys(("copy", "rename", "delete"), "local-folders"),
}
"""The capability that a kind of step is about."""


class _Maker:
    """Makes steps, and knows which checkpoints there are.

    Attributes:
        held: the version of each checkpoint.
        gone: names under which there was a checkpoint.
    """

    def __init__(self, draw: st.DrawFn, num_leaves: int, has_objects: bool, num_tensors: int) -> None:
        self.draw = draw
        self.num_leaves, self.has_objects, self.num_tensors = num_leaves, has_objects, num_tensors
        self.steps: list[Step] = []
        self.held: dict[str, int] = {}
        self.gone: list[str] = []
        self.version = 0

    def add(self, kind: str = "") -> None:
        kinds = ["save", "save", "async_save"]
        if self.held:
            kinds += ["load", "load", "load", "save over", "rename", "rename", "copy", "delete", *self._resave()]
        kinds = [kind for kind in kinds if scope.has(_NEEDED.get(kind, ""))]
        if self.gone:
            kinds.append("load of what is gone")
        if self.has_objects:
            kinds.append("bad save")
        kind = kind or self.draw(st.sampled_from(kinds), label="step")
        layout = self.draw(st.integers(0, 1), label="layout")
        match kind:
            case "save" | "async_save":
                self._save(kind, layout, self._name(self._free(_NAMES)))
            case "save over":
                self._save("save", layout, self._name(tuple(self.held)))
            case "load":
                self.steps.append(Step("load", layout, self._name(tuple(self.held))))
            case "resave":
                loaded, name = self.steps[-1], self._name(self._free(_NAMES))
                self.steps.append(Step("save", loaded.layout, name, self.held[loaded.checkpoint], resaves=True))
                self._put(name, self.held[loaded.checkpoint])
            case "load of what is gone":
                self.steps.append(Step("load", layout, self._name(tuple(self.gone)), misuse="no-checkpoint"))
            case "bad save":
                # under a name of its own: what a failed save leaves of an older checkpoint is another matter
                number = self.draw(st.integers(self.num_tensors, self.num_leaves - 1), label="misused leaf")
                self.steps.append(Step("save", layout, "bad", misuse="unsavable", misused=number))
            case _:
                self._arrange(kind, layout)

    def _free(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Returns those of ``names`` that a save may take; where no save may be over another, the unused ones."""
        if scope.has("overwrite"):
            return names
        return tuple(name for name in names if name not in self.held) or (f"more-{self.version}",)

    def _save(self, action: str, layout: int, name: str) -> None:
        is_over = name in self.held
        step = Step("save", layout, name, self.version, may_refuse=is_over)
        self.steps.append(replace(step, action="async_save") if action == "async_save" else step)
        self._put(name, self.version)
        self.version += 1

    def _arrange(self, kind: str, layout: int) -> None:
        name = self._name(tuple(self.held))
        target = "" if kind == "delete" else self._name(tuple(n for n in _NAMES if n != name))
        step = Step("save", layout, name, target=target)
        match kind:
            case "copy":
                self.steps.append(replace(step, action="copy"))
            case "rename":
                self.steps.append(replace(step, action="rename"))
            case "delete":
                self.steps.append(replace(step, action="delete"))
        if target:
            self._put(target, self.held[name])
        if kind != "copy":
            del self.held[name]
            self.gone.append(name)
        if target and self.draw(st.booleans(), label="loaded at once"):
            self.steps.append(Step("load", step.layout, target))

    def _put(self, name: str, version: int) -> None:
        self.held[name] = version
        if name in self.gone:
            self.gone.remove(name)

    def _resave(self) -> list[str]:
        last = self.steps[-1]
        return ["resave"] if last.action == "load" and last.misuse == "none" else []

    def _name(self, names: tuple[str, ...]) -> str:
        return self.draw(st.sampled_from(names), label="checkpoint")
