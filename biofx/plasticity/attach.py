"""Plasticity that runs by itself, from the optimizer's own step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from biofx.errors import OptionError, PlasticityError, suggest
from biofx.options import Choice
from biofx.plasticity.agreement import Ranks
from biofx.plasticity.attachment import Attachment, attachments_of, watch
from biofx.plasticity.binding import Binding
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.consolidated_state import HOLDING, OF_TASKS
from biofx.plasticity.model_states import describe_reasons, exposed_rules, prepare_states, unwrapped
from biofx.plasticity.optimizer_step import Observer
from biofx.plasticity.optimizers import stepping_optimizer
from biofx.plasticity.ranks import ranks_to_agree_with, refuse_parts_alone, shard_state, shard_states
from biofx.plasticity.rule import Rule
from biofx.plasticity.schedule import Schedule
from biofx.plasticity.updates import UPDATES


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Iterable[Rule | str] = (),
    *,
    decay: str = "scaled",
    updates: str = "additive",
    observers: Iterable[Observer] = (),
    group: Any = None,
) -> Attachment:
    """Run a model's plasticity from the steps of its optimizer; the training loop stays as it is.

    Learning-rate factors act at every step: a weight moves by its factor times what the optimizer would move
    it, and one with a factor of 0 does not move, whatever decays and whatever the optimizer remembers. They
    multiply gradients where the optimizer preserves a factor on the gradient, and updates where it does not,
    which is found by trial runs on small weights of the same kind. Where neither works, attach raises.

    The optimizer's groups, its options and ``requires_grad`` are read at each step: groups may be added,
    states loaded, layers thawed, decay switched on. A step counts once however many classes its ``step`` runs
    through, and leaves ``.grad`` as the backward left it. A step that a ``GradScaler`` skips does not count.

    Dynamic factors change at every step unless ``update_fuzzy_learning_rates`` is scheduled; signs are
    written back into the weights after it. Other rules run as scheduled.

    Copies (``copy.deepcopy``, pickle) of model and optimizer continue by themselves as the originals would;
    an attachment that is copied together with them is that of the copies. Copying it alone is refused.

    Args:
        model: a transformed or converted model, wrapped (DDP, ``torch.compile``) or not. In a distributed run
            whose factors follow activity it must be the DDP wrapper, so that the ranks agree on the activity.
        optimizer: any number of them, each attached by itself, on weights of their own. Of Lookahead and of
            wrappers that only step another optimizer, as those of Accelerate and Lightning, the inner
            optimizer is used.
        schedule: rules and when they run; a name alone runs at every step.
        decay: ``"scaled"``: a factor scales weight decay too, so that 0 freezes a weight to the bit;
            ``"free"``: decoupled weight decay acts in full.
        updates: ``"additive"``: as the optimizer makes them; ``"exponentiated"``: the synapses of units with
            a sign change in proportion to their strength (exponentiated gradient), so that none changes its
            sign and those at 0 stay there.
        observers: called after each step, e.g. a :class:`biofx.Monitor`.
        group: a ``torch.distributed`` process group, of the ranks that train replicas of the model; by
            default that of the DDP wrapper. For trainers that keep their wrapper to themselves.

    Returns:
        The attachment: ``detach()``, ``state_dict()``, ``load_state_dict()``.

    Raises:
        PlasticityError: the optimizer holds none of the model's weights, is attached already, cannot be
            tried, or takes steps for which factors have no meaning (LBFGS) or that return to positions of
            the weights that it keeps; a scheduled rule has no layer to act on; exponentiated updates of units
            without signs, or with weight decay. A step raises it where its options have become such.
        OptionError: the schedule names an unknown rule, or ``decay`` or ``updates`` is unknown.
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
        if rule.name in HOLDING and rule.every != 1:
            raise OptionError(
                f"schedule: {rule.name} acts at every step: expected every=1, found every={rule.every}"
            )
    if decay not in ("scaled", "free"):
        raise OptionError(f"decay: expected 'scaled' or 'free', found {decay!r}")
    Choice(UPDATES).check("updates", updates)
    plan = Schedule(rules, plain, states)
    if updates == "exponentiated" and not any(state.is_constrained for state in states.values()):
        raise PlasticityError(
            "updates='exponentiated': expected a model whose units have signs (apply_dales_principle=True)"
        )
    weights = (state.parameter for state in states.values())
    stepping = stepping_optimizer(optimizer, (weight for weight in weights if weight is not None))
    present = list(observers)
    watch(present, plain)
    for earlier in attachments_of(stepping):
        if earlier.is_copy:  # which came with the optimizer, unasked
            earlier.detach()
    ranks = ranks_to_agree_with(model, states.values()) if group is None else Ranks((group,))
    gates = _gates(plan, states)
    binding = Binding(
        states,
        free_decay=decay == "free",
        exponentiated=updates == "exponentiated",
        always_scales=not {"crystallize", "volume_dependent_lr", "upgd"}.isdisjoint(plan.names) or gates,
    )
    bound = binding.bind(stepping)
    if not bound and states and all(state.parameter is None for state in states.values()):
        raise PlasticityError(
            "expected a weight that is a parameter, found none: parametrizations compute all of this model's "
            "weights, and their factors act on gradients in the graph; without attach, SGD follows them"
        )
    if not bound:
        raise PlasticityError(
            f"expected an optimizer of this model's weights, found a {type(stepping).__name__} that holds "
            "none of them; build it from bio_model.parameters()"
        )
    try:
        _check_rules(plan, [weight.state for weight in bound.values()])
    except PlasticityError:
        binding.release()
        raise
    return Attachment(plain, stepping, binding, plan, present, ranks)


def _gates(plan: Schedule, states: Mapping[str, BioModule]) -> bool:
    """Whether importance changes the rates of a weight at some step."""
    for entry in plan.entries:
        if entry.rule.name in OF_TASKS:
            with plan.entry_in_force(entry, states.values()):
                if any(state.config.consolidation_effect == "rates" for state in states.values()):
                    return True
    return False


def _check_rules(plan: Schedule, bound: list[BioModule]) -> None:
    """Refuse an entry that no bound layer can ever follow."""
    for entry in plan.entries:
        name = entry.rule.name
        states = {state.path: state for state in bound if entry.names(state.path)}
        if name == "crystallize":  # it dampens factors; where all are 1, there may be none yet
            for state in states.values():
                state.provide_factors()
                shard_state(state)
        thawed = {path: state for path, state in states.items() if state.weight.requires_grad}
        with plan.entry_in_force(entry, thawed.values()):
            reasons = {path: state.why_never(name) for path, state in thawed.items()}
        if reasons and all(reason is not None for reason in reasons.values()):
            raise PlasticityError(f"schedule: {name} has nothing to act on ({describe_reasons(reasons)})")
