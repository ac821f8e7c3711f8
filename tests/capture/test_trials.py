from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from biofx.capture.trials import TrialModel


class Counts(nn.Module):
    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("mean", torch.ones(2))
        self.norm = nn.BatchNorm1d(2)
        self.plain = torch.full((2,), 5.0)

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.mean = self.mean * 0.5 + x.mean(0)
        self.plain.mul_(2)
        return self.norm(x) * self.calls + self.mean + self.plain


def test_every_run_starts_where_the_first_did() -> None:
    counts = Counts()
    trial = TrialModel(counts)
    x = torch.randn(4, 2)
    calls, mean = counts.calls, counts.mean
    first = trial.model(x)
    assert not torch.equal(trial.model(x), first)
    assert trial.restore() is counts
    assert counts.calls is calls
    assert counts.mean is mean
    assert calls.eq(0).all()
    torch.testing.assert_close(counts(x), first, rtol=0, atol=0)
