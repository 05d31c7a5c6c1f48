"""The order of batches follows from seed and epoch, and nothing else."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from supple.data.base import CropAndFlip, Dataset, TensorSource, find, keys, load, split
from supple.errors import CheckpointError, SettingError


def numbers(size=11, **settings):
    return Dataset(source=TensorSource((torch.arange(size),)), batch_size=3, **settings)


def values(batches):
    return [batch[0].tolist() for batch in batches]


def test_iterating_gives_every_example_in_order_again_and_again():
    data = numbers()
    expected = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert values(data) == values(data) == values(data.batches()) == expected
    assert (len(data), data.examples) == (4, 11)


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    data = numbers()
    first, second = values(data.epoch(0)), values(data.epoch(1))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(11))
    assert first != second
    assert first == values(data.epoch(0))


def test_the_order_follows_from_the_seed():
    assert values(numbers(seed=1).epoch(3)) != values(numbers(seed=2).epoch(3))
    assert values(numbers(seed=1).epoch(3)) == values(numbers(seed=9).epoch(3, seed=1))


def test_the_order_does_not_depend_on_global_random_numbers():
    state = torch.get_rng_state()
    first = values(numbers().epoch(0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert values(numbers().epoch(0)) == first


def test_sets_without_shuffling_keep_their_order_in_epochs():
    data = numbers(shuffle=False)
    assert values(data.epoch(5)) == values(data)


def jitter(batch, generator):
    return (batch[0] + torch.rand(len(batch[0]), generator=generator),)


def test_an_epoch_can_start_in_its_middle():
    data = numbers(augment=jitter)
    assert values(data.epoch(2, start=2)) == values(data.epoch(2))[2:]


def test_augmentation_differs_by_epoch_and_batch_and_is_repeatable():
    data = numbers(augment=jitter)
    fractions = [batch[0] % 1 for batch in data.epoch(0)]
    assert values(data.epoch(0)) == values(data.epoch(0))
    assert not torch.equal(fractions[0], fractions[1])
    assert not torch.equal(fractions[0], next(data.epoch(1))[0] % 1)


def test_evaluation_sets_are_not_augmented():
    parts = {name: torch.arange(3) for name in ("train", "validation", "test")}
    source = TensorSource((torch.arange(3.0),))
    splits = split(source, parts, batch_size=3, seed=0, augment=jitter)
    assert values(splits.train.epoch(0)) != values(splits.train)
    for part in (splits.validation, splits.test):
        assert values(part.epoch(0)) == [[0, 1, 2]]


def test_mappings_give_mappings():
    source = TensorSource({"a": torch.arange(5), "b": torch.arange(5) * 2})
    batch = Dataset(source=source, batch_size=2).example()
    assert isinstance(batch, dict)
    assert (batch["a"].tolist(), batch["b"].tolist()) == ([0, 1], [0, 2])


def test_parts_of_sets_are_sets():
    assert values(numbers().first(4)) == [[0, 1, 2], [3]]
    assert values(numbers().select(torch.tensor([7, 2])).select(torch.tensor([1]))) == [[2]]


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_impossible_batch_sizes_are_refused(size):
    with pytest.raises(SettingError, match="batch_size"):
        Dataset(source=TensorSource((torch.arange(3),)), batch_size=size)


def test_tensors_of_different_lengths_are_refused():
    with pytest.raises(SettingError, match="one length"):
        TensorSource((torch.arange(3), torch.arange(4)))


def test_crops_are_windows_of_the_padded_image():
    image = torch.arange(1.0, 36.0).view(1, 1, 5, 7)
    images = image.repeat(64, 2, 1, 1)
    change = CropAndFlip(padding=1, flip=False, fill=-1.0)
    changed, labels = change((images, torch.arange(64)), torch.Generator().manual_seed(0))
    padded = torch.full((7, 9), -1.0)
    padded[1:6, 1:8] = image[0, 0]
    windows = {padded[r : r + 5, c : c + 7] for r in range(3) for c in range(3)}
    found = {
        next(i for i, window in enumerate(windows) if torch.equal(window, crop))
        for crop in changed[:, 0]
    }
    assert len(found) == 9
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert labels.tolist() == list(range(64))


def test_about_half_of_the_images_are_mirrored():
    images = torch.arange(3.0).expand(200, 1, 2, 3)
    change = CropAndFlip(padding=0)
    changed, _ = change((images, torch.arange(200)), torch.Generator().manual_seed(0))
    mirrored = (changed[:, 0, 0, 0] == 2).sum().item()
    assert 70 < mirrored < 130
    assert {tuple(row) for row in changed[:, 0, 1].tolist()} == {(0, 1, 2), (2, 1, 0)}


def test_every_file_is_a_key():
    assert keys() == ["digits", "hub", "images", "text"]


@pytest.mark.parametrize(
    ("key", "settings", "message"),
    [
        ("digit", {}, "did you mean 'digits'"),
        ("digits", {"batchsize": 3}, "did you mean 'batch_size'"),
        ("images", {}, "needs the setting 'path'"),
    ],
)
def test_wrong_keys_and_settings_name_themselves(key, settings, message):
    with pytest.raises(SettingError, match=message):
        load(key, **settings)


def test_a_missing_file_names_every_place_that_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPPLE_DATA", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"nowhere/a.txt or {tmp_path}/nowhere/a.txt"):
        find("nowhere/a.txt")
    (tmp_path / "a.txt").touch()
    assert find("a.txt") == tmp_path / "a.txt"
