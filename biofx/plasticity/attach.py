"""Plasticity that runs by itself, from the optimizer's own step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from biofx.errors import OptionError, PlasticityError, suggest
from biofx.options import Choice
from biofx.plasticity.attachment import Attachment
from biofx.plasticity.carried_defaults import carried
from biofx.plasticity.exponentiated import UPDATES
from biofx.plasticity.model_rules import exposed_rules, prepare_states
from biofx.plasticity.optimizer_wrappers import stepping_optimizer
from biofx.plasticity.ranks import group_to_agree_with
from biofx.plasticity.schedule import Observer, Rule
from biofx.plasticity.sharded_model import refuse_parts_alone, shard_states


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Iterable[Rule | str] = (),
    *,
    decay: str = "scaled",
    updates: str = "additive",
    observers: Iterable[Observer] = (),
) -> Attachment:
    """Run a model's plasticity from the steps of its optimizer; the training loop stays as it is.

    Learning-rate factors act at every step: a weight moves by its factor times what the optimizer would move
    it, and one with a factor of 0 does not move, whatever decays and whatever the optimizer remembers. They
    multiply gradients where the optimizer lets a factor on the gradient through, and updates where it does
    not, which is found out by trying it on small weights of the same kind. Where neither does, attach raises.

    The optimizer's groups, its options and ``requires_grad`` are read at each step: groups may be added,
    states loaded, layers thawed, decay switched on. A step is one step however many classes its ``step`` runs
    through, and leaves ``.grad`` as the backward left it. One that a ``GradScaler`` skips does not count.

    Dynamic factors change at every step unless ``update_fuzzy_learning_rates`` is scheduled; signs are
    written back into the weights after it. Other rules run as scheduled.

    Copies (``copy.deepcopy``, pickle) of model and optimizer go on by themselves as the originals would;
    copied in one go with them, the attachment that is returned is that of the copies. Copied alone it is
    refused.

    Args:
        model: a transformed or converted model, wrapped (DDP, ``torch.compile``) or not. In a distributed run
            whose factors follow activity it must be the DDP wrapper, so that the ranks agree on the activity.
        optimizer: any number of them, each attached by itself, on weights of their own. Wrappers that only
            step what they wrap, as those of Accelerate and Lightning, and Lookahead are looked through.
        schedule: rules and when they run; a name alone runs at every step.
        decay: ``"scaled"``: a factor scales weight decay too, so that 0 freezes a weight to the bit;
            ``"free"``: decoupled weight decay acts in full.
        updates: ``"additive"``: as the optimizer makes them; ``"exponentiated"``: the synapses of units with
            a sign change in proportion to their strength (exponentiated gradient), so that none changes its
            sign and those at 0 stay there.
        observers: called after each step, e.g. a :class:`biofx.Monitor`.

    Returns:
        The attachment: ``detach()``, ``state_dict()``, ``load_state_dict()``.

    Raises:
        PlasticityError: the optimizer holds none of the model's weights, is attached already, cannot be
            tried, or takes steps that factors have no meaning for (LBFGS) or that come back to positions of
            the weights that it keeps; a scheduled rule has no layer to act on; exponentiated updates of units
            without signs, or with weight decay. A step raises it where its options have become such.
        OptionError: the schedule names an unknown rule, or ``decay`` is unknown.
    """
    plain: Any = unwrapped(model)
    states = prepare_states(plain)
    refuse_parts_alone(plain)
    shard_states(plain)
    rules = tuple(Rule(entry) if isinstance(entry, str) else entry for entry in schedule)
    known = sorted(exposed_rules(plain))
    for rule in rules:
        if not isinstance(rule, Rule):
            raise OptionError(f"schedule: expected rules or their names, found {rule!r}")
        if rule.name not in known:
            raise OptionError(f"schedule: no layer offers a rule {rule.name!r}{suggest(rule.name, known)}")
        if rule.name == "fuzzy_learning_rates":
            raise OptionError("schedule: fuzzy_learning_rates acts at every step already; leave it out")
    if decay not in ("scaled", "free"):
        raise OptionError(f"decay: expected 'scaled' or 'free', found {decay!r}")
    Choice(UPDATES).check("updates", updates)
    if updates == "exponentiated" and not any(state.is_constrained for state in states.values()):
        raise PlasticityError(
            "updates='exponentiated': expected a model whose units have signs (apply_dales_principle=True)"
        )
    weights = (state.parameter for state in states.values())
    stepping = stepping_optimizer(optimizer, (weight for weight in weights if weight is not None))
    present = tuple(observers)
    for observer in present:
        if hasattr(observer, "watch"):
            observer.watch(plain)
    for earlier in carried(stepping):
        if earlier.is_copy:  # which came with the optimizer, unasked
            earlier.detach()
    group = group_to_agree_with(model, states.values())
    return Attachment(
        plain, states, stepping, rules, decay, present, group, exponentiated=updates == "exponentiated"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers (DDP, ``torch.compile``), or the model itself."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (model.module if _is_wrapper(model) else None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _is_wrapper(model: nn.Module) -> bool:
    return type(model).__name__ in ("DistributedDataParallel", "DataParallel") and hasattr(model, "module")
