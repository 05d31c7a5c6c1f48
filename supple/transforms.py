"""What techniques that change a model have in common: their checks, the copy, the provenance.

A technique says what it needs and what it does to a copy; `ModelTransform.apply` does the rest:

    @dataclass(frozen=True, kw_only=True)
    class Halve(ModelTransform):
        needs = ("calibration",)

        def change(self, model, given): ...
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import nn

from supple.errors import SettingError
from supple.rebuild import note_transform
from supple.technique import Transform
from supple.training.batches import Loss, batch_size, example_of

__all__ = ["Given", "ModelTransform", "check_finite", "evaluating"]


@dataclass(frozen=True)
class Given:
    """What `apply` was given beside the model.

    Args:
        batches: The calibration batches, tuples or mappings, read once into memory.
        loss: `loss(output, batch) -> scalar`.
        generator: Source of all randomness; seeded with 0 where none was given.
    """

    batches: tuple[Any, ...] = ()
    loss: Loss | None = None
    generator: torch.Generator | None = None

    @property
    def random(self) -> torch.Generator:
        """The generator."""
        assert self.generator is not None
        return self.generator

    @property
    def criterion(self) -> Loss:
        """The loss, for techniques that declare that they need it."""
        assert self.loss is not None
        return self.loss

    @property
    def examples(self) -> int:
        """How many examples the batches hold."""
        return sum(map(batch_size, self.batches))

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The first batch as a call's arguments, labels left out.

        Raises:
            SettingError: There is no batch.
        """
        if not self.batches:
            raise SettingError(
                "the model has to be run on an example: pass calibration= with a batch at least"
            )
        return example_of(self.batches[0])


@dataclass(frozen=True, kw_only=True)
class ModelTransform(Transform):
    """A transform that changes a copy of the model it is given."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What `apply` can't do without: `"calibration"`, `"loss"`."""

    @abstractmethod
    def change(self, model: nn.Module, given: Given) -> nn.Module:
        """Does to a model what the technique is about.

        Args:
            model: A copy, which may be changed and returned.
            given: Calibration batches, loss, generator.

        Returns:
            The model, or another one.
        """

    def apply(
        self,
        model: nn.Module,
        *,
        calibration: Iterable[Any] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        generator: torch.Generator | None = None,
        inplace: bool = False,
    ) -> nn.Module:
        """Applies the technique to a model.

        Args:
            model: The model; it is left bitwise untouched, also when this raises.
            calibration: Batches to gather statistics from, tuples or mappings.
            loss: `loss(output, batch) -> scalar`, for techniques that need gradients.
            generator: Source of all randomness; by default seeded with 0.
            inplace: Changes `model` itself, where memory demands it; what it holds after an
                exception is then undefined.

        Returns:
            The changed model, in the mode (training or evaluation) of the one given.

        Raises:
            SettingError: Calibration or loss is missing where it is needed, or a weight is not
                finite.
        """
        self._check_needs(calibration, loss)
        check_finite(model)
        given = Given(
            tuple(calibration or ()),
            loss,
            torch.Generator().manual_seed(0) if generator is None else generator,
        )
        if "calibration" in self.needs and not given.batches:
            raise SettingError(f"{type(self).__name__} got calibration data without a batch")
        changed = self.change(model if inplace else copy.deepcopy(model), given)
        return note_transform(changed, changed, self)

    def _check_needs(self, calibration: Any, loss: Any) -> None:
        got = {"calibration": calibration, "loss": loss}
        told = {
            "calibration": "batches of tuples or mappings, as the model sees them",
            "loss": "loss(output, batch) -> scalar",
        }
        for name in self.needs:
            if got[name] is None:
                raise SettingError(
                    f"{type(self).__name__} needs {name}: pass {name}= ({told[name]})"
                )


def check_finite(model: nn.Module) -> None:
    """Checks that no weight is infinite or not a number.

    Args:
        model: The model.

    Raises:
        SettingError: One is; the message names the first such parameter.

    Example:
        >>> check_finite(nn.Linear(2, 3))
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            count = int((~parameter.isfinite()).sum())
            raise SettingError(
                f"parameter '{name}' has {count} of {parameter.numel()} values that are not "
                "finite; load weights that were trained without overflow"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode for a while; each module then gets its own mode back.

    What has taken a module's place meanwhile gets the mode of that one. Modules that have gone
    are not held.

    Args:
        model: The model.
    """
    training = {path: ref(one) for path, one in model.named_modules() if one.training}
    model.eval()
    try:
        yield
    finally:
        for path, module in list(model.named_modules()):
            if path not in training:
                continue
            stayed = training[path]() is module
            if stayed:
                module.training = True
            else:
                module.train()
