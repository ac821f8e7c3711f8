"""The weights that layers use, computed from the parameters as the graph does, and the signs of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from biofx.diagnostics.check_signs import SignCount, count_signs, laid_out_signs, wrong_signs
from biofx.layers.constant_part import ConstantPart, Treatment, WeightUse, weight_uses
from biofx.plasticity.bio_module import BioModule


def effective_weights(graph_module: GraphModule, states: Mapping[str, BioModule]) -> dict[str, Effective]:
    """Return how each weight of ``states`` becomes the one that its layer uses, by path."""
    constants = ConstantPart(graph_module)
    uses: dict[int, list[WeightUse]] = {}
    for use in weight_uses(constants):
        uses.setdefault(id(use.parameter), []).append(use)
    return {
        path: Effective(state, constants, uses.get(id(state.parameter), [])) for path, state in states.items()
    }


class Effective:
    """Computes from a parameter the weight that its layer uses, of the same shape, and counts its signs.

    Of a weight that is used in several ways, the first one that is constrained as a whole is meant, or
    else the first one.
    """

    def __init__(self, state: BioModule, constants: ConstantPart, uses: list[WeightUse]) -> None:
        self._state, self._constants, self._uses = state, constants, uses
        signed = [use for use in uses if use.constraints]
        whole = [use for use in signed if use.before is Treatment.NOTHING]
        self._use = next(iter(whole or uses), None)
        self._constraints = list(dict.fromkeys(node for use in signed for node in use.constraints))
        self._is_whole = bool(whole) and len(self._constraints) == 1

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer uses where the parameter is ``weight``.

        Where the graph slices or folds the weight afterwards, the weight before that is returned.

        Raises:
            InvariantError: the graph's expression cannot be computed.
        """
        if self._use is None:
            return weight
        used: Tensor = self._constants.value(self._use.whole, self._given(weight))
        return used

    def count_signs(self, weight: Tensor, used: Tensor) -> SignCount | None:
        """Count the synapses with a sign, None where there are none.

        The signs are those of the graph's constraints, or of the state where the graph has none.

        Args:
            weight: the parameter.
            used: what :meth:`__call__` made of it.

        Raises:
            InvariantError: the signs cannot be computed, or do not fit.
        """
        if not self._constraints:
            signs = self._state.signs()
        elif self._is_whole:
            signs = laid_out_signs(self._constants, self._constraints[0], weight)
        else:
            given = self._given(weight)
            counts = [
                count_signs(
                    self._constants, node, [use for use in self._uses if node in use.constraints], given
                )
                for node in self._constraints
            ]
            return sum(counts, SignCount())
        if signs is None:
            return None
        return SignCount(used.numel(), wrong_signs(used, signs), wrong_signs(weight, signs))

    def _given(self, weight: Tensor) -> dict[Node, Any]:
        if self._use is None:
            return {}
        return dict.fromkeys(self._constants.roots(self._use.parameter), weight)
