"""What Python does around tensors: branches, loops, arguments, containers, functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from idioms.body import Body


class LengthOfATensor(Body):
    """``len(x)`` in arithmetic."""

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x)) / len(x)


class IteratesOverATensor(Body):
    """A loop over the batch."""

    def forward(self, x: Tensor) -> Any:
        return torch.stack([self.out(self.fc(row)) for row in x])


class UnpacksATensor(Body):
    """A tensor taken apart along an axis of known size."""

    def forward(self, x: Tensor) -> Any:
        a, b, c = self.out(self.fc(x)).unbind(-1)
        first, *rest = torch.stack([a, b, c])
        return first + sum(rest)


class LoopOverSteps(nn.Module):
    """A recurrent loop over the length."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        state = x.new_zeros(x.size(0), 6)
        outputs = []
        for step in range(x.size(1)):
            state = self.cell(x[:, step], state)
            outputs.append(self.out(state))
        return torch.stack(outputs, 1)


class BranchesByValue(Body):
    """A branch that data decide."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        if hidden.mean() > 0:
            hidden = hidden * 2
        return self.out(hidden)


class LoopsByValue(Body):
    """As many rounds as it takes."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        rounds = 0
        while hidden.norm() > 1 and rounds < 5:
            hidden = hidden / 2
            rounds += 1
        return self.out(hidden), rounds


class ReadsANumber(Body):
    """``item()`` in arithmetic."""

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x)) * x.abs().max().item()


class BranchesByShape(Body):
    """A branch that the number of axes or the size decides."""

    def forward(self, x: Tensor) -> Any:
        if x.dim() == 2 and x.size(-1) == 4:
            x = x[:, None]
        if x.shape[0] > 2:
            x = x * 2
        return self.out(self.fc(x)).squeeze(1)


class AssertsShapes(Body):
    """The model's own checks."""

    def forward(self, x: Tensor) -> Any:
        assert x.ndim == 2, "expected features"
        if x.shape[1] != 4:
            raise ValueError(f"expected 4 features, found {x.shape[1]}")
        return self.out(self.fc(x))


class AsksForTypes(Body):
    """A forward that takes a tensor or a list."""

    def forward(self, x: Any) -> Any:
        parts = [x] if isinstance(x, Tensor) else list(x)
        return self.out(self.fc(torch.cat(parts)))


class MatchesTypes(Body):
    """A forward that matches what it is given."""

    def forward(self, x: Any) -> Any:
        match x:
            case Tensor():
                return self.out(self.fc(x))
            case [first, *_]:
                return self.out(self.fc(first))
        return None


class _Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor, *, gain: float = 1.0, mask: Tensor | None = None, **more: Any) -> Any:
        hidden = self.fc(x) * gain
        if mask is not None:
            hidden = hidden * mask
        return (hidden, more) if more.get("all") else hidden


class JugglesKeywords(nn.Module):
    """Keyword arguments that are gathered, changed and passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Options()
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor, **options: Any) -> Any:
        options = {"gain": 2.0, **options, "mask": torch.ones(6)}
        hidden = self.inner(x, **{key: value for key, value in options.items() if value is not None})
        return self.out(hidden)


class OptionalArguments(Body):
    """Arguments that are left out."""

    def forward(self, x: Tensor, mask: Tensor | None = None, mode: str = "sum", twice: bool = False) -> Any:
        hidden = self.fc(x) if mask is None else self.fc(x * mask)
        scores = self.out(hidden * 2 if twice else hidden)
        return scores.sum(-1) if mode == "sum" else scores


class AnyNumberOfArguments(Body):
    """Arguments that are gathered."""

    def forward(self, *inputs: Tensor) -> Any:
        return self.out(self.fc(sum(inputs)))


class NestedInputs(Body):
    """Tensors in a dict in a list."""

    def forward(self, batch: dict[str, Any]) -> Any:
        first, (second, scale) = batch["x"], batch["rest"]
        return self.out(self.fc(first + second) * scale)


class Chosen(nn.Module):
    """A layer looked up by its name, in a dict of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
        self.kind = "b"

    def forward(self, x: Tensor) -> Any:
        layer: nn.Module = getattr(self.kinds, self.kind)
        return layer(x) + self.kinds["a"](x)


class Closures(Body):
    """Functions made in the forward and in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.activation: Callable[[Tensor], Tensor] = functools.partial(
            nn.functional.leaky_relu, negative_slope=0.2
        )
        self.scale: Callable[[Tensor], Tensor] = lambda x: x * 0.5

    def forward(self, x: Tensor) -> Any:
        def through(layer: nn.Module, value: Tensor) -> Tensor:
            return self.scale(self.activation(layer(value)))

        return functools.reduce(lambda value, layer: through(layer, value), (self.fc, self.out), x)


class Generators(Body):
    """Values that a generator yields."""

    def _parts(self, x: Tensor) -> Iterator[Tensor]:
        yield self.fc(x)
        yield from (self.fc(x * factor) for factor in (2, 3))

    def forward(self, x: Tensor) -> Any:
        return self.out(sum(self._parts(x)))


class Recursion(Body):
    """A module that calls itself by way of a method."""

    def _deeper(self, x: Tensor, depth: int) -> Tensor:
        return x if depth == 0 else self._deeper(self.fc(x)[:, :4].tanh(), depth - 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(self._deeper(x, 3)))


def _checked(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    return wrapper


class DecoratedForward(Body):
    """A decorator that looks at what the forward returns."""

    @_checked
    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.out(self.fc(x) * scale), x


class TriesFirst(Body):
    """What fails is done another way."""

    def forward(self, x: Tensor) -> Any:
        try:
            hidden = self.fc(x[:, :7].view(x.shape[0], 7))
        except RuntimeError:
            hidden = self.fc(x)
        return self.out(hidden)


class FailsFirst(Body):
    """What fails in batches of an even size is done another way."""

    def forward(self, x: Tensor) -> Any:
        try:
            hidden = self.fc(x.view(-1, 3, 4)[:, 0]).mean(0)
        except RuntimeError:
            hidden = self.fc(x)
        return self.out(hidden)


class ReplacedForward(Body):
    """A forward put on the instance."""

    def __init__(self) -> None:
        super().__init__()
        before = self.fc.forward
        vars(self.fc)["forward"] = lambda x: before(x) * 2

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x))


class CallsForward(Body):
    """``forward`` called by its name, which leaves hooks out."""

    def forward(self, x: Tensor) -> Any:
        return self.out.forward(self.fc.forward(x))


class OwnMethods(Body):
    """Layers of which other methods than the forward are called."""

    def encode(self, x: Tensor) -> Tensor:
        """Return the hidden features."""
        return self.fc(x).relu()  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Any:
        return self.out(self.encode(x))


IDIOMS = (
    *(LengthOfATensor, IteratesOverATensor, UnpacksATensor, BranchesByValue, LoopsByValue, ReadsANumber),
    *(BranchesByShape, AssertsShapes, AsksForTypes, MatchesTypes, JugglesKeywords, OptionalArguments),
    *(AnyNumberOfArguments, Chosen, Closures, Generators, Recursion, DecoratedForward, TriesFirst),
    *(FailsFirst, ReplacedForward, CallsForward, OwnMethods),
)
