"""Truths about training with few bits behind a rotation."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import supple
from supple.errors import SettingError
from supple.layers.packed import PackedLinear
from supple.quantize.quest import QuEST
from supple.testing.toys import generator

BOUNDS = {1: 0.7978846, 2: 1.4935346, 3: 2.0510684, 4: 2.5139306}  # those of the authors


def by_hand(x: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What rounding gives for rows, still rotated, where gradients pass, and the matrix."""
    block = torch.tensor(hadamard(size) / size**0.5, dtype=torch.float32)
    matrix = torch.block_diag(*[block] * (x.shape[-1] // size))
    rotated = x @ matrix
    sigma = rotated.square().mean(-1, keepdim=True).sqrt()
    bound = BOUNDS[bits] * sigma
    step = 2 * bound / (2**bits - 1)
    found = (rotated.clamp(-bound, bound) / step + 0.5).round() * step - step / 2
    return found, (found - rotated).abs() <= bound / (2**bits - 1), matrix


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_products_and_gradients_are_those_of_the_formulas(bits: int, kind) -> None:  # type: ignore[no-untyped-def]
    layer = nn.Linear(24, 5) if kind is nn.Linear else Conv1D(5, 24)
    x = torch.randn(3, 7, 24, generator=generator(), requires_grad=True)
    rule = QuEST(bits=bits, activations=bits)
    net = rule.wrap(layer, (x.detach(),))
    with torch.no_grad():
        weight = layer.weight if kind is nn.Linear else layer.weight.T
        rounded, weight_passes, matrix = by_hand(weight, bits, 8)
        seen, input_passes, _ = by_hand(x, bits, 8)
    expected = seen @ rounded.T + layer.bias
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    above = torch.randn(expected.shape, generator=generator(1))
    net(x).backward(above)
    of_input = (above @ rounded * input_passes) @ matrix.T
    torch.testing.assert_close(x.grad, of_input, rtol=1e-4, atol=1e-4)
    of_weight = torch.einsum("nto,nti->oi", above, seen) * weight_passes @ matrix.T
    found = net.layer.weight.grad
    torch.testing.assert_close(
        found if kind is nn.Linear else found.T, of_weight, rtol=1e-4, atol=1e-3
    )
    small = rule.finished(net)
    torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-4)


def test_what_is_finished_holds_codes_and_comes_back_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3), nn.Conv1d(4, 2, 1))
    x = torch.randn(4, 6, generator=generator())
    rule = QuEST(bits=1, activations=2, layers="0, 2", scale_format="fp16")
    net = rule.wrap(model[:3], (x,))
    small = rule.finished(net).eval()
    assert torch.equal(small(x), net(x))
    assert isinstance(small[2].layer, PackedLinear)
    assert small[2].layer.nbytes == 16 * 3 // 8 + 2 * 3 + 4 * 3
    supple.save(small, tmp_path / "small")
    loaded = supple.load(tmp_path / "small", model=model[:3])
    assert torch.equal(loaded(x), small(x))
    program = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(program(x), small(x))


def test_one_side_alone_is_rounded_and_both_are_rotated() -> None:
    layer = nn.Linear(16, 5)
    x = torch.randn(7, 16, generator=generator())
    weights = QuEST(bits=2, activations=None)
    rounded, _, matrix = by_hand(layer.weight.detach(), 2, 16)
    expected = x @ matrix @ rounded.T + layer.bias
    net = weights.wrap(layer, (x,))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.finished(net)(x), expected, rtol=1e-4, atol=1e-4)
    inputs = QuEST(bits=16, activations=2)
    seen, _, _ = by_hand(x, 2, 16)
    expected = seen @ (layer.weight @ matrix).T + layer.bias
    net = inputs.wrap(layer, (x,))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inputs.finished(net)(x), expected, rtol=1e-4, atol=1e-4)


def test_convolutions_are_rounded_by_example_and_not_rotated() -> None:
    layer = nn.Conv2d(4, 8, 1, bias=False)
    x = torch.randn(2, 4, 3, 3, generator=generator())
    net = QuEST(bits=2, activations=2).wrap(layer, (x,))
    weight, _, _ = by_hand(layer.weight.detach().flatten(1), 2, 1)
    seen, _, _ = by_hand(x.flatten(1), 2, 1)
    expected = torch.einsum("oc,nchw->nohw", weight, seen.reshape(x.shape))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"bits": 0}, "bits must be from 1 to 16"),
        ({"trust": 0}, "trust must be above 0"),
        ({"diagonal": 12}, "power of two, got 12"),
        ({"scale_format": "fp17"}, "scale_format must be one of"),
    ):
        with pytest.raises(SettingError, match=match):
            QuEST(**settings)  # type: ignore[arg-type]
