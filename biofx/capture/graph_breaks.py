"""Graph breaks: why a module cannot be part of a graph, and how that ends the tracing of it.

A module at which a graph breaks keeps its eager forward, and becomes one call in the graph around it. The
reason is what a user reads in ``graph_breaks`` of the result, or in a :class:`biofx.errors.CaptureError` with
``regions=False``.

Reasons that have to do with values of tensors are here, and those that both tracers give. The others are
written where they are found: what a node cannot hold in ``graph_builder.py``, arguments in
``graph_signature.py``, contexts in ``context_tracking.py``, and what modules do in the two tracers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import nn

from biofx.capture.bytecode import method_running
from biofx.errors import CaptureError
from biofx.graph.regions import joined_path

DECIDES_BY_VALUE = "decides by a value, which is not known before the graph runs"
DECIDES_BY_STORED_VALUE = "decides by the value of a tensor, which may change after the capture"
ASKS_FOR_VALUE = "asks for the value of a tensor ({})"
COMPARES_IDENTITIES = "asks whether two values are the same object, which no graph can say"
OPENS_CONTEXT = (
    "works under a context (torch.inference_mode, a default dtype, a seed, gradients switched without with, "
    "…), which a graph would drop"
)
OWN_APPLY = "calls {}, an autograd function with an apply() of its own"
REBUILT = "gets other parameters or modules in train() or eval(), and so keeps its eager forward"
SWITCHED = "reads attribute {!r}, which train() or eval() sets to what a graph cannot follow"
READS_OUTSIDE = "reads attribute {!r} of a module outside of it"
TOUCHES_STATE = (
    "touches state that a module with an eager forward keeps from call to call, which a graph would not do"
)


class GraphBreak(BaseException):
    """A module keeps its eager forward.

    No ``Exception``, so that no ``except Exception`` of the model catches it.

    Args:
        path: of the module.
        reason: why.
        all_alike: whether the reason lies in the module's class.
    """

    def __init__(self, path: str, reason: str, *, all_alike: bool = False) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason
        self.all_alike = all_alike


class RestartTracing(BaseException):
    """A module at which the graph breaks is part of the graph already, by an earlier call that was traced."""

    def __init__(self, kept: dict[str, str]) -> None:
        super().__init__()
        self.kept = kept


def describe(path: str, module: nn.Module) -> str:
    """Return what a message calls a module, by its path in the whole model."""
    kind = type(module).__name__
    return f"module {path!r} ({kind})" if path else f"the model ({kind})"


class Refusals:
    """The errors of one symbolic trace, which knows no graph breaks: it is restarted without the module.

    Args:
        root: the module that is traced.
        prefix: path of it in the whole model.
        innermost: returns the path, in ``root``, of the module that is running.
    """

    def __init__(self, root: nn.Module, prefix: str, innermost: Callable[[], str]) -> None:
        self.errors: list[CaptureError] = []
        """All that were raised; the model may have caught them."""
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._prefix = prefix
        self._innermost = innermost
        self._paths = {id(module): path for path, module in root.named_modules()}

    def refuse(self, what: str, remedy: str | None = None) -> NoReturn:
        """Raise an error for what the running line does."""
        path = joined_path(self._prefix, self._innermost())
        opaque = (
            f"name the module in opaque=[{path!r}] to keep it as one call"
            if path
            else "put the lines in a submodule and name that in opaque=[…]"
        )
        self._raise(f"{self.where()} {what}. {f'{remedy}, or {opaque}' if remedy else opaque.capitalize()}")

    def refuse_call(self, path: str, what: str) -> NoReturn:
        """Raise an error for a call of a module, which is not running yet."""
        opaque = f"name it in opaque=[{joined_path(self._prefix, path)!r}] to keep it as one call"
        self._raise(f"{self.describe(path)} {what}, or {opaque}")

    def of(self, error: Exception) -> CaptureError:
        """Return the error for an exception that came out of a forward."""
        if isinstance(error, CaptureError):
            return error
        return CaptureError(
            f"cannot capture {self.where(error)}: {error}; what Python decides from values cannot be part of "
            "a graph. Rewrite that line, or name the module in opaque=[…] to keep it as one call"
        )

    def where(self, error: Exception | None = None) -> str:
        """Return the innermost module of which code is running, or raised an exception, and the line."""
        found = method_running(error, self._paths)
        if found is None:
            return "the model's forward"
        module, line = found
        described = self.describe(self._paths[id(module)])
        return f"{described}, {line}" if line else described

    def describe(self, path: str) -> str:
        """Return what a message calls a module, by its path in the one that is traced."""
        return describe(joined_path(self._prefix, path), self._modules[path])

    def _raise(self, message: str) -> NoReturn:
        self.errors.append(CaptureError(message))
        raise self.errors[-1]
