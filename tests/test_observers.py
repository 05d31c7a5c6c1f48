"""Ranges of numbers that are to be quantized."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.observers import (
    RANGES,
    RangeObserver,
    gaussian,
    least_error,
    mean_abs,
    percentile,
    rms,
    twice_mean,
)
from supple.testing.toys import generator

SPEC = QuantSpec("int3", "group", 16)


def test_ranges_by_hand() -> None:
    x = torch.tensor([[-3.0, 1.0, 1.0, 5.0]])
    low, high = rms(x, SPEC, factor=1.0)  # the root mean square is 3
    assert (low.item(), high.item()) == (-3.0, 3.0)
    low, high = mean_abs(x, SPEC)  # 2 * 2.5 * sqrt(3), beyond the values
    assert (low.item(), high.item()) == (-3.0, 5.0)
    low, high = mean_abs(torch.tensor([[9.0, 0, 0, 0, 0, 0]]), SPEC)
    torch.testing.assert_close(high, torch.tensor([3.5 * 3 / 3**0.5]))  # 3.5 steps
    low, high = percentile(torch.arange(1001.0), SPEC, share=0.99)
    assert (low.item(), high.item()) == (10.0, 990.0)


def test_ranges_by_statistics_may_go_beyond_the_largest() -> None:
    values = torch.tensor([[1.0, -1.0, 1.0, -3.0]])
    spec = QuantSpec("midrise2")
    # Four levels, a step of twice the mean over two: 1.5 steps to the outermost.
    assert twice_mean(values, spec)[1].item() == pytest.approx(1.5 * 2 * 1.5 / 2)
    # What the authors of QuEST found for the normal distribution.
    for bits, reach in ((1, 0.79788), (2, 1.49353), (3, 2.05107), (4, 2.51393)):
        least, most = gaussian(values, QuantSpec(f"midrise{bits}"))
        assert most.item() == pytest.approx(reach * 3**0.5, rel=1e-4)
        assert least.item() == -most.item()


def test_the_least_error_is_not_above_that_of_any_range() -> None:
    x = torch.randn(5, 37, generator=generator())
    x[2, 3] = 9.0
    for spec in (SPEC, QuantSpec("uint3", "group", 16, symmetric=False)):
        best = (fake_quantize(x, spec, observer=least_error) - x).abs().pow(2.4)
        plain = (fake_quantize(x, spec) - x).abs().pow(2.4)
        assert (best.sum(1) <= plain.sum(1)).all()
        assert best.sum() < 0.9 * plain.sum()
    tried = [
        (SPEC.rounded(x[2:3, :16], torch.tensor(9.0 * (1 - 0.8 * i / 80) / 3)) - x[2, :16])
        .abs()
        .pow(2.4)
        .sum()
        for i in range(80)
    ]
    found = SPEC.scales(x, least_error)[0][2, 0]
    torch.testing.assert_close(
        found, torch.tensor(9.0 * (1 - 0.8 * torch.stack(tried).argmin().item() / 80) / 3)
    )


@pytest.mark.parametrize("kind", RANGES)
def test_every_range_takes_zeros_tails_and_relative_scales(kind: str) -> None:
    x = torch.randn(3, 21, generator=generator())
    x[1] = 0
    for held in ("fp32", "e4m3"):
        spec = dataclasses.replace(SPEC, scale_format=held)
        back = fake_quantize(x, spec, observer=RANGES[kind])
        assert back.isfinite().all()
        assert (back[1] == 0).all()
        assert (back - x).norm() < x.norm() * 0.5


def test_observers_go_over_batches() -> None:
    spec = QuantSpec("uint8", "tensor", symmetric=False)
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 4.0])]
    found = {}
    for kind in ("minmax", "ema"):
        observer = RangeObserver(spec, kind, decay=0.75)
        for batch in batches:
            observer.see(batch)
        found[kind] = [end.item() for end in observer.ends()]
        again = RangeObserver(spec, kind)
        again.load_state_dict(observer.state_dict())
        assert again.result() == observer.result()
    assert found == {"minmax": [-1.0, 4.0], "ema": [-0.75, 2.5]}
    observer = RangeObserver(spec, "percentile")
    for _ in range(2):
        observer.see(torch.arange(100_001.0))
    assert 99_000 < observer.ends()[1] < 99_950


def test_values_that_are_kept_come_from_all_columns() -> None:
    spec, values = QuantSpec("uint8", "tensor", symmetric=False), torch.rand(4096, 16)
    values[:, 3] *= 100.0  # an even step through all of them would see the first column only
    observer = RangeObserver(spec, "percentile")
    observer.see(values)
    _, most = observer.ends()
    assert 90 < most <= 100


def test_observers_watch_the_inputs_of_layers() -> None:
    from supple.calibrate import statistics

    spec = QuantSpec("uint8", "tensor", symmetric=False)
    make = partial(RangeObserver, spec)
    x = torch.randn(7, 3, 5, 5, generator=generator())
    model = nn.Conv2d(3, 2, 3, padding=1)
    found = statistics(model, [(x,)], ["range"], observers={"range": make})
    expected = spec.scales(x)
    assert found["weight"]["range"] == expected


def test_what_can_not_be_used_says_so() -> None:
    spec = QuantSpec("int8", "tensor")
    with pytest.raises(SettingError, match="no observer 'minmix', did you mean 'minmax'"):
        RangeObserver(spec, "minmix")
    with pytest.raises(SettingError, match="granularity='tensor', got 'channel'"):
        RangeObserver(QuantSpec("int8"))
    with pytest.raises(SettingError, match="decay"):
        RangeObserver(spec, decay=1.0)
    with pytest.raises(SettingError, match="before any were seen"):
        RangeObserver(spec).result()
    with pytest.raises(SettingError, match="share"):
        percentile(torch.ones(3), spec, share=0.5)
