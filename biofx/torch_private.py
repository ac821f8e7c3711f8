"""The names of torch that begin with an underscore, and that biofx cannot do without.

Any release of torch may rename them, so no other file imports or reaches one, and each is looked up when
biofx is imported: what is missing is an error that says so, not a failure somewhere in a step. Attributes
that stand on many lines, or that a class of ours overrides, are read where they are needed, and are listed
in :data:`ATTRIBUTES` with the reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from types import ClassMethodDescriptorType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.optim import Optimizer

from biofx.errors import TorchVersionError

TRIED_ON = ("2.13.0", "2.15.0")
"""The releases of torch on which the tests passed."""
_missing: list[str] = []


def _named(path: str) -> Any:
    """Return what is at a dotted path, None if there is no such thing, which is noted."""
    parts = path.split(".")
    found: Any = torch
    try:
        for count, part in enumerate(parts[1:], 2):
            if not hasattr(found, part) and isinstance(found, ModuleType):
                importlib.import_module(".".join(parts[:count]))
            found = getattr(found, part)
    except (ImportError, AttributeError):
        _missing.append(path)
        return None
    return found


# what runs at the moment

functorch_is_active: Callable[[], bool] = _named("torch._C._are_functorch_transforms_active")
"""Whether a transform of ``torch.func`` runs, whose inputs are not batches."""
running_backward: Callable[[], int] = _named("torch._C._current_graph_task_id")
"""The number of the backward that runs, -1 where none does."""
count_of_dispatch_modes: Callable[[], int] = _named("torch._C._len_torch_dispatch_stack")
"""How many modes see each call of an operator."""
count_of_function_modes: Callable[[], int] = _named("torch._C._len_torch_function_stack")
"""How many modes see each call of a function."""
_engine: Any = _named("torch.autograd.Variable._execution_engine")
_saved_tensors_hooks: Any = _named("torch._C._autograd._top_saved_tensors_default_hooks")
_parametrize: Any = _named("torch.nn.utils.parametrize")
_named("torch.nn.utils.parametrize._cache_enabled")


def call_after_backward(function: Callable[[], None]) -> None:
    """Call a function at the end of the backward that runs."""
    _engine.queue_callback(function)


_replicas: Any = nn.parallel.DistributedDataParallel
_named("torch.nn.parallel.DistributedDataParallel._active_ddp_module")
members_of_modules: Any = _named("torch.nn.Module._named_members")
"""The method by which modules walk over what they hold."""


def replicas_in_forward() -> Any:
    """Return the DistributedDataParallel whose forward runs, None where none does."""
    return _replicas._active_ddp_module


def saved_tensors_are_hooked() -> bool:
    """Whether tensors that autograd saves pass through hooks, as those of checkpointing."""
    return _saved_tensors_hooks(True) is not None


def parametrizations_are_cached() -> bool:
    """Whether values of parametrizations are kept, inside of ``torch.nn.utils.parametrize.cached()``."""
    return bool(_parametrize._cache_enabled > 0)


# switches that a graph can hold

set_grad_enabled: Callable[[bool], None] = _named("torch._C._set_grad_enabled")
"""Switches gradients, as a function; ``torch.set_grad_enabled`` is a context, which compilers look into."""
enter_autocast: Callable[..., Any] = _named("torch.amp._enter_autocast")
"""Begins an autocast in a way that the compiler knows outside of a ``with``."""
exit_autocast: Callable[[Any], None] = _named("torch.amp._exit_autocast")
"""Ends what :data:`enter_autocast` has begun."""


def autocast_options(context: Any) -> tuple[Any, ...]:
    """Return the arguments with which a ``torch.autocast`` can be made again."""
    return (context.device, context.fast_dtype, context._enabled, context._cache_enabled)


# who holds memory

_storage_use_count: Callable[[int], int] = _named("torch._C._storage_Use_Count")


def storage_use_count(storage: Any) -> int:
    """Return how many hold the memory of an untyped storage.

    Raises:
        AttributeError, RuntimeError: torch does not say of this one.
    """
    return _storage_use_count(storage._cdata)


def use_count(tensor: Any) -> int:
    """Return how many hold a tensor, outside of Python.

    Raises:
        AttributeError, RuntimeError: torch does not say of this one.
    """
    return int(tensor._use_count())


# kinds of operators and tensors

OpOverload: Any = _named("torch._ops.OpOverload")
"""The class of ``torch.ops.aten.add.Tensor``, which exported programs call."""
HigherOrderOperator: Any = _named("torch._ops.HigherOrderOperator")
"""The class of operators that take functions, of which no node can be made."""
ScriptMethod: Any = _named("torch._C.ScriptMethod")
"""The class of methods of scripted modules."""
_SingleLevelFunction: Any = _named("torch.autograd.function._SingleLevelFunction")
DisableTorchFunction: Any = _named("torch._C.DisableTorchFunction")
"""A context in which no mode and no subclass sees calls of functions."""
nn_operators: Any = _named("torch._C._nn")
"""The namespace of operators that ``torch.nn.functional`` is made from, such as ``gelu``."""
assert_in_graph: Callable[..., None] = _named("torch._assert")
"""``assert`` as a function, so that a plain graph can hold it."""
grouped_product: Callable[..., Tensor] = _named("torch._grouped_mm")
"""The product of a stack of weights, as mixtures of experts compute it."""
standard_gamma: Callable[..., Tensor] = _named("torch._standard_gamma")
"""Samples a gamma distribution from a given generator, which ``torch.distributions`` does not take."""


APPLY_IS_BUILTIN = isinstance(vars(torch.autograd.Function)["apply"], ClassMethodDescriptorType)
"""Whether a kept ``Function.apply`` no longer looks for another ``apply``; so since torch 2.15."""
CLASS_THAT_APPLIES: Any = torch.autograd.Function if APPLY_IS_BUILTIN else _SingleLevelFunction
"""The class with the ``apply`` in which those of all autograd functions end; capturing replaces it there."""
READ_BY_APPLY = "_backward_cls"
"""An attribute that ``apply`` reads of an autograd function before anything else happens."""
if not hasattr(torch.autograd.Function, READ_BY_APPLY):
    _missing.append(f"torch.autograd.Function.{READ_BY_APPLY}")


@functools.cache
def tensors_of_compilers() -> tuple[type[Tensor], ...]:
    """Return the classes of tensors that stand for others while a compiler or exporter runs."""
    return (
        _required("torch._subclasses.fake_tensor.FakeTensor"),
        _required("torch._subclasses.functional_tensor.FunctionalTensor"),
    )


def arguments_in_schema(target: Any) -> Any:
    """Return the arguments that an operator declares, in order, with names and defaults."""
    return target._schema.arguments


def name_in_schema(target: Any) -> str:
    """Return the full name of an operator, such as ``"aten::add"``."""
    return str(target._schema.name)


def registered_name(function: Any) -> object:
    """Return the full name of a registered operator, or else what an object calls itself; None if nothing."""
    return getattr(function, "_qualified_op_name", None) or getattr(function, "_name", None)


# operations on each of several tensors, which have no public name

foreach_clamp_min: Callable[..., tuple[Tensor, ...]] = _named("torch._foreach_clamp_min")
"""Each tensor, and no entry below a number."""
foreach_div: Callable[..., tuple[Tensor, ...]] = _named("torch._foreach_div")
"""Each tensor over another."""
foreach_mul: Callable[..., tuple[Tensor, ...]] = _named("torch._foreach_mul")
"""Each tensor times another."""
foreach_lerp_: Callable[..., None] = _named("torch._foreach_lerp_")
"""Each tensor moved towards another, in place."""
foreach_zero_: Callable[..., None] = _named("torch._foreach_zero_")
"""Each tensor filled with zeros, in place."""


# nested values, masks, files, shards

pytree: Any = _named("torch.utils._pytree")
"""Tuples, lists and dicts with tensors in them, flattened as dynamo and the exporter flatten them."""
canonical_mask: Callable[..., Any] = _named("torch.nn.functional._canonical_mask")
"""Makes an attention mask one to be added; asks for its type, which capturing must answer for a proxy."""
none_or_dtype: Callable[..., Any] = _named("torch.nn.functional._none_or_dtype")
"""The type of a mask, asked for in the same place."""
detect_is_causal_mask: Callable[..., bool] = _named("torch.nn.modules.transformer._detect_is_causal_mask")
"""Whether a mask is the causal one, which transformers ask of its values."""
get_seq_len: Callable[..., Any] = _named("torch.nn.modules.transformer._get_seq_len")
"""The length of sequences, which transformers ask of a tensor."""
jit_internal: ModuleType = _named("torch._jit_internal")
"""Its file has functions that ask for a type because their caller does."""


def local_shape_and_offset(shape: torch.Size, mesh: Any, placements: Any) -> tuple[Any, Any]:
    """Return the shape of this rank's part of a sharded tensor, and its offset along each axis."""
    found: tuple[Any, Any] = _required(
        "torch.distributed.tensor._utils.compute_local_shape_and_global_offset"
    )(shape, mesh, placements)
    return found


