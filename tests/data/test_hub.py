"""Data sets of `datasets` are read like files of the same content."""

from __future__ import annotations

import io
import sys

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from supple.data.base import load
from supple.errors import CheckpointError, MissingExtraError, SettingError


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (5, 5), number).save(buffer, format="PNG")
    return buffer.getvalue()


def write(folder, part, numbers):
    features = '{"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}'
    cells = [{"bytes": encoded(i), "path": f"{i}.png"} for i in numbers]
    table = pyarrow.table({"image": cells, "label": [i % 3 for i in numbers]})
    info = '{"info": {"features": ' + features + "}}"
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": info}), folder / f"{part}.parquet"
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the format of the Hub, and a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    folder = tmp_path / "hub"
    folder.mkdir()
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_folder_is_read_like_its_files(hub):
    write(hub, "train", range(30))
    write(hub, "test", range(40, 45))
    ours, theirs = load("images", path=hub), load("hub", name=str(hub))
    for part in ("train", "validation", "test"):
        left, right = getattr(ours, part), getattr(theirs, part)
        assert left.examples == right.examples > 0
        for (x, y), (other, label) in zip(left, right, strict=True):
            assert x.equal(other)
            assert y.equal(label)


@pytest.mark.filterwarnings("ignore")
def test_a_set_without_images_names_its_columns(hub):
    parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), hub / "train.parquet")
    with pytest.raises(SettingError, match="it has text, label"):
        load("hub", name=str(hub))


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_name_is_named(hub):
    with pytest.raises(CheckpointError, match="'no-such/set' can't be loaded"):
        load("hub", name="no-such/set")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"supple\[hub\]"):
        load("hub", name="cifar10")
