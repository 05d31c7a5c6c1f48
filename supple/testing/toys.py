"""What the checks of several kinds share: a small network, and watches over global state."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "PlannedError",
    "assert_same",
    "copied",
    "generator",
    "global_random_untouched",
    "globals_untouched",
    "mlp",
    "output",
]


class PlannedError(Exception):
    """Raised on purpose, to see what is left behind."""


def generator(seed: int = 7) -> torch.Generator:
    """Gives a generator that nobody else draws from."""
    return torch.Generator().manual_seed(seed)


def _filled(module: nn.Module) -> nn.Module:
    """Fills a module's weights from a generator of its own."""
    source = generator(11)
    with torch.no_grad():
        for parameter in module.parameters():
            bound = 1 / math.sqrt(max(parameter[0].numel(), 1))
            parameter.uniform_(-bound, bound, generator=source)
    return module


def mlp() -> nn.Module:
    """Gives a small network with prime sizes and always the same weights."""
    with torch.random.fork_rng(devices=[]):
        layers = nn.Sequential(
            nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 3)
        )
    return _filled(layers)


def output(model: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
    """Gives a network's output, without gradients."""
    with torch.no_grad():
        output = model(*args)
    assert isinstance(output, Tensor), f"a network gave {type(output).__name__}, no tensor"
    return output


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Copies everything that a network holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: Mapping[str, Tensor], message: str) -> None:
    """Asserts that a network holds bitwise what was copied."""
    now = model.state_dict()
    assert list(now) == list(before), message
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items()), message


@contextlib.contextmanager
def global_random_untouched() -> Iterator[None]:
    """Asserts that nothing inside the block draws from a global generator."""
    before = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    yield
    after = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    assert torch.equal(before[0], after[0]), "it draws from torch's global random state"
    assert str(before[1]) == str(after[1]), "it draws from NumPy's global random state"
    assert before[2] == after[2], "it draws from Python's global random state"


@contextlib.contextmanager
def globals_untouched() -> Iterator[None]:
    """Asserts that nothing inside the block changes a global default."""
    before = _globals()
    yield
    after = _globals()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"importing it changes {', '.join(changed)}"


def _globals() -> dict[str, Any]:
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "the warning filters": list(warnings.filters),
        "the import path": list(sys.path),
    }