# graphs of torch.fx

MODULES_OF_TENSORS = ("torch.distributed", "torch._subclasses")
"""Where the classes of tensors are that torch itself computes with, though they are subclasses."""
MODULE_OF_TENSOR_METHODS = "torch._tensor"
"""Where the methods of tensors are that are written in Python."""


def codegen_of(graph: Graph) -> CodeGen:
    """Return what generates the code of a graph; ``Graph.set_codegen`` replaces it."""
    return graph._codegen


def tracer_of(graph: Graph) -> Any:
    """Return the class of the tracer that made a graph, None if unknown."""
    return graph._tracer_cls


def set_tracer(graph: Graph, tracer: Any) -> None:
    """Let a graph that is pickled be traced again with a class of tracer."""
    graph._tracer_cls = tracer


def forget_erased_names(graph: Graph) -> None:
    """Let a graph give new nodes the names that it would give if erased nodes had never been."""
    names = type(graph._graph_namespace)()
    for node in graph.nodes:
        names.create_name(node.name, node)
    graph._graph_namespace = names


def name_for_target(graph: Graph, target: Any) -> str:
    """Return the name that a graph gives a node for its target."""
    return graph._target_to_str(target)


def rename(node: Node, name: str) -> None:
    """Rename a node, to a name made unique in its graph."""
    node._rename(name)


