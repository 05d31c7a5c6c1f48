"""Gradient checkpointing under a size: what backward recomputes runs at the same size.

`torch.utils.checkpoint` runs a forward a second time, in backward, when the block that chose
the size may long be over. While sizes are active, checkpoints are made such that the second run
makes these sizes active again: those without reentrant backward by a recomputation context,
those with it by wrapping the function that is run twice.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

__all__ = ["recomputing"]

Activate = Callable[[], AbstractContextManager[None]]

#: What is active now: by thread, in the order of activation.
_active: dict[object, tuple[int, Activate]] = {}
_lock = threading.Lock()
_NOOP = torch_checkpoint.noop_context_fn
_REENTRANT = torch_checkpoint.CheckpointFunction


@contextmanager
def recomputing(activate: Activate) -> Iterator[None]:
    """Make checkpoints taken inside the block recompute within `activate()`.

    Blocks of several networks may nest and may end in any order.
    """
    key = object()
    with _lock:
        _active[key] = (threading.get_ident(), activate)
        _install(_contexts, _Reentrant)
    try:
        yield
    finally:
        with _lock:
            del _active[key]
            if not _active:
                _install(_NOOP, _REENTRANT)


def _install(context_fn: Callable[..., object], reentrant: type) -> None:
    defaults = inspect.unwrap(torch_checkpoint.checkpoint).__kwdefaults__
    if defaults is not None:
        defaults["context_fn"] = context_fn
    # The reentrant way takes no other context than the one that it knows as doing nothing.
    for name, value in (("noop_context_fn", context_fn), ("CheckpointFunction", reentrant)):
        setattr(torch_checkpoint, name, value)


class _Reentrant:
    """Stands in for PyTorch's function of the reentrant way."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        activations, runs = _active_here(), itertools.count()

        def run(*inputs: Any) -> Any:
            if next(runs) == 0:  # the forward, for which the sizes are active anyway
                return function(*inputs)
            with _all(activations):
                return function(*inputs)

        return _REENTRANT.apply(run, preserve, *args)  # type: ignore[no-untyped-call]


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a checkpoint that is taken now: of its forward, of its recomputation."""
    return nullcontext(), _all(_active_here())


def _active_here() -> list[Activate]:
    thread = threading.get_ident()
    return [activate for owner, activate in _active.values() if owner == thread]


@contextmanager
def _all(activations: list[Activate]) -> Iterator[None]:
    with ExitStack() as stack:
        for activate in activations:
            stack.enter_context(activate())
        yield
