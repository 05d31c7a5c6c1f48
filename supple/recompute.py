"""Gradient checkpointing under a size: what is recomputed in backward runs at the same size.

`torch.utils.checkpoint` runs a forward a second time, in backward, when the block that chose the
size may long be over. While a size is active, checkpoints are made with a recomputation context
that makes it active again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch.utils import checkpoint as torch_checkpoint

__all__ = ["recomputing"]

Context = AbstractContextManager[None]


@contextmanager
def recomputing(activate: Callable[[], Context]) -> Iterator[None]:
    """Make checkpoints taken inside the block recompute within `activate()`."""
    defaults = inspect.unwrap(torch_checkpoint.checkpoint).__kwdefaults__
    before = defaults["context_fn"]
    defaults["context_fn"] = lambda: (nullcontext(), activate())
    try:
        yield
    finally:
        defaults["context_fn"] = before
