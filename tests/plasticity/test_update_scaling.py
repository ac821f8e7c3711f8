from __future__ import annotations

import torch
from torch import nn

import biofx
from tests.plasticity.runs import factors_of


def test_mean_of_averaged_descent_moves_by_the_factors_too() -> None:
    rates = torch.tensor([0.0, 0.25, 0.5, 1.0])
    bio, _ = biofx.transform(
        nn.Sequential(nn.Linear(3, 4, bias=False)), {"fuzzy_learning_rate_factor_nu": 0.5}
    )
    factors_of(bio).copy_(rates[:, None].expand(4, 3))
    weight = bio.get_parameter("0.weight")
    start = weight.detach().clone()
    optimizer = torch.optim.ASGD(bio.parameters(), lr=0.01, t0=3, lambd=1e-4)
    assert biofx.attach(bio, optimizer).modes == {"0.weight": "update"}
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        bio(torch.eye(3)).sum().backward()
        optimizer.step()
        seen.append(weight.detach().clone())
    mean = optimizer.state[weight]["ax"]
    # torch takes a weight for the mean up to the second step after t0; from then on each has one share
    torch.testing.assert_close(mean, torch.stack(seen[4:]).mean(0), atol=1e-5, rtol=1e-4)
    assert torch.equal(mean[0], start[0])
    shares = (mean - start).mean(1) / (mean - start).mean(1)[-1]
    torch.testing.assert_close(shares, rates, atol=0.01, rtol=0)
