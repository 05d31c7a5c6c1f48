"""Labelled images and text by name from the Hugging Face Hub, through `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from supple.data.base import Splits
from supple.data.images import split_labelled
from supple.errors import CheckpointError, SettingError, import_extra

__all__ = ["load"]


def load(
    name: str,
    *,
    subset: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    batch_size: int = 128,
    augment: bool = True,
    validation: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
) -> Splits:
    """Loads labelled images that `datasets` knows by name, such as `"cifar10"`.

    They are downloaded once and kept in the cache of `datasets`. A local folder works, too.

    Args:
        name: Name on the Hub, or a folder.
        subset: Name of the configuration, where the data set has several.
        size: Height and width in pixels; other images are resized. Their own size by default.
        channels: 1 or 3; that of the first image by default.
        mean: Subtracted from pixels in [0, 1], one per channel; the mean of it for grey images.
        std: Divided by, likewise.
        batch_size: Examples per batch.
        augment: Whether training images are shifted by up to an eighth, and mirrored.
        validation: Fraction of training examples set apart where there is no such part.
        limit: Number of examples of each part to use at most, picked at random.
        seed: What the order of training follows from; the parts stay.

    Raises:
        MissingExtraError: The package `datasets` is not installed.
        CheckpointError: The data set can't be found or downloaded.
        SettingError: It has no columns of images and labels, or a setting can't be used.
    """
    encoded: list[Any] = []
    labels: list[Any] = []
    groups: list[str] = []
    for group, part in _download(name, subset).items():
        images, numbers = _columns(name, part)
        encoded += images
        labels += numbers
        groups += [group] * len(images)
    ordered = {label: number for number, label in enumerate(sorted(set(labels)))}
    return split_labelled(
        encoded,
        [ordered[label] for label in labels],
        groups,
        name=name,
        classes=len(ordered),
        size=size,
        channels=channels,
        mean=mean,
        std=std,
        batch_size=batch_size,
        augment=augment,
        validation=validation,
        limit=limit,
        seed=seed,
    )


def _download(name: str, subset: str | None) -> dict[str, Any]:
    datasets = import_extra("datasets", "hub")
    logging.getLogger("datasets").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, subset)
    except Exception as error:  # the package raises what its many back ends raise
        raise CheckpointError(
            f"the data set '{name}' can't be loaded ({type(error).__name__}: {error}); check "
            "its name and the network"
        ) from error
    chosen = {part: found[part] for part in ("train", "validation", "test") if part in found}
    if "train" not in chosen:
        raise SettingError(f"the data set '{name}' has no part 'train', but {', '.join(found)}")
    return chosen


def _columns(name: str, part: Any) -> tuple[list[bytes], list[Any]]:
    datasets = import_extra("datasets", "hub")
    kinds = part.features
    image = next((key for key, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key in ("label", "labels", "fine_label") if key in kinds), None)
    if image is None or label is None:
        raise SettingError(
            f"the data set '{name}' needs columns of images and labels, it has "
            f"{', '.join(kinds)}"
        )
    cells = part.cast_column(image, datasets.Image(decode=False))[image]
    return [_content(cell) for cell in cells], list(part[label])


def _content(cell: dict[str, Any]) -> bytes:
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    with open(cell["path"], "rb") as file:
        return file.read()
