"""The two halves of the data of a differentiable search: what weights and parameters see."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from supple.errors import SettingError
from supple.training.batches import batches_of, split
from supple.training.seeds import derive

__all__ = ["Halves", "halves", "paired"]


class Halves(NamedTuple):
    """The two batches of a step.

    Args:
        train: What the network's weights learn from.
        validation: What the architecture parameters learn from.
    """

    train: Any
    validation: Any


def halves(batch: Any) -> Halves:
    """Gives the two batches of a step.

    Args:
        batch: `Halves`, or a pair of batches that are tuples, lists or mappings: training and
            validation, from two sets that stay apart, as papers have it. Any other batch is
            split in the middle; which half an example is in is then up to the data's order.

    Raises:
        SettingError: There are fewer than two examples to split.

    Example:
        >>> import torch
        >>> x = torch.arange(5)
        >>> [half[0].tolist() for half in halves((x, x))]
        [[0, 1, 2], [3, 4]]
        >>> halves(((x[:1], x[:1]), (x[1:], x[1:]))).train[0].tolist()
        [0]
    """
    if isinstance(batch, Halves):
        return batch
    nested = (tuple, list, Mapping)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        train, validation = batch
        if isinstance(train, nested) and isinstance(validation, nested):
            return Halves(train, validation)
    parts = split(batch, 2)
    if len(parts) < 2:
        raise SettingError("a batch of one example can't be split into two halves")
    return Halves(*parts)


def paired(train: Any, validation: Any, *, epoch: int, seed: int = 0) -> Iterator[Halves]:
    """Gives the steps of an epoch: each batch of the one half with one of the other.

    Args:
        train: Batches to be read once.
        validation: Batches of a set of its own; read again where it has fewer.
        epoch: Counted from 0; with `seed` it decides the order.
        seed: Of the order.

    Raises:
        SettingError: The validation half has no batches.
    """
    others: Iterator[Any] = iter(())
    again = itertools.count()
    for batch in batches_of(train, seed=seed, epoch=epoch):
        other = next(others, None)
        if other is None:
            order = derive(seed, "validation", epoch, next(again))
            others = batches_of(validation, seed=order, epoch=epoch)
            other = next(others, None)
        if other is None:
            raise SettingError("the validation half has no batches")
        yield Halves(batch, other)
