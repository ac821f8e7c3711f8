"""``biofx.export``: programs of both modes, equal to the model."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.errors import CaptureError, InputError

EVERYTHING = {
    "weight_splitting_Gamma": 2,
    "apply_dales_principle": True,
    "fuzzy_lr_distribution": "uniform",
    "fuzzy_learning_rate_factor_nu": 0.5,
}


class Net(nn.Module):
    """Does other things in training than in evaluation, by modules and by its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x)).mean((2, 3))
        if self.training:
            x = x * 2
        found: Tensor = self.head(self.drop(x))
        return found


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        found: Tensor = self.layer(x * scale + bias)
        return found


def rewritten() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = biofx.transform(Net(), EVERYTHING).graph_module
    return model


def images(number: int = 5) -> Tensor:
    return torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def called(model: nn.Module, x: Tensor, **given: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the outputs, and the gradients of the sum of their squares, by name."""
    named = dict(model.named_parameters())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        outputs = model(x, **given)
    found = torch.autograd.grad(outputs.square().sum(), list(named.values()))
    return outputs.detach(), dict(zip(named, found, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_each_program_is_the_model_in_its_mode(training: bool) -> None:
    model = rewritten()
    programs = biofx.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    made: Any = programs[not training].module()
    model.train(training)
    for x in (images(), images(9)):
        outputs, gradients = called(made, x)
        expected, expected_gradients = called(model, x)
        assert torch.equal(outputs, expected)
        assert set(gradients) == set(expected_gradients)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6)
    buffers, expected_buffers = dict(made.named_buffers()), dict(model.named_buffers())
    for name, buffer in expected_buffers.items():
        assert torch.equal(buffers[name], buffer), name
    assert bool(torch.equal(expected_buffers["norm.num_batches_tracked"], torch.tensor(2 * training)))


def test_gradients_in_the_program_are_those_of_the_plain_model_times_the_rates() -> None:
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model, _ = biofx.transform(
        plain, {"fuzzy_lr_distribution": "uniform", "fuzzy_learning_rate_factor_nu": 0.5}
    )
    x = torch.randn(6, 4)
    _, gradients = called(biofx.export(model, (x,))[0].module(), x)
    _, expected = called(plain, x)
    for layer in ("0", "2"):
        rates = model.get_buffer(f"{layer}.bio_mod.fuzzy_learning_rate_parameters")
        assert float(rates.std()) > 0.1
        torch.testing.assert_close(gradients[f"{layer}.weight"], expected[f"{layer}.weight"] * rates)


def test_both_programs_hold_the_same_parameters_and_not_the_models() -> None:
    model = rewritten().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training, evaluation = biofx.export(model, (images(),))
    trained: Any = training.module()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(images()).square().sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module.training for module in model.modules())
    program: Any = evaluation.module()
    for name, parameter in trained.named_parameters():
        assert parameter.data_ptr() == program.get_parameter(name).data_ptr(), name
        assert not torch.equal(parameter, before[name]), name


def test_keyword_arguments_go_where_they_belong_whatever_their_order() -> None:
    model, _ = biofx.transform(Affine(), EVERYTHING)
    x, bias, scale = torch.randn(2, 4), torch.full((4,), 3.0), torch.full((4,), 0.5)
    _, evaluation = biofx.export(model, (x,), {"scale": scale, "bias": bias})
    found = evaluation.module()(x, bias=bias, scale=scale)
    assert torch.equal(found, model.eval()(x, bias=bias, scale=scale))
    assert not torch.equal(found, model(x, bias=scale, scale=bias))


def test_programs_are_saved_and_loaded() -> None:
    model = rewritten()
    for training, program in zip((True, False), biofx.export(model, (images(),)), strict=True):
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        outputs, gradients = called(loaded, images())
        expected, expected_gradients = called(copy.deepcopy(model).train(training), images())
        assert torch.equal(outputs, expected)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)


def test_a_program_that_torch_makes_of_branches_is_refused_with_the_remedy() -> None:
    with pytest.raises(biofx.BiofxError, match=r"biofx\.export"):
        torch.export.export(rewritten(), (images(),))


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "words"),
    [
        (nn.Linear(2, 2), (torch.ones(1, 2),), None, "expected a rewritten model, found a Linear"),
        (None, [torch.ones(1, 1, 8, 8)], None, "expected a tuple of positional arguments, found list"),
        (None, (torch.ones(1, 1, 8, 8),), {"sale": torch.ones(8)}, "expected some of x, found sale"),
        (None, (torch.ones(1, 1, 8, 8),), [1], "expected keyword arguments by name, found list"),
    ],
)
def test_what_cannot_be_exported_is_refused(model: Any, args: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        biofx.export(rewritten() if model is None else model, args, kwargs)


def test_what_torch_export_refuses_is_an_error_of_ours() -> None:
    with pytest.raises(CaptureError, match=r"torch\.export refuses the model in training"):
        biofx.export(rewritten(), (torch.ones(2, 3, 8, 8),))


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_a_program_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.export.export

    def dishonest(model: nn.Module, *given: Any, **options: Any) -> Any:
        with torch.no_grad():
            return honest(Wrong(), (given[0][0],))

    model, _ = biofx.transform(nn.Sequential(nn.Linear(3, 3)))
    monkeypatch.setattr(torch.export, "export", dishonest)
    with pytest.raises(CaptureError, match="in training does not compute what the model does"):
        biofx.export(model, (torch.ones(2, 3),))
