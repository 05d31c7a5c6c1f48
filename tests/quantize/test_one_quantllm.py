"""One QuantLLM: adapters by bits, sizes whose mean moves, and codes of GPTQ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import supple
from supple.axes.adapted_bits import AdaptedBits
from supple.axes.bits import Bits
from supple.calibrate import statistics
from supple.cost.count import count
from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.network import Elastic, elastic
from supple.quantize._solvers import gptq
from supple.quantize.one_quantllm import OneQuantLLM, leaning
from supple.testing.toys import generator
from supple.training.step import StepOptions

X = torch.randn(23, 11, generator=generator(3))


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(11, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(5)))
    return net


def network(**settings) -> Elastic:
    axis = AdaptedBits(**{"choices": (2, 3, 4), "group_size": 4, "rank": 2, **settings})
    return elastic(model(), X, axes=[axis], verify=False)


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def run(net, method, steps=3):
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.5)
    batch = (X, torch.arange(23) % 3)
    going = method.start(
        net, optimizer, loss=loss, generator=generator(), options=StepOptions(steps=steps)
    )
    return [going.step(batch) for _ in range(steps)]


def test_codes_begin_as_the_nearest_and_adapters_move_zero_points() -> None:
    net = network()
    owner = net.module[0].weight.detach()
    spec = QuantSpec("uint3", "group", 4, False, "fp16", "fp16")
    with net.at({"0.bits": 3}):
        torch.testing.assert_close(net.module[0].weight, fake_quantize(owner, spec))
        before = net.module[0].weight.detach().clone()
    held = dict(net.module.named_parameters())
    with torch.no_grad():
        held["0.supple_weight_up_3"].normal_(generator=generator())
    added = held["0.supple_weight_up_3"] @ held["0.supple_weight_down_3"]
    with net.at({"0.bits": 3}):
        change = net.module[0].weight - before
    wanted = added.repeat_interleave(4, 1)[:, :11]
    # Zero points are held in float16.
    torch.testing.assert_close(change, wanted, rtol=0, atol=2e-3)
    with net.at({"0.bits": 2}):  # another adapter
        torch.testing.assert_close(
            net.module[0].weight,
            fake_quantize(owner, QuantSpec("uint2", "group", 4, False, "fp16", "fp16")),
        )


def test_what_is_extracted_holds_codes_with_the_adapter_in_them(tmp_path) -> None:
    net = network(inputs=(8,))
    assert not [fixed for fixed in net.space.fixed if "verif" in fixed.reason]
    run(net, OneQuantLLM(every=1, levels=3))
    net.eval()
    for number, config in enumerate((net.space.smallest(), net.space.random(2))):
        small = net.extract(config)
        with net.at(config):
            torch.testing.assert_close(net.module(X), small(X))
        counted = count(small, (X,))
        priced = net.costs(net.space.config(config))
        for name in ("params", "weight_bytes"):
            assert int(priced[name][0]) == counted[name]
        supple.save(small, tmp_path / str(number))
        assert torch.equal(supple.load(tmp_path / str(number), model=model())(X), small(X))


def test_only_adapters_of_sizes_in_a_step_are_trained() -> None:
    net = network()
    before = {name: p.detach().clone() for name, p in net.module.named_parameters()}
    run(net, OneQuantLLM(every=1, levels=2), steps=1)  # begins with the fewest bits everywhere
    changed = {n for n, p in net.module.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{layer}.supple_weight_up_2" for layer in (0, 2, 3)}
    run(net, OneQuantLLM(every=1, levels=2), steps=2)  # the most bits at the second
    changed = {n for n, p in net.module.named_parameters() if not torch.equal(p, before[n])}
    assert {name.rpartition("_")[2] for name in changed} == {"2", "4"}
    assert {name.rpartition(".")[2].split("_")[2] for name in changed} == {"up", "down"}


def test_shared_adapters_serve_all_bits() -> None:
    net = network(shared=True)
    run(net, OneQuantLLM(every=1, levels=2), steps=1)
    names = {n.partition(".")[2] for n in net.added_parameters() if n.startswith("0.")}
    assert {name for name in names if "weight_up" in name} == {"supple_weight_up"}
    owner = net.module[0].weight.detach()
    with net.at({"0.bits": 4}):
        shown = net.module[0].weight
    nearest = fake_quantize(owner, QuantSpec("uint4", "group", 4, False, "fp16", "fp16"))
    assert (shown - nearest).abs().max() > 1e-3


def test_the_mean_goes_up_and_down() -> None:
    net = network()
    sampler = OneQuantLLM(every=2, levels=3).sampler(net, generator())
    assert [sampler.place(step) for step in range(10)] == [0, 0, 0.5, 0.5, 1, 1, 0.5, 0.5, 0, 0]
    means = []
    for method in (OneQuantLLM(every=1, levels=9), OneQuantLLM(balanced=False)):
        sampler = method.sampler(net, generator())
        drawn = [np.mean(list(sampler.sample(s, None)[0].config.values())) for s in range(320)]
        means.append((np.mean(drawn), np.std(drawn)))
    (moving, wide), (uniform, narrow) = means
    assert abs(moving - 3) < 0.1
    assert abs(uniform - 3) < 0.1
    assert wide > 1.3 * narrow  # with three layers; with many far more


@pytest.mark.parametrize("mean", [2.0, 2.4, 3.9, 8.0])
def test_leaning_probabilities_have_the_mean(mean: float) -> None:
    values = np.array([2.0, 3.0, 4.0, 8.0])
    found = leaning(values, mean)
    assert found.sum() == pytest.approx(1)
    assert found @ values == pytest.approx(mean)
    ratios = np.diff(np.log(found + 1e-300)) / np.diff(values)
    assert mean in (2.0, 8.0) or np.ptp(ratios) < 1e-6


def test_codes_are_found_by_gptq() -> None:
    net = network()
    OneQuantLLM().quantize(net, [(X,)])
    spec = QuantSpec("uint2", "group", 4, False, "fp16", "fp16")
    gram = statistics(model(), [(X,)], ["gram"])["0.weight"].gram
    found = gptq(model()[0].weight.detach(), gram, spec)
    with net.at({"0.bits": 2}):
        torch.testing.assert_close(net.module[0].weight, found.dequantize())


def test_settings_that_can_not_be_used_say_so() -> None:
    for kind, settings, match in (
        (OneQuantLLM, {"levels": 1}, "levels must be at least 2, got 1"),
        (OneQuantLLM, {"every": 0}, "every must be at least 1"),
        (AdaptedBits, {"rank": 0}, "rank must be at least 1, got 0"),
        (AdaptedBits, {"group_size": None}, "give a group_size"),
        (AdaptedBits, {"modes": ("channel",)}, "leave modes"),
    ):
        with pytest.raises(SettingError, match=match):
            kind(**settings)
    plain = elastic(model(), X, axes=[Bits((4,))], verify=False)
    with pytest.raises(SettingError, match="trains adapters, of which this network has none"):
        run(plain, OneQuantLLM())
