from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.errors import PlasticityError
from tests.plasticity.runs import factors_of, train


def saved(run: Any) -> Any:
    file = io.BytesIO()
    torch.save(run, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


HOW: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda run: pickle.loads(pickle.dumps(run)),
    "torch.save": saved,
}


class Trainer:
    def __init__(self, model: Any, optimizer: Any, plasticity: Any) -> None:
        self.plasticity, self.optimizer, self.model = plasticity, optimizer, model


FORMS: dict[str, tuple[Callable[..., Any], Callable[[Any], tuple[Any, ...]]]] = {
    "tuple": (lambda m, o, p: (m, o, p), lambda t: t),
    "attachment first": (lambda m, o, p: [p, o, m], lambda t: (t[2], t[1], t[0])),
    "optimizer first": (lambda m, o, p: {"o": o, "p": [p], "m": m}, lambda t: (t["m"], t["o"], t["p"][0])),
    "object": (Trainer, lambda t: (t.model, t.optimizer, t.plasticity)),
}
RULES = (
    biofx.Rule("crystallize", every=2),
    "volume_dependent_lr",
    biofx.Rule("rejuvenate_weights", every=3),
    "synaptic_scaling",
)


def started(distribution: biofx.Distribution, optimizer: str) -> tuple[nn.Module, Any, Any, biofx.Monitor]:
    config = biofx.BioConfig(
        fuzzy_lr_distribution=distribution,
        fuzzy_lr_dynamic=True,
        fuzzy_lr_update_freq=2,
        crystal_thresh=0.01,
        rejuvenation_parameter_dre=4.0,
        apply_dales_principle=True,
    )
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
    bio, _ = biofx.transform(net, config)
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    made = getattr(torch.optim, optimizer)(bio.parameters(), lr=0.02, weight_decay=0.01, **options)
    monitor = biofx.Monitor()
    plasticity = biofx.attach(bio, made, RULES, observers=[monitor])
    train(bio, made, 3)
    return bio, made, plasticity, monitor


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("distribution", "optimizer"),
    [
        (biofx.Distribution.TEMPORAL, "AdamW"),
        (biofx.Distribution.ACTIVITY, "SGD"),
        (biofx.Distribution.WEIGHT_ADAPTIVE, "AdamW"),
    ],
)
def test_copied_run_goes_on_as_the_original_does(
    distribution: biofx.Distribution, optimizer: str, how: str, form: str
) -> None:
    bio, made, plasticity, monitor = started(distribution, optimizer)
    before = copy.deepcopy(bio.state_dict())
    pack, unpack = FORMS[form]
    twin, other, own = unpack(HOW[how](pack(bio, made, plasticity)))
    train(twin, other, 4, seed=2)
    assert all(torch.equal(before[key], value) for key, value in bio.state_dict().items())
    assert (plasticity.steps, own.steps, len(monitor.records)) == (3, 7, 3)
    train(bio, made, 4, seed=2)
    for key, value in bio.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key
    assert own.steps == plasticity.steps == 7
    assert own.modes == plasticity.modes
    (copied,) = own._observers
    assert copied is not monitor
    first = monitor.records[
        3
    ]  # whose forward nobody watched in the copy, which learns of its model at the step
    for layer in first.layers.values():
        assert layer.activity is not None
    unseen = {path: dataclasses.replace(layer, activity=None) for path, layer in first.layers.items()}
    expected = [*monitor.records[:3], dataclasses.replace(first, layers=unseen), *monitor.records[4:]]
    assert copied.records == expected


@pytest.mark.parametrize("how", HOW)
def test_copied_optimizer_takes_its_attachment_along(how: str) -> None:
    bio, made, plasticity, _ = started(biofx.Distribution.TEMPORAL, "AdamW")
    twin, other = HOW[how]((bio, made))
    assert repr(other.state_dict()) == repr(made.state_dict())
    for model, optimizer in ((bio, made), (twin, other)):
        train(model, optimizer, 4, seed=2)
    for key, value in bio.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key
    anew = biofx.attach(twin, other)
    assert (anew.steps, plasticity.steps) == (0, 7)
    train(twin, other)
    assert anew.steps == 1
    anew.detach()
    assert not other._optimizer_step_pre_hooks
    assert type(other.defaults) is dict


def test_copy_of_a_detached_run_is_detached() -> None:
    bio, made, plasticity, _ = started(biofx.Distribution.TEMPORAL, "AdamW")
    plasticity.detach()
    _, other, own = copy.deepcopy((bio, made, plasticity))
    assert not other._optimizer_step_pre_hooks
    assert own.modes == {}


def test_attachment_alone_is_not_copied() -> None:
    bio, made, plasticity, _ = started(biofx.Distribution.TEMPORAL, "AdamW")
    with pytest.raises(PlasticityError, match=r"copy all three together"):
        copy.deepcopy(plasticity)
    train(bio, made)
    assert plasticity.steps == 4


def test_pickled_alone_it_acts_on_nothing_and_says_so() -> None:
    import gc

    _, _, plasticity, _ = started(biofx.Distribution.TEMPORAL, "AdamW")
    alone = pickle.loads(pickle.dumps(plasticity))
    gc.collect()
    for use in (lambda: alone.modes, lambda: alone.left_alone, alone.state_dict):
        with pytest.raises(PlasticityError, match="copy all three together"):
            use()


def test_copy_of_the_model_alone_is_not_attached() -> None:
    bio, made, _, _ = started(biofx.Distribution.TEMPORAL, "AdamW")
    twin = copy.deepcopy(bio)
    factors = factors_of(twin).clone()
    train(twin, torch.optim.AdamW(twin.parameters()))
    assert torch.equal(factors_of(twin), factors)
    train(bio, made)


def test_copied_monitor_writes_to_no_file(tmp_path: Any) -> None:
    bio, made, plasticity, _ = started(biofx.Distribution.TEMPORAL, "AdamW")
    plasticity.detach()
    monitor = biofx.Monitor(path=tmp_path / "run.jsonl")
    plasticity = biofx.attach(bio, made, observers=[monitor])
    train(bio, made, 2)
    written = (tmp_path / "run.jsonl").read_bytes()
    twin, other, own = pickle.loads(pickle.dumps((bio, made, plasticity)))
    train(twin, other, 2)
    assert (tmp_path / "run.jsonl").read_bytes() == written
    assert len(own._observers[0].records) == 4


def test_its_text_says_what_is_attached_to_what() -> None:
    import gc

    _, _, plasticity, _ = started(biofx.Distribution.TEMPORAL, "AdamW")
    rules = "crystallize every 2, volume_dependent_lr, rejuvenate_weights every 3, synaptic_scaling"
    assert repr(plasticity) == f"<Attachment of Sequential under AdamW, 3 steps: {rules}>"
    plasticity.detach()
    assert repr(plasticity).endswith(f"{rules} (detached)>")
    assert str(biofx.Rule("crystallize", after=5, until=9)) == "crystallize after 5 until 9"
    alone = pickle.loads(pickle.dumps(plasticity))
    gc.collect()
    assert repr(alone) == "<Attachment of a run that is gone>"
