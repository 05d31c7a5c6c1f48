"""Inputs of layers, kept while calibration data go by."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RowSample"]


class RowSample:
    """Keeps some of a layer's inputs, evenly spaced over all that it sees.

    It is an observer for `supple.calibrate`, where only it knows how many inputs are to come.

    Args:
        most: How many are kept in the end.

    Example:
        >>> sample = RowSample(2)
        >>> for start in (0.0, 3.0):
        ...     sample.see(torch.arange(start, start + 3.0).reshape(1, 3, 1))
        >>> sample.result().flatten().tolist()
        [0.0, 4.0]
    """

    def __init__(self, most: int) -> None:
        self._most, self._every, self._before = most, 1, 0
        self._kept: list[Tensor] = []

    def see(self, rows: Tensor) -> None:
        """Takes more inputs, (groups, rows, columns)."""
        self._kept.append(rows[:, -self._before % self._every :: self._every].clone())
        self._before += rows.shape[1]
        kept = torch.cat(self._kept, 1)
        while kept.shape[1] > 2 * self._most:
            kept, self._every = kept[:, ::2], 2 * self._every
        self._kept = [kept]

    def result(self) -> Tensor | None:
        """Gives (groups, at most so many, columns), or None where nothing was seen."""
        if not self._kept:
            return None
        kept = torch.cat(self._kept, 1)
        return kept[:, :: max(1, -(-kept.shape[1] // self._most))]
