"""What passes did, in torch's structured trace, beside what the compiler did.

torch writes it where the environment variable ``TORCH_TRACE`` names a folder; tools such as ``tlparse`` show
it.
"""

from __future__ import annotations

from collections.abc import Callable

from biofx.torch_private import trace_structured


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Write a text to the structured trace; it is not made where nobody asks for one.

    Args:
        name: under which it is shown.
        text: returns it.
    """
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
        expect_trace_id=False,
    )
