"""AWQ: factors of channels, and ranges that are drawn in."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.graph.feeds import Feed, feeds
from supple.layers.packed import PackedLinear
from supple.layers.scaled_input import ScaledInput
from supple.quantize.awq import AWQ, drawn_in
from supple.quantize.base import baseline
from supple.testing.toys import generator
from supple.transforms import Given
from tests.test_feeds import Block

METHOD = AWQ(bits=3, group_size=4, candidates=5)


class Net(nn.Module):
    """Two blocks in a list, the first one's norm with outliers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        source = generator()
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.3, generator=source)
            for block in self.blocks:
                block.norm.weight[5] *= 40
                block.norm_2.weight[2] *= 40
                for layer in (block.q, block.k, block.v):
                    layer.weight[:, 5] /= 40
                for layer in (block.gate, block.up):
                    layer.weight[:, 2] /= 40

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Net().eval()


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor]]:
    source = generator(5)
    return [(torch.randn(3, 7, 12, generator=source),) for _ in range(2)]


def given(batches: list[Any]) -> Given:
    return Given(tuple(batches), None, generator())


def slow_factors(
    model: nn.Module, feed: Feed, inputs: Tensor, run: Any, method: AWQ = METHOD
) -> Tensor:
    """Tries all exponents on copies of the network."""
    size = inputs.abs().reshape(-1, feed.size).mean(0)
    if feed.producer == (("blocks.0.v.weight", 0), ("blocks.0.v.bias", 0)):
        size = torch.stack([size[feed.units == unit].mean() for unit in feed.units])
    found = []
    for number in range(method.candidates):
        scale = size ** (number / method.candidates)
        scale = scale / (scale.max() * scale.min()).sqrt()
        other = copy.deepcopy(model)
        for name in feed.consumers:
            weight = other.get_parameter(name).data
            weight.copy_(fake_quantize(weight * scale, method.spec()) / scale)
        with torch.no_grad():
            error = float((run(other) - run(model)).square().sum())
        found.append((error, scale))
    return min(found, key=lambda one: one[0])[1]


def test_factors_are_those_of_the_best_exponent(
    model: nn.Module, batches: list[tuple[Tensor]]
) -> None:
    found = [f for f in feeds(model, batches[0]) if f.consumers[0].startswith("blocks.0")]
    x = torch.cat([batch[0] for batch in batches])
    block: Any = model.get_submodule("blocks.0")
    with torch.no_grad():
        h = block.norm(x)
        mixed: list[Tensor] = []
        handle = block.o.forward
        block.o.forward = lambda given: (mixed.append(given), handle(given))[1]
        block(x)
        del block.o.forward
    ours = dict(METHOD.factors(model, found, given(batches)))
    slow = [
        # What comes out of the module around queries, keys and values counts, ...
        slow_factors(model, found[0], h, lambda net: net.blocks[0](x)),
        # ... and of a layer that is alone, its own output.
        slow_factors(model, found[1], mixed[0], lambda net: net.blocks[0].o(mixed[0])),
    ]
    assert not torch.allclose(slow[0], torch.ones(12))
    for feed, expected in zip(found, slow, strict=False):
        torch.testing.assert_close(ours[feed], expected, rtol=1e-4, atol=1e-5)


def test_scaled_channels_change_no_output_and_save_what_rounding_loses(
    model: nn.Module, batches: list[tuple[Tensor]]
) -> None:
    x = torch.randn(4, 7, 12, generator=generator(9))
    prepared, within = METHOD.prepared(copy.deepcopy(model), given(batches))
    assert not torch.equal(
        prepared.get_parameter("blocks.0.norm.weight"), model.blocks[0].norm.weight
    )  # type: ignore
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-4, atol=1e-4)
    nearest = baseline("rtn-asymmetric", bits=3, group_size=4)
    small = within.install(prepared, within.quantized(prepared, given(batches)), given(batches))
    with torch.no_grad():
        lost = [(one(x) - model(x)).square().mean() for one in (small, nearest.apply(model))]
    assert lost[0] < 0.7 * lost[1]


def test_layers_scale_their_input_where_nothing_before_can() -> None:
    source = generator()
    net = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))
    x = torch.randn(50, 8, generator=source)
    x[:, 3] *= 50
    with torch.no_grad():
        net[0].weight.normal_(generator=source)
    small = METHOD.apply(net, calibration=[(x,)])
    assert isinstance(small[0], ScaledInput)
    assert isinstance(small[0].layer, PackedLinear)
    kept = small[0].weight * small[0].factor
    expected = fake_quantize(net[0].weight.detach(), METHOD.spec())
    assert ((kept - net[0].weight) @ x.T).norm() < ((expected - net[0].weight) @ x.T).norm()


def test_ranges_are_drawn_in_to_where_a_group_loses_least() -> None:
    source = generator()
    matrix = torch.randn(5, 11, generator=source)
    rows = torch.randn(40, 11, generator=source) * torch.linspace(0.1, 3, 11)
    for symmetric in (True, False):
        spec = QuantSpec("int3" if symmetric else "uint3", "group", 4, symmetric)
        least, most = drawn_in(matrix, rows.T @ rows, spec, 0.5, 20)
        drawn = 0
        for row in range(5):
            for group, start in enumerate((0, 4, 8)):
                part, x = matrix[row, start : start + 4], rows[:, start : start + 4]
                found = []
                for step in range(10):
                    reach = (1 - step / 20) * part.abs().max()
                    own = QuantSpec(spec.format, symmetric=symmetric)
                    ends = own.scales(part.clamp(-reach, reach)[None])
                    now = fake_quantize(part[None], own, *ends)[0]
                    found.append(float(((now - part) @ x.T).square().sum()))
                ends = own.scales(torch.stack((least[row, group], most[row, group]))[None])
                now = fake_quantize(part[None], own, *ends)[0]
                lost = float(((now - part) @ x.T).square().sum())
                assert lost <= 1.0001 * min(found)
                drawn += lost < 0.99 * found[0]
        assert drawn


def test_groups_of_a_convolution_have_their_own_inputs() -> None:
    source = generator()
    matrix = torch.randn(4, 3, generator=source)
    grams = torch.stack([torch.eye(3), torch.diag(torch.tensor([9.0, 0.01, 0.01]))])
    spec = QuantSpec("int2")
    ends = drawn_in(matrix, grams, spec, 0.5, 20)
    for place, rows in enumerate((slice(0, 2), slice(2, 4))):
        alone = drawn_in(matrix[rows], grams[place], spec, 0.5, 20)
        assert all(torch.equal(a[rows], b) for a, b in zip(ends, alone, strict=True))


def test_queries_and_keys_keep_their_ranges(
    model: nn.Module, batches: list[tuple[Tensor]]
) -> None:
    prepared, within = METHOD.prepared(copy.deepcopy(model), given(batches))
    whole = copy.deepcopy(prepared)
    fine = dataclasses.replace(within, candidates=20)
    found = fine.quantized(prepared, given(batches))
    for name, drawn in (("blocks.0.q", False), ("blocks.1.k", False), ("blocks.0.down", True)):
        scale, _ = METHOD.spec().scales(whole.get_parameter(f"{name}.weight").detach())
        assert torch.equal(found[f"{name}.weight"].scale, scale) != drawn


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"clip": 1.0}, r"clip must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(SettingError, match=match):
            AWQ(**settings)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="AWQ needs calibration"):
        AWQ().apply(nn.Linear(2, 3))
