"""Which passes there are: those of ``biofx.passes``, and those that other packages register.

A package registers a pass through an entry point of the group ``biofx.passes``::

    [project.entry-points."biofx.passes"]
    my-pass = "my_package.my_pass:MyPass"
"""

from __future__ import annotations

from importlib.metadata import entry_points

from biofx.errors import PipelineError, suggest
from biofx.rewriting.pass_base import Pass

GROUP = "biofx.passes"
_built_in: dict[str, type[Pass]] = {}


def register_built_in(*passes: type[Pass]) -> None:
    """Add passes of the package ``biofx.passes``, which does so itself."""
    _built_in.update({cls.name: cls for cls in passes})


def built_in_passes() -> dict[str, type[Pass]]:
    """Return the passes of ``biofx.passes`` by name, without looking at what else is installed."""
    return dict(_built_in)


def available_passes() -> dict[str, type[Pass]]:
    """Return every known pass by name, the built-in ones first.

    Raises:
        PipelineError: an installed entry point does not lead to a pass, or takes a name that is taken.
    """
    known = built_in_passes()
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
        except Exception as error:
            raise PipelineError(
                f"the entry point {entry.name!r} = {entry.value!r} cannot be loaded: {error}"
            ) from error
        name = getattr(loaded, "name", None)
        is_pass = isinstance(loaded, type) and issubclass(loaded, Pass) and isinstance(name, str)
        if not is_pass or known.get(loaded.name, loaded) is not loaded:
            raise PipelineError(
                f"the entry point {entry.name!r} = {entry.value!r} must name a biofx.Pass whose name is free"
            )
        known[loaded.name] = loaded
    return known


def find_pass(name: str) -> type[Pass]:
    """Return the pass of that name.

    Raises:
        PipelineError: there is none; the message names the nearest.
    """
    known = available_passes()
    if name not in known:
        hint = suggest(name, known) or f"; there are {', '.join(known)}"
        raise PipelineError(f"unknown pass {name!r}{hint}")
    return known[name]
