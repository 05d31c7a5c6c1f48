"""Data sets as batches whose order follows from a seed and an epoch, and finding them by key.

The file `supple/data/digits.py` is the key `digits`: it holds one function `load`, whose
keyword arguments are the settings, and which returns the three `Splits`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from supple.errors import CheckpointError, SettingError, nearest

__all__ = [
    "Batch",
    "CropAndFlip",
    "Dataset",
    "Source",
    "Splits",
    "TensorSource",
    "find",
    "keys",
    "load",
    "loader",
    "split",
]

Batch = tuple[Tensor, ...] | dict[str, Tensor]


class Source(Protocol):
    """Examples that can be fetched by position."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def take(self, positions: Tensor) -> Batch:
        """Fetches the examples at integer positions, shape (n,), stacked into one batch."""
        ...


@dataclass(frozen=True)
class TensorSource:
    """Examples held in memory, along the first dimension of every tensor.

    Args:
        tensors: Tensors of equal length: a tuple gives tuples as batches, a mapping gives
            mappings.

    Example:
        >>> TensorSource((torch.arange(5) * 10,)).take(torch.tensor([3, 1]))
        (tensor([30, 10]),)
    """

    tensors: tuple[Tensor, ...] | Mapping[str, Tensor]

    def __post_init__(self) -> None:
        lengths = {len(tensor) for tensor in self._all()}
        if len(lengths) != 1:
            raise SettingError(f"tensors of one source need one length, got {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self._all()[0])

    def take(self, positions: Tensor) -> Batch:
        if isinstance(self.tensors, Mapping):
            return {name: tensor[positions] for name, tensor in self.tensors.items()}
        return tuple(tensor[positions] for tensor in self.tensors)

    def _all(self) -> list[Tensor]:
        values = self.tensors.values() if isinstance(self.tensors, Mapping) else self.tensors
        return list(values)


@dataclass(frozen=True)
class CropAndFlip:
    """Shifts each image by a random amount and mirrors every second one.

    Args:
        padding: Pixels added on each side before a crop of the old size, 0 or more.
        flip: Whether images are mirrored left to right with probability one half.
        fill: Value of added pixels, in the units of the images.
    """

    padding: int = 4
    flip: bool = True
    fill: float = 0.0

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Changes the first tensor, images (N, C, H, W), and keeps the others."""
        assert isinstance(batch, tuple)
        images = self._crop(batch[0], generator) if self.padding else batch[0]
        if self.flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return (images, *batch[1:])

    def _crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        number, _, height, width = images.shape
        padded = F.pad(images, [self.padding] * 4, value=self.fill)
        corner = torch.randint(2 * self.padding + 1, (number, 2), generator=generator)
        rows = corner[:, :1] + torch.arange(height)
        columns = corner[:, 1:] + torch.arange(width)
        every = torch.arange(number)[:, None, None]
        # Advanced indices around a slice move to the front: (N, H, W, C).
        return padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Batches of examples: in order when iterated, reshuffled by `epoch`.

    Args:
        source: Where examples come from.
        batch_size: Examples per batch, 1 or more; the last batch may be smaller.
        shuffle: Whether `epoch` shuffles and augments; False for validation and test.
        augment: Changes a batch at random, `augment(batch, generator) -> batch`.
        seed: What the order of all epochs follows from.

    Example:
        >>> data = Dataset(source=TensorSource((torch.arange(5),)), batch_size=2)
        >>> len(data), [batch[0].tolist() for batch in data]
        (3, [[0, 1], [2, 3], [4]])
        >>> first, again = (torch.cat([b[0] for b in data.epoch(1)]) for _ in range(2))
        >>> torch.equal(first, again)
        True
    """

    source: Source
    batch_size: int = 64
    shuffle: bool = True
    augment: Callable[[Batch, torch.Generator], Batch] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int):
            raise SettingError(f"batch_size must be a whole number, got {self.batch_size!r}")
        if self.batch_size < 1:
            raise SettingError(f"batch_size must be at least 1, got {self.batch_size}")

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.examples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.source)

    def batches(self) -> Iterator[Batch]:
        """Gives every example once, in order and unchanged."""
        for positions in torch.split(torch.arange(self.examples), self.batch_size):
            yield self.source.take(positions)

    def epoch(self, n: int, *, seed: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Gives every example once, shuffled and augmented by seed and epoch alone.

        Args:
            n: Number of the epoch, 0 or more.
            seed: Replaces the set's own.
            start: Number of batches to leave out at the beginning, at no cost.

        Yields:
            The same batches at each call with the same numbers.
        """
        if not self.shuffle:
            order = torch.arange(self.examples)
        else:
            order = torch.randperm(self.examples, generator=self._generator(seed, n))
        for i, positions in enumerate(torch.split(order, self.batch_size)):
            if i < start:
                continue
            batch = self.source.take(positions)
            if self.shuffle and self.augment is not None:
                # A generator per batch, so that a resumed epoch doesn't replay what was before.
                batch = self.augment(batch, self._generator(seed, n, i))
            yield batch

    def example(self, examples: int = 2) -> Batch:
        """Gives the first examples as one batch, to trace or to measure with."""
        return self.source.take(torch.arange(min(examples, self.examples)))

    def first(self, examples: int) -> Dataset:
        """Gives the set of the first examples only."""
        return self.select(torch.arange(min(examples, self.examples)))

    def select(self, positions: Tensor) -> Dataset:
        """Gives the set of the examples at these positions, shape (n,)."""
        return dataclasses.replace(self, source=_Selected(self.source, positions))

    def _generator(self, seed: int | None, *numbers: int) -> torch.Generator:
        text = "/".join(map(str, (self.seed if seed is None else seed, *numbers)))
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(number)


@dataclass(frozen=True)
class _Selected:
    source: Source
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, positions: Tensor) -> Batch:
        return self.source.take(self.positions[positions])


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The three parts of a data set; no example is in two of them.

    Args:
        train: What weights are fitted on.
        validation: What sizes and settings are chosen by.
        test: What is reported.
        classes: Number of labels, or None where there are none.
        vocabulary: Number of token ids, or None where there are no tokens.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    classes: int | None = None
    vocabulary: int | None = None


def split(
    source: Source,
    positions: Mapping[str, Tensor],
    *,
    batch_size: int,
    seed: int,
    augment: Callable[[Batch, torch.Generator], Batch] | None = None,
    classes: int | None = None,
    vocabulary: int | None = None,
) -> Splits:
    """Cuts one source into a shuffled, augmented training set and two sets in order.

    Args:
        source: All examples.
        positions: Positions of the examples of `train`, `validation` and `test`.
        batch_size: Examples per batch.
        seed: What the order of training follows from.
        augment: Changes training batches at random.
        classes: Number of labels, if any.
        vocabulary: Number of token ids, if any.
    """

    def part(name: str) -> Dataset:
        training = name == "train"
        return Dataset(
            source=_Selected(source, positions[name]),
            batch_size=batch_size,
            shuffle=training,
            augment=augment if training else None,
            seed=seed,
        )

    return Splits(
        train=part("train"),
        validation=part("validation"),
        test=part("test"),
        classes=classes,
        vocabulary=vocabulary,
    )


def find(path: str | os.PathLike[str]) -> Path:
    """Finds a file or folder of data: as given, or else inside the folder of SUPPLE_DATA.

    Args:
        path: Absolute, relative to the working folder, or relative to the folder that the
            environment variable SUPPLE_DATA names.

    Raises:
        CheckpointError: There is none; the message names every place that was tried.
    """
    tried = [Path(path).expanduser()]
    if folder := os.environ.get("SUPPLE_DATA"):
        tried.append(Path(folder) / path)
    for candidate in tried:
        if candidate.exists():
            return candidate
    places = " or ".join(str(candidate) for candidate in tried)
    raise CheckpointError(
        f"there is no file or folder {places}; give a path that exists, or set SUPPLE_DATA to "
        "the folder that holds your data"
    )


def keys() -> list[str]:
    """Lists the keys of all data sets, read from the file names.

    Example:
        >>> keys()
        ['digits', 'hub', 'images', 'text']
    """
    names = (file.stem for file in Path(__file__).parent.glob("*.py"))
    return sorted(
        name.replace("_", "-") for name in names if name != "base" and not name.startswith("_")
    )


def loader(key: str) -> Callable[..., Splits]:
    """Gives the function that loads a data set.

    Args:
        key: Such as `"digits"`, or with its room, `"data/digits"`.

    Raises:
        SettingError: No data set has this key.
    """
    name = key.removeprefix("data/")
    if name not in keys():
        raise SettingError(
            f"there is no data set '{key}'{nearest(name, keys())}; data sets are: "
            f"{', '.join(keys())}"
        )
    function: Callable[..., Splits]
    function = importlib.import_module(f"supple.data.{name.replace('-', '_')}").load
    return function


def load(key: str, **settings: Any) -> Splits:
    """Loads a data set.

    Args:
        key: Such as `"digits"`, or with its room, `"data/digits"`.
        settings: The keyword arguments of that file's `load`.

    Raises:
        SettingError: The key or a setting's name is unknown, or a value can't be used.
        CheckpointError: A file is missing or damaged.

    Example:
        >>> load("digits").test.examples
        544
    """
    function = loader(key)
    known = list(inspect.signature(function).parameters)
    for name in settings:
        if name not in known:
            raise SettingError(
                f"data set '{key}' has no setting '{name}'{nearest(name, known)}; settings "
                f"are: {', '.join(known)}"
            )
    required = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and name not in settings
    ]
    if required:
        raise SettingError(f"data set '{key}' needs the setting '{required[0]}'")
    return function(**settings)
