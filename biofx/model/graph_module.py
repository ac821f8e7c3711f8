"""The rewritten model: a ``torch.fx.GraphModule`` that keeps the structure and the class of the original."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer

from biofx.errors import CaptureError, CheckpointError, InputError
from biofx.graph.branches import BranchCodeGen, has_branches, hoist_shared_nodes
from biofx.graph.contexts import restoring_modes
from biofx.graph.graph_functions import call_own_forward, call_with_parameters
from biofx.model.attribute_guards import GUARDS
from biofx.model.copies import copy_graph, pack, prepared, unpack
from biofx.model.inlined_modules import INLINED, SAME
from biofx.model.late_changes import follow_late_changes, following_changes, remember_modules
from biofx.model.observed_runs import ObservedRuns
from biofx.model.rollback import has_places_for, unchanged_on_failure
from biofx.model.shown_model import drawn
from biofx.operators.dispatch import outside_graphs
from biofx.plasticity.agreement import is_parallelized
from biofx.plasticity.model_states import apply_rule, expanded_weights, exposed_rules
from biofx.plasticity.ranks import after_forward, before_forward, is_fully_sharded, shard_own_state
from biofx.plasticity.sub_weights import share_out_plain
from biofx.torch_private import codegen_of, set_tracer

_OWN_TO_GRAPH_MODULES = frozenset({"_graph", "_code", "_tracer_cls", "_tracer_extras"})


class BioGraphModule(GraphModule):
    """A graph module that keeps what ``torch.fx.GraphModule`` drops.

    It is also an instance of the model's class, with its methods and properties. The whole module tree keeps
    its order, whether the graph uses it or not, and so do state-dict keys, parameters, persistence of
    buffers, the model's own hooks and attributes. Copies and pickles hold the graph itself instead of its
    code, so nothing is traced a second time and all nodes keep their names.
    """

    _places: ClassVar[Any] = None
    _snapshot: ClassVar[Any] = None
    _latest: ClassVar[Any] = None
    _shown: ClassVar[Any] = None

    if TYPE_CHECKING:  # torch.jit.script reads class annotations, and not these
        region_paths: tuple[str, ...]
        """Paths of the modules with graphs of their own, empty if the model is one graph."""
        graph_breaks: Mapping[str, str]
        """Paths of the modules that keep their eager forward in Python, and why."""
        read_by_python: Mapping[str, str]
        """Paths of regions whose weights Python may use besides, and why."""
        parameters_read: Mapping[str, tuple[str, ...]]
        """The names of the parameters that eager forwards are given as expressions, by their paths."""
        observed_runs: ObservedRuns
        """Runs that say who feeds whom where Python decides."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a graph module, or with the arguments of the model's class an instance of that class."""
        origin = getattr(cls, "_user_class", None)
        if origin is None or not (args or kwargs) or any(isinstance(given, Graph) for given in args):
            return super().__new__(cls, *args, **kwargs)
        return origin(*args, **kwargs)

    @classmethod
    def from_root(cls, root: nn.Module, graph: Graph, class_name: str | None = None) -> BioGraphModule:
        """Return a graph module that holds everything that ``root`` holds, not copied."""
        made = _empty(class_name or type(root).__name__, user_class(root))
        kept = {name: value for name, value in vars(root).items() if name not in _OWN_TO_GRAPH_MODULES}
        vars(made).update(kept)
        _uncover(made)
        set_tracer(graph, Tracer)  # plain pickling traces again with it
        made.graph = graph
        return made

    @classmethod
    def copy_of(cls, graph_module: GraphModule, memo: dict[int, Any] | None = None) -> BioGraphModule:
        """Return an independent copy of any graph module.

        Raises:
            InputError: the module holds something that cannot be copied.
        """
        memo = {} if memo is None else memo
        own = {name: value for name, value in vars(graph_module).items() if name != "_graph"}
        root = nn.Module()
        memo[id(graph_module)] = made = _empty(type(graph_module).__name__, user_class(graph_module))
        try:
            vars(root).update(copy.deepcopy(own, prepared(graph_module, memo)))
        except RuntimeError as error:
            raise InputError(f"expected a model that can be copied: {error}") from error
        vars(made).update(
            {name: value for name, value in vars(root).items() if name not in _OWN_TO_GRAPH_MODULES}
        )
        _uncover(made)
        made.graph = copy_graph(graph_module.graph)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> BioGraphModule:
        return BioGraphModule.copy_of(self, memo)

    def __copy__(self) -> BioGraphModule:
        return BioGraphModule.from_root(self, copy_graph(self.graph), type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        # the content is pickled as state, since it may refer to the object
        state = {name: value for name, value in vars(self).items() if name not in _OWN_TO_GRAPH_MODULES}
        origin = user_class(self)
        named = None if origin is None else (origin.__module__, origin.__qualname__)
        return _unpickled, (type(self).__name__, named), (state, pack(self.graph))

    def __setstate__(self, packed: tuple[dict[str, Any], tuple[Any, ...]]) -> None:
        state, graph = packed
        vars(self).update(state)
        _uncover(self)
        self.graph = unpack(graph)
        if self.keeps_forward and user_class(self) is None:
            raise CaptureError(
                f"a {type(self).__name__} that runs its eager forward was saved, whose class cannot be "
                "imported here; make the class importable under the name it had"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its hooks, after gathering what FSDP2 has sharded."""
        if is_fully_sharded(self):  # FSDP2's hooks are on the modules
            outside_graphs(before_forward)(self)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                outside_graphs(after_forward)()
        if is_parallelized(self):
            outside_graphs(shard_own_state)(self)
        return super().__call__(*args, **kwargs)

    def _repr_svg_(self) -> str | None:
        return drawn(self)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state as any module does, but change nothing if that fails.

        Raises:
            CheckpointError: it is a state of the original, which has half as many units as a model after
                ``expand-units``.
        """
        for path, weight in expanded_weights(self).items():
            given = state_dict.get(path)
            if given is not None and given.shape != weight.shape:
                raise CheckpointError(
                    f"{path!r}: expected shape {tuple(weight.shape)}, in which each unit is an excitatory "
                    f"and an inhibitory one (dales_method='expand'), found {tuple(given.shape)}; load a "
                    "checkpoint of the original into the original, and transform that"
                )
        with nullcontext() if has_places_for(self, state_dict) else unchanged_on_failure(self):
            return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        share_out_plain(self, state_dict, prefix)  # children are given parts of the same dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not name.startswith("_") and name in exposed_rules(self):
                return functools.partial(apply_rule, self, name)
            raise

    def recompile(self) -> Any:
        """Generate the code of the graph, and run it as the forward unless it keeps its eager forward."""
        if isinstance(self._graph, _NotYet):
            return None
        if has_branches(self._graph):
            hoist_shared_nodes(self._graph)
            if not isinstance(codegen_of(self._graph), BranchCodeGen):
                self._graph.set_codegen(BranchCodeGen())
        code = super().recompile()
        kind: Any = type(self)
        for base in kind.__mro__[1:]:  # of a parametrized graph module, which torch.fx would let call itself
            if "_wrapped_call" in vars(base):
                kind._wrapped_call = vars(base)["_wrapped_call"]
                break
        type(self)._places, type(self)._snapshot = remember_modules(self), None
        type(self)._shown = None
        origin = user_class(self)
        if origin is not None and self.keeps_forward:
            own: Any = origin.forward
            type(self).forward = own
        else:
            restoring = restoring_modes(self.graph, type(self).forward)
            guarded: Any = following_changes(restoring, self, become_graph_module)
            if origin is not None and self.runs_eager_forward:  # trainers ask for the names of arguments
                guarded.__signature__ = inspect.signature(origin.forward)
            type(self).forward = type(self)._latest = guarded
        return code

    @property
    def keeps_forward(self) -> bool:
        """Whether the module runs the forward of its class, with graphs in the modules that it calls."""
        calls = self.graph.find_nodes(op="call_function", target=call_own_forward)
        return any(isinstance(call.args[1], Node) for call in calls)  # with all arguments in one node

    @property
    def runs_eager_forward(self) -> bool:
        """Whether the module runs the forward of its class, with or without expressions for parameters."""
        return self.keeps_forward or bool(
            self.graph.find_nodes(op="call_function", target=call_with_parameters)
        )

    @property
    def own_module(self) -> BioGraphModule:
        """The module itself, for nodes of its graph that assign to its buffers."""
        return self

    @property
    def own_forward(self) -> Callable[..., Any]:
        """The forward of the module's class, not of the graph.

        Raises:
            CaptureError: the class is not known.
        """
        origin: Any = user_class(self)
        if origin is None:
            raise CaptureError(f"{type(self).__name__} has no forward but its graph's")
        return functools.partial(origin.forward, self)


# torch.jit.script compiles the properties of a module, and can read none of these
BioGraphModule.__jit_unused_properties__ = [
    *GraphModule.__jit_unused_properties__,
    *(name for name, member in vars(BioGraphModule).items() if isinstance(member, property)),
]


def become_graph_module(module: nn.Module, graph: Graph) -> BioGraphModule:
    """Turn a module into a graph module in place, so that all references to it see the graph.

    Raises:
        CaptureError: its class does not allow that.
    """
    if not isinstance(module, BioGraphModule):
        if (reason := why_not_a_graph_module(module)) is not None:
            raise CaptureError(f"{type(module).__name__} cannot become a graph module: {reason}")
        name = type(module).__name__
        attributes = vars(_empty(name, None))
        graph_class = _class_of_graph_modules(name, type(module))
        try:
            module.__class__ = graph_class
        except TypeError as error:
            raise CaptureError(f"{name} cannot become a graph module: {error}") from error
        for key, value in attributes.items():
            vars(module).setdefault(key, value)
        _uncover(module)
    made: Any = module
    set_tracer(graph, Tracer)
    made.graph = graph
    if made.keeps_forward and user_class(made) is None:
        raise CaptureError(f"{type(module).__name__} cannot be subclassed, and its forward cannot be traced")
    return made  # type: ignore[no-any-return]


def taken_name(module: nn.Module, taken: Collection[str]) -> str | None:
    """Return the first of some names under which a module holds anything, None if it holds nothing."""
    held = (module._modules, module._parameters, module._buffers, vars(module))
    return next((name for entries in held for name in entries if name in taken), None)


def why_not_a_graph_module(module: nn.Module) -> str | None:
    """Return why a module cannot be a graph module, which uses a name of something in it; None if it can."""
    if isinstance(module, GraphModule):
        return None
    found = taken_name(module, NAMES_OF_GRAPH_MODULES)
    return None if found is None else f"it has something named {found!r}, a name that graph modules use"


def _uncover(made: nn.Module) -> None:
    """Remove plain attributes of graph modules that would hide a submodule, parameter or buffer."""
    for name in _PLAIN_ATTRIBUTES:
        if name in made._modules or name in made._parameters or name in made._buffers:
            vars(made).pop(name, None)


def follow_changes_within(model: nn.Module) -> None:
    """Check, in every graph of a model, whether modules were changed, as a call of the model does.

    Raises:
        CaptureError: a module was changed in a way that the graph does not follow.
        InputError: a module has a hook that would never run.
    """
    for module in list(model.modules()):
        if isinstance(module, BioGraphModule) and not module.keeps_forward:
            follow_late_changes(module, become_graph_module)


def user_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that a module had before it became a graph module, None if unknown."""
    if not isinstance(module, GraphModule):
        return type(module)
    return getattr(type(module), "_user_class", None)


def _class_of_graph_modules(name: str, origin: type[nn.Module] | None) -> type[BioGraphModule]:
    """Return a class for one graph module only, as in torch.fx."""
    known = origin is not None and origin is not nn.Module
    bases = (BioGraphModule, origin) if known else (BioGraphModule,)
    body: dict[str, Any] = {"_user_class": origin if known else None, "__module__": BioGraphModule.__module__}
    if origin is not None and known and not origin.__module__.startswith("torch."):
        # libraries register classes by their full names; tracers tell torch's own modules by theirs
        body |= {"__module__": origin.__module__, "__qualname__": origin.__qualname__}
    try:
        made: Any = types.new_class(name, bases, {}, lambda namespace: namespace.update(body))
    except TypeError:  # the class does not allow it
        if not known:
            raise
        return _class_of_graph_modules(name, None)
    return made  # type: ignore[no-any-return]


_PLAIN_ATTRIBUTES = ("meta", "shape_env")
"""Attributes of a graph module that torch.fx may set, and that may be missing."""
NAMES_OF_GRAPH_MODULES = frozenset(
    {
        *(set(dir(BioGraphModule)) - set(dir(nn.Module))),
        *("_graph", "_code", "_tracer_cls", "_tracer_extras", "_prologue_start", "_lineno_map"),
        *("_create_node_hooks", "_erase_node_hooks", "_replace_hooks", "_deepcopy_hooks"),
        *(INLINED, SAME, GUARDS),
    }
)
"""Names that graph modules use, so that a module with one of them cannot become one."""
NAMES_OF_MODELS = frozenset(
    {
        *("region_paths", "graph_breaks", "read_by_python", "parameters_read", "observed_runs"),
        "transform_record",
    }
)
"""Names of attributes that describe a rewritten model."""


class _NotYet(Graph):
    """The graph of a module that gets its own later; it has no code."""


def _empty(class_name: str, origin: type[nn.Module] | None) -> BioGraphModule:
    made: BioGraphModule = BioGraphModule(nn.Module(), _NotYet(), class_name)
    if origin is not None:
        # without calling the class, which would run the user's __init__
        made.__class__ = _class_of_graph_modules(class_name, origin)
    return made


def _unpickled(class_name: str, origin: tuple[str, str] | None) -> BioGraphModule:
    return _empty(class_name, None if origin is None else _imported(*origin))


def _imported(module: str, name: str) -> type[nn.Module] | None:
    """Return a class by its name; None if there is none, since a graph runs without it."""
    try:
        __import__(module)
        found: Any = sys.modules[module]
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, KeyError):
        return None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None
