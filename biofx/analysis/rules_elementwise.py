"""Operations that act entry by entry, on one value or several: units and repeated channels stay in place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from biofx.analysis.forward import CannotFollow, declare, rule_for
from biofx.analysis.replication import Outcome, Replication, ReplicationCall
from biofx.analysis.units import NOTHING, UnitCall, UnitValue, observed_only
from biofx.graph.branches import by_mode
from biofx.graph.guards import require_tensor
from biofx.operators.mask_ops import mask_weight
from biofx.operators.observed_inputs import observe_inputs, observe_state
from biofx.operators.rate_ops import GRADIENT_SCALINGS, observe_activity
from biofx.operators.sign_ops import constrain_sign, drop_pairs

# of one value: units


def keeps(call: UnitCall) -> UnitValue:
    """Leave every unit where it is; what cannot be negative cannot be negative afterwards."""
    return call.keeps()


def as_it_is(call: UnitCall) -> UnitValue:
    """Return what is known of the argument, a tuple or not."""
    return call.x


def never_negative(call: UnitCall) -> UnitValue:
    """Leave every unit where it is; the result is not negative."""
    return call.keeps(nonnegative=True)


def perhaps_negative(call: UnitCall) -> UnitValue:
    """Leave every unit where it is; the result may be negative."""
    return call.keeps(nonnegative=False)


def bounded(call: UnitCall) -> UnitValue:
    """``clamp``, ``hardtanh``: not negative if the lower bound is not."""
    low = call.option(1, "min_val", call.argument(1, "min"))
    above = isinstance(low, (int, float)) and low >= 0
    return call.keeps(nonnegative=above or call.x.nonnegative)


def without_units(call: UnitCall) -> UnitValue:
    """``zeros_like``, ``new_zeros``: only the type and the shape of the argument count."""
    return NOTHING.replace(nonnegative=call.name.rpartition("new_")[2].startswith(("zeros", "ones", "rand_")))


def negated(call: UnitCall) -> UnitValue:
    """``neg``: excitation turns into inhibition."""
    if not call.x.has_units:
        return call.keeps(nonnegative=False)
    return call.ends("it changes the sign of its argument, and excitation turns into inhibition")


@observed_only
def inverted(call: UnitCall) -> UnitValue:
    """``rsqrt``, ``reciprocal``: of a statistic of all units, one again; a unit's effect turns over."""
    if call.x.has_units and not call.x.is_statistic:
        return call.ends("it falls as its argument rises, and excitation turns into inhibition")
    return call.keeps(nonnegative=call.x.nonnegative or call.name.startswith("rsqrt"))


@observed_only
def raised(call: UnitCall) -> UnitValue:
    """``x ** n``: not negative if n is even or x is not; a negative n turns the effect of x over."""
    x, exponent = call.value(call.argument(0, "input")), call.argument(1, "exponent")
    if not isinstance(exponent, (int, float)):
        if not x.has_units and not call.value(exponent).has_units:
            return NOTHING.replace(rank=x.rank, nonnegative=x.nonnegative)
        return call.ends("its exponent is known only when it runs")
    if exponent < 0 and x.has_units and not x.is_statistic:
        return call.ends("it falls as its argument rises, and excitation turns into inhibition")
    return call.keeps(x, nonnegative=x.nonnegative or exponent % 2 == 0)


# of one value: replication


def of_one_tensor(call: ReplicationCall) -> Outcome:
    """Entry by entry, from one tensor."""
    if len(call.tensors) != 1:
        raise CannotFollow("an option of it is known only when it runs")
    return Outcome(call.source)


def _prelu(call: ReplicationCall) -> Outcome:
    """Its slopes may be one for each channel."""
    if not isinstance(call.module, nn.PReLU) or call.module.weight.numel() != 1:
        raise CannotFollow("it has a slope for each channel")
    return Outcome(call.source)


def _dropout(call: ReplicationCall) -> Outcome:
    """In training each member is dropped by itself."""
    training = call.option(2, "training", True)
    if call.option(1, "p", 0.5) == 0 or (call.module is None and training is False):
        return Outcome(call.source)
    raise CannotFollow("in training mode it samples a mask for each channel")


def _observe(call: ReplicationCall) -> Outcome:
    """Members of a connection are equally active."""
    source = call.source
    if source.inner or call.node.kwargs.get("channel_axis") != source.axis:
        raise CannotFollow("it observes along another axis")

    def observe_for_members(folding: Any) -> None:
        call.node.kwargs = {**call.node.kwargs, "gamma": source.gamma}

    return Outcome(source, observe_for_members, message="observes one value for all members")


def _same_answer(call: ReplicationCall) -> Outcome:
    """The answer is the same for the compact tensor."""
    return Outcome(None)


# of several values: units