def is_erased(node: Node) -> bool:
    """Whether a node has been erased from its graph."""
    return bool(getattr(node, "_erased", False))


def node_table(graph: Graph) -> Any:
    """Return the table in which a graph inserts and removes its nodes, which tells of every change."""
    return graph._find_nodes_lookup_table


def replacement_hooks(graph_module: Any) -> list[Any]:
    """Return the functions that a graph module calls before an input of a node is replaced."""
    hooks: list[Any] = graph_module._replace_hooks
    return hooks


# layers of torch


def flat_weight_names(module: Any) -> list[str]:
    """Return the names of the weights of a recurrent layer, in the order in which its function takes them."""
    names: list[str] = module._flat_weights_names
    return names


def collect_flat_weights(module: Any) -> None:
    """Let a recurrent layer find its weights again, which have been replaced."""
    module._init_flat_weights()


def rank_without_batch(module: Any) -> int:
    """Return the number of axes of an input of an instance normalisation that has no batch."""
    return int(module._get_no_batch_dim())


def has_one_embedding_size(module: Any) -> bool:
    """Whether an attention layer keeps the weights of queries, keys and values in one matrix."""
    return bool(module._qkv_same_embed_dim)


def padding_of(module: Any) -> tuple[int, ...]:
    """Return the padding that a convolution with a padding mode does by itself, the last axis first."""
    return tuple(module._reversed_padding_repeated_twice)


