"""biofx inside of ``torch.compile``: a backend, and the state of what was compiled."""

from biofx.compiling.backend import Backend, backend
from biofx.compiling.inductor_pass import InductorPass, inductor_pass
from biofx.compiling.rewriter import companion

__all__ = ["Backend", "InductorPass", "backend", "companion", "inductor_pass"]