def added(call: UnitCall) -> UnitValue:
    """``a + b``: the units of both are one, index by index."""
    left, right = call.operands
    number = _computed(left, right, operator.add)
    if number is not None:
        return number
    if call.node.kwargs.get("alpha", 1) != 1:
        return call.ends("it adds a multiple of unknown sign")
    if _is_one_for_many(left, right) or _is_one_for_many(right, left):
        return call.ends("it adds one unit to many others, at whose synapses it would have their signs")
    return _of_both(call, left, right)


def subtracted(call: UnitCall) -> UnitValue:
    """``a - b``: b would act with the opposite sign, unless it is of the same units, as in adaptation."""
    left, right = call.operands
    number = _computed(left, right, operator.sub)
    if number is not None:
        return number
    is_own = right.is_statistic and left.has_units
    if right.has_units and not is_own and not call.are_one(left, right):
        if _only_drives(call.argument(1, "other"), call):
            return _of_both(call, left, right).replace(nonnegative=False)
        return call.ends("it subtracts activity, and excitation turns into inhibition")
    return call.keeps(left, nonnegative=False)


def multiplied(call: UnitCall) -> UnitValue:
    """``a * b``: one unit, as a gate and its argument are; a factor of unknown sign ends the units."""
    left, right = call.operands
    number = _computed(left, right, operator.mul)
    if number is not None:
        return number
    if left.size_of is not None and right.size_of is not None:
        return UnitValue(nonnegative=True, size_of=left.size_of + right.size_of)
    for place, (one, other) in enumerate(((left, right), (right, left))):
        if one.has_units and not one.is_statistic and other.is_statistic and other.nonnegative:
            return call.keeps(one)  # as in a normalisation that is written out
        if one.has_units and not other.nonnegative and call.is_gain(call.argument(1 - place, "other")):
            call.normalises(one)
            return call.keeps(one, nonnegative=False)
    if any(not value.has_units and not value.nonnegative for value in (left, right)):
        if not (left.has_units or right.has_units):
            ranks = [value.rank for value in (left, right) if value.rank is not None]
            return NOTHING.replace(rank=max(ranks, default=None))
        return call.ends("it multiplies by something that may be negative")
    return _of_both(call, left, right)


def divided(call: UnitCall) -> UnitValue:
    """``a / b``: a keeps its units where b is known to be positive."""
    left, right = call.operands
    number = _computed(left, right, operator.floordiv) if call.node.target is operator.floordiv else None
    if number is not None:
        return number
    by_statistic = right.is_statistic and right.nonnegative and left.has_units and not left.is_statistic
    if (right.has_units and not by_statistic) or (left.has_units and not right.nonnegative):
        return call.ends("it divides by something that may be negative")
    return call.keeps(left)


def chosen(call: UnitCall) -> UnitValue:
    """``where(condition, a, b)``, ``maximum``: a unit of either is one."""
    if call.node.target == "where":  # a.where(condition, b)
        return _of_both(call, call.x, call.value(call.argument(2, "other")))
    first = 1 if call.node.target is torch.where else 0
    left, right = call.argument(first, "input"), call.argument(first + 1, "other")
    return _of_both(call, call.value(left), call.value(right))


def chosen_by_mode(call: UnitCall) -> UnitValue:
    """``by_mode(training, a, b)``: a unit of either is one; units of different forms end."""
    left, right = call.value(call.argument(1, "in_training")), call.value(call.argument(2, "in_evaluation"))
    if left.parts or right.parts:
        return call.ends("its form is not the same in training and in evaluation")
    return _of_both(call, left, right) if left.has_units or right.has_units else NOTHING


def masked(call: UnitCall) -> UnitValue:
    """``masked_fill``: the entries that are filled in are no unit's."""
    fill = call.value(call.argument(2, "value"))
    return call.keeps(nonnegative=call.x.nonnegative and fill.nonnegative)


def _of_both(call: UnitCall, left: UnitValue, right: UnitValue) -> UnitValue:
    return call.unified((left, right)).replace(nonnegative=left.nonnegative and right.nonnegative)


def _only_drives(argument: Any, call: UnitCall) -> bool:
    """Whether a value is what layers make of others, on its way to this operation alone.

    No weight reads it then, so it is the activity of no unit yet: subtracting it turns the effect of the
    layers' weights over (:mod:`biofx.analysis.drives`), and the unit stays the one at that place.
    """
    analysis = call.analysis
    if not analysis.is_observed or not isinstance(argument, Node) or len(argument.users) != 1:
        return False
    if argument in analysis.sites:
        return True
    name = UnitCall(argument, analysis.module_of(argument), analysis).name
    sources = [source for source in argument.all_input_nodes if analysis.values[source].has_units]
    return name in _SCALED_SUMS and bool(sources) and all(_only_drives(s, call) for s in sources)


_SCALED_SUMS = frozenset({"add", "mul", "multiply", "div", "truediv"})


