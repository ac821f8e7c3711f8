"""Changes to parameters and buffers, and what trains and averages them."""

from __future__ import annotations

from random import Random
from typing import Any

from torch import nn

from fuzz.module_changes import Change, paths

OPTIMIZERS = (
    "torch.optim.SGD(p, lr=0.05)",
    "torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)",
    "torch.optim.Adam(p, lr=0.05, foreach=True)",
    "torch.optim.AdamW(p, lr=0.05, weight_decay=0.5)",
    "torch.optim.RMSprop(p, lr=0.01, momentum=0.5)",
    "torch.optim.Adagrad(p, lr=0.05)",
    "torch.optim.NAdam(p, lr=0.05)",
    "torch.optim.Rprop(p, lr=0.01)",
)
LATER = (
    "o.param_groups[0].update(lr=0.002)",
    "o.param_groups[0].update(weight_decay=0.3)",
    "o.load_state_dict(o.state_dict())",
    "o.load_state_dict(copy.deepcopy(o.state_dict()))",
)
RULES = ("crystallize", "rejuvenate_weights", "synaptic_scaling", "volume_dependent_lr")
PARAMETRIZATIONS = (
    "torch.nn.utils.parametrizations.weight_norm(at(m, {0!r}))",
    "torch.nn.utils.parametrizations.spectral_norm(at(m, {0!r}))",
    "torch.nn.utils.parametrize.register_parametrization(at(m, {0!r}), 'weight', Halved())",
    "torch.nn.utils.parametrize.register_parametrization(at(m, {0!r}), 'bias', Halved())",
    "prune.l1_unstructured(at(m, {0!r}), 'weight', amount=0.5)",
    "torch.nn.utils.parametrize.register_parametrization(at(m, {0!r}), 'weight', Halved())\n"
    "torch.nn.utils.parametrize.remove_parametrizations(at(m, {0!r}), 'weight')",
)


def parameter(rng: Random, model: nn.Module) -> str | None:
    """A parameter changed in place, through ``data``, or replaced."""
    names = [name for name, _ in model.named_parameters()]
    if not names:
        return None
    path = rng.choice(names)
    owner, _, name = path.rpartition(".")
    held = f"at(m, {owner!r}).{name}"
    return rng.choice(
        (
            f"{held}.data.mul_(1.5)",
            f"with torch.no_grad(): {held}.add_(0.25)",
            f"{held}.data = {held}.data * 0.5",
            f"{held} = nn.Parameter(torch.randn_like({held}))",
            f"{held} = nn.Parameter({held}.detach().clone(), requires_grad=False)",
            f"at(m, {owner!r}).register_parameter({name!r}, nn.Parameter(torch.ones_like({held})))",
            f"{held}.requires_grad_({rng.random() < 0.5})",
            f"{held}.register_hook(lambda gradient: gradient * 3)",
            f"{held}.register_post_accumulate_grad_hook(lambda parameter: (parameter.grad.mul_(2), None)[1])",
            f"nn.init.{rng.choice(('zeros_', 'ones_'))}({held})",
        )
    )


def parameters_at_once(rng: Random, model: nn.Module) -> str | None:
    """All of them: frozen, thawed, as one vector, reset."""
    return rng.choice(
        (
            "m.requires_grad_(False)",
            "m.requires_grad_(True)",
            "vector = torch.nn.utils.parameters_to_vector(m.parameters()).detach()\n"
            "torch.nn.utils.vector_to_parameters(vector * 0.75, m.parameters())",
            "for each in m.modules():\n    if hasattr(each, 'reset_parameters'): each.reset_parameters()",
            "m.apply(lambda each: nn.init.ones_(each.weight) if isinstance(each, nn.Linear) else None)",
        )
    )


def bias_gone(rng: Random, model: nn.Module) -> str | None:
    """A layer without its bias, or with one that it had not."""
    path = rng.choice(paths(model, (nn.Linear, nn.modules.conv._ConvNd)) or [""])
    if not path:
        return None
    layer: Any = model.get_submodule(path)
    has = layer.bias is not None
    units = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return f"at(m, {path!r}).bias = " + ("None" if has else f"nn.Parameter(torch.ones({units}))")


