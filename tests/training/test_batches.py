"""What training does to batches."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from supple.errors import SettingError
from supple.training.batches import batch_size, batches_of, mapped, run_model, split
from supple.training.seeds import kept

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "expected"),
    [({"x": 2}, 2), ((3, None), 3), ([4], 4), (torch.tensor(5), torch.tensor(5))],
)
def test_a_batchs_type_says_what_the_model_takes(batch, expected):
    assert run_model(lambda x: x, batch) == expected


@pytest.mark.parametrize("batch", [(), None, 3, "text"])
def test_other_batches_are_refused(batch):
    with pytest.raises(SettingError, match="forward="):
        run_model(lambda x: x, batch)


@pytest.mark.parametrize(("total", "parts"), [(7, 3), (6, 3), (2, 5), (1, 1), (11, 4)])
def test_parts_cover_the_batch_once_and_evenly(total, parts):
    pieces = split((torch.arange(total), torch.arange(total) * 2), parts)
    assert len(pieces) == min(parts, total)
    assert torch.cat([x for x, _ in pieces]).tolist() == list(range(total))
    assert all(torch.equal(x * 2, y) for x, y in pieces)
    sizes = [len(x) for x, _ in pieces]
    assert max(sizes) - min(sizes) <= 1


def test_what_is_not_of_the_batchs_length_goes_into_every_part():
    batch = {"x": torch.arange(5), "mask": torch.ones(3, 3), "flag": True}
    pieces = split(batch, 2)
    assert all(piece["mask"] is batch["mask"] and piece["flag"] is True for piece in pieces)


def test_the_batch_size_is_the_first_length_there_is():
    assert batch_size({"a": torch.tensor(1.0), "b": [torch.ones(7, 2)]}) == 7
    with pytest.raises(SettingError, match="number of examples"):
        batch_size({"a": 1})


def test_mapped_keeps_the_type():
    @dataclasses.dataclass
    class Output:
        logits: Any
        note: str

    value = {"a": (torch.ones(2), [torch.ones(1)]), "b": Pair(torch.ones(1), 2)}
    changed = mapped(value, lambda tensor: tensor * 3)
    assert changed["a"][0].tolist() == [3.0, 3.0]
    assert isinstance(changed["b"], Pair)
    assert changed["b"].y == 2
    output = mapped(Output(torch.ones(1), "n"), lambda tensor: tensor * 3)
    assert isinstance(output, Output)
    assert output.logits.item() == 3.0


def order(data: Any, epoch: int, seed: int = 0) -> list[int]:
    return [i for (x,) in batches_of(data, seed=seed, epoch=epoch) for i in x.tolist()]


@pytest.mark.parametrize("own", [False, True])
def test_a_shuffled_loaders_order_depends_on_seed_and_epoch_alone(own):
    def loader() -> DataLoader:
        source = torch.Generator() if own else None
        data = TensorDataset(torch.arange(20))
        return DataLoader(data, batch_size=3, shuffle=True, generator=source)

    data = loader()
    first = order(data, 0)
    torch.rand(3)
    assert order(data, 1) != first
    assert order(data, 0) == first
    assert order(loader(), 0) == first
    assert order(data, 0, seed=1) != first


def test_reading_data_and_training_do_not_share_random_numbers():
    class Noisy:
        def __iter__(self):
            for _ in range(3):
                yield (torch.rand(1),)

    with kept(seed=1):
        quiet = [x.item() for (x,) in batches_of(Noisy(), seed=0, epoch=0)]
        after = torch.rand(1)
    with kept(seed=1):
        expected = torch.rand(1)
        busy = []
        for (x,) in batches_of(Noisy(), seed=0, epoch=0):
            torch.rand(5)
            busy.append(x.item())
    assert quiet == busy
    assert torch.equal(after, expected)


def test_data_that_is_no_iterable_is_refused():
    with pytest.raises(SettingError, match="iterable of batches"):
        next(batches_of(3, seed=0, epoch=0))
