from __future__ import annotations

import copy

import torch
from torch import nn

from biofx.model.copies import deep_copy


def test_a_copy_is_what_deepcopy_makes() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.append(model[0])
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    given = model[0].weight
    for copied in (deep_copy(model, {id(given): given}), copy.deepcopy(model, {id(given): given})):
        assert copied[0] is copied[2] is not model[0]
        assert copied[0].weight is given
        assert copied[0].bias is not model[0].bias
        for inner, original in zip(copied.modules(), model.modules(), strict=True):
            assert list(vars(inner)) == list(vars(original))
            for name, value in vars(original).items():
                assert type(vars(inner)[name]) is type(value)
                if isinstance(value, dict):
                    assert vars(inner)[name] is not value
                    assert list(vars(inner)[name]) == list(value)
        x = torch.randn(4, 3)
        torch.testing.assert_close(copied.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_hooks_of_a_copy_are_its_own() -> None:
    model = nn.Linear(3, 3)
    copied = deep_copy(model)
    copied.register_forward_hook(lambda module, args, output: output * 0)
    x = torch.randn(4, 3)
    assert copied(x).eq(0).all()
    assert not model(x).eq(0).any()
