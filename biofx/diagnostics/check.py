"""Whether a model still is what its passes made it: ``biofx.check(bio_model)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from biofx.capture.random_state import preserved_random_state
from biofx.diagnostics import check_asked, check_graph, check_signs, check_states
from biofx.diagnostics.check_report import Audit, Finding
from biofx.diagnostics.check_subject import Subject, Uses
from biofx.errors import InputError
from biofx.model.graph_module import BioGraphModule
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import unwrapped
from biofx.plasticity.ranks import whole_weights


@dataclass(frozen=True)
class Invariant:
    """One kind of promise that a transformed model makes."""

    name: str
    description: str
    find: Callable[[Subject, Uses], Iterator[Finding]]


INVARIANTS = (
    Invariant(
        "signs",
        "no effective weight has the other sign than its presynaptic unit",
        check_signs.effective_signs,
    ),
    Invariant("sign values", "a unit's sign is -1, 0 or 1", check_signs.sign_values),
    Invariant(
        "sign constraints",
        "signs are enforced in the graph, wherever a constrained weight is used",
        check_signs.bypassed_constraints,
    ),
    Invariant("rule signs", "plasticity rules use the signs that the graph enforces", check_signs.rule_signs),
    Invariant("gammas", "constrained factors of a normalisation are not negative", check_signs.gammas),
    Invariant(
        "rates", "learning-rate factors are finite and within their layer's bounds", check_states.rates
    ),
    Invariant("rate shapes", "learning-rate factors broadcast to their weight", check_states.rate_shapes),
    Invariant(
        "scaling",
        "gradients are scaled by their own factors, once, in the graph or by calls as the state says",
        check_states.scaling,
    ),
    Invariant("splits", "pools of synapses divide their layer's channels, and pool once", check_graph.splits),
    Invariant("finite", "weights and plasticity states are finite", check_states.finite),
    Invariant("links", "every state belongs to the layer it sits in", check_states.links),
    Invariant("devices", "every state is on its weight's device", check_states.devices),
    Invariant("graph", "the graph fits the module, and is what the module runs", check_graph.compiled_graph),
    Invariant(
        "asked",
        "every mechanism that was asked for reached something, and what was named for it",
        check_asked.unmet,
    ),
    Invariant("kept", "what a mechanism put into the graph is still there", check_asked.kept),
)
"""What :func:`check` audits."""


def check(model: nn.Module) -> Audit:
    """Audit every invariant of a transformed or converted model, as it is at this moment.

    No forward is run, nothing is changed, and no random number is drawn; the cost is a few walks over the
    graph and a few passes over the weights. Signs are counted in the weights that layers really use: what the
    graph does to a parameter is computed, whatever it is.

    The bounds of learning-rate factors are those of each layer's config (``bio_mod.config``). What was asked
    for is what the record of the transform says; what is free by default, as the model's inputs and readout
    are of signs, is not missing where the mechanism reached something else.

    Args:
        model: as :func:`biofx.transform`, a pass or :class:`biofx.BioConverter` returned it, wrapped
            (``DistributedDataParallel``, ``torch.compile``) or not. If it is sharded, all ranks must ask
            together, and have room for its weights.

    Returns:
        The audit: ``ok``, ``faults``, ``raise_if_broken()``, counts per layer.

    Raises:
        InputError: biofx did not make the model.

    >>> import biofx
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> bio_model, _ = biofx.transform(model)
    >>> biofx.check(bio_model).ok
    True
    >>> bio_model.get_parameter("2.weight").data[0, :3] = float("nan")
    >>> print(biofx.check(bio_model))
    Sequential: 1 fault (finite)
      2.weight: finite, 3 of 12: 3 of 12 numbers are NaN or infinite; lower the learning rate ...
    """
    plain = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(plain, GraphModule) or not _is_ours(plain):
        raise InputError(
            f"expected a model that biofx made, found a {type(plain).__name__}; transform or convert it "
            "(biofx.transform, biofx.BioConverter), and check what comes out"
        )
    with preserved_random_state(), whole_weights(plain):
        subject = Subject.of(plain)
        findings = tuple(_findings(subject))
    layers = dict.fromkeys([*subject.layers, *(finding.layer for finding in findings if finding.checked)])
    descriptions = {entry.name: entry.description for entry in INVARIANTS}
    return Audit(type(plain).__name__, tuple(layers), descriptions, findings)


def _findings(subject: Subject) -> Iterator[Finding]:
    graph = check_graph.fitting_graph(subject)
    yield graph
    if graph.violated:
        return
    uses = Uses.of(subject.graph_module)
    for invariant in INVARIANTS:
        yield from invariant.find(subject, uses)


def _is_ours(graph_module: GraphModule) -> bool:
    return isinstance(graph_module, BioGraphModule) or any(
        isinstance(module, BioModule) for module in graph_module.modules()
    )
