"""Measured figures are of what was asked for, and measuring leaves no trace."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from torch import nn

from supple.cost.measure import Timing, device_name, measure, measure_named, with_batch
from supple.errors import SettingError, UnsupportedModelError


class Sleeper(nn.Module):
    """Takes a known time, and notes how it was run."""

    def __init__(self, seconds: float = 0.002) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7)
        self.seconds = seconds
        self.calls: list[tuple[int, int, bool, bool]] = []

    def forward(self, x):
        self.calls.append(
            (len(x), torch.get_num_threads(), self.training, torch.is_grad_enabled())
        )
        time.sleep(self.seconds)
        return self.layer(x)


X = torch.zeros(3, 5)


def test_latency_is_the_time_of_one_forward():
    found = measure(Sleeper(0.005), (X,), what=("latency",), repeats=11)
    assert found.latency is not None
    assert found.latency.repeats == 11
    assert 0.005 <= found.latency.low <= found.latency.median <= found.latency.high
    assert found.latency.median < 0.05
    assert found.memory is None
    assert found.values == {"latency": found.latency.median}


def test_a_warm_up_is_not_timed():
    net = Sleeper(0)
    found = measure(net, (X,), what=("latency",), repeats=5)
    assert found.latency is not None
    assert len(net.calls) >= 5 + 3


def test_repeats_follow_from_the_time_by_default():
    found = measure(Sleeper(0.06), (X,), what=("latency",))
    assert found.latency is not None
    assert found.latency.repeats == 10


def test_threads_are_pinned_and_restored():
    before = torch.get_num_threads()
    net = Sleeper(0)
    measure(net, (X,), threads=2, repeats=3)
    assert {threads for _, threads, _, _ in net.calls} == {2}
    assert torch.get_num_threads() == before
    assert gc.isenabled()


def test_networks_are_run_in_eval_mode_without_gradients_and_put_back():
    net = Sleeper(0).train()
    measure(net, (X,), repeats=3)
    assert {(training, grad) for _, _, training, grad in net.calls} == {(False, False)}
    assert net.training
    assert torch.is_grad_enabled()


def test_memory_is_weights_inputs_and_activations_at_the_peak():
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    found = measure(net, (torch.zeros(2, 5),), what=("memory",))
    assert found.memory == 4 * (5 * 7 + 7 + 7 * 3 + 3) + 4 * 2 * (5 + 7 + 3)
    assert found.latency is None


def test_memory_counts_buffers_and_tied_weights_once():
    net = nn.Linear(5, 5)
    net.register_buffer("same", net.weight.detach())
    net.register_buffer("extra", torch.zeros(11))
    assert measure_named(net, "memory", (X,)) == 4 * (25 + 5 + 11) + 4 * (15 + 15)


def test_a_name_sets_batch_and_threads():
    net = Sleeper(0)
    seconds = measure_named(net, "latency[batch=7, threads=2, repeats=3]", (X,))
    assert seconds > 0
    assert {(batch, threads) for batch, threads, _, _ in net.calls} == {(7, 2)}
    assert len(X) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latancy", "did you mean 'latency'"),
        ("latency[batsh=1]", "did you mean 'batch'"),
        ("latency[batch=one]", "whole number, got 'one'"),
        ("latency[batch=0]", "batch must be a whole number of at least 1"),
        ("latency[batch=1", "no name of a measured cost"),
    ],
)
def test_a_wrong_name_says_what_would_do(name, message):
    with pytest.raises(SettingError, match=message):
        measure_named(nn.Linear(5, 7), name, (X,))


def test_another_batch_repeats_or_cuts_every_batched_input():
    x, mask, table = torch.arange(3)[:, None], torch.arange(3), torch.zeros(5)
    args, kwargs = with_batch(5, (x,), {"mask": [mask, 4], "table": table})
    assert args[0].flatten().tolist() == [0, 1, 2, 0, 1]
    assert kwargs["mask"][0].tolist() == [0, 1, 2, 0, 1]
    assert kwargs["mask"][1] == 4
    assert kwargs["table"] is table
    assert with_batch(1, (x,))[0][0].tolist() == [[0]]


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(SettingError, match="batch dimension"):
        with_batch(2, (3,))


def test_a_forward_that_fails_says_why():
    with pytest.raises(UnsupportedModelError, match="Linear fails"):
        measure(nn.Linear(7, 5), (X,))
    assert gc.isenabled()


def test_the_device_is_named_with_its_threads():
    assert device_name(threads=1).endswith(", 1 thread")
    assert device_name(threads=2).endswith(", 2 threads")
    found = measure(nn.Linear(5, 7), (X,), threads=2, repeats=2)
    assert found.device == device_name("cpu", 2)
    assert str(found).endswith(found.device)


def test_the_spread_is_between_the_quartiles():
    assert Timing(median=2.0, low=1.5, high=4.0, repeats=9).spread == 2.5


@pytest.mark.gpu
def test_memory_on_a_gpu_is_the_allocators_peak():
    net = nn.Sequential(nn.Linear(1024, 2048), nn.Linear(2048, 512)).cuda()
    x = torch.zeros(4096, 1024, device="cuda")
    found = measure(net, (x,))
    weights = sum(p.numel() for p in net.parameters())
    expected = 4 * (weights + 4096 * (1024 + 2048 + 512))
    # The allocator rounds up, and libraries keep some workspace.
    assert found.memory is not None
    assert expected <= found.memory <= expected + 64 * 2**20
    assert found.latency is not None
    assert found.device == torch.cuda.get_device_name()
