"""The CIFAR ResNets are the published ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from supple.data.base import load
from supple.errors import CheckpointError, SettingError
from supple.files import write_tensors
from supple.models.cifar_resnet import BasicBlock, build


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85)])
def test_sizes_are_those_of_the_papers_table_6(depth, millions):
    net = build(depth=depth)
    weighted = [part for part in net.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions


def test_the_shortcut_takes_every_second_pixel_between_two_halves_of_zeros():
    block = BasicBlock(2, 5, stride=2)
    x = torch.arange(32.0).view(1, 2, 4, 4)
    shortcut = block.shortcut(x)
    assert shortcut.shape == (1, 5, 2, 2)
    assert shortcut[0, :, 0, 1].tolist() == [0, 2, 18, 0, 0]


def test_weights_of_another_depth_are_refused_by_name(tmp_path):
    file = tmp_path / "weights.safetensors"
    write_tensors(file, build(depth=8).state_dict())
    with pytest.raises(CheckpointError, match=r"weights\.safetensors.*names differ"):
        build(depth=14, weights=file)
    with pytest.raises(CheckpointError, match="does not fit"):
        build(depth=8, widths=(16, 32, 48), weights=file)


def test_weights_are_loaded(tmp_path):
    file = tmp_path / "weights.safetensors"
    source = build(depth=8)
    write_tensors(file, source.state_dict())
    loaded = build(depth=8, weights=file)
    assert torch.equal(loaded.linear.weight, source.linear.weight)


@pytest.mark.parametrize("settings", [{"depth": 21}, {"widths": (16, 8, 32)}, {"classes": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        build(**settings)


@pytest.mark.slow
def test_pretrained_resnet_20_classifies_81_percent_of_the_jpeg_images(data_folder):
    net = build(weights=data_folder / "resnet-cifar10" / "resnet20.safetensors").eval()
    images = load("images", path=data_folder / "cifar10", batch_size=500).test
    with torch.no_grad():
        right = sum((net(x).argmax(1) == y).sum().item() for x, y in images)
    assert right / images.examples == pytest.approx(0.810, abs=0.001)


def test_pretrained_resnet_20_is_far_above_chance_on_a_few_images(data_folder):
    net = build(weights=data_folder / "resnet-cifar10" / "resnet20.safetensors").eval()
    x, y = load("images", path=data_folder / "cifar10", limit=200).test.example(200)
    with torch.no_grad():
        assert (net(x).argmax(1) == y).float().mean() > 0.7
