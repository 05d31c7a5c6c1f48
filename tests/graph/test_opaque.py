"""What cannot be recorded is held fixed and said, and the rest of the model stays elastic."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supple.errors import UnsupportedModelError
from supple.graph.record import record
from supple.network import Elastic, elastic


class Between(nn.Module):
    """An elastic block, an odd module in the middle, and another elastic block."""

    def __init__(self, odd: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, width))
        self.odd = odd
        self.last = nn.Sequential(nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.first(x)))


class ByNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().clip(-1, 1))


class ByList(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(x.tolist()).to(x.dtype)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class OwnFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x)


class PlainIntegersOnly(nn.Module):
    """Refuses integers that are not exactly that, as C extensions do."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 2
        self.scale = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        if type(self.times) is not int:
            raise TypeError(f"times must be int, not {type(self.times)}")
        return self.scale * x * self.times


class ByValue(nn.Module):
    """Takes one of two ways; the example inputs take the first."""

    def __init__(self) -> None:
        super().__init__()
        self.usual = nn.Linear(12, 12)
        self.rare = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.rare(x) if x.mean() > 1000 else self.usual(x)


class UntilSmall(nn.Module):
    """Repeats as often as the values ask for: every way runs the same operators."""

    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 1:
            x = x / 2
        return x


class NonZero(nn.Module):
    """Rows are chosen by a mask: how many is known at run time only."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x[x.sum(1) > -1000]
        return torch.zeros_like(x).index_add(0, torch.arange(len(x)), rows)


@torch.library.custom_op("supple_tests::halve", mutates_args=())
def halve(x: Tensor) -> Tensor:
    return x / 2


class OwnOperator(nn.Module):
    """An operator without a kernel for shapes alone."""

    def forward(self, x: Tensor) -> Tensor:
        return halve(x)


def made_elastic(odd: nn.Module) -> Elastic:
    torch.manual_seed(0)
    return elastic(Between(odd), torch.randn(4, 5))


def reason(net: Elastic, name: str) -> str:
    return next(f.reason for f in net.space.fixed if f.name == name)


@pytest.mark.parametrize(
    ("odd", "part"),
    [
        (ByNumpy(), "leave PyTorch by numpy() at test_opaque.py"),
        (ByList(), "leave PyTorch by tolist() at test_opaque.py"),
        (PlainIntegersOnly(), "the module 'odd' cannot be recorded (TypeError: times must be"),
        (ByValue(), "whether 'odd.rare' runs"),
        (NonZero(), "chosen by a mask"),
        (OwnOperator(), "the operator supple_tests::halve has no rule"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_out_of_sight_is_fixed_with_the_reason(odd: nn.Module, part: str) -> None:
    net = made_elastic(odd)
    assert [site.name for site in net.space.sites] == ["first.0", "last.0"]
    assert part in reason(net, "first.2.weight[0]")
    assert net.verify().ok


@pytest.mark.parametrize("odd", [OwnFunction(), UntilSmall()])
def test_what_every_way_shows_stays_elastic(odd: nn.Module) -> None:
    net = made_elastic(odd)
    assert [site.name for site in net.space.sites] == ["first.0", "first.2", "last.0"]
    assert net.verify().ok


def test_an_opaque_module_leaves_the_model_as_it_was() -> None:
    odd = PlainIntegersOnly()
    recording = record(Between(odd), (torch.randn(4, 5),))
    assert set(recording.opaque) == {"odd"}
    assert type(odd.times) is int
    assert json.dumps(odd.times) == "2"


def test_a_model_that_fails_by_itself_is_not_made_opaque() -> None:
    with pytest.raises(UnsupportedModelError, match="mat1 and mat2 shapes"):
        elastic(Between(nn.Linear(7, 12)), torch.randn(4, 5))


def test_what_runs_on_the_rare_way_still_fits() -> None:
    net = made_elastic(ByValue())
    module = net.module
    with net.at(net.space.smallest()), torch.no_grad():
        assert isinstance(module, Between)
        out = module.first(torch.randn(4, 5))
        assert module.last(module.odd(out + 10000)).shape == (4, 3)


class Settings:
    def __init__(self) -> None:
        self._attn_implementation = "fused"
        self.use_cache = True


class TwoWays(PlainIntegersOnly):
    """Can be recorded in its plain way only."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()

    def forward(self, x: Tensor) -> Tensor:
        if self.settings._attn_implementation == "fused":
            return super().forward(x)
        return self.scale * x * 2


def test_a_way_that_the_model_declares_to_be_equivalent_is_recorded_instead() -> None:
    odd = TwoWays()
    net = made_elastic(odd)
    assert [site.name for site in net.space.sites] == ["first.0", "first.2", "last.0"]
    assert vars(odd.settings) == {"_attn_implementation": "fused", "use_cache": True}
    assert net.verify().ok


def test_a_way_that_the_caller_says_is_equivalent_is_recorded_instead() -> None:
    odd = TwoWays()
    del odd.settings.use_cache
    odd.settings._attn_implementation = "fused"

    @contextlib.contextmanager
    def plain(model: nn.Module) -> Iterator[None]:
        calls.append(model)
        odd.settings._attn_implementation = "written out"
        yield
        odd.settings._attn_implementation = "fused"

    calls: list[nn.Module] = []
    model = Between(odd)
    net = elastic(model, torch.randn(4, 5), equivalents=[plain])
    assert calls == [model]
    assert not net.graph.recording.opaque


def test_experts_without_values_take_any_type() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.zoo.decoders import decoder_sizes

    with torch.device("meta"):
        config = MixtralConfig(**decoder_sizes(), num_local_experts=4)
        model = MixtralForCausalLM(config)
    ids = torch.ones(2, 7, dtype=torch.long, device="meta")
    net = elastic(model, (), {"input_ids": ids})
    assert {site.axis for site in net.space.sites} == {"width", "heads", "experts", "depth"}
