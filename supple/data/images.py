"""Images with labels, from parquet files as on the Hugging Face Hub, or from folders."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from supple.data.base import Batch, CropAndFlip, Splits, find, split
from supple.errors import CheckpointError, SettingError

__all__ = ["ImageSource", "load", "split_labelled"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}
_CACHE_BYTES = 2**30
Encoded = bytes | Path


@dataclass
class ImageSource:
    """Encoded images that are decoded when first used, and kept where memory allows it.

    Args:
        encoded: Files' contents, or paths of files.
        labels: Class numbers, shape (n,).
        size: Height and width in pixels.
        channels: 1 (grey) or 3 (colour).
        mean: Subtracted per channel, of pixels in [0, 1].
        std: Divided by, per channel.
        name: Where images come from, for error messages.
    """

    encoded: Sequence[Encoded]
    labels: Tensor
    size: tuple[int, int]
    channels: int
    mean: Tensor
    std: Tensor
    name: str
    resize: bool = False
    _kept: Tensor | None = field(init=False, default=None, repr=False)
    _seen: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape = (len(self.encoded), self.channels, *self.size)
        if np.prod(shape) <= _CACHE_BYTES:
            self._kept = torch.empty(shape, dtype=torch.uint8)
        self._seen = torch.zeros(len(self.encoded), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.encoded)

    def take(self, positions: Tensor) -> Batch:
        """Gives float images (n, channels, height, width), normalised, and labels (n,)."""
        if self._kept is None:
            pixels = torch.stack([self._decode(i) for i in positions.tolist()])
        else:
            for i in positions[~self._seen[positions]].tolist():
                self._kept[i] = self._decode(i)
                self._seen[i] = True
            pixels = self._kept[positions]
        images = pixels.float().div_(255).sub_(self.mean).div_(self.std)
        return images, self.labels[positions]

    def _decode(self, i: int) -> Tensor:
        with open_image(self.encoded[i], f"{self.name}, image {i}") as image:
            size = (image.height, image.width)
            if size != self.size and not self.resize:
                raise SettingError(
                    f"images differ in size: {self.name}, image {i} is {size[0]} x {size[1]}, "
                    f"the first is {self.size[0]} x {self.size[1]}; set size to resize them"
                )
            image = image.convert("L" if self.channels == 1 else "RGB")
            if size != self.size:
                image = image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
            array = np.array(image, dtype=np.uint8).reshape(*self.size, self.channels)
        return torch.from_numpy(array).permute(2, 0, 1)


def load(
    path: str | os.PathLike[str],
    *,
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
    """Loads images with class labels.

    The path is a folder with parquet files whose names begin with `train` and `test` (and
    `validation`), of columns `image` (bytes) and `label`, or a folder with folders of these
    names that hold one folder of image files per class. With neither, it is one parquet file
    or one folder of class folders. Parts that are missing are cut, at random but always the
    same way, from the end of training examples.

    Images are floats of shape (N, channels, size, size).

    Args:
        path: The folder or file; also looked for inside the folder of SUPPLE_DATA.
        size: Height and width in pixels; other images are resized. Their own size by default.
        channels: 1 or 3; that of the first image by default.
        mean: Subtracted from pixels in [0, 1], one per channel; the mean of it for grey images.
        std: Divided by, likewise.
        batch_size: Examples per batch.
        augment: Whether training images are shifted by up to an eighth, and mirrored.
        validation: Fraction of training examples set apart where there is no such part, and
            for the test where there is none either; in (0, 0.5).
        limit: Number of examples of each part to use at most, picked at random.
        seed: What the order of training follows from; the parts stay.

    Raises:
        CheckpointError: A file is missing or damaged.
        SettingError: Nothing there looks like labelled images, or a setting can't be used.
    """
    if not 0 < validation < 0.5:
        raise SettingError(f"validation must be a fraction in (0, 0.5), got {validation}")
    root = find(path)
    found = _collect(root)
    labels = sorted({label for _, part in found.values() for label in part})
    numbers = {label: number for number, label in enumerate(labels)}
    encoded = [item for items, _ in found.values() for item in items]
    targets = [numbers[label] for _, part in found.values() for label in part]
    groups = [name for name, (items, _) in found.items() for _ in items]
    return split_labelled(
        encoded,
        targets,
        groups,
        name=str(root),
        classes=len(labels),
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


def split_labelled(
    encoded: Sequence[Encoded],
    targets: Sequence[int],
    groups: Sequence[str],
    *,
    name: str,
    classes: int,
    size: int | None,
    channels: int | None,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    augment: bool,
    validation: float,
    limit: int | None,
    seed: int,
) -> Splits:
    """Makes the three parts from encoded images; `groups` names the part of each."""
    with open_image(encoded[0], f"{name}, image 0") as first:
        shape = (size, size) if size else (first.height, first.width)
        number = channels or (1 if first.mode in ("1", "L", "I;16") else 3)
    if number not in (1, 3):
        raise SettingError(f"channels must be 1 or 3, got {number}")
    source = ImageSource(
        encoded,
        torch.tensor(targets, dtype=torch.int64),
        shape,
        number,
        _per_channel(mean, number),
        _per_channel(std, number),
        name,
        resize=size is not None,
    )
    change = CropAndFlip(padding=max(1, shape[0] // 8)) if augment else None
    positions = _positions(groups, validation, limit)
    return split(
        source, positions, batch_size=batch_size, seed=seed, augment=change, classes=classes
    )


def open_image(encoded: Encoded, name: str) -> Any:
    """Opens one image, and names it where it is damaged."""
    try:
        image = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
        image.load()
    except (OSError, ValueError, SyntaxError) as error:
        where = name if isinstance(encoded, bytes) else str(encoded)
        raise CheckpointError(f"{where} can't be decoded ({error}); it is damaged") from error
    return image


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    if len(values) == 3 and channels == 1:
        values = [sum(values) / 3]
    if len(values) != channels:
        raise SettingError(f"mean and std need {channels} numbers, got {list(values)}")
    return torch.tensor(list(values), dtype=torch.float32)[:, None, None]


def _positions(
    groups: Sequence[str], validation: float, limit: int | None
) -> dict[str, Tensor]:
    names = np.array(groups)
    found = {name: np.flatnonzero(names == name) for name in ("train", "validation", "test")}
    # NumPy keeps the stream of RandomState for ever, so the parts are the same everywhere.
    found["train"] = np.random.RandomState(0).permutation(found["train"])
    share = round(validation * len(found["train"]))
    for name in ("validation", "test"):
        if not len(found[name]):
            found[name], found["train"] = found["train"][-share:], found["train"][:-share]
    if not all(map(len, found.values())):
        counts = {name: len(chosen) for name, chosen in found.items()}
        raise SettingError(f"there are too few images for three parts: {counts}")
    if limit is not None:
        random = np.random.RandomState(1)
        found = {name: random.permutation(chosen)[:limit] for name, chosen in found.items()}
    return {name: torch.from_numpy(np.sort(chosen)) for name, chosen in found.items()}


def _collect(root: Path) -> dict[str, tuple[list[Encoded], list[Any]]]:
    """Encoded images and labels of each part that the path holds."""
    if root.is_file():
        return {"train": _parquet([root])}
    named = {name: sorted(root.glob(f"**/{name}*.parquet")) for name in _NAMES}
    if named["train"]:
        return {_NAMES[name]: _parquet(files) for name, files in named.items() if files}
    folders = {_NAMES[name]: root / name for name in _NAMES if (root / name).is_dir()}
    found = {name: _class_folders(folder) for name, folder in folders.items()}
    found = found or {"train": _class_folders(root)}
    if not found.get("train", ([], []))[0]:
        raise SettingError(
            f"{root} holds no labelled images: it needs files train*.parquet and "
            "test*.parquet, or a folder per class with image files in it"
        )
    return found


_NAMES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


def _class_folders(root: Path) -> tuple[list[Encoded], list[Any]]:
    encoded: list[Encoded] = []
    labels: list[Any] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
        encoded += files
        labels += [folder.name] * len(files)
    return encoded, labels


def _parquet(files: Sequence[Path]) -> tuple[list[Encoded], list[Any]]:
    encoded: list[Encoded] = []
    labels: list[Any] = []
    for file in files:
        images, numbers = _read_parquet(file)
        encoded += images
        labels += numbers
    return encoded, labels


def _read_parquet(file: Path) -> tuple[list[Encoded], list[Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise CheckpointError(f"{file} is no readable parquet file ({error})") from error
    image = next((name for name in ("image", "img") if name in table.column_names), None)
    label = next((name for name in ("label", "labels") if name in table.column_names), None)
    if image is None or label is None:
        raise SettingError(
            f"{file} needs columns 'image' and 'label', it has {', '.join(table.column_names)}"
        )
    cells = table.column(image).to_pylist()
    images = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
    if not all(isinstance(item, bytes) for item in images):
        raise SettingError(f"{file}: column '{image}' must hold the bytes of image files")
    return images, table.column(label).to_pylist()
