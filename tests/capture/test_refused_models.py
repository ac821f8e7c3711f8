from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.model.graph_module import BioGraphModule

HOSTILE = ["class", "None", 'quo"te', "back\\slash", "two\nlines", "\u200b", "ﬁ", '");exec(ran)#']


def named(name: str) -> nn.Module:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 4))
    return model


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_code_cannot_carry_is_refused(name: str) -> None:
    with pytest.raises(biofx.CaptureError, match=r"the model has something named .* cannot carry"):
        biofx.capture(named(name))
    buffer: Any = nn.Sequential(nn.Identity())
    buffer[0].register_buffer(name, torch.ones(1))
    with pytest.raises(biofx.CaptureError, match=r"has something named .* at '0"):
        biofx.capture(buffer)


@pytest.mark.parametrize(
    "name", ["0", "größe", "名前", "[bold]", "/etc/up", "x" * 300, "it's", "{x}", "a b", "%s"]
)
def test_an_odd_name_is_captured_as_it_is(name: str) -> None:
    model = named(name)
    bio_model, report = biofx.transform(model, {"fuzzy_lr_distribution": "normal"})
    assert name in str(report)
    x = torch.randn(3, 4)
    assert torch.equal(bio_model(x), model(x))
    assert f"{name}.weight" in bio_model.state_dict()


class Named(nn.Module):
    """Calls or multiplies by what it has under some name."""

    def __init__(self, name: str, held: Any) -> None:
        super().__init__()
        self.name, self.out = name, nn.Linear(4, 2)
        setattr(self, name, held)

    def forward(self, x: Tensor) -> Any:
        held = getattr(self, self.name)
        return self.out(torch.relu(held(x) if isinstance(held, nn.Module) else x @ held))


class Around(nn.Module):
    """Has such a module inside, and may decide by a value, so that it stays in Python."""

    def __init__(self, inner: nn.Module, decides: bool) -> None:
        super().__init__()
        self.inner, self.decides = inner, decides

    def forward(self, x: Tensor) -> Any:
        found = self.inner(x)
        if self.decides and found.sum() > 1e9:
            return found * 2
        return found


REWRITTEN = biofx.transform(nn.Sequential(nn.Linear(4, 4)), {"fuzzy_lr_distribution": "normal"}).graph_module
OURS = sorted({*dir(BioGraphModule), *vars(REWRITTEN)} - set(dir(nn.Module)) - set(vars(nn.Module())))


NORMAL = {"fuzzy_lr_distribution": "normal"}


@pytest.mark.parametrize("kind", ["submodule", "parameter", "attribute"])
@pytest.mark.parametrize("name", OURS)
def test_a_name_of_a_graph_module_works_or_is_refused(name: str, kind: str) -> None:
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    held = {"submodule": nn.Linear(4, 4), "parameter": nn.Parameter(weight), "attribute": weight}[kind]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    model = Named(name, held)
    expected = model(x)
    for example in (None, x):
        if name in ("meta", "shape_env") and kind != "attribute":
            bio_model, _ = biofx.transform(model, NORMAL, example_inputs=example)
            assert torch.equal(bio_model(x), expected)
            assert torch.equal(copy.deepcopy(bio_model)(x), expected)
            assert torch.equal(biofx.capture(bio_model)(x), expected)
        elif name not in ("meta", "shape_env"):
            with pytest.raises(biofx.CaptureError, match=f"has {kind} '{name}', a name that graph"):
                biofx.transform(model, NORMAL, example_inputs=example)
    for decides in () if name == "__deepcopy__" else (False, True):  # torch itself cannot copy that
        around = Around(model, decides)
        for example in (None, x):
            bio_model, _ = biofx.transform(around, NORMAL, example_inputs=example)
            torch.testing.assert_close(bio_model(x), expected)


def test_a_method_of_a_graph_modules_name_that_python_calls_is_refused() -> None:
    class Decides(nn.Linear):
        def code(self, x: Tensor) -> Tensor:
            return x * 2

        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return self.code(found) if found.sum() > 0 else found

    with pytest.raises(biofx.CaptureError, match="uses 'code' of its class"):
        biofx.capture(Decides(4, 4))


def test_the_place_of_the_state_is_kept_free() -> None:
    with pytest.raises(biofx.CaptureError, match=r"named 'bio_mod', at '0\.bio_mod'"):
        biofx.capture(nn.Sequential(Named("bio_mod", nn.Linear(4, 4))))


@pytest.mark.parametrize("name", ["print", "self", "torch", "input", "len", "device", "args", "x", "fc_1"])
def test_names_that_the_code_uses_are_captured_as_they_are(name: str) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for held in (nn.Linear(4, 4), nn.Parameter(torch.eye(4) * 2)):
        model = Named(name, held)
        for example in (None, x):
            bio_model, _ = biofx.transform(model, {"fuzzy_lr_distribution": "normal"}, example_inputs=example)
            assert torch.equal(bio_model(x), model(x))
