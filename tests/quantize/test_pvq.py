"""PVQ: points on pyramids."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from supple.calibrate import statistics
from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.layers.pyramid_linear import Pyramid, PyramidCodes, PyramidLinear
from supple.layers.rotated_input import RotatedInput
from supple.quantize._solvers import output_error
from supple.quantize.pvq import PVQ, gain_levels
from supple.storage import load, save
from supple.testing.toys import generator
from supple.transforms import Given


def all_points(dimensions: int, pulses: int) -> Tensor:
    reach = range(-pulses, pulses + 1)
    points = torch.tensor(list(itertools.product(reach, repeat=dimensions)))
    return points[points.abs().sum(1) == pulses]


def layer_and_batches() -> tuple[nn.Linear, list[tuple[Tensor]]]:
    source = generator()
    layer = nn.Linear(11, 7)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(7, 11, generator=source))
    mixed = torch.randn(11, 11, generator=source) + 2 * torch.eye(11)
    return layer, [(torch.randn(64, 11, generator=source) @ mixed,)]


def test_every_point_of_a_pyramid_has_a_code_of_its_own() -> None:
    pyramid = Pyramid(5, 4)
    points = all_points(5, 4)
    assert pyramid.count == len(points) == 450
    codes = pyramid.encode(points)
    assert sorted(codes.tolist()) == list(range(450))
    assert torch.equal(pyramid.decode(codes), points)
    # Behind 0 lie all points of one number less, then +1 and -1, and so on.
    assert pyramid.decode(torch.arange(3)).tolist() == [
        [0, 0, 0, 0, 4],
        [0, 0, 0, 0, -4],
        [0, 0, 0, 1, 3],
    ]


def test_codes_of_large_pyramids_come_back() -> None:
    pyramid = Pyramid(16, 24)
    assert pyramid.bits == 46
    points = pyramid.nearest(torch.randn(10_000, 16, generator=generator()))
    codes = pyramid.encode(points)
    assert codes.min() >= 0
    assert codes.max() < pyramid.count
    assert codes.max() > 2**40
    assert torch.equal(pyramid.decode(codes), points.long())
    ends = torch.tensor([0, pyramid.count - 1])
    assert torch.equal(pyramid.encode(pyramid.decode(ends)), ends)


def test_points_lie_on_the_pyramid_and_near_the_best_direction() -> None:
    pyramid = Pyramid(4, 6)
    x = torch.randn(200, 4, generator=generator())
    x[0], x[1] = 0.0, torch.tensor([0.0, 0.0, -3.0, 0.0])
    points = pyramid.nearest(x)
    assert torch.equal(points.abs().sum(1), torch.full((200,), 6.0))
    assert points[1].tolist() == [0.0, 0.0, -6.0, 0.0]
    every = all_points(4, 6).float()
    best = torch.cosine_similarity(x[1:, None], every, dim=2).amax(1)
    ours = torch.cosine_similarity(x[1:], points[1:], dim=1)
    assert (best - ours).max() < 0.03  # one pulse after the other is not always best
    assert (best - ours).mean() < 0.001


def test_levels_of_gains_are_the_means_of_what_they_stand_for() -> None:
    rows = torch.randn(4000, 64, generator=generator())
    rows = rows / rows.norm(dim=1, keepdim=True)
    gains = rows.view(-1, 16).norm(dim=1)
    levels = gain_levels(16, 64, 3)
    place = (gains[:, None] - levels).abs().argmin(1)
    for number in range(8):
        assert gains[place == number].mean() == pytest.approx(float(levels[number]), abs=0.004)


def test_groups_to_come_make_up_for_the_error() -> None:
    layer, batches = layer_and_batches()
    matrix = layer.weight.detach().clone()
    hessian = statistics(layer, batches, ("gram",))["weight"].gram.double()
    method = PVQ(vector=4, gain=2, rotated=False)
    found = method.quantized(nn.Sequential(layer), Given(tuple(batches)))["0.weight"]
    assert isinstance(found, PyramidCodes)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(11)
    scale, levels = matrix.norm(dim=1).half().float(), gain_levels(4, 11, 2)
    work, rounded = matrix.double(), torch.zeros(7, 12)
    for first in (0, 4, 8):
        x = torch.zeros(7, 4)
        x[:, : 11 - first] = work[:, first : first + 4].float()
        points = method.pyramid().nearest(x)
        direction = points / points.norm(dim=1, keepdim=True)
        wanted = (x * direction).sum(1) / scale
        gain = levels[(wanted[:, None] - levels).abs().argmin(1)]
        rounded[:, first : first + 4] = direction * (gain * scale)[:, None]
        done, rest = slice(0, min(first + 4, 11)), slice(first + 4, 11)
        change = rounded[:, done] - matrix[:, done]
        answer = torch.linalg.solve(damped[rest, rest], damped[rest, done] @ change.double().T)
        work[:, rest] = matrix[:, rest] - answer.T
    fitted = (found.scale / scale)[:, None] * rounded[:, :11]
    torch.testing.assert_close(found.dequantize(), fitted)


def test_scales_are_fitted_to_the_outputs() -> None:
    layer, batches = layer_and_batches()
    before = layer.weight.detach().clone()
    hessian = statistics(layer, batches, ("gram",))["weight"].gram
    small = PVQ(vector=4, gain=2, rotated=False).apply(layer, calibration=batches)
    errors = [
        output_error((1 + change) * small.weight[row, None] - before[row, None], hessian)
        for row in range(7)
        for change in (-0.01, 0.0, 0.01)
    ]
    for row in range(7):
        assert errors[3 * row + 1] < min(errors[3 * row], errors[3 * row + 2])


def test_directions_lose_less_than_scalars_of_as_many_bits() -> None:
    layer = nn.Linear(128, 64, bias=False)
    with torch.no_grad():
        layer.weight.normal_(generator=generator())
    small = PVQ(bits=3, solver="nearest").apply(layer)
    assert isinstance(small, RotatedInput)
    turned = small.rotation.inverse_t(layer.weight.detach())
    lost = (small.weight - turned).square().mean() / turned.square().mean()
    scalars = fake_quantize(turned, QuantSpec("int3", "group", 64))
    assert lost < 0.03 < 0.04 < (scalars - turned).square().mean() / turned.square().mean()
    bits = small.layer.quantized().total_bits / turned.numel()
    # 45 and 3 bits for 16 weights, 16 bits for a row of 128, 8 levels of 32 bits.
    assert bits == pytest.approx(3 + 16 / 128 + 8 * 32 / (64 * 128))
    coarse = PVQ(pulses=8, gain=4, solver="nearest").pyramid()
    assert coarse == Pyramid(16, 8)


def test_bits_are_those_of_the_file(tmp_path) -> None:
    layer, batches = layer_and_batches()
    small = PVQ(vector=8, gain=3).apply(layer, calibration=batches)
    assert isinstance(small.layer, PyramidLinear)
    codes = small.layer.quantized()
    assert codes.pyramid.bits == 21
    # 7 rows of 2 groups: 16 and 5 bits of codes apart, then gains; 8 levels, 7 scales.
    assert codes.total_bits == 14 * (21 + 3) + 8 * 32 + 7 * 16
    size = 14 * 2 + -(-14 * 5 // 8) + -(-14 * 3 // 8) + 8 * 4 + 7 * 2
    assert small.layer.nbytes == size + layer.bias.nbytes
    save(small, tmp_path / "small")
    loaded = load(tmp_path / "small", model=layer)
    assert torch.equal(loaded(batches[0][0]), small(batches[0][0]))


def test_rows_and_inputs_of_zeros_are_no_trouble() -> None:
    layer, _ = layer_and_batches()
    layer.weight.data[2] = 0.0
    small = PVQ(vector=4).apply(layer, calibration=[(torch.zeros(5, 11),)])
    assert small.weight.isfinite().all()
    assert not small.weight[2].any()
    assert not small.weight[3].allclose(torch.zeros(11))


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_stay_and_hold_rounded_weights(groups: int) -> None:
    conv, x = nn.Conv2d(4, 6, 3, groups=groups), torch.randn(5, 4, 6, 6, generator=generator())
    small = PVQ(vector=3).apply(nn.Sequential(conv), calibration=[(x,)])[0]
    assert type(small) is nn.Conv2d
    lost = (small.weight - conv.weight).norm() / conv.weight.norm()
    assert 0 < lost < 0.4


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": 4, "vector": 32}, "takes from 6 to 62 bits, got 125"),
        ({"bits": 2, "vector": 2, "gain": 4}, "takes from 2 to 62 bits, got 0"),
        ({"pulses": 200}, "choose fewer of either"),
        ({"pulses": 0}, "must be at least 1, got 16 and 0"),
        ({"gain": 9}, "gain must be from 0 to 8 bits, got 9"),
        ({"solver": "gtpq"}, "did you mean 'gptq'"),
        ({"group_size": 64}, "vector is the size of a group"),
    ],
)
def test_settings_that_can_not_be_used_say_so(settings, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        PVQ(**settings)


def test_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingError, match="1 to 256 levels of gains, got 0"):
        PyramidLinear(8, 6, 4, 3, 0)
    codes = PyramidLinear(8, 6, 4, 3, 2).quantized()
    with pytest.raises(SettingError, match=r"shape \(6, 9\), got one of shape \(6, 8\)"):
        PyramidLinear.from_codes(nn.Linear(9, 6), codes)
