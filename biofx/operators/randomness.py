"""Random numbers that depend on what they are for, never on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, path: str, event: int = 0, *, purpose: str = "") -> torch.Generator:
    """Return a CPU generator keyed by seed, parameter path, event number and purpose.

    Equal keys give equal draws on every rank, on every device and after a resume; the global generator is
    not consumed.

    Args:
        seed: the user's seed.
        path: path of the parameter the draw belongs to.
        event: how many draws of this kind came before, a count.
        purpose: keeps draws of different kinds for one parameter apart.
    """
    return torch.Generator().manual_seed(key_for(seed, path, event, purpose=purpose))


def key_for(seed: int, path: str, event: int = 0, *, purpose: str = "") -> int:
    """Return what :func:`generator_for` seeds its generator with, a number below 2**63."""
    key = f"{seed}\0{purpose}\0{path}\0{event}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
