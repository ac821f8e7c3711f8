"""Activations as text and back."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biofx.callables import callable_from_text, callable_to_text, check_activation, identity
from biofx.errors import OptionError


def doubled(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (identity, "identity"),
        (torch.tanh, "torch.tanh"),
        (torch.relu, "torch.relu"),
        (F.relu, "torch.nn.functional.relu"),
        (F.gelu, "torch.nn.functional.gelu"),
        (torch.special.expit, "torch.special.expit"),
    ],
)
def test_a_function_of_torch_comes_back_as_itself(function: Callable[..., Any], text: str) -> None:
    assert callable_to_text(function) == text
    assert callable_from_text(text) is function


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Tanh(), nn.Sigmoid()])
def test_an_option_free_module_comes_back_as_an_instance_of_its_class(module: nn.Module) -> None:
    text = callable_to_text(module)
    assert text == f"torch.nn.{type(module).__name__}"
    assert type(callable_from_text(text)) is type(module)


def test_the_identity_module_is_the_identity() -> None:
    assert callable_from_text(callable_to_text(nn.Identity())) is identity


class OwnActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "function",
    [
        doubled,
        lambda x: x,
        functools.partial(F.leaky_relu, negative_slope=0.2),
        nn.ReLU(inplace=True),
        nn.PReLU(),
        nn.Sequential(nn.ReLU()),
        OwnActivation(),
        os.system,
        abs,
    ],
)
def test_what_torch_has_no_name_for_has_no_text(function: Callable[..., Any]) -> None:
    with pytest.raises(
        OptionError, match=r"(?s)expected a callable that a text can name .* keep it in Python"
    ):
        callable_to_text(function)


HOSTILE = [
    "import:os:system",
    "import:not_imported_module:x",
    "os.system",
    "builtins.exec",
    "torch.os.system",
    "torch._C",
    "torch._dynamo",
    "torch.onnx",
    "torch.nn.__class__",
    "torch.nn.functional.torch.tanh",
    "torch.Tensor",
    "torch.nn",
    "torch.",
    ".tanh",
    "tanh",
    "",
    "torch.tanh()",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_that_names_no_activation_is_refused_and_imports_nothing(text: str) -> None:
    before = set(sys.modules)
    with pytest.raises(OptionError) as caught:
        callable_from_text(text)
    assert f"found {text!r}" in str(caught.value)
    assert set(sys.modules) == before


def test_a_misspelt_activation_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'tanh'"):
        callable_from_text("torch.tanhh")


def test_a_module_class_that_needs_options_is_refused() -> None:
    with pytest.raises(OptionError, match=r"a module that needs no options, found 'torch.nn.Linear'"):
        callable_from_text("torch.nn.Linear")


def test_an_activation_may_be_given_as_a_callable_or_as_text() -> None:
    assert check_activation("phi", doubled) is doubled
    assert check_activation("phi", "torch.tanh") is torch.tanh


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "phi: expected a callable from tensor to tensor, found 3"),
        (nn.ReLU, r"phi: .* found the class ReLU; create an instance: ReLU\(\)"),
        ("torch.tanhh", "phi: expected an activation .* found 'torch.tanhh'"),
    ],
)
def test_a_bad_activation_is_refused_under_the_name_of_its_option(value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_activation("phi", value)
