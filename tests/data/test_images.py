"""Images are read from parquet files and folders, decoded to what was drawn."""

from __future__ import annotations

import io
from itertools import chain

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from supple.data import images as room
from supple.data.base import load
from supple.errors import CheckpointError, SettingError

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1), "augment": False}


def picture(number: int, size=(5, 7), mode="RGB") -> Image.Image:
    """An image of one colour that names its number."""
    colour = (number, 255 - number, 7) if mode == "RGB" else number
    return Image.new(mode, (size[1], size[0]), colour)


def encoded(number: int, **settings) -> bytes:
    buffer = io.BytesIO()
    picture(number, **settings).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path, numbers, **settings):
    cells = [{"bytes": encoded(i, **settings), "path": f"{i}.png"} for i in numbers]
    table = pyarrow.table({"image": cells, "label": [i % 3 for i in numbers]})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def numbers_of(data):
    """The numbers of the pictures, read from their red channel, and their labels."""
    pixels = torch.cat([x[:, 0, 0, 0] for x, _ in data]) * 255
    return pixels.round().int().tolist(), torch.cat([y for _, y in data]).tolist()


def test_parquet_parts_are_kept_apart(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", range(10))
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", range(10, 20))
    write_parquet(tmp_path / "data" / "test.parquet", range(50, 57))
    splits = load("images", path=tmp_path, validation=0.2, **PLAIN)
    train, validation, test = (
        numbers_of(part) for part in (splits.train, splits.validation, splits.test)
    )
    assert sorted(train[0] + validation[0]) == list(range(20))
    assert len(validation[0]) == 4
    assert test[0] == list(range(50, 57))
    for numbers, labels in (train, validation, test):
        assert labels == [number % 3 for number in numbers]
    assert splits.classes == 3


def test_folders_of_classes_are_read_in_the_order_of_their_names(tmp_path):
    for number in range(12):
        folder = tmp_path / "train" / f"class-{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number}.png")
    (tmp_path / "val" / "class-1").mkdir(parents=True)
    picture(31).save(tmp_path / "val" / "class-1" / "31.png")
    splits = load("images", path=tmp_path, **PLAIN)
    assert numbers_of(splits.validation) == ([31], [1])
    assert splits.test.examples == 1
    numbers, labels = numbers_of(splits.train)
    assert labels == [number % 3 for number in numbers]


def test_one_folder_of_classes_is_cut_in_three_the_same_way_each_time(tmp_path):
    for number in range(30):
        folder = tmp_path / str(number % 3)
        folder.mkdir(exist_ok=True)
        picture(number).save(folder / f"{number:02}.png")
    parts = []
    for seed in (1, 2):
        splits = load("images", path=tmp_path, seed=seed, **PLAIN)
        parts.append([numbers_of(p)[0] for p in (splits.train, splits.validation, splits.test)])
    assert parts[0] == parts[1]
    assert sorted(chain(*parts[0])) == list(range(30))
    assert [len(part) for part in parts[0]] == [24, 3, 3]


def test_pixels_are_scaled_and_normalised_per_channel(tmp_path):
    write_parquet(tmp_path / "one.parquet", range(30))
    splits = load(
        "images", path=tmp_path / "one.parquet", mean=(0.5, 0, 0), std=(2, 1, 1), augment=False
    )
    x, y = splits.train.example(1)
    number = x[0, 2].new_tensor(round(float(x[0, 0, 0, 0] * 2 + 0.5) * 255))
    assert x.shape == (1, 3, 5, 7)
    torch.testing.assert_close(x[0, 0], torch.full((5, 7), (number / 255 - 0.5).item() / 2))
    torch.testing.assert_close(x[0, 1], torch.full((5, 7), 1 - number.item() / 255))
    torch.testing.assert_close(x[0, 2], torch.full((5, 7), 7 / 255))
    assert y.item() == number.item() % 3


def test_grey_images_have_one_channel_unless_asked_otherwise(tmp_path):
    write_parquet(tmp_path / "grey.parquet", range(30), mode="L")
    path = tmp_path / "grey.parquet"
    assert load("images", path=path).train.example()[0].shape == (2, 1, 5, 7)
    assert load("images", path=path, channels=3).train.example()[0].shape == (2, 3, 5, 7)


def test_images_of_several_sizes_need_a_size(tmp_path):
    write_parquet(tmp_path / "train-a.parquet", range(20))
    write_parquet(tmp_path / "train-b.parquet", range(20, 40), size=(9, 9))
    with pytest.raises(SettingError, match="images differ in size"):
        list(load("images", path=tmp_path).train)
    assert load("images", path=tmp_path, size=6).train.example()[0].shape == (2, 3, 6, 6)


def test_images_decode_the_same_without_the_cache(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", range(30))
    kept = list(load("images", path=tmp_path).validation)
    monkeypatch.setattr(room, "_CACHE_BYTES", 0)
    again = list(load("images", path=tmp_path).validation)
    for (x, _), (other, _) in zip(kept, again, strict=True):
        assert torch.equal(x, other)


def test_kept_images_are_not_decoded_twice(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", range(30))
    data = load("images", path=tmp_path).validation
    first = data.example(3)[0]
    monkeypatch.setattr(room, "open_image", None)
    assert torch.equal(data.example(3)[0], first)


def test_a_limit_keeps_a_sample_of_each_part(tmp_path):
    write_parquet(tmp_path / "train.parquet", range(50))
    write_parquet(tmp_path / "test.parquet", range(20))
    splits = load("images", path=tmp_path, limit=5)
    sizes = [part.examples for part in (splits.train, splits.validation, splits.test)]
    assert sizes == [5, 5, 5]


def test_a_damaged_parquet_file_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", range(30))
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    content[-20] ^= 1
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"train\.parquet"):
        load("images", path=tmp_path)


def test_a_damaged_image_is_named(tmp_path):
    for number in range(30):
        folder = tmp_path / str(number % 2)
        folder.mkdir(exist_ok=True)
        picture(number).save(folder / f"{number}.png")
    (tmp_path / "1" / "7.png").write_bytes(b"no image")
    with pytest.raises(CheckpointError, match=r"1/7\.png can't be decoded"):
        list(load("images", path=tmp_path).train) + list(load("images", path=tmp_path).test)


def test_a_folder_without_images_says_what_it_needs(tmp_path):
    with pytest.raises(SettingError, match="holds no labelled images"):
        load("images", path=tmp_path)


def test_a_parquet_file_of_something_else_names_its_columns(tmp_path):
    parquet.write_table(
        pyarrow.table({"text": ["a"], "label": [1]}), tmp_path / "train.parquet"
    )
    with pytest.raises(SettingError, match="has text, label"):
        load("images", path=tmp_path)


def test_the_recorded_cifar_files_are_read(data_folder):
    splits = load("images", path=data_folder / "cifar10", limit=64)
    x, y = next(splits.train.epoch(0))
    assert (x.shape, splits.classes, y.dtype) == ((64, 3, 32, 32), 10, torch.int64)
    assert np.isfinite(x.numpy()).all()