def is_initialised_by_torch(attention: nn.MultiheadAttention) -> bool:
    """Whether an attention layer initialises its weights as ``nn.MultiheadAttention`` does."""
    return type(attention)._reset_parameters is nn.MultiheadAttention._reset_parameters


def apply_to_tensors(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter and buffer of a module by what a function makes of it."""
    module._apply(function)


def inside_of_compiled(model: Any) -> Any:
    """Return the model inside of what ``torch.compile`` returned; None where it is something else."""
    return getattr(model, "_orig_mod", None)


# the compiler

FRAME_OF_COMPILATION = ("_compile", "convert_frame.py")
"""Name and file of dynamo's function that compiles a frame of Python, with its code and its variables."""
FRAMES_OF_MODULES = ("_wrapped_call_impl", "_call_impl")
"""Names of the functions in which a module is called."""
inductor_with: Callable[..., Callable[..., Any]] = _named("torch._TorchCompileInductorWrapper")
"""Returns inductor as a backend, given a mode, options and whether sizes are left open."""
trace_structured: Callable[..., None] = _named("torch._logging._internal.trace_structured")
"""Writes to the structured trace, where there is one."""


def on_end_of_compilation(callback: Callable[[Any], None]) -> None:
    """Have a function called whenever dynamo has compiled something, or has given it up."""
    handler = _required("torch._dynamo.callback.callback_handler")
    if callback not in handler.end_callbacks:
        handler.register_end_callback(callback)


def is_left_to_python(error: BaseException) -> bool:
    """Whether dynamo, with this error, runs a function as it is."""
    kinds: tuple[type, ...] = tuple(
        _required(f"torch._dynamo.exc.{name}") for name in ("Unsupported", "SkipFrame")
    )
    return isinstance(error, kinds)


def origin_of_backend(wrapped: Any) -> Any:
    """Return the backend that was given to ``torch.compile``, inside of what dynamo puts around it."""
    while True:
        inner = getattr(wrapped, "_torchdynamo_orig_backend", None) or getattr(wrapped, "compiler_fn", None)
        if inner is None or inner is wrapped:
            return wrapped
        wrapped = inner


def compiler_of(backend: Any) -> Callable[..., Any]:
    """Return the function of a backend of ``torch.compile``, given by name or itself.

    Raises:
        Exception: torch's own, if it has none of that name.
    """
    found: Callable[..., Any] = _required("torch._dynamo.backends.registry.lookup_backend")(backend)
    return found


def count_as_inductor_pass(kind: type) -> None:
    """Let inductor take objects of a class as passes for its slots; importing its own class takes seconds."""
    _required("torch._inductor.custom_graph_pass.CustomGraphPass").register(kind)


def recompile_limit() -> int:
    """Return how often dynamo compiles one function before it runs it as it is."""
    return int(_required("torch._dynamo.config").recompile_limit)


def take_origin(made: GraphModule, original: GraphModule) -> None:
    """Let a graph count as dynamo's, so that compilers know which of its inputs are parameters."""
    sources = {
        node.name: getattr(node, "_dynamo_source", None)
        for node in original.graph.find_nodes(op="placeholder")
    }
    for node in made.graph.find_nodes(op="placeholder"):
        made_node: Any = node
        made_node._dynamo_source = sources.get(node.name)
    made.meta.update(original.meta)
    if hasattr(original, "_param_name_to_source"):
        vars(made)["_param_name_to_source"] = {}


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "tables of modules: documented by use, and on many lines": (
        *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    ),
    "hooks of modules: that there are any is asked by name": (
        *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
        *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
        *("_is_full_backward_hook",),
    ),
    "methods of modules: to be overridden, and compared where a class has one of its own": (
        *("_apply", "_save_to_state_dict", "_load_from_state_dict", "_call_impl", "_conv_forward"),
        *("_output_padding", "_check_input_dim", "_apply_instance_norm"),
    ),
    "layers: settings that are compared by name": (
        *("_flat_weights", "_qkv_same_embed_dim", "_reversed_padding_repeated_twice"),
    ),
    "tensors: what was written to since, and what a view shows": ("_version", "_base"),
    "code of graphs: overridden by the class that writes branches": ("_gen_python_code", "_body_transformer"),
    "graph modules: what they hold besides the model, left out of copies and comparisons": (
        *("_graph", "_code", "_tracer_cls", "_tracer_extras", "_prologue_start", "_lineno_map"),
        *("_create_node_hooks", "_erase_node_hooks", "_replace_hooks", "_deepcopy_hooks", "_wrapped_call"),
    ),
    "operators of exported programs, which are recognised by name": (
        *("_softmax", "_log_softmax", "_to_copy", "_native_batch_norm_legit_no_training"),
    ),
    "optimizers: that there are hooks, which a copy may lack": (
        *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
    ),
}
"""Private attributes of torch's objects that other files may name, by what they are for."""


