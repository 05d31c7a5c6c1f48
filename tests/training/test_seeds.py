"""Named streams of randomness."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from supple.training.seeds import Stream, derive, generator, kept


def draw() -> tuple[float, float, float]:
    return (torch.rand(()).item(), np.random.rand(), random.random())


def test_seeds_for_different_purposes_differ():
    seeds = {derive(seed, name, i) for seed in (0, 1) for name in "ab" for i in range(3)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_repeat():
    a, b = (torch.rand(3, generator=generator(5, "x")) for _ in range(2))
    assert torch.equal(a, b)


def test_kept_puts_all_global_generators_back_also_after_an_exception():
    with kept():
        expected = [draw(), draw()]

    def fail():
        with kept(seed=3):
            draw()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [draw(), draw()] == expected


def test_a_stream_goes_on_where_it_was_left():
    with kept(seed=4):
        expected = [draw(), draw(), draw()]
    stream = Stream(4)
    drawn = []
    for _ in range(3):
        with stream.on():
            drawn.append(draw())
        draw()
    assert drawn == expected
