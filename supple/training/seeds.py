"""Randomness that can be named, kept, and put back.

Training uses three independent streams, all derived from one seed by name: the order and
augmentation of the data (equal on all ranks, a function of seed and epoch alone), the sampled
sizes (equal on all ranks), and what the network itself draws (dropout; one stream per rank).
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = [
    "Stream",
    "derive",
    "generator",
    "kept",
    "random_state",
    "seed_all",
    "set_random_state",
]


def derive(seed: int, *names: int | str) -> int:
    """Derives a seed for one purpose, independent of the seeds of other purposes.

    Args:
        seed: The user's seed.
        *names: What it is for, such as `"data", epoch`.

    Returns:
        An integer in [0, 2**63).

    Example:
        >>> derive(0, "data", 1) == derive(0, "data", 1)
        True
        >>> derive(0, "data", 1) == derive(0, "data", 2)
        False
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: int | str) -> torch.Generator:
    """Gives a CPU generator for one purpose.

    Args:
        seed: The user's seed.
        *names: What it is for.

    Returns:
        A freshly seeded generator.
    """
    return torch.Generator().manual_seed(derive(seed, *names))


def seed_all(seed: int) -> None:
    """Seeds the global generators of PyTorch (all devices), NumPy and Python.

    Args:
        seed: Any integer of at least 0.
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """Takes the state of the global generators of PyTorch (all devices), NumPy and Python.

    Returns:
        Tensors, numbers and lists, which a checkpoint can hold.
    """
    state = _state()
    version, words, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    state["python"] = [version, torch.tensor(words, dtype=torch.int64), gauss]
    state["numpy"] = [str(name), torch.from_numpy(keys.astype(np.int64)), *rest]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the global generators back to what `random_state` took.

    Args:
        state: What `random_state` gave.
    """
    version, words, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    python = (version, tuple(words.tolist()), gauss)
    numpy = (name, keys.numpy().astype(np.uint32), *rest)
    _set_state({**state, "python": python, "numpy": numpy})


@contextlib.contextmanager
def kept(seed: int | None = None) -> Iterator[None]:
    """Leaves the global generators as they were, whatever is drawn inside.

    Args:
        seed: Seeds them for the inside; None leaves them where they are.

    Yields:
        Nothing.
    """
    before = _state()
    try:
        if seed is not None:
            seed_all(seed)
        yield
    finally:
        _set_state(before)


class Stream:
    """A stream of global randomness of its own, switched to and from.

    Args:
        seed: Where it starts.
    """

    def __init__(self, seed: int) -> None:
        with kept(seed):
            self._own = _state()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Lets the global generators go on with this stream, and then with their own."""
        before = _state()
        _set_state(self._own)
        try:
            yield
        finally:
            self._own = _state()
            _set_state(before)


def _state() -> dict[str, Any]:
    """Takes all global states as they come: this runs twice per batch."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
