"""PV-Tuning: codes that change few at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import supple
from supple.errors import SettingError
from supple.formats import QuantSpec, quantize
from supple.layers.packed import PackedConv2d, PackedLinear
from supple.layers.tuned_codes import TunedScalars, TunedVectors
from supple.layers.vector_linear import VectorLinear
from supple.quantize.pv_tuning import PVTuning, Tuning
from supple.testing.toys import generator


def normal(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(12, 11), nn.ReLU(), nn.Linear(11, 7))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator())
    return model


def data() -> list[tuple[Tensor, Tensor]]:
    given = [normal(32, 12, seed=seed) for seed in range(4)]
    return [(x, network()(x).detach()) for x in given]


def loss(output: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(output, batch[1])


def tuned(rule: PVTuning, steps: int, lr: float = 3e-3) -> tuple[nn.Module, list[float]]:
    """Trains on batches in turn; gives the network and the largest share changed, by step."""
    net = rule.wrap(network())
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    run = rule.start(
        net, optimizer, loss=loss, options=supple.training.step.StepOptions(steps=steps)
    )
    companion, batches, shares = run.companion, data(), []
    assert isinstance(companion, Tuning)
    for step in range(steps):
        run.step(batches[step % len(batches)])
        shares.append(max(companion.changed.values(), default=0.0))
    return net, shares


@torch.no_grad()
def lost(net: nn.Module) -> float:
    return sum(float(loss(net(x), (x, y))) for x, y in data())


def test_a_step_moves_values_and_then_the_codes_that_are_farthest() -> None:
    rule = PVTuning(bits=2, vector=1, lr=0.5, decay=0.75, share=0.3)
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[0.0, 1.0, 3.0]]))
    net = rule.wrap(nn.Sequential(layer))
    held = net[0].of_weight
    assert isinstance(held, TunedScalars)
    held.scale.data.fill_(1.0)
    held.zero.zero_()
    held.codes.copy_(torch.tensor([[0, 1, 3]]))
    net[0].weight.data.copy_(held.decoded())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.25)
    companion = rule.attach(net, optimizer, steps=4)
    x = torch.tensor([[1.0, -2.0, 0.0]])
    net(x).sum().backward()
    # The gradient by the matrix is x; by the scale it is 1 * -2.
    assert held.scale.grad.tolist() == [[-2.0]]
    optimizer.step()
    # A first step of Adam is 0.5 against the sign: -0.5, 1.5 and 3. Scales went to 1.5, so
    # values were 0, 1.5 and 4.5: the last is farthest and becomes 2 * 1.5.
    assert held.scale.item() == 1.5
    torch.testing.assert_close(net[0].weight.detach(), torch.tensor([[-0.5, 1.5, 3.0]]))
    assert held.codes.tolist() == [[0, 1, 2]]
    assert companion.changed == {"0": pytest.approx(1 / 3)}
    # The next gradient is the same in part: squares (1 + 3 * 1) / 16 over 1 - 0.75^2.
    net.zero_grad()
    net(torch.tensor([[1.0, 0.0, 0.0]])).sum().backward()
    optimizer.step()
    assert net[0].weight[0, 0].item() == pytest.approx(-0.5 - 0.5, abs=1e-5)


def test_without_accumulation_steps_begin_at_the_codes_values() -> None:
    rule = PVTuning(bits=2, vector=1, lr=0.01, accumulate=False, share=0.5)
    net = rule.wrap(network())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    rule.attach(net, optimizer, steps=4)
    for _ in range(3):
        net.zero_grad()
        loss(net(data()[0][0]), data()[0]).backward()
        before = net[2].rounded().detach()
        optimizer.step()
        assert (net[2].weight - before).abs().max() < 0.05


def test_the_farthest_vectors_take_the_nearest_entries() -> None:
    book = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [2.0, 0.0, 9.0]])
    tuned = TunedVectors.from_codes(torch.tensor([[0, 1], [0, 0]]), book, (4, 2))
    assert tuned.decoded().tolist() == [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    aim = torch.tensor([[0.2, 1.0], [0.0, 1.0], [0.1, 1.2], [1.9, 0.9]])
    # The second vectors have one real number: 1.9 is nearest to 2, whatever else is there.
    assert tuned.follow(aim, 0.25) == 0.25
    assert tuned.codes.tolist() == [[0, 1], [2, 0]]
    assert tuned.follow(aim, 0.5) == 0.25
    assert tuned.codes.tolist() == [[0, 1], [2, 1]]


def test_few_codes_change_and_less_is_lost() -> None:
    for settings in ({"vector": 1}, {"vector": 2, "bits": 1}):
        rule = PVTuning(**settings, share=0.04, lr=0.03)  # type: ignore[arg-type]
        start = rule.wrap(network())
        net, shares = tuned(rule, 20)
        assert lost(net) < 0.9 * lost(start)
        assert max(shares) > 0
        assert max(shares) <= 0.04 + 1 / 42  # at least one code
        now = [one.codes for one in net.modules() if hasattr(one, "follow")]
        then = [one.codes for one in start.modules() if hasattr(one, "follow")]
        assert any(not torch.equal(a, b) for a, b in zip(now, then, strict=True))
    still, shares = tuned(PVTuning(vector=1, share=0.0), 2)
    now = [one.codes for one in still.modules() if hasattr(one, "follow")]
    assert torch.equal(now[0], PVTuning(vector=1).wrap(network())[0].of_weight.codes)


def test_what_is_finished_holds_codes_and_computes_the_same() -> None:
    for rule, kind in ((PVTuning(vector=1, bits=3), PackedLinear), (PVTuning(), VectorLinear)):
        net, _ = tuned(rule, 2)
        small = rule.finished(net)
        assert [type(small[place]) for place in (0, 2)] == [kind, kind]
        x = data()[0][0]
        torch.testing.assert_close(small(x), net(x))
    net = PVTuning(vector=1, group_size=4).wrap(nn.Sequential(nn.Conv2d(2, 3, 3)))
    assert isinstance(PVTuning().finished(net)[0], PackedConv2d)
    net = PVTuning(bits=1, vector=2).wrap(nn.Sequential(nn.Conv2d(2, 3, 3), Conv1D(3, 5)))
    small = PVTuning(bits=1, vector=2).finished(net)
    assert [type(one) for one in small] == [nn.Conv2d, VectorLinear]
    torch.testing.assert_close(small[0].weight, net[0].rounded())


def test_scales_are_rounded_as_they_are_held() -> None:
    spec = QuantSpec("int4", scale_format="fp16")
    tuned = TunedScalars.from_quantized(quantize(normal(3, 5), spec))
    with torch.no_grad():
        tuned.scale.add_(1e-5)
    found = tuned.solved()
    assert torch.equal(found.scale, found.scale.half().float())
    torch.testing.assert_close(found.dequantize(), tuned.decoded().detach(), rtol=0, atol=0)


def test_settings_that_can_not_be_used_say_so() -> None:
    for settings, match in (
        ({"share": 1.5}, r"share must be in \[0, 1\], got 1.5"),
        ({"vector": 9}, "a code has at most 16 bits"),
        ({"group_size": 32}, "group_size goes with vector=1"),
        ({"activations": 8}, "leave activations=None"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\)"),
        ({"iterations": 0}, "at least 1"),
    ):
        with pytest.raises(SettingError, match=match):
            PVTuning(**settings)  # type: ignore[arg-type]
