"""What is kept for one weight: its learning-rate factors, signs and activity, and the memory of its rules."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from biofx.callables import identity
from biofx.config import FROM_SEED, BioConfig
from biofx.errors import PlasticityError
from biofx.layers import dense_kind_of
from biofx.operators.dispatch import is_on_host
from biofx.operators.mask_ops import existing, mask_weight
from biofx.operators.parts import is_sharded, local
from biofx.operators.rate_sampling import RateSampling
from biofx.operators.sign_ops import signs_like
from biofx.plasticity.connections import Areas, ConnectionLayout
from biofx.plasticity.described_state import describe_state
from biofx.plasticity.found_out import FoundOut
from biofx.plasticity.rule_memory import RuleMemory
from biofx.plasticity.saved_state import (
    DIVERSITY,
    DRAW,
    EXTRA,
    FACTORS,
    HELD_BACK,
    MASK,
    RATE_BUFFERS,
    SIGNS,
    UTILITY,
    converted,
    form_of,
    refuse_codes,
    stored_as,
    with_current_keys,
    without_averages,
)
from biofx.plasticity.shards import sum_over_ranks
from biofx.torch_private import members_of_modules

_OF_TURNOVER = ("unit_utility", "unit_age", "units_due", "input_activity", "weights_due")
_BUFFERS = (
    *(*RATE_BUFFERS, *SIGNS, "noise", "activity", DIVERSITY, MASK, UTILITY, *_OF_TURNOVER),
    *(*HELD_BACK, "task_counts"),
)
_OF_UNITS = (*SIGNS, MASK)
"""The buffers that follow from the graph."""
_DERIVED = ("unit_index", "constrained_rows", "connection_probe")
PER_SYNAPSE = (FACTORS, "noise", DIVERSITY, MASK, UTILITY, *HELD_BACK)
"""The buffers that have an entry for each synapse, or for each that shares a factor."""
SUB_WEIGHT = "sub_weight_"
"""How the names begin under which a state holds sub-weights."""
_DEFAULT = BioConfig()
_FULL = 4
"""Bytes of a float32."""


def rule_config(config: BioConfig) -> BioConfig:
    """Return the part of a config that the rules use; it can be copied and pickled with a layer."""
    return config.replace(weight_splitting_activation_function=identity, overrides=())


class BioState(nn.Module):
    """The state of one weight, as buffers that are not trained, and the memory of its rules.

    Model and config decide which buffers exist; rules do not add any. Each can be averaged like parameters.

    ``fuzzy_learning_rate_parameters``
        One learning-rate factor per synapse, dimensionless; shaped like the weight, or of size 1 along the
        axes that share a factor.
    ``fuzzy_learning_rate_draw``
        What the factors are sampled from at every reading, int64
        (:meth:`RateSampling.to_tensor() <biofx.operators.rate_sampling.RateSampling.to_tensor>`); instead of
        them where ``fuzzy_lr_dtype`` is ``"seed"``.
    ``sign``
        +1 for each excitatory and -1 for each inhibitory unit of the layer, that is, of its outputs; 0 where
        unconstrained; float32, shape ``(units,)``. Values near these, as rounding leaves them, act like them.
        All layers that read the units read their signs from here.
    ``local_sign``
        The same for units that the layer reads and that no layer produces; or, for comparison only, signs of
        rows.
    ``unit_index``, ``constrained_rows``
        Not buffers, because they follow from the graph: which of the signs that the layer reads belongs to
        each of its input channels, int64; and 1 for the outputs whose weights are constrained, 0 for those
        exempt, int8.
    ``noise``
        The random part u of factors that follow weights or activity, shaped like the factors.
    ``activity``
        Running mean of |output| of each of the layer's units, shape ``(units,)``; negative before the first.
    ``diversity``
        Dynamic factors as they would be without crystallization; shaped like the weight, and only where each
        synapse has such a factor.
    ``utility``
        Running mean of abs(weight · gradient) of each synapse, shaped like the weight; negative before the
        first. Only where ``rejuvenation_utility`` is ``"gradient"``.
    ``weights_due``
        The fraction of a weight that selection by proportion carries over, a number; float64.
    ``unit_utility``, ``unit_age``, ``units_due``
        Where units are turned over: of each its running utility, in units of weight times activity, and how
        many runs of the rule it has seen, int64, both ``(units,)``; and the fraction of a unit that is
        carried over, a number.
    ``input_activity``
        What :func:`~biofx.operators.observed_inputs.observe_inputs` has seen of what the weight reads,
        ``(4, input channels)``.
    ``importance``, ``task_importance``, ``anchor_weight``, ``task_counts``
        Where weights are consolidated (``consolidation``): of each synapse its importance for earlier tasks,
        or its utility (UPGD), what the current task has told of it so far, and its value when the task began,
        shaped like the weight; and how many tasks have begun, and steps in this one, int64, ``(2,)``.
    ``initial_weight``
        The weight at the start, shaped like it; only where ``l2_to_initial_strength`` is above 0.
    ``connection_mask``
        1 for each connection that exists, 0 for each that is missing and may grow, -1 for each that never
        can; float32, shaped like the weight.
    ``connection_layout``, ``connection_areas``
        Not buffers, because they follow from the model and the config: how connections lie in the weight, and
        the sizes of the areas between which their number stays.
    ``connection_probe``
        Not a buffer: zeros that receive the gradient of missing connections, while a step is awaited in
        which they grow by it; else empty of meaning. None where they grow at random.
    ``memory``
        Not a buffer: a :class:`~biofx.plasticity.rule_memory.RuleMemory`. Its counts and the memory of each
        unit are in the state dict too, as ``_extra_state``, for a state that was made with the model.

    A checkpoint of the original model has none of these keys; loading it leaves the state unchanged.

    ``gradient_level`` is one number that the graph multiplies the gradient by, besides the factors, and
    ``splitting_seed`` the seed by which a weight was shared out among sub-weights.

    For weights of modules that biofx does not know, ``inputs_first`` says that they are ``(in, out)``, and
    ``why_no_synapses``, if not empty, why their entries are no synapses between units.

    Args:
        parent: the layer, or a function that returns it.
        config: options of the rules; the default config if None.
    """

    __jit_unused_properties__: ClassVar[list[str]] = []
    if TYPE_CHECKING:  # torch.jit.script reads class annotations, and not these
        fuzzy_learning_rate_parameters: Tensor | None
        fuzzy_learning_rate_draw: Tensor | None
        sign: Tensor | None
        local_sign: Tensor | None
        unit_index: Tensor | None
        constrained_rows: Tensor | None
        noise: Tensor | None
        activity: Tensor | None
        diversity: Tensor | None
        connection_mask: Tensor | None
        unit_utility: Tensor | None
        unit_age: Tensor | None
        units_due: Tensor | None
        weights_due: Tensor | None
        input_activity: Tensor | None
        connection_probe: Tensor | None
        utility: Tensor | None
        importance: Tensor | None
        task_importance: Tensor | None
        anchor_weight: Tensor | None
        task_counts: Tensor | None
        initial_weight: Tensor | None
        sign_layout: dict[str, int]

    def __init__(
        self, parent: nn.Module | Callable[[], nn.Module] | None = None, config: BioConfig | None = None
    ) -> None:
        super().__init__()
        # what register_buffer would do for each, in a tenth of the time: there is a state for every weight
        self._buffers.update(dict.fromkeys(_BUFFERS))
        self.__dict__.update(dict.fromkeys(_DERIVED))
        self.__dict__.update(_sampling=None, _started_from=None, _values_of_meta={}, _lost=[])
        self.memory = RuleMemory()
        self.saves_memory = parent is not None
        self.config = _DEFAULT if config is None else rule_config(config)
        self.path = "weight"
        self.depth = 0.0
        self.scaled_in_graph = False
        self.is_expanded = False
        self.inputs_first = False
        self.why_no_synapses = ""
        self.gradient_level = 1.0
        self.splitting_seed = 0
        self.sign_layout = {}
        self.connection_layout = ConnectionLayout()
        self.connection_areas: Areas | None = None
        if parent is not None:
            self.link(parent if isinstance(parent, nn.Module) else parent())

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        properties = inspect.getmembers(cls, lambda member: isinstance(member, property))
        cls.__jit_unused_properties__ = [
            name for name, _ in properties
        ]  # which torch.jit.script would compile

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield this module and those in it, as any module does; none to torch where it shares out a layer.

        ``parallelize_module`` would take each module in a layer for a part of its weights; what is kept of a
        weight is shared out as that is, by biofx.
        """
        if torch.compiler.is_compiling() or not _shares_out(sys._getframe(1)):
            yield from super().named_modules(memo, prefix, remove_duplicate)

    def extra_repr(self) -> str:
        """Return what it has of rates, signs and connections, in a few words."""
        return describe_state(self)

    # the layer and its weight

    def link(self, parent: nn.Module) -> None:
        """Make ``parent`` the layer; it is stored outside the module tree, which must not contain a cycle."""
        self.__dict__["_parent"] = parent

    @property
    def is_linked(self) -> bool:
        """Whether it belongs to a layer."""
        return "_parent" in self.__dict__

    def get_parent(self) -> Any:
        """Return the layer.

        Raises:
            PlasticityError: it was never linked to one.
        """
        parent = self.__dict__.get("_parent")
        if parent is None:
            raise PlasticityError("this BioModule belongs to no layer; give it one: BioModule(layer, config)")
        return parent

    @property
    def weight(self) -> nn.Parameter:
        """The weight whose state this is.

        Raises:
            PlasticityError: it is not a parameter, but computed from others.
        """
        found = self.parameter
        if found is None:
            raise PlasticityError(f"{self.path}: expected a parameter, found a weight that is computed")
        return found

    @property
    def parameter(self) -> nn.Parameter | None:
        """The same, None where the weight is computed (by a parametrization)."""
        # asking a parametrized layer for its weight would compute it, which may change its state
        return cast(nn.Module, self.get_parent())._parameters.get(self.path.rpartition(".")[2])

    @property
    def output_axis(self) -> int:
        """The axis of the weight that counts the postsynaptic units."""
        kind = dense_kind_of(self.get_parent())
        return int(self.inputs_first) if kind is None else kind.output_axis

    @property
    def groups(self) -> int:
        """Groups of a convolution, a count; 1 for other layers."""
        return int(getattr(self.get_parent(), "groups", 1))

    @property
    def units(self) -> int:
        """Postsynaptic units of the weight, a count; 0 where it has none, or is computed."""
        weight = self.parameter if self.is_linked else None
        if weight is None or isinstance(weight, nn.UninitializedParameter) or weight.dim() < 2:
            return 0
        return weight.shape[0] if self.output_axis == 0 else weight.shape[1] * self.groups

    @property
    def steps(self) -> int:
        """Calls of :meth:`~biofx.BioModule.update_fuzzy_learning_rates` so far, a count."""
        return self.memory.steps

    @property
    def events(self) -> int:
        """Random events so far, a count."""
        return self.memory.events

    @property
    def target_strength(self) -> Tensor | None:
        """Total input strength of each unit that synaptic scaling maintains, None before its first call."""
        return self.memory.target_strength

    def observe_with(self, other: BioState) -> None:
        """Take the activity of the layer's units from the state of its first sub-weight."""
        self.__dict__["_observer"] = other

    @property
    def observed_activity(self) -> Tensor | None:
        """Running mean of each unit's output, None where nothing observes it."""
        observer: BioState = self.__dict__.get("_observer", self)
        return observer.activity

    def reads_signs_of(self, sources: Sequence[tuple[BioState, str]], layout: dict[str, int]) -> None:
        """Constrain the weight to the signs of its presynaptic units.

        Args:
            sources: the states that hold them, and in which buffer; concatenated, and indexed by
                ``unit_index`` if there is one.
            layout: ``axis`` and ``groups`` as :func:`biofx.operators.sign_ops.constrain_sign` takes them.
        """
        self.sign_layout = dict(layout)
        self.__dict__["_sign_sources"] = tuple(sources)

    @property
    def is_constrained(self) -> bool:
        """Whether the weight's presynaptic units have signs."""
        return "_sign_sources" in self.__dict__

    def presynaptic_signs(self) -> Tensor:
        """Return the sign of each presynaptic unit, -1, 0 or 1, one per input channel.

        Raises:
            PlasticityError: the weight is not constrained.
        """
        if not self.is_constrained:
            raise PlasticityError(f"the presynaptic units of {self.path!r} have no signs")
        sources = cast("tuple[tuple[BioState, str], ...]", self.__dict__["_sign_sources"])
        signs = [state.get_buffer(name) for state, name in sources]
        joined = (signs[0] if len(signs) == 1 else torch.cat(signs)).sign()
        return joined if self.unit_index is None else joined.index_select(0, self.unit_index)

    def signs(self) -> Any:
        """Return the signs laid out to broadcast to the weight, None where the layer has none."""
        if not self.is_constrained:
            return None
        layout: dict[str, Any] = {**self.sign_layout, "rows": self.constrained_rows}
        return signs_like(self.weight.detach(), self.presynaptic_signs(), **layout)

    @property
    def reads_pairs(self) -> bool:
        """Whether units that the weight reads are pairs that ``expand-units`` made."""
        return any(state.is_expanded for state, _ in self.__dict__.get("_sign_sources", ()))

    @property
    def has_sub_weights(self) -> bool:
        """Whether the weight is the first of several sub-weights."""
        return any(name.startswith(SUB_WEIGHT) for name in self._modules)

    @property
    def is_sub_weight(self) -> bool:
        """Whether the weight is a further one of several sub-weights."""
        return f".{SUB_WEIGHT}" in self.path

    # connections

    @property
    def connections(self) -> int | None:
        """Weights of the connections that exist, a count; None where there is no mask, so that all do."""
        mask = self.connection_mask
        if mask is None:
            return None
        if is_sharded(mask):
            return int(self.__dict__["_connections_of_all"][1])
        known: FoundOut[int] = self.__dict__.setdefault("_connections", FoundOut())
        return known.of(mask, lambda held: int(existing(held).count_nonzero()))

    def count_connections(self) -> None:
        """Count the connections of a mask of which this rank has a part; all ranks must do it together.

        It does nothing where the mask has not been written to.
        """
        mask = self.connection_mask
        if mask is None or not is_sharded(mask):
            return
        part = local(mask)
        key = part.untyped_storage().data_ptr(), part._version
        if self.__dict__.get("_connections_of_all", (None, 0))[0] != key:
            count = sum_over_ranks(existing(part).count_nonzero(), mask)
            self.__dict__["_connections_of_all"] = key, int(count)

    @torch.no_grad()
    def clear_missing(self) -> None:
        """Make this rank's part of a weight 0 where no connection exists, where it has a part of the mask."""
        weight, mask = self.parameter, self.connection_mask
        if weight is not None and mask is not None and is_sharded(mask):
            part = local(weight.detach())
            part.copy_(mask_weight(part, local(mask)))

    @property
    def masked_weight(self) -> Tensor:
        """The weight, detached, with 0 where no connection exists; it shares memory without a mask."""
        weight, mask = self.weight.detach(), self.connection_mask
        return weight if mask is None else mask_weight(weight, mask)

    @property
    def grows_by_gradient(self) -> bool:
        """Whether connections grow where the gradient is largest."""
        return self.connection_probe is not None

    def await_gradient(self, awaited: bool) -> None:
        """Collect the gradient of missing connections from now on, or stop, where they grow by it."""
        probe, mask = self.connection_probe, self.connection_mask
        if probe is None or mask is None:
            return
        if probe.requires_grad == awaited and probe.grad is None:
            return
        like = self.weight
        shape = mask.shape if awaited else ()
        self.connection_probe = torch.zeros(
            shape, dtype=like.dtype, device=mask.device, requires_grad=awaited
        )

    # learning-rate factors

    @property
    def is_drawn(self) -> bool:
        """Whether the factors are not stored, but sampled from their seed at each use."""
        return self.__dict__["_buffers"].get(DRAW) is not None

    @property
    def rate_sampling(self) -> RateSampling | None:
        """What the factors are sampled from at each use, None where they are stored."""
        return self.__dict__.get("_sampling") if self.is_drawn else None

    @property
    def stored_factors(self) -> Tensor | None:
        """The buffer that holds the factors, None where none are stored."""
        return self._buffers[FACTORS]

    @property
    def has_factors(self) -> bool:
        """Whether it has factors, in whatever form."""
        return self.is_drawn or self.stored_factors is not None

    @property
    def has_rates(self) -> bool:
        """Whether its learning rate is multiplied: by factors, or by what crystallization made of 1."""
        buffers = self._buffers
        has_factors = buffers[FACTORS] is not None or buffers[DRAW] is not None
        return has_factors or self.memory.dampening is not None

    def zero_rates(self) -> Tensor | None:
        """Return where the learning rate is 0, bool, shaped like the weight; None if it is nowhere."""
        if self.is_drawn and self.config.fuzzy_lr_bounds[0] > 0:
            return None
        factors = self.fuzzy_learning_rate_parameters
        if factors is None or not self.has_zeros(factors):
            return None
        return (factors == 0).expand(self.weight.shape)

    def has_zeros(self, factors: Tensor) -> bool:
        """Whether some of the factors are 0.

        Args:
            factors: all of them, or a part. Where they are on a device, it is asked once, and again when
                they have been written to.
        """

        def least_is_zero(held: Tensor) -> bool:
            return held.numel() > 0 and float(held.min()) <= 0  # in a tenth of the time of any()

        if is_on_host(factors):
            return least_is_zero(factors)
        known: FoundOut[bool] = self.__dict__.setdefault("_zeros", FoundOut())
        return known.of(factors, least_is_zero)

    @torch.no_grad()
    def start_utility(self, places: Tensor) -> None:
        """Give new weights the mean utility of the others, where utilities are kept and one was seen.

        Args:
            places: which are new, bool, shaped like the weight.
        """
        if (utility := self.utility) is None or float(utility.flatten()[0]) < 0:
            return
        mask = self.connection_mask
        others = ~places if mask is None else ~places & existing(mask)
        total = torch.where(others, utility, 0).sum()
        utility.copy_(torch.where(places, total / others.count_nonzero().clamp(min=1), utility))

    @property
    def is_stepped_plainly(self) -> bool:
        """Whether an optimizer's step is left as it is, but for rules on weights, and no gradient is used."""
        held = self.__dict__
        buffers = held["_buffers"]
        return (
            buffers[FACTORS] is buffers[DRAW] is buffers[UTILITY] is held["connection_probe"] is None
            and held["memory"].dampening is None
            and held["gradient_level"] == 1
        )

    def __getattr__(self, name: str) -> Any:
        if name == FACTORS and "_buffers" in self.__dict__ and (sampling := self.rate_sampling) is not None:
            # torch refuses to write to an inference tensor: what is written to a copy would be lost
            with torch.inference_mode():
                return sampling.factors(self.weight.shape, self.weight.device)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == FACTORS and self.is_drawn:
            raise PlasticityError(
                f"{self.path!r}: its factors are sampled from their seed at each use (fuzzy_lr_dtype='seed') "
                "and cannot be assigned; transform the model with fuzzy_lr_dtype='float32'"
            )
        super().__setattr__(name, value)
        if name == FACTORS and self._buffers.get(DIVERSITY) is not None:
            self._buffers[DIVERSITY] = None if value is None else value.clone()

    def forget_factors(self) -> None:
        """Remove the factors, in whatever form they are."""
        self._buffers.update(dict.fromkeys((*RATE_BUFFERS, DIVERSITY)))

    def start_factors(self, sampling: RateSampling, form: str, weight: Tensor) -> None:
        """Sample factors, in place of any others.

        Args:
            sampling: what they are sampled from.
            form: one of :data:`biofx.config.RATE_DTYPES`: ``"seed"`` samples them at each use, instead of
                storing them.
            weight: of this state, also where it is computed.

        Raises:
            OptionError: next to nothing of the distribution lies in the bounds.
        """
        self.noise = self.diversity = None
        self.__dict__["_started_from"] = sampling
        if form == FROM_SEED:
            self.__dict__["_sampling"] = sampling
            self._buffers.update({FACTORS: None, DRAW: sampling.to_tensor(weight.device)})
            return
        mask = self.connection_mask
        factors, noise = sampling.sample(weight, None if mask is None else existing(mask))
        stored = stored_as(form, factors, *self.config.fuzzy_lr_bounds)
        self._buffers.update({FACTORS: stored, DRAW: None})
        if form == "float32":  # dynamic factors have no other form
            self.noise = noise

    # moving

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BioState:
        """Move and convert like any module; signs, masks and what follows from the graph keep their values.

        Values of other buffers are lost on the way over the meta device, until a state is loaded.
        """
        values: dict[str, Tensor] = self.__dict__["_values_of_meta"]
        empty = {name for name, held in self._buffers.items() if held is not None and held.is_meta}
        tables = [(self._buffers, _OF_UNITS), (self.__dict__, _DERIVED)]
        for table, names in tables:
            values.update({name: table[name] for name in names if _has_values(table[name])})
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in (*_OF_TURNOVER, *HELD_BACK):  # running means with steps too small for half precision
            held = self._buffers[name]
            if held is not None and held.is_floating_point() and held.element_size() < _FULL:
                self._buffers[name] = held.float()
        for name in _DERIVED:
            if (held := self.__dict__[name]) is not None:
                self.__dict__[name] = fn(held.detach()).requires_grad_(held.requires_grad)
        self.memory.apply(fn)
        for table, names in tables:
            for name in names:
                if name in values and _has_values(table[name]):
                    table[name] = values.pop(name).to(table[name])
                    empty.discard(name)
        filled = [name for name in self._buffers if name in empty and _has_values(self._buffers[name])]
        if DRAW in filled:
            self._buffers[DRAW] = self._own()[DRAW]
            filled.remove(DRAW)
        if filled:
            self.__dict__["_lost"] = filled
        return self

    # saving and loading

    def get_extra_state(self) -> Tensor:
        """Return counts and the memory of each unit as one tensor that always has one size."""
        return self.memory.to_tensor(self.units)

    def set_extra_state(self, state: Any) -> None:
        """Load what :meth:`get_extra_state` returned, unless it has been averaged."""
        self.memory.take(state, self.units, self.parameter if self.is_linked else None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if _has_values(destination.get(prefix + DRAW)):
            destination[prefix + DRAW] = self._own()[DRAW]
        if not self.saves_memory:
            destination.pop(prefix + EXTRA, None)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if all(SUB_WEIGHT in name for name in saved):  # none of its own, as in a state of the original
            missing_keys += [prefix + name for name in self.__dict__["_lost"]]
            return
        weight, own = self.parameter if self.is_linked else None, self._own()
        try:
            refuse_codes(prefix + name for name in saved)
            saved, dampening = with_current_keys(saved, own, weight, self.units)
            saved = self.with_own_form(without_averages(saved, own))
        except PlasticityError as error:
            error_msgs.append(f"{self.path!r}: {error}")
            return
        if dampening is not None:
            self.memory.dampening = dampening
        if not self.saves_memory:
            self.set_extra_state(saved.pop(EXTRA, None))
        current = {prefix + name: value for name, value in saved.items()}
        missing: list[str] = []
        super()._load_from_state_dict(
            current, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [key for key in missing if key != prefix + EXTRA]
        self.__dict__["_lost"] = []

    def with_own_form(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return a saved state with the factors in the form in which this layer keeps its own.

        Args:
            saved: the state's entries by their names in it; not changed.

        Raises:
            PlasticityError: the layer samples its factors, and they differ from the saved ones.
        """
        kept = dict(saved)
        if self.config.fuzzy_lr_dtype != "float32" and self.noise is None:
            kept.pop("noise", None)  # the random part of dynamic factors, which are float32
        weight = self.parameter if self.is_linked else None
        low, high = self.config.fuzzy_lr_bounds
        held = converted(
            {name: kept.pop(name, None) for name in RATE_BUFFERS},
            form_of(self._buffers),
            self.rate_sampling,
            shape=torch.Size() if weight is None else weight.shape,
            low=low,
            high=high,
        )
        return kept | {name: tensor for name, tensor in held.items() if tensor is not None}

    def _own(self) -> dict[str, Tensor | None]:
        """Return the buffers, with the true numbers that factors are sampled from, whatever was averaged."""
        own, sampling = dict(self._buffers), self.rate_sampling
        if sampling is not None and (numbers := own[DRAW]) is not None:
            own[DRAW] = sampling.to_tensor(torch.device("cpu") if numbers.is_meta else numbers.device)
        return own


def _has_values(tensor: Tensor | None) -> bool:
    return tensor is not None and not tensor.is_meta


def _shares_out(frame: FrameType | None) -> bool:
    """Whether modules are asked for by torch as it shares out a layer.

    Args:
        frame: that asks for them, or one inside it.
    """
    while frame is not None and frame.f_code in _WALKS:
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("torch.distributed.tensor.")


_WALKS = frozenset(
    method.__code__ for method in (nn.Module.named_modules, members_of_modules, nn.Module.named_parameters)
)
"""The code of the methods that walk over the modules in a module."""
