"""The 1,797 handwritten digits, 8 x 8 pixels each, that come inside scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from supple.data.base import CropAndFlip, Splits, TensorSource, split

__all__ = ["load"]

_MEAN, _STD = 0.305, 0.376  # of pixels scaled to [0, 1]


def load(*, batch_size: int = 64, augment: bool = False, seed: int = 0) -> Splits:
    """Loads the digits, split by class, always into the same three parts.

    Images have shape (N, 1, 8, 8), normalised to mean 0 and variance 1; labels are 0 to 9.
    The parts hold 30 % (test), 15 % (validation) and the rest of each class.

    Args:
        batch_size: Examples per batch.
        augment: Whether training images are shifted by up to one pixel.
        seed: What the order of training follows from; the parts stay.

    Example:
        >>> splits = load()
        >>> splits.train.examples, splits.validation.examples, splits.test.examples
        (978, 275, 544)

    Source:
        Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI; the copy that
        `sklearn.datasets.load_digits` embeds.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    shift = CropAndFlip(padding=1, flip=False, fill=-_MEAN / _STD) if augment else None
    return split(
        TensorSource(((pixels - _MEAN) / _STD, labels)),
        _by_class(labels),
        batch_size=batch_size,
        seed=seed,
        augment=shift,
        classes=10,
    )


def _by_class(labels: Tensor) -> dict[str, Tensor]:
    # NumPy keeps the stream of RandomState for ever, so the parts are the same everywhere.
    random = np.random.RandomState(0)
    chosen: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for label in torch.unique(labels).tolist():
        members = random.permutation((labels == label).nonzero().flatten().numpy()).tolist()
        test = math.ceil(0.3 * len(members))
        validation = test + math.ceil(0.15 * len(members))
        chosen["test"] += members[:test]
        chosen["validation"] += members[test:validation]
        chosen["train"] += members[validation:]
    return {name: torch.tensor(sorted(members)) for name, members in chosen.items()}
