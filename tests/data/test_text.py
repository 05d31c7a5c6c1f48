"""Text becomes blocks of tokens in the order of the files."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from supple.data.base import load
from supple.errors import CheckpointError, SettingError

TEXT = "abcdefghij" * 10  # 100 bytes


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def text_of(data):
    return "".join(bytes(row).decode() for batch in data for row in batch["input_ids"].tolist())


def test_bytes_come_back_as_the_text_in_three_consecutive_parts(file):
    splits = load("text", path=file, length=5, validation=0.2, test=0.1)
    parts = [text_of(part) for part in (splits.train, splits.validation, splits.test)]
    assert "".join(parts) == TEXT
    assert [len(part) for part in parts] == [70, 20, 10]
    assert splits.vocabulary == 256


def test_labels_are_the_inputs(file):
    batch = load("text", path=file, length=7).train.example()
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].shape == (2, 7)


def test_folders_are_joined_in_the_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("b" * 49)
    (tmp_path / "a.txt").write_text("a" * 50)
    (tmp_path / "c.md").write_text("c" * 50)
    splits = load("text", path=tmp_path, length=5)
    joined = "".join(map(text_of, (splits.train, splits.validation, splits.test)))
    assert joined == "a" * 50 + "\n" + "b" * 49


def test_a_tokenizer_folder_is_used(file, tmp_path):
    vocabulary = {"[UNK]": 0, "one": 1, "two": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    file.write_text("one two three " * 10)
    splits = load("text", path=file, tokenizer=tmp_path, length=3)
    assert splits.train.example(1)["input_ids"].tolist() == [[1, 2, 0]]
    assert splits.vocabulary == 3


def test_training_blocks_are_shuffled_and_limited(file):
    splits = load("text", path=file, length=5, limit=6)
    assert splits.train.examples == 6
    orders = {str(next(splits.train.epoch(n))["input_ids"].tolist()) for n in range(5)}
    assert len(orders) > 1


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no file or folder .*missing\.txt"):
        load("text", path=tmp_path / "missing.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CheckpointError, match=r"bad\.txt can't be read as UTF-8"):
        load("text", path=tmp_path / "bad.txt")
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "bad.txt").write_text(TEXT)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no readable tokenizer"):
        load("text", path=tmp_path / "bad.txt", tokenizer=tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no file .*tokenizer\.json"):
        load("text", path=tmp_path / "bad.txt", tokenizer=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1}, "length must be at least 2"),
        ({"length": 60}, "too few"),
        ({"validation": 0}, "fractions above 0"),
        ({"validation": 0.6, "test": 0.4}, "leave something to train on"),
    ],
)
def test_impossible_settings_are_refused(file, settings, message):
    with pytest.raises(SettingError, match=message):
        load("text", path=file, **settings)


def test_a_folder_without_text_says_so(tmp_path):
    with pytest.raises(SettingError, match=r"no \.txt file"):
        load("text", path=tmp_path)


def test_the_recorded_text_and_tokenizer_are_read(data_folder):
    splits = load(
        "text",
        path=data_folder / "text" / "wikitext2-valid.txt",
        tokenizer=data_folder / "llama-tiny",
        length=64,
    )
    assert splits.vocabulary == 4096
    assert splits.train.example()["input_ids"].max() < 4096
