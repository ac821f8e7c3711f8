"""State that a module called as a whole keeps in its attributes, and that the forward around it may touch.

A spiking neuron keeps its membrane potential, the forward around it resets or returns that. A graph would
do neither: at capture the attribute holds its first value, which becomes a constant, and writing that value
again leaves no trace. So such attributes are taken away while the forward around is traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from biofx.capture.python_names import attributes_changed
from biofx.errors import CaptureError


class Unknown:
    """Stands for an attribute whose value is another one at every call; refuses to be used."""

    def __init__(self, owner: str, name: str) -> None:
        vars(self)["_refusal"] = (
            f"uses attribute {name!r} of module {owner!r}, which keeps its own forward and changes that "
            "whenever it is called; a graph would keep one value. Let the module return it"
        )

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise CaptureError(vars(self)["_refusal"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise CaptureError("uses an attribute of a module that keeps its own forward and changes it")

    def __getattr__(self, name: str) -> Any:
        self._refuse()


for _name in (
    *("bool", "call", "contains", "delitem", "enter", "float", "format", "getitem", "index", "int", "iter"),
    *("len", "setitem", "str", "abs", "neg", "pos", "invert"),
    *("eq", "ge", "gt", "le", "lt", "ne"),
    *(
        prefix + operation
        for operation in (
            "add",
            "and",
            "floordiv",
            "matmul",
            "mod",
            "mul",
            "or",
            "pow",
            "sub",
            "truediv",
            "xor",
        )
        for prefix in ("", "r", "i")
    ),
):
    setattr(Unknown, f"__{_name}__", Unknown._refuse)
Unknown.__hash__ = object.__hash__  # type: ignore[method-assign]


class Unknowns:
    """The attributes that modules inside a model, which become one call each, may change in themselves."""

    def __init__(self, root: nn.Module, whole: Iterable[str]) -> None:
        self._replaced: list[tuple[dict[str, Any], str, Any, Unknown]] = []
        self._root = root
        self._whole = whole

    @contextmanager
    def in_place(self) -> Iterator[bool]:
        """Put an :class:`Unknown` in the place of each; yields whether there are any."""
        seen: set[int] = set()
        for path in self._whole:
            for inner, module in self._root.get_submodule(path).named_modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    self._replace(f"{path}.{inner}" if inner else path, module)
        try:
            yield bool(self._replaced)
        finally:
            for holder, name, value, unknown in self._replaced:
                if holder.get(name) is unknown:
                    holder[name] = value
            self._replaced.clear()

    def are_touched(self) -> bool:
        """Whether a forward has given one of them another value."""
        return any(holder.get(name) is not unknown for holder, name, _, unknown in self._replaced)

    def _replace(self, path: str, module: nn.Module) -> None:
        changed = attributes_changed(module)
        own = {name: value for name, value in vars(module).items() if name not in _TORCHS_OWN}
        for holder in (vars(module), *(value for value in own.values() if type(value) is dict)):
            for name in changed & holder.keys() - _TORCHS_OWN:
                unknown = Unknown(path, name)
                self._replaced.append((holder, name, holder[name], unknown))
                holder[name] = unknown


_TORCHS_OWN = frozenset(vars(nn.Module()))
