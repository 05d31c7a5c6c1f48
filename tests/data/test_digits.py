"""The digits come in three fixed parts."""

from __future__ import annotations

import torch

from supple.data.base import load


def everything(data):
    images, labels = zip(*data, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_parts_are_disjoint_and_complete():
    splits = load("digits")
    parts = [everything(part) for part in (splits.train, splits.validation, splits.test)]
    assert [len(labels) for _, labels in parts] == [978, 275, 544]
    rows = torch.cat([images.flatten(1) for images, _ in parts])
    # All 1,797 images differ in at least one pixel, so equal rows would be the same example.
    assert len(torch.unique(rows, dim=0)) == 1797


def test_every_part_holds_every_class_alike():
    for part in (lambda s: s.train, lambda s: s.validation, lambda s: s.test):
        counts = everything(part(load("digits")))[1].bincount()
        assert len(counts) == 10
        assert counts.max() - counts.min() <= 7


def test_parts_are_the_same_for_every_seed_and_the_order_is_not():
    first, second = load("digits", seed=1), load("digits", seed=2)
    assert torch.equal(everything(first.train)[0], everything(second.train)[0])
    assert not torch.equal(next(first.train.epoch(0))[1], next(second.train.epoch(0))[1])


def test_the_test_part_is_pinned():
    # A change here makes every published figure incomparable.
    labels = everything(load("digits").test)[1]
    assert labels[:12].tolist() == [3, 5, 7, 3, 6, 9, 2, 6, 5, 0, 8, 7]


def test_images_are_normalised():
    images, labels = everything(load("digits").train)
    assert images.shape == (978, 1, 8, 8)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    assert labels.dtype == torch.int64


def test_augmented_images_are_shifted_by_one_pixel_at_most():
    plain, moved = load("digits"), load("digits", augment=True)
    (before, labels), (after, same) = next(plain.train.epoch(0)), next(moved.train.epoch(0))
    assert torch.equal(labels, same)
    padded = torch.nn.functional.pad(before, [1] * 4, value=before.min().item())
    shifts = [padded[:, :, r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
    equal = torch.stack([(shift - after).abs().amax((1, 2, 3)) < 1e-6 for shift in shifts])
    assert equal.any(0).all()
    assert not torch.equal(before, after)
