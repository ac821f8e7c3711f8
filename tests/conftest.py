"""What the tests share: golden files, a few models, and what it means to leave a model untouched."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

# a run that fails fails again, and one that passes says the same tomorrow
settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")

GOLDEN = Path(__file__).parent / "golden"

# threads that wait for each other on a busy machine take longer than one alone
torch.set_num_threads(1)


# models built while tests are collected, in parameters, are the same in every run too
torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the golden files from what is found"
    )
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in a random order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Let a test that builds a model without a seed build the same one in every run."""
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _no_reproducers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let passes that fail on purpose leave nothing behind."""
    monkeypatch.setenv("BIOFX_REPRODUCER", "off")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with ``tests/golden/NAME.txt``; a missing file fails."""

    def check(name: str, found: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(found.rstrip("\n") + "\n", encoding="utf-8")
        if not path.exists():
            pytest.fail(
                f"{path.name} is missing; look at the output, then run pytest --update-golden:\n{found}"
            )
        assert found.rstrip("\n") + "\n" == path.read_text(encoding="utf-8")

    return check


class ResidualNet(nn.Module):
    """A residual CNN with batch normalisation and a functional dropout, for ``(batch, 1, 8, 8)``."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.bn(self.conv(x)))
        x = nn.functional.dropout(x.mean((2, 3)), 0.1, self.training)
        return self.fc(x)  # type: ignore[no-any-return]


@pytest.fixture
def residual_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResidualNet()


@pytest.fixture
def mlp() -> nn.Module:
    """Two hidden layers of 6 and 4 units, for ``(batch, 4)``, two outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)
        )


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vectors() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def unchanged() -> Callable[[nn.Module], Any]:
    """Give a context manager that fails if what runs inside changes the model or the global random state."""
    from contextlib import contextmanager

    def identities_of(model: nn.Module) -> dict[str, int]:
        held = (*model.named_parameters(), *model.named_buffers())
        return {name: id(value) for name, value in held}

    @contextmanager
    def watch(model: nn.Module) -> Iterator[None]:
        before = copy.deepcopy(model.state_dict())
        identities = identities_of(model)
        modules = [(name, type(module), module.training) for name, module in model.named_modules()]
        hooks = [len(module._forward_hooks) for module in model.modules()]
        random_state = torch.get_rng_state()
        yield
        assert torch.equal(torch.get_rng_state(), random_state)
        assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        assert identities_of(model) == identities
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    return watch
