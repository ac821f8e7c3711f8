"""Memory and traffic of a step on many ranks, from the shapes of the parameters.

What one rank holds: weights, gradients and the moments of Adam, all float32; and what a mechanism keeps of
each weight. What one rank has in memory for a while: the weights that a forward gathers. A graph that biofx
makes reads weights without calling the blocks that hold them, so that all of a sharded model is gathered at
once, and as large a gradient made; that is the largest part of the memory of a sharded step.

Traffic is what one rank sends in a step, with rings: of a tensor of N bytes on n ranks a sum takes
2 N (n - 1) / n, gathering it or scattering its sum N (n - 1) / n.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from simulate.transformers import SIZES, Parameter, Transformer

FLOAT = 4
"""Bytes of a float32."""
NODE = 8
"""Ranks of a node: those between which HSDP shards, or that compute a layer in parts."""


@dataclass(frozen=True)
class Mesh:
    """How a model lies on ranks."""

    replicas: int = 1
    """Groups that each hold the whole model (DDP, HSDP)."""
    shards: int = 1
    """Ranks that share out weights (FSDP2)."""
    parts: int = 1
    """Ranks that compute a layer in parts (tensor parallel)."""

    @property
    def ranks(self) -> int:
        """All of them, a count."""
        return self.replicas * self.shards * self.parts

    def entries_of_part(self, parameter: Parameter) -> int:
        """Return the entries of a parameter that the forward of one rank computes with."""
        split = self.parts > 1 and parameter.split is not None
        return parameter.entries // self.parts if split else parameter.entries

    def entries_held(self, parameter: Parameter) -> int:
        """Return the entries of a parameter that the first rank holds, which has the most."""
        shape = list(parameter.shape)
        if self.parts > 1 and parameter.split is not None:
            shape[parameter.split] //= self.parts
        rows = -(-shape[0] // self.shards)
        others = 1
        for size in shape[1:]:
            others *= size
        return parameter.count * rows * others


@dataclass(frozen=True)
class Mechanism:
    """What a mechanism keeps of a weight, in bytes an entry."""

    sharded: int = 0
    """Of the entries that a rank holds."""
    of_units: tuple[int, int] = (0, 0)
    """Of each unit that the weight makes, and of each that it reads; every rank has all of them."""
    of_lookups: bool = True
    """Whether it acts on weights whose rows are looked up."""


MECHANISMS = {
    "plain": Mechanism(),
    "rates": Mechanism(sharded=FLOAT),
    "rates, bfloat16": Mechanism(sharded=2),
    "rates from their seed": Mechanism(),
    "signs": Mechanism(of_units=(FLOAT, 0)),
    "masks": Mechanism(sharded=FLOAT, of_lookups=False),
    "crystallization of rates": Mechanism(sharded=FLOAT),
    "temporal rates": Mechanism(sharded=2 * FLOAT),
    "rates that follow weights": Mechanism(sharded=3 * FLOAT),
    "synaptic scaling": Mechanism(of_units=(FLOAT, 0)),
    "rejuvenation by gradient": Mechanism(sharded=FLOAT),
    "synaptic intelligence": Mechanism(sharded=3 * FLOAT),
    "elastic consolidation": Mechanism(sharded=3 * FLOAT),
    "memory-aware": Mechanism(sharded=2 * FLOAT),
    "UPGD": Mechanism(sharded=FLOAT),
    "pull to the initial weight": Mechanism(sharded=FLOAT),
}
"""Each by itself; what rules keep besides is in the layer's counters, a few numbers."""


@dataclass(frozen=True)
class Step:
    """What one rank holds, has for a while and sends in a step, in bytes."""

    held: int
    gathered: int
    sent: float
    kept: dict[str, int] = field(default_factory=dict)
    """What each mechanism adds to what is held."""


def step_of(model: Transformer, mesh: Mesh, *, words: int = 0) -> Step:
    """Return what a step takes on one rank.

    Args:
        model: what is trained.
        mesh: of how many ranks.
        words: of one rank's batch, a count, for the activations that parts of a layer exchange.
    """
    parameters = list(model.parameters())
    held = 4 * FLOAT * sum(map(mesh.entries_held, parameters))
    computed = FLOAT * sum(map(mesh.entries_of_part, parameters))
    gathered = 2 * computed if mesh.shards > 1 else 0
    return Step(
        held,
        gathered,
        traffic(model, mesh, words=words),
        {name: kept_by(mechanism, parameters, mesh) for name, mechanism in MECHANISMS.items()},
    )