def tied(rng: Random, model: nn.Module) -> str | None:
    """Two layers of one shape get one weight."""
    shapes: dict[Any, list[str]] = {}
    for path in paths(model, nn.Linear):
        layer: Any = model.get_submodule(path)  # whose weight may be one that changes when it is read
        shapes.setdefault((layer.in_features, layer.out_features), []).append(path)
    pairs = [found for found in shapes.values() if len(found) > 1]
    if not pairs:
        return None
    first, second = rng.sample(rng.choice(pairs), 2)
    return f"at(m, {first!r}).weight = at(m, {second!r}).weight"


def parametrized(rng: Random, model: nn.Module) -> str | None:
    """A parametrization or a pruning mask on a layer."""
    path = rng.choice(paths(model, (nn.Linear, nn.modules.conv._ConvNd)) or [""])
    return rng.choice(PARAMETRIZATIONS).format(path) if path else None


def buffer(rng: Random, model: nn.Module) -> str | None:
    """A buffer changed in place, replaced, set again, or reset."""
    names = [name for name, value in model.named_buffers() if value.is_floating_point()]
    if not names:
        return None
    owner, _, name = rng.choice(names).rpartition(".")
    held = f"at(m, {owner!r}).{name}"
    return rng.choice(
        (
            f"{held}.add_(0.5)",
            f"{held} = torch.ones_like({held})",
            f"at(m, {owner!r}).register_buffer({name!r}, torch.full_like({held}, 0.5))",
            f"{held}.data = torch.zeros_like({held})",
            f"at(m, {owner!r}).reset_running_stats()",
        )
    )


def number_type(rng: Random, model: nn.Module) -> str | None:
    """Another type of number, for good or there and back."""
    return rng.choice(
        (
            "m = m.double(); x = x.double() if x.is_floating_point() else x",
            "m = m.to(torch.float32); x = x.float() if x.is_floating_point() else x",
            "m = m.half().float()",
            "m = m.to(torch.bfloat16).to(torch.float32)",
        )
    )


def training(rng: Random, model: nn.Module) -> str | None:
    """Steps of a new optimizer, with plasticity attached or not."""
    made, steps, attached = rng.choice(OPTIMIZERS), rng.choice((1, 1, 2)), rng.random() < 0.6
    return f"trained(m, lambda p: {made}, x, steps={steps}, attached={attached})"


def training_that_changes(rng: Random, model: nn.Module) -> str | None:
    """A step of an optimizer that has changed, or was copied, since plasticity was attached."""
    made, path = rng.choice(OPTIMIZERS), rng.choice(["", *paths(model)])
    then = rng.choice(LATER)
    step = f"trained(m, lambda p: {made}, x, steps=1, attached=True, then=lambda o: {then})"
    last = "trained(m, lambda p: torch.optim.Adam(list(p)[-1:]), x, steps=1, attached=True, then=lambda o: "
    return rng.choice(
        (
            step,
            f"m = run_copied(m, lambda p: {made}, x)",
            f"at(m, {path!r}).requires_grad_(False)\n{step.replace(then, 'm.requires_grad_(True)')}",
            f"{last}o.add_param_group({{'params': list(m.parameters())[:-1], 'lr': 0.02}}))",
        )
    )


def rules(rng: Random, model: nn.Module) -> str | None:
    """Steps with rules, which keep a state of their own."""
    chosen = rng.sample(RULES, rng.choice((1, 2, 4)))
    return f"trained(m, lambda p: {rng.choice(OPTIMIZERS)}, x, steps=2, rules={chosen!r})"


def averaging(rng: Random, model: nn.Module) -> str | None:
    """The mean of the model and what steps make of it, which then is the model."""
    return rng.choice(
        (
            "m = averaged(m, x)",
            "m = averaged(m, x, use_buffers=True)",
            "m = averaged(m, x, avg_fn=lambda mean, new, count: (mean + new) / 2)",
            "m = averaged(m, x, avg_fn=lambda mean, new, count: (mean + new) / 2, use_buffers=True)",
            "mean = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)\n"
            "m = averaged(m, x, multi_avg_fn=mean, use_buffers=True)",
            "m = averaged_by_name(m, x)",
            "torch.optim.swa_utils.update_bn([x, x + 1] if x.is_floating_point() else [x], m)",
        )
    )


TENSOR_CHANGES: tuple[Change, ...] = (
    *(parameter, parameter, parameter, parameters_at_once, bias_gone, tied, parametrized),
    *(buffer, number_type, training, training, training_that_changes, rules, averaging, averaging),
)
