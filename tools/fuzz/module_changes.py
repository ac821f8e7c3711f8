"""Changes to modules: modes, attributes, settings, other modules in their place, hooks.

Each function returns the lines that change a model ``m``, or None where there is nothing to change.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from torch import nn

Change = Callable[[Random, nn.Module], "str | None"]

TEXTS = {
    "padding_mode": ("zeros", "reflect", "circular"),
    "approximate": ("none", "tanh"),
    "kind": ("relu", "gelu"),
    "active": ("a", "b"),
    "reduction": ("mean", "sum"),
}
SETTINGS: dict[type[nn.Module], dict[str, tuple[Any, ...]]] = {
    nn.modules.batchnorm._NormBase: {
        "momentum": (0.0, 0.5, None),
        "eps": (1e-5, 0.3),
        "track_running_stats": (False, True),
    },
    nn.LayerNorm: {"eps": (1e-5, 0.3)},
    nn.GroupNorm: {"eps": (1e-5, 0.3), "num_groups": (1, 2)},
    nn.RMSNorm: {"eps": (None, 0.3)},
    nn.modules.dropout._DropoutNd: {"p": (0.0, 0.5, 0.9), "inplace": (True,)},
    nn.modules.conv._ConvNd: {"padding_mode": TEXTS["padding_mode"], "padding": ((0,), (1,), (2,))},
    nn.LeakyReLU: {"negative_slope": (0.0, 0.5)},
    nn.ELU: {"alpha": (0.1, 2.0)},
    nn.GELU: {"approximate": TEXTS["approximate"]},
    nn.Softplus: {"beta": (0.5, 2.0), "threshold": (0.1,)},
    nn.MultiheadAttention: {"dropout": (0.0, 0.5), "num_heads": (1, 2), "batch_first": (False,)},
    nn.RNNBase: {"dropout": (0.0,), "batch_first": (False,)},
    nn.Embedding: {"padding_idx": (0, None), "max_norm": (0.1, None), "scale_grad_by_freq": (True,)},
    nn.ReLU: {"inplace": (True, False)},
    nn.MaxPool2d: {"stride": (1, 2), "kernel_size": (1, 2), "ceil_mode": (True,)},
    nn.Flatten: {"end_dim": (-1, 1)},
}
HOOKS = (
    "register_forward_hook(lambda module, given, found: found * 2)",
    "register_forward_hook(lambda module, given, found: see(found.detach().clone()))",
    "register_forward_pre_hook(lambda module, given: tuple(value * 2 for value in given))",
    "register_full_backward_hook("
    "lambda module, given, found: tuple(g if g is None else g * 2 for g in given))",
    "register_full_backward_pre_hook(lambda module, found: tuple(g if g is None else g * 2 for g in found))",
    "register_forward_hook(lambda module, given, options, found: found * 2, with_kwargs=True)",
    "register_state_dict_post_hook(lambda module, state, prefix, local: None)",
)


def paths(model: nn.Module, kinds: Any = nn.Module) -> list[str]:
    """Paths of a model's own modules of a kind, itself excluded."""
    own = [(path, module) for path, module in model.named_modules() if path and "bio_mod" not in path]
    return [path for path, module in own if isinstance(module, kinds)]


def mode_of_the_whole(rng: Random, model: nn.Module) -> str | None:
    """``train()`` and ``eval()``."""
    return rng.choice(("m.eval()", "m.train()", "m.train(False)", "m.eval(); m.train(); m.eval()"))


def mode_of_a_part(rng: Random, model: nn.Module) -> str | None:
    """The mode of one module, by its method or by the flag."""
    path = rng.choice(paths(model) or [""])
    how = rng.choice((".train()", ".eval()", ".training = True", ".training = False"))
    return f"at(m, {path!r}){how}"


def mode_of_a_kind(rng: Random, model: nn.Module) -> str | None:
    """Dropout at evaluation, normalisations frozen in training."""
    kind, how = rng.choice(
        (("nn.modules.dropout._DropoutNd", "train"), ("nn.modules.batchnorm._NormBase", "eval"))
    )
    return f"for each in m.modules():\n    if isinstance(each, {kind}): each.{how}()"


def attribute(rng: Random, model: nn.Module) -> str | None:
    """A number, flag or text of a module that is the user's."""
    found = [
        (path, name, value)
        for path, module in model.named_modules()
        if not type(module).__module__.startswith(("torch.", "biofx."))
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, (bool, int, float, str))
    ]
    if not found:
        return None
    path, name, value = rng.choice(found)
    return f"at(m, {path!r}).{name} = {other(rng, name, value)!r}"


