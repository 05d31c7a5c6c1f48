"""Truths about training with scales that are statistics, and about its end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import supple
from supple.errors import SettingError
from supple.layers.packed import PackedLinear
from supple.quantize.ofq import OFQ, Oscillation
from supple.testing.toys import generator


def by_hand(weight: Tensor, bits: int) -> Tensor:
    scale = 2 * weight.abs().mean(1, keepdim=True)
    n = 2 ** (bits - 1)
    inside = (weight / scale).clamp(-1, 1 - 1e-6)
    return scale * ((inside * n - 0.5).round() + 0.5) / n


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_are_rounded_by_the_formula_and_their_gradient_is_plain(bits: int) -> None:
    layer = nn.Linear(24, 5)
    with torch.no_grad():
        layer.weight[0, :3] *= 9
    net = OFQ(bits=bits, activations=None).wrap(layer)
    torch.testing.assert_close(net.rounded(), by_hand(layer.weight.detach(), bits))
    (found,) = torch.autograd.grad(net(torch.ones(1, 24)).sum(), net.layer.weight)
    assert torch.equal(found, torch.ones_like(found))
    assert not list(net.of_weight.parameters())


def test_inputs_have_a_learned_step_and_shifts() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(9, 6, generator=generator())
    rule = OFQ(bits=2, activations=3)
    net = rule.wrap(model, (x,))
    assert [net[i].of_input.spec.format.name for i in (0, 2)] == ["int3", "uint3"]
    with torch.no_grad():
        for i in (0, 2):
            net[i].of_input.before.uniform_(-0.1, 0.1)
            net[i].of_input.after.uniform_(-0.1, 0.1)
    first = net[0].of_input
    step = first.scale.detach()
    seen = ((x + first.before) / step).round().clamp(-4, 3) * step + first.after
    torch.testing.assert_close(first(x), seen)
    small = rule.finished(net).eval()
    torch.testing.assert_close(small(x), net(x))
    assert isinstance(small[2].layer, PackedLinear)


def test_in_the_end_only_weights_near_a_threshold_move() -> None:
    layer = nn.Linear(5, 1, bias=False)
    # The scale is 2, a step is 1, and thresholds are -1, 0 and 1; 2 is none.
    weights = torch.tensor([[1.004, 0.5, -0.003, 2.0, -1.493]])
    with torch.no_grad():
        layer.weight.copy_(weights)
    rule = OFQ(bits=2, activations=None, delay=0.5)
    net = rule.wrap(layer)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=0.1)
    rule.attach(net, optimizer, steps=2)
    for moves in ([True] * 5, [True, False, True, False, False]):
        before = net.weight.detach().clone()
        optimizer.zero_grad()
        net(torch.ones(1, 5)).sum().backward()
        optimizer.step()
        assert (net.weight != before)[0].tolist() == moves


def test_without_an_end_all_weights_move() -> None:
    net = OFQ(delay=1.0, activations=None).wrap(nn.Linear(5, 3, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    OFQ(delay=1.0, activations=None).attach(net, optimizer, steps=1)
    before = net.weight.detach().clone()
    net(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    assert (net.weight != before).all()


def test_reversals_are_counted() -> None:
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-0.2, 1.0, -1.0, 1.0]]))
    net = OFQ(bits=2, activations=None).wrap(layer)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    watch = Oscillation(net, optimizer, 5)
    for first in (0.2, -0.2, 0.2, 0.2, -0.2):  # changes, reverses twice, stays, reverses
        with torch.no_grad():
            net.weight[0, 0] = first
        watch.after()
    assert watch.rate() * 4 == pytest.approx(0.01 * (1 + 0.99**2 + 0.99**3))
    state = watch.state_dict()
    other = Oscillation(net, optimizer, 4)
    other.load_state_dict(state)
    assert other.rate() == watch.rate()


def test_it_is_packed_and_comes_back_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(4, 2, 3, 3, generator=generator())
    rule = OFQ(bits=2, activations=4)
    small = rule.finished(rule.wrap(model, (x,))).eval()
    supple.save(small, tmp_path / "small")
    loaded = supple.load(tmp_path / "small", model=model)
    assert torch.equal(loaded(x), small(x))
    torch.testing.assert_close(
        small[0].dense_weight().flatten(1), by_hand(model[0].weight.detach().flatten(1), 2)
    )


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"delay": 1.5}, "delay must be in"),
        ({"boundary": 0.0}, "boundary must be above 0"),
        ({"bits": 1}, "bits must be from 2 to 16"),
    ):
        with pytest.raises(SettingError, match=match):
            OFQ(**settings)  # type: ignore[arg-type]