def _computed(left: UnitValue, right: UnitValue, function: Callable[[int, int], int]) -> UnitValue | None:
    """Return the result of arithmetic on sizes, None where it is not that."""
    if function is operator.add and right.parts is not None:  # a tuple of sizes, and more of them
        if left.parts is not None:
            return UnitValue(parts=left.parts + right.parts)
        if left.tail is not None:
            return UnitValue(nonnegative=True, tail=left.tail + right.parts)
    if left.number is not None and right.number is not None:
        value = function(left.number, right.number)
        return UnitValue(number=value, nonnegative=value >= 0)
    return None


def _is_one_for_many(one: UnitValue, many: UnitValue) -> bool:
    if one.layout is None or many.layout is None:
        return False
    return one.layout.labels.numel() == 1 < many.layout.labels.numel()


# of several values: replication


def of_several_tensors(call: ReplicationCall) -> Outcome:
    """Each channel is computed alike from itself, from equal replications, and from what all share."""
    replications = list(call.inputs.values())
    first = replications[0]
    if not all(first.matches(other) for other in replications):
        raise CannotFollow("its inputs repeat their channels differently")
    for node in call.tensors:
        if node not in call.inputs and not _is_shared(call, node, first):
            raise CannotFollow(f"{node.name} has an entry of its own for each channel, or may have")
    ranks = {replication.rank for replication in replications}
    sure = any(replication.rank_is_sure for replication in replications)
    return Outcome(first.replace(rank=first.rank if len(ranks) == 1 else None, rank_is_sure=sure))


def _is_shared(call: ReplicationCall, node: Node, replication: Replication) -> bool:
    """Whether a parameter or buffer has one entry, or none, along the channels."""
    constant = call.constant(node)
    if constant is None or constant.dim() > (replication.rank or constant.dim()):
        return False
    return constant.dim() < -replication.axis or constant.shape[replication.axis] == 1


def works_by_element(node: Node, graph_module: GraphModule) -> bool:
    """Whether an operation is known to act on each element by itself."""
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return rule_for("replication", node, module) in (of_one_tensor, of_several_tensors)


# what rules an operation has

declare(
    *("relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "exp", "abs", "square"),
    units=never_negative,
    replication=of_one_tensor,
)
declare("exp2", units=never_negative)
declare(
    *("tanh", "leaky_relu", "elu", "selu", "celu", "softsign", "logsigmoid", "gelu", "silu", "mish"),
    *("hardswish", "tanhshrink", "softshrink", "hardshrink", "log", "log1p", "expm1", "threshold", "erf"),
    units=perhaps_negative,
    replication=of_one_tensor,
)
declare("prelu", units=perhaps_negative, replication=_prelu)
declare("rrelu", "asinh", "atan", units=perhaps_negative)
declare(
    *("identity", "clone", "contiguous", "detach", "float", "double", "half", "bfloat16", "sqrt", "round"),
    *("floor", "ceil"),
    units=keeps,
    replication=of_one_tensor,
)
declare("requires_grad", "to", "type", "type_as", "cuda", "cpu", "nan_to_num", "lift_fresh", units=keeps)
declare("rsqrt", "reciprocal", units=inverted, replication=of_one_tensor)
declare("sin", "cos", "sign", "clamp_max", replication=of_one_tensor)
declare("clamp", units=bounded, replication=of_several_tensors)
declare("clip", units=bounded)
declare("clamp_min", "hardtanh", units=bounded, replication=of_one_tensor)
declare("neg", "negative", operator.neg, units=negated, replication=of_one_tensor)
declare(operator.abs, units=never_negative, replication=of_one_tensor)
declare(
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), units=keeps, replication=_dropout
)
declare("feature_alpha_dropout", units=keeps, replication=_dropout)
declare("feature_dropout", replication=_dropout)
declare(observe_activity, units=keeps, replication=_observe)
declare(*GRADIENT_SCALINGS, mask_weight, constrain_sign, drop_pairs, observe_inputs, units=keeps)
declare(observe_state, units=as_it_is)
declare(
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
    units=without_units,
)
declare("dim", "ndimension", "is_floating_point", require_tensor, replication=_same_answer)

declare("add", operator.add, operator.iadd, units=added, replication=of_several_tensors)
declare("sub", "subtract", operator.sub, operator.isub, units=subtracted, replication=of_several_tensors)
declare("mul", "multiply", operator.mul, operator.imul, units=multiplied, replication=of_several_tensors)
declare(
    *("div", "divide", "true_divide", operator.truediv, operator.itruediv),
    units=divided,
    replication=of_several_tensors,
)
declare(operator.floordiv, operator.ifloordiv, units=divided)
declare("maximum", "minimum", units=chosen, replication=of_several_tensors)
declare("where", units=chosen)
declare(by_mode, units=chosen_by_mode)
declare("masked_fill", units=masked)
declare("pow", operator.pow, units=raised, replication=of_several_tensors)
declare("lerp", "addcmul", replication=of_several_tensors)