def kept_by(mechanism: Mechanism, parameters: Iterable[Parameter], mesh: Mesh) -> int:
    """Return the bytes that a mechanism keeps on one rank."""
    total = 0
    for parameter in parameters:
        if parameter.has_rates and (mechanism.of_lookups or not parameter.is_lookup):
            total += mechanism.sharded * mesh.entries_held(parameter)
            of_units = zip(mechanism.of_units, parameter.shape, strict=True)
            total += parameter.count * sum(size * units for size, units in of_units)
    return total


def collectives(model: Transformer, mesh: Mesh, *, words: int = 0) -> dict[str, int]:
    """Return the bytes of the tensors that go through each kind of collective in a step.

    Args:
        model: what is trained.
        mesh: of how many ranks.
        words: of one rank's batch, a count.
    """
    computed = FLOAT * sum(map(mesh.entries_of_part, model.parameters()))
    padded = FLOAT * mesh.shards * sum(map(mesh.entries_held, model.parameters()))
    found = {"gathered": 0, "scattered": 0, "summed": 0, "summed in parts": 0}
    if mesh.shards > 1:  # gathered once: the model stays whole between its forward and its backward
        found["gathered"] = found["scattered"] = padded
    if mesh.replicas > 1:
        found["summed"] = padded // mesh.shards if mesh.shards > 1 else computed
    if mesh.parts > 1:  # behind attention and behind the two layers, forwards; in front of them, backwards
        of_a_block = 2 + 4  # queries, keys, values and the first of two layers each have a sum of their own
        found["summed in parts"] = FLOAT * model.blocks * of_a_block * words * model.width
    return found


def traffic(model: Transformer, mesh: Mesh, *, words: int = 0) -> float:
    """Return the bytes that one rank sends in a step, with rings."""
    found = collectives(model, mesh, words=words)
    sent = (found["gathered"] + found["scattered"]) * (mesh.shards - 1) / mesh.shards
    sent += 2 * found["summed"] * (mesh.replicas - 1) / mesh.replicas
    return sent + 2 * found["summed in parts"] * (mesh.parts - 1) / mesh.parts


def meshes(ranks: int) -> dict[str, Mesh]:
    """Return the ways in which a model lies on some ranks."""
    return {
        "DDP": Mesh(replicas=ranks),
        "FSDP2": Mesh(shards=ranks),
        "HSDP": Mesh(replicas=ranks // NODE, shards=NODE),
        "FSDP2 and TP": Mesh(shards=ranks // NODE, parts=NODE),
    }


_SHOWN = ("rates", "rates, bfloat16", "signs", "masks", "synaptic intelligence")


def table(size: str, *, words: int = 4096) -> str:
    """Return the table of one size of model, in gigabytes (10⁹ bytes) on a rank.

    Args:
        size: one of :data:`~simulate.transformers.SIZES`.
        words: of one rank's batch, a count.
    """
    model = SIZES[size]
    rows = [["ranks", "mesh", "held", "gathered", "sent", *_SHOWN]]
    for ranks in (8, 64, 512, 1024):
        for name, mesh in meshes(ranks).items():
            step = step_of(model, mesh, words=words)
            numbers = [step.held, step.gathered, step.sent, *(step.kept[shown] for shown in _SHOWN)]
            rows.append([str(ranks), name, *(shown(number) for number in numbers)])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([f"{size}: {model.entries / 1e9:.1f} · 10⁹ parameters, gigabytes on a rank", *lines])


def shown(count: float) -> str:
    """Return bytes in gigabytes, with three digits."""
    return f"{count / 1e9:.3g}" if count >= 1e6 else "0" if not count else "<0.001"


def mechanisms_table(size: str, ranks: int = 64) -> str:
    """Return what each mechanism keeps on one of some ranks, in gigabytes."""
    found = {name: step_of(SIZES[size], mesh).kept for name, mesh in meshes(ranks).items()}
    rows = [["", *found]]
    rows += [
        [name, *(shown(kept[name]) for kept in found.values())] for name in MECHANISMS if name != "plain"
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([f"{size} on {ranks} ranks: gigabytes that a mechanism keeps on each", *lines])


def main() -> None:
    """Print the tables."""
    print("\n\n".join([*map(table, SIZES), *map(mechanisms_table, SIZES)]))
