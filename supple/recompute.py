"""Gradient checkpointing under a size: what backward recomputes runs at the same size.

`torch.utils.checkpoint` runs a forward a second time, in backward, when the block that chose
the size may long be over. While sizes are active, checkpoints are made with a recomputation
context that makes these sizes active again.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from torch.utils import checkpoint as torch_checkpoint

__all__ = ["recomputing"]

Activate = Callable[[], AbstractContextManager[None]]

#: What is active now: by thread, in the order of activation.
_active: dict[object, tuple[int, Activate]] = {}
_lock = threading.Lock()
_NOOP = torch_checkpoint.noop_context_fn


@contextmanager
def recomputing(activate: Activate) -> Iterator[None]:
    """Make checkpoints taken inside the block recompute within `activate()`.

    Blocks of several networks may nest and may end in any order.
    """
    key = object()
    with _lock:
        _active[key] = (threading.get_ident(), activate)
        _install(_contexts)
    try:
        yield
    finally:
        with _lock:
            del _active[key]
            if not _active:
                _install(_NOOP)


def _install(context_fn: Callable[..., object]) -> None:
    defaults = inspect.unwrap(torch_checkpoint.checkpoint).__kwdefaults__
    if defaults is not None:
        defaults["context_fn"] = context_fn


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a checkpoint that is taken now: of its forward, of its recomputation."""
    thread = threading.get_ident()
    activations = [activate for owner, activate in _active.values() if owner == thread]
    return nullcontext(), _all(activations)


@contextmanager
def _all(activations: list[Activate]) -> Iterator[None]:
    with ExitStack() as stack:
        for activate in activations:
            stack.enter_context(activate())
        yield
