"""Truths about invertible maps of inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import supple
from supple.errors import SettingError
from supple.layers.rotated_input import RotatedInput
from supple.layers.rotations import (
    BlockHadamard,
    KroneckerAffine,
    RandomHadamard,
    Rotation,
    hadamard,
)
from supple.rebuild import replace
from supple.testing.toys import generator


def matrix(rotation: Rotation, size: int) -> torch.Tensor:
    return rotation(torch.eye(size, dtype=torch.float64))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator())


def test_walsh_matrices_are_those_of_bit_counts() -> None:
    # Sylvester: the sign at (i, j) is the parity of the bits that i and j share.
    for size in (2, 8, 256):
        wanted = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
        found = matrix(BlockHadamard(size), size) * size**0.5
        torch.testing.assert_close(found, torch.tensor(wanted).double())


@pytest.mark.parametrize("size", [1, 12, 20, 28, 36, 44, 704, 108])
def test_hadamard_matrices_have_orthogonal_rows_of_signs(size: int) -> None:
    found = hadamard(size)
    assert found is not None
    assert bool((found.abs() == 1).all())
    assert torch.equal(found @ found.T, size * torch.eye(size))
    assert hadamard(92) is None


@pytest.mark.parametrize("size", [1, 2, 5, 7, 12, 44, 172, 256, 704])
def test_random_rotations_are_orthogonal_and_spread(size: int) -> None:
    rotation = RandomHadamard.drawn(size, generator())
    whole = matrix(rotation, size)
    torch.testing.assert_close(whole @ whole.T, torch.eye(size).double())
    x = random(3, size)
    torch.testing.assert_close(rotation.inverse(rotation(x)), x)
    if hadamard(size) is not None:
        torch.testing.assert_close(whole.abs(), torch.full_like(whole, size**-0.5))


def test_random_rotations_differ_by_their_signs() -> None:
    one, other = (RandomHadamard.drawn(64, generator(seed)) for seed in (0, 1))
    assert not torch.equal(one.signs, other.signs)
    signs = one.signs.double()
    torch.testing.assert_close(matrix(one, 64), signs[:, None] * matrix(BlockHadamard(64), 64))


def test_kronecker_maps_are_kronecker_products() -> None:
    left, right, x = random(3, 3), random(5, 5), random(2, 15)
    affine = KroneckerAffine.of(left, right)
    whole = torch.kron(left, right)
    torch.testing.assert_close(affine(x), x @ whole)
    torch.testing.assert_close(affine.inverse(x), x @ whole.inverse())
    torch.testing.assert_close(affine.inverse_t(x), x @ whole.inverse().T)
    assert KroneckerAffine.sizes(256) == (16, 16)
    assert KroneckerAffine.sizes(4096 * 3) == (96, 128)


def test_layers_behind_a_rotation_come_back_from_files(tmp_path) -> None:
    linear = nn.Linear(12, 3)
    model = nn.Sequential(linear, nn.ReLU(), nn.Linear(3, 12), nn.Linear(12, 2))
    x = torch.randn(4, 12, generator=generator())
    before = model(x)
    kron = KroneckerAffine.of(random(3, 3).float(), random(4, 4).float())
    for place, rotation in ((0, RandomHadamard.drawn(12, generator())), (3, kron)):
        layer = model[place]
        with torch.no_grad():
            layer.weight.copy_(rotation.inverse_t(layer.weight))
        replace(model, {str(place): RotatedInput(layer, rotation)})
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    supple.save(model, tmp_path / "net")
    plain = nn.Sequential(nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 12), nn.Linear(12, 2))
    loaded = supple.load(tmp_path / "net", model=plain)
    assert torch.equal(loaded(x), model(x))
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), model(x))


def test_clipping_is_relative_to_the_token() -> None:
    layer = RotatedInput(nn.Identity(), BlockHadamard(1), clipped=True)
    x = torch.tensor([[4.0, 1.0, -3.0], [40.0, 10.0, -30.0]])
    assert torch.equal(layer(x), x)
    assert layer.clip is not None
    layer.clip.fill_(0.5)
    assert layer(x).tolist() == [[2.0, 1.0, -2.0], [20.0, 10.0, -20.0]]


def test_types_stay() -> None:
    x = torch.randn(2, 44, generator=generator()).bfloat16()
    for rotation in (RandomHadamard(44), BlockHadamard(4), KroneckerAffine(4, 11)):
        assert rotation(x).dtype == rotation.inverse_t(x).dtype == torch.bfloat16
        torch.testing.assert_close(rotation.inverse(rotation(x)), x, rtol=0.05, atol=0.05)


def test_sizes_that_can_not_be_used_say_so() -> None:
    with pytest.raises(SettingError, match="size must be a power of two, got 12"):
        BlockHadamard(12)
    with pytest.raises(SettingError, match="size must be at least 1, got 0"):
        RandomHadamard(0)
    with pytest.raises(SettingError, match="sizes must be at least 1, got 0 and 3"):
        KroneckerAffine(0, 3)