def other(rng: Random, name: str, value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return max(value + rng.choice((-1, 1)), 0)
    if isinstance(value, float):
        return rng.choice((0.0, value / 2 + 0.125, value + 0.5, 1.0))
    return rng.choice(TEXTS.get(name, (value,)))


def held_value(rng: Random, model: nn.Module) -> str | None:
    """A number in a list or a dictionary that a module holds, or of its class."""
    found = [path for path, module in model.named_modules() if type(module).__name__ == "Scaled"]
    line = rng.choice((".scales[0] = 3.0", ".options['bias'] = 2.0", ".scales = [4.0]", ".offset = 5.0"))
    return f"at(m, {rng.choice(found)!r}){line}" if found else None


def own_switch(rng: Random, model: nn.Module) -> str | None:
    """A method of the user's that changes what the module is."""
    found = [path for path, module in model.named_modules() if hasattr(module, "switch")]
    return f"at(m, {rng.choice(found)!r}).switch()" if found else None


def setting(rng: Random, model: nn.Module) -> str | None:
    """A setting of one of torch's layers."""
    found = [
        (path, kind)
        for kind in SETTINGS
        for path in paths(model, kind)
        if type(model.get_submodule(path)).__module__.startswith("torch.")
    ]
    if not found:
        return None
    path, kind = rng.choice(found)
    name = rng.choice(sorted(SETTINGS[kind]))
    value = rng.choice(SETTINGS[kind][name])
    if name == "padding":
        layer: Any = model.get_submodule(path)
        value = value * len(layer.kernel_size)
        reversed_twice = tuple(side for side in reversed(value) for _ in range(2))
        twice = f"; at(m, {path!r})._reversed_padding_repeated_twice = {list(reversed_twice)!r}"
        return f"at(m, {path!r}).padding = {value!r}{twice if layer.padding_mode != 'zeros' else ''}"
    return f"at(m, {path!r}).{name} = {value!r}"


def layer_replaced(rng: Random, model: nn.Module) -> str | None:
    """A layer by another of its class, by one around it, or by one that does nothing."""
    path = rng.choice(paths(model, (nn.Linear, nn.modules.conv._ConvNd)) or [""])
    if not path:
        return None
    layer: Any = model.get_submodule(path)
    ways = [
        f"put(m, {path!r}, Doubled(at(m, {path!r})))",
        f"put(m, {path!r}, nn.Sequential(at(m, {path!r}), nn.Tanh()))",
        f"put(m, {path!r}, nn.Identity())",
        f"put(m, {path!r}, None)",
        f"new = copy.deepcopy(at(m, {path!r})).apply(lambda each: getattr(each, 'reset_parameters', int)()); "
        f"put(m, {path!r}, new)",
    ]
    if type(layer) is nn.Linear:
        made = f"nn.Linear({layer.in_features}, {layer.out_features}, bias={layer.bias is None})"
        ways += [f"adapted(m, {path!r})", f"put(m, {path!r}, {made})"] * 2
    return rng.choice(ways)


def other_module_replaced(rng: Random, model: nn.Module) -> str | None:
    """An activation, a normalisation or a dropout by another."""
    kinds = (nn.ReLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.modules.dropout._DropoutNd)
    path = rng.choice(paths(model, (*kinds, nn.modules.batchnorm._NormBase, nn.LayerNorm)) or [""])
    made = rng.choice(("nn.Identity()", "nn.Tanh()", "nn.Dropout(0.5)", f"Doubled(at(m, {path!r}))"))
    return f"put(m, {path!r}, {made})" if path else None


def containers(rng: Random, model: nn.Module) -> str | None:
    """A module more, or one less, in a list of modules or a sequence."""
    found = [p for p, module in model.named_modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
    if not found:
        return None
    path = rng.choice(found)
    width = 4 if isinstance(model.get_submodule(path), nn.ModuleList) else 0
    made = f"nn.Linear({width}, {width})" if width else "nn.Tanh()"
    return f"at(m, {path!r})" + rng.choice(
        (f".append({made})", f".insert(1, {made})", ".pop(-1)", f".add_module('more', {made})")
    )


def forward_replaced(rng: Random, model: nn.Module) -> str | None:
    """The forward of one module."""
    path = rng.choice(["", *paths(model), *paths(model)])
    ways = (
        f"old = at(m, {path!r}).forward; at(m, {path!r}).forward = lambda *given: old(*given) * 2",
        f"import types; old = type(at(m, {path!r})).forward\n"
        f"at(m, {path!r}).forward = types.MethodType(lambda self, x: old(self, x) + 1, at(m, {path!r}))",
    )
    return rng.choice(ways)


def hook(rng: Random, model: nn.Module) -> str | None:
    """A hook on the model or on a part."""
    return f"at(m, {rng.choice(['', *paths(model)])!r}).{rng.choice(HOOKS)}"


MODULE_CHANGES: tuple[Change, ...] = (
    *(mode_of_the_whole, mode_of_the_whole, mode_of_a_part, mode_of_a_kind),
    *(attribute, attribute, held_value, own_switch, setting, setting),
    *(layer_replaced, layer_replaced, other_module_replaced, containers, forward_replaced, hook),
)
