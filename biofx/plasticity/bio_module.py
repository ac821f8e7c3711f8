"""What a layer remembers about its synapses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class BioModule(nn.Module):
    """State of one weight's plasticity, kept in the layer as ``layer.bio_mod``.

    Buffers, each there only if a pass needs it; both are saved in the state dict and neither is trained:

    ``fuzzy_learning_rate_parameters``
        One learning-rate factor per synapse, dimensionless, shaped like the weight.
    ``sign``
        +1 for an excitatory and -1 for an inhibitory presynaptic unit, 0 where unconstrained;
        int8, shape ``(units,)``.

    A checkpoint of the original model has none of these keys; loading it leaves the state as it is.
    """

    fuzzy_learning_rate_parameters: Tensor | None
    sign: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fuzzy_learning_rate_parameters", None)
        self.register_buffer("sign", None)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def bio_module_path(parameter_path: str) -> str:
    """Return where a weight's state is kept: ``bio_mod`` beside ``weight``, else a place named after it.

    >>> bio_module_path("layer1.0.conv1.weight"), bio_module_path("encoder.projection")
    ('layer1.0.conv1.bio_mod', 'encoder.bio_mod.projection')
    """
    owner, _, name = parameter_path.rpartition(".")
    parts = [owner] if owner else []
    return ".".join([*parts, "bio_mod"] if name == "weight" else [*parts, "bio_mod", name])


def bio_module_at(model: nn.Module, parameter_path: str) -> BioModule:
    """Return the state of a weight, made if it is not there yet."""
    module: nn.Module = model
    for part in bio_module_path(parameter_path).split("."):
        found = module._modules.get(part)
        inside = part == "bio_mod" or isinstance(module, BioModule)
        if found is None and inside:
            found = BioModule()
            module.add_module(part, found)
        if found is None:
            raise AttributeError(
                f"{type(module).__name__} has no module {part!r} on the way to {parameter_path!r}"
            )
        module = found
    if not isinstance(module, BioModule):
        raise AttributeError(f"{bio_module_path(parameter_path)!r} is taken by a {type(module).__name__}")
    return module
