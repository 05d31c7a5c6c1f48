"""What modules inside a network gave during a forward: for criteria that compare features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from supple.errors import SettingError, nearest
from supple.training.batches import Forward, run_model

__all__ = ["Features", "WithFeatures"]


@dataclass(frozen=True)
class Features:
    """An output, and what modules gave on the way to it.

    Args:
        output: What the model returned.
        features: Module path to its output; blocks that a size leaves out are not in it.
    """

    output: Any
    features: Mapping[str, Any]


@dataclass(frozen=True)
class WithFeatures:
    """A `forward=` that also gives the outputs of modules inside.

    Losses then get `Features` in place of the model's output.

    Args:
        paths: Paths of the modules, as in `model.named_modules()`.
        forward: `forward(model, batch) -> output`; by default by the batch's type.
        change: Module path to a function of the module's output, whose result takes the
            output's place.

    Raises:
        SettingError: A module does not exist; the message names the nearest.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> seen = WithFeatures(["0"])(model, torch.ones(1, 2))
        >>> tuple(seen.output.shape), list(seen.features)
        ((1, 3), ['0'])
    """

    paths: Sequence[str]
    forward: Forward = run_model
    change: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)

    def __call__(self, model: nn.Module, batch: Any) -> Features:
        """Runs a model on a batch."""
        modules = dict(model.named_modules())
        missing = [path for path in (*self.change, *self.paths) if path not in modules]
        if missing:
            raise SettingError(
                f"there is no module '{missing[0]}' in {type(model).__name__}"
                f"{nearest(missing[0], modules)}"
            )
        found: dict[str, Any] = {}
        hooks = [(path, partial(_change, change)) for path, change in self.change.items()]
        hooks += [(path, partial(_keep, found, path)) for path in self.paths]
        handles = [modules[path].register_forward_hook(hook) for path, hook in hooks]
        try:
            output = self.forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return Features(output, found)


def _keep(found: dict[str, Any], path: str, module: nn.Module, args: Any, output: Any) -> None:
    found[path] = output


def _change(change: Callable[[Any], Any], module: nn.Module, args: Any, output: Any) -> Any:
    return change(output)