def _required(path: str) -> Any:
    """Return what is at a path that is looked up on first use, since importing it takes time.

    Raises:
        TorchVersionError: there is no such thing.
    """
    before = len(_missing)
    found = _named(path)
    refuse(_missing[before:])
    return found


def _missing_attributes() -> Iterator[str]:
    """Yield the attributes that torch's objects do not have, each with its class."""
    meta: Any = {"device": "meta"}
    graph = Graph()
    made: Any = GraphModule(nn.Module(), graph)
    made.recompile()
    conv, weight = nn.ConvTranspose1d(1, 1, 1, **meta), nn.Parameter(torch.empty(0))
    optimizer = SimpleNamespace(**dict.fromkeys(Optimizer.__annotations__))  # making one imports the compiler
    objects: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (graph, ("_codegen", "_graph_namespace", "_target_to_str", "_find_nodes_lookup_table")),
        (graph.placeholder("x"), ("_rename", "_erased")),
        (torch.autocast("cpu"), ("_enabled", "_cache_enabled")),
        (torch.ops.aten.add.Tensor, ("_schema",)),
        (torch.ops.aten.add, ("_qualified_op_name",)),
        (weight, ("_use_count",)),
        (weight.untyped_storage(), ("_cdata",)),
        (nn.LSTM(1, 1, **meta), ("_flat_weights_names", "_init_flat_weights")),
        (nn.InstanceNorm1d(1), ("_get_no_batch_dim",)),
        (nn.MultiheadAttention(1, 1, **meta), ("_reset_parameters",)),
    )
    for thing, names in objects:
        yield from (f"{type(thing).__name__}.{name}" for name in names if not hasattr(thing, name))
    holders = (made, conv, nn.Conv1d(1, 1, 1, **meta), nn.InstanceNorm1d(1), nn.LSTM(1, 1, **meta))
    further = (nn.MultiheadAttention(1, 1, **meta), weight, CodeGen(), optimizer, torch.ops.aten)
    for name in (name for names in ATTRIBUTES.values() for name in names):
        if not any(hasattr(holder, name) for holder in (*holders, *further)):
            yield name


def refuse(missing: list[str]) -> None:
    """Refuse to work with a torch that lacks some names.

    Args:
        missing: the names.

    Raises:
        TorchVersionError: there are any.
    """
    if missing:
        raise TorchVersionError(
            f"biofx needs names that begin with an underscore and that torch {torch.__version__} does not "
            f"have: {', '.join(missing)}. It was tried on torch {', '.join(TRIED_ON)}; install one of these "
            f"(pip install torch=={TRIED_ON[-1]}), or a newer biofx"
        )


refuse([*_missing, *_missing_attributes()])
