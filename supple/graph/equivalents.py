"""Other ways in which a model says that it computes the same.

Where a model's usual way cannot be recorded, an equivalent one is recorded in its place. Models
declare such ways themselves: by settings that name an implementation (`attn_implementation`),
of which `eager` is the plain one, and by `use_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

__all__ = ["Equivalent", "plain_implementations"]

#: Given the model, a context in which it computes the same in another way.
Equivalent = Callable[[nn.Module], AbstractContextManager[None]]

_PLAIN = {"_attn_implementation": "eager", "_experts_implementation": "eager"}
_OFF = "use_cache"


@contextmanager
def plain_implementations(model: nn.Module) -> Iterator[None]:
    """Let a model use the plain implementations that its settings declare, without caches.

    Args:
        model: Any module; without such settings it stays as it is. They are put back.
    """
    saved: list[tuple[dict[str, object], str, object]] = []
    seen: set[int] = set()
    for module in model.modules():
        for value in list(vars(module).values()):
            settings = getattr(value, "__dict__", None)
            skipped = isinstance(value, (nn.Module, torch.Tensor, type)) or callable(value)
            if skipped or settings is None or id(settings) in seen:
                continue
            seen.add(id(settings))
            for name, plain in _PLAIN.items():
                if isinstance(settings.get(name), str) and settings[name] != plain:
                    saved.append((settings, name, settings[name]))
                    settings[name] = plain
            if settings.get(_OFF) is True:
                saved.append((settings, _OFF, True))
                settings[_OFF] = False
    try:
        yield
    finally:
        for settings, name, before in reversed(saved):
            settings[name] = before
