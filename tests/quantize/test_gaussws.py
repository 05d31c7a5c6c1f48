"""Truths about training with noise in the place of rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import supple
from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.layers.packed import PackedLinear
from supple.layers.sampled_weight import SampledWeight
from supple.quantize.gaussws import GaussWS
from supple.testing.toys import generator


def largest(x: torch.Tensor, side: int) -> torch.Tensor:
    found = torch.empty_like(x)
    for row in range(0, x.shape[0], side):
        for column in range(0, x.shape[1], side):
            block = x[row : row + side, column : column + side]
            found[row : row + side, column : column + side] = block.abs().max()
    return found


def test_noise_is_a_whole_number_of_steps_of_its_block() -> None:
    x = torch.randn(70, 130, generator=generator()) * torch.arange(1, 131)
    layer = SampledWeight((70, 130), group_size=32, bits=3, initial_bits=5)
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noise = (drawn / 2).round() * largest(x, 32) * 2.0**-4
    assert torch.equal(layer(x), (x + noise).bfloat16().float())
    shares = [float((noise.sign() == sign).float().mean()) for sign in (-1, 0, 1)]
    assert shares == pytest.approx([0.1587, 0.6827, 0.1587], abs=0.02)
    layer.seed = 1
    assert not torch.equal(layer(x), (x + noise).bfloat16().float())


def test_weights_have_the_gradient_of_the_identity_and_bits_have_one() -> None:
    x = torch.randn(6, 9, generator=generator(), requires_grad=True)
    layer = SampledWeight((6, 9), group_size=4, bits=4, initial_bits=6)
    with torch.no_grad():
        layer.shares.fill_(0.5)
    above = torch.randn(6, 9, generator=generator(1))
    of_x, of_shares = torch.autograd.grad((layer(x) * above).sum(), [x, layer.shares])
    assert torch.equal(of_x, above)
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noise = (drawn / 2).round() * largest(x.detach(), 4) * 2.0**-4  # at 5 bits
    by_place = above * noise * -math.log(2) * 2
    blocks = [by_place[r : r + 4, c : c + 4].sum() for r in (0, 4) for c in (0, 4, 8)]
    torch.testing.assert_close(of_shares, torch.stack(blocks))


@pytest.mark.parametrize(("share", "name"), [(1.0, "e3m4"), (0.4, "e3m3"), (0.0, "e3m2")])
def test_what_is_judged_is_rounded_to_the_learned_width(share: float, name: str) -> None:
    layer = SampledWeight((5, 7), group_size=4).eval()
    with torch.no_grad():
        layer.shares.fill_(share)
    x = torch.randn(5, 7, generator=generator())
    spec = QuantSpec(name, "group", 4, scale_format="e8m0-up")
    assert torch.equal(layer(x), fake_quantize(x, spec))
    assert torch.equal(layer.quantized(x).dequantize(), layer(x))


def test_bits_decay_noise_changes_and_a_run_comes_back() -> None:
    rule = GaussWS(group_size=4, weight_decay=2.0)
    net = rule.wrap(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    optimizer = torch.optim.SGD(
        [
            {"params": [p for n, p in net.named_parameters() if "shares" in n], "lr": 0.0},
            {"params": [p for n, p in net.named_parameters() if "shares" not in n]},
        ],
        lr=0.1,
    )
    companion = rule.attach(net, optimizer, steps=5)
    optimizer.step()
    assert net[0].of_weight.shares.unique().tolist() == [1.0]
    optimizer.param_groups[0]["lr"] = 0.1
    seeds = {net[i].of_weight.seed for i in (0, 2)}
    optimizer.step()
    assert net[0].of_weight.shares.unique().item() == pytest.approx(0.8)
    now = {net[i].of_weight.seed for i in (0, 2)}
    assert len(seeds | now) == 4
    state = companion.state_dict()
    optimizer.step()
    companion.load_state_dict(state)
    assert {net[i].of_weight.seed for i in (0, 2)} == now


def test_what_is_finished_holds_the_floats_and_comes_back_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 6, generator=generator())
    rule = GaussWS(bits=3, initial_bits=4, group_size=4)
    net = rule.wrap(model)
    with torch.no_grad():
        net[2].of_weight.shares.zero_()
    small = rule.finished(net).eval()
    assert [small[i].spec.format.name for i in (0, 2)] == ["e3m2", "e3m1"]
    assert isinstance(small[0], PackedLinear)
    torch.testing.assert_close(small(x), net.eval()(x))
    assert not torch.equal(net.train()(x), small(x))
    supple.save(small, tmp_path / "small")
    assert torch.equal(supple.load(tmp_path / "small", model=model)(x), small(x))
    supple.save(net.eval(), tmp_path / "net")
    assert torch.equal(supple.load(tmp_path / "net", model=model)(x), net(x))


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"activations": 8}, "leave activations=None, got 8"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"initial_bits": 3}, "initial_bits from bits to 6, got 4 and 3"),
        ({"initial_bits": 7}, "initial_bits from bits to 6"),
        ({"group_size": 0}, "group_size must be at least 1"),
    ):
        with pytest.raises(SettingError, match=match):
            GaussWS(**settings)  # type: ignore[arg-type]
